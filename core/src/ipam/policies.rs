//! What one egress policy holds: addresses of its own, or those of a Service.
//!
//! A policy's own addresses are held as a Service's are, and by it alone. Whose address it uses, a Service's, it does not
//! hold: it is on the record for as long as the Service is, and goes where the Service goes. Which pods may leave by an
//! address is not decided here: see [`crate::egress`].

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Ipam;
use super::decide::{Loss, LossReason};
use super::ledger::{Ledger, OnRecord};
use super::policy_refusal::PolicyRefusal;
use super::pool::PoolState;
use super::sharing::Sharer;
use super::status::{Allocation, PolicyChange};
use crate::ip::Family;
use crate::model::{
    EgressPolicy, EgressSource, Holder, ObjectKey, OldFlows, Purpose, Terms, VirtualIp,
};

/// A policy and what became of it.
#[derive(Debug)]
pub(super) struct PolicyState {
    pub(super) policy: Arc<EgressPolicy>,
    /// Addresses of its own, sorted.
    held: Vec<IpAddr>,
    /// Why it lacks some, of its own.
    refusal: Option<PolicyRefusal>,
    lost: Vec<Loss>,
}

impl PolicyState {
    /// Whether it may have addresses of this pool.
    pub(super) fn takes_from(&self, pool: &PoolState) -> bool {
        let named = match &self.policy.spec.source {
            EgressSource::Pool { name, .. } => *name == pool.spec.name,
            EgressSource::Addresses(_) => true,
            EgressSource::Service(_) => false,
        };
        named && pool.admits_policies()
    }

    fn held_of(&self, family: Family) -> usize {
        let of_family = |held: &&IpAddr| Family::of(**held) == family;
        self.held.iter().filter(of_family).count()
    }
}

impl Ipam {
    pub(super) fn apply_policy(&mut self, policy: EgressPolicy) {
        let name = policy.name.clone();
        self.touched_policies.insert(name.clone());
        let rank = (policy.created, Holder::EgressPolicy(name.clone()));
        let policy = Arc::new(policy);
        if self.ledger.set_terms(&name, Some(Terms::of(&policy))) {
            self.touch_records_of(&policy);
        }
        let Some(state) = self.policies.get_mut(&name) else {
            self.follow(&policy, true);
            let state = PolicyState {
                policy,
                held: Vec::new(),
                refusal: None,
                lost: Vec::new(),
            };
            self.policies.insert(name, state);
            self.dirty.insert(rank);
            return;
        };
        let before = std::mem::replace(&mut state.policy, policy.clone());
        if before.spec == policy.spec && before.created == policy.created {
            return;
        }
        let stale = (before.created, rank.1.clone());
        self.dirty.remove(&stale);
        self.wanting.remove(&stale);
        self.follow(&before, false);
        self.follow(&policy, true);
        self.dirty.insert(rank);
    }

    fn touch_records_of(&mut self, policy: &EgressPolicy) {
        let own = self.policies.get(&policy.name).map(|state| &state.held);
        let of_service = match &policy.spec.source {
            EgressSource::Service(key) => self.services.get(key).map(|state| &state.held),
            EgressSource::Pool { .. } | EgressSource::Addresses(_) => None,
        };
        let touched = own.into_iter().chain(of_service).flatten().copied();
        self.ledger.touched_records.extend(touched);
    }

    pub(super) fn delete_policy(&mut self, name: &Arc<str>, now: Duration) {
        let Some(state) = self.policies.remove(name) else {
            return;
        };
        let holder = Holder::EgressPolicy(name.clone());
        let rank = (state.policy.created, holder.clone());
        self.dirty.remove(&rank);
        self.wanting.remove(&rank);
        self.touched_policies.remove(name);
        self.follow(&state.policy, false);
        for address in state.held {
            self.let_go(&holder, address, now);
        }
        if state.policy.spec.on_delete == OldFlows::Cut {
            let draining: Vec<IpAddr> = self.ledger.draining(name).collect();
            for address in draining {
                self.ledger.drained(address, name, now);
            }
        }
        self.ledger.set_terms(name, None);
    }

    /// Notes that flows drain on `address` of the policies that lose it with `holder`. Where nobody was ever known to lead
    /// it there are none.
    pub(super) fn drain_what_loses(&mut self, holder: &Holder, address: IpAddr) {
        let reported = self.virtual_ips.get(&address);
        if !reported.is_some_and(VirtualIp::was_reported) {
            return;
        }
        let losing = match (holder, self.ledger.holding(address)) {
            (_, None) => return,
            (Holder::EgressPolicy(name), Some(_)) => vec![name.clone()],
            (Holder::Service(key), Some(holding)) => {
                let followers = self.ledger.followers(key);
                let stays = |other: &&Holder| *other != holder;
                let others = holding.holders.keys().filter(stays);
                let others = others.filter_map(Holder::service);
                let kept: Vec<&Arc<str>> =
                    others.flat_map(|key| self.ledger.followers(key)).collect();
                let both = self.ledger.policies_of(holding);
                followers
                    .filter(|name| both.contains(*name) && !kept.contains(name))
                    .cloned()
                    .collect()
            }
        };
        for name in losing {
            self.ledger.drain(address, &name, self.ledger.terms(&name));
        }
    }

    /// Changes something by which policies leave by their Services' addresses, of these: flows drain on those that a policy
    /// loses by it, and on what it gets again they are as any.
    pub(super) fn losing_followers(
        &mut self,
        addresses: Vec<IpAddr>,
        change: impl FnOnce(&mut Ledger),
    ) {
        let of = |ledger: &Ledger, address: IpAddr| {
            let holding = ledger.holding(address);
            holding.map(|it| ledger.policies_of(it)).unwrap_or_default()
        };
        let had = addresses
            .iter()
            .map(|&it| of(&self.ledger, it))
            .collect::<Vec<_>>();
        change(&mut self.ledger);
        for (address, had) in addresses.into_iter().zip(had) {
            let has = of(&self.ledger, address);
            let reported = self.virtual_ips.get(&address);
            for policy in had.difference(&has) {
                if reported.is_some_and(VirtualIp::was_reported) {
                    let terms = self.ledger.terms(policy);
                    self.ledger.drain(address, policy, terms);
                }
            }
            for policy in has.difference(&had) {
                self.ledger.end_drain(address, policy);
            }
        }
    }

    /// Counts `address` for another pool from now on.
    pub(super) fn rehome(&mut self, address: IpAddr, pool: &Arc<str>) {
        self.losing_followers(vec![address], |ledger| ledger.rehome(address, pool));
    }

    /// Notes whose addresses the policy uses, if it is a Service's.
    fn follow(&mut self, policy: &EgressPolicy, follows: bool) {
        let EgressSource::Service(service) = &policy.spec.source else {
            return;
        };
        let held = self.services.get(service).map(|state| state.held.clone());
        for address in held.into_iter().flatten() {
            let was = self.ledger.holding(address);
            let was = was.is_some_and(|it| self.ledger.policies_of(it).contains(&policy.name));
            let reported = self.virtual_ips.get(&address);
            let reported = reported.is_some_and(VirtualIp::was_reported);
            if follows {
                self.ledger.end_drain(address, &policy.name);
            } else if was && reported {
                let terms = Terms::of(policy);
                self.ledger.drain(address, &policy.name, terms);
            }
            self.ledger.touched_records.insert(address);
        }
        self.ledger.follow(service, &policy.name, follows);
    }

    /// Lets a policy keep `address`, if it may.
    pub(super) fn claim_for_policy(&mut self, name: &Arc<str>, address: IpAddr) {
        let holder = Holder::EgressPolicy(name.clone());
        let recorded = self.virtual_ips.get(&address).map(|vip| vip.pool.clone());
        let Some(state) = self.policies.get(name) else {
            return;
        };
        let wanted = self.wants(state, address)
            && match &state.policy.spec.source {
                EgressSource::Pool { count, .. } => state.held_of(Family::of(address)) < *count,
                EgressSource::Addresses(_) | EgressSource::Service(_) => true,
            };
        if !wanted || self.ledger.holding(address).is_some() {
            return;
        }
        if let Some(pool) = self.home_of(&holder, address, recorded.as_ref()) {
            self.take_for_policy(name, address, &pool);
        }
    }

    /// Whether the policy asks for `address`, or for any of its family. What a pool that is gone had is not known.
    fn wants(&self, state: &PolicyState, address: IpAddr) -> bool {
        match &state.policy.spec.source {
            EgressSource::Pool { name, families, .. } => {
                let family = Family::of(address);
                match self.ledger.pools.get(name) {
                    Some(_) if families.is_empty() => true,
                    Some(_) => families.contains(&family),
                    None => families.is_empty() || families.contains(&family),
                }
            }
            EgressSource::Addresses(addresses) => addresses.contains(&address),
            EgressSource::Service(_) => false,
        }
    }

    pub(super) fn decide_policy(&mut self, name: &Arc<str>, now: Duration) {
        let holder = Holder::EgressPolicy(name.clone());
        let Some(rank) = self.rank_of(&holder) else {
            return;
        };
        self.touched_policies.insert(name.clone());
        self.wanting.remove(&rank);
        self.keep_or_lose_of_policy(name, now);
        let policy = self.policies[name].policy.clone();
        let refusal = match &policy.spec.source {
            EgressSource::Pool {
                name: pool,
                count,
                families,
            } => self.fill_from_pool(name, pool, *count, families),
            EgressSource::Addresses(addresses) => self.fill_by_number(name, addresses),
            EgressSource::Service(_) => None,
        };
        if refusal.is_some() {
            self.wanting.insert(rank);
        }
        if let Some(state) = self.policies.get_mut(name) {
            state.refusal = refusal;
        }
    }

    /// Goes through what the policy holds: what it no longer asks for is given back, what it may not keep taken back.
    fn keep_or_lose_of_policy(&mut self, name: &Arc<str>, now: Duration) {
        let holder = Holder::EgressPolicy(name.clone());
        let mut kept = [0usize; 2];
        for address in self.policies[name].held.clone() {
            let state = &self.policies[name];
            let kept = &mut kept[usize::from(address.is_ipv6())];
            let room = match &state.policy.spec.source {
                EgressSource::Pool { count, .. } => *kept < *count,
                EgressSource::Addresses(_) | EgressSource::Service(_) => true,
            };
            let loss = if !room || !self.wants(state, address) {
                None
            } else {
                match self.may_keep(&holder, &Sharer::alone(), address) {
                    Ok(pool) => {
                        *kept += 1;
                        if self
                            .ledger
                            .holding(address)
                            .is_some_and(|held| held.pool != pool)
                        {
                            self.rehome(address, &pool);
                        }
                        continue;
                    }
                    Err(why) => Some(why),
                }
            };
            if let Some(state) = self.policies.get_mut(name) {
                state.held.retain(|held| *held != address);
                state.lost.extend(loss.map(|why| Loss { address, why }));
            }
            self.let_go(&holder, address, now);
        }
    }

    /// Takes what the policy lacks from its pool: what it had before, else the lowest free.
    fn fill_from_pool(
        &mut self,
        name: &Arc<str>,
        pool: &Arc<str>,
        count: usize,
        families: &[Family],
    ) -> Option<PolicyRefusal> {
        let Some(state) = self.ledger.pools.get(pool) else {
            return Some(PolicyRefusal::UnknownPool(pool.clone()));
        };
        if let Some(refusal) = refused_by(state) {
            return Some(refusal);
        }
        let mut wanted: Vec<Family> = families.to_vec();
        if wanted.is_empty() {
            wanted = [Family::V4, Family::V6]
                .into_iter()
                .filter(|family| state.offers(*family))
                .collect();
        }
        if wanted.is_empty() {
            return Some(PolicyRefusal::NoSuchFamily(pool.clone(), None));
        }
        let mut refusal = None;
        for family in wanted {
            while self.policies[name].held_of(family) < count {
                let Some(address) = self.pick_for_policy(name, pool, family) else {
                    let offers = self
                        .ledger
                        .pools
                        .get(pool)
                        .is_some_and(|state| state.offers(family));
                    let why = if offers {
                        PolicyRefusal::Exhausted(pool.clone(), family)
                    } else {
                        PolicyRefusal::NoSuchFamily(pool.clone(), Some(family))
                    };
                    refusal.get_or_insert(why);
                    break;
                };
                self.take_for_policy(name, address, pool);
            }
        }
        refusal
    }

    fn pick_for_policy(&mut self, name: &Arc<str>, pool: &str, family: Family) -> Option<IpAddr> {
        let holder = Holder::EgressPolicy(name.clone());
        let state = self.ledger.pools.get(pool)?;
        let ledger = &self.ledger;
        let drains = ledger.draining(name);
        let had = drains
            .chain(ledger.quarantine().of_former(&holder))
            .find(|&address| {
                Family::of(address) == family
                    && state.contains(address)
                    && self.available(&holder, &Sharer::alone(), address).is_ok()
            });
        had.or_else(|| self.ledger.pools.get_mut(pool)?.first_free(family))
    }

    /// Takes those of the addresses that are to be had.
    fn fill_by_number(&mut self, name: &Arc<str>, addresses: &[IpAddr]) -> Option<PolicyRefusal> {
        let mut refusal = None;
        for &address in addresses {
            if self.policies[name].held.contains(&address) {
                continue;
            }
            match self.by_number(name, address) {
                Ok(pool) => self.take_for_policy(name, address, &pool),
                Err(why) => {
                    refusal.get_or_insert(why);
                }
            }
        }
        refusal
    }

    fn by_number(&self, name: &Arc<str>, address: IpAddr) -> Result<Arc<str>, PolicyRefusal> {
        let holder = Holder::EgressPolicy(name.clone());
        let pools = &self.ledger.pools;
        let first = pools
            .containing(address)
            .next()
            .ok_or(PolicyRefusal::InNoPool(address))?;
        let pool = match pools
            .containing(address)
            .find(|state| state.admits_policies())
        {
            Some(state) => state.spec.name.clone(),
            None => {
                return Err(refused_by(first).unwrap_or(PolicyRefusal::InNoPool(address)));
            }
        };
        self.available(&holder, &Sharer::alone(), address)
            .map_err(|refusal| PolicyRefusal::unavailable(address, refusal))?;
        Ok(pool)
    }

    fn take_for_policy(&mut self, name: &Arc<str>, address: IpAddr, pool: &Arc<str>) {
        let holder = Holder::EgressPolicy(name.clone());
        let Some(state) = self.policies.get_mut(name) else {
            return;
        };
        let record = self
            .virtual_ips
            .get(&address)
            .filter(|vip| vip.holders().contains(&holder));
        let on_record = OnRecord {
            group: record.map(|vip| vip.group.clone()),
            retain: record.is_some_and(|vip| vip.retain && vip.pool == *pool),
        };
        // Where its flows drain is where it goes on: they have one gateway. Its own addresses before a Service's.
        let drains = self.ledger.draining(name);
        let (own, others): (Vec<IpAddr>, Vec<IpAddr>) =
            drains.partition(|it| self.ledger.holds(*it, &holder));
        let held = state.held.iter().copied();
        let siblings: Vec<IpAddr> = held.chain(own).chain(others).collect();
        self.ledger.hold(
            address,
            pool,
            &holder,
            Sharer::alone(),
            &siblings,
            on_record,
        );
        state.held.push(address);
        state.held.sort_unstable();
    }

    /// What a policy has, and what it cannot have; nothing if it is not known.
    pub fn allocation(&self, name: &str) -> Option<Allocation> {
        let state = self.policies.get(name)?;
        let (held, refusal) = match &state.policy.spec.source {
            EgressSource::Service(service) => self.allocation_by_service(service),
            EgressSource::Pool { .. } | EgressSource::Addresses(_) => {
                (state.held.clone(), state.refusal.clone())
            }
        };
        let recorded = |address: &IpAddr| {
            self.virtual_ips
                .get(address)
                .is_some_and(|vip| vip.egress_policies.iter().any(|policy| **policy == *name))
        };
        let (addresses, unrecorded): (Vec<IpAddr>, Vec<IpAddr>) =
            held.into_iter().partition(recorded);
        Some(Allocation {
            addresses,
            pending: !unrecorded.is_empty(),
            refusal,
        })
    }

    fn allocation_by_service(&self, service: &ObjectKey) -> (Vec<IpAddr>, Option<PolicyRefusal>) {
        let Some(state) = self.services.get(service) else {
            let unknown = PolicyRefusal::UnknownService(service.clone());
            return (Vec::new(), Some(unknown));
        };
        if state.held.is_empty() {
            let without = PolicyRefusal::ServiceWithout(service.clone());
            return (Vec::new(), Some(without));
        }
        let mut refusal = None;
        let mut usable = Vec::new();
        for &address in &state.held {
            let Some(holding) = self.ledger.holding(address) else {
                continue;
            };
            let both = self
                .ledger
                .pools
                .get(&holding.pool)
                .is_some_and(|pool| pool.spec.purpose == Purpose::Both);
            if both {
                usable.push(address);
            } else {
                let pool = holding.pool.clone();
                refusal.get_or_insert(PolicyRefusal::PoolNotForBoth(
                    service.clone(),
                    address,
                    pool,
                ));
            }
        }
        (usable, refusal)
    }

    /// The policies that the reader is to look at again.
    pub(super) fn emit_policies(&mut self) -> Vec<PolicyChange> {
        let touched = std::mem::take(&mut self.touched_policies);
        let change = |name: Arc<str>| {
            let state = self.policies.get_mut(&name)?;
            let lost = std::mem::take(&mut state.lost);
            let lost = lost.iter().map(describe).collect();
            Some(PolicyChange { name, lost })
        };
        touched.into_iter().filter_map(change).collect()
    }

    /// The egress policies that were refused something, with what.
    pub fn policy_refusals(&self) -> impl Iterator<Item = (&Arc<str>, PolicyRefusal)> {
        self.policies
            .keys()
            .filter_map(|name| Some((name, self.allocation(name)?.refusal?)))
    }
}

/// Why a pool has nothing for policies, if so.
fn refused_by(pool: &PoolState) -> Option<PolicyRefusal> {
    let name = pool.spec.name.clone();
    if !pool.is_for_policies() {
        Some(PolicyRefusal::PoolForServices(name))
    } else if !pool.admits_policies() {
        Some(PolicyRefusal::PoolPicksServices(name))
    } else {
        None
    }
}

fn describe(loss: &Loss) -> String {
    let address = loss.address;
    match &loss.why {
        LossReason::NoPool => format!("{address} no longer belongs to any IPAddressPool"),
        LossReason::NotAdmitted => {
            format!("no IPAddressPool with {address} is for this EgressPolicy any more")
        }
        LossReason::Sharing(other) => format!("{address} is held by {other}"),
    }
}
