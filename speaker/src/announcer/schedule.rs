//! When to announce which VIP: pure, time is an argument.
//!
//! A VIP is announced at once, then five times 1.1 s apart (RFC 9131 wants gaps above the one second in which
//! Linux ignores a second gratuitous ARP, `locktime`), then at a slow, jittered pace for as long as it is held.
//!
//! ```text
//!  start ──> [first] ─┐
//!                     ├─ tokens ──> send ──> [later, a heap by due time] ──> [again] ─┐
//!            [again] ─┘                                                              │
//!               ^────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A VIP stands in one queue at most, once, and the queues are first come, first served: that is the fairness.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use rand::Rng;

/// The gap between the first repeats.
const REPEAT_GAP: Duration = Duration::from_millis(1100);
/// How many repeats come at that gap.
const REPEATS: u32 = 5;
/// The refresh comes after this part of the period up to the whole of it.
const JITTER: std::ops::RangeInclusive<f64> = 0.8..=1.0;

/// How fast to announce.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pace {
    /// The period of the slow refresh.
    pub(super) refresh: Duration,
    /// Frames a second.
    pub(super) rate: u32,
    /// Frames at once.
    pub(super) burst: u32,
}

/// An announcement to send now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) vip: IpAddr,
    /// It waited for the rate limit.
    pub(super) delayed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Tells what the queues hold of it now from what they hold of an earlier start.
    generation: u64,
    /// How often it was announced since its start.
    sent: u32,
}

/// A place in a queue: the VIP, the generation of its start, and when it was due.
type Place = (IpAddr, u64, Duration);

/// Paces the announcements of all VIPs of this node.
#[derive(Debug)]
pub(super) struct Schedule {
    pace: Pace,
    entries: HashMap<IpAddr, Entry>,
    generation: u64,
    first: VecDeque<Place>,
    again: VecDeque<Place>,
    later: BinaryHeap<Reverse<(Duration, u64, IpAddr)>>,
    tokens: f64,
    filled: Duration,
}

impl Schedule {
    pub(super) fn new(pace: Pace, now: Duration) -> Self {
        let pace = Pace {
            rate: pace.rate.max(1),
            burst: pace.burst.max(2), // one announcement must fit
            ..pace
        };
        Self {
            pace,
            entries: HashMap::new(),
            generation: 0,
            first: VecDeque::new(),
            again: VecDeque::new(),
            later: BinaryHeap::new(),
            tokens: f64::from(pace.burst),
            filled: now,
        }
    }

    /// Begins anew with a VIP: its next announcement goes ahead of all repeats.
    pub(super) fn start(&mut self, vip: IpAddr, now: Duration) {
        if self.entries.get(&vip).is_some_and(|entry| entry.sent == 0) {
            return; // it already stands in `first`
        }
        self.generation += 1;
        let generation = self.generation;
        self.entries.insert(
            vip,
            Entry {
                generation,
                sent: 0,
            },
        );
        self.first.push_back((vip, generation, now));
        self.shed();
    }

    /// Stops with a VIP.
    pub(super) fn stop(&mut self, vip: IpAddr) {
        self.entries.remove(&vip);
        self.shed();
    }

    /// The next announcement that may be sent now. Call until it yields nothing.
    pub(super) fn poll(&mut self, now: Duration, rng: &mut impl Rng) -> Option<Due> {
        while let Some(&Reverse((due, generation, vip))) = self.later.peek()
            && due <= now
        {
            self.later.pop();
            self.again.push_back((vip, generation, due));
        }
        self.fill(now);
        let (vip, _, since) = self.front()?;
        let cost = cost(vip);
        if self.tokens < cost {
            return None;
        }
        self.tokens -= cost;
        if self.first.pop_front().is_none() {
            self.again.pop_front();
        }
        let entry = self
            .entries
            .get_mut(&vip)
            .expect("front() yields places of live entries");
        entry.sent += 1;
        let pause = if entry.sent <= REPEATS {
            REPEAT_GAP
        } else {
            self.pace.refresh.mul_f64(rng.random_range(JITTER))
        };
        self.later
            .push(Reverse((now + pause, entry.generation, vip)));
        Some(Due {
            vip,
            delayed: now.saturating_sub(since) > Duration::from_millis(20),
        })
    }

    /// When to poll again.
    pub(super) fn wake(&mut self, now: Duration) -> Option<Duration> {
        if let Some((vip, ..)) = self.front() {
            let missing = cost(vip) - self.tokens;
            let wait = (missing / f64::from(self.pace.rate)).max(0.0);
            // A millisecond at least: the rate is kept by bursts of a few frames, not by a timer a frame.
            return Some(now + Duration::from_secs_f64(wait).max(Duration::from_millis(1)));
        }
        self.later.peek().map(|Reverse((due, ..))| *due)
    }

    /// The place to serve next. Drops the places of VIPs that stopped or began anew.
    fn front(&mut self) -> Option<Place> {
        for queue in [&mut self.first, &mut self.again] {
            while let Some(&place) = queue.front() {
                if self
                    .entries
                    .get(&place.0)
                    .is_some_and(|entry| entry.generation == place.1)
                {
                    return Some(place);
                }
                queue.pop_front();
            }
        }
        None
    }

    fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.filled).as_secs_f64();
        self.tokens =
            (self.tokens + elapsed * f64::from(self.pace.rate)).min(f64::from(self.pace.burst));
        self.filled = now;
    }

    /// Removes dead places once they are the most of what the heap and the queues hold.
    fn shed(&mut self) {
        let held = self.later.len() + self.first.len() + self.again.len();
        if held <= 64 + 2 * self.entries.len() {
            return;
        }
        let entries = &self.entries;
        let live = |vip: &IpAddr, generation: u64| {
            entries
                .get(vip)
                .is_some_and(|entry| entry.generation == generation)
        };
        self.later
            .retain(|Reverse((_, generation, vip))| live(vip, *generation));
        self.first
            .retain(|(vip, generation, _)| live(vip, *generation));
        self.again
            .retain(|(vip, generation, _)| live(vip, *generation));
    }
}

/// How many frames an announcement of this address is: ARP request and reply, or one advertisement.
fn cost(vip: IpAddr) -> f64 {
    match vip {
        IpAddr::V4(_) => 2.0,
        IpAddr::V6(_) => 1.0,
    }
}

#[cfg(test)]
mod tests;
