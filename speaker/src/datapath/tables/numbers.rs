//! Small numbers for things, each used again when it is free.

use std::collections::BTreeSet;

/// The numbers below a bound that are in use.
#[derive(Debug)]
pub(in super::super) struct Numbers {
    below: u32,
    next: u32,
    free: BTreeSet<u32>,
}

impl Numbers {
    /// From `first` up to and without `below`, less those in use.
    pub(in super::super) fn new(first: u32, below: u32, used: &BTreeSet<u32>) -> Self {
        let next = used.last().map_or(first, |last| last + 1).max(first);
        Self {
            below,
            next,
            free: (first..next)
                .filter(|number| !used.contains(number))
                .collect(),
        }
    }

    /// The lowest that is free; nothing when all are in use.
    pub(in super::super) fn take(&mut self) -> Option<u32> {
        if let Some(number) = self.free.pop_first() {
            return Some(number);
        }
        if self.next >= self.below {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    /// It is free again.
    pub(in super::super) fn give(&mut self, number: u32) {
        self.free.insert(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_is_taken_and_no_more_than_there_are() {
        let mut numbers = Numbers::new(1, 5, &BTreeSet::from([2, 3]));
        assert_eq!(numbers.take(), Some(1));
        assert_eq!(numbers.take(), Some(4));
        assert_eq!(numbers.take(), None);
        numbers.give(2);
        assert_eq!(numbers.take(), Some(2));
    }
}
