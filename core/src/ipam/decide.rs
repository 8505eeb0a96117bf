//! What one Service holds: what it may keep, what it must give back, what it gets.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Ipam;
use super::ledger::OnRecord;
use super::refusal::Refusal;
use super::request::{CLASS, Want};
use super::sharing::{Sharer, first_conflict};
use crate::ip::Family;
use crate::model::{Kind, ObjectKey, Service};
use crate::selector::Labels;

/// How many addresses with the Service's sharing key are tried before it gets one of its own.
const SHARING_CANDIDATES: usize = 64;

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
    Sharing(ObjectKey),
}

/// An address to take, and the pool it counts for.
type Pick = (IpAddr, Arc<str>);

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

    /// Decides about one Service. What it holds and what is said about it changes here and nowhere else.
    pub(super) fn decide(&mut self, key: &ObjectKey, now: Duration) {
        let Some(state) = self.services.get(key) else {
            return;
        };
        let service = state.service.clone();
        let rank = (service.created, key.clone());
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
            self.let_go(key, address, now);
        }
    }

    /// Releases `address`, and looks again at those who go on holding it where it may count for another pool now.
    pub(super) fn let_go(&mut self, key: &ObjectKey, address: IpAddr, now: Duration) {
        self.ledger.release(address, key, now);
        if self.ledger.pools.spanning(address).len() > 1
            && let Some(holding) = self.ledger.holding(address)
        {
            let ranks = holding.holders.keys().filter_map(|holder| {
                Some((self.services.get(holder)?.service.created, holder.clone()))
            });
            self.dirty.extend(ranks);
        }
    }

    fn give_back(&mut self, key: &ObjectKey, address: IpAddr, now: Duration) {
        if let Some(state) = self.services.get_mut(key) {
            state.held.retain(|held| *held != address);
        }
        self.let_go(key, address, now);
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
        self.ledger
            .hold(address, pool, key, sharer, &state.held, on_record);
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
        let mut wish = None;
        for address in self.services[key].held.clone() {
            let family = Family::of(address);
            if !want.families.contains(&family) {
                self.give_back(key, address, now);
                continue;
            }
            let loss = match self.may_keep(service, sharer, address) {
                Ok(pool) => {
                    self.ledger.set_sharer(address, key, sharer);
                    if self.ledger.holding(address).is_some_and(|holding| {
                        holding.pool != pool
                            && !self.serves(&holding.pool, address, holding.holders.keys())
                    }) {
                        self.ledger.rehome(address, &pool);
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
    fn may_keep(
        &self,
        service: &Service,
        sharer: &Sharer,
        address: IpAddr,
    ) -> Result<Arc<str>, LossReason> {
        let holding = self.ledger.holding(address).ok_or(LossReason::NoPool)?;
        if let Some((other, _)) = first_conflict(&holding.holders, &service.key, sharer) {
            return Err(LossReason::Sharing(other.clone()));
        }
        self.home_of(service, address, Some(&holding.pool))
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
        mut holders: impl Iterator<Item = &'a ObjectKey>,
    ) -> bool {
        self.ledger.pools.get(pool).is_some_and(|state| {
            state.contains(address)
                && holders.any(|holder| {
                    self.services.get(holder).is_some_and(|holder| {
                        state.admits(&holder.service, self.namespace_labels(&holder.service))
                    })
                })
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

    /// Picks addresses for the families that the Service lacks: all of them, or with `partial` at least one
    /// of all it wants, or none. The second part is what is still lacking.
    fn choose(
        &mut self,
        service: &Service,
        want: &Want,
        sharer: &Sharer,
        missing: &[Family],
    ) -> Result<(Vec<Pick>, Option<Refusal>), Refusal> {
        if let Some(flaw) = &want.flaw {
            return Err(flaw.clone());
        }
        let mut picks = Vec::new();
        let mut left = None;
        let mut automatic = Vec::new();
        for &family in missing {
            match want.explicit.get(&family) {
                // What is asked for by number is not replaced by something else.
                Some(&address) => picks.push(self.explicit(service, want, sharer, address)?),
                None => automatic.push(family),
            }
        }
        if !automatic.is_empty() {
            match self.automatic(service, want, sharer, &automatic) {
                Ok(found) => {
                    let lacking: Vec<Family> = automatic
                        .iter()
                        .copied()
                        .filter(|family| !found.iter().any(|(a, _)| Family::of(*a) == *family))
                        .collect();
                    if !lacking.is_empty() {
                        left = Some(self.why_none(service, want, &lacking));
                    }
                    picks.extend(found);
                }
                Err(refusal) => left = Some(refusal),
            }
        }
        let holds_some = !self.services[&service.key].held.is_empty();
        match left {
            Some(refusal) if !want.partial => Err(refusal),
            Some(refusal) if picks.is_empty() && !holds_some => Err(refusal),
            left => Ok((picks, left)),
        }
    }

    /// The pool that an address asked for by number is taken from, or why it cannot be had.
    fn explicit(
        &self,
        service: &Service,
        want: &Want,
        sharer: &Sharer,
        address: IpAddr,
    ) -> Result<Pick, Refusal> {
        let pools = &self.ledger.pools;
        if let Some(name) = &want.pool
            && pools.get(name).is_none()
        {
            return Err(Refusal::UnknownPool(name.clone()));
        }
        let mut containing = pools.containing(address).peekable();
        if containing.peek().is_none() {
            let avoiding = pools.spanning(address).iter().find(|name| {
                pools
                    .get(name)
                    .is_some_and(|state| state.keeps_off(address))
            });
            return Err(match avoiding {
                Some(pool) => Refusal::Avoided(address, pool.clone()),
                None if pools.is_empty() => Refusal::NoPools,
                None => Refusal::InNoPool(address),
            });
        }
        let asked = |name: &str| want.pool.as_deref().is_none_or(|pool| pool == name);
        let candidates: Vec<_> = containing.filter(|state| asked(&state.spec.name)).collect();
        let Some(first) = candidates.first() else {
            let pool = want.pool.clone().unwrap_or_default();
            return Err(Refusal::NotInPool(address, pool));
        };
        let namespace = self.namespace_labels(service);
        let Some(state) = candidates
            .iter()
            .find(|state| state.admits(service, namespace))
        else {
            return Err(Refusal::PoolRefuses(first.spec.name.clone()));
        };
        let pool = state.spec.name.clone();
        self.available(service, sharer, address)?;
        Ok((address, pool))
    }

    /// Whether the Service can have `address` now, as far as holders, rest and nodes are concerned.
    fn available(
        &self,
        service: &Service,
        sharer: &Sharer,
        address: IpAddr,
    ) -> Result<(), Refusal> {
        if let Some(node) = self.ledger.node_of(address) {
            return Err(Refusal::NodeAddress(address, node.clone()));
        }
        if let Some(holding) = self.ledger.holding(address) {
            return match first_conflict(&holding.holders, &service.key, sharer) {
                Some((holder, conflict)) => Err(Refusal::InUse(address, holder.clone(), conflict)),
                None => Ok(()),
            };
        }
        match self.ledger.quarantine().get(address) {
            Some(rest) if !rest.former.contains(&service.key) => Err(Refusal::Resting(address)),
            Some(_) | None => Ok(()),
        }
    }

    /// The pools that a Service without a wish for an address may be served from, in order.
    fn eligible_pools(&self, service: &Service, want: &Want) -> Result<Vec<Arc<str>>, Refusal> {
        let pools = &self.ledger.pools;
        let namespace = self.namespace_labels(service);
        if let Some(name) = &want.pool {
            let state = pools
                .get(name)
                .ok_or_else(|| Refusal::UnknownPool(name.clone()))?;
            let name = state.spec.name.clone();
            return if state.admits(service, namespace) {
                Ok(vec![name])
            } else {
                Err(Refusal::PoolRefuses(name))
            };
        }
        if pools.is_empty() {
            return Err(Refusal::NoPools);
        }
        Ok(pools
            .in_order()
            .filter(|state| state.spec.auto_assign && state.admits(service, namespace))
            .map(|state| state.spec.name.clone())
            .collect())
    }

    /// Picks an address for as many of `families` as possible: one that the Service had, else one that its
    /// sharing key leads to, else the lowest free one. Two families come from one pool if any has both.
    fn automatic(
        &mut self,
        service: &Service,
        want: &Want,
        sharer: &Sharer,
        families: &[Family],
    ) -> Result<Vec<Pick>, Refusal> {
        let pools = self.eligible_pools(service, want)?;
        let mut picks: Vec<Pick> = Vec::new();
        let mut open: Vec<Family> = Vec::new();
        for &family in families {
            let pick = self
                .had_before(service, sharer, family, &pools)
                .or_else(|| self.shared(service, sharer, family, &pools));
            match pick {
                Some(pick) => picks.push(pick),
                None => open.push(family),
            }
        }
        // Where the other family comes from goes first, then a pool that has all that is open.
        let sibling = picks.first().map(|(_, pool)| pool.clone()).or_else(|| {
            let held = self.services.get(&service.key)?.held.first()?;
            Some(self.ledger.holding(*held)?.pool.clone())
        });
        let mut order: Vec<&Arc<str>> = Vec::with_capacity(pools.len());
        order.extend(pools.iter().filter(|name| Some(*name) == sibling.as_ref()));
        order.extend(pools.iter().filter(|name| Some(*name) != sibling.as_ref()));
        let together = order.iter().copied().find(|name| {
            open.iter()
                .all(|&family| self.first_free(name, family).is_some())
        });
        for family in open {
            let pool = match together {
                Some(pool) => Some(pool),
                None => order
                    .iter()
                    .copied()
                    .find(|name| self.first_free(name, family).is_some()),
            };
            if let Some(pool) = pool
                && let Some(address) = self.first_free(pool, family)
            {
                picks.push((address, pool.clone()));
            }
        }
        Ok(picks)
    }

    fn first_free(&mut self, pool: &str, family: Family) -> Option<IpAddr> {
        self.ledger.pools.get_mut(pool)?.first_free(family)
    }

    /// An address that the Service's status or a record still shows, or that rests for it.
    fn had_before(
        &self,
        service: &Service,
        sharer: &Sharer,
        family: Family,
        pools: &[Arc<str>],
    ) -> Option<Pick> {
        let shown = service.ingress.iter().filter_map(|entry| entry.address);
        let resting = self.ledger.quarantine().of_former(&service.key);
        shown
            .chain(resting)
            .filter(|&address| Family::of(address) == family)
            .filter(|&address| self.available(service, sharer, address).is_ok())
            .find_map(|address| Some((address, self.pool_among(address, pools)?)))
    }

    /// An address that others hold under the same sharing key and that the Service can join.
    fn shared(
        &self,
        service: &Service,
        sharer: &Sharer,
        family: Family,
        pools: &[Arc<str>],
    ) -> Option<Pick> {
        let key = sharer.key()?;
        self.ledger
            .of_key(key, family)
            .take(SHARING_CANDIDATES)
            .filter(|&address| self.available(service, sharer, address).is_ok())
            .find_map(|address| Some((address, self.pool_among(address, pools)?)))
    }

    fn pool_among(&self, address: IpAddr, pools: &[Arc<str>]) -> Option<Arc<str>> {
        pools
            .iter()
            .find(|name| {
                self.ledger
                    .pools
                    .get(name)
                    .is_some_and(|state| state.contains(address))
            })
            .cloned()
    }

    /// Why no address of `families` could be picked.
    fn why_none(&self, service: &Service, want: &Want, families: &[Family]) -> Refusal {
        let pools = match self.eligible_pools(service, want) {
            Ok(pools) => pools,
            Err(refusal) => return refusal,
        };
        if pools.is_empty() {
            let families: BTreeSet<Family> = families.iter().copied().collect();
            return Refusal::NoPoolAdmits(families);
        }
        let family = families.first().copied().unwrap_or(Family::V4);
        let offering: Vec<Arc<str>> = pools
            .into_iter()
            .filter(|name| {
                self.ledger
                    .pools
                    .get(name)
                    .is_some_and(|state| state.offers(family))
            })
            .collect();
        if offering.is_empty() {
            Refusal::NoSuchFamily(family)
        } else {
            Refusal::Exhausted(family, offering)
        }
    }
}
