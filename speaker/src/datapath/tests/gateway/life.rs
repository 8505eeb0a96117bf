//! How long bindings live, and when a port may be used again.

use std::thread::sleep;
use std::time::Duration;

use landfall_ebpf_common::egress::binding::Times;

use super::*;

/// Nothing is ever due but by these: a few ticks of 17 ms.
pub(super) const SHORT: u32 = 12;
const LONG: u32 = 1 << 20;

pub(super) fn forever() -> Times {
    Times {
        established: LONG,
        copied: LONG,
        transitory: LONG,
        reset: LONG,
        datagram: LONG,
        echo: LONG,
        rest: LONG,
    }
}

pub(super) fn wait() {
    sleep(Duration::from_millis(17) * (SHORT + 4));
}

impl Gate {
    pub(super) fn out(&mut self, world: World, pod: IpAddr, port: u16, flags: u8) -> u32 {
        let frame = segment(world, pod, port, flags);
        self.comes(&frame).0
    }

    pub(super) fn back(&mut self, world: World, port: u16, flags: u8) -> u32 {
        let frame = mk(
            STRANGER,
            world.remote,
            world.egress,
            6,
            64,
            &mk_tcp(443, port, flags),
        );
        self.comes(&frame).0
    }

    pub(super) fn handshake(&mut self, world: World, pod: IpAddr, port: u16) {
        assert_eq!(self.port_of(world, pod, port), Some(port));
        assert_eq!(self.back(world, port, SYN | ACK), SENT);
        assert_eq!(self.out(world, pod, port, ACK), SENT);
    }

    pub(super) fn close(&mut self, world: World, pod: IpAddr, port: u16) {
        assert_eq!(self.out(world, pod, port, FIN | ACK), SENT);
        assert_eq!(self.back(world, port, FIN | ACK), SENT);
    }
}

#[test]
fn a_closed_port_is_its_pods_at_once_and_anothers_after_its_rest() {
    for world in WORLDS {
        let times = Times {
            rest: SHORT,
            ..forever()
        };
        let mut gate = Gate::with(&mk_egress(), times, 0);
        gate.handshake(world, world.pod, 40_000);
        gate.close(world, world.pod, 40_000);
        assert_eq!(gate.used("mail"), 0, "it counts for nobody while it rests");
        // What is late still passes, both ways.
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
        assert_eq!(gate.back(world, 40_000, FIN | ACK), SENT);
        // Another pod has another port; the pod the same, for a connection of the same name.
        assert_ne!(gate.port_of(world, world.friend, 40_000), Some(40_000));
        gate.handshake(world, world.pod, 40_000);
        assert_eq!(gate.used("mail"), 2);
        gate.close(world, world.pod, 40_000);
        wait();
        // The keeper has not come by: it is free all the same.
        let stranger = gate.port_of(world, world.local, 1);
        assert_eq!(stranger, None, "it is not the other node's pod");
        let fresh = mk(
            OWN,
            world.local,
            world.remote,
            6,
            63,
            &mk_tcp(40_000, 443, SYN),
        );
        let (action, out) = gate.leaves(&fresh);
        assert_eq!((action, ports(&out).0), (NEXT, 40_000));
        // The flow before is no more.
        gate.drops(&segment(world, world.pod, 40_000, ACK), Reason::Unknown);
        let back = mk(
            STRANGER,
            world.remote,
            world.egress,
            6,
            64,
            &mk_tcp(443, 40_000, ACK),
        );
        assert_eq!(destination(&gate.comes(&back).1), world.local);
    }
}

#[test]
fn flows_end_with_their_pod_and_not_with_its_policy() {
    for world in WORLDS {
        let mut gate = Gate::with(&mk_egress(), forever(), 0);
        gate.handshake(world, world.pod, 40_000);
        gate.handshake(world, world.friend, 40_001);
        // The same pod, by another address from now on: what has begun goes on as it did.
        let mut egress = mk_egress();
        egress
            .pods
            .insert(world.pod, mk_pod("other", "shop", world.second));
        gate.set(&egress);
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
        assert_eq!(gate.back(world, 40_000, ACK), SENT);
        assert_eq!((gate.used("mail"), gate.used("shop")), (2, 0));
        // Another pod has its address: it goes on with nothing, and nothing that is late reaches it.
        let other = Pod {
            identity: 2,
            ..mk_pod("other", "shop", world.second)
        };
        egress.pods.insert(world.pod, other);
        gate.set(&egress);
        assert_eq!((gate.used("mail"), gate.used("shop")), (1, 0));
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), DROPPED);
        assert_eq!(gate.back(world, 40_000, ACK), DROPPED);
        // Of the same ports it begins by its own address.
        assert_eq!(gate.out(world, world.pod, 40_000, SYN), SENT);
        assert_eq!((gate.used("mail"), gate.used("shop")), (1, 1));
        // One that is gone for good, and the policies with all that leaves by them.
        egress.pods.remove(&world.friend);
        gate.set(&egress);
        assert_eq!((gate.used("mail"), gate.used("shop")), (0, 1));
        gate.set(&Egress::default());
        assert_eq!(gate.used("shop"), 0);
    }
}

/// The port that a flow had is given back when it has rested, and not what its pod has begun since: by another address, from
/// and to the same ports.
#[test]
fn what_a_pod_begins_by_another_address_outlives_the_rest_of_the_last() {
    for world in WORLDS {
        let times = Times {
            rest: SHORT,
            ..forever()
        };
        for by_the_next in [false, true] {
            let mut gate = Gate::with(&mk_egress(), times, 0);
            gate.handshake(world, world.pod, 40_000);
            gate.close(world, world.pod, 40_000);
            let mut egress = mk_egress();
            egress
                .pods
                .insert(world.pod, mk_pod("other", "shop", world.second));
            gate.set(&egress);
            let (action, out) = gate.comes(&segment(world, world.pod, 40_000, SYN));
            assert_eq!(
                (action, source(&out), ports(&out).0),
                (SENT, world.second, 40_000)
            );
            let is_live = |gate: &mut Gate| {
                let (action, out) = gate.comes(&segment(world, world.pod, 40_000, ACK));
                (action, source(&out)) == (SENT, world.second)
            };
            wait();
            if by_the_next {
                assert_eq!(gate.port_of(world, world.friend, 40_000), Some(40_000));
            } else {
                gate.keep();
            }
            assert!(is_live(&mut gate), "{world:?}");
            assert_eq!(gate.used("shop"), 1);
        }
    }
}

/// What the last pod with an address had is nobody's, and rests all the same before another pod has its port.
#[test]
fn the_ports_of_pods_that_are_gone_rest() {
    for world in WORLDS {
        let times = Times {
            rest: SHORT,
            ..forever()
        };
        let mut gate = Gate::with(&mk_egress(), times, 0);
        gate.handshake(world, world.pod, 40_000);
        gate.handshake(world, world.pod, 40_001);
        gate.close(world, world.pod, 40_001);
        let mut egress = mk_egress();
        egress.pods.remove(&world.pod);
        gate.set(&egress);
        for port in [40_000, 40_001] {
            assert_ne!(gate.back(world, port, ACK), SENT, "{port} is nobody's");
            let other = gate.port_of(world, world.friend, port);
            assert!(other.is_some_and(|other| other != port), "{other:?}");
        }
        wait();
        for port in [40_000, 40_001] {
            let other = gate.port_of(world, world.friend, port + 10);
            assert_eq!(other, Some(port + 10));
            gate.keep();
        }
        assert_eq!(gate.port_of(world, world.local, 1), None, "as above");
        let mut egress = mk_egress();
        egress.pods.remove(&world.friend);
        gate.set(&egress);
        assert_eq!(gate.port_of(world, world.pod, 40_000), Some(40_000));
        assert_eq!(gate.used("mail"), 1);
    }
}

/// Pods that are gone may go on sending until the maps know: what they begin by then is not what goes on.
#[test]
fn nothing_begins_while_flows_are_ended() {
    for world in WORLDS {
        let syn = |gate: &mut Gate| gate.port_of(world, world.pod, 40_000);
        // The policy goes.
        let mut gate = Gate::with(&mk_egress(), forever(), 0);
        gate.handshake(world, world.pod, 40_000);
        let mut egress = mk_egress();
        egress.policies.remove("mail");
        for pod in [world.pod, world.friend, world.local] {
            egress.pods.remove(&pod);
        }
        let began = |gate: &mut Gate| assert!(syn(gate).is_some(), "too early for this test");
        gate.set_there(&egress, &mk_around(), began, |_| {});
        assert_ne!(gate.out(world, world.pod, 40_000, ACK), SENT);
        // Another policy's pod has the address, by this gateway: what it has begun goes on.
        let mut gate = Gate::with(&mk_egress(), forever(), 0);
        let mut egress = mk_egress();
        let other = Pod {
            identity: 2,
            ..mk_pod("other", "shop", world.second)
        };
        egress.pods.insert(world.pod, other);
        let begins = |gate: &mut Gate| {
            let (action, out) = gate.comes(&segment(world, world.pod, 40_001, SYN));
            assert_eq!((action, source(&out)), (SENT, world.second));
        };
        gate.set_there(&egress, &mk_around(), began, begins);
        assert_ne!(gate.out(world, world.pod, 40_000, ACK), SENT);
        let (action, out) = gate.comes(&segment(world, world.pod, 40_001, ACK));
        assert_eq!((action, source(&out)), (SENT, world.second));
        assert_eq!((gate.used("mail"), gate.used("shop")), (0, 1));
    }
}

/// A node that loses its place on the segment is reached by the tunnel, and back: its pods' flows go on, and what forges
/// them gets nothing.
#[test]
fn flows_go_on_by_whatever_way_their_node_is_reached() {
    const TUNNEL: u32 = 2;
    const FAR: [u8; 6] = [2, 0, 0, 0, 7, 7];
    let near = mk_around();
    let mut far = mk_around();
    let uplink = far.uplinks[&INTERFACE].clone();
    far.uplinks.insert(TUNNEL, uplink);
    far.tunnel = Some(TUNNEL);
    let id = PeerId {
        node: "other".into(),
        interface: TUNNEL,
    };
    let peer = Peer {
        mac: FAR,
        address: Some(v4(192, 0, 2, 12)),
    };
    far.peers = BTreeMap::from([(id, peer)]);
    for world in WORLDS {
        let mut gate = Gate::with(&mk_egress(), forever(), 0);
        gate.handshake(world, world.pod, 40_000);
        let data = |mac| {
            let tcp = mk_tcp(40_000, 443, ACK);
            mk(mac, world.pod, world.remote, 6, 64, &tcp)
        };
        for (around, right, wrong) in [(&far, FAR, OTHER), (&near, OTHER, FAR), (&far, FAR, OTHER)]
        {
            gate.set_there(&mk_egress(), around, |_| {}, |_| {});
            let (action, out) = gate.comes(&data(right));
            assert_eq!((action, source(&out)), (SENT, world.egress));
            gate.drops(&data(wrong), Reason::Forged);
            // Back, too; what begins now and before takes the same way.
            let (action, out) = gate.comes(&mk(
                STRANGER,
                world.remote,
                world.egress,
                6,
                64,
                &mk_tcp(443, 40_000, ACK),
            ));
            assert_eq!((action, &out[..6]), (SENT, &right[..]));
        }
        assert_eq!(gate.used("mail"), 1);
    }
}

#[test]
fn the_keeper_ends_what_is_idle_and_gives_back_what_has_rested() {
    for world in WORLDS {
        let times = Times {
            transitory: SHORT,
            datagram: SHORT,
            echo: SHORT,
            rest: SHORT,
            ..forever()
        };
        let mut gate = Gate::with(&mk_egress(), times, 0);
        gate.handshake(world, world.pod, 40_000);
        assert!(
            gate.port_of(world, world.pod, 40_001).is_some(),
            "half open"
        );
        for (protocol, payload) in [
            (17, mk_udp(40_002, 53, b"x")),
            (icmp(world.pod), mk_echo(world.pod, true, 40_003, b"x")),
        ] {
            let frame = mk(OTHER, world.pod, world.remote, protocol, 64, &payload);
            assert_eq!(gate.comes(&frame).0, SENT);
        }
        assert_eq!((gate.keep(), gate.used("mail")), (4, 4));
        assert_eq!(gate.count(Reason::Ended), 0);
        wait();
        gate.keep();
        assert_eq!((gate.used("mail"), gate.count(Reason::Ended)), (1, 3));
        // They rest: what comes for them is still the pod's, what the pod sends begins anew.
        assert_eq!(gate.keep(), 4);
        wait();
        gate.keep();
        assert_eq!(gate.keep(), 1, "the open one");
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
        gate.drops(
            &mk(
                STRANGER,
                world.remote,
                world.egress,
                17,
                64,
                &mk_udp(53, 40_002, b"x"),
            ),
            Reason::Unbound,
        );
    }
}

/// A look names what the remote has been silent about; what the pod sends keeps it alive.
#[test]
fn either_side_keeps_a_flow_alive() {
    let [world, _] = WORLDS;
    let times = Times {
        // More than the second in which the time is not written anew.
        datagram: 90,
        ..forever()
    };
    let mut gate = Gate::with(&mk_egress(), times, 0);
    let frame = mk(
        OTHER,
        world.pod,
        world.remote,
        17,
        64,
        &mk_udp(40_002, 53, b"x"),
    );
    for _ in 0..5 {
        assert_eq!(gate.comes(&frame).0, SENT);
        sleep(Duration::from_millis(600));
        gate.keep();
    }
    assert_eq!((gate.used("mail"), gate.count(Reason::Bound)), (1, 1));
    sleep(Duration::from_millis(2700));
    gate.keep();
    assert_eq!(gate.used("mail"), 0);
}

/// A reset ends a flow after a while, unless its ends go on.
#[test]
fn a_reset_is_not_the_end() {
    for world in WORLDS {
        let times = Times {
            reset: SHORT,
            ..forever()
        };
        let mut gate = Gate::with(&mk_egress(), times, 0);
        gate.handshake(world, world.pod, 40_000);
        assert_eq!(gate.back(world, 40_000, RST), SENT);
        // The pod did not take it for valid.
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
        wait();
        gate.keep();
        assert_eq!(gate.used("mail"), 1);

        // In the middle of a handshake: the remote's old connection is acknowledged, the pod resets it, and tries again.
        assert_eq!(gate.port_of(world, world.pod, 40_001), Some(40_001));
        assert_eq!(gate.back(world, 40_001, ACK), SENT);
        assert_eq!(gate.out(world, world.pod, 40_001, RST), SENT);
        assert_eq!(gate.port_of(world, world.pod, 40_001), Some(40_001));
        wait();
        gate.keep();
        assert_eq!(gate.used("mail"), 2);
        assert_eq!(gate.back(world, 40_001, SYN | ACK), SENT);
        assert_eq!(gate.out(world, world.pod, 40_001, ACK), SENT);

        assert_eq!(gate.out(world, world.pod, 40_001, RST), SENT);
        gate.keep();
        assert_eq!(gate.used("mail"), 2, "not at once");
        wait();
        gate.keep();
        assert_eq!(gate.used("mail"), 1);
    }
}

/// The pod of a policy that is gone.
fn nobodys(pod: &Pod) -> Pod {
    Pod {
        tenant: None,
        ..pod.clone()
    }
}

/// What is left of a policy that is gone, as long as its flows go on.
pub(super) fn gone(world: World) -> Policy {
    let gateway = mk_policy("here").gateway;
    Policy::gone([world.egress].into(), gateway)
}

/// A policy that goes takes no flow with it, until it is known no more.
#[test]
fn flows_outlive_what_made_them() {
    for world in WORLDS {
        let mut gate = Gate::load();
        gate.handshake(world, world.pod, 40_000);
        let mut egress = mk_egress();
        let pod = nobodys(&egress.pods[&world.pod]);
        egress.pods.insert(world.pod, pod);
        egress.policies.insert("mail".into(), gone(world));
        gate.set(&egress);
        gate.keep();
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
        assert_eq!(gate.back(world, 40_000, ACK), SENT);
        gate.passes(&segment(world, world.pod, 40_001, SYN));
        // Another's tenant meanwhile: what begins is that one's.
        let shops = mk_pod("other", "shop", world.second);
        egress.pods.insert(world.pod, shops);
        gate.set(&egress);
        assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
        assert_eq!(gate.out(world, world.pod, 40_001, SYN), SENT);
        assert_eq!((gate.used("mail"), gate.used("shop")), (1, 1));
        egress.policies.remove("mail");
        gate.set(&egress);
        assert_eq!((gate.used("mail"), gate.used("shop")), (0, 1));
        assert_ne!(gate.back(world, 40_000, ACK), SENT);
    }
}

/// Policies come and go, more than there are numbers: none is kept by one that is gone, unless a flow still has it.
#[test]
fn numbers_are_used_again() {
    const MANY: usize = 5_000;
    let [world, _] = WORLDS;
    let mut gate = Gate::load();
    gate.handshake(world, world.pod, 40_000);
    let mut egress = mk_egress();
    egress.pods = egress
        .pods
        .iter()
        .map(|(address, pod)| (*address, nobodys(pod)))
        .collect();
    egress.policies.clear();
    for number in 0..MANY {
        egress.policies = BTreeMap::from([
            (format!("policy-{number}").into(), mk_policy("here")),
            ("mail".into(), gone(world)),
        ]);
        gate.set(&egress);
        if number % 500 == 0 {
            gate.keep();
        }
    }
    gate.keep();
    // The flow's own policy is what it was.
    assert_eq!(gate.out(world, world.pod, 40_000, ACK), SENT);
    assert_eq!(gate.used("mail"), 1);
    gate.close(world, world.pod, 40_000);
    assert_eq!(gate.used("mail"), 0);
}
