//! One pool: what it contains, whom it admits, what of it is free.

use std::net::IpAddr;

use super::free::FreeSet;
use super::status::Counts;
use crate::ip::{Family, from_bits, to_bits};
use crate::model::{Pool, Purpose, Service, ServiceAllocation};
use crate::selector::Labels;

/// Whether the number ends in .0 or .255, which some firmware takes for network or broadcast addresses.
pub(super) fn is_buggy(bits: u128) -> bool {
    matches!(bits & 0xff, 0 | 0xff)
}

/// How many numbers from `first` to `last` end in .0 or .255.
fn count_buggy(first: u128, last: u128) -> u128 {
    // How many below `end` end in `low`.
    let below = |end: u128, low: u128| end / 256 + u128::from(end % 256 > low);
    [0, 0xff]
        .map(|low| below(last + 1, low) - below(first, low))
        .iter()
        .sum()
}

/// The part of a pool that belongs to one family.
#[derive(Clone, Debug, Default)]
struct Half {
    /// Sorted, disjoint, not touching.
    ranges: Vec<(u128, u128)>,
    free: FreeSet,
    total: u128,
    /// Addresses within that somebody holds, that rest, or that are a node's.
    blocked: u128,
}

impl Half {
    fn of(pool: &Pool, family: Family) -> Self {
        let mut ranges: Vec<_> = pool
            .ranges
            .iter()
            .filter(|range| range.family() == family)
            .map(|range| (to_bits(range.first()), to_bits(range.last())))
            .collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => {
                    before.1 = before.1.max(last);
                }
                _ => merged.push((first, last)),
            }
        }
        let buggy = family == Family::V4 && pool.avoid_buggy_ips;
        let total = merged.iter().fold(0u128, |sum, &(first, last)| {
            let size = (last - first).saturating_add(1);
            let skipped = if buggy { count_buggy(first, last) } else { 0 };
            sum.saturating_add(size - skipped)
        });
        Self {
            free: FreeSet::of(&merged),
            ranges: merged,
            total,
            blocked: 0,
        }
    }

    fn contains(&self, bits: u128) -> bool {
        let above = self.ranges.partition_point(|&(first, _)| first <= bits);
        above > 0 && bits <= self.ranges[above - 1].1
    }
}

/// A pool and what of it is free.
#[derive(Clone, Debug)]
pub(super) struct PoolState {
    pub(super) spec: Pool,
    v4: Half,
    v6: Half,
}

impl PoolState {
    /// A pool of which nothing is taken yet.
    pub(super) fn new(spec: Pool) -> Self {
        Self {
            v4: Half::of(&spec, Family::V4),
            v6: Half::of(&spec, Family::V6),
            spec,
        }
    }

    fn half(&self, family: Family) -> &Half {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    fn half_mut(&mut self, family: Family) -> &mut Half {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Whether addresses of this family end in .0 or .255 are kept off.
    fn avoids_buggy(&self, family: Family) -> bool {
        family == Family::V4 && self.spec.avoid_buggy_ips
    }

    /// The disjoint ranges of one family, as numbers.
    pub(super) fn ranges(&self, family: Family) -> &[(u128, u128)] {
        &self.half(family).ranges
    }

    /// Whether `address` can be handed out of this pool.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        let (family, bits) = (Family::of(address), to_bits(address));
        self.half(family).contains(bits) && !(self.avoids_buggy(family) && is_buggy(bits))
    }

    /// Whether the pool spans `address` but keeps off it because of how it ends.
    pub(super) fn keeps_off(&self, address: IpAddr) -> bool {
        let (family, bits) = (Family::of(address), to_bits(address));
        self.half(family).contains(bits) && self.avoids_buggy(family) && is_buggy(bits)
    }

    /// Whether the pool has any address of `family`, free or not.
    pub(super) fn offers(&self, family: Family) -> bool {
        self.half(family).total > 0
    }

    /// The lowest free address of `family`.
    pub(super) fn first_free(&mut self, family: Family) -> Option<IpAddr> {
        let avoid = self.avoids_buggy(family);
        let bits = self.half_mut(family).free.first(avoid)?;
        Some(from_bits(family, bits))
    }

    /// Notes whether `address` is to be had; idempotent.
    pub(super) fn set_blocked(&mut self, address: IpAddr, blocked: bool) {
        if !self.contains(address) {
            return;
        }
        let half = self.half_mut(Family::of(address));
        let bits = to_bits(address);
        if blocked && half.free.remove(bits) {
            half.blocked += 1;
        } else if !blocked && half.free.insert(bits) {
            half.blocked -= 1;
        }
    }

    /// Total and available addresses of `family`; the other counts are the ledger's to fill in.
    pub(super) fn counts(&self, family: Family) -> Counts {
        let half = self.half(family);
        Counts {
            total: half.total,
            available: half.total.saturating_sub(half.blocked),
            ..Counts::default()
        }
    }

    /// Whether the Service may have addresses of this pool at all, even by explicit request.
    pub(super) fn admits(&self, service: &Service, namespace: &Labels) -> bool {
        let rules = self.spec.allocation.as_ref();
        self.is_for_services() && rules.is_none_or(|rules| admits(rules, service, namespace))
    }

    /// Whether Services may have its addresses, as far as its purpose goes.
    pub(super) fn is_for_services(&self) -> bool {
        match self.spec.purpose {
            Purpose::Ingress | Purpose::Both => true,
            Purpose::Egress => false,
        }
    }

    /// Whether egress policies may have its addresses, as far as its purpose goes.
    pub(super) fn is_for_policies(&self) -> bool {
        match self.spec.purpose {
            Purpose::Egress | Purpose::Both => true,
            Purpose::Ingress => false,
        }
    }

    /// Whether egress policies may have addresses of this pool. One that picks Services by their labels is for these:
    /// a policy has no such labels. Which pods may leave by them is another question: their namespaces tell.
    pub(super) fn admits_policies(&self) -> bool {
        let rules = self.spec.allocation.as_ref();
        self.is_for_policies() && rules.is_none_or(|rules| rules.service_selectors.is_empty())
    }

    /// Where the pool stands when pools are tried: lower priority first, 0 after all others (as in `MetalLB`),
    /// pools without rules last, then by name.
    pub(super) fn rank(&self) -> (bool, u32, &str) {
        let rules = self.spec.allocation.as_ref();
        let priority = rules.map_or(0, |rules| rules.priority);
        let after_zero = priority.checked_sub(1).unwrap_or(u32::MAX);
        (rules.is_none(), after_zero, &self.spec.name)
    }
}

/// Fails closed: what is listed must match, and a list that matches nothing admits nobody.
fn admits(rules: &ServiceAllocation, service: &Service, namespace: &Labels) -> bool {
    let in_namespace = rules.admits_namespace(&service.key.namespace, namespace);
    let selected = rules.service_selectors.is_empty()
        || rules
            .service_selectors
            .iter()
            .any(|selector| selector.matches(&service.labels));
    in_namespace && selected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buggy_addresses_are_counted_exactly() {
        for (first, last) in [
            (0, 0),
            (0, 255),
            (1, 254),
            (255, 256),
            (10, 1000),
            (255, 255),
        ] {
            let expected = (first..=last).filter(|&bits| is_buggy(bits)).count() as u128;
            assert_eq!(count_buggy(first, last), expected, "{first}-{last}");
        }
    }
}
