//! One address in use: who holds it, and what speakers report of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::{Condition, EgressPolicy, Holder, NodeName, ObjectKey, OldFlows};
use crate::selector::LabelSelector;

/// What outlives an egress policy, on the record of an address that its pods leave by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// What becomes of its pods' flows when it goes.
    pub on_delete: OldFlows,
    /// The nodes that may be the gateway; without it all.
    pub gateways: Option<LabelSelector>,
    /// Nothing begins there any more: the flows that are there go on to their end.
    pub drains: bool,
}

impl Terms {
    /// Those of a policy that is there.
    pub fn of(policy: &EgressPolicy) -> Self {
        Self {
            on_delete: policy.spec.on_delete,
            gateways: policy.spec.gateways.clone(),
            drains: false,
        }
    }
}

/// A `VirtualIP`: one address in use, as the controller wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualIp {
    /// The address.
    pub address: IpAddr,
    /// The pool it came from.
    pub pool: Arc<str>,
    /// The group it moves with: all addresses of one holder carry the same group.
    pub group: Arc<str>,
    /// The Services that hold it. Only an address with holders is announced; a freed one rests without.
    pub services: Vec<ObjectKey>,
    /// The egress policies whose pods leave by it: the one that holds it, or those that use its Services' address.
    pub egress_policies: Vec<Arc<str>>,
    /// What outlives these.
    pub terms: BTreeMap<Arc<str>, Terms>,
    /// `spec.former`: the Services that held it and have it back at once, while it rests.
    pub former: Vec<ObjectKey>,
    /// `spec.formerEgressPolicies`: the same of egress policies.
    pub former_policies: Vec<Arc<str>>,
    /// `spec.retain`: whether its pool wanted it kept should the pool no longer contain it, or be deleted.
    pub retain: bool,
    /// `status.leader`, as a speaker reported it.
    pub leader: Option<NodeName>,
    /// `status.epoch`, likewise: the leader's claim's.
    pub epoch: u64,
    /// `status.standby`, likewise.
    pub standby: Option<NodeName>,
    /// Ports that flows of a policy's pods have on it (`status.egress`), as the leader reported.
    pub ports_in_use: BTreeMap<Arc<str>, u64>,
    /// The policies of which the leader says that no flow is left that was to go on to its end, likewise.
    pub drained: BTreeSet<Arc<str>>,
    /// `status.conditions`, as a speaker reported them.
    pub conditions: Vec<Condition>,
}

impl VirtualIp {
    /// What a speaker reported of it.
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        let mut all = self.conditions.iter();
        all.find(|condition| condition.kind == kind)
    }

    /// An address that nobody holds and nobody reported on.
    pub fn unheld(address: IpAddr, pool: Arc<str>, group: Arc<str>) -> Self {
        Self {
            address,
            pool,
            group,
            services: Vec::new(),
            egress_policies: Vec::new(),
            terms: BTreeMap::new(),
            former: Vec::new(),
            former_policies: Vec::new(),
            retain: false,
            leader: None,
            epoch: 0,
            standby: None,
            ports_in_use: BTreeMap::new(),
            drained: BTreeSet::new(),
            conditions: Vec::new(),
        }
    }

    /// Whether flows of a policy go on to their end here, and none begins.
    pub fn drains(&self, policy: &str) -> bool {
        self.terms.get(policy).is_some_and(|terms| terms.drains)
    }

    /// Whether that is all that it is there for.
    pub fn only_drains(&self) -> bool {
        let mut policies = self.egress_policies.iter();
        self.services.is_empty() && self.is_held() && policies.all(|policy| self.drains(policy))
    }

    /// Whether a speaker has ever said anything of it: else nobody has left by it.
    pub fn was_reported(&self) -> bool {
        self.leader.is_some() || !self.conditions.is_empty()
    }

    /// Whether anybody holds it.
    pub fn is_held(&self) -> bool {
        !self.services.is_empty() || !self.egress_policies.is_empty()
    }

    /// Who holds it: its Services, or the policy that does without any. Policies of a Service's address do not hold it
    /// themselves: they go where the Service goes.
    pub fn holders(&self) -> Vec<Holder> {
        if self.services.is_empty() {
            let policies = self.egress_policies.iter().cloned();
            return policies.map(Holder::EgressPolicy).collect();
        }
        self.services.iter().cloned().map(Holder::Service).collect()
    }

    /// Who held it and has it back at once, while it rests.
    pub fn former_holders(&self) -> impl Iterator<Item = Holder> {
        let services = self.former.iter().cloned().map(Holder::Service);
        let policies = self
            .former_policies
            .iter()
            .cloned()
            .map(Holder::EgressPolicy);
        services.chain(policies)
    }
}
