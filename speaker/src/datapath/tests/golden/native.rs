//! Delivery without kube-proxy: translation to an endpoint and back, checksum by checksum.

use std::net::SocketAddr;

use super::super::super::Native;
use super::*;

const PROTOCOLS: [(Protocol, u8); 3] = [
    (Protocol::Tcp, 6),
    (Protocol::Udp, 17),
    (Protocol::Sctp, 132),
];

pub(super) fn endpoint(vip: IpAddr, last: u8) -> SocketAddr {
    let address: IpAddr = match vip {
        IpAddr::V4(_) => Ipv4Addr::new(10, 0, 0, last).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 10, 0, 0, 0, 0, 0, last.into()).into(),
    };
    SocketAddr::new(address, 8080)
}

pub(super) fn mk_native(endpoints: impl IntoIterator<Item = SocketAddr>) -> PortState {
    PortState {
        native: Some(Native {
            endpoints: endpoints.into_iter().collect(),
            ranges: None,
        }),
        ..mk_port(&["here"])
    }
}

/// The program, with one endpoint here for port 80 of both VIPs and all protocols.
pub(super) fn mk_program() -> Program {
    let mut program = Program::load();
    for vip in VIPS {
        for (protocol, _) in PROTOCOLS {
            program.port(vip, protocol, 80, mk_native([endpoint(vip, 1)]));
        }
    }
    program
}

impl Program {
    /// A frame that is handed up, as it is then.
    pub(super) fn handed_up(&mut self, frame: &[u8]) -> Vec<u8> {
        let (action, out) = self.raw(frame);
        assert_eq!(action, u32::MAX, "it is handed up");
        out
    }

    /// A frame that leaves, as it is then.
    pub(super) fn leaves(&mut self, frame: &[u8]) -> Vec<u8> {
        let (action, out) = self.run(UPLINK_EGRESS, frame);
        assert_eq!(action, u32::MAX, "others have their turn");
        out
    }

    /// The endpoint resets what comes from this port, and the client hears it from the VIP.
    pub(super) fn resets(&mut self, vip: IpAddr, port: u16) {
        let mut reset = mk_transport(6, 8080, port);
        reset[13] = RST;
        let frame = mk_between(endpoint(vip, 1).ip(), client(vip), 6, &reset);
        reset[..2].copy_from_slice(&80_u16.to_be_bytes());
        let expected = mk_between(vip, client(vip), 6, &reset);
        assert_eq!(self.leaves(&frame), expected, "{vip}: the client hears it");
    }
}

fn mk_between(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let payload = sealed(from, to, protocol, payload);
    mk_frame(ethertype(to), &mk_ip(from, to, protocol, 64, &payload))
}

/// A client's frame with all checksums right.
pub(super) fn mk_sound(vip: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    mk_between(client(vip), vip, protocol, payload)
}

pub(super) fn mk_transport(protocol: u8, from: u16, to: u16) -> Vec<u8> {
    match protocol {
        6 => mk_tcp(from, to, SYN),
        17 => mk_udp(from, to, b"some payload of odd length."),
        _ => mk_sctp(from, to),
    }
}

/// What a client's port and the VIP's are exchanged for, where one is an endpoint.
pub(super) fn mk_answer(vip: IpAddr, protocol: u8, from: SocketAddr, to: u16) -> Vec<u8> {
    let mut payload = mk_transport(protocol, from.port(), to);
    if protocol == 6 {
        payload[13] = SYN | ACK;
    }
    mk_between(from.ip(), client(vip), protocol, &payload)
}

#[test]
fn packets_are_given_an_endpoint_and_answers_the_vip() {
    let mut program = mk_program();
    for vip in VIPS {
        for (_, number) in PROTOCOLS {
            let to = endpoint(vip, 1);
            let out = program.handed_up(&mk_sound(vip, number, &mk_transport(number, 4000, 80)));
            let expected = mk_between(
                client(vip),
                to.ip(),
                number,
                &mk_transport(number, 4000, 8080),
            );
            assert_eq!(out, expected, "{vip} {number}");
            let out = program.leaves(&mk_answer(vip, number, to, 4000));
            let expected = mk_answer(vip, number, SocketAddr::new(vip, 80), 4000);
            assert_eq!(out, expected, "{vip} {number}");
        }
    }
    assert_eq!(program.verdict(Verdict::Answered), 6);
}

#[test]
fn a_wrong_checksum_stays_wrong_and_none_stays_none() {
    let mut program = mk_program();
    for vip in VIPS {
        for (_, number) in PROTOCOLS {
            let mut frame = mk_sound(vip, number, &mk_transport(number, 4000, 80));
            *frame.last_mut().unwrap() ^= 0x10;
            let out = program.handed_up(&frame);
            assert_ne!(out, frame, "it was translated");
            assert!(!has_sound_transport(&out), "{vip} {number}");
        }
    }
    let mut frame = mk_sound(V4.into(), 17, &mk_transport(17, 4000, 80));
    frame[40..42].fill(0);
    let out = program.handed_up(&frame);
    assert_eq!(out[36..38], 8080_u16.to_be_bytes());
    assert_eq!(out[40..42], [0, 0], "a UDP checksum of zero means none");
}

#[test]
fn what_is_no_answer_leaves_as_it_is() {
    let mut program = mk_program();
    for vip in VIPS {
        let to = endpoint(vip, 1);
        program.handed_up(&mk_sound(vip, 6, &mk_transport(6, 4000, 80)));
        let frames = [
            // To another port of the client, from another port of the endpoint, from another pod, of another protocol.
            mk_answer(vip, 6, to, 4001),
            mk_answer(vip, 6, SocketAddr::new(to.ip(), 8081), 4000),
            mk_answer(vip, 6, endpoint(vip, 2), 4000),
            mk_answer(vip, 17, to, 4000),
            // What asks for echo, and what is cut short.
            mk_between(
                to.ip(),
                client(vip),
                if vip.is_ipv4() { 1 } else { 58 },
                &[8; 16],
            ),
            mk_answer(vip, 6, to, 4000)[..if vip.is_ipv4() { 40 } else { 60 }].to_vec(),
            mk_frame(0x0806, &[0; 28]),
        ];
        for frame in frames {
            assert_eq!(program.leaves(&frame), frame, "{vip}");
        }
    }
    assert_eq!(program.verdict(Verdict::Answered), 0);
}

/// Where a frame goes.
pub(super) fn destination(frame: &[u8]) -> IpAddr {
    if frame[12..14] == [8, 0] {
        let octets: [u8; 4] = frame[30..34].try_into().unwrap();
        Ipv4Addr::from(octets).into()
    } else {
        let octets: [u8; 16] = frame[38..54].try_into().unwrap();
        Ipv6Addr::from(octets).into()
    }
}

#[test]
fn flows_stay_with_their_endpoint_and_new_ones_are_spread() {
    let mut program = mk_program();
    for vip in VIPS {
        for (protocol, number) in [(Protocol::Tcp, 6), (Protocol::Udp, 17)] {
            for port in 4000..4100 {
                program.handed_up(&mk_sound(vip, number, &mk_transport(number, port, 80)));
            }
            // Its one endpoint drains: others take what is new, and it keeps what it has.
            let others: Vec<SocketAddr> = (2..6).map(|last| endpoint(vip, last)).collect();
            program.port(vip, protocol, 80, mk_native(others.clone()));
            let mut seen = BTreeMap::<IpAddr, u32>::new();
            for port in 4000..4100 {
                let mut later = mk_transport(number, port, 80);
                if number == 6 {
                    later[13] = ACK;
                }
                let out = program.handed_up(&mk_sound(vip, number, &later));
                assert_eq!(destination(&out), endpoint(vip, 1).ip(), "{vip} {port}");
                let mut new = mk_transport(number, port + 1000, 80);
                if number == 17 {
                    // By the client's address alone, unless the Service says otherwise.
                    new[..2].copy_from_slice(&(port + 1000).to_be_bytes());
                }
                let out = program.handed_up(&mk_sound(vip, number, &new));
                *seen.entry(destination(&out)).or_default() += 1;
            }
            if number == 6 {
                assert_eq!(seen.len(), others.len(), "{vip}: {seen:?}");
                assert!(
                    seen.values().all(|count| (10..45).contains(count)),
                    "{seen:?}"
                );
            } else {
                assert_eq!(
                    seen.len(),
                    1,
                    "all datagrams of a client go to one: {seen:?}"
                );
            }
        }
    }
}

#[test]
fn fragments_are_translated_both_ways() {
    let mut program = mk_program();
    for vip in VIPS {
        let to = endpoint(vip, 1);
        let whole = mk_udp(4000, 80, &[0x5a; 64]);
        let there = mk_udp(4000, 8080, &[0x5a; 64]);
        let back = mk_udp(8080, 4000, &[0x5a; 64]);
        let answer = mk_udp(80, 4000, &[0x5a; 64]);
        let client = client(vip);
        for part in [0, 1] {
            let out = program.handed_up(&mk_fragment(client, vip, &whole, part));
            assert_eq!(
                out,
                mk_fragment(client, to.ip(), &there, part),
                "{vip} {part}"
            );
            let out = program.leaves(&mk_fragment(to.ip(), client, &back, part));
            assert_eq!(out, mk_fragment(vip, client, &answer, part), "{vip} {part}");
        }
    }
}

/// The first 40 bytes of a datagram, or the rest; its checksum right for the whole.
pub(super) fn mk_fragment(from: IpAddr, to: IpAddr, datagram: &[u8], part: u8) -> Vec<u8> {
    let datagram = sealed(from, to, 17, datagram);
    let payload = if part == 0 {
        &datagram[..40]
    } else {
        &datagram[40..]
    };
    let offset: u16 = if part == 0 { 0 } else { 5 };
    if to.is_ipv4() {
        let mut packet = mk_ip(from, to, 17, 64, payload);
        let flags = offset | if part == 0 { 0x2000 } else { 0 };
        packet[4..6].copy_from_slice(&[0x12, 0x34]);
        packet[6..8].copy_from_slice(&flags.to_be_bytes());
        repair(&mut packet);
        return mk_frame(0x0800, &packet);
    }
    let flags = offset << 3 | u16::from(part == 0);
    let mut extension = vec![17, 0];
    extension.extend(flags.to_be_bytes());
    extension.extend([0x12, 0x34, 0x56, 0x78]);
    extension.extend(payload);
    mk_frame(0x86dd, &mk_ip(from, to, 44, 64, &extension))
}

/// An ICMP error of a router, or of one end, about a packet.
pub(super) fn mk_error(from: IpAddr, to: IpAddr, about: &[u8]) -> Vec<u8> {
    // Fragmentation needed, packet too big: with an MTU of 1400.
    let (protocol, head) = if to.is_ipv4() {
        (1, [3, 4, 0, 0, 0, 0, 0x05, 0x78])
    } else {
        (58, [2, 0, 0, 0, 0, 0, 0x05, 0x78])
    };
    let payload = [&head[..], about].concat();
    mk_between(from, to, protocol, &payload)
}

#[test]
fn errors_are_translated_both_ways_inside_and_outside() {
    let mut program = mk_program();
    for vip in VIPS {
        let to = endpoint(vip, 1);
        let client = client(vip);
        let router: IpAddr = if vip.is_ipv4() {
            Ipv4Addr::new(203, 0, 113, 1).into()
        } else {
            Ipv6Addr::new(0x2001, 0xdb8, 99, 0, 0, 0, 0, 1).into()
        };
        // The checksum of an SCTP packet inside is left as it is: it covers all of a packet of which eight bytes are told.
        for number in [6, 17] {
            program.handed_up(&mk_sound(vip, number, &mk_transport(number, 4000, 80)));
            let ip = |frame: &[u8]| frame[14..].to_vec();
            // What an endpoint sent, and what became of it.
            let sent = ip(&mk_answer(vip, number, to, 4000));
            let seen = ip(&mk_answer(vip, number, SocketAddr::new(vip, 80), 4000));
            let out = program.handed_up(&mk_error(router, vip, &seen));
            assert_eq!(out, mk_error(router, to.ip(), &sent), "{vip} {number}: in");
            // What a client sent, and what an endpoint or the node says of it.
            let came = ip(&mk_between(
                client,
                to.ip(),
                number,
                &mk_transport(number, 4000, 8080),
            ));
            let gone = ip(&mk_sound(vip, number, &mk_transport(number, 4000, 80)));
            let out = program.leaves(&mk_error(to.ip(), client, &came));
            assert_eq!(out, mk_error(vip, client, &gone), "{vip} {number}: out");
            let out = program.leaves(&mk_error(router, client, &came));
            assert_eq!(
                out,
                mk_error(router, client, &gone),
                "{vip} {number}: of a node"
            );
            // Eight bytes of what it is about are all that a router must tell.
            if vip.is_ipv4() {
                let out = program.handed_up(&mk_error(router, vip, &seen[..28]));
                assert!(has_sound_transport(&out), "{number}: cut short");
                assert_eq!(destination(&out), to.ip());
            }
        }
        let unknown = mk_error(
            router,
            vip,
            &mk_answer(vip, 6, SocketAddr::new(vip, 80), 9)[14..],
        );
        assert_eq!(
            program.handed_up(&unknown),
            unknown,
            "about a flow of nobody"
        );
    }
}

#[test]
fn only_clients_of_the_source_ranges_are_served() {
    let mut program = Program::load();
    let ranges = |texts: &[&str]| Some(texts.iter().map(|text| text.parse().unwrap()).collect());
    for vip in VIPS {
        let native = |ranges| PortState {
            native: Some(Native {
                endpoints: BTreeSet::from([endpoint(vip, 1)]),
                ranges,
            }),
            ..mk_port(&["here"])
        };
        let frame = |port| mk_sound(vip, 6, &mk_transport(6, port, 80));
        let others = ranges(&["203.0.113.0/24", "2001:db8:99::/48"]);
        program.port(vip, Protocol::Tcp, 80, native(others.clone()));
        let before = program.verdict(Verdict::Refused);
        assert_eq!(program.raw(&frame(1)).0, 2, "dropped");
        assert_eq!(program.verdict(Verdict::Refused), before + 1);
        let both = ranges(&["203.0.113.0/24", "198.51.100.0/25", "2001:db8:7::/64"]);
        program.port(vip, Protocol::Tcp, 80, native(both));
        assert_eq!(
            destination(&program.handed_up(&frame(1))),
            endpoint(vip, 1).ip()
        );
        // What is established stays, what is new is refused.
        program.port(vip, Protocol::Tcp, 80, native(others));
        let mut later = mk_transport(6, 1, 80);
        later[13] = ACK;
        let out = program.handed_up(&mk_sound(vip, 6, &later));
        assert_eq!(destination(&out), endpoint(vip, 1).ip());
        assert_eq!(program.raw(&frame(2)).0, 2);
        program.port(vip, Protocol::Tcp, 80, native(ranges(&[])));
        assert_eq!(program.raw(&frame(3)).0, 2, "no range, nobody");
        program.port(vip, Protocol::Tcp, 80, native(None));
        assert_eq!(
            destination(&program.handed_up(&frame(3))),
            endpoint(vip, 1).ip()
        );
    }
}

/// A client may use one port of its own for two ports of a VIP; an endpoint of both could not tell them apart.
#[test]
fn flows_that_an_endpoint_could_not_tell_apart_go_to_different_ones() {
    let mut program = mk_program();
    let vip = V4.into();
    let syn = |port| mk_sound(vip, 6, &mk_transport(6, 4000, port));
    let ack = |port| {
        let mut payload = mk_transport(6, 4000, port);
        payload[13] = ACK;
        mk_sound(vip, 6, &payload)
    };
    program.handed_up(&syn(80));
    program.handed_up(&ack(80));
    program.port(vip, Protocol::Tcp, 81, mk_native([endpoint(vip, 1)]));
    assert_eq!(program.raw(&syn(81)).0, 2, "there is no other endpoint");
    assert_eq!(program.verdict(Verdict::Collided), 1);
    let both = mk_native([endpoint(vip, 1), endpoint(vip, 2)]);
    program.port(vip, Protocol::Tcp, 81, both);
    assert_eq!(
        destination(&program.handed_up(&syn(81))),
        endpoint(vip, 2).ip()
    );
    assert_eq!(
        destination(&program.handed_up(&ack(80))),
        endpoint(vip, 1).ip()
    );
}

#[test]
fn what_is_unknown_is_given_to_an_endpoint_that_resets_it() {
    let mut program = mk_program();
    for vip in VIPS {
        let mut payload = mk_transport(6, 5000, 80);
        payload[13] = ACK;
        let out = program.handed_up(&mk_sound(vip, 6, &payload));
        assert_eq!(destination(&out), endpoint(vip, 1).ip());
        program.resets(vip, 5000);
    }
}

/// Addresses and ports of a connection that has ended may be used again at once, by another endpoint.
#[test]
fn a_new_connection_of_a_closed_ones_ports_is_a_new_one() {
    let mut program = mk_program();
    for vip in VIPS {
        let send = |program: &mut Program, flags| {
            let mut payload = mk_transport(6, 6000, 80);
            payload[13] = flags;
            destination(&program.handed_up(&mk_sound(vip, 6, &payload)))
        };
        for flags in [SYN, ACK, ACK | FIN] {
            assert_eq!(send(&mut program, flags), endpoint(vip, 1).ip());
        }
        program.port(vip, Protocol::Tcp, 80, mk_native([endpoint(vip, 2)]));
        assert_eq!(
            send(&mut program, ACK),
            endpoint(vip, 1).ip(),
            "it ends where it was"
        );
        assert_eq!(send(&mut program, SYN), endpoint(vip, 2).ip());
        assert_eq!(send(&mut program, ACK), endpoint(vip, 2).ip());
    }
}

/// A client may come from the same port to the VIP and then, when that connection has ended, to the endpoint's own
/// address.
#[test]
fn a_connection_past_the_vip_is_not_that_of_a_closed_flow() {
    let mut program = mk_program();
    for vip in VIPS {
        let to = endpoint(vip, 1);
        let come = |program: &mut Program, flags| {
            let mut payload = mk_transport(6, 6000, 80);
            payload[13] = flags;
            program.handed_up(&mk_sound(vip, 6, &payload));
        };
        let answer = |from, flags| {
            let mut payload = mk_transport(6, SocketAddr::port(&from), 6000);
            payload[13] = flags;
            mk_between(from.ip(), client(vip), 6, &payload)
        };
        let of_vip = SocketAddr::new(vip, 80);
        for ends in [&[SYN, ACK][..], &[SYN]] {
            for flags in ends {
                come(&mut program, *flags);
            }
            for flags in [SYN | ACK, ACK, ACK | FIN, ACK | RST] {
                let out = program.leaves(&answer(to, flags));
                assert_eq!(out, answer(of_vip, flags), "{vip}: the flow's");
            }
            for flags in [SYN | ACK, ACK] {
                let frame = answer(to, flags);
                assert_eq!(program.leaves(&frame), frame, "{vip}: past the VIP");
            }
        }
        come(&mut program, SYN);
        let out = program.leaves(&answer(to, SYN | ACK));
        assert_eq!(out, answer(of_vip, SYN | ACK), "{vip}: a new flow's");
    }
}

/// Answers that leave while the program at the egress is away come from the endpoint's own address. A client that can
/// reach it resets what it does not know.
#[test]
fn a_flow_is_not_reset_past_the_vip() {
    let mut program = mk_program();
    for vip in VIPS {
        let to = endpoint(vip, 1);
        let past = |from: IpAddr, port, to: SocketAddr, flags| {
            let mut payload = mk_transport(6, port, to.port());
            payload[13] = flags;
            mk_between(from, to.ip(), 6, &payload)
        };
        for ends in [&[SYN][..], &[ACK]] {
            for flags in ends {
                let mut payload = mk_transport(6, 6000, 80);
                payload[13] = *flags;
                program.handed_up(&mk_sound(vip, 6, &payload));
            }
            let before = program.verdict(Verdict::Refused);
            for (count, flags) in [(1, RST), (2, RST | ACK)] {
                let (action, _) = program.raw(&past(client(vip), 6000, to, flags));
                assert_eq!(action, 2, "{vip}: dropped");
                assert_eq!(program.verdict(Verdict::Refused), before + count);
            }
            let others = [
                // What opens a connection past the VIP; other clients, ports and endpoints; what is cut short.
                past(client(vip), 6000, to, SYN),
                past(client(vip), 6000, to, ACK),
                past(vip, 6000, to, RST),
                past(client(vip), 6001, to, RST),
                past(client(vip), 6000, SocketAddr::new(to.ip(), 8081), RST),
                past(client(vip), 6000, endpoint(vip, 2), RST),
                past(client(vip), 6000, to, RST)[..if vip.is_ipv4() { 47 } else { 67 }].to_vec(),
            ];
            for frame in others {
                assert_eq!(program.handed_up(&frame), frame, "{vip}: another's");
            }
        }
        // The client resets its flow itself, at the VIP: the endpoint hears it.
        let mut reset = mk_transport(6, 6000, 80);
        reset[13] = RST;
        let heard = past(client(vip), 6000, to, RST);
        assert_eq!(program.handed_up(&mk_sound(vip, 6, &reset)), heard, "{vip}");
        // What the endpoint has closed is nobody's to keep.
        let mut end = mk_transport(6, 8080, 6000);
        end[13] = ACK | FIN;
        program.leaves(&mk_between(to.ip(), client(vip), 6, &end));
        assert_eq!(program.handed_up(&heard), heard, "{vip}: it has ended");
    }
}

#[test]
fn what_nobody_here_serves_or_is_cut_short_is_left_as_it_is() {
    let mut program = mk_program();
    for vip in VIPS {
        for (protocol, number) in PROTOCOLS {
            let frame = mk_sound(vip, number, &mk_transport(number, 7000, 80));
            let header = if vip.is_ipv4() { 34 } else { 54 };
            for length in [header, header + 2] {
                assert_eq!(
                    program.handed_up(&frame[..length]),
                    frame[..length],
                    "{vip} {number}"
                );
            }
            program.port(vip, protocol, 80, mk_native([]));
            assert_eq!(program.handed_up(&frame), frame, "{vip} {number}");
        }
    }
    assert_eq!(program.verdict(Verdict::Delivered), 0);
}

/// A packet whose time is up is the stack's to answer, which knows it by the endpoint's address.
#[test]
fn the_ttl_is_the_stacks() {
    let mut program = mk_program();
    for vip in VIPS {
        let payload = sealed(client(vip), vip, 6, &mk_transport(6, 4000, 80));
        let frame = mk_frame(ethertype(vip), &mk_ip(client(vip), vip, 6, 1, &payload));
        let out = program.handed_up(&frame);
        assert_eq!(out[if vip.is_ipv4() { 22 } else { 21 }], 1);
        assert_eq!(destination(&out), endpoint(vip, 1).ip());
    }
}

#[test]
fn with_affinity_a_client_stays_with_an_endpoint() {
    let mut program = mk_program();
    for vip in VIPS {
        let state = PortState {
            affinity: true,
            ..mk_native((1..9).map(|last| endpoint(vip, last)))
        };
        program.port(vip, Protocol::Tcp, 80, state);
        let chosen: BTreeSet<IpAddr> = (4000..4040)
            .map(|port| {
                let frame = mk_sound(vip, 6, &mk_transport(6, port, 80));
                destination(&program.handed_up(&frame))
            })
            .collect();
        assert_eq!(chosen.len(), 1, "{chosen:?}");
    }
}
