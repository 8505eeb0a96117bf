//! What goes out, and what comes back.

use super::*;

/// A protocol's packets: from the pod's port, and back to this one.
fn kinds(world: World) -> [(u8, Vec<u8>, Vec<u8>); 3] {
    let at = world.remote;
    [
        (6, mk_tcp(40_000, 443, SYN), mk_tcp(443, 40_000, SYN | ACK)),
        (
            17,
            mk_udp(40_000, 53, b"question"),
            mk_udp(53, 40_000, b"answer"),
        ),
        (
            icmp(at),
            mk_echo(at, true, 40_000, b"ping"),
            mk_echo(at, false, 40_000, b"ping"),
        ),
    ]
}

#[test]
fn flows_of_other_nodes_pods_go_out_and_come_back() {
    let mut gate = Gate::load();
    for world in WORLDS {
        for (protocol, question, answer) in kinds(world) {
            let sent = mk(OTHER, world.pod, world.remote, protocol, 64, &question);
            let (action, out) = gate.comes(&sent);
            assert_eq!(action, SENT);
            // The port is the pod's own; nothing else changes but the address and the TTL.
            let expected = mk(OTHER, world.egress, world.remote, protocol, 63, &question);
            assert_eq!(out, expected, "{world:?} {protocol}");

            let back = mk(STRANGER, world.remote, world.egress, protocol, 57, &answer);
            let (action, out) = gate.comes(&back);
            assert_eq!(action, SENT);
            let mut expected = mk(OWN, world.remote, world.pod, protocol, 56, &answer);
            expected[..6].copy_from_slice(&OTHER);
            assert_eq!(out, expected, "{world:?} {protocol}");
        }
    }
    assert_eq!(gate.count(Reason::Bound), 6);
    assert_eq!((gate.count(Reason::Out), gate.count(Reason::In)), (6, 6));
    assert_eq!(gate.used("mail"), 6);
}

/// They pass the stack, which routes them and has lowered the TTL.
#[test]
fn flows_of_this_nodes_pods_are_translated_on_their_way() {
    let mut gate = Gate::load();
    for world in WORLDS {
        for (protocol, question, answer) in kinds(world) {
            let sent = mk(OWN, world.local, world.remote, protocol, 63, &question);
            let (action, out) = gate.leaves(&sent);
            assert_eq!(action, NEXT);
            let expected = mk(OWN, world.egress, world.remote, protocol, 63, &question);
            assert_eq!(out, expected, "{world:?} {protocol}");

            let back = mk(STRANGER, world.remote, world.egress, protocol, 57, &answer);
            let (action, out) = gate.comes(&back);
            assert_eq!(action, NEXT, "up the stack");
            let expected = mk(STRANGER, world.remote, world.local, protocol, 57, &answer);
            assert_eq!(out, expected, "{world:?} {protocol}");
        }
    }
}

#[test]
fn two_pods_on_one_port_are_told_apart() {
    let mut gate = Gate::load();
    for world in WORLDS {
        for (protocol, question, _) in kinds(world) {
            let sent = mk(OTHER, world.pod, world.remote, protocol, 64, &question);
            assert_eq!(gate.comes(&sent).0, SENT);
            let sent = mk(OTHER, world.friend, world.remote, protocol, 64, &question);
            let (action, out) = gate.comes(&sent);
            assert_eq!(action, SENT);
            assert!(is_right(&out), "{world:?} {protocol}");
            let at = transport(&out);
            let (port, answer) = if protocol == icmp(world.remote) {
                let identifier = u16::from_be_bytes([out[at + 4], out[at + 5]]);
                let answer = mk_echo(world.remote, false, identifier, b"ping");
                (identifier, answer)
            } else if protocol == 6 {
                (ports(&out).0, mk_tcp(443, ports(&out).0, SYN | ACK))
            } else {
                (ports(&out).0, mk_udp(53, ports(&out).0, b"answer"))
            };
            assert!(port >= 1024 && port != 40_000, "{port}");
            let back = mk(STRANGER, world.remote, world.egress, protocol, 64, &answer);
            let (action, out) = gate.comes(&back);
            assert_eq!((action, destination(&out)), (SENT, world.friend));
            assert!(is_right(&out), "{world:?} {protocol}");
            let at = transport(&out);
            let came = if protocol == icmp(world.remote) {
                u16::from_be_bytes([out[at + 4], out[at + 5]])
            } else {
                ports(&out).1
            };
            assert_eq!(came, 40_000);
        }
    }
}

/// A checksum that was wrong stays wrong, and one that is not there stays away.
#[test]
fn checksums_are_changed_and_never_mended() {
    let mut gate = Gate::load();
    let [world, _] = WORLDS;
    let mut wrong = segment(world, world.pod, 40_000, SYN);
    wrong[50] ^= 0x55;
    let (action, out) = gate.comes(&wrong);
    assert_eq!(action, SENT);
    assert!(!is_right(&out));
    let without = mk_frame_from(
        OTHER,
        0x0800,
        &mk_ip(world.pod, world.remote, 17, 64, &mk_udp(5000, 53, b"x")),
    );
    let (action, out) = gate.comes(&without);
    assert_eq!((action, &out[40..42]), (SENT, &[0, 0][..]));
}

/// The fragments of a datagram follow its first, out and back.
#[test]
fn fragments_follow_their_first() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let data = [7_u8; 40];
        let datagram = |from: IpAddr, to: IpAddr, source: u16, destination: u16| {
            sealed(from, to, 17, &mk_udp(source, destination, &data))
        };
        let ways = [
            (
                OTHER,
                world.pod,
                world.remote,
                40_000,
                53,
                world.egress,
                world.remote,
            ),
            (
                STRANGER,
                world.remote,
                world.egress,
                53,
                40_000,
                world.remote,
                world.pod,
            ),
        ];
        for (turn, (mac, from, to, source_port, port, new_from, new_to)) in
            ways.into_iter().enumerate()
        {
            let id = 700 + u16::try_from(turn).expect("few");
            let whole = datagram(from, to, source_port, port);
            let translated = datagram(new_from, new_to, source_port, port);
            let early = mk_fragment(mac, from, to, id + 50, 24, false, &whole[24..]);
            if turn == 0 {
                gate.drops(&early, Reason::StrayFragment);
            } else {
                // The address serves, too: whether it is a Service's is known there.
                gate.passes(&early);
            }
            for (offset, end, more) in [(0, 24, true), (24, 48, false)] {
                let frame = mk_fragment(mac, from, to, id, offset, more, &whole[offset..end]);
                let (action, out) = gate.comes(&frame);
                assert_eq!(action, SENT, "{world:?} {turn} {offset}");
                assert_eq!((source(&out), destination(&out)), (new_from, new_to));
                assert!(!is_v4(&out) || is_sound(&out[14..34]));
                let at = transport(&out) + if is_v4(&out) { 0 } else { 8 };
                assert_eq!(
                    out[at..],
                    translated[offset..end],
                    "{world:?} {turn} {offset}"
                );
            }
        }
    }
}

fn mk_fragment(
    mac: [u8; 6],
    from: IpAddr,
    to: IpAddr,
    id: u16,
    offset: usize,
    more: bool,
    payload: &[u8],
) -> Vec<u8> {
    let place = u16::try_from(offset).expect("short");
    let packet = if from.is_ipv4() {
        let mut packet = mk_ip(from, to, 17, 64, payload);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        let word = (place / 8) | (u16::from(more) << 13);
        packet[6..8].copy_from_slice(&word.to_be_bytes());
        repair(&mut packet[..20]);
        packet
    } else {
        let mut inside = vec![17, 0];
        inside.extend((place | u16::from(more)).to_be_bytes());
        inside.extend([0, 0]);
        inside.extend(id.to_be_bytes());
        inside.extend(payload);
        mk_ip(from, to, 44, 64, &inside)
    };
    mk_frame_from(mac, ethertype(from), &packet)
}
