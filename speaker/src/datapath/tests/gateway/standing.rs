//! What this node is to an egress address, and what it does and does not do therefore.

use std::time::{Duration, Instant};

use landfall_ebpf_common::egress::binding::Times;
use landfall_ebpf_common::egress::gateway::RESUME;

use super::super::super::egress::{Leaving, Licence, Surroundings};
use super::copies::binding;
use super::life::{SHORT, forever, wait};
use super::*;
use crate::egress::{MARK, marks};

/// Nobody hears a flow at a standby: it stays, and is idle from the take-over on.
#[test]
fn copies_do_not_end_by_themselves() {
    for world in WORLDS {
        let times = Times {
            established: SHORT,
            datagram: SHORT,
            ..forever()
        };
        let mut gate = Gate::standby(mk_egress(), times);
        let copies = [
            binding(world, world.pod, 30_000, 30_000),
            landfall_core::replication::Binding {
                protocol: 17,
                ..binding(world, world.pod, 30_000, 30_000)
            },
        ];
        gate.copies.insert(copies.to_vec());
        wait();
        gate.keep();
        assert_eq!(gate.used("mail"), 2);
        gate.leads(&mk_egress(), Licence::Full);
        gate.keep();
        assert_eq!(gate.used("mail"), 2, "its time begins now");
        // Another take-over before it is over.
        gate.stands_by(mk_egress());
        wait();
        gate.keep();
        assert_eq!(gate.used("mail"), 2);
        gate.leads(&mk_egress(), Licence::Full);
        gate.keep();
        assert_eq!(gate.used("mail"), 2);
        wait();
        gate.keep();
        assert_eq!((gate.used("mail"), gate.count(Reason::Ended)), (0, 2));
        // Where it is neither, what is left ends by its own time.
        gate.stands_by(mk_egress());
        gate.copies.insert(copies.to_vec());
        gate.stand(&[]);
        wait();
        gate.keep();
        assert_eq!(gate.used("mail"), 0);
    }
}

/// A copy that was said to have ended rests here as it does there.
#[test]
fn what_has_ended_rests_at_the_standby_too() {
    for world in WORLDS {
        let times = Times {
            rest: SHORT,
            ..forever()
        };
        let mut gate = Gate::standby(mk_egress(), times);
        let copy = binding(world, world.pod, 30_000, 30_000);
        gate.copies.insert(vec![copy]);
        gate.copies.remove(vec![copy]);
        assert_eq!(gate.used("mail"), 0);
        gate.leads(&mk_egress(), Licence::Full);
        // What is late still goes its way; another pod does not get it yet.
        assert_eq!(gate.out(world, world.pod, 30_000, ACK), SENT);
        assert_eq!(gate.back(world, 30_000, ACK), SENT);
        assert_ne!(gate.port_of(world, world.friend, 30_000), Some(30_000));
        gate.stands_by(mk_egress());
        wait();
        assert_eq!(gate.keep(), 2);
        assert_eq!(gate.keep(), 1, "it is given back, at a standby too");
    }
}

impl Gate {
    fn led_since(&mut self, since: Instant) {
        let leads = Standing::Leads {
            since,
            licence: Licence::Full,
        };
        self.stand(&WORLDS.map(|world| (world.egress, leads)));
        self.set(&mk_egress());
    }
}

/// For a while a connection that was not copied in time makes its binding anew, with the pod's own port or not at all.
#[test]
fn connections_go_on_for_a_while_after_a_take_over() {
    for world in WORLDS {
        let mut gate = Gate::load();
        let unknown = |port: u16, flags: u8| segment(world, world.pod, port, flags);
        // Not without a take-over.
        gate.drops(&unknown(40_000, ACK), Reason::Unknown);
        gate.led_since(Instant::now());
        let (action, out) = gate.comes(&unknown(40_000, ACK));
        assert_eq!(
            (action, source(&out), ports(&out).0),
            (SENT, world.egress, 40_000)
        );
        assert_eq!(gate.back(world, 40_000, ACK), SENT);
        assert_eq!(gate.out(world, world.pod, 40_000, FIN | ACK), SENT);
        assert_eq!((gate.used("mail"), gate.count(Reason::Resumed)), (1, 1));
        // The port is another's, a Service's, or below those that are given.
        gate.handshake(world, world.friend, 41_000);
        for port in [41_000, 25, 80] {
            gate.drops(&unknown(port, ACK), Reason::Unknown);
        }
        // What begins, or ends, nothing.
        gate.drops(&unknown(42_000, RST), Reason::Unknown);
        gate.drops(&unknown(42_000, SYN | ACK), Reason::Unknown);
        // This node's own pods.
        let frame = mk_tcp(43_000, 443, ACK);
        let frame = mk(OWN, world.local, world.remote, 6, 64, &frame);
        let (action, out) = gate.leaves(&frame);
        assert_eq!(
            (action, source(&out), ports(&out).0),
            (NEXT, world.egress, 43_000)
        );
        assert_eq!((gate.used("mail"), gate.count(Reason::Resumed)), (3, 2));
        // It is over.
        let ago = Duration::from_secs(u64::from(RESUME) + 1);
        gate.led_since(
            Instant::now()
                .checked_sub(ago)
                .expect("it has run that long"),
        );
        gate.drops(&unknown(44_000, ACK), Reason::Unknown);
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
    }
}

/// By which address each began nobody knows here, if that may be another than the pod has: by a wrong one none goes on.
#[test]
fn no_connection_goes_on_by_another_address() {
    for world in WORLDS {
        let mut gate = Gate::load();
        gate.led_since(Instant::now());
        let mut moved = mk_egress();
        let pod = moved.pods.get_mut(&world.pod).expect("it is there");
        pod.former = Some("shop".into());
        gate.set(&moved);
        let of_pod = segment(world, world.pod, 40_000, ACK);
        gate.drops(&of_pod, Reason::Unknown);
        let (action, out) = gate.comes(&segment(world, world.friend, 41_000, ACK));
        assert_eq!((action, source(&out)), (SENT, world.egress));
        let mut drains = mk_egress();
        let policy = drains.policies.get_mut("mail").expect("it is there");
        policy.drains = true;
        gate.set(&drains);
        gate.drops(&of_pod, Reason::Unknown);
        gate.set(&mk_egress());
        let (action, out) = gate.comes(&of_pod);
        assert_eq!((action, source(&out)), (SENT, world.egress));
    }
}

/// It counts for quotas as any flow does.
#[test]
fn a_connection_that_goes_on_has_no_more_than_its_quota() {
    let [world, _] = WORLDS;
    let mut egress = mk_egress();
    egress.policies.get_mut("mail").expect("it is there").ports = Some(1);
    let mut gate = Gate::with(&egress, forever(), 0);
    gate.leads(&egress, Licence::Full);
    assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
    let before = gate.count(Reason::Quota);
    let frame = mk_tcp(40_001, 443, ACK);
    let (_, out) = gate.comes(&mk(OTHER, world.pod, world.remote, 6, 64, &frame));
    assert_eq!(
        (source(&out), gate.count(Reason::Quota)),
        (world.remote, before + 1)
    );
    assert_eq!(gate.used("mail"), 1);
}

/// Without a majority: what is bound goes on, and nothing begins.
#[test]
fn a_frozen_gateway_binds_nothing() {
    for world in WORLDS {
        let mut gate = Gate::load();
        gate.handshake(world, world.pod, 40_000);
        gate.leads(&mk_egress(), Licence::Frozen);
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
        assert_eq!(gate.back(world, 40_000, ACK), SENT);
        let tcp = |port, flags| segment(world, world.pod, port, flags);
        gate.drops(&tcp(40_001, SYN), Reason::Frozen);
        gate.drops(&tcp(40_001, ACK), Reason::Frozen);
        let udp = mk_udp(40_002, 53, b"x");
        gate.drops(
            &mk(OTHER, world.pod, world.remote, 17, 64, &udp),
            Reason::Frozen,
        );
        let frame = mk_tcp(40_003, 443, SYN);
        let (action, _) = gate.leaves(&mk(OWN, world.local, world.remote, 6, 64, &frame));
        assert_eq!((action, gate.count(Reason::Frozen)), (DROPPED, 4));
        assert_eq!(gate.usage("mail").count.others, 4);
        // Other addresses are not concerned.
        let frame = mk_tcp(40_000, 443, SYN);
        let frame = mk(OTHER, world.stranger, world.remote, 6, 64, &frame);
        assert_eq!(source(&gate.comes(&frame).1), world.second);
        assert_eq!(gate.used("mail"), 1);
        gate.leads(&mk_egress(), Licence::Full);
        gate.handshake(world, world.pod, 40_001);
    }
}

/// When its lease is over nothing goes either way, of this node's own pods neither.
#[test]
fn a_silent_gateway_translates_nothing() {
    for world in WORLDS {
        let mut gate = Gate::load();
        gate.handshake(world, world.pod, 40_000);
        let own = |flags| {
            mk(
                OWN,
                world.local,
                world.remote,
                6,
                64,
                &mk_tcp(40_001, 443, flags),
            )
        };
        assert_eq!(gate.leaves(&own(SYN)).0, NEXT);
        gate.leads(&mk_egress(), Licence::Silent);
        let tcp = |port, flags| segment(world, world.pod, port, flags);
        gate.drops(&tcp(40_000, ACK), Reason::Silent);
        gate.drops(&tcp(40_002, SYN), Reason::Silent);
        let back = mk_tcp(443, 40_000, ACK);
        gate.drops(
            &mk(STRANGER, world.remote, world.egress, 6, 64, &back),
            Reason::Silent,
        );
        for flags in [ACK, SYN] {
            assert_eq!(
                gate.leaves(&own(flags)).0,
                DROPPED,
                "with the pod's own address"
            );
        }
        let fresh = mk(
            OWN,
            world.local,
            world.remote,
            6,
            64,
            &mk_tcp(40_009, 443, SYN),
        );
        assert_eq!(gate.leaves(&fresh).0, DROPPED);
        assert_eq!(gate.count(Reason::Silent), 6);
        assert_eq!(gate.usage("mail").count.others, 6);
        let frame = mk_tcp(40_000, 443, SYN);
        let frame = mk(OTHER, world.stranger, world.remote, 6, 64, &frame);
        assert_eq!(source(&gate.comes(&frame).1), world.second);
        gate.leads(&mk_egress(), Licence::Full);
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
    }
}

/// A pod's flow from before goes on by another node, though this one is its pod's gateway now: the guard has led it there.
#[test]
fn what_was_led_to_another_node_is_left_alone() {
    let (judged, led) = marks(MARK);
    for world in WORLDS {
        let mut gate = Gate::with(&mk_egress(), Times::default(), led);
        let frame = mk_tcp(40_000, 443, ACK);
        let frame = mk(OWN, world.local, world.remote, 6, 64, &frame);
        for (former, mark, expected) in [
            ("far", led, NEXT),
            ("far", led | judged, DROPPED),
            ("shop", led, DROPPED),
        ] {
            let mut egress = mk_egress();
            let pod = egress.pods.get_mut(&world.local).expect("it is there");
            pod.former = Some(former.into());
            gate.change(&Change::Egress(Some(Arc::new(Leaving {
                node: "here".into(),
                egress: Arc::new(egress),
                outside: BTreeSet::new(),
                mark: MARK,
                around: Arc::new(Surroundings::nowhere()),
            }))));
            let mut context = vec![0; 192];
            context[8..12].copy_from_slice(&mark.to_ne_bytes());
            let (action, out, _) = gate.run_in(GATEWAY_EGRESS, &frame, &context);
            assert_eq!(action, expected, "{world:?}, {former}, {mark:#x}");
            assert_eq!(out, frame);
        }
    }
}
