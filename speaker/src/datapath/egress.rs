//! Pods that leave by an address of their own, as the programs see them.

pub(super) mod guard;

use std::collections::BTreeSet;
use std::sync::Arc;

use landfall_core::model::NodeName;

use crate::egress::Egress;

/// What the programs should know of pods that leave by addresses of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// This node.
    pub node: NodeName,
    /// Whose pods they are.
    pub egress: Arc<Egress>,
    /// The interfaces (by index) to the outside: those at which VIPs are announced, those of default routes, and the
    /// tunnel where there is one. At each of them the guard is.
    pub outside: BTreeSet<u32>,
    /// The bits of the packet mark by which the packet filter says its judgement
    /// ([`node_rules::Config`](crate::node_rules::Config)).
    pub mark: u32,
}
