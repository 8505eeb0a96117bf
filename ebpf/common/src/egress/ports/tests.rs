//! The choice, with a book in memory that keeps the time itself.

extern crate std;

use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

use super::*;

const REST: u32 = 60;

/// One remote address and port.
struct Remote {
    now: u32,
    /// Whose each port is, and when it was closed if it was.
    ports: BTreeMap<u16, (u32, Option<u32>)>,
    services: BTreeSet<u16>,
    crowd: Option<Crowd>,
    returned: BTreeMap<u32, Returned>,
    tries: u32,
    most_tries: u32,
}

/// The same, for a flow of a pod.
struct Flow<'a> {
    remote: &'a mut Remote,
    pod: u32,
}

impl Remote {
    fn new() -> Self {
        Self {
            now: 1000,
            ports: BTreeMap::new(),
            services: BTreeSet::new(),
            crowd: None,
            returned: BTreeMap::new(),
            tries: 0,
            most_tries: 0,
        }
    }

    fn open(&mut self, pod: u32, own: u16) -> Option<u16> {
        let mut address = [0; 16];
        address[12..].copy_from_slice(&pod.to_be_bytes());
        self.tries = 0;
        let seed = seed(&address, own, &[9; 16], 25);
        let port = choose(&mut Flow { remote: self, pod }, own, seed);
        self.most_tries = self.most_tries.max(self.tries);
        port
    }

    fn close(&mut self, port: u16) {
        let now = self.now;
        let entry = self.ports.get_mut(&port).expect("it is in use");
        entry.1 = Some(now);
        if self.crowd.is_some() {
            let pod = entry.0;
            self.returned.entry(pod).or_insert(Returned::NONE).put(port);
        }
    }

    /// Ends the rest of ports, as the keeper does.
    fn keep(&mut self) {
        let now = self.now;
        let crowd = &mut self.crowd;
        self.ports.retain(|port, (_, closed)| {
            let stays = closed.is_none_or(|closed| now - closed < REST);
            if !stays && let Some(crowd) = crowd {
                crowd.used[Crowd::place(*port)] &= !Crowd::bit(*port);
            }
            stays
        });
    }
}

impl Book for Flow<'_> {
    fn take(&mut self, port: u16) -> bool {
        self.remote.tries += 1;
        assert!(port >= FIRST);
        if self.remote.services.contains(&port) {
            return false;
        }
        let now = self.remote.now;
        let free = match self.remote.ports.get(&port) {
            None => true,
            Some((_, None)) => false,
            Some((pod, Some(closed))) => *pod == self.pod || now - closed >= REST,
        };
        if free {
            self.remote.ports.insert(port, (self.pod, None));
            if let Some(crowd) = &mut self.remote.crowd {
                crowd.used[Crowd::place(port)] |= Crowd::bit(port);
            }
        }
        free
    }

    fn gather(&mut self) -> bool {
        self.remote.crowd.get_or_insert(Crowd::new());
        true
    }

    fn free(&mut self, from: u16) -> Option<u16> {
        self.remote.crowd.as_ref()?.free(from)
    }

    fn is_in_use(&mut self, port: u16) {
        let crowd = self.remote.crowd.as_mut().expect("there is one");
        crowd.used[Crowd::place(port)] |= Crowd::bit(port);
    }

    fn returned(&mut self) -> Option<u16> {
        self.remote.returned.get_mut(&self.pod)?.take()
    }
}

/// A small generator, always the same.
struct Dice(u64);

impl Dice {
    fn port(&mut self, from: u16, to: u16) -> u16 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        from + u16::try_from(self.0 % u64::from(to - from)).expect("a port")
    }
}

#[test]
fn the_own_port_is_kept_if_it_is_free() {
    let mut remote = Remote::new();
    assert_eq!(remote.open(1, 40_000), Some(40_000));
    let other = remote.open(2, 40_000).expect("there are many");
    assert_ne!(other, 40_000);
    assert_ne!(remote.open(1, 25), Some(25), "a port below the first");
    remote.services.insert(41_000);
    assert_ne!(remote.open(1, 41_000), Some(41_000), "a Service's");
}

#[test]
fn draws_stay_the_same_and_in_the_range() {
    let seed = seed(&[1; 16], 40_000, &[9; 16], 25);
    let some: Vec<u16> = (0..6).map(|turn| drawn(seed, turn)).collect();
    let again: Vec<u16> = (0..6).map(|turn| drawn(seed, turn)).collect();
    assert_eq!(some, again);
    let mut parts = std::vec![0_u32; 16];
    for turn in 0..64_512 {
        let port = drawn(seed, turn);
        assert!(port >= FIRST);
        parts[usize::from(port - FIRST) * 16 / BUDGET as usize] += 1;
    }
    assert!(
        parts.iter().all(|count| (3_700..4_360).contains(count)),
        "{parts:?}"
    );
}

/// A pod that rests nothing has its ports again at once; another has to wait.
#[test]
fn ports_rest_for_others() {
    let mut remote = Remote::new();
    assert_eq!(remote.open(1, 40_000), Some(40_000));
    remote.close(40_000);
    assert_ne!(remote.open(2, 40_000), Some(40_000));
    assert_eq!(remote.open(1, 40_000), Some(40_000), "its own");
    remote.close(40_000);
    remote.now += REST;
    assert_eq!(remote.open(3, 40_000), Some(40_000), "rested");
}

/// Exactly as many as there are ports, whatever the pods' own are; and each flow in bounded time.
#[test]
fn the_budget_is_used_to_the_last_port() {
    for (low, high, services) in [(1024, 65_535, 0), (32_768, 60_999, 3)] {
        let mut remote = Remote::new();
        remote
            .services
            .extend((0..services).map(|it| 2000 + 20_000 * it));
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        let budget = BUDGET as usize - usize::from(services);
        let (mut opened, mut refused) = (0, 0);
        // The pods choose at random, and often the same ports.
        for flow in 0..70_000_u32 {
            match remote.open(flow % 4, dice.port(low, high)) {
                Some(_) => opened += 1,
                None => refused += 1,
            }
            // Nothing is refused before everything is in use.
            assert!(refused == 0 || opened == budget, "{opened} of {budget}");
        }
        assert_eq!((opened, remote.ports.len()), (budget, budget));
        assert_eq!(refused, 70_000 - budget);
        let bound = 1 + DRAWN + LOOKED_UP + RETURNED + DRAWN_LAST;
        assert!(remote.most_tries <= bound, "{} tries", remote.most_tries);
    }
}

/// Whatever was opened and closed before: nobody is refused while a port is free, and nobody is given another's.
#[test]
fn nobody_is_refused_while_a_port_is_free() {
    for seed in 1..=6 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let mut remote = Remote::new();
        let mut open: Vec<u16> = Vec::new();
        // Filled to a different height each time, then opened and closed at random.
        let height = 40_000 + usize::try_from(seed).expect("few") * 4_000;
        for turn in 0..150_000_u32 {
            if turn % 1_000 == 0 {
                remote.now += 3;
                remote.keep();
            }
            let closes = open.len() > height || dice.port(0, 4) == 0;
            if closes && !open.is_empty() {
                let place = usize::from(dice.port(0, u16::MAX)) % open.len();
                remote.close(open.swap_remove(place));
                continue;
            }
            let pod = u32::from(dice.port(0, 9));
            let own = dice.port(1, u16::MAX);
            let free = remote.ports.len() < BUDGET as usize;
            let owned = remote.ports.get(&own).copied();
            let got = remote.open(pod, own);
            assert!(got.is_some() || !free, "seed {seed}, turn {turn}");
            if own >= FIRST && owned.is_none() {
                assert_eq!(got, Some(own));
            }
            if let Some(port) = got {
                open.push(port);
            }
        }
        let distinct: BTreeSet<u16> = open.iter().copied().collect();
        assert_eq!(distinct.len(), open.len(), "given twice");
    }
}

/// One port is given back, and whoever comes after its rest has it.
#[test]
fn the_last_port_is_found() {
    let mut remote = Remote::new();
    let mut dice = Dice(7);
    while remote.open(1, dice.port(1024, 65_535)).is_some() {}
    assert_eq!(remote.ports.len(), BUDGET as usize);
    remote.close(5_555);
    assert_eq!(remote.open(2, 40_000), None, "it rests");
    assert_eq!(remote.open(1, 40_000), Some(5_555), "the pod's own");
    remote.close(5_555);
    remote.now += REST;
    remote.keep();
    assert_eq!(remote.open(2, 40_000), Some(5_555), "rested");
}

/// Four pods, 2 000 short connections a second to one remote for two minutes: many more than there are ports. Each comes
/// back to its own.
#[test]
fn pods_come_back_to_their_own_ports() {
    const LIFE: usize = 100;
    let mut remote = Remote::new();
    let mut next = [32_768_u16, 40_000, 45_000, 50_000];
    let mut open = std::collections::VecDeque::new();
    let (mut opened, mut failed) = (0, 0);
    for second in 0..120_u32 {
        remote.now = 1000 + second;
        remote.keep();
        for flow in 0..2_000_u32 {
            let pod = flow % 4;
            let own = &mut next[pod as usize];
            *own = if *own == 60_999 { 32_768 } else { *own + 1 };
            match remote.open(pod, *own) {
                Some(port) => {
                    opened += 1;
                    open.push_back(port);
                }
                None => failed += 1,
            }
            if open.len() > LIFE
                && let Some(port) = open.pop_front()
            {
                remote.close(port);
            }
        }
    }
    std::println!("{opened} opened, {failed} failed");
    assert_eq!(failed, 0);
}

/// Pods that are all new have no ports of their own: the budget in a minute, 1 075 a second, and no more.
#[test]
fn new_pods_have_the_budget_in_a_rest() {
    let mut remote = Remote::new();
    let mut dice = Dice(11);
    let (mut pod, mut opened) = (0, 0_u32);
    for second in 0..180_u32 {
        remote.now = 1000 + second;
        remote.keep();
        for _ in 0..2_000 {
            pod += 1;
            if let Some(port) = remote.open(pod, dice.port(32_768, 60_999)) {
                opened += 1;
                remote.close(port);
            }
        }
    }
    std::println!("{} a second", opened / 180);
    assert_eq!(opened, 3 * BUDGET);
}

#[test]
fn a_crowd_finds_its_free_ports() {
    let mut crowd = Crowd::new();
    assert_eq!(crowd.free(0), Some(FIRST));
    assert_eq!(crowd.free(40_000), Some(40_000 / 64 * 64));
    crowd.used = [u64::MAX; WORDS];
    assert_eq!(crowd.free(1), None);
    for port in [1024, 1087, 40_001, 65_535] {
        crowd.used[Crowd::place(port)] &= !Crowd::bit(port);
        for from in [1024, 39_000, 40_002, 65_535] {
            assert_eq!(crowd.free(from), Some(port), "from {from}");
        }
        crowd.used[Crowd::place(port)] |= Crowd::bit(port);
    }
}

#[test]
fn the_last_ports_come_back_last_first() {
    let mut returned = Returned::NONE;
    assert_eq!(returned.take(), None);
    for port in 1..=100 {
        returned.put(port);
    }
    let taken: Vec<u16> = core::iter::from_fn(|| returned.take()).collect();
    let expected: Vec<u16> = (37..=100).rev().collect();
    assert_eq!(taken, expected);
}
