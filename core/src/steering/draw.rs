//! Numbers drawn by nodes, in whole numbers: no two machines round them differently.

use std::cmp::Ordering;

use xxhash_rust::xxh64::xxh64;

use crate::model::NodeName;

/// How finely the logarithm's table is cut, as a power of two.
const CUTS: u32 = 10;

/// `log2(1 + i / 2^CUTS)` in 0.32 fixed point; the last is one, less the smallest step.
static LOGARITHMS: [u32; (1 << CUTS) + 1] = logarithms();

const fn logarithms() -> [u32; (1 << CUTS) + 1] {
    let mut table = [0; (1 << CUTS) + 1];
    let mut index = 0;
    while index < 1 << CUTS {
        // Squaring doubles the logarithm: its bits fall out one by one. `x` is 1.63 fixed point in [1, 2).
        let mut x = ((1_u128 << CUTS) + index as u128) << (63 - CUTS);
        let mut bits = 0_u32;
        let mut bit = 0;
        while bit < 32 {
            x = (x * x) >> 63;
            bits <<= 1;
            if x >> 64 != 0 {
                bits |= 1;
                x >>= 1;
            }
            bit += 1;
        }
        table[index] = bits;
        index += 1;
    }
    table[1 << CUTS] = u32::MAX;
    table
}

/// What a node's draws for all buckets begin with.
pub(super) fn seed(node: &NodeName) -> u64 {
    xxh64(node.0.as_bytes(), 0)
}

/// What the draw of the node with this seed costs it for a bucket, before its weight: an exponentially distributed
/// number in 32.32 fixed point.
pub(super) fn cost(seed: u64, bucket: u16) -> u64 {
    const BELOW: u32 = 63 - CUTS;
    let drawn = xxh64(&u32::from(bucket).to_be_bytes(), seed) | 1;
    let zeros = drawn.leading_zeros();
    // Without the leading one: first the place in the table, then what lies between two places.
    let fraction = (drawn << zeros) & (u64::MAX >> 1);
    let place = usize::try_from(fraction >> BELOW).expect("it has CUTS bits");
    let between = (fraction & ((1 << BELOW) - 1)) >> (BELOW - 32);
    let (low, high) = (
        u64::from(LOGARITHMS[place]),
        u64::from(LOGARITHMS[place + 1]),
    );
    let logarithm = low + (((high - low) * between) >> 32);
    (u64::from(1 + zeros) << 32) - logarithm
}

/// A node's bid for a bucket; the lowest wins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bid {
    pub(super) cost: u64,
    /// At least 1.
    pub(super) weight: u32,
}

impl Bid {
    /// Compares `cost / weight`, exactly.
    pub(super) fn compare(self, other: Self) -> Ordering {
        let scaled = |bid: Self, by: Self| u128::from(bid.cost) * u128::from(by.weight);
        scaled(self, other).cmp(&scaled(other, self))
    }
}
