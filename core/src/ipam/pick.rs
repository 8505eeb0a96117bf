//! Which addresses a Service gets: those it asks for by number, those it had, those it may share, the lowest free.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::Ipam;
use super::pool::PoolState;
use super::refusal::Refusal;
use super::request::Want;
use super::sharing::{Sharer, first_conflict};
use crate::ip::Family;
use crate::model::{Holder, Service};

/// How many addresses with the Service's sharing key are tried before it gets one of its own.
const SHARING_CANDIDATES: usize = 64;

/// An address to take, and the pool it counts for.
pub(super) type Pick = (IpAddr, Arc<str>);

fn holder_of(service: &Service) -> Holder {
    Holder::Service(service.key.clone())
}

/// Why a pool that does not admit a Service does not.
fn refused_by(pool: &PoolState) -> Refusal {
    let name = pool.spec.name.clone();
    if pool.is_for_services() {
        Refusal::PoolRefuses(name)
    } else {
        Refusal::PoolForEgress(name)
    }
}

impl Ipam {
    /// Picks addresses for the families that the Service lacks: all of them, or with `partial` at least one
    /// of all it wants, or none. The second part is what is still lacking.
    pub(super) fn choose(
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
    pub(super) fn explicit(
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
            return Err(refused_by(first));
        };
        let pool = state.spec.name.clone();
        self.available(&holder_of(service), sharer, address)?;
        Ok((address, pool))
    }

    /// Whether the holder can have `address` now, as far as other holders, rest and nodes are concerned.
    pub(super) fn available(
        &self,
        asking: &Holder,
        sharer: &Sharer,
        address: IpAddr,
    ) -> Result<(), Refusal> {
        if let Some(node) = self.ledger.node_of(address) {
            return Err(Refusal::NodeAddress(address, node.clone()));
        }
        if let Some(holding) = self.ledger.holding(address) {
            return match first_conflict(&holding.holders, asking, sharer) {
                Some(_) if holding.is_due_to(asking) => Ok(()),
                Some((holder, conflict)) => Err(Refusal::InUse(address, holder.clone(), conflict)),
                None => Ok(()),
            };
        }
        match self.ledger.quarantine().get(address) {
            Some(rest) if !rest.former.contains(asking) => Err(Refusal::Resting(address)),
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
                Err(refused_by(state))
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
    pub(super) fn automatic(
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
        let holder = holder_of(service);
        let resting = self.ledger.quarantine().of_former(&holder);
        shown
            .chain(self.ledger.due_to(&holder))
            .chain(resting)
            .filter(|&address| Family::of(address) == family)
            .filter(|&address| self.available(&holder_of(service), sharer, address).is_ok())
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
            .filter(|&address| self.available(&holder_of(service), sharer, address).is_ok())
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
    pub(super) fn why_none(&self, service: &Service, want: &Want, families: &[Family]) -> Refusal {
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
