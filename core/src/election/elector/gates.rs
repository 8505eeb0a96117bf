//! Of which egress policies nodes can be the gateway.

use std::collections::BTreeSet;

use super::Elector;
use crate::election::gossip::Registers;
use crate::groups::GroupId;
use crate::model::NodeName;

impl Elector {
    /// Says of which of a group's egress policies, by [`policy_id`](crate::election::policy_id), this node can be the gateway.
    pub fn set_gates(&mut self, group: &GroupId, policies: BTreeSet<u64>) {
        let local = self.local.entry(group.clone()).or_default();
        if local.gates != policies {
            local.gates = policies;
            self.dirty.insert(group.clone());
        }
    }

    /// Whether a node says that it can be the gateway of a policy of a group, or its run before said so: the kernel's state
    /// outlives a run. It is no word of a run that treats no packets by egress policies, or not any more.
    pub fn gates(&self, node: &NodeName, group: &GroupId, policy: u64) -> bool {
        if *node == self.me {
            let local = self.local.get(group);
            return self.has_gates && local.is_some_and(|local| local.gates.contains(&policy));
        }
        let latest = self.registers(node).and_then(Registers::register);
        latest.is_none_or(|latest| latest.capabilities.gates)
            && self
                .said(node)
                .filter_map(|registers| registers.group(group))
                .any(|register| register.gates.contains(&policy))
    }

    /// Says whether this node treats packets by egress policies; if not, it takes back what was said of policies.
    pub fn set_has_gates(&mut self, has: bool) {
        self.all_dirty |= self.has_gates != has;
        self.has_gates = has;
    }
}
