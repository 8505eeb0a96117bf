//! Pods that leave by an address of their own, as the programs see them: the guard of their nodes, and the gateway.
//!
//! ```text
//!  Leaving ─> guard ─> judge   the latter only beside Cilium, where no packet filter judges
//!  Egress, Surroundings ─> plan    what the gateway's maps are to hold, by name
//!                           └─> tables   the maps, by number
//!  gateway   its programs: there only while this node has something to translate
//!  keeper    ends what is idle and what has rested
//!  copies    bindings as replication reads and writes them; changes: what the programs tell of theirs
//!  standing  what this node is to egress addresses
//!  keeper    ends what is idle and what has rested, and counts what is there: tally, usage
//!  list      bindings, one by one, for whoever asks
//! ```

mod attach;
mod changes;
mod copies;
mod error;
mod gateway;
pub(super) mod guard;
pub(super) mod judge;
mod keeper;
mod layout;
mod list;
mod metrics;
mod plan;
mod standing;
mod tables;
mod tally;
mod usage;

use std::collections::BTreeSet;
use std::sync::Arc;

use landfall_core::model::NodeName;

pub use gateway::{Gateway, GatewayConfig, State};
pub use guard::{Earlier, Was, earlier, seed_of};
pub use list::{Bound, State as FlowState};
pub use plan::{Peer, PeerId, Surroundings, Uplink};
pub use standing::{Licence, Standing};
pub use tally::Bindings;
pub use usage::{Usage, drops};

pub(super) use attach::Side;
pub(super) use landfall_ebpf_common::egress::gateway::map::CHANGES;
pub(super) use layout::SHAPES;
#[cfg(test)]
pub(super) use {
    changes::Changes, changes::Source, copies::Copies, copies::Kernel, copies::Seam,
    keeper::Keeper, keeper::Known, keeper::Orphaned, plan::Plan, plan::plan as mk_plan,
    standing::states, tables::Tables,
};

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
    /// Where this node is.
    pub around: Arc<Surroundings>,
}
