//! So much of the wire and no more: of a policy, in each direction. At the slowest rate a packet takes more than a
//! second; pauses are made in the map.

use aya::maps::Array;
use landfall_core::model::Bandwidth;
use landfall_ebpf_common::egress::gateway::map;
use landfall_ebpf_common::egress::pace::moment;

use super::*;

/// What every packet here is long, with its IP header.
const LENGTH: usize = 1200;
/// Eight bits of so many packets.
const fn bits(packets: u64) -> u64 {
    packets * LENGTH as u64 * 8
}

/// So many packets at once.
fn slow(packets: u64) -> Bandwidth {
    Bandwidth {
        rate: 8_000,
        burst: Some(bits(packets)),
    }
}

fn mk_limited(mail: Option<Bandwidth>, shop: Option<Bandwidth>) -> Egress {
    let mut egress = mk_egress();
    for (name, bandwidth) in [("mail", mail), ("shop", shop)] {
        egress
            .policies
            .get_mut(name)
            .expect("it is there")
            .bandwidth = bandwidth;
    }
    egress
}

/// A segment of a flow, as long as all are.
fn mk_data(mac: [u8; 6], from: (IpAddr, u16), to: (IpAddr, u16)) -> Vec<u8> {
    let mut segment = mk_tcp(from.1, to.1, ACK);
    let header = if from.0.is_ipv4() { 20 } else { 40 };
    segment.resize(LENGTH - header, 7);
    mk(mac, from.0, to.0, 6, 64, &segment)
}

/// A flow of a pod: what it sends, and what comes back.
struct Talk {
    local: bool,
    out: Vec<u8>,
    back: Vec<u8>,
}

impl Gate {
    /// One begins, of the other node's pod or of this one's, while nothing is limited.
    fn talk(&mut self, world: World, pod: IpAddr) -> Talk {
        let local = pod == world.local;
        let mac = if local { OWN } else { OTHER };
        let syn = mk(mac, pod, world.remote, 6, 64, &mk_tcp(7000, 443, SYN));
        let (action, out) = if local {
            self.leaves(&syn)
        } else {
            self.comes(&syn)
        };
        assert_eq!(action, if local { NEXT } else { SENT });
        Talk {
            local,
            out: mk_data(mac, (pod, 7000), (world.remote, 443)),
            back: mk_data(STRANGER, (world.remote, 443), (source(&out), ports(&out).0)),
        }
    }

    /// Whether the pod's packet goes out.
    fn goes(&mut self, talk: &Talk) -> bool {
        let (action, _) = if talk.local {
            self.leaves(&talk.out)
        } else {
            self.comes(&talk.out)
        };
        if action == DROPPED {
            return false;
        }
        assert_eq!(action, if talk.local { NEXT } else { SENT });
        true
    }

    /// Whether the remote's comes back.
    fn returns(&mut self, talk: &Talk) -> bool {
        let (action, _) = self.comes(&talk.back);
        if action == DROPPED {
            return false;
        }
        assert_eq!(action, if talk.local { NEXT } else { SENT });
        true
    }

    /// How many of so many go out, and how many come back.
    fn let_through(&mut self, talk: &Talk, count: usize) -> (usize, usize) {
        let out = (0..count).filter(|_| self.goes(talk)).count();
        let back = (0..count).filter(|_| self.returns(talk)).count();
        (out, back)
    }

    /// As if nobody had sent anything for so long.
    fn pause(&mut self, milliseconds: u64) {
        let paced = self.ebpf.map_mut(map::PACED).expect("the object holds it");
        let mut paced: Array<_, u64> = Array::try_from(paced).expect("it is of this type");
        for place in 0..paced.len() {
            let until = paced.get(&place, 0).expect("it is there");
            if until != 0 {
                let before = until.wrapping_sub(moment(milliseconds * 1_000_000));
                paced.set(place, before, 0).expect("it is there");
            }
        }
    }

    fn over(&self) -> (u64, u64) {
        let of = |policy| self.maps.usage()[policy].count.bandwidth;
        assert_eq!(of("mail") + of("shop"), self.count(Reason::Bandwidth));
        (of("mail"), of("shop"))
    }
}

#[test]
fn the_burst_passes_and_then_the_rate() {
    for world in WORLDS {
        let mut gate = Gate::load();
        for pod in [world.pod, world.local] {
            let talk = gate.talk(world, pod);
            let before = gate.over().0;
            gate.set(&mk_limited(Some(slow(3)), None));
            assert_eq!(gate.let_through(&talk, 5), (3, 3));
            assert_eq!(gate.over(), (before + 4, 0));
            // A packet takes 1.2 s.
            gate.pause(1_200);
            assert_eq!(gate.let_through(&talk, 5), (1, 1));
            gate.pause(2_400);
            assert_eq!(gate.let_through(&talk, 5), (2, 2));
            gate.pause(3_600_000);
            assert_eq!(gate.let_through(&talk, 5), (3, 3));
            // Without a limit it never was ahead.
            gate.set(&mk_egress());
            assert_eq!(gate.let_through(&talk, 50), (50, 50));
            gate.pause(3_600_000);
        }
    }
}

#[test]
fn a_direction_takes_nothing_from_the_other() {
    let mut gate = Gate::load();
    let talk = gate.talk(WORLDS[0], WORLDS[0].pod);
    gate.set(&mk_limited(Some(slow(4)), None));
    let out = (0..9).filter(|_| gate.goes(&talk)).count();
    assert_eq!(out, 4);
    let back = (0..9).filter(|_| gate.returns(&talk)).count();
    assert_eq!(back, 4);
}

#[test]
fn policies_take_nothing_from_each_other() {
    let mut gate = Gate::load();
    let world = WORLDS[0];
    let mail = gate.talk(world, world.pod);
    let shop = gate.talk(world, world.stranger);
    gate.set(&mk_limited(Some(slow(2)), Some(slow(5))));
    assert_eq!(gate.let_through(&mail, 6), (2, 2));
    assert_eq!(gate.let_through(&shop, 6), (5, 5));
    assert_eq!(gate.over(), (8, 2));
    gate.set(&mk_limited(Some(slow(2)), None));
    assert_eq!(gate.let_through(&mail, 6), (0, 0));
    assert_eq!(gate.let_through(&shop, 60), (60, 60));
}

/// Pods of either family, of this node and of others.
#[test]
fn all_pods_of_a_policy_share() {
    let mut gate = Gate::load();
    let mut talks = Vec::new();
    for world in WORLDS {
        for pod in [world.pod, world.friend, world.local] {
            talks.push(gate.talk(world, pod));
        }
    }
    gate.set(&mk_limited(Some(slow(4)), None));
    let turns = talks
        .iter()
        .map(|talk| gate.let_through(talk, 1))
        .collect::<Vec<_>>();
    assert_eq!(
        turns,
        [(1, 1), (1, 1), (1, 1), (1, 1), (0, 0), (0, 0)],
        "in turn"
    );
}

/// What the kernel has put together is as long as its parts are on the wire, and goes if the first of them does.
#[test]
fn what_was_put_together_is_owed() {
    for world in WORLDS {
        let mut gate = Gate::load();
        let talk = gate.talk(world, world.pod);
        gate.set(&mk_limited(Some(slow(1)), None));
        let headers = if world.pod.is_ipv4() { 40 } else { 60 };
        let size = 40_u32;
        let parts = (LENGTH - headers).div_ceil(size as usize);
        // Fields of `struct __sk_buff`: how many parts, and how long each is.
        let mut context = vec![0; 192];
        context[164..168].copy_from_slice(&u32::try_from(parts).expect("few").to_ne_bytes());
        context[176..180].copy_from_slice(&size.to_ne_bytes());
        let (action, _, _) = gate.run_in(GATEWAY_INGRESS, &talk.out, &context);
        assert_eq!(action, SENT);
        // Every part has its headers, and at this rate a byte takes a millisecond.
        let long = u64::try_from(LENGTH + (parts - 1) * headers).expect("a few thousand");
        gate.pause(long - 1_000);
        assert_eq!(gate.let_through(&talk, 2).0, 0);
        gate.pause(1_000);
        assert_eq!(gate.let_through(&talk, 2).0, 1);
    }
}

#[test]
fn another_rate_is_in_force_at_once_and_ends_no_flow() {
    let mut gate = Gate::load();
    let talk = gate.talk(WORLDS[0], WORLDS[0].pod);
    gate.set(&mk_limited(Some(slow(1)), None));
    assert_eq!(gate.let_through(&talk, 3), (1, 1));
    let fast = Bandwidth {
        rate: 10_000_000_000,
        burst: None,
    };
    gate.set(&mk_limited(Some(fast), None));
    assert_eq!(gate.let_through(&talk, 50), (50, 50));
    gate.set(&mk_limited(Some(slow(2)), None));
    assert_eq!(gate.let_through(&talk, 50), (2, 2));
    assert_eq!((gate.count(Reason::Bound), gate.used("mail")), (1, 1));
}
