//! What policies' pods use of this node, looked at now and then; and this node taken out of it all, by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use landfall_core::groups::GroupId;

use super::super::Speaker;
use crate::datapath::egress::{Bound, Usage};
use crate::egress::PolicyName;

/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What was found at the last look.
#[derive(Debug, Default)]
pub(in super::super) struct Uses {
    due: Duration,
    /// What each policy's pods use of this node as their gateway.
    usage: BTreeMap<PolicyName, Usage>,
    /// Packets of this node's pods that were dropped for want of a gateway.
    dropped: BTreeMap<PolicyName, u64>,
    /// Somebody wants this node out of it: it hands over what it is the gateway of.
    handing_over: bool,
    /// It is out of it.
    disarmed: bool,
}

impl Speaker {
    /// Looks what is used, if it is time; the groups that this node leads of which something is said.
    pub(in super::super) fn look_at_usage(&mut self, now: Duration) -> BTreeSet<GroupId> {
        if now < self.uses.due {
            return BTreeSet::new();
        }
        self.uses.due = now + LOOK_EVERY;
        self.uses.usage = self.parts.datapath.usage();
        self.uses.dropped = self.parts.rules.egress_dropped();
        let led = self.election.leaderships();
        led.filter(|(id, _)| self.group(id).is_some_and(|group| !group.egress.is_empty()))
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// What each policy's pods use of this node as their gateway, as it was seconds ago.
    pub fn usage(&self) -> &BTreeMap<PolicyName, Usage> {
        &self.uses.usage
    }

    /// Packets of this node's pods that its rules have dropped for want of a gateway, by policy, likewise.
    pub fn dropped_for_no_gateway(&self) -> &BTreeMap<PolicyName, u64> {
        &self.uses.dropped
    }

    /// The ports that flows of each policy's pods have on an address here.
    pub fn ports_of(&self, address: IpAddr) -> BTreeMap<PolicyName, u64> {
        let of = |usage: &Usage| usage.bindings.get(&address).map(|it| it.live);
        self.uses
            .usage
            .iter()
            .filter_map(|(policy, usage)| Some((policy.clone(), of(usage)?)))
            .collect()
    }

    /// The data path, for those who list bindings: that takes long, and needs nothing of what is here.
    pub fn bindings(&self) -> Bindings {
        Bindings(self.parts.datapath.clone())
    }

    /// The policies that this node is the gateway of, as the election has it.
    pub fn gateway_of(&self) -> BTreeSet<PolicyName> {
        let led = self.election.leaderships();
        led.filter_map(|(id, _)| self.group(id))
            .flat_map(|group| group.egress.iter().cloned())
            .collect()
    }

    /// Whether packets of egress policies' pods are treated on this node at all.
    pub fn treats_egress(&self) -> bool {
        self.identity.egress_mark.is_some()
    }

    /// Whether this node was taken out of it.
    pub fn is_disarmed(&self) -> bool {
        self.uses.disarmed
    }

    /// This node hands over what it is the gateway of, where another can take it; or it may lead such addresses again.
    pub fn hand_over_egress(&mut self, over: bool) {
        self.uses.handing_over = over;
        self.election.set_disarmed(over || self.uses.disarmed);
    }

    /// Takes this node's rules, guard and gateway away, or puts them back. Pods then leave as without policies, with
    /// whatever source the node gives them.
    pub fn disarm(&mut self, disarmed: bool, now: Duration) {
        self.uses.disarmed = disarmed;
        self.gates.look_again();
        self.hand_over_egress(disarmed);
        self.parts.datapath.disarm(disarmed);
        self.metrics.egress_disarmed.set(i64::from(disarmed));
        if disarmed {
            tracing::warn!(
                "egress is disarmed on this node: its pods leave as if there were no egress policies, until somebody arms it or the speaker restarts"
            );
        } else {
            tracing::info!("egress is armed on this node again");
        }
        self.apply_soon(now);
    }
}

/// Reads bindings.
#[derive(Clone)]
pub struct Bindings(std::sync::Arc<dyn crate::datapath::DataPath>);

impl Bindings {
    /// Those that `wanted` says yes to, and how many there are more than `most` of them. It reads all there are.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn list(
        &self,
        most: usize,
        wanted: &dyn Fn(&Bound) -> bool,
    ) -> std::io::Result<(Vec<Bound>, usize)> {
        self.0.bindings(most, wanted)
    }
}
