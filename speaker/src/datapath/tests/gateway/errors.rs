//! ICMP errors about flows, both ways: what they quote is translated too.

use super::*;

/// An ICMP error that quotes a packet.
pub(super) fn mk_error(mac: [u8; 6], from: IpAddr, to: IpAddr, packet: &[u8]) -> Vec<u8> {
    let kind = if from.is_ipv4() { [3, 1] } else { [1, 3] };
    let mut message = kind.to_vec();
    message.extend([0, 0, 0, 0, 0, 0]);
    message.extend(packet);
    mk(mac, from, to, icmp(from), 60, &message)
}

/// A packet with its checksums right.
fn packet(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    mk_ip(from, to, protocol, 55, &sealed(from, to, protocol, payload))
}

#[test]
fn errors_come_to_the_pod_that_they_are_about() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let router = if world.pod.is_ipv4() {
            v4(203, 0, 113, 1)
        } else {
            v6(0x2001, 0xdba, 1)
        };
        // The friend's port is another outside.
        let _ = gate.port_of(world, world.pod, 40_000);
        let tcp = gate
            .port_of(world, world.friend, 40_000)
            .expect("there are many");
        for pod in [world.pod, world.friend] {
            for (protocol, payload) in [
                (17, mk_udp(40_000, 53, b"question")),
                (icmp(pod), mk_echo(pod, true, 40_000, b"ping")),
            ] {
                let sent = mk(OTHER, pod, world.remote, protocol, 64, &payload);
                let (action, out) = gate.comes(&sent);
                assert_eq!(action, SENT);
                // What the router saw, and what the pod is to see quoted.
                for from in [router, world.remote] {
                    let frame = mk_error(STRANGER, from, world.egress, &out[14..]);
                    let (action, told) = gate.comes(&frame);
                    assert_eq!(action, SENT, "{world:?} {protocol}");
                    assert_eq!((source(&told), destination(&told)), (from, pod));
                    assert!(is_right(&told), "{world:?} {protocol}");
                    let quoted = &told[transport(&told) + 8..];
                    let mut expected = sent[14..].to_vec();
                    // On its way it had lost one.
                    if pod.is_ipv4() {
                        expected[8] -= 1;
                        repair(&mut expected[..20]);
                    } else {
                        expected[7] -= 1;
                    }
                    assert_eq!(*quoted, expected, "{world:?} {protocol}");
                }
            }
        }
        let quoted = packet(world.egress, world.remote, 6, &mk_tcp(tcp, 443, SYN));
        for length in [quoted.len() - 12, quoted.len() - 2, quoted.len()] {
            let frame = mk_error(STRANGER, router, world.egress, &quoted[..length]);
            let (action, told) = gate.comes(&frame);
            assert_eq!(
                (action, destination(&told)),
                (SENT, world.friend),
                "{length}"
            );
            assert!(is_right(&told), "{length}");
            let expected = packet(world.friend, world.remote, 6, &mk_tcp(40_000, 443, SYN));
            let at = transport(&told) + 8;
            let header = if world.pod.is_ipv4() { 20 } else { 40 };
            assert_eq!(told[at..at + header + 8], expected[..header + 8]);
        }
    }
}

#[test]
fn errors_go_to_the_remote_that_they_are_about() {
    let mut gate = Gate::load();
    for world in WORLDS {
        for pod in [world.pod, world.friend] {
            let sent = mk(
                OTHER,
                pod,
                world.remote,
                17,
                64,
                &mk_udp(40_000, 53, b"question"),
            );
            let (_, out) = gate.comes(&sent);
            let (port, _) = ports(&out);
            let came = packet(world.remote, pod, 17, &mk_udp(53, 40_000, b"answer"));
            let frame = mk_error(OTHER, pod, world.remote, &came);
            let (action, told) = gate.comes(&frame);
            assert_eq!(action, SENT);
            assert_eq!(
                (source(&told), destination(&told)),
                (world.egress, world.remote)
            );
            assert!(is_right(&told));
            let expected = packet(world.remote, world.egress, 17, &mk_udp(53, port, b"answer"));
            assert_eq!(told[transport(&told) + 8..], expected);
            // About a flow that is not there.
            let other = packet(world.remote, pod, 17, &mk_udp(53, 40_001, b"answer"));
            gate.drops(&mk_error(OTHER, pod, world.remote, &other), Reason::Unknown);
            // About a packet that another would have got: nobody can speak for it.
            let forged = packet(
                world.remote,
                world.local,
                17,
                &mk_udp(53, 40_000, b"answer"),
            );
            gate.drops(
                &mk_error(OTHER, pod, world.remote, &forged),
                Reason::Unreadable,
            );
        }
    }
}

#[test]
fn errors_about_nothing_are_dropped() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let about = packet(world.egress, world.remote, 17, &mk_udp(40_000, 53, b"x"));
        gate.drops(
            &mk_error(STRANGER, world.remote, world.egress, &about),
            Reason::Unbound,
        );
        // About what a Service has answered: its own.
        let about = packet(world.egress, world.remote, 6, &mk_tcp(25, 443, ACK));
        gate.passes(&mk_error(STRANGER, world.remote, world.egress, &about));
        let whole = mk_error(STRANGER, world.remote, world.egress, &about);
        let least = transport(&whole) + 8;
        for length in least..least + 20 {
            gate.drops(&whole[..length], Reason::Unbound);
        }
    }
}
