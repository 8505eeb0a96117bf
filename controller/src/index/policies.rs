//! What the statuses of egress policies should say: their addresses from the allocator, their pods from the index of
//! pods, their gateways from the `VirtualIP`s that speakers reported on.

mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use landfall_api::conditions::{EGRESS_NAMESPACES_NOT_ADMITTED, EGRESS_OVERLAPPING, EGRESS_READY};
use landfall_core::egress::{EgressIndex, Options};
use landfall_core::ipam::{Ipam, Notice, PolicyChange};
use landfall_core::model::{
    Condition, EgressPolicy, EgressStatus, Event, Kind, NodeName, Object, ObjectId, VirtualIp,
};
use serde_json::{Value, json};

use crate::writer::PolicyStatus;
use words::Facts;

/// What is done when a policy gets or loses addresses or its gateway.
const ACTION: &str = "ProvideEgress";

/// The policies' statuses.
#[derive(Debug)]
pub(super) struct Policies {
    index: EgressIndex,
    /// Those to look at.
    touched: BTreeSet<Arc<str>>,
    /// What was last asked to be written, and over which observation.
    said: BTreeMap<Arc<str>, (EgressStatus, EgressStatus)>,
    /// What Events were last about, or what was found at start: a word by condition type.
    notified: BTreeMap<Arc<str>, BTreeMap<String, String>>,
    /// What was taken from policies, until an Event says so.
    lost: BTreeMap<Arc<str>, Vec<String>>,
}

impl Default for Policies {
    fn default() -> Self {
        Self {
            index: EgressIndex::new(Options {
                namespaces_listed: true,
            }),
            touched: BTreeSet::new(),
            said: BTreeMap::new(),
            notified: BTreeMap::new(),
            lost: BTreeMap::new(),
        }
    }
}

impl Policies {
    /// Takes an event in.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Apply(Object::EgressPolicy(policy)) => {
                let found = || words(&policy.status.conditions);
                let name = policy.name.clone();
                self.notified.entry(name).or_insert_with(found);
            }
            Event::Delete(ObjectId::EgressPolicy(name)) => {
                self.touched.remove(name);
                self.said.remove(name);
                self.notified.remove(name);
                self.lost.remove(name);
            }
            Event::Synced(Kind::EgressPolicy) => {
                // An observation may have skipped what happened in between: compare anew.
                self.said.clear();
                let all = self.index.policies().map(|policy| policy.name.clone());
                self.touched.extend(all);
            }
            Event::Apply(_) | Event::Delete(_) | Event::Synced(_) | Event::Unwatched(_) => {}
        }
        self.index.apply_shared(event);
    }

    /// The statuses that should be written and were not asked for yet. Nothing before all is listed that they tell of.
    pub(super) fn reconcile(&mut self, ipam: &Ipam, changes: &[PolicyChange]) -> Vec<PolicyStatus> {
        for change in changes {
            self.touched.insert(change.name.clone());
            if !change.lost.is_empty() {
                let lost = self.lost.entry(change.name.clone()).or_default();
                lost.extend(change.lost.iter().cloned());
            }
        }
        self.touched.extend(self.index.reconcile().policies);
        if !ipam.is_ready() || !self.index.is_synced() {
            return Vec::new();
        }
        std::mem::take(&mut self.touched)
            .into_iter()
            .filter_map(|name| self.emit(&name, ipam))
            .collect()
    }

    fn emit(&mut self, name: &Arc<str>, ipam: &Ipam) -> Option<PolicyStatus> {
        let policy = self.index.policy(name)?;
        let allocation = ipam.allocation(name)?;
        let vips: Vec<&VirtualIp> = allocation
            .addresses
            .iter()
            .filter_map(|address| ipam.virtual_ip(*address))
            .collect();
        let report = self.index.report(name)?;
        let facts = Facts {
            policy,
            allocation: &allocation,
            report: &report,
            vips: &vips,
        };
        let (ready, settled) = facts.ready();
        let conditions = [
            Some(ready),
            facts.overlapping(),
            facts.host_network_pods(),
            facts.namespaces_not_admitted(),
        ];
        let used = |vip: &&VirtualIp| vip.ports_in_use.get(name).copied().unwrap_or_default();
        let wanted = EgressStatus {
            generation: policy.generation,
            addresses: allocation.addresses.clone(),
            gateway: facts.gateway().cloned(),
            standby: facts.standby().cloned(),
            matched_pods: count(report.matched),
            host_network_pods: count(report.host_network),
            ports_in_use: vips.iter().map(used).sum(),
            conditions: conditions.into_iter().flatten().collect(),
        };
        let observed = policy.status.clone();
        if wanted == observed {
            self.said.remove(name);
            return None;
        }
        let uid = policy.uid.clone();
        let since = still(policy, &wanted.conditions);
        let said = (wanted, observed);
        if self.said.get(name) == Some(&said) {
            return None;
        }
        self.said.insert(name.clone(), said.clone());
        let notices = if settled {
            self.notices(name, &said.0.conditions)
        } else {
            Vec::new()
        };
        Some(PolicyStatus {
            name: name.clone(),
            uid,
            status: said.0,
            since,
            notices,
        })
    }

    /// The Events of what has changed since the last ones: not of messages, whose numbers change with each pod.
    fn notices(&mut self, name: &Arc<str>, conditions: &[Condition]) -> Vec<Notice> {
        let now = words(conditions);
        let before = self.notified.insert(name.clone(), now.clone());
        let before = before.unwrap_or_default();
        let mut notices = Vec::new();
        if let Some(lost) = self.lost.remove(name) {
            notices.push(Notice {
                warning: true,
                action: ACTION,
                reason: "AddressTakenBack".into(),
                message: lost.join("; "),
            });
        }
        for condition in conditions {
            let tells = [
                EGRESS_READY,
                EGRESS_OVERLAPPING,
                EGRESS_NAMESPACES_NOT_ADMITTED,
            ];
            let is_ready = condition.kind == EGRESS_READY;
            let changed = before.get(&condition.kind) != now.get(&condition.kind);
            if tells.contains(&condition.kind.as_str()) && changed {
                notices.push(Notice {
                    warning: !is_ready || condition.status != "True",
                    action: ACTION,
                    reason: condition.reason.clone(),
                    message: condition.message.clone(),
                });
            }
        }
        notices
    }

    /// What is worth seeing of each policy.
    pub(super) fn debug(&self) -> Value {
        let policy = |policy: &EgressPolicy| {
            let report = self.index.report(&policy.name).unwrap_or_default();
            json!({
                "name": policy.name,
                "matched": report.matched,
                "hostNetwork": report.host_network,
                "taken": report.taken,
                "notAdmitted": report.not_admitted,
            })
        };
        self.index.policies().map(policy).collect()
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// Status and reason by type.
fn words(conditions: &[Condition]) -> BTreeMap<String, String> {
    let word = |condition: &Condition| format!("{} {}", condition.status, condition.reason);
    conditions
        .iter()
        .map(|condition| (condition.kind.clone(), word(condition)))
        .collect()
}

/// Since when those conditions are what they are that were so before.
fn still(policy: &EgressPolicy, wanted: &[Condition]) -> BTreeMap<String, i64> {
    let was = |condition: &Condition| {
        let observed = &policy.status.conditions;
        observed
            .iter()
            .any(|before| before.kind == condition.kind && before.status == condition.status)
    };
    let mut since = policy.since.clone();
    since.retain(|kind, _| wanted.iter().any(|c| c.kind == *kind && was(c)));
    since
}

impl Facts<'_> {
    /// The node that the pods leave at: the leader of all its addresses.
    pub(super) fn gateway(&self) -> Option<&NodeName> {
        self.vips.iter().find_map(|vip| vip.leader.as_ref())
    }

    /// The node that would take over.
    pub(super) fn standby(&self) -> Option<&NodeName> {
        self.vips.iter().find_map(|vip| vip.standby.as_ref())
    }
}
