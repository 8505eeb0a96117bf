//! What user space is told of bindings that begin and end.

use landfall_core::replication::Change as Told;
use landfall_ebpf_common::egress::binding::Times;
use landfall_ebpf_common::egress::copies::ROOM;
use tokio::sync::mpsc;

use super::super::super::egress::Changes;
use super::copies::binding;
use super::life::{SHORT, forever, wait};
use super::*;
use crate::replication::Happened;

impl Gate {
    /// As one that somebody listens to.
    fn telling(times: Times) -> Self {
        let mut gate = Self::with(&mk_egress(), times, 0);
        gate.maps.tell().expect("the map takes it");
        gate
    }

    fn told(&mut self) -> Vec<Told> {
        self.changes().read(usize::MAX)
    }

    fn changes(&mut self) -> &mut Source {
        self.changes.as_mut().expect("nobody else reads it")
    }
}

#[test]
fn each_beginning_and_each_end_is_told() {
    for world in WORLDS {
        let times = Times {
            datagram: SHORT,
            rest: SHORT,
            ..forever()
        };
        let mut gate = Gate::telling(times);
        let first = binding(world, world.pod, 40_000, 40_000);
        gate.handshake(world, world.pod, 40_000);
        assert_eq!(gate.told(), [Told::New(first)]);
        // The same flow says nothing new.
        assert_eq!(gate.port_of(world, world.pod, 40_000), Some(40_000));
        assert_eq!(gate.told(), []);
        gate.close(world, world.pod, 40_000);
        assert_eq!(gate.told(), [Told::Closed(first)]);
        // The same pod, and, after its rest, another: the port changes hands.
        gate.handshake(world, world.pod, 40_000);
        gate.close(world, world.pod, 40_000);
        assert_eq!(gate.told(), [Told::New(first), Told::Closed(first)]);
        wait();
        let second = binding(world, world.friend, 40_000, 40_000);
        gate.handshake(world, world.friend, 40_000);
        assert_eq!(gate.told(), [Told::New(second)]);
        // One that has to have another port.
        let port = gate.port_of(world, world.pod, 40_000).expect("one is free");
        let third = binding(world, world.pod, 40_000, port);
        assert_eq!(gate.told(), [Told::New(third)]);
        // What is idle ends by the keeper; that its port has rested is nobody's concern.
        let frame = mk_udp(40_002, 53, b"x");
        let frame = mk(OTHER, world.pod, world.remote, 17, 64, &frame);
        assert_eq!(gate.comes(&frame).0, SENT);
        let mut datagrams = binding(world, world.pod, 40_002, 40_002);
        datagrams.protocol = 17;
        datagrams.remote.set_port(53);
        assert_eq!(gate.told(), [Told::New(datagrams)]);
        wait();
        gate.keep();
        assert_eq!(gate.told(), [Told::Closed(datagrams)]);
        wait();
        gate.keep();
        assert_eq!(gate.told(), []);
        // And what ends with its pod.
        let mut egress = mk_egress();
        egress.pods.remove(&world.friend);
        gate.set(&egress);
        assert_eq!(gate.told(), [Told::Closed(second)]);
    }
}

/// Whoever takes over hears nothing of what ends a flow that was reset: it has ended for them, unless it goes on.
#[test]
fn what_is_reset_has_ended_for_others_unless_it_goes_on() {
    for world in WORLDS {
        let mut gate = Gate::telling(forever());
        let flow = binding(world, world.pod, 40_000, 40_000);
        gate.handshake(world, world.pod, 40_000);
        assert_eq!(gate.told(), [Told::New(flow)]);
        for by_pod in [true, false] {
            for _ in 0..2 {
                if by_pod {
                    gate.out(world, world.pod, 40_000, RST);
                } else {
                    gate.back(world, 40_000, RST);
                }
            }
            assert_eq!(gate.told(), [Told::Closed(flow)]);
            assert_eq!((gate.held(world.egress).len(), gate.used("mail")), (0, 1));
            gate.out(world, world.pod, 40_000, ACK);
            gate.back(world, 40_000, ACK);
            assert_eq!(gate.told(), [Told::New(flow)]);
            assert_eq!(gate.held(world.egress), [flow].into());
        }
        // The next of the same name is one like any other.
        gate.back(world, 40_000, RST | ACK);
        gate.handshake(world, world.pod, 40_000);
        assert_eq!(gate.told(), [Told::Closed(flow), Told::New(flow)]);
        gate.close(world, world.pod, 40_000);
        assert_eq!(gate.told(), [Told::Closed(flow)]);
    }
}

#[test]
fn echo_has_its_identifier_in_place_of_ports() {
    for world in WORLDS {
        let mut gate = Gate::telling(forever());
        let echo = mk_echo(world.pod, true, 40_003, b"x");
        let frame = mk(OTHER, world.pod, world.remote, icmp(world.pod), 64, &echo);
        assert_eq!(gate.comes(&frame).0, SENT);
        let mut echo = binding(world, world.pod, 40_003, 40_003);
        echo.protocol = icmp(world.pod);
        echo.remote.set_port(0);
        assert_eq!(gate.told(), [Told::New(echo)]);
    }
}

#[test]
fn nobody_is_told_who_does_not_ask() {
    let [world, _] = WORLDS;
    let mut gate = Gate::load();
    gate.handshake(world, world.pod, 40_000);
    gate.close(world, world.pod, 40_000);
    assert_eq!(gate.told(), []);
    assert_eq!(gate.count(Reason::Untold), 0);
}

/// Flows that begin, each to another port of the remote.
fn many(gate: &mut Gate, world: World, count: u32) {
    for number in 0..count {
        let to = u16::try_from(number % 60_000 + 1).expect("a port");
        let payload = mk_tcp(40_000, to, SYN);
        let frame = mk(OTHER, world.pod, world.remote, 6, 64, &payload);
        assert_eq!(gate.comes(&frame).0, SENT);
    }
}

#[test]
fn what_finds_no_room_is_counted() {
    let [world, _] = WORLDS;
    let mut gate = Gate::telling(forever());
    assert!(!gate.changes().has_lost());
    let fit = ROOM / 64 - 1;
    many(&mut gate, world, fit + 100);
    assert_eq!(gate.count(Reason::Untold), 100);
    assert!(gate.changes().has_lost() && !gate.changes().has_lost());
    assert_eq!(gate.told().len(), fit as usize);
    // There is room again.
    gate.handshake(world, world.pod, 41_000);
    assert_eq!(gate.told().len(), 1);
    assert!(!gate.changes().has_lost());
}

/// Through the thread that reads: who listens hears first that something was missed, and again when something was.
#[test]
fn who_listens_hears_what_was_missed() {
    let [world, _] = WORLDS;
    let mut gate = Gate::telling(forever());
    let fit = ROOM / 64 - 1;
    many(&mut gate, world, fit);
    let (to, mut told) = mpsc::channel(1);
    let source = gate.changes.take().expect("it is there");
    let reader = Changes::start(source, move || Some(to.clone()));
    assert_eq!(told.blocking_recv(), Some(Happened::Lost));
    let mut seen = 0;
    let mut next = |seen: &mut usize| match told.blocking_recv() {
        Some(Happened::Changes(changes)) => {
            *seen += changes.len();
            false
        }
        Some(Happened::Lost) => true,
        None => panic!("the reader has ended"),
    };
    while seen < fit as usize {
        assert!(!next(&mut seen));
    }
    // Nobody takes what is read: the ring fills, and more is not told.
    for number in 0..3 * fit {
        let to = u16::try_from(number % 60_000 + 1).expect("a port");
        let from = u16::try_from(41_000 + number / 60_000).expect("a port");
        let payload = mk_tcp(from, to, SYN);
        let frame = mk(OTHER, world.pod, world.remote, 6, 64, &payload);
        assert_eq!(gate.comes(&frame).0, SENT);
    }
    let untold = gate.count(Reason::Untold);
    assert!(untold > 0);
    let all = u64::from(4 * fit) - untold;
    let mut lost = false;
    while (seen as u64) < all || !lost {
        lost |= next(&mut seen);
    }
    assert_eq!(seen as u64, all);
    drop(reader);
}
