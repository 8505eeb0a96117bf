//! What should be written, compared with what is and with what was already asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::decide::{LossReason, Outcome};
use super::pool::PoolState;
use super::status::{
    ADDRESS_ASSIGNED, ADDRESS_CONFLICT, ANNOUNCED, Changes, Notice, Overlap, PoolStatus, Record,
    RecordChange, ServiceStatus, VIRTUAL_IP_ANNOUNCED,
};
use super::{Ipam, ServiceState};
use crate::ip::Family;
use crate::model::{Condition, Ingress, ObjectKey, Service, VirtualIp};

/// The part of a status that is ours: ingress, and conditions.
pub(super) type Said = (Option<Vec<IpAddr>>, Vec<Condition>);
/// What the status was when that was said.
pub(super) type Observed = (Vec<Ingress>, Vec<Condition>);

impl Ipam {
    /// Everything that is not as it should be and was not asked for since it was last seen.
    pub(super) fn emit(&mut self, now: Duration) -> Changes {
        let records = std::mem::take(&mut self.ledger.touched_records)
            .into_iter()
            .filter_map(|address| self.emit_record(address, now))
            .collect();
        let mut services = std::mem::take(&mut self.farewell);
        for key in std::mem::take(&mut self.touched) {
            services.extend(self.emit_service(&key));
        }
        Changes {
            records,
            services,
            pools: self.emit_pools(),
            policies: self.emit_policies(),
        }
    }

    fn emit_record(&mut self, address: IpAddr, now: Duration) -> Option<RecordChange> {
        let observed = self.virtual_ips.get(&address);
        let change = match self.ledger.record(address) {
            Some(record) if record.is_held() => Some(RecordChange::Put(record)),
            resting => {
                // Nobody may be shown an address whose record is gone: that is what others wait for.
                if self.shown.contains_key(&address) && resting.is_some() {
                    return None;
                }
                let known = observed.is_some() || self.records_said.contains_key(&address);
                let over = self
                    .ledger
                    .quarantine()
                    .get(address)
                    .is_none_or(|rest| rest.until <= now);
                match resting {
                    Some(record) if known && !over => Some(RecordChange::Put(record)),
                    Some(_) | None => known.then_some(RecordChange::Remove(address)),
                }
            }
        }?;
        let as_is = match (&change, observed) {
            (RecordChange::Put(record), Some(vip)) => same_record(record, vip),
            (RecordChange::Remove(_), None) => !self.records_said.contains_key(&address),
            (RecordChange::Put(_), None) | (RecordChange::Remove(_), Some(_)) => false,
        };
        if as_is && !self.records_said.contains_key(&address) {
            return None;
        }
        if self.records_said.get(&address) == Some(&change) {
            return None;
        }
        self.records_said.insert(address, change.clone());
        Some(change)
    }

    /// Whether the record of every address that the Service holds was observed to name it.
    fn is_recorded(&self, key: &ObjectKey, state: &ServiceState) -> bool {
        state.held.iter().all(|address| {
            self.virtual_ips
                .get(address)
                .is_some_and(|vip| vip.services.contains(key))
        })
    }

    fn emit_service(&mut self, key: &ObjectKey) -> Option<ServiceStatus> {
        let state = self.services.get(key)?;
        if state.outcome == Outcome::Undecided || !self.is_recorded(key, state) {
            return None;
        }
        let service = state.service.clone();
        let assigned = self.assigned_condition(state);
        let announced = self.announced_condition(state);
        let ingress = match state.outcome {
            Outcome::NotOurs | Outcome::Foreign(_) | Outcome::Undecided => None,
            Outcome::Assigned { .. } | Outcome::Refused(_) => Some(in_order(&service, &state.held)),
        };
        let turn = turn(state, announced.as_ref());
        let conditions: Vec<Condition> = assigned.clone().into_iter().chain(announced).collect();
        let said = (ingress, conditions);
        let observed = (service.ingress.clone(), our_conditions(&service));
        let as_is = said.1 == observed.1
            && said
                .0
                .as_ref()
                .is_none_or(|addresses| shows(&service, addresses));
        let state = self.services.get_mut(key)?;
        if as_is {
            state.said = None;
            state.notified = assigned;
            state.lost.clear();
            return None;
        }
        if state
            .said
            .as_ref()
            .is_some_and(|(before, over)| *before == said && *over == observed)
        {
            return None;
        }
        let notice = if assigned == state.notified {
            turn
        } else {
            notice(state, assigned.as_ref())
        };
        state.notified = assigned;
        state.lost.clear();
        state.said = Some((said.clone(), observed));
        Some(ServiceStatus {
            key: key.clone(),
            uid: service.uid.clone(),
            ingress: said.0,
            conditions: said.1,
            notice,
        })
    }

    /// Has what we wrote removed from a Service that is no longer ours to watch, if it still exists.
    pub(super) fn say_farewell(&mut self, key: &ObjectKey) {
        let Some(state) = self.services.get(key) else {
            return;
        };
        let service = &state.service;
        let ours = service
            .ingress
            .iter()
            .filter_map(|entry| entry.address)
            .any(|address| state.known.contains(&address));
        if ours || !our_conditions(service).is_empty() || state.said.is_some() {
            self.farewell.push(ServiceStatus {
                key: key.clone(),
                uid: service.uid.clone(),
                ingress: ours.then(Vec::new),
                conditions: Vec::new(),
                notice: None,
            });
        }
    }

    fn assigned_condition(&self, state: &ServiceState) -> Option<Condition> {
        let held = || {
            let named = in_order(&state.service, &state.held)
                .into_iter()
                .map(|address| {
                    let pool = self
                        .ledger
                        .holding(address)
                        .map_or("", |holding| &*holding.pool);
                    format!("{address} from IPAddressPool {pool}")
                });
            named.collect::<Vec<_>>().join(", ")
        };
        let (status, reason, message) = match &state.outcome {
            Outcome::Undecided | Outcome::NotOurs => return None,
            Outcome::Foreign(addresses) => (
                "False",
                "ForeignIngress",
                format!(
                    "another controller wrote {} into status.loadBalancer.ingress, so this Service is left \
                     alone: clear the ingress, or set spec.loadBalancerClass for that controller",
                    addresses.join(", ")
                ),
            ),
            Outcome::Assigned { wish: None } => ("True", "Assigned", held()),
            Outcome::Assigned {
                wish: Some(refusal),
            } => (
                "True",
                refusal.reason(),
                format!("keeps {}: {refusal}", held()),
            ),
            Outcome::Refused(refusal) if state.held.is_empty() => {
                ("False", refusal.reason(), refusal.to_string())
            }
            Outcome::Refused(refusal) => (
                "False",
                refusal.reason(),
                format!("has {}, but {refusal}", held()),
            ),
        };
        Some(Condition {
            kind: ADDRESS_ASSIGNED.into(),
            status: status.into(),
            reason: reason.into(),
            message,
        })
    }

    /// Mirrors the worst of what speakers say of the Service's addresses, once it was bad.
    fn announced_condition(&self, state: &ServiceState) -> Option<Condition> {
        if state.held.is_empty() || matches!(state.outcome, Outcome::NotOurs | Outcome::Foreign(_))
        {
            return None;
        }
        let bad = state.held.iter().find_map(|address| {
            let vip = self.virtual_ips.get(address)?;
            let said = vip
                .conditions
                .iter()
                .find(|said| said.kind == VIRTUAL_IP_ANNOUNCED)?;
            (said.status == "False").then_some((address, said))
        });
        let (status, reason, message) = if let Some((address, said)) = bad {
            let message = format!("{address}: {}", said.message);
            ("False", said.reason.clone(), message)
        } else {
            let is_announced = |condition: &Condition| condition.kind == ANNOUNCED;
            let was_bad = state.service.conditions.iter().any(is_announced)
                || state
                    .said
                    .as_ref()
                    .is_some_and(|((_, said), _)| said.iter().any(is_announced));
            if !was_bad {
                return None;
            }
            let message = "every address is announced again".to_owned();
            ("True", "Announced".to_owned(), message)
        };
        Some(Condition {
            kind: ANNOUNCED.into(),
            status: status.into(),
            reason,
            message,
        })
    }

    fn emit_pools(&mut self) -> Vec<PoolStatus> {
        if self.overlaps.is_none() {
            self.overlaps = Some(self.find_overlaps());
            self.ledger
                .touched_pools
                .extend(self.ledger.pools.order().iter().cloned());
        }
        let mut changed = Vec::new();
        for name in std::mem::take(&mut self.ledger.touched_pools) {
            let Some(state) = self.ledger.pools.get(&name) else {
                continue;
            };
            let status = self.pool_status(state);
            if self.pools_said.get(&name) != Some(&status) {
                self.pools_said.insert(name, status.clone());
                changed.push(status);
            }
        }
        changed
    }

    pub(super) fn pool_status(&self, state: &PoolState) -> PoolStatus {
        PoolStatus {
            name: state.spec.name.clone(),
            generation: state.spec.generation,
            v4: self.ledger.counts(state, Family::V4),
            v6: self.ledger.counts(state, Family::V6),
            flaw: state.spec.flaw.clone(),
            overlaps: self
                .overlaps
                .as_ref()
                .and_then(|overlaps| overlaps.get(&state.spec.name))
                .cloned()
                .unwrap_or_default(),
        }
    }

    fn find_overlaps(&self) -> BTreeMap<Arc<str>, BTreeSet<Overlap>> {
        let pools = &self.ledger.pools;
        let mut found: BTreeMap<Arc<str>, BTreeSet<Overlap>> = BTreeMap::new();
        for (pool, others) in pools.overlaps() {
            found
                .entry(pool)
                .or_default()
                .extend(others.into_iter().map(Overlap::Pool));
        }
        for (address, node) in self.ledger.node_addresses() {
            for pool in pools.spanning(address) {
                found
                    .entry(pool.clone())
                    .or_default()
                    .insert(Overlap::Node(node.clone(), address));
            }
        }
        for node in self.nodes.values() {
            for &cidr in &node.pod_cidrs {
                let cidr: IpNet = cidr.trunc();
                for pool in pools.meeting(cidr) {
                    found
                        .entry(pool)
                        .or_default()
                        .insert(Overlap::PodCidr(node.name.clone(), cidr));
                }
            }
        }
        for &cidr in self.service_cidrs.values().flatten() {
            for pool in pools.meeting(cidr) {
                found
                    .entry(pool)
                    .or_default()
                    .insert(Overlap::ServiceCidr(cidr));
            }
        }
        found
    }
}

fn same_record(record: &Record, vip: &VirtualIp) -> bool {
    record.pool == vip.pool
        && record.group == vip.group
        && record.services == sorted(&vip.services)
        && record.egress_policies == sorted(&vip.egress_policies)
        && record.terms == vip.terms
        && record.former == sorted(&vip.former)
        && record.former_policies == sorted(&vip.former_policies)
        && record.retain == vip.retain
}

fn sorted<T: Clone + Ord>(names: &[T]) -> Vec<T> {
    let mut names = names.to_vec();
    names.sort_unstable();
    names
}

/// The addresses in the order of the Service's families.
fn in_order(service: &Service, held: &[IpAddr]) -> Vec<IpAddr> {
    let mut addresses = held.to_vec();
    addresses.sort_by_key(|&address| {
        let family = Family::of(address);
        (service.families.iter().position(|&f| f == family), address)
    });
    addresses
}

fn our_conditions(service: &Service) -> Vec<Condition> {
    [ADDRESS_ASSIGNED, ANNOUNCED]
        .iter()
        .filter_map(|kind| {
            service
                .conditions
                .iter()
                .find(|condition| condition.kind == *kind)
        })
        .cloned()
        .collect()
}

/// Whether the observed ingress is exactly `addresses`, as VIPs.
fn shows(service: &Service, addresses: &[IpAddr]) -> bool {
    service.ingress.len() == addresses.len()
        && service
            .ingress
            .iter()
            .zip(addresses)
            .all(|(entry, &address)| {
                entry.address == Some(address)
                    && entry.ip_mode.as_deref().is_none_or(|mode| mode == "VIP")
            })
}

/// What is done when a Service gets or loses an address.
const ASSIGN: &str = "AssignAddress";

/// The Event of a Service whose addresses are announced no more, or again. A conflict's is the speaker's: it saw it.
fn turn(state: &ServiceState, now: Option<&Condition>) -> Option<Notice> {
    let now = now?;
    let said = state.said.as_ref().map(|((_, said), _)| said);
    let before = said
        .unwrap_or(&state.service.conditions)
        .iter()
        .find(|condition| condition.kind == ANNOUNCED);
    let same = before.is_some_and(|it| it.status == now.status && it.reason == now.reason);
    (!same && now.reason != ADDRESS_CONFLICT).then(|| Notice {
        warning: now.status != "True",
        action: "Announce",
        reason: now.reason.clone(),
        message: now.message.clone(),
    })
}

fn notice(state: &ServiceState, condition: Option<&Condition>) -> Option<Notice> {
    let condition = condition?;
    if state.lost.is_empty() {
        return Some(Notice {
            warning: condition.status != "True" || condition.reason != "Assigned",
            action: ASSIGN,
            reason: if condition.reason == "Assigned" {
                "AddressAssigned".into()
            } else {
                condition.reason.clone()
            },
            message: condition.message.clone(),
        });
    }
    let lost = state.lost.iter().map(|loss| match &loss.why {
        LossReason::NoPool => format!("{} no longer belongs to any IPAddressPool", loss.address),
        LossReason::NotAdmitted => {
            format!(
                "no IPAddressPool with {} admits this Service any more",
                loss.address
            )
        }
        LossReason::Sharing(other) => {
            format!("{} can no longer be shared with {other}", loss.address)
        }
    });
    let lost = lost.collect::<Vec<_>>().join("; ");
    let replaced = condition.status == "True";
    let (reason, outcome) = if replaced {
        ("AddressReplaced", "replaced: now")
    } else {
        ("AddressTakenBack", "taken back:")
    };
    Some(Notice {
        warning: true,
        action: ASSIGN,
        reason: reason.into(),
        message: format!("{lost}; {outcome} {}", condition.message),
    })
}
