//! Which ports flows get, and that no more do than may.

use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::Times;
use landfall_ebpf_common::egress::ports::{DRAWN, drawn, seed};

use super::life::{SHORT, forever, wait};
use super::*;

/// A SYN of the flow with this number, of four pods in turn. Their ports are what a pod's own choice is to the gateway:
/// any.
fn syn(world: World, number: u32) -> Vec<u8> {
    let pods = [world.pod, world.friend, world.pod, world.friend];
    let pod = pods[number as usize % 4];
    // Each port twice: both pods ask for it.
    let port = u16::try_from(1024 + (number / 2 * 7919) % 64_512).expect("a port");
    segment(world, pod, port, SYN)
}

/// To the last port, and not one more: with the real maps what the choice does in memory.
#[test]
fn the_budget_is_used_to_the_last_port() {
    for world in WORLDS {
        let mut gate = Gate::load();
        let mut ports_seen = BTreeSet::new();
        let (mut sent, mut refused) = (0, 0);
        for number in 0..70_000 {
            let frame = syn(world, number);
            let (action, out) = gate.comes(&frame);
            assert_eq!(action, SENT);
            if source(&out) == world.egress {
                assert!(ports_seen.insert(ports(&out).0), "given twice");
                sent += 1;
            } else {
                assert_eq!(source(&out), world.remote, "a reset");
                refused += 1;
            }
        }
        assert_eq!((sent, refused), (64_512, 5_488));
        assert_eq!(gate.count(Reason::NoPort), 5_488);
        assert_eq!(gate.used("mail"), 64_512);
        // Another remote, and another policy, are not concerned.
        let other = if world.pod.is_ipv4() {
            v4(198, 51, 100, 8)
        } else {
            v6(0x2001, 0xdb9, 8)
        };
        let frame = mk(OTHER, world.pod, other, 6, 64, &mk_tcp(40_000, 443, SYN));
        assert_eq!(ports(&gate.comes(&frame).1).0, 40_000);
        let frame = mk(
            OTHER,
            world.stranger,
            world.remote,
            6,
            64,
            &mk_tcp(40_000, 443, SYN),
        );
        assert_eq!(source(&gate.comes(&frame).1), world.second);
    }
}

/// Past a policy's quota, and past a pod's, exactly.
#[test]
fn quotas_are_exact() {
    for world in WORLDS {
        let mut egress = mk_egress();
        let policy = egress.policies.get_mut("mail").expect("it is there");
        (policy.ports, policy.ports_per_pod) = (Some(150), Some(100));
        let mut gate = Gate::with(&egress, Times::default(), 0);
        let open = |gate: &mut Gate, pod: IpAddr, to: u16, count: u16| {
            (0..count)
                .filter(|number| {
                    let payload = mk_tcp(30_000 + number, to, SYN);
                    let frame = mk(OTHER, pod, world.remote, 6, 64, &payload);
                    source(&gate.comes(&frame).1) == world.egress
                })
                .count()
        };
        assert_eq!(open(&mut gate, world.pod, 443, 120), 100);
        // To another port the pod's count begins anew; the policy's does not.
        assert_eq!(open(&mut gate, world.pod, 444, 30), 30);
        assert_eq!(open(&mut gate, world.friend, 443, 120), 20);
        assert_eq!(gate.used("mail"), 150);
        assert_eq!(gate.count(Reason::Quota), 20 + 100);
        // The old ones go on, also by a SYN that is sent again.
        assert_eq!(open(&mut gate, world.pod, 443, 120), 100);
        assert_eq!(gate.used("mail"), 150);
        // One that closes makes room for one.
        for (mac, from, to, from_port, port) in [
            (OTHER, world.pod, world.remote, 30_000, 443),
            (STRANGER, world.remote, world.egress, 443, 30_000),
        ] {
            let fin = mk(mac, from, to, 6, 64, &mk_tcp(from_port, port, FIN | ACK));
            assert_eq!(gate.comes(&fin).0, SENT);
        }
        assert_eq!(gate.used("mail"), 149);
        assert_eq!(open(&mut gate, world.friend, 443, 120), 21);
        assert_eq!(open(&mut gate, world.pod, 443, 120), 99);
    }
}

/// A quota that comes later counts what was there before it, also what is copied, and each flow once; it goes and comes back.
#[test]
fn a_quota_that_comes_later_is_exact_too() {
    for world in WORLDS {
        let mut gate = Gate::with(&mk_egress(), Times::default(), 0);
        let limited = |most: Option<u32>| {
            let mut egress = mk_egress();
            egress
                .policies
                .get_mut("mail")
                .expect("it is there")
                .ports_per_pod = most;
            egress
        };
        let open = |gate: &mut Gate, from: u16, count: u16| {
            let ports = (from..).take(usize::from(count));
            let open = |port: &u16| gate.port_of(world, world.pod, *port).is_some();
            ports.filter(open).count()
        };
        assert_eq!(open(&mut gate, 30_000, 60), 60);
        gate.set(&limited(Some(100)));
        gate.keep();
        gate.keep();
        assert_eq!(open(&mut gate, 31_000, 60), 40);
        for port in 30_000..30_010 {
            gate.close(world, world.pod, port);
        }
        assert_eq!(open(&mut gate, 32_000, 60), 10);
        // What begins while there is none counts when there is one again.
        gate.set(&limited(None));
        gate.keep();
        assert_eq!(open(&mut gate, 33_000, 20), 20);
        gate.set(&limited(Some(110)));
        gate.keep();
        assert_eq!(open(&mut gate, 34_000, 60), 0, "there are 120");
        for port in (30_010..30_020).chain(33_000..33_010) {
            gate.close(world, world.pod, port);
        }
        assert_eq!(open(&mut gate, 35_000, 60), 10);
        // And what has ended has left nothing behind.
        let all = (30_020..30_060).chain(31_000..31_040).chain(32_000..32_010);
        for port in all.chain(33_010..33_020).chain(35_000..35_010) {
            gate.close(world, world.pod, port);
        }
        assert_eq!(gate.used("mail"), 0);
        assert_eq!(open(&mut gate, 36_000, 120), 110);
    }
}

/// Flows end on one CPU while another counts them: nothing stays behind of those that are over.
#[test]
fn what_ends_while_it_is_counted_counts_no_more() {
    const FLOWS: u16 = 20_000;
    const MOST: u16 = 5;
    let [world, _] = WORLDS;
    let mut gate = Gate::load();
    let mine = |number: u16| 2_000 + number;
    for number in 0..FLOWS {
        assert_eq!(
            gate.port_of(world, world.pod, mine(number)),
            Some(mine(number))
        );
    }
    let mut egress = mk_egress();
    let policy = egress.policies.get_mut("mail").expect("it is there");
    policy.ports_per_pod = Some(MOST.into());
    gate.set(&egress);
    let (mut keeper, states) = (gate.keeper.take().expect("it is put back"), BTreeMap::new());
    let limited = gate.maps.limited().clone();
    let ebpf = &gate.ebpf;
    let program = |name| match ebpf.program(name) {
        Some(Program::SchedClassifier(program)) => program,
        _ => panic!("the object holds it"),
    };
    let (closes, counts) = (program(GATEWAY_INGRESS), program(GATEWAY_KEEP));
    let named = std::thread::scope(|scope| {
        let ends = scope.spawn(|| {
            let says = |frame: &[u8]| {
                let options = TestRunOptions {
                    data_in: Some(frame),
                    repeat: 1,
                    ..TestRunOptions::default()
                };
                let result = closes.test_run(options).expect("the kernel runs it");
                assert_eq!(result.return_value, SENT);
            };
            for number in 0..FLOWS {
                says(&segment(world, world.pod, mine(number), FIN | ACK));
                let fin = mk_tcp(443, mine(number), FIN | ACK);
                says(&mk(STRANGER, world.remote, world.egress, 6, 64, &fin));
            }
        });
        let known = Known {
            states: &states,
            limited: &limited,
        };
        let mut named = Vec::new();
        while !ends.is_finished() {
            let kept = keeper.look(counts, &known).expect("the kernel runs it");
            named.push(kept.named);
        }
        ends.join().expect("no panic");
        named
    });
    println!("counted while they ended: {named:?}");
    gate.keeper = Some(keeper);
    assert_eq!(gate.used("mail"), 0);
    let opened = (40_000..40_100).filter(|port| gate.port_of(world, world.pod, *port).is_some());
    assert_eq!(opened.count(), usize::from(MOST));
}

/// A Service's ports are never a flow's, however much they are wanted.
#[test]
fn the_ports_of_services_are_kept() {
    let [world, _] = WORLDS;
    let mut gate = Gate::load();
    gate.serve(world, 40_000);
    let port = gate.port_of(world, world.pod, 40_000);
    assert!(port.is_some_and(|port| port != 40_000), "{port:?}");
    gate.serve(world, 40_001);
    for number in 0..70_000 {
        let (_, out) = gate.comes(&syn(world, number));
        if source(&out) == world.egress {
            assert!(![40_000, 40_001].contains(&ports(&out).0));
        }
    }
    assert_eq!(gate.used("mail"), 64_510);
}

/// On all CPUs at once: the quota stays exact, no port is given twice, and a flow whose SYN comes twice has one.
#[test]
fn nothing_is_given_twice_when_cpus_race() {
    const MOST: u32 = 20_000;
    let [world, _] = WORLDS;
    let mut egress = mk_egress();
    egress.policies.get_mut("mail").expect("it is there").ports = Some(MOST);
    let mut gate = Gate::with(&egress, Times::default(), 0);
    let program = gate.program(GATEWAY_INGRESS);
    let ask = |from: u32| {
        (0..30_000_u32)
            .map(|number| {
                // Both ask for all, one from the middle on.
                let frame = syn(world, (number + from) % 30_000);
                let mut out = vec![0; 256];
                let result = program
                    .test_run(TestRunOptions {
                        data_in: Some(&frame),
                        data_out: Some(&mut out),
                        repeat: 1,
                        ..TestRunOptions::default()
                    })
                    .expect("the kernel runs it");
                assert_eq!(result.return_value, SENT);
                let got = (source(&out) == world.egress).then(|| ports(&out).0);
                ((source(&frame), ports(&frame).0), got)
            })
            .collect::<Vec<_>>()
    };
    let (one, other) = std::thread::scope(|scope| {
        let one = scope.spawn(|| ask(0));
        let other = scope.spawn(|| ask(29_990));
        (
            one.join().expect("no panic"),
            other.join().expect("no panic"),
        )
    });
    let mut flows: BTreeMap<(IpAddr, u16), u16> = BTreeMap::new();
    for (flow, port) in one.into_iter().chain(other) {
        if let Some(port) = port {
            assert_eq!(*flows.entry(flow).or_insert(port), port, "{flow:?} has two");
        }
    }
    let given: BTreeSet<u16> = flows.values().copied().collect();
    assert_eq!(given.len(), flows.len(), "a port was given twice");
    assert_eq!(gate.used("mail"), flows.len() as u64);
    assert!(flows.len() <= MOST as usize);
    println!("{} of {MOST}", flows.len());
}

/// Remotes that many flows went to once do not take the room for ever from those that many go to later.
#[test]
fn crowds_that_nobody_is_in_disperse() {
    const REMOTES: u16 = 40;
    for (place, world) in WORLDS.into_iter().enumerate() {
        let times = Times {
            rest: SHORT,
            ..forever()
        };
        let mut gate = Gate::with(&mk_egress(), times, 0);
        let crowds = |gate: &Gate| gate.keeper.as_ref().expect("it is there").crowds()[place];
        let key = |address: IpAddr| VipKey::from_address(address).0;
        let flow = |flags: u8, port: u16| {
            mk(
                OTHER,
                world.pod,
                world.remote,
                6,
                64,
                &mk_tcp(25, port, flags),
            )
        };
        for port in 1000..1000 + REMOTES {
            // Whatever it would have without a crowd is a Service's.
            let seed = seed(&key(world.pod), 25, &key(world.remote), port);
            for turn in 0..DRAWN {
                gate.serve(world, drawn(seed, turn));
            }
            let (action, out) = gate.comes(&flow(SYN, port));
            assert_eq!((action, source(&out)), (SENT, world.egress));
        }
        gate.keep();
        assert_eq!(crowds(&gate), usize::from(REMOTES), "all are in use");
        gate.set(&Egress::default());
        gate.keep();
        assert_eq!(crowds(&gate), usize::from(REMOTES), "their ports rest");
        wait();
        gate.keep();
        gate.keep();
        assert_eq!(crowds(&gate), 0);
    }
}
