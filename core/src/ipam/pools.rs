//! All pools: the order in which they are tried, and which of them contain an address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::pool::PoolState;
use crate::ip::{Family, from_bits, to_bits};

/// The pools by name.
///
/// `segments` cuts the address space at every range's end, so that "which pools span this address" is one
/// look-up however many pools there are and however they overlap. It is built anew when a pool changes.
#[derive(Clone, Debug, Default)]
pub(super) struct Pools {
    by_name: BTreeMap<Arc<str>, PoolState>,
    order: Vec<Arc<str>>,
    segments: BTreeMap<IpAddr, Segment>,
}

/// A stretch of addresses that the same pools span, in pool order.
#[derive(Clone, Debug)]
struct Segment {
    last: IpAddr,
    pools: Vec<Arc<str>>,
}

impl Pools {
    pub(super) fn get(&self, name: &str) -> Option<&PoolState> {
        self.by_name.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut PoolState> {
        self.by_name.get_mut(name)
    }

    pub(super) fn insert(&mut self, state: PoolState) {
        self.by_name.insert(state.spec.name.clone(), state);
        self.rebuild();
    }

    pub(super) fn remove(&mut self, name: &str) -> Option<PoolState> {
        let removed = self.by_name.remove(name);
        self.rebuild();
        removed
    }

    /// The pools' names, in the order in which they are tried.
    pub(super) fn order(&self) -> &[Arc<str>] {
        &self.order
    }

    /// The pools in the order in which they are tried.
    pub(super) fn in_order(&self) -> impl Iterator<Item = &PoolState> {
        self.order.iter().filter_map(|name| self.by_name.get(name))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    fn rebuild(&mut self) {
        let mut states: Vec<_> = self.by_name.values().collect();
        states.sort_by(|a, b| a.rank().cmp(&b.rank()));
        self.order = states.iter().map(|state| state.spec.name.clone()).collect();
        self.segments.clear();
        for family in [Family::V4, Family::V6] {
            // At which number which pool (by its place in the order) begins or ends.
            let mut edges: Vec<(u128, bool, usize)> = Vec::new();
            for (place, name) in self.order.iter().enumerate() {
                for &(first, last) in self.by_name[name].ranges(family) {
                    edges.push((first, true, place));
                    if let Some(after) = last.checked_add(1) {
                        edges.push((after, false, place));
                    }
                }
            }
            edges.sort_unstable();
            let mut open: BTreeSet<usize> = BTreeSet::new();
            let end = match family {
                Family::V4 => u128::from(u32::MAX),
                Family::V6 => u128::MAX,
            };
            for (index, &(at, begins, place)) in edges.iter().enumerate() {
                if begins {
                    open.insert(place);
                } else {
                    open.remove(&place);
                }
                let next = edges.get(index + 1).map(|edge| edge.0);
                if open.is_empty() || next == Some(at) {
                    continue;
                }
                let last = next.map_or(end, |next| next - 1);
                self.segments.insert(
                    from_bits(family, at),
                    Segment {
                        last: from_bits(family, last),
                        pools: open
                            .iter()
                            .map(|&place| self.order[place].clone())
                            .collect(),
                    },
                );
            }
        }
    }

    /// The names of the pools whose ranges span `address`, in order (also those that keep off it).
    pub(super) fn spanning(&self, address: IpAddr) -> &[Arc<str>] {
        self.segments
            .range(..=address)
            .next_back()
            .filter(|(_, segment)| {
                address <= segment.last && Family::of(address) == Family::of(segment.last)
            })
            .map_or(&[], |(_, segment)| &segment.pools)
    }

    /// The pools that can hand out `address`, in order.
    pub(super) fn containing(&self, address: IpAddr) -> impl Iterator<Item = &PoolState> {
        self.spanning(address)
            .iter()
            .filter_map(|name| self.by_name.get(name))
            .filter(move |state| state.contains(address))
    }

    /// Notes in every pool that contains `address` whether it is to be had.
    pub(super) fn set_blocked(&mut self, address: IpAddr, blocked: bool) {
        for name in self.spanning(address).to_vec() {
            if let Some(state) = self.by_name.get_mut(&name) {
                state.set_blocked(address, blocked);
            }
        }
    }

    /// For each pool, the other pools that share an address with it.
    pub(super) fn overlaps(&self) -> BTreeMap<Arc<str>, BTreeSet<Arc<str>>> {
        let mut overlaps: BTreeMap<Arc<str>, BTreeSet<Arc<str>>> = BTreeMap::new();
        for segment in self.segments.values().filter(|s| s.pools.len() > 1) {
            for pool in &segment.pools {
                let others = segment.pools.iter().filter(|other| *other != pool);
                overlaps
                    .entry(pool.clone())
                    .or_default()
                    .extend(others.cloned());
            }
        }
        overlaps
    }

    /// The pools that share an address with `net`.
    pub(super) fn meeting(&self, net: IpNet) -> BTreeSet<Arc<str>> {
        let (first, last) = (net.network(), net.broadcast());
        let mut met: BTreeSet<Arc<str>> = self.spanning(first).iter().cloned().collect();
        let within = self
            .segments
            .range(first..=last)
            .filter(|(start, _)| to_bits(**start) <= to_bits(last));
        met.extend(within.flat_map(|(_, segment)| segment.pools.iter().cloned()));
        met
    }
}
