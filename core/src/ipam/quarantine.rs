//! Addresses that rest after they were freed, and who may have them back at once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::model::Holder;

/// A freed address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rest {
    /// When it is over, on the caller's monotonic clock.
    pub(super) until: Duration,
    /// Who held it: these get it back at once.
    pub(super) former: BTreeSet<Holder>,
    /// The pool it came from.
    pub(super) pool: Arc<str>,
    /// The group it moved with.
    pub(super) group: Arc<str>,
}

/// All resting addresses.
#[derive(Clone, Debug, Default)]
pub(super) struct Quarantine {
    rests: BTreeMap<IpAddr, Rest>,
    deadlines: BTreeSet<(Duration, IpAddr)>,
    /// Rested long enough, but something still stands in the way of their reuse.
    expired: BTreeSet<IpAddr>,
    by_former: BTreeMap<Holder, BTreeSet<IpAddr>>,
}

impl Quarantine {
    pub(super) fn get(&self, address: IpAddr) -> Option<&Rest> {
        self.rests.get(&address)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (IpAddr, &Rest)> {
        self.rests.iter().map(|(&address, rest)| (address, rest))
    }

    /// The resting addresses from `first` to `last`.
    pub(super) fn within(&self, first: IpAddr, last: IpAddr) -> impl Iterator<Item = IpAddr> {
        self.rests.range(first..=last).map(|(&address, _)| address)
    }

    pub(super) fn insert(&mut self, address: IpAddr, rest: Rest) {
        self.remove(address);
        self.deadlines.insert((rest.until, address));
        for owner in &rest.former {
            self.by_former
                .entry(owner.clone())
                .or_default()
                .insert(address);
        }
        self.rests.insert(address, rest);
    }

    pub(super) fn remove(&mut self, address: IpAddr) -> Option<Rest> {
        let rest = self.rests.remove(&address)?;
        self.deadlines.remove(&(rest.until, address));
        self.expired.remove(&address);
        for owner in &rest.former {
            if let Some(addresses) = self.by_former.get_mut(owner) {
                addresses.remove(&address);
                if addresses.is_empty() {
                    self.by_former.remove(owner);
                }
            }
        }
        Some(rest)
    }

    /// The addresses that rest for `owner`.
    pub(super) fn of_former<'a>(
        &'a self,
        owner: &Holder,
    ) -> impl Iterator<Item = IpAddr> + use<'a> {
        self.by_former.get(owner).into_iter().flatten().copied()
    }

    /// Everything whose rest is over at `now`; it stays here until removed.
    pub(super) fn expire(&mut self, now: Duration) -> Vec<IpAddr> {
        while let Some(&(until, address)) = self.deadlines.first()
            && until <= now
        {
            self.deadlines.pop_first();
            self.expired.insert(address);
        }
        self.expired.iter().copied().collect()
    }

    /// When the next rest is over.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|&(until, _)| until)
    }
}
