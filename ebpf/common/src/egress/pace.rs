//! How fast a policy's packets may be, in each direction: the generic cell rate algorithm (ITU-T I.371, virtual
//! scheduling).
//!
//! A direction is one word: the moment at which all that went would be through, had it gone at the rate. It may lie
//! ahead of now by the burst. Moments are fractions of nanoseconds, and wrap after two years.

/// How long a moment is: so many of them are a nanosecond, as a power of two.
const FINE: u32 = 8;
/// The time of a byte is finer yet, by so much.
const FINER: u32 = 14;
/// The longest packet that the kernel puts together, in bytes (BIG TCP).
const LONGEST: u64 = 1 << 19;

/// `EgressPolicy.spec.bandwidth`. All zero: no limit.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// How long a byte takes at the rate.
    pub byte: u64,
    /// How far ahead may be what goes, in moments.
    pub burst: u64,
}

/// A moment of the monotonic clock.
pub const fn moment(nanoseconds: u64) -> u64 {
    nanoseconds << FINE
}

impl Pace {
    /// So many bits a second, and so many at once.
    #[cfg(feature = "user")]
    #[allow(clippy::cast_possible_truncation)] // Half of all moments at most.
    pub const fn new(rate: u64, burst: u64) -> Self {
        let rate = if rate == 0 { 1 } else { rate };
        let burst = ((burst as u128 * 1_000_000_000) << FINE) / rate as u128;
        let most = 1 << 62;
        Self {
            byte: (8_000_000_000 << (FINE + FINER)) / rate,
            burst: if burst > most { most } else { burst } as u64,
        }
    }

    /// Whether there is a limit.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    pub const fn is_limited(&self) -> bool {
        self.byte != 0
    }

    /// For how long so many bytes take the wire at the rate.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn time(&self, bytes: u64) -> u64 {
        bytes.wrapping_mul(self.byte) >> FINER
    }

    /// What the word of a direction becomes if a packet goes now, nothing if it does not. Of one that the kernel has
    /// put together the first part has to be within the burst; the rest is owed, as is of a packet that is longer than
    /// the burst.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn pass(&self, until: u64, now: u64, first: u64, all: u64) -> Option<u64> {
        let ahead = until.wrapping_sub(now);
        // Further ahead than anything can be: it is over, or of another rate.
        let ahead = if ahead > self.burst + self.time(LONGEST) {
            0
        } else {
            ahead
        };
        let first = self.time(first);
        let first = if first < self.burst {
            first
        } else {
            self.burst
        };
        if ahead + first > self.burst {
            return None;
        }
        Some(now.wrapping_add(ahead + self.time(all)))
    }
}

#[cfg(all(test, feature = "user"))]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// How many of so many packets pass that come so many nanoseconds apart.
    fn passed(pace: Pace, until: &mut u64, from: u64, count: u64, apart: u64, bytes: u64) -> u64 {
        let mut passed = 0;
        for number in 0..count {
            let now = moment(from + number * apart);
            if let Some(next) = pace.pass(*until, now, bytes, bytes) {
                *until = next;
                passed += 1;
            }
        }
        passed
    }

    #[test]
    fn the_burst_goes_at_once_and_the_rest_at_the_rate() {
        // 100 packets of 1 500 bytes, and 1 000 of them a second.
        let pace = Pace::new(12_000_000, 1_200_000);
        let mut until = 0;
        assert_eq!(passed(pace, &mut until, SECOND, 200, 0, 1500), 100);
        // A second of ten times as many as there is room for.
        let after = passed(pace, &mut until, SECOND, 10_000, SECOND / 10_000, 1500);
        assert!((999..=1001).contains(&after), "{after}");
        // A pause of half a burst, and a long one.
        let later = 2 * SECOND + SECOND / 20;
        let after = passed(pace, &mut until, later, 200, 0, 1500);
        assert!((50..=51).contains(&after), "{after}");
        assert_eq!(passed(pace, &mut until, 900 * SECOND, 200, 0, 1500), 100);
    }

    #[test]
    fn the_slowest_and_the_fastest_are_what_they_say() {
        for (rate, bytes) in [(8_000, 1_000), (10_000_000_000_000, 1_250_000)] {
            let pace = Pace::new(rate, 12_000);
            let took = u128::from(pace.time(bytes));
            let expected = u128::from(bytes * 8) * u128::from(moment(SECOND)) / u128::from(rate);
            assert!(took.abs_diff(expected) * 1_000 < expected, "{rate}: {took}");
        }
        // 8 kbit/s: a packet of 1 500 bytes each 1.5 s.
        let pace = Pace::new(8_000, 12_000);
        let mut until = 0;
        assert_eq!(passed(pace, &mut until, SECOND, 15, SECOND / 10, 1500), 1);
        assert_eq!(passed(pace, &mut until, SECOND * 5 / 2, 1, 0, 1500), 1);
        // As much at once as can be said.
        assert_eq!(Pace::new(8_000, 10_000_000_000_000).burst, 1 << 62);
    }

    #[test]
    fn what_is_longer_than_the_burst_is_owed() {
        let pace = Pace::new(8_000_000, 12_000);
        // 64 KB in 45 parts: 64 ms of the rate.
        let until = pace.pass(0, moment(SECOND), 1500, 64_000).expect("it fits");
        assert_eq!(until, moment(SECOND + 64_000_000));
        // No other, before there is room for its first part.
        let at = |milliseconds: u64| moment(SECOND + milliseconds * 1_000_000);
        assert_eq!(pace.pass(until, at(63), 1500, 64_000), None);
        assert!(pace.pass(until, at(64), 1500, 64_000).is_some());
        // A frame that is longer than the burst.
        assert!(pace.pass(0, at(0), 9000, 9000).is_some());
        assert_eq!(pace.pass(until, at(63), 9000, 9000), None);
    }

    #[test]
    fn another_rate_is_in_force_at_once() {
        let slow = Pace::new(8_000, 12_000);
        let until = slow.pass(0, moment(SECOND), 1500, 64_000).expect("it fits");
        assert_eq!(slow.pass(until, moment(2 * SECOND), 1500, 1500), None);
        let fast = Pace::new(100_000_000, 10_000_000);
        assert!(fast.pass(until, moment(2 * SECOND), 1500, 1500).is_some());
    }

    #[test]
    fn moments_wrap() {
        let pace = Pace::new(8_000_000, 24_000);
        let now = u64::MAX - pace.time(700);
        let until = pace
            .pass(now.wrapping_sub(5), now, 1500, 1500)
            .expect("it fits");
        assert!(until < now);
        let next = pace.pass(until, now, 1500, 1500).expect("it fits");
        assert_eq!(pace.pass(next, now, 1500, 1500), None);
    }
}
