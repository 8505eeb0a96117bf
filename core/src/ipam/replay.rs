//! What was assigned before this process began, taken back before anything new is given.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Ipam;
use super::request::Want;
use super::sharing::{Sharer, first_conflict};
use crate::ip::Family;
use crate::model::{Holder, ObjectKey};

impl Ipam {
    /// Gives every Service what records, and then what statuses, say it holds.
    ///
    /// Records go first since they are written first, and where flows of a policy alone are left goes last; among equals
    /// the older Service wins, then the name: the same objects give the same assignment in whatever order they came.
    pub(super) fn replay(&mut self, now: Duration) {
        let mut recorded: Vec<(bool, i64, Holder, IpAddr)> = Vec::new();
        for vip in self.virtual_ips.values() {
            for holder in vip.holders() {
                if let Some((created, holder)) = self.rank_of(&holder) {
                    let drains = holder.policy().is_some_and(|it| vip.drains(it));
                    recorded.push((drains, created, holder, vip.address));
                }
            }
        }
        let mut shown: Vec<(i64, Holder, IpAddr)> = Vec::new();
        for (key, state) in &self.services {
            for address in state
                .service
                .ingress
                .iter()
                .filter_map(|entry| entry.address)
            {
                shown.push((state.service.created, Holder::Service(key.clone()), address));
            }
        }
        recorded.sort_unstable();
        shown.sort_unstable();
        let recorded = recorded.into_iter();
        let recorded = recorded.map(|(_, created, holder, address)| (created, holder, address));
        for (_, holder, address) in recorded.chain(shown) {
            match holder {
                Holder::Service(key) => self.claim(&key, address),
                Holder::EgressPolicy(name) => self.claim_for_policy(&name, address),
            }
        }
        let addresses: Vec<IpAddr> = self.virtual_ips.keys().copied().collect();
        for address in addresses {
            self.ledger.touched_records.insert(address);
            self.adopt_drains(address);
            self.adopt_orphan(address, now);
        }
    }

    /// Lets a Service keep `address`, if it may. What it may not keep it is given no reason for here: the
    /// decision that follows finds that it lacks an address and says so.
    fn claim(&mut self, key: &ObjectKey, address: IpAddr) {
        let Some(state) = self.services.get(key) else {
            return;
        };
        let service = state.service.clone();
        if state.held.contains(&address) || !self.is_ours(&service) {
            return;
        }
        let family = Family::of(address);
        let taken = state.held.iter().any(|&held| Family::of(held) == family);
        if taken || !Want::of(&service).families.contains(&family) {
            return;
        }
        let record = self
            .virtual_ips
            .get(&address)
            .filter(|vip| vip.services.contains(key));
        let recorded_pool = record.map(|vip| vip.pool.clone());
        let holder = Holder::Service(key.clone());
        let Some(home) = self.home_of(&holder, address, recorded_pool.as_ref()) else {
            return;
        };
        // With overlapping pools the address may count for one that admits only others of its holders.
        let pool = record
            .filter(|vip| self.serves(&vip.pool, address, vip.holders().iter()))
            .map_or(home, |vip| vip.pool.clone());
        let sharer = Sharer::of(&service);
        if let Some(holding) = self.ledger.holding(address)
            && first_conflict(&holding.holders, &holder, &sharer).is_some()
        {
            return;
        }
        self.take(key, address, &pool);
    }

    /// The pool that `address` may be kept from: the one on record if it still contains it and admits the
    /// holder, else another that does, else the one on record if that retains what it no longer contains.
    pub(super) fn home_of(
        &self,
        holder: &Holder,
        address: IpAddr,
        recorded: Option<&Arc<str>>,
    ) -> Option<Arc<str>> {
        let pools = &self.ledger.pools;
        let fits = |name: &Arc<str>| {
            pools
                .get(name)
                .is_some_and(|state| state.contains(address) && self.admits(state, holder))
        };
        if let Some(name) = recorded
            && fits(name)
        {
            return Some(name.clone());
        }
        if let Some(state) = pools
            .containing(address)
            .find(|state| self.admits(state, holder))
        {
            return Some(state.spec.name.clone());
        }
        if pools.containing(address).next().is_some() {
            return None;
        }
        let name = recorded?;
        let retains = match pools.get(name) {
            Some(state) => {
                // What a pool that cannot be read in full contains is not known: nothing is taken back.
                (state.spec.retain_assigned || state.spec.flaw.is_some())
                    && self.admits(state, holder)
            }
            None => match self.ledger.holding(address) {
                Some(holding) => holding.pool == *name && holding.retain,
                None => self
                    .virtual_ips
                    .get(&address)
                    .is_some_and(|vip| vip.pool == *name && vip.retain),
            },
        };
        retains.then(|| name.clone())
    }
}
