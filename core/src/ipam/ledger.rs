//! Who holds which address: the one place where addresses change hands.
//!
//! Every change keeps the pools' free sets, the counts, the groups and the sharing keys in step, and notes
//! which records and pools it touched.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::pool::PoolState;
use super::pools::Pools;
use super::quarantine::{Quarantine, Rest};
use super::sharing::Sharer;
use super::status::{Counts, Record};
use crate::ip::{Family, from_bits, virtual_ip_name};
use crate::model::{Holder, NodeName, ObjectKey, Pool, Purpose, Terms, VirtualIp};

/// How long an address rests whose pool is not known (any more).
pub(super) const DEFAULT_QUARANTINE: Duration = Duration::from_mins(1);

/// An address in use.
#[derive(Clone, Debug)]
pub(super) struct Holding {
    /// The pool it counts for.
    pub(super) pool: Arc<str>,
    /// Whether that pool, when last seen, wanted addresses kept that it no longer contains.
    pub(super) retain: bool,
    pub(super) group: Arc<str>,
    /// Policies whose flows drain there are among them, where no Service is.
    pub(super) holders: BTreeMap<Holder, Sharer>,
    /// Policies that leave by it no more, but for the flows that are there.
    pub(super) drains: BTreeMap<Arc<str>, Terms>,
    /// Who held it while it drained, and has it back at once.
    former: BTreeSet<Holder>,
}

impl Holding {
    /// Whether nobody holds it but for flows that drain.
    fn only_drains(&self) -> bool {
        let drains = |holder: &Holder| {
            holder
                .policy()
                .is_some_and(|it| self.drains.contains_key(it))
        };
        self.holders.keys().all(drains)
    }

    /// Whether a holder may have it beside what drains there, if that is all that stands against it.
    pub(super) fn is_due_to(&self, asking: &Holder) -> bool {
        self.only_drains() && self.former.contains(asking)
    }
}

/// What an observed record says of an address that is taken again.
#[derive(Clone, Debug, Default)]
pub(super) struct OnRecord {
    /// The group it moved with.
    pub(super) group: Option<Arc<str>>,
    /// Whether it is kept though its pool is gone.
    pub(super) retain: bool,
}

/// The addresses and what is known of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    pub(super) pools: Pools,
    holdings: BTreeMap<IpAddr, Holding>,
    quarantine: Quarantine,
    node_addresses: BTreeMap<IpAddr, BTreeSet<NodeName>>,
    groups: BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
    by_key: BTreeMap<(String, Family), BTreeSet<IpAddr>>,
    assigned: BTreeMap<(Arc<str>, Family), u128>,
    quarantined: BTreeMap<(Arc<str>, Family), u128>,
    /// The egress policies that use a Service's addresses.
    followers: BTreeMap<ObjectKey, BTreeSet<Arc<str>>>,
    /// What outlives the policies that are there.
    terms: BTreeMap<Arc<str>, Terms>,
    /// The addresses where a policy's flows drain.
    draining: BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
    /// Addresses whose record may have to change.
    pub(super) touched_records: BTreeSet<IpAddr>,
    /// Pools whose counts may have changed.
    pub(super) touched_pools: BTreeSet<Arc<str>>,
    /// Some address may have become available since this was last cleared.
    pub(super) freed: bool,
}

fn bump(
    counts: &mut BTreeMap<(Arc<str>, Family), u128>,
    pool: &Arc<str>,
    family: Family,
    up: bool,
) {
    let count = counts.entry((pool.clone(), family)).or_default();
    *count = if up {
        *count + 1
    } else {
        count.saturating_sub(1)
    };
}

impl Ledger {
    pub(super) fn holding(&self, address: IpAddr) -> Option<&Holding> {
        self.holdings.get(&address)
    }

    /// The held addresses that count for a pool.
    pub(super) fn of_pool(&self, name: &str) -> Vec<IpAddr> {
        let holdings = self.holdings.iter();
        let of_pool = holdings.filter(|(_, holding)| *holding.pool == *name);
        of_pool.map(|(address, _)| *address).collect()
    }

    pub(super) fn holdings(&self) -> impl Iterator<Item = (IpAddr, &Holding)> {
        self.holdings
            .iter()
            .map(|(&address, holding)| (address, holding))
    }

    pub(super) fn quarantine(&self) -> &Quarantine {
        &self.quarantine
    }

    /// A node that owns `address` itself.
    pub(super) fn node_of(&self, address: IpAddr) -> Option<&NodeName> {
        self.node_addresses.get(&address)?.first()
    }

    pub(super) fn node_addresses(&self) -> impl Iterator<Item = (IpAddr, &NodeName)> {
        self.node_addresses
            .iter()
            .flat_map(|(&address, nodes)| nodes.iter().map(move |node| (address, node)))
    }

    /// The addresses held under a sharing key.
    pub(super) fn of_key<'a>(
        &'a self,
        key: &str,
        family: Family,
    ) -> impl Iterator<Item = IpAddr> + use<'a> {
        self.by_key
            .get(&(key.to_owned(), family))
            .into_iter()
            .flatten()
            .copied()
    }

    fn is_blocked(&self, address: IpAddr) -> bool {
        self.holdings.contains_key(&address)
            || self.quarantine.get(address).is_some()
            || self.node_addresses.contains_key(&address)
    }

    fn refresh(&mut self, address: IpAddr) {
        let blocked = self.is_blocked(address);
        self.freed |= !blocked;
        self.pools.set_blocked(address, blocked);
        self.touched_pools
            .extend(self.pools.spanning(address).iter().cloned());
        self.touched_records.insert(address);
    }

    /// Puts `pool` in place of what had its name.
    pub(super) fn put_pool(&mut self, spec: Pool) {
        let name = spec.name.clone();
        let purpose = self.pools.get(&name).map(|state| state.spec.purpose);
        for (&address, holding) in &mut self.holdings {
            if holding.pool != name {
                continue;
            }
            if holding.retain != spec.retain_assigned || purpose != Some(spec.purpose) {
                holding.retain = spec.retain_assigned;
                self.touched_records.insert(address);
            }
        }
        let mut state = PoolState::new(spec);
        for address in self.blocked_within(&state) {
            state.set_blocked(address, true);
        }
        self.pools.insert(state);
        self.touched_pools
            .extend(self.pools.order().iter().cloned());
        self.freed = true;
    }

    pub(super) fn remove_pool(&mut self, name: &str) {
        self.pools.remove(name);
        let of_pool = self.holdings.iter();
        let of_pool = of_pool.filter(|(_, holding)| *holding.pool == *name);
        self.touched_records
            .extend(of_pool.map(|(address, _)| *address));
        self.touched_pools
            .extend(self.pools.order().iter().cloned());
        self.freed = true;
    }

    fn blocked_within(&self, state: &PoolState) -> BTreeSet<IpAddr> {
        let mut blocked = BTreeSet::new();
        for family in [Family::V4, Family::V6] {
            for &(first, last) in state.ranges(family) {
                let (first, last) = (from_bits(family, first), from_bits(family, last));
                blocked.extend(
                    self.holdings
                        .range(first..=last)
                        .map(|(&address, _)| address),
                );
                blocked.extend(self.quarantine.within(first, last));
                blocked.extend(
                    self.node_addresses
                        .range(first..=last)
                        .map(|(&address, _)| address),
                );
            }
        }
        blocked
    }

    /// Notes a node's own addresses, which are never handed out.
    pub(super) fn set_node(&mut self, node: &NodeName, before: &[IpAddr], after: &[IpAddr]) {
        for &address in before {
            if let Some(nodes) = self.node_addresses.get_mut(&address) {
                nodes.remove(node);
                if nodes.is_empty() {
                    self.node_addresses.remove(&address);
                }
            }
            self.refresh(address);
        }
        for &address in after {
            self.node_addresses
                .entry(address)
                .or_default()
                .insert(node.clone());
            self.refresh(address);
        }
    }

    /// Gives `address` to `owner`, who holds `siblings` besides. The caller has checked that it may.
    ///
    /// All addresses of one owner and of those it shares with carry one group.
    pub(super) fn hold(
        &mut self,
        address: IpAddr,
        pool: &Arc<str>,
        owner: &Holder,
        sharer: Sharer,
        siblings: &[IpAddr],
        on_record: OnRecord,
    ) {
        let OnRecord {
            group,
            retain: retained,
        } = on_record;
        let family = Family::of(address);
        let rest = self.quarantine.remove(address);
        if let Some(rest) = &rest {
            bump(&mut self.quarantined, &rest.pool, family, false);
            self.touched_pools.insert(rest.pool.clone());
        }
        if let Some(key) = sharer.key() {
            // Somebody may wait for an address to share.
            self.freed = true;
            self.by_key
                .entry((key.to_owned(), family))
                .or_default()
                .insert(address);
        }
        let sibling_group = siblings
            .iter()
            .find_map(|sibling| Some(self.holdings.get(sibling)?.group.clone()));
        if let Some(holding) = self.holdings.get_mut(&address) {
            holding.holders.insert(owner.clone(), sharer);
            let group = holding.group.clone();
            if let Some(other) = sibling_group.filter(|other| *other != group) {
                self.merge_group(&other, &group);
            }
        } else {
            let group = sibling_group
                .or(group)
                .or(rest
                    .map(|rest| rest.group)
                    .filter(|group| !self.groups.contains_key(group)))
                .unwrap_or_else(|| self.fresh_group(address));
            self.groups
                .entry(group.clone())
                .or_default()
                .insert(address);
            bump(&mut self.assigned, pool, family, true);
            let retain = self
                .pools
                .get(pool)
                .map_or(retained, |state| state.spec.retain_assigned);
            self.holdings.insert(
                address,
                Holding {
                    pool: pool.clone(),
                    retain,
                    group,
                    holders: BTreeMap::from([(owner.clone(), sharer)]),
                    drains: BTreeMap::new(),
                    former: BTreeSet::new(),
                },
            );
        }
        // Who has it again has its flows again.
        match owner {
            Holder::EgressPolicy(policy) => {
                self.end_drain(address, policy);
            }
            Holder::Service(_) => self.end_drains_of_followers(address),
        }
        if let Some(holding) = self.holdings.get_mut(&address) {
            holding.former.remove(owner);
            if holding.drains.is_empty() {
                holding.former.clear();
            }
        }
        self.touched_pools.insert(pool.clone());
        self.refresh(address);
    }

    /// A Service has an address: the policies that use it hold it no more by themselves, for their flows.
    fn end_drains_of_followers(&mut self, address: IpAddr) {
        let Some(holding) = self.holdings.get(&address) else {
            return;
        };
        let mut again = self.policies_of(holding);
        again.retain(|policy| holding.drains.contains_key(policy));
        for policy in again {
            self.end_drain(address, &policy);
            if let Some(holding) = self.holdings.get_mut(&address) {
                holding.holders.remove(&Holder::EgressPolicy(policy));
            }
        }
    }

    fn fresh_group(&self, address: IpAddr) -> Arc<str> {
        let name = virtual_ip_name(address);
        // The plain name is taken when the address left a group that still lives.
        let taken = |candidate: &str| self.groups.contains_key(candidate);
        if !taken(&name) {
            return name.into();
        }
        (2..=u32::MAX)
            .map(|number| format!("{name}-{number}"))
            .find(|candidate| !taken(candidate))
            .expect("some number below 2^32 is not taken by one of fewer groups")
            .into()
    }

    fn merge_group(&mut self, from: &Arc<str>, into: &Arc<str>) {
        let moved = self.groups.remove(from).unwrap_or_default();
        for address in &moved {
            if let Some(holding) = self.holdings.get_mut(address) {
                holding.group = into.clone();
            }
        }
        self.touched_records.extend(moved.iter().copied());
        self.groups.entry(into.clone()).or_default().extend(moved);
    }

    /// Takes `address` from `owner`; when nobody else holds it, it rests. Where flows drain it does not: their policies
    /// hold it until they have ended.
    pub(super) fn release(&mut self, address: IpAddr, owner: &Holder, now: Duration) {
        let family = Family::of(address);
        let Some(holding) = self.holdings.get_mut(&address) else {
            return;
        };
        let Some(sharer) = holding.holders.remove(owner) else {
            return;
        };
        let was_last = holding.holders.is_empty();
        let drains = holding.drains.keys().cloned();
        let drains: Vec<Holder> = drains.map(Holder::EgressPolicy).collect();
        if was_last && !drains.is_empty() {
            holding.former.insert(owner.clone());
            let alone = |holder| (holder, Sharer::alone());
            holding.holders.extend(drains.into_iter().map(alone));
        }
        let mut former = BTreeSet::from([owner.clone()]);
        if was_last && let Some(key) = sharer.key() {
            self.forget_key(key, address);
        }
        if let Some(holding) = self
            .holdings
            .extract_if(address..=address, |_, holding| holding.holders.is_empty())
            .next()
            .map(|(_, holding)| holding)
        {
            former.extend(holding.former.iter().cloned());
            if let Some(members) = self.groups.get_mut(&holding.group) {
                members.remove(&address);
                if members.is_empty() {
                    self.groups.remove(&holding.group);
                }
            }
            bump(&mut self.assigned, &holding.pool, family, false);
            self.touched_pools.insert(holding.pool.clone());
            self.rest(address, &holding.pool, former, holding.group, now);
        }
        self.refresh(address);
        // A port of a shared address is something others may wait for.
        self.freed = true;
    }

    /// Notes that a policy leaves by `address` no more, but for the flows that are there.
    pub(super) fn drain(&mut self, address: IpAddr, policy: &Arc<str>, terms: Terms) {
        let Some(holding) = self.holdings.get_mut(&address) else {
            return;
        };
        let terms = Terms {
            drains: true,
            ..terms
        };
        holding.drains.insert(policy.clone(), terms);
        let addresses = self.draining.entry(policy.clone()).or_default();
        addresses.insert(address);
        self.touched_records.insert(address);
    }

    /// What outlives a policy that is there.
    pub(super) fn terms(&self, policy: &str) -> Terms {
        self.terms.get(policy).cloned().unwrap_or_default()
    }

    /// Whether somebody holds an address.
    pub(super) fn holds(&self, address: IpAddr, holder: &Holder) -> bool {
        let holding = self.holdings.get(&address);
        holding.is_some_and(|holding| holding.holders.contains_key(holder))
    }

    /// Flows of a policy drain on an address no more, but are as any; whether they did.
    pub(super) fn end_drain(&mut self, address: IpAddr, policy: &Arc<str>) -> bool {
        if let Some(addresses) = self.draining.get_mut(policy) {
            addresses.remove(&address);
            if addresses.is_empty() {
                self.draining.remove(policy);
            }
        }
        self.touched_records.insert(address);
        let holding = self.holdings.get_mut(&address);
        holding.is_some_and(|holding| holding.drains.remove(policy).is_some())
    }

    /// No flow of a policy is left on `address` that was to go on to its end, or none is to.
    pub(super) fn drained(&mut self, address: IpAddr, policy: &Arc<str>, now: Duration) {
        if self.end_drain(address, policy) {
            self.release(address, &Holder::EgressPolicy(policy.clone()), now);
        }
    }

    /// The addresses where flows of a policy drain.
    pub(super) fn draining<'a>(&'a self, policy: &str) -> impl Iterator<Item = IpAddr> + use<'a> {
        self.draining.get(policy).into_iter().flatten().copied()
    }

    /// The addresses where nothing but flows that drain keeps `holder` from what it had.
    pub(super) fn due_to<'a>(
        &'a self,
        holder: &'a Holder,
    ) -> impl Iterator<Item = IpAddr> + use<'a> {
        let draining: BTreeSet<IpAddr> = self.draining.values().flatten().copied().collect();
        draining
            .into_iter()
            .filter(|address| self.holdings[address].is_due_to(holder))
    }

    /// The addresses that a Service had, where flows of policies drain that use what it has.
    pub(super) fn left_to_followers(&self, service: &ObjectKey) -> BTreeSet<IpAddr> {
        let holder = Holder::Service(service.clone());
        let followers = self.followers(service);
        followers
            .flat_map(|policy| self.draining(policy))
            .filter(|address| self.holdings[address].is_due_to(&holder))
            .collect()
    }

    /// Takes an address from a record where flows drain; nobody else holds it yet, or its Services do.
    pub(super) fn drain_on_record(&mut self, vip: &VirtualIp, policy: &Arc<str>, terms: Terms) {
        if !self.holdings.contains_key(&vip.address) {
            let on_record = OnRecord {
                group: Some(vip.group.clone()),
                retain: vip.retain,
            };
            let holder = Holder::EgressPolicy(policy.clone());
            let alone = Sharer::alone();
            self.hold(vip.address, &vip.pool, &holder, alone, &[], on_record);
            if let Some(holding) = self.holdings.get_mut(&vip.address) {
                holding.former = vip.former_holders().collect();
            }
        }
        self.drain(vip.address, policy, terms);
    }

    /// Notes what outlives a policy that is there; nothing, of one that is not. Its addresses' records are to be looked at.
    pub(super) fn set_terms(&mut self, policy: &Arc<str>, terms: Option<Terms>) -> bool {
        if self.terms.get(policy) == terms.as_ref() {
            return false;
        }
        match terms {
            Some(terms) => self.terms.insert(policy.clone(), terms),
            None => self.terms.remove(policy),
        };
        true
    }

    fn forget_key(&mut self, key: &str, address: IpAddr) {
        let entry = (key.to_owned(), Family::of(address));
        if let Some(addresses) = self.by_key.get_mut(&entry) {
            addresses.remove(&address);
            if addresses.is_empty() {
                self.by_key.remove(&entry);
            }
        }
    }

    /// Lets a free `address` rest for `former`.
    pub(super) fn rest(
        &mut self,
        address: IpAddr,
        pool: &Arc<str>,
        former: BTreeSet<Holder>,
        group: Arc<str>,
        now: Duration,
    ) {
        let length = self
            .pools
            .get(pool)
            .map_or(DEFAULT_QUARANTINE, |state| state.spec.quarantine);
        bump(&mut self.quarantined, pool, Family::of(address), true);
        self.touched_pools.insert(pool.clone());
        let until = now + length;
        self.quarantine.insert(
            address,
            Rest {
                until,
                former,
                pool: pool.clone(),
                group,
            },
        );
        self.refresh(address);
    }

    /// Ends every rest that is over and that `in_the_way` does not object to.
    pub(super) fn end_rests(&mut self, now: Duration, in_the_way: &dyn Fn(IpAddr) -> bool) {
        for address in self.quarantine.expire(now) {
            self.touched_records.insert(address);
            if in_the_way(address) {
                continue;
            }
            if let Some(rest) = self.quarantine.remove(address) {
                bump(
                    &mut self.quarantined,
                    &rest.pool,
                    Family::of(address),
                    false,
                );
                self.touched_pools.insert(rest.pool);
                self.refresh(address);
            }
        }
    }

    /// Notes that a holder's ports, key or backend changed.
    pub(super) fn set_sharer(&mut self, address: IpAddr, owner: &Holder, sharer: &Sharer) {
        let Some(holding) = self.holdings.get_mut(&address) else {
            return;
        };
        let Some(before) = holding.holders.insert(owner.clone(), sharer.clone()) else {
            holding.holders.remove(owner);
            return;
        };
        if before == *sharer {
            return;
        }
        self.freed = true;
        if before.key() != sharer.key() {
            if let Some(key) = before.key() {
                self.forget_key(key, address);
            }
            if let Some(key) = sharer.key() {
                let entry = (key.to_owned(), Family::of(address));
                self.by_key.entry(entry).or_default().insert(address);
            }
        }
    }

    /// Notes that a policy uses the addresses of a Service, or no longer does. The caller has their records looked at.
    pub(super) fn follow(&mut self, service: &ObjectKey, policy: &Arc<str>, follows: bool) {
        let policies = self.followers.entry(service.clone()).or_default();
        if follows {
            policies.insert(policy.clone());
        } else {
            policies.remove(policy);
        }
        if policies.is_empty() {
            self.followers.remove(service);
        }
    }

    /// The policies that use the addresses of a Service.
    pub(super) fn followers<'a>(
        &'a self,
        service: &ObjectKey,
    ) -> impl Iterator<Item = &'a Arc<str>> + use<'a> {
        self.followers.get(service).into_iter().flatten()
    }

    /// The policies whose pods leave by a held address: the one that holds it, or, of a pool for both, those that use
    /// the addresses of the Services that do. Those whose flows drain there are not among them.
    pub(super) fn policies_of(&self, holding: &Holding) -> BTreeSet<Arc<str>> {
        let both = self
            .pools
            .get(&holding.pool)
            .is_some_and(|state| state.spec.purpose == Purpose::Both);
        let mut policies: BTreeSet<Arc<str>> = BTreeSet::new();
        for holder in holding.holders.keys() {
            match holder {
                Holder::EgressPolicy(name) if holding.drains.contains_key(name) => {}
                Holder::EgressPolicy(name) => {
                    policies.insert(name.clone());
                }
                Holder::Service(key) if both => policies.extend(self.followers(key).cloned()),
                Holder::Service(_) => {}
            }
        }
        policies
    }

    /// Counts `address` for another pool from now on.
    pub(super) fn rehome(&mut self, address: IpAddr, pool: &Arc<str>) {
        let family = Family::of(address);
        let retain = self
            .pools
            .get(pool)
            .is_some_and(|state| state.spec.retain_assigned);
        let Some(holding) = self.holdings.get_mut(&address) else {
            return;
        };
        let before = std::mem::replace(&mut holding.pool, pool.clone());
        holding.retain = retain;
        bump(&mut self.assigned, &before, family, false);
        bump(&mut self.assigned, pool, family, true);
        self.touched_pools.extend([before, pool.clone()]);
        self.touched_records.insert(address);
    }

    /// The record that should exist of `address`, held or resting.
    pub(super) fn record(&self, address: IpAddr) -> Option<Record> {
        if let Some(holding) = self.holdings.get(&address) {
            let mut terms = holding.drains.clone();
            for policy in self.policies_of(holding) {
                let now = self.terms(&policy);
                terms.insert(policy, now);
            }
            return Some(Record {
                address,
                pool: holding.pool.clone(),
                group: holding.group.clone(),
                services: services(holding.holders.keys()),
                egress_policies: terms.keys().cloned().collect(),
                terms,
                former: services(holding.former.iter()),
                former_policies: Vec::new(),
                retain: holding.retain,
            });
        }
        let rest = self.quarantine.get(address)?;
        Some(Record {
            address,
            pool: rest.pool.clone(),
            group: rest.group.clone(),
            services: Vec::new(),
            egress_policies: Vec::new(),
            terms: BTreeMap::new(),
            former: services(rest.former.iter()),
            former_policies: rest
                .former
                .iter()
                .filter_map(|holder| holder.policy().cloned())
                .collect(),
            retain: false,
        })
    }

    /// How many addresses of `family` the pool has, in which state.
    pub(super) fn counts(&self, state: &PoolState, family: Family) -> Counts {
        let entry = (state.spec.name.clone(), family);
        Counts {
            assigned: self.assigned.get(&entry).copied().unwrap_or_default(),
            quarantined: self.quarantined.get(&entry).copied().unwrap_or_default(),
            ..state.counts(family)
        }
    }
}

fn services<'a>(holders: impl Iterator<Item = &'a Holder>) -> Vec<ObjectKey> {
    holders
        .filter_map(|holder| holder.service().cloned())
        .collect()
}
