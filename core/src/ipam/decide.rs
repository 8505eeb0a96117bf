//! What one Service holds: what it may keep, what it must give back, what it gets.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Ipam;
use super::ledger::OnRecord;
use super::pick::Pick;
use super::pool::PoolState;
use super::refusal::Refusal;
use super::request::{CLASS, Want};
use super::sharing::{Sharer, first_conflict};
use crate::ip::Family;
use crate::model::{Holder, Kind, ObjectKey, Service};
use crate::selector::Labels;

/// What became of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Not looked at yet, or something that the decision needs was not seen yet.
    Undecided,
    /// Another class's.
    NotOurs,
    /// Another controller wrote these addresses into its status.
    Foreign(Vec<String>),
    /// It holds what it needs; a wish beyond that may have been refused.
    Assigned {
        /// What it asks for and cannot have for now.
        wish: Option<Refusal>,
    },
    /// It lacks an address that it needs.
    Refused(Refusal),
}

/// An address taken from a Service against its will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Loss {
    pub(super) address: IpAddr,
    pub(super) why: LossReason,
}

/// Why an address was taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LossReason {
    /// No pool contains it.
    NoPool,
    /// The pools that contain it do not admit the Service.
    NotAdmitted,
    /// It can no longer be shared with this Service.
    Sharing(Holder),
}

static NO_LABELS: Labels = Labels::new();

impl Ipam {
    /// Whether the Service's class says that it is ours.
    pub(super) fn is_ours(&self, service: &Service) -> bool {
        service.load_balancer
            && match service.class.as_deref() {
                None => self.config.class_less,
                Some(class) => class == CLASS,
            }
    }

    pub(super) fn namespace_labels(&self, service: &Service) -> &Labels {
        self.namespaces
            .get(&service.key.namespace)
            .unwrap_or(&NO_LABELS)
    }

    /// Decides about one holder. What it holds and what is said about it changes here and nowhere else.
    pub(super) fn decide(&mut self, holder: &Holder, now: Duration) {
        match holder {
            Holder::Service(key) => {
                self.decide_service(key, now);
                self.touched_policies
                    .extend(self.ledger.followers(key).cloned());
            }
            Holder::EgressPolicy(name) => self.decide_policy(name, now),
        }
    }

    fn decide_service(&mut self, key: &ObjectKey, now: Duration) {
        let Some(state) = self.services.get(key) else {
            return;
        };
        let service = state.service.clone();
        let rank = (service.created, Holder::Service(key.clone()));
        self.touched.insert(key.clone());
        self.wanting.remove(&rank);
        if !self.is_ours(&service) {
            self.release_all(key, now);
            if service.load_balancer {
                self.set_outcome(key, Outcome::NotOurs);
            } else {
                self.delete_service(key, now);
            }
            return;
        }
        if let Some(foreign) = self.foreign_ingress(&service) {
            self.release_all(key, now);
            self.set_outcome(key, Outcome::Foreign(foreign));
            return;
        }
        // A Service may be seen before its namespace; tenancy cannot be judged without.
        let namespace_known = !self.config.kinds.contains(&Kind::Namespace)
            || self.namespaces.contains_key(&key.namespace);
        if !namespace_known {
            self.wanting.insert(rank);
            return;
        }
        let want = Want::of(&service);
        let sharer = Sharer::of(&service);
        let mut wish = self.keep_or_lose(&service, &want, &sharer, now);
        let mut refusal = None;
        let missing = self.missing(key, &want);
        let mut complete = missing.is_empty();
        if !complete {
            match self.choose(&service, &want, &sharer, &missing) {
                Ok((picks, left)) => {
                    complete = left.is_none();
                    for (address, pool) in picks {
                        self.take(key, address, &pool);
                    }
                }
                Err(why) => refusal = Some(why),
            }
        }
        if let Some(flaw) = &want.flaw {
            wish = Some(flaw.clone());
        }
        let settled = complete && wish.is_none() && refusal.is_none();
        if !settled {
            self.wanting.insert(rank);
        }
        let holds_some = !self.services[key].held.is_empty();
        let outcome = match refusal {
            Some(refusal) if !(holds_some && want.partial) => Outcome::Refused(refusal),
            Some(_) | None => Outcome::Assigned { wish },
        };
        self.set_outcome(key, outcome);
    }

    fn set_outcome(&mut self, key: &ObjectKey, outcome: Outcome) {
        if let Some(state) = self.services.get_mut(key) {
            state.outcome = outcome;
        }
    }

    /// The ingress of a Service that another controller wrote, if it did.
    fn foreign_ingress(&self, service: &Service) -> Option<Vec<String>> {
        let state = self.services.get(&service.key)?;
        if service.ingress.is_empty() {
            return None;
        }
        let ours = |address: IpAddr| {
            state.held.contains(&address)
                || state.known.contains(&address)
                || self.ledger.pools.containing(address).next().is_some()
                || self
                    .virtual_ips
                    .get(&address)
                    .is_some_and(|vip| vip.services.contains(&service.key))
        };
        let addresses = || service.ingress.iter().map(|entry| entry.address);
        if addresses().flatten().any(ours) {
            return None;
        }
        let named = addresses().map(|address| {
            address.map_or_else(|| "a host name".to_owned(), |address| address.to_string())
        });
        Some(named.collect())
    }

    fn release_all(&mut self, key: &ObjectKey, now: Duration) {
        let Some(state) = self.services.get_mut(key) else {
            return;
        };
        for address in std::mem::take(&mut state.held) {
            self.let_go(&Holder::Service(key.clone()), address, now);
        }
    }

    /// Releases `address`, and looks again at those who go on holding it where it may count for another pool now. The flows
    /// of policies that lose it go on to their end.
    pub(super) fn let_go(&mut self, holder: &Holder, address: IpAddr, now: Duration) {
        self.drain_what_loses(holder, address);
        self.ledger.release(address, holder, now);
        if self.ledger.pools.spanning(address).len() > 1
            && let Some(holding) = self.ledger.holding(address)
        {
            let ranks: Vec<_> = holding
                .holders
                .keys()
                .filter_map(|holder| self.rank_of(holder))
                .collect();
            self.dirty.extend(ranks);
        }
    }

    /// Where a holder stands among those that are decided about: the older first.
    pub(super) fn rank_of(&self, holder: &Holder) -> Option<(i64, Holder)> {
        let created = match holder {
            Holder::Service(key) => self.services.get(key)?.service.created,
            Holder::EgressPolicy(name) => self.policies.get(name)?.policy.created,
        };
        Some((created, holder.clone()))
    }

    /// Whether a pool admits a holder that is known.
    pub(super) fn admits(&self, pool: &PoolState, holder: &Holder) -> bool {
        match holder {
            Holder::Service(key) => self.services.get(key).is_some_and(|state| {
                pool.admits(&state.service, self.namespace_labels(&state.service))
            }),
            Holder::EgressPolicy(name) => self
                .policies
                .get(name)
                .is_some_and(|state| state.takes_from(pool)),
        }
    }

    fn give_back(&mut self, key: &ObjectKey, address: IpAddr, now: Duration) {
        if let Some(state) = self.services.get_mut(key) {
            state.held.retain(|held| *held != address);
        }
        self.let_go(&Holder::Service(key.clone()), address, now);
    }

    /// Gives the Service an address that it may have, in the group of its record when that names the Service.
    pub(super) fn take(&mut self, key: &ObjectKey, address: IpAddr, pool: &Arc<str>) {
        let Some(state) = self.services.get_mut(key) else {
            return;
        };
        let record = self
            .virtual_ips
            .get(&address)
            .filter(|vip| vip.services.contains(key));
        let on_record = OnRecord {
            group: record.map(|vip| vip.group.clone()),
            retain: record.is_some_and(|vip| vip.retain && vip.pool == *pool),
        };
        let sharer = Sharer::of(&state.service);
        let holder = Holder::Service(key.clone());
        // Where flows of its policies drain that it had before is where they go on: they have one gateway.
        let drains = self.ledger.left_to_followers(key);
        let siblings: Vec<IpAddr> = state.held.iter().copied().chain(drains).collect();
        self.ledger
            .hold(address, pool, &holder, sharer, &siblings, on_record);
        state.held.push(address);
        state.held.sort_unstable();
        state.known.insert(address);
    }

    fn missing(&self, key: &ObjectKey, want: &Want) -> Vec<Family> {
        let held = &self.services[key].held;
        let lacks = |family: &Family| !held.iter().any(|&address| Family::of(address) == *family);
        want.families.iter().copied().filter(lacks).collect()
    }

    /// Goes through what the Service holds: what it may not keep is taken back; what it wishes to exchange is
    /// exchanged when the other address is to be had, and kept when not. Returns the wish that was refused.
    fn keep_or_lose(
        &mut self,
        service: &Service,
        want: &Want,
        sharer: &Sharer,
        now: Duration,
    ) -> Option<Refusal> {
        let key = &service.key;
        let holder = Holder::Service(key.clone());
        let mut wish = None;
        for address in self.services[key].held.clone() {
            let family = Family::of(address);
            if !want.families.contains(&family) {
                self.give_back(key, address, now);
                continue;
            }
            let loss = match self.may_keep(&holder, sharer, address) {
                Ok(pool) => {
                    self.ledger.set_sharer(address, &holder, sharer);
                    if self.ledger.holding(address).is_some_and(|holding| {
                        holding.pool != pool
                            && !self.serves(&holding.pool, address, holding.holders.keys())
                    }) {
                        self.rehome(address, &pool);
                    }
                    None
                }
                Err(why) => Some(why),
            };
            if let Some(why) = loss {
                self.give_back(key, address, now);
                if let Some(state) = self.services.get_mut(key) {
                    state.lost.push(Loss { address, why });
                }
                continue;
            }
            if want.flaw.is_some() || !self.wishes_to_move(want, address) {
                continue;
            }
            match self.exchange(service, want, sharer, family) {
                Ok((other, pool)) => {
                    self.give_back(key, address, now);
                    self.take(key, other, &pool);
                }
                Err(refusal) => {
                    wish.get_or_insert(refusal);
                }
            }
        }
        wish
    }

    /// The pool that a held address is kept from, or why it cannot be kept.
    pub(super) fn may_keep(
        &self,
        holder: &Holder,
        sharer: &Sharer,
        address: IpAddr,
    ) -> Result<Arc<str>, LossReason> {
        let holding = self.ledger.holding(address).ok_or(LossReason::NoPool)?;
        if let Some((other, _)) = first_conflict(&holding.holders, holder, sharer) {
            return Err(LossReason::Sharing(other.clone()));
        }
        self.home_of(holder, address, Some(&holding.pool))
            .ok_or_else(|| {
                if self.ledger.pools.containing(address).next().is_some() {
                    LossReason::NotAdmitted
                } else {
                    LossReason::NoPool
                }
            })
    }

    /// Whether `pool` contains `address` and admits any of `holders`: then the address goes on counting for it.
    pub(super) fn serves<'a>(
        &self,
        pool: &str,
        address: IpAddr,
        mut holders: impl Iterator<Item = &'a Holder>,
    ) -> bool {
        self.ledger.pools.get(pool).is_some_and(|state| {
            state.contains(address) && holders.any(|holder| self.admits(state, holder))
        })
    }

    /// Whether the request names another address or pool than the one held.
    fn wishes_to_move(&self, want: &Want, address: IpAddr) -> bool {
        match want.explicit.get(&Family::of(address)) {
            Some(&explicit) => explicit != address,
            None => want.pool.as_ref().is_some_and(|pool| {
                // With overlapping pools the address may count for another one.
                self.ledger
                    .holding(address)
                    .is_some_and(|holding| *holding.pool != **pool)
                    && !self
                        .ledger
                        .pools
                        .get(pool)
                        .is_some_and(|state| state.contains(address))
            }),
        }
    }

    fn exchange(
        &mut self,
        service: &Service,
        want: &Want,
        sharer: &Sharer,
        family: Family,
    ) -> Result<Pick, Refusal> {
        match want.explicit.get(&family) {
            Some(&address) => self.explicit(service, want, sharer, address),
            None => self
                .automatic(service, want, sharer, &[family])?
                .pop()
                .ok_or_else(|| self.why_none(service, want, &[family])),
        }
    }
}
