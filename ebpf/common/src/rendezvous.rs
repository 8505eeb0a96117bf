//! Which node a flow belongs to, in whole numbers: the same on every machine, in the kernel and outside.
//!
//! A flow's hash names a bucket. Each node draws a number for the bucket; the draw, an exponentially distributed
//! cost, is divided by the node's weight, and the lowest wins (weighted rendezvous hashing: Thaler and Ravishankar,
//! 1998; with weights: Schindelhauer and Schomaker, SPAA 2005).

/// What the choices are made of. Nodes whose versions differ use the highest that all understand.
///
/// Version 1: [`BUCKETS`] buckets; [`bucket`] and [`cost`] as they are here; a node's seed is the xxh64 of its name
/// with seed 0; of equal costs the lower seed wins.
pub const ALGORITHM: u16 = 1;

/// How many buckets there are: enough to spread flows over a hundred nodes within 12 % of evenly. Fixed: with
/// another number nearly every flow would move.
pub const BUCKETS: u32 = 1 << 17;

/// How finely the logarithm's table is cut, as a power of two.
const CUTS: u32 = 10;
/// Fraction bits of a cost.
const FRACTION: u32 = 26;

/// `log2(1 + i / 2^CUTS)` in 0.26 fixed point.
static LOGARITHMS: [u32; (1 << CUTS) + 1] = logarithms();

const fn logarithms() -> [u32; (1 << CUTS) + 1] {
    let mut table = [0; (1 << CUTS) + 1];
    let mut index = 0;
    while index < 1 << CUTS {
        // Squaring doubles the logarithm: its bits fall out one by one. `x` is 1.63 fixed point in [1, 2).
        let mut x = ((1_u128 << CUTS) + index as u128) << (63 - CUTS);
        let mut bits = 0_u32;
        let mut bit = 0;
        while bit < FRACTION {
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
    table[1 << CUTS] = 1 << FRACTION;
    table
}

/// Leading zeros of a byte: the BPF target has no instruction for it.
static ZEROS: [u8; 256] = zeros();

#[allow(clippy::cast_possible_truncation)] // The index is below 256, and has at most 8 zeros.
const fn zeros() -> [u8; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        table[index] = (index as u8).leading_zeros() as u8;
        index += 1;
    }
    table
}

/// Leading zeros of a number; most have few, and then one look does.
#[inline(always)]
#[allow(clippy::inline_always)] // As below.
const fn leading_zeros(x: u64) -> u32 {
    let first = ZEROS[(x >> 56) as usize];
    if first < 8 {
        first as u32
    } else {
        x.leading_zeros()
    }
}

/// Spreads a number's bits over all of it (Steele, Lea and Flood, OOPSLA 2014: the finaliser of `SplitMix64`).
#[inline(always)]
#[allow(clippy::inline_always)] // The verifier sees straight code.
const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The next number, from the one before and what is to be taken in.
#[inline(always)]
#[allow(clippy::inline_always)] // As above.
const fn absorb(state: u64, word: u64) -> u64 {
    mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ word)
}

/// The hash of a flow: of both addresses (as in [`VipKey`](crate::VipKey)), and of what else tells flows apart (the
/// ports, or nothing).
#[inline(always)]
#[allow(clippy::inline_always)] // As above.
pub const fn hash(client: &[u8; 16], vip: &[u8; 16], rest: u32) -> u64 {
    let mut state = absorb(0, word(client, 0));
    state = absorb(state, word(client, 8));
    state = absorb(state, word(vip, 0) ^ word(vip, 8).rotate_left(32));
    absorb(state, rest as u64)
}

/// The bucket of a flow with this hash: its upper bits.
#[inline(always)]
#[allow(clippy::inline_always, clippy::cast_possible_truncation)] // As above; the upper bits are off.
pub const fn bucket(hash: u64) -> u32 {
    (hash >> (64 - BUCKETS.ilog2())) as u32
}

/// Which of a node's slots a flow with this hash falls into: by its lower bits, which the bucket does not tell.
#[inline(always)]
#[allow(clippy::inline_always, clippy::cast_possible_truncation)] // As above; it is less than `slots`.
pub const fn slot(hash: u64, slots: u32) -> u32 {
    (((hash as u32) as u64 * slots as u64) >> 32) as u32
}

#[inline(always)]
#[allow(clippy::inline_always)] // As above.
const fn word(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from_be_bytes([
        bytes[at],
        bytes[at + 1],
        bytes[at + 2],
        bytes[at + 3],
        bytes[at + 4],
        bytes[at + 5],
        bytes[at + 6],
        bytes[at + 7],
    ])
}

/// What a bucket's draw costs the node with this seed, before its weight: an exponentially distributed number
/// in 6.26 fixed point, at most 32.
#[inline(always)]
#[allow(clippy::inline_always, clippy::cast_possible_truncation)] // As above; at most 32 in 6.26.
pub const fn cost(seed: u64, bucket: u32) -> u32 {
    // The bit that is set bounds the cost, and with it the integer part.
    let drawn = absorb(seed, bucket as u64) | 1 << 32;
    let zeros = leading_zeros(drawn);
    // Without the leading one: first the place in the table, then what lies between two places.
    let fraction = drawn << zeros << 1;
    let place = (fraction >> (64 - CUTS)) as usize;
    let between = (fraction >> (32 - CUTS)) & 0xffff_ffff;
    let (low, high) = (LOGARITHMS[place], LOGARITHMS[place + 1]);
    let logarithm = low as u64 + (((high - low) as u64 * between) >> 32);
    (((zeros as u64 + 1) << FRACTION) - logarithm) as u32
}

/// A node's bid for a bucket; the lowest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bid {
    /// From [`cost`].
    pub cost: u32,
    /// At least 1.
    pub weight: u32,
    /// The node's.
    pub seed: u64,
}

impl Bid {
    /// Whether it wins over another: by `cost / weight`, compared exactly.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn beats(self, other: Self) -> bool {
        let mine = self.cost as u64 * other.weight as u64;
        let theirs = other.cost as u64 * self.weight as u64;
        mine < theirs || (mine == theirs && self.seed < other.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What nodes of one version agree on.
    #[test]
    fn the_draws_are_fixed() {
        let costs =
            [(0, 0), (1, 0), (0, 1), (0x1234_5678_9abc_def0, 40_000)].map(|(s, b)| cost(s, b));
        assert_eq!(costs, [12_012_953, 55_008_832, 10_854_552, 29_378_109]);
        let (client, vip) = ([1; 16], [2; 16]);
        assert_eq!(
            [0, 0x1f90_0050].map(|rest| bucket(hash(&client, &vip, rest))),
            [107_708, 117_482]
        );
    }

    #[test]
    fn costs_are_the_logarithms_they_stand_for() {
        extern crate std;
        for bucket in 0..BUCKETS {
            let drawn = absorb(77, u64::from(bucket)) | 1 << 32;
            #[expect(
                clippy::cast_precision_loss,
                reason = "close enough for the comparison"
            )]
            let (expected, got) = (
                64.0 - (drawn as f64).log2(),
                f64::from(cost(77, bucket)) / f64::from(1 << FRACTION),
            );
            assert!((expected - got).abs() < 1e-6, "{bucket}: {expected} {got}");
        }
    }

    #[test]
    fn ports_spread_over_the_buckets() {
        extern crate std;
        let mut seen = std::vec![0_u32; 16];
        for port in 0..64_000_u32 {
            let bucket = bucket(hash(&[7; 16], &[9; 16], port << 16 | 0x50));
            seen[bucket as usize * 16 / BUCKETS as usize] += 1;
        }
        assert!(
            seen.iter().all(|count| (3_700..4_300).contains(count)),
            "{seen:?}"
        );
    }

    /// Also of those flows that are in one bucket, as all are that reach a node.
    #[test]
    fn flows_spread_over_the_slots_of_a_node() {
        extern crate std;
        const SLOTS: u32 = 7;
        let mut seen = std::vec![0_u32; SLOTS as usize];
        for port in 0..64_000_u32 {
            let hash = hash(&[7; 16], &[9; 16], port << 16 | 0x50);
            if bucket(hash) < BUCKETS / 2 {
                seen[slot(hash, SLOTS) as usize] += 1;
            }
        }
        assert!(
            seen.iter().all(|count| (4_270..4_870).contains(count)),
            "{seen:?}"
        );
    }
}
