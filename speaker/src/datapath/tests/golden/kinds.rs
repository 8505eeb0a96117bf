//! Kinds of packets: which are steered, and to whom.

use super::*;

const NOTHING: VipCount = VipCount {
    packets: 0,
    bytes: 0,
};

fn one(frame: &[u8]) -> VipCount {
    VipCount {
        packets: 1,
        bytes: frame.len() as u64,
    }
}

#[test]
fn packets_to_a_vip_are_counted_steered_or_not() {
    let mut program = Program::load();
    let frame = mk_frame(0x0800, &mk_v4(COUNTED));
    assert_eq!(program.counted(COUNTED.into(), &frame), one(&frame));
    assert_eq!(program.counted(V4.into(), &frame), NOTHING);
    for vip in VIPS {
        let frame = mk(vip, 17, &mk_udp(1, 53, &[]));
        assert_eq!(program.counted(vip, &frame), one(&frame));
    }
}

#[test]
fn what_is_not_for_us_is_left_alone() {
    let mut program = Program::load();
    let mut other_host = mk(V4.into(), 6, &mk_tcp(1, 80, SYN));
    other_host[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    let tagged = |tag: u16| {
        let mut payload = vec![0, 100];
        payload.extend(0x0800_u16.to_be_bytes());
        payload.extend(mk_v4(V4));
        mk_frame(tag, &payload)
    };
    for frame in [
        mk_frame(0x0800, &mk_v4(Ipv4Addr::new(192, 0, 2, 202))),
        mk_frame(
            0x86dd,
            &mk_v6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x201)),
        ),
        // A VIP of one family is not its mapped form in the other.
        mk_frame(0x86dd, &mk_v6(V4.to_ipv6_mapped())),
        // ARP that asks for the VIP.
        mk_frame(0x0806, &[0; 28]),
        tagged(0x8100),
        tagged(0x88a8),
        other_host,
    ] {
        for vip in VIPS {
            assert_eq!(program.counted(vip, &frame), NOTHING);
        }
    }
}

#[test]
fn flows_go_where_the_tables_say() {
    let mut program = Program::load();
    for vip in VIPS {
        let mut seen = BTreeSet::new();
        for port in 2000..2040 {
            let owner = owner(vip, port, &NODES);
            seen.insert(owner);
            let fate = program.fate(&mk(vip, 6, &mk_tcp(port, 80, SYN)));
            let expected = if owner == "here" {
                Fate::Next
            } else {
                Fate::Sent(owner)
            };
            assert_eq!(fate, expected);
        }
        assert_eq!(seen.len(), 3, "all nodes have flows");
    }
}

#[test]
fn udp_goes_by_the_client_unless_the_service_says_otherwise() {
    let mut program = Program::load();
    for vip in VIPS {
        let by_client = first(&mk_spread(&NODES), bucket(vip, 0)).unwrap().clone();
        for port in 2000..2010 {
            let fate = program.fate(&mk(vip, 17, &mk_udp(port, 80, b"x")));
            match fate {
                Fate::Next => assert_eq!(&*by_client.0, "here"),
                Fate::Sent(node) => assert_eq!(&*by_client.0, node),
                other => panic!("{other:?}"),
            }
        }
        let state = PortState {
            udp_ports: true,
            ..mk_port(&NODES)
        };
        program.port(vip, Protocol::Udp, 80, state);
        for port in 2000..2020 {
            let owner = owner(vip, port, &NODES);
            let expected = if owner == "here" {
                Fate::Next
            } else {
                Fate::Sent(owner)
            };
            assert_eq!(
                program.fate(&mk(vip, 17, &mk_udp(port, 80, b"x"))),
                expected
            );
        }
        let sctp = owner(vip, 2000, &NODES);
        let expected = if sctp == "here" {
            Fate::Next
        } else {
            Fate::Sent(sctp)
        };
        assert_eq!(program.fate(&mk(vip, 132, &mk_sctp(2000, 80))), expected);
    }
}

#[test]
fn with_affinity_all_flows_of_a_client_go_to_one_node() {
    let mut program = Program::load();
    let vip = V4.into();
    let state = PortState {
        affinity: true,
        ..mk_port(&["other", "third"])
    };
    program.port(vip, Protocol::Tcp, 80, state);
    let fates: Vec<Fate> = (2000..2020)
        .map(|port| program.fate(&mk(vip, 6, &mk_tcp(port, 80, SYN))))
        .collect();
    assert!(
        fates
            .iter()
            .all(|fate| *fate == fates[0] && *fate != Fate::Next),
        "{fates:?}"
    );
}

#[test]
fn many_nodes_are_looked_up_in_pages_and_mean_the_same() {
    let mut program = Program::load();
    let names: Vec<String> = (0..20).map(|n| format!("node-{n}")).collect();
    let mut nodes: BTreeMap<NodeName, u16> =
        names.iter().map(|name| (name.as_str().into(), 3)).collect();
    nodes.extend(mk_spread(&NODES).into_keys().map(|name| (name, 5)));
    let state = PortState {
        nodes: nodes.clone(),
        ..mk_port(&[])
    };
    program.port(V4.into(), Protocol::Tcp, 80, state);
    let mut sent = 0;
    for port in 2000..2200_u16 {
        let first = first(&nodes, bucket(V4.into(), ports(port))).unwrap();
        let fate = program.fate(&mk(V4.into(), 6, &mk_tcp(port, 80, SYN)));
        if let Some(known) = NODES.into_iter().find(|node| *node == &*first.0) {
            let expected = if known == "here" {
                Fate::Next
            } else {
                Fate::Sent(known)
            };
            assert_eq!(fate, expected);
            sent += 1;
        }
    }
    assert!(sent > 20, "{sent}");
}

#[test]
fn the_dead_get_nothing_and_the_suspected_nothing_new() {
    let mut program = Program::load();
    let vip = V4.into();
    let port = port_of(vip, &[("other", &NODES), ("third", &["here", "third"])]);
    let (syn, data) = (
        mk(vip, 6, &mk_tcp(port, 80, SYN)),
        mk(vip, 6, &mk_tcp(port, 80, ACK)),
    );
    assert_eq!(program.fate(&syn), Fate::Sent("other"));
    let suspected = NodeState {
        suspected: true,
        ..mk_node("other")
    };
    program.change(&Change::Node(mk_id("other"), Some(suspected)));
    assert_eq!(program.fate(&syn), Fate::Sent("third"));
    assert_eq!(program.fate(&data), Fate::Sent("other"));
    // One write, and nobody sends it anything.
    let dead = NodeState {
        alive: false,
        ..mk_node("other")
    };
    program.change(&Change::Node(mk_id("other"), Some(dead)));
    assert_eq!(program.fate(&syn), Fate::Sent("third"));
    assert_eq!(program.fate(&data), Fate::Sent("third"));
    for node in ["here", "third"] {
        program.change(&Change::Node(
            mk_id(node),
            Some(NodeState {
                alive: false,
                ..mk_node(node)
            }),
        ));
    }
    assert_eq!(
        program.fate(&syn),
        Fate::Next,
        "nobody is left: the stack answers"
    );
}

#[test]
fn ports_that_no_service_has_are_left_to_the_stack() {
    let mut program = Program::load();
    for vip in VIPS {
        let before = program.verdict(Verdict::Unserved);
        for payload in [mk_tcp(1, 81, SYN), mk_tcp(1, 81, ACK)] {
            assert_eq!(program.fate(&mk(vip, 6, &payload)), Fate::Next);
        }
        assert_eq!(program.fate(&mk(vip, 17, &mk_udp(1, 81, &[]))), Fate::Next);
        // A protocol without ports.
        assert_eq!(program.fate(&mk(vip, 47, &[0; 8])), Fate::Next);
        assert_eq!(program.verdict(Verdict::Unserved) - before, 4);
    }
    program.port(V4.into(), Protocol::Tcp, 80, mk_port(&[]));
    assert_eq!(
        program.fate(&mk(V4.into(), 6, &mk_tcp(1, 80, SYN))),
        Fate::Next
    );
}

#[test]
fn what_cannot_be_read_is_left_alone() {
    let mut program = Program::load();
    for vip in VIPS {
        let whole = mk(vip, 6, &mk_tcp(2000, 80, SYN));
        // The test device takes nothing shorter than an IP header.
        let header = if vip.is_ipv4() { 34 } else { 54 };
        for length in header..whole.len() - 6 {
            assert_eq!(program.fate(&whole[..length]), Fate::Next, "{length}");
        }
    }
    let mut short_header = mk(V4.into(), 6, &mk_tcp(2000, 80, SYN));
    short_header[14] = 0x44;
    assert_eq!(program.fate(&short_header), Fate::Next);
    let mut version = mk(V4.into(), 6, &mk_tcp(2000, 80, SYN));
    version[14] = 0x65;
    assert_eq!(program.fate(&version), Fate::Next);
}

#[test]
fn echo_requests_are_answered() {
    let mut program = Program::load();
    for (vip, request, reply, protocol) in [(VIPS[0], 8, 0, 1), (VIPS[1], 128, 129, 58)] {
        let payload = [&[request, 0, 0x12, 0x34, 0, 1, 0, 2][..], b"abcdefgh"].concat();
        let mut frame = mk(vip, protocol, &payload);
        let at = frame.len() - payload.len();
        let sum = |frame: &[u8]| {
            if vip.is_ipv4() {
                pnet_packet::util::checksum(&frame[34..], 1)
            } else {
                let address = |at: usize| {
                    let octets: [u8; 16] = frame[at..at + 16].try_into().unwrap();
                    Ipv6Addr::from(octets)
                };
                pnet_packet::util::ipv6_checksum(
                    &frame[54..],
                    1,
                    &[],
                    &address(22),
                    &address(38),
                    pnet_packet::ip::IpNextHeaderProtocols::Icmpv6,
                )
            }
        };
        let right = sum(&frame).to_be_bytes();
        frame[at + 2..at + 4].copy_from_slice(&right);
        assert_eq!(program.driven(&frame), (XDP_PASS, frame.clone()));
        let before = program.verdict(Verdict::Echoed);
        let (action, out) = program.raw(&frame);
        assert_eq!(action, 7);
        assert_eq!(program.verdict(Verdict::Echoed), before + 1);
        assert_eq!((&out[..6], &out[6..12]), (&frame[6..12], &frame[..6]));
        assert_eq!(out[at], reply);
        assert_eq!(
            out[at + 2..at + 4],
            sum(&out).to_be_bytes(),
            "the checksum is right"
        );
        assert_eq!(out[at + 4..], frame[at + 4..]);
        if vip.is_ipv4() {
            assert!(is_sound(&out[14..]));
            assert_eq!(
                (&out[26..30], &out[30..34]),
                (&frame[30..34], &frame[26..30])
            );
        } else {
            assert_eq!(
                (&out[22..38], &out[38..54]),
                (&frame[38..54], &frame[22..38])
            );
        }
        // A wrong checksum stays as wrong as it was.
        frame[at + 2] ^= 0x40;
        let (_, out) = program.raw(&frame);
        assert_ne!(out[at + 2..at + 4], sum(&out).to_be_bytes());
        // A reply is nobody's.
        frame[at] = reply;
        assert_eq!(program.fate(&frame), Fate::Next);
    }
}

#[test]
fn fragments_follow_the_first() {
    let mut program = Program::load();
    let vip: IpAddr = V4.into();
    let by_client = first(&mk_spread(&NODES), bucket(vip, 0)).unwrap().clone();
    let expected = |to: &str| {
        NODES
            .into_iter()
            .find(|node| *node == to)
            .map_or(Fate::Next, |node| {
                if node == "here" {
                    Fate::Next
                } else {
                    Fate::Sent(node)
                }
            })
    };
    let mk_fragment = |id: u16, offset: u16, more: bool| {
        let payload = if offset == 0 {
            mk_udp(2000, 80, &[0; 16])
        } else {
            vec![0; 24]
        };
        let mut packet = mk_ip(client(vip), vip, 17, 64, &payload);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[6..8].copy_from_slice(&(offset | if more { 0x2000 } else { 0 }).to_be_bytes());
        repair(&mut packet);
        mk_frame(0x0800, &packet)
    };
    let whole = expected(&by_client.0);
    assert_eq!(
        program.fate(&mk_fragment(7, 3, true)),
        Fate::Next,
        "its first is not known"
    );
    assert_eq!(program.verdict(Verdict::StrayFragment), 1);
    assert_eq!(program.fate(&mk_fragment(7, 0, true)), whole);
    assert_eq!(program.fate(&mk_fragment(7, 3, true)), whole);
    assert_eq!(program.fate(&mk_fragment(7, 6, false)), whole);
    assert_eq!(
        program.fate(&mk_fragment(8, 3, true)),
        Fate::Next,
        "another datagram"
    );
    // Where all UDP ports are spread alike, the order does not matter.
    let state = VipState {
        steer: true,
        udp_port: Some(80),
    };
    program.change(&Change::Vip(vip, Some(state)));
    assert_eq!(program.fate(&mk_fragment(9, 3, true)), whole);

    // IPv6 has a header for it, TCP flows go by their ports.
    let port = port_of(V6.into(), &[("other", &NODES)]);
    let mk_fragment = |id: u8, offset: u8, rest: &[u8]| {
        let header = [6, 0, 0, offset << 3 | 1, 0, 0, 0, id];
        mk(V6.into(), 44, &[&header, rest].concat())
    };
    assert_eq!(program.fate(&mk_fragment(1, 3, &[0; 24])), Fate::Next);
    assert_eq!(
        program.fate(&mk_fragment(1, 0, &mk_tcp(port, 80, SYN))),
        Fate::Sent("other")
    );
    assert_eq!(
        program.fate(&mk_fragment(1, 3, &[0; 24])),
        Fate::Sent("other")
    );
}

#[test]
fn errors_go_where_the_packet_came_from_that_they_are_about() {
    let mut program = Program::load();
    let router: IpAddr = Ipv4Addr::new(203, 0, 113, 1).into();
    let port = port_of(V4.into(), &[("third", &NODES)]);
    let mk_error = |inner: &[u8]| {
        let payload = [&[3, 4, 0, 0, 0, 0, 5, 0x14][..], inner].concat();
        mk_frame(0x0800, &mk_ip(router, V4.into(), 1, 64, &payload))
    };
    let inner = mk_ip(V4.into(), client(V4.into()), 6, 60, &mk_tcp(80, port, ACK));
    assert_eq!(program.fate(&mk_error(&inner[..28])), Fate::Sent("third"));
    // About a packet that was never the VIP's.
    let alien = mk_ip(
        COUNTED.into(),
        client(V4.into()),
        6,
        60,
        &mk_tcp(80, port, ACK),
    );
    assert_eq!(program.fate(&mk_error(&alien)), Fate::Next);
    // Cut short.
    assert_eq!(program.fate(&mk_error(&inner[..22])), Fate::Next);

    let router: IpAddr = Ipv6Addr::new(0x2001, 0xdb8, 0xff, 0, 0, 0, 0, 1).into();
    let port = port_of(V6.into(), &[("other", &NODES)]);
    let inner = mk_ip(V6.into(), client(V6.into()), 6, 60, &mk_tcp(80, port, ACK));
    let payload = [&[2, 0, 0, 0, 0, 0, 5, 0][..], &inner].concat();
    let frame = mk_frame(0x86dd, &mk_ip(router, V6.into(), 58, 64, &payload));
    assert_eq!(program.fate(&frame), Fate::Sent("other"));
}

#[test]
fn another_nodes_question_is_answered_for_us_alone() {
    use landfall_ebpf_common::echo;
    let mut program = Program::load();
    let mk = |kind: u8| {
        let mut payload = echo::message(kind, 77).to_vec();
        payload.resize(46, 0);
        mk_frame_from(mac("other"), echo::ETHERTYPE, &payload)
    };
    let question = mk(echo::REQUEST);
    assert_eq!(program.driven(&question), (XDP_PASS, question.clone()));
    let (action, out) = program.raw(&question);
    assert_eq!(action, 7);
    assert_eq!((&out[..6], &out[6..12]), (&question[6..12], &question[..6]));
    assert_eq!(echo::read(&out[14..]), Some((echo::ANSWER, 77)));
    // An answer is the speaker's, as a hello is, and what is meant for another host is not ours.
    assert_eq!(program.fate(&mk(echo::ANSWER)), Fate::Next);
    assert_eq!(program.fate(&mk(1)), Fate::Next);
    let mut others = question.clone();
    others[..6].copy_from_slice(&mac("third"));
    assert_eq!(program.fate(&others), Fate::Next);
    assert_eq!(program.fate(&question[..20]), Fate::Next);
}

#[test]
fn what_the_driver_sends_is_counted_there_and_what_it_leaves_is_not() {
    let mut program = Program::load();
    for vip in VIPS {
        for (owner, action) in [("other", XDP_TX), ("here", XDP_PASS)] {
            let frame = mk(vip, 6, &mk_tcp(port_of(vip, &[(owner, &NODES)]), 80, SYN));
            let (before, steered) = (
                program.tables.counts()[&vip],
                program.verdict(Verdict::Steered),
            );
            assert_eq!(program.driven(&frame).0, action);
            let after = program.tables.counts()[&vip];
            let sent = u64::from(action == XDP_TX);
            assert_eq!(after.packets - before.packets, sent);
            assert_eq!(after.bytes - before.bytes, sent * frame.len() as u64);
            assert_eq!(program.verdict(Verdict::Steered) - steered, sent);
            assert_eq!(program.verdict(Verdict::Delivered), 0);
        }
    }
}

#[test]
fn the_driver_sends_by_the_interface_that_the_frame_came_in_by_and_what_is_for_its_own_address() {
    let mut program = Program::load();
    let vip = V4.into();
    let frame = mk(vip, 6, &mk_tcp(port_of(vip, &[("other", &NODES)]), 80, SYN));
    assert_eq!(program.driven(&frame).0, XDP_TX);
    // Another address of the interface, and none that is known.
    program
        .drivers
        .tell(INTERFACE, [2, 0, 0, 0, 0, 9])
        .expect("the map has room");
    assert_eq!(program.driven(&frame), (XDP_PASS, frame.clone()));
    program.drivers.forget(INTERFACE);
    assert_eq!(program.driven(&frame), (XDP_PASS, frame.clone()));
    program
        .drivers
        .tell(INTERFACE, [0; 6])
        .expect("the map has room");
    assert_eq!(program.driven(&frame).0, XDP_TX);
    // The node is heard at another interface.
    let id = NodeId {
        interface: INTERFACE + 1,
        ..mk_id("other")
    };
    program.change(&Change::Node(id, Some(mk_node("other"))));
    let state = PortState {
        reach: Reach::by(INTERFACE + 1),
        ..mk_port(&["other"])
    };
    program.port(vip, Protocol::Tcp, 80, state);
    assert_eq!(program.raw(&frame).0, 7);
    assert_eq!(program.driven(&frame), (XDP_PASS, frame));
}

/// It stops at a million instructions, looked through on all ways; what it makes of a way differs between kernels.
#[test]
fn the_verifier_has_room() {
    let mut program = Program::load();
    let uplink = classifier(&mut program.ebpf, UPLINK_INGRESS)
        .unwrap()
        .info()
        .unwrap();
    let looked = [
        uplink.verified_instruction_count(),
        driver(&mut program.ebpf)
            .unwrap()
            .info()
            .unwrap()
            .verified_instruction_count(),
    ];
    println!("instructions looked through, at the uplink and at its driver: {looked:?}");
    for count in looked.into_iter().flatten() {
        assert!(count < 600_000, "{looked:?}");
    }
}
