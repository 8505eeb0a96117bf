//! What is nobody's, somebody else's, or claims to be what it is not.

use super::*;

#[test]
fn what_no_pod_sends_is_left_alone() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let unknown = if world.pod.is_ipv4() {
            v4(10, 1, 0, 99)
        } else {
            v6(0xfd01, 1, 99)
        };
        let syn = mk_tcp(40_000, 443, SYN);
        gate.passes(&mk(OTHER, unknown, world.remote, 6, 64, &syn));
        // Inside the cluster, and to a VIP.
        gate.passes(&mk(OTHER, world.pod, world.local, 6, 64, &syn));
        gate.passes(&mk(
            OTHER,
            world.pod,
            world.egress,
            6,
            64,
            &mk_tcp(1, 25, SYN),
        ));
        let to_node = if world.pod.is_ipv4() {
            world.own
        } else {
            unknown
        };
        gate.passes(&mk(OTHER, world.pod, to_node, 6, 64, &syn));
        // Of this node's pods: whose gateway is another node, and whose is none.
        let (action, _) = gate.leaves(&mk(OWN, world.away, world.remote, 6, 63, &syn));
        assert_eq!(action, NEXT);
        let (action, _) = gate.leaves(&mk(OWN, unknown, world.remote, 6, 63, &syn));
        assert_eq!(action, NEXT);
    }
    assert_eq!(gate.count(Reason::Bound), 0);
}

/// A pod's address is taken from its own node only.
#[test]
fn forged_sources_get_nothing() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let syn = mk_tcp(40_000, 443, SYN);
        gate.drops(
            &mk(STRANGER, world.pod, world.remote, 6, 64, &syn),
            Reason::Forged,
        );
        // One of this node's own, from outside.
        gate.drops(
            &mk(OTHER, world.local, world.remote, 6, 64, &syn),
            Reason::Forged,
        );
        // Also where there is a binding.
        assert_eq!(
            gate.comes(&mk(OTHER, world.pod, world.remote, 6, 64, &syn))
                .0,
            SENT
        );
        gate.drops(
            &mk(STRANGER, world.pod, world.remote, 6, 64, &syn),
            Reason::Forged,
        );
        let data = mk_tcp(40_000, 443, ACK);
        gate.drops(
            &mk(STRANGER, world.pod, world.remote, 6, 64, &data),
            Reason::Forged,
        );
    }
}

#[test]
fn without_a_binding_nothing_comes_in() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let to = |payload: &[u8], protocol: u8, at: IpAddr| {
            mk(STRANGER, world.remote, at, protocol, 64, payload)
        };
        let served = to(&mk_tcp(443, 25, ACK), 6, world.egress);
        gate.passes(&served);
        // The address is a Service's: what asks for a port that is none's is refused elsewhere.
        let refused = to(&mk_tcp(443, 40_000, SYN), 6, world.egress);
        gate.passes(&refused);
        let silent = [
            to(&mk_tcp(443, 40_000, ACK), 6, world.egress),
            to(&mk_tcp(443, 40_000, SYN | ACK), 6, world.egress),
            to(&mk_udp(53, 40_000, b"x"), 17, world.egress),
            to(
                &mk_echo(world.egress, false, 7, b"x"),
                icmp(world.egress),
                world.egress,
            ),
            // This one is no Service's.
            to(&mk_tcp(443, 25, SYN), 6, world.second),
            to(&mk_udp(53, 40_000, b"x"), 17, world.second),
        ];
        let asks = to(
            &mk_echo(world.egress, true, 7, b"x"),
            icmp(world.egress),
            world.egress,
        );
        for frame in &silent {
            gate.drops(frame, Reason::Unbound);
        }
        gate.passes(&asks);
    }
}

/// An address that policies alone have is a VIP too: what asks for a connection is refused elsewhere, and of all else nobody
/// says anything, since it may belong to a flow that is not known here yet. Steered or not.
#[test]
fn an_address_of_policies_alone_answers_a_syn_only() {
    for steer in [true, false] {
        let mut gate = Gate::load();
        for world in WORLDS {
            let state = VipState {
                steer,
                udp_port: None,
            };
            gate.change(&Change::Vip(world.second, Some(state)));
            let to = |payload: &[u8], protocol: u8| {
                mk(STRANGER, world.remote, world.second, protocol, 64, payload)
            };
            gate.passes(&to(&mk_tcp(443, 25, SYN), 6));
            for flags in [ACK, RST, FIN | ACK, SYN | ACK] {
                gate.drops(&to(&mk_tcp(443, 25, flags), 6), Reason::Unbound);
            }
            gate.drops(&to(&mk_udp(53, 40_000, b"x"), 17), Reason::Unbound);
        }
    }
}

/// Each part of a flow's name counts: another remote, another port of it, another protocol.
#[test]
fn a_binding_is_for_one_remote_only() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let syn = segment(world, world.pod, 40_000, SYN);
        assert_eq!(gate.comes(&syn).0, SENT);
        let elsewhere = if world.pod.is_ipv4() {
            v4(198, 51, 100, 8)
        } else {
            v6(0x2001, 0xdb9, 8)
        };
        let frames = [
            mk(
                STRANGER,
                elsewhere,
                world.egress,
                6,
                64,
                &mk_tcp(443, 40_000, ACK),
            ),
            mk(
                STRANGER,
                world.remote,
                world.egress,
                6,
                64,
                &mk_tcp(444, 40_000, ACK),
            ),
            mk(
                STRANGER,
                world.remote,
                world.egress,
                6,
                64,
                &mk_tcp(443, 40_001, ACK),
            ),
            mk(
                STRANGER,
                world.remote,
                world.egress,
                17,
                64,
                &mk_udp(443, 40_000, b"x"),
            ),
            mk(
                STRANGER,
                world.remote,
                world.second,
                6,
                64,
                &mk_tcp(443, 40_000, ACK),
            ),
        ];
        for frame in frames {
            gate.drops(&frame, Reason::Unbound);
        }
    }
}

#[test]
fn connections_that_nobody_knows_are_not_taken_up() {
    let mut gate = Gate::load();
    for world in WORLDS {
        for flags in [ACK, RST, FIN | ACK, SYN | ACK, SYN | RST, SYN | FIN] {
            let frame = segment(world, world.pod, 40_000, flags);
            gate.drops(&frame, Reason::Unknown);
        }
        let reply = mk_echo(world.remote, false, 7, b"x");
        let frame = mk(
            OTHER,
            world.pod,
            world.remote,
            icmp(world.remote),
            64,
            &reply,
        );
        gate.drops(&frame, Reason::Unknown);
        let frame = mk(OTHER, world.pod, world.remote, 132, 64, &[0; 12]);
        gate.drops(&frame, Reason::Unknown);
        let frame = mk_frame_from(
            OTHER,
            ethertype(world.pod),
            &mk_ip(world.pod, world.remote, 47, 64, &[0; 12]),
        );
        gate.drops(&frame, Reason::Unreadable);
    }
    assert_eq!(gate.count(Reason::Bound), 0);
}

/// However a tenant's packet is cut or bent, it does not leave with the pod's address.
#[test]
fn hostile_packets_do_not_get_through() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let wholes = [
            segment(world, world.pod, 40_000, SYN),
            mk(
                OTHER,
                world.pod,
                world.remote,
                17,
                64,
                &mk_udp(40_000, 53, &[1; 30]),
            ),
            mk(
                OTHER,
                world.pod,
                world.remote,
                icmp(world.remote),
                64,
                &mk_echo(world.remote, true, 9, &[1; 30]),
            ),
        ];
        for whole in wholes {
            let header = transport(&whole);
            for length in header..=whole.len() {
                let (action, out) = gate.comes(&whole[..length]);
                let hidden = action == SENT && source(&out) == world.egress;
                assert!(action == DROPPED || hidden, "{length}: {action}");
            }
            // Every byte of the headers, bent.
            for at in 14..header + 8 {
                for bend in [0x01, 0x80, 0xff] {
                    let mut bent = whole.clone();
                    bent[at] ^= bend;
                    let (action, out) = gate.comes(&bent);
                    let is_pod = source(&bent) == world.pod;
                    let inside = {
                        let to = destination(&bent);
                        let of_us = ["10.0.0.0/8", "fd00::/8"]
                            .iter()
                            .any(|net| net.parse::<ipnet::IpNet>().unwrap().contains(&to));
                        of_us || to == world.own
                    };
                    if action == NEXT {
                        // Not the pod's, or nothing that leaves.
                        assert!(!is_pod || inside, "{at} {bend:#x}");
                        assert_eq!(out, bent);
                    } else if action == SENT {
                        assert_ne!(source(&out), world.pod, "{at} {bend:#x}");
                    }
                }
            }
        }
    }
}

/// The mark says what of a pod's packets is to leave by another address: answers are not.
#[test]
fn the_mark_decides_for_this_nodes_pods() {
    let mut gate = Gate::with(&mk_egress(), Times::default(), 0x3000_0000);
    for world in WORLDS {
        let frame = mk(
            OWN,
            world.local,
            world.remote,
            6,
            63,
            &mk_tcp(40_000, 443, SYN),
        );
        for mark in [0, 0x1000_0000, 0x2000_0000] {
            let (action, out, _) = gate.run(GATEWAY_EGRESS, &frame, mark);
            assert_eq!((action, out), (NEXT, frame.clone()), "{mark:#x}");
        }
        let (action, out, _) = gate.run(GATEWAY_EGRESS, &frame, 0x3000_0001);
        assert_eq!((action, source(&out)), (NEXT, world.egress));
    }
}

/// What a pod's gateway sends it is marked; what others send it is not.
#[test]
fn answers_of_another_gateway_are_marked() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let answer = mk_tcp(443, 40_000, ACK);
        let frame = mk(OTHER, world.remote, world.away, 6, 60, &answer);
        assert_eq!(gate.run(GATEWAY_INGRESS, &frame, 1), (NEXT, frame, 0x4001));
        let frame = mk(STRANGER, world.remote, world.away, 6, 60, &answer);
        assert_eq!(gate.run(GATEWAY_INGRESS, &frame, 1), (NEXT, frame, 1));
        let frame = mk(OTHER, world.remote, world.local, 6, 60, &answer);
        assert_eq!(gate.run(GATEWAY_INGRESS, &frame, 1), (NEXT, frame, 1));
    }
}

/// Who looks whether an egress address is still where it was is answered by the announcer.
#[test]
fn neighbour_discovery_passes() {
    let mut gate = Gate::load();
    let [_, world] = WORLDS;
    for kind in 133..=137 {
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        message.extend([0; 24]);
        gate.passes(&mk(STRANGER, world.remote, world.egress, 58, 255, &message));
        gate.passes(&mk(STRANGER, world.remote, world.second, 58, 255, &message));
    }
    let report = [131, 0, 0, 0, 0, 0, 0, 0];
    gate.drops(
        &mk(STRANGER, world.remote, world.second, 58, 1, &report),
        Reason::Unbound,
    );
}
