//! Probing before a first announcement (RFC 5227 section 2.1, RFC 4862 section 5.4): pure, time is an argument.
//!
//! Quicker than a host's, since a host has its address for long and a VIP's clients wait: three probes 80 ms
//! apart, and an answer may come until 250 ms after the first.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use super::MacAddr;

const PROBES: u32 = 3;
const GAP: Duration = Duration::from_millis(80);
const LAST_WAIT: Duration = Duration::from_millis(90);
/// How long to wait for a link to come up before the next try.
const LINK_WAIT: Duration = Duration::from_millis(250);
const AGAIN: Duration = Duration::from_secs(30);

/// What is to be done for a VIP now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Send a probe.
    Probe(IpAddr),
    /// Nobody answered: it is no longer probed.
    Free(IpAddr),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    generation: u64,
    sent: u32,
    taken: Option<MacAddr>,
}

/// The VIPs being probed, and those found taken.
#[derive(Debug, Default)]
pub(super) struct Probes {
    entries: HashMap<IpAddr, Entry>,
    generation: u64,
    times: BinaryHeap<Reverse<(Duration, u64, IpAddr)>>,
}

impl Probes {
    /// Begins to probe; one already being probed goes on.
    pub(super) fn start(&mut self, vip: IpAddr, now: Duration) {
        if !self.entries.contains_key(&vip) {
            self.set(vip, None, now);
        }
    }

    /// Stops with a VIP.
    pub(super) fn stop(&mut self, vip: IpAddr) {
        self.entries.remove(&vip);
    }

    /// Whether it is being probed or was found taken.
    pub(super) fn contains(&self, vip: IpAddr) -> bool {
        self.entries.contains_key(&vip)
    }

    /// Somebody claims a VIP. True if that is news.
    pub(super) fn claimed(&mut self, vip: IpAddr, by: MacAddr, now: Duration) -> bool {
        let Some(&entry) = self.entries.get(&vip) else {
            return false;
        };
        if entry.sent > 0 {
            self.set(vip, Some(by), now + AGAIN);
        }
        entry.sent > 0 && entry.taken != Some(by)
    }

    /// A probe could not be sent: begins anew a little later.
    pub(super) fn put_off(&mut self, vip: IpAddr, now: Duration) {
        if let Some(entry) = self.entries.get(&vip) {
            self.set(vip, entry.taken, now + LINK_WAIT);
        }
    }

    /// The next step due. Call until it yields nothing.
    pub(super) fn poll(&mut self, now: Duration) -> Option<Step> {
        while let Some(&Reverse((due, generation, vip))) = self.times.peek()
            && due <= now
        {
            self.times.pop();
            let Some(entry) = self.entries.get_mut(&vip) else {
                continue;
            };
            if entry.generation != generation {
                continue;
            }
            if entry.sent == PROBES {
                self.entries.remove(&vip);
                return Some(Step::Free(vip));
            }
            entry.sent += 1;
            let wait = if entry.sent < PROBES { GAP } else { LAST_WAIT };
            self.times.push(Reverse((now + wait, generation, vip)));
            return Some(Step::Probe(vip));
        }
        None
    }

    /// When to poll again.
    pub(super) fn wake(&self) -> Option<Duration> {
        self.times.peek().map(|Reverse((due, ..))| *due)
    }

    fn set(&mut self, vip: IpAddr, taken: Option<MacAddr>, due: Duration) {
        self.generation += 1;
        self.entries.insert(
            vip,
            Entry {
                generation: self.generation,
                sent: 0,
                taken,
            },
        );
        self.times.push(Reverse((due, self.generation, vip)));
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 88, 0, 200));
    const OTHER: MacAddr = MacAddr([2, 0, 0, 0, 0, 7]);

    fn run(probes: &mut Probes, until: Duration) -> Vec<(u128, Step)> {
        let mut steps = Vec::new();
        while let Some(at) = probes.wake().filter(|at| *at <= until) {
            while let Some(step) = probes.poll(at) {
                steps.push((at.as_millis(), step));
            }
        }
        steps
    }

    #[test]
    fn three_probes_then_free() {
        let mut probes = Probes::default();
        probes.start(VIP, Duration::ZERO);
        assert_eq!(
            run(&mut probes, Duration::from_secs(100)),
            [
                (0, Step::Probe(VIP)),
                (80, Step::Probe(VIP)),
                (160, Step::Probe(VIP)),
                (250, Step::Free(VIP)),
            ]
        );
        assert!(!probes.contains(VIP));
    }

    #[test]
    fn an_answer_silences_for_half_a_minute() {
        let mut probes = Probes::default();
        probes.start(VIP, Duration::ZERO);
        run(&mut probes, Duration::from_millis(100));
        let now = Duration::from_millis(100);
        assert!(probes.claimed(VIP, OTHER, now));
        assert!(!probes.claimed(VIP, OTHER, now), "told once");
        let steps = run(&mut probes, Duration::from_secs(60));
        assert_eq!(steps[0], (30_100, Step::Probe(VIP)));
        assert_eq!(steps[3], (30_350, Step::Free(VIP)));
    }

    #[test]
    fn a_withdrawn_address_is_not_probed() {
        let mut probes = Probes::default();
        probes.start(VIP, Duration::ZERO);
        probes.stop(VIP);
        assert_eq!(run(&mut probes, Duration::from_secs(60)), []);
    }
}
