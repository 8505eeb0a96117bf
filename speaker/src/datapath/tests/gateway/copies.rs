//! Bindings of another gateway: what of them is here, and how it counts.

use std::collections::HashSet;
use std::thread::sleep;
use std::time::Duration;

use landfall_core::replication::Binding;
use landfall_ebpf_common::egress::binding::Times;

use super::super::super::egress::Licence;
use super::life::{SHORT, forever, wait};
use super::*;

/// A connection to the remote's port 443.
pub(super) fn binding(world: World, pod: IpAddr, own: u16, port: u16) -> Binding {
    Binding {
        protocol: 6,
        pod: (pod, own).into(),
        egress: (world.egress, port).into(),
        remote: (world.remote, 443).into(),
    }
}

/// The same as its gateway would have it: with the pod's own port.
fn own(world: World, pod: IpAddr, ports: std::ops::Range<u16>) -> Vec<Binding> {
    ports.map(|port| binding(world, pod, port, port)).collect()
}

/// With the gateway of the policy at another node.
pub(super) fn elsewhere(mut egress: Egress) -> Egress {
    egress.policies.insert("mail".into(), {
        let here = &egress.policies["mail"];
        Policy {
            gateway: mk_policy("other").gateway,
            ..here.clone()
        }
    });
    egress
}

impl Gate {
    /// One that would take over the egress addresses of the policy.
    pub(super) fn standby(egress: Egress, times: Times) -> Self {
        let mut gate = Self::with(&Egress::default(), times, 0);
        gate.stands_by(egress);
        gate
    }

    /// Another node is the gateway.
    pub(super) fn stands_by(&mut self, egress: Egress) {
        self.stand(&WORLDS.map(|world| (world.egress, Standing::StandsBy)));
        self.set(&elsewhere(egress));
    }

    /// This node is, since a moment ago.
    pub(super) fn leads(&mut self, egress: &Egress, licence: Licence) {
        let since = std::time::Instant::now();
        let leads = Standing::Leads { since, licence };
        self.stand(&WORLDS.map(|world| (world.egress, leads)));
        self.set(egress);
    }

    /// All bindings of an address, as replication reads them.
    pub(super) fn held(&self, address: IpAddr) -> BTreeSet<Binding> {
        let addresses = BTreeSet::from([address]);
        let (mut held, mut from) = (BTreeSet::new(), None);
        loop {
            let chunk = self.copies.held(&addresses, from);
            assert!(chunk.bindings.len() <= crate::replication::CHUNK);
            held.extend(chunk.bindings);
            from = chunk.next;
            if from.is_none() {
                return held;
            }
        }
    }
}

fn set(bindings: &[Binding]) -> BTreeSet<Binding> {
    bindings.iter().copied().collect()
}

#[test]
fn copies_are_there_and_counted_until_they_are_not() {
    let mut gate = Gate::standby(mk_egress(), forever());
    let [four, six] = WORLDS;
    for world in WORLDS {
        let mut copies = own(world, world.pod, 30_000..31_500);
        copies.extend(own(world, world.local, 40_000..40_100));
        copies.push(Binding {
            protocol: 17,
            ..binding(world, world.pod, 1, 2)
        });
        gate.copies.insert(copies.clone());
        assert_eq!(gate.copies.aside(), 0);
        assert_eq!(gate.used("mail"), 1_601);
        assert_eq!(gate.held(world.egress), set(&copies));
        // Said twice, it is the same.
        gate.copies.insert(copies.clone());
        assert_eq!(
            (gate.used("mail"), gate.held(world.egress).len()),
            (1_601, 1_601)
        );
        // No packet goes by them here.
        let frame = mk_tcp(30_000, 443, ACK);
        gate.passes(&mk(OTHER, world.pod, world.remote, 6, 64, &frame));
        let (gone, left) = copies.split_at(1_000);
        gate.copies.remove(gone.to_vec());
        gate.copies.remove(gone.to_vec());
        assert_eq!(gate.held(world.egress), set(left));
        assert_eq!(gate.used("mail"), 601);
        // One that is as good as another is not meant.
        let other = binding(
            world,
            world.friend,
            left[0].pod.port(),
            left[0].egress.port(),
        );
        gate.copies.remove(vec![other]);
        assert_eq!(gate.used("mail"), 601);
        // Other addresses are not concerned.
        let nobody = HashSet::new();
        gate.copies.keep(&BTreeSet::from([world.second]), &nobody);
        assert_eq!(gate.used("mail"), 601);
        let kept: HashSet<Binding> = left[..10].iter().copied().collect();
        gate.copies.keep(&BTreeSet::from([world.egress]), &kept);
        assert_eq!(gate.held(world.egress), set(&left[..10]));
        assert_eq!(gate.used("mail"), 10);
        let both = BTreeSet::from([four.egress, six.egress]);
        gate.copies.keep(&both, &nobody);
        assert_eq!(gate.used("mail"), 0);
    }
    assert_eq!(gate.count(Reason::Copied), 2 * 1_601);
    assert_eq!(gate.count(Reason::Cut), 0);
}

#[test]
fn flows_go_on_by_their_copies() {
    for world in WORLDS {
        let mut gate = Gate::standby(mk_egress(), forever());
        gate.copies.insert(vec![
            binding(world, world.pod, 30_000, 30_000),
            binding(world, world.pod, 30_001, 50_000),
            binding(world, world.local, 30_002, 50_002),
        ]);
        gate.leads(&mk_egress(), Licence::Full);
        for (port, by) in [(30_000, 30_000), (30_001, 50_000)] {
            let frame = segment(world, world.pod, port, ACK);
            let (action, out) = gate.comes(&frame);
            assert_eq!(
                (action, source(&out), ports(&out).0),
                (SENT, world.egress, by)
            );
            assert!(is_right(&out));
            let frame = mk_tcp(443, by, ACK);
            let frame = mk(STRANGER, world.remote, world.egress, 6, 64, &frame);
            let (action, out) = gate.comes(&frame);
            assert_eq!(
                (action, destination(&out), ports(&out).1),
                (SENT, world.pod, port)
            );
        }
        let frame = mk(
            OWN,
            world.local,
            world.remote,
            6,
            64,
            &mk_tcp(30_002, 443, ACK),
        );
        let (action, out) = gate.leaves(&frame);
        assert_eq!(
            (action, source(&out), ports(&out).0),
            (NEXT, world.egress, 50_002)
        );
        // They end as any flow does, and the port rests for others.
        gate.close(world, world.pod, 30_000);
        assert_eq!(gate.used("mail"), 2);
        assert_ne!(gate.port_of(world, world.friend, 30_000), Some(30_000));
        assert_eq!(gate.port_of(world, world.pod, 30_000), Some(30_000));
    }
}

/// It may have been half-open or half-closed: who says nothing to its new gateway is not waited for as long as others.
#[test]
fn a_copy_that_nobody_hears_ends_before_others() {
    for world in WORLDS {
        let times = Times {
            copied: SHORT,
            ..forever()
        };
        let mut gate = Gate::standby(mk_egress(), times);
        gate.copies.insert(own(world, world.pod, 30_000..30_004));
        // A second: that one was heard is noted no more often.
        sleep(Duration::from_millis(1_100));
        gate.keep();
        assert_eq!(gate.used("mail"), 4, "its gateway says when it ends");
        gate.leads(&mk_egress(), Licence::Full);
        assert_eq!(gate.out(world, world.pod, 30_001, ACK), SENT);
        assert_eq!(gate.back(world, 30_002, ACK), SENT);
        gate.handshake(world, world.pod, 31_000);
        gate.keep();
        assert_eq!(gate.used("mail"), 5);
        wait();
        gate.keep();
        let ports = [30_001, 30_002, 31_000].map(|port| binding(world, world.pod, port, port));
        assert_eq!(gate.held(world.egress), set(&ports));
    }
}

/// A node has seen a flow begin, or be reset, and was the standby when it went on: it leads once more.
#[test]
fn what_another_gateway_heard_counts() {
    for world in WORLDS {
        let times = Times {
            transitory: SHORT,
            reset: SHORT,
            ..forever()
        };
        let mut gate = Gate::with(&mk_egress(), times, 0);
        assert_eq!(gate.port_of(world, world.pod, 40_000), Some(40_000));
        gate.handshake(world, world.pod, 41_000);
        gate.back(world, 41_000, RST | ACK);
        gate.stands_by(mk_egress());
        gate.copies.insert(own(world, world.pod, 40_000..40_001));
        gate.copies.insert(own(world, world.pod, 41_000..41_001));
        gate.leads(&mk_egress(), Licence::Full);
        wait();
        gate.keep();
        assert_eq!(gate.used("mail"), 2);
    }
}

/// What a gateway has given counts, also past a quota, and new flows wait for it to end.
#[test]
fn copies_count_for_quotas() {
    for world in WORLDS {
        let mut egress = mk_egress();
        let policy = egress.policies.get_mut("mail").expect("it is there");
        (policy.ports, policy.ports_per_pod) = (Some(150), Some(100));
        let mut gate = Gate::standby(egress.clone(), forever());
        let copies = own(world, world.pod, 30_000..30_200);
        gate.copies.insert(copies.clone());
        assert_eq!(gate.used("mail"), 200);
        gate.leads(&egress, Licence::Full);
        assert_eq!(
            gate.port_of(world, world.friend, 1_500),
            None,
            "the policy's"
        );
        gate.stands_by(egress.clone());
        gate.copies.remove(copies[..101].to_vec());
        assert_eq!(gate.used("mail"), 99);
        gate.leads(&egress, Licence::Full);
        assert_eq!(gate.port_of(world, world.pod, 1_500), Some(1_500));
        assert_eq!(gate.port_of(world, world.pod, 1_501), None, "the pod's");
        let opened =
            (0..60).filter(|port| gate.port_of(world, world.friend, 2_000 + port).is_some());
        assert_eq!(opened.count(), 50);
        assert_eq!(gate.used("mail"), 150);
        gate.close(world, world.pod, 30_150);
        assert_eq!(gate.port_of(world, world.pod, 1_501), Some(1_501));
    }
}

/// Those too that were here before there was a quota for a pod.
#[test]
fn copies_count_for_a_quota_that_comes_with_the_take_over() {
    for world in WORLDS {
        let mut gate = Gate::standby(mk_egress(), forever());
        gate.copies.insert(own(world, world.pod, 30_000..30_100));
        let mut egress = mk_egress();
        let policy = egress.policies.get_mut("mail").expect("it is there");
        policy.ports_per_pod = Some(101);
        gate.leads(&egress, Licence::Full);
        gate.keep();
        assert_eq!(gate.port_of(world, world.pod, 1_500), Some(1_500));
        assert_eq!(gate.port_of(world, world.pod, 1_501), None);
    }
}

/// The gateway's ports and the standby's free ones are all there are.
#[test]
fn the_budget_is_kept_over_a_take_over() {
    const BEFORE: u32 = 64_000;
    let [world, _] = WORLDS;
    let syn = |number: u32| {
        let pod = if number.is_multiple_of(2) {
            world.pod
        } else {
            world.friend
        };
        let port = u16::try_from(1_024 + (number / 2 * 7_919) % 64_512).expect("a port");
        segment(world, pod, port, SYN)
    };
    let mut before = Gate::load();
    for number in 0..BEFORE {
        assert_eq!(before.comes(&syn(number)).0, SENT);
    }
    let held = before.held(world.egress);
    assert_eq!(held.len(), BEFORE as usize);
    let mut after = Gate::standby(mk_egress(), forever());
    after.copies.insert(held.iter().copied().collect());
    assert_eq!(after.held(world.egress), held);
    after.leads(&mk_egress(), Licence::Full);
    let mut given: BTreeSet<u16> = held.iter().map(|it| it.egress.port()).collect();
    let mut tries = 0;
    for number in BEFORE..BEFORE + 6_000 {
        let (action, out) = after.comes(&syn(number));
        assert_eq!(action, SENT);
        tries += u32::from(given.len() < 64_512);
        if source(&out) == world.egress {
            assert!(given.insert(ports(&out).0), "given twice");
        }
    }
    println!(
        "the last {} ports were given by {tries} flows",
        64_512 - BEFORE
    );
    assert_eq!((given.len(), after.used("mail")), (64_512, 64_512));
}

/// Two nodes have given the same port, or a flow two: the gateway that is followed has it.
#[test]
fn what_is_in_the_way_of_a_copy_is_cut() {
    for world in WORLDS {
        let mut gate = Gate::with(&mk_egress(), forever(), 0);
        gate.handshake(world, world.pod, 40_000);
        gate.handshake(world, world.pod, 41_000);
        gate.handshake(world, world.pod, 42_000);
        gate.stands_by(mk_egress());
        assert_eq!(gate.used("mail"), 3, "they are copies now");
        let copies = [
            binding(world, world.friend, 50_000, 40_000),
            binding(world, world.pod, 41_000, 45_000),
        ];
        gate.copies.insert(copies.to_vec());
        assert_eq!((gate.used("mail"), gate.count(Reason::Cut)), (3, 2));
        let left = binding(world, world.pod, 42_000, 42_000);
        assert_eq!(gate.held(world.egress), set(&[copies[0], copies[1], left]));
        // Both at once, in one copy's way.
        let copy = binding(world, world.pod, 42_000, 45_000);
        gate.copies.insert(vec![copy]);
        assert_eq!((gate.used("mail"), gate.count(Reason::Cut)), (2, 4));
        assert_eq!(gate.held(world.egress), set(&[copies[0], copy]));
        gate.leads(&mk_egress(), Licence::Full);
        assert_eq!(gate.back(world, 40_000, ACK), SENT);
        assert_eq!(gate.out(world, world.friend, 50_000, ACK), SENT);
        assert_eq!(gate.out(world, world.pod, 42_000, ACK), SENT);
    }
}

/// What an earlier gateway says late changes nothing that this one has done since.
#[test]
fn who_leads_keeps_its_own() {
    for world in WORLDS {
        let mut gate = Gate::with(&mk_egress(), forever(), 0);
        gate.leads(&mk_egress(), Licence::Full);
        gate.handshake(world, world.pod, 40_000);
        gate.handshake(world, world.pod, 41_000);
        let before = gate.held(world.egress);
        gate.copies.insert(vec![
            binding(world, world.friend, 50_000, 40_000),
            binding(world, world.pod, 41_000, 45_000),
        ]);
        gate.copies.remove(before.iter().copied().collect());
        gate.copies
            .keep(&BTreeSet::from([world.egress]), &HashSet::new());
        assert_eq!(gate.held(world.egress), before);
        assert_eq!((gate.used("mail"), gate.count(Reason::Cut)), (2, 2));
        assert_eq!(gate.copies.aside(), 0);
        // One that is late and in nobody's way is better there than not.
        gate.copies.insert(own(world, world.friend, 50_000..50_001));
        assert_eq!(gate.used("mail"), 3);
    }
}

/// Late copies come while flows begin, for the same ports, on another CPU: each port is one flow's, and all are counted.
#[test]
fn nothing_is_counted_twice_when_copies_and_flows_race() {
    const MANY: u16 = 6_000;
    let [world, _] = WORLDS;
    let mut egress = mk_egress();
    let policy = egress.policies.get_mut("mail").expect("it is there");
    policy.ports_per_pod = Some(50_000);
    let mut gate = Gate::standby(egress.clone(), forever());
    gate.leads(&egress, Licence::Full);
    let copies = Arc::clone(&gate.copies);
    let program = gate.program(GATEWAY_INGRESS);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for port in 20_000..20_000 + MANY {
                let syn = mk_tcp(port, 443, SYN);
                let syn = mk(OTHER, world.pod, world.remote, 6, 64, &syn);
                let result = program
                    .test_run(TestRunOptions {
                        data_in: Some(&syn),
                        repeat: 1,
                        ..TestRunOptions::default()
                    })
                    .expect("the kernel runs it");
                assert_eq!(result.return_value, SENT);
            }
        });
        scope.spawn(|| {
            // From the end: they meet in the middle, and again where flows had to have other ports.
            for port in (20_000..20_000 + MANY).rev() {
                copies.insert(vec![
                    binding(world, world.friend, port, port),
                    binding(world, world.pod, port, port.wrapping_add(MANY)),
                ]);
            }
        });
    });
    for _ in 0..3 {
        gate.copies.try_again(usize::MAX);
    }
    let held = gate.held(world.egress);
    let ports: BTreeSet<u16> = held.iter().map(|it| it.egress.port()).collect();
    assert_eq!(ports.len(), held.len(), "a port is two flows'");
    let flows: BTreeSet<std::net::SocketAddr> = held.iter().map(|it| it.pod).collect();
    assert_eq!(flows.len(), held.len(), "a flow has two ports");
    assert_eq!(gate.used("mail"), held.len() as u64);
    println!(
        "{} flows and copies, {} of which were in each other's way, {} wait",
        held.len(),
        gate.count(Reason::Cut),
        gate.copies.aside()
    );
    // What is counted is given back to the last.
    gate.stands_by(egress);
    let addresses = BTreeSet::from([world.egress]);
    gate.copies.keep(&addresses, &HashSet::new());
    assert_eq!((gate.used("mail"), gate.held(world.egress).len()), (0, 0));
}

/// A copy whose pod is not known yet is placed when it is.
#[test]
fn what_cannot_be_placed_waits() {
    for world in WORLDS {
        let mut less = mk_egress();
        less.pods.remove(&world.pod);
        less.policies.remove("mail");
        let mut gate = Gate::standby(mk_egress(), forever());
        gate.set(&less);
        let copies = own(world, world.pod, 30_000..30_100);
        gate.copies.insert(copies.clone());
        assert_eq!(
            (gate.copies.aside(), gate.held(world.egress).len()),
            (100, 0)
        );
        gate.copies.try_again(usize::MAX);
        assert_eq!(gate.copies.aside(), 100);
        // Meanwhile some end.
        gate.copies.remove(copies[..20].to_vec());
        let kept: HashSet<Binding> = copies[..70].iter().copied().collect();
        gate.copies.keep(&BTreeSet::from([world.egress]), &kept);
        assert_eq!(gate.copies.aside(), 50);
        gate.set(&elsewhere(mk_egress()));
        gate.copies.try_again(7);
        assert_eq!(gate.copies.aside(), 0);
        assert_eq!(gate.held(world.egress), set(&copies[20..70]));
        assert_eq!(gate.used("mail"), 50);
    }
}

/// Each of those that wait has its turn, however many of them are of no use.
#[test]
fn who_waits_has_its_turn() {
    let [world, _] = WORLDS;
    let mut gate = Gate::standby(mk_egress(), forever());
    let copies = own(world, v4(10, 1, 0, 1), 30_000..30_100);
    gate.copies.insert(copies);
    let mut less = mk_egress();
    less.pods.remove(&world.stranger);
    gate.set(&elsewhere(less));
    gate.copies
        .insert(own(world, world.stranger, 30_000..30_003));
    assert_eq!(gate.copies.aside(), 103);
    let mut egress = mk_egress();
    egress
        .pods
        .insert(world.stranger, mk_pod("other", "mail", world.egress));
    gate.set(&elsewhere(egress));
    for _ in 0..11 {
        gate.copies.try_again(10);
    }
    assert_eq!((gate.copies.aside(), gate.used("mail")), (100, 3));
}

/// What replication says before the programs are loaded is made up for when they are.
#[test]
fn what_is_said_too_early_counts_later() {
    for world in WORLDS {
        let mut gate = Gate::standby(mk_egress(), forever());
        // Left by a process before.
        gate.copies.insert(own(world, world.pod, 30_000..30_100));
        gate.copies.adopt(None);
        let addresses = BTreeSet::from([world.egress]);
        let asked = gate.copies.held(&addresses, None);
        assert!(asked.bindings.is_empty() && asked.next.is_some());
        let now = own(world, world.pod, 30_050..30_150);
        gate.copies.insert(now.clone());
        gate.copies.keep(&addresses, &now.iter().copied().collect());
        gate.copies.remove(now[90..].to_vec());
        assert_eq!((gate.used("mail"), gate.copies.aside()), (100, 90));
        let kernel = gate.kernel();
        gate.copies.adopt(Some(kernel));
        assert_eq!(gate.used("mail"), 50);
        gate.copies.try_again(1_000);
        assert_eq!(gate.used("mail"), 90);
        assert_eq!(gate.held(world.egress), set(&now[..90]));
        let again = gate.copies.held(&addresses, asked.next);
        assert!(!again.bindings.is_empty() || again.next.is_some());
    }
}

/// No more than there is room for are kept aside.
#[test]
fn what_waits_is_bounded() {
    let [world, _] = WORLDS;
    let copies = Copies::new(10);
    copies.insert(own(world, world.pod, 30_000..30_100));
    assert_eq!(copies.aside(), 10);
    copies.keep(&BTreeSet::from([world.egress]), &HashSet::new());
    assert_eq!(copies.aside(), 0);
}

/// A policy is gone, and its pods are nobody's or another's: a node that knows them so from the beginning takes copies of
/// their flows all the same, and goes on with them.
#[test]
fn flows_of_a_policy_that_is_gone_are_copied() {
    let mut egress = mk_egress();
    for world in WORLDS {
        let nobodys = Pod {
            tenant: None,
            ..egress.pods[&world.pod].clone()
        };
        egress.pods.insert(world.pod, nobodys);
        let shops = mk_pod("other", "shop", world.second);
        egress.pods.insert(world.friend, shops);
    }
    let addresses = WORLDS.map(|world| world.egress).into();
    let gone = Policy::gone(addresses, mk_policy("here").gateway);
    egress.policies.insert("mail".into(), gone);
    let mut gate = Gate::standby(egress.clone(), forever());
    for world in WORLDS {
        let pods = [(world.pod, 40_000), (world.friend, 40_001)];
        gate.copies.insert(
            pods.map(|(pod, port)| binding(world, pod, port, port))
                .into(),
        );
    }
    assert_eq!(gate.copies.aside(), 0);
    assert_eq!((gate.used("mail"), gate.used("shop")), (4, 0));
    gate.leads(&egress, Licence::Full);
    gate.keep();
    for world in WORLDS {
        for (pod, port) in [(world.pod, 40_000), (world.friend, 40_001)] {
            assert_eq!(gate.out(world, pod, port, ACK), SENT);
            assert_eq!(gate.back(world, port, ACK), SENT);
        }
        gate.passes(&segment(world, world.pod, 41_000, SYN));
    }
}
