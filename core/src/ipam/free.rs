//! The free addresses of a pool and family, as disjoint intervals: the lowest free address, taking one
//! and giving one back are each O(log n) in the number of intervals, whatever the size of the pool.

use std::collections::BTreeMap;

use super::pool::is_buggy;

/// Free addresses as numbers, first to last of each interval; no two intervals touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FreeSet {
    intervals: BTreeMap<u128, u128>,
}

impl FreeSet {
    /// The set of everything in `ranges`, which are sorted and disjoint.
    pub(super) fn of(ranges: &[(u128, u128)]) -> Self {
        Self {
            intervals: ranges.iter().copied().collect(),
        }
    }

    fn interval_of(&self, bits: u128) -> Option<(u128, u128)> {
        let (&first, &last) = self.intervals.range(..=bits).next_back()?;
        (bits <= last).then_some((first, last))
    }

    /// Takes `bits` out; false when it was not there.
    pub(super) fn remove(&mut self, bits: u128) -> bool {
        let Some((first, last)) = self.interval_of(bits) else {
            return false;
        };
        if first == bits {
            self.intervals.remove(&first);
        } else {
            self.intervals.insert(first, bits - 1);
        }
        if bits < last {
            self.intervals.insert(bits + 1, last);
        }
        true
    }

    /// Puts `bits` back; false when it was there.
    pub(super) fn insert(&mut self, bits: u128) -> bool {
        if self.interval_of(bits).is_some() {
            return false;
        }
        let mut first = bits;
        let mut last = bits;
        if let Some((&below, &end)) = self.intervals.range(..bits).next_back()
            && end + 1 == bits
        {
            first = below;
        }
        if let Some(above) = bits.checked_add(1)
            && let Some(end) = self.intervals.remove(&above)
        {
            last = end;
        }
        self.intervals.insert(first, last);
        true
    }

    /// The lowest free number, which stays in the set. With `avoid_buggy`, addresses that end in .0 and
    /// .255 are dropped for good on the way: each costs one step once, not one per search.
    pub(super) fn first(&mut self, avoid_buggy: bool) -> Option<u128> {
        loop {
            let (&first, _) = self.intervals.first_key_value()?;
            if !(avoid_buggy && is_buggy(first)) {
                return Some(first);
            }
            self.remove(first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_and_merges() {
        let mut free = FreeSet::of(&[(10, 20)]);
        assert!(free.remove(15));
        assert!(!free.remove(15));
        assert!(free.remove(10));
        assert_eq!(free.first(false), Some(11));
        assert!(free.insert(15));
        assert!(free.insert(10));
        assert!(!free.insert(10));
        assert_eq!(free, FreeSet::of(&[(10, 20)]));
    }

    #[test]
    fn the_ends_of_the_number_line_hold() {
        let mut free = FreeSet::of(&[(0, u128::MAX)]);
        assert!(free.remove(u128::MAX));
        assert!(free.remove(0));
        assert!(free.insert(u128::MAX));
        assert!(free.insert(0));
        assert_eq!(free, FreeSet::of(&[(0, u128::MAX)]));
    }

    #[test]
    fn buggy_addresses_are_skipped_once() {
        let mut free = FreeSet::of(&[(0, 600)]);
        assert_eq!(free.first(true), Some(1));
        assert_eq!(free.first(false), Some(1), "dropped for good");
    }
}
