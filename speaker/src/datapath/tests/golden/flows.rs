//! TCP flows: which node delivers them when tables change.

use aya::maps::{HashMap, MapData};
use landfall_ebpf_common::handing_on::{self, FIRST_TTL, LAST_TTL, LOW_FIRST_TTL, LOW_LAST_TTL};
use landfall_ebpf_common::{Flow, FlowKey, MAX_FLOWS, MAX_HISTORY, MAX_HOLDERS, VipKey, map};

use super::*;

type Flows<'a> = HashMap<&'a mut MapData, FlowKey, Flow>;

/// Of its page these nodes hold the bucket of a client's port, if any do, and nobody any other.
fn held_by(vip: IpAddr, client_port: u16, nodes: &[&str]) -> Change {
    let id = PortId {
        vip,
        protocol: Protocol::Tcp,
        port: 80,
    };
    let bucket = bucket(vip, ports(client_port));
    let page = u16::try_from(bucket / landfall_core::election::HELD_PAGE).unwrap();
    let names: BTreeSet<NodeName> = nodes.iter().map(|node| (*node).into()).collect();
    let holders = (!names.is_empty()).then_some((bucket, names));
    Change::Holders(id, page, holders.into_iter().collect())
}

#[test]
fn a_flow_stays_where_it_began() {
    let mut program = Program::load();
    for vip in VIPS {
        let port = port_of(vip, &[("here", &NODES), ("other", &["other", "third"])]);
        let (syn, data) = (
            mk(vip, 6, &mk_tcp(port, 80, SYN)),
            mk(vip, 6, &mk_tcp(port, 80, ACK)),
        );
        assert_eq!(program.fate(&syn), Fate::Next);
        assert_eq!(program.fate(&data), Fate::Next);
        // The bucket goes to another; this flow does not.
        program.port(vip, Protocol::Tcp, 80, mk_port(&["other", "third"]));
        assert_eq!(program.fate(&data), Fate::Next, "it is known here");
        let fin = mk(vip, 6, &mk_tcp(port, 80, FIN | ACK));
        assert_eq!(program.fate(&fin), Fate::Next);
        assert_eq!(
            program.fate(&data),
            Fate::Next,
            "what follows a FIN is the flow's"
        );
        // One that began after goes where it belongs.
        let later = port_of(vip, &[("other", &["other", "third"]), ("here", &NODES)]) + 1;
        let later = (later..u16::MAX)
            .find(|port| owner(vip, *port, &["other", "third"]) == "other")
            .unwrap();
        assert_eq!(
            program.fate(&mk(vip, 6, &mk_tcp(later, 80, SYN))),
            Fate::Sent("other")
        );
    }
}

/// With no room left a flow is delivered all the same, known by its SYN alone, and counted; those that are known stay.
#[test]
fn a_full_table_delivers() {
    let mut program = Program::load();
    let ports: Vec<u16> = (5000..u16::MAX)
        .filter(|port| VIPS.iter().all(|vip| owner(*vip, *port, &NODES) == "here"))
        .take(2)
        .collect();
    let of = |vip, port, flags| mk(vip, 6, &mk_tcp(port, 80, flags));
    for vip in VIPS {
        assert_eq!(program.fate(&of(vip, ports[0], SYN)), Fate::Next);
        assert_eq!(program.fate(&of(vip, ports[0], ACK)), Fate::Next);
    }
    let flows = program.ebpf.map_mut(map::FLOWS).expect("it is not taken");
    let mut flows = Flows::try_from(flows).expect("it is a hash");
    let others = (0..MAX_FLOWS).map(|number| FlowKey {
        protocol: 6,
        client_port: 1,
        port: 1,
        client: [0; 16],
        vip: VipKey::v4(number.to_be_bytes()),
    });
    let full = others
        .map(|key| flows.insert(key, Flow::default(), 0))
        .find_map(Result::err);
    assert!(full.is_some(), "it has room for more than it says");
    for vip in VIPS {
        let before = program.verdict(Verdict::FlowsFull);
        assert_eq!(program.fate(&of(vip, ports[1], SYN)), Fate::Next);
        for more in 1..3 {
            assert_eq!(program.fate(&of(vip, ports[1], ACK)), Fate::Next);
            assert_eq!(program.verdict(Verdict::FlowsFull), before + more);
        }
        // The table changes: what is known stays.
        program.port(vip, Protocol::Tcp, 80, mk_port(&["other", "third"]));
        assert_eq!(program.fate(&of(vip, ports[0], ACK)), Fate::Next);
        assert_eq!(program.verdict(Verdict::FlowsFull), before + 2);
    }
}

/// Nobody has heard yet where a node is: its clients try again.
#[test]
fn who_cannot_be_sent_anything_is_unreachable() {
    let mut program = Program::load();
    let unheard = NodeState {
        mac: None,
        ..mk_node("other")
    };
    program.change(&Change::Node(mk_id("other"), Some(unheard)));
    for vip in VIPS {
        let port = port_of(vip, &[("other", &NODES)]);
        let before = program.verdict(Verdict::Unreachable);
        for flags in [SYN, ACK] {
            let frame = mk(vip, 6, &mk_tcp(port, 80, flags));
            assert_eq!(program.fate(&frame), Fate::Dropped);
        }
        assert_eq!(program.verdict(Verdict::Unreachable), before + 2);
    }
}

#[test]
fn a_syn_that_was_delivered_is_delivered_again() {
    let mut program = Program::load();
    let vip = V4.into();
    let port = port_of(vip, &[("here", &NODES), ("other", &["other", "third"])]);
    let syn = mk(vip, 6, &mk_tcp(port, 80, SYN));
    assert_eq!(program.fate(&syn), Fate::Next);
    // This node has endpoints that drain, say.
    let draining = PortState {
        here: true,
        ..mk_port(&["other", "third"])
    };
    program.port(vip, Protocol::Tcp, 80, draining);
    assert_eq!(
        program.fate(&syn),
        Fate::Next,
        "a repeated SYN, before the answer came"
    );
}

/// Where nobody serves any more nobody would answer it, however often it is sent.
#[test]
fn a_syn_goes_by_the_table_where_nobody_serves_any_more() {
    let mut program = Program::load();
    for vip in VIPS {
        let port = port_of(vip, &[("here", &NODES), ("other", &["other", "third"])]);
        let syn = |ttl| mk_from("third", ttl, vip, 6, &mk_tcp(port, 80, SYN));
        assert_eq!(
            program.fate(&mk(vip, 6, &mk_tcp(port, 80, SYN))),
            Fate::Next
        );
        program.port(vip, Protocol::Tcp, 80, mk_port(&["other", "third"]));
        let client = mk(vip, 6, &mk_tcp(port, 80, SYN));
        assert_eq!(program.fate(&client), Fate::Sent("other"), "a client's");
        // What another node sent here goes on once: tables that disagree do not send it to and fro.
        assert_eq!(program.fate(&syn(64)), Fate::HandedOn("other", FIRST_TTL));
        assert_eq!(program.fate(&syn(FIRST_TTL)), Fate::Dropped);
        // Not back to where it came from.
        program.port(vip, Protocol::Tcp, 80, mk_port(&["third"]));
        assert_eq!(program.fate(&syn(64)), Fate::Dropped);
        program.port(vip, Protocol::Tcp, 80, mk_port(&NODES));
    }
}

#[test]
fn an_unknown_flow_is_looked_for_where_its_bucket_was() {
    let mut program = Program::load();
    for vip in VIPS {
        program.port(vip, Protocol::Tcp, 80, mk_port(&["other", "third"]));
        program.port(vip, Protocol::Tcp, 80, mk_port(&NODES));
        let port = port_of(vip, &[("here", &NODES), ("other", &["other", "third"])]);
        let data = mk(vip, 6, &mk_tcp(port, 80, ACK));
        assert_eq!(program.fate(&data), Fate::HandedOn("other", FIRST_TTL));
        // Steered here by another node, the same; but never back to it.
        assert_eq!(
            program.fate(&mk_from("third", 64, vip, 6, &mk_tcp(port, 80, ACK))),
            Fate::HandedOn("other", FIRST_TTL)
        );
        assert_eq!(
            program.fate(&mk_from("other", 64, vip, 6, &mk_tcp(port, 80, ACK))),
            Fate::Next
        );
        // A reset too, and an error about it not.
        assert_eq!(
            program.fate(&mk(vip, 6, &mk_tcp(port, 80, RST))),
            Fate::HandedOn("other", FIRST_TTL)
        );
        // Another asks: it is told that the flow is not known here, whatever this node believes.
        assert_eq!(
            program.fate(&mk_from("third", FIRST_TTL, vip, 6, &mk_tcp(port, 80, ACK))),
            Fate::HandedOn("third", FIRST_TTL - 1)
        );
        // This node has asked, in vain: nobody knows the flow, and its reset says so.
        assert_eq!(
            program.fate(&mk_from(
                "other",
                FIRST_TTL - 1,
                vip,
                6,
                &mk_tcp(port, 80, ACK)
            )),
            Fate::Next
        );
        // A SYN begins a flow, and then it is known.
        assert_eq!(
            program.fate(&mk(vip, 6, &mk_tcp(port, 80, SYN))),
            Fate::Next
        );
        assert_eq!(program.fate(&data), Fate::Next);
    }
}

#[test]
fn nothing_is_handed_on_before_the_flows_were_entered() {
    let mut program = Program::load();
    let vip = V4.into();
    program.port(vip, Protocol::Tcp, 80, mk_port(&["other"]));
    program.port(vip, Protocol::Tcp, 80, mk_port(&NODES));
    program
        .tables
        .set_seeded(seeded::NOT)
        .expect("the map takes it");
    let port = port_of(vip, &[("here", &NODES), ("other", &["other"])]);
    let data = mk(vip, 6, &mk_tcp(port, 80, ACK));
    assert_eq!(program.fate(&data), Fate::Next);
    program
        .tables
        .set_seeded(seeded::SETTLED)
        .expect("the map takes it");
    assert_eq!(program.fate(&data), Fate::HandedOn("other", FIRST_TTL));
    // Nor to who is gone, or does not keep flows.
    for state in [
        NodeState {
            alive: false,
            ..mk_node("other")
        },
        NodeState {
            steers: false,
            ..mk_node("other")
        },
    ] {
        program.change(&Change::Node(mk_id("other"), Some(state)));
        assert_eq!(program.fate(&data), Fate::Next);
    }
}

#[test]
fn who_has_begun_anew_answers_for_no_flow_before_the_others_have_spoken() {
    let mut program = Program::load();
    for vip in VIPS {
        let port = port_of(vip, &[("here", &NODES)]);
        for frame in [
            mk(vip, 6, &mk_tcp(port, 80, ACK)),
            mk_from("other", 64, vip, 6, &mk_tcp(port, 80, ACK)),
        ] {
            let know = |program: &mut Program, what| {
                program.tables.set_seeded(what).expect("the map takes it");
            };
            know(&mut program, seeded::ENTERED);
            assert_eq!(program.fate(&frame), Fate::Dropped);
            know(&mut program, seeded::SETTLED);
            assert_eq!(program.fate(&frame), Fate::Next);
        }
        // A process begins where another has ended.
        program.tables.begin().expect("the map takes it");
        let data = mk(vip, 6, &mk_tcp(port, 80, ACK));
        assert_eq!(program.fate(&data), Fate::Dropped);
        program.tables.entered().expect("the map takes it");
        assert_eq!(program.fate(&data), Fate::Dropped);
        program.change(&Change::Complete);
        assert_eq!(program.fate(&data), Fate::Dropped);
        program.tables.forget_history().expect("the maps take it");
        assert_eq!(program.fate(&data), Fate::Next);
        program.tables.entered().expect("the map takes it");
        assert_eq!(program.fate(&data), Fate::Next);
        // A new one it takes.
        let syn = mk(vip, 6, &mk_tcp(port, 80, SYN));
        assert_eq!(program.fate(&syn), Fate::Next);
        // The next VIP's port is known to this process, too.
        for vip in VIPS {
            program.port(vip, Protocol::Tcp, 80, mk_port(&NODES));
        }
    }
}

#[test]
fn who_is_sent_anothers_flow_asks_and_never_answers_for_it() {
    let mut program = Program::load();
    for vip in VIPS {
        program.port(vip, Protocol::Tcp, 80, mk_port(&["other", "third"]));
        let port = port_of(vip, &[("other", &["other", "third"])]);
        let from = |node, ttl| mk_from(node, ttl, vip, 6, &mk_tcp(port, 80, ACK));
        // By this node's table the flow is another's, and a third sent it here nevertheless.
        let fate = program.fate(&from("third", 64));
        assert_eq!(fate, Fate::HandedOn("other", FIRST_TTL));
        let waiting = program.verdict(Verdict::Waiting);
        assert_eq!(program.fate(&from("other", FIRST_TTL - 1)), Fate::Dropped);
        // The other itself has sent it here: their tables disagree, and soon will not.
        assert_eq!(program.fate(&from("other", 64)), Fate::Dropped);
        assert_eq!(program.verdict(Verdict::Waiting), waiting + 2);
        // Asked by it, this node says that it does not know it, and forgets about it.
        let fate = program.fate(&from("other", LAST_TTL));
        assert_eq!(fate, Fate::HandedOn("other", LAST_TTL - 1));
        // So does one that cannot look whether it does: it would reset what lives elsewhere.
        program
            .tables
            .set_seeded(seeded::NOT)
            .expect("the map takes it");
        assert_eq!(fate, program.fate(&from("other", LAST_TTL)));
        program
            .tables
            .set_seeded(seeded::SETTLED)
            .expect("the map takes it");
    }
}

/// Whatever TTL a client's packet comes with, the node that it is steered to takes it for a client's, looks for its flow
/// as far as the TTL lets it, and answers for it at the end.
#[test]
fn no_clients_packet_is_taken_for_a_question() {
    let mut program = Program::load();
    let mk_with = |ttl, vip, protocol, payload: &[u8]| {
        let packet = mk_ip(client(vip), vip, protocol, ttl, payload);
        mk_frame(ethertype(vip), &packet)
    };
    for vip in VIPS {
        program.port(vip, Protocol::Tcp, 80, mk_port(&["other"]));
        program.port(vip, Protocol::Tcp, 80, mk_port(&NODES));
        let away = port_of(vip, &[("third", &NODES)]);
        let here = port_of(vip, &[("here", &NODES), ("other", &["other"])]);
        for ttl in 1..=FIRST_TTL + 2 {
            let lowered = handing_on::steered(ttl);
            let away = |flags| mk_with(ttl, vip, 6, &mk_tcp(away, 80, flags));
            assert_eq!(program.fate(&away(SYN)), Fate::Sent("third"));
            for flags in [ACK, FIN | ACK] {
                let expected = if lowered == ttl {
                    Fate::Sent("third")
                } else {
                    Fate::Lowered("third", lowered)
                };
                assert_eq!(program.fate(&away(flags)), expected, "{ttl}");
            }
            // What arrives with so little looks like a question whatever is done.
            if (LOW_LAST_TTL - 1..=LOW_FIRST_TTL).contains(&ttl) {
                continue;
            }
            // There, in the middle of a connection that this node does not know.
            let from = |node, ttl| mk_from(node, ttl, vip, 6, &mk_tcp(here, 80, ACK));
            let mut fate = program.fate(&from("third", lowered));
            if let Fate::HandedOn(to, asked) = fate {
                assert_eq!(to, "other");
                fate = program.fate(&from(to, asked - 1));
            } else {
                assert!(ttl < LOW_LAST_TTL, "{ttl}: nobody is asked");
            }
            assert_eq!(
                fate,
                Fate::Next,
                "{ttl}: its pod's reset says that it is gone"
            );
            // A client's own frame, which no other node has steered.
            let asked = program.fate(&mk_with(ttl, vip, 6, &mk_tcp(here, 80, ACK)));
            assert_eq!(asked, program.fate(&from("third", lowered)), "{ttl}");
        }
        // What is no TCP is not looked for: it stays as it is.
        let chunk = mk_with(12, vip, 132, &mk_sctp(away, 80));
        assert_eq!(program.fate(&chunk), Fate::Sent("third"));
    }
}

#[test]
fn what_a_node_sends_for_itself_or_those_behind_it_is_a_clients() {
    let mut program = Program::load();
    let vip: IpAddr = V4.into();
    let port = port_of(vip, &[("other", &NODES)]);
    // A client that another node forwards for no reason it told of: taken as steered.
    let steered = mk_from("third", 64, vip, 6, &mk_tcp(port, 80, SYN));
    assert_eq!(program.fate(&steered), Fate::Next);
    // A pod of that node: a client like any.
    let pod: IpAddr = "10.2.0.9".parse().unwrap();
    let sport = (1024..u16::MAX)
        .find(|sport| {
            let bucket = rendezvous::bucket(rendezvous::hash(
                &landfall_ebpf_common::VipKey::from_address(pod).0,
                &landfall_ebpf_common::VipKey::from_address(vip).0,
                ports(*sport),
            ));
            &*first(&mk_spread(&NODES), bucket).unwrap().0 == "other"
        })
        .unwrap();
    let own = mk_frame_from(
        mac("third"),
        0x0800,
        &mk_ip(pod, vip, 6, 64, &mk_tcp(sport, 80, SYN)),
    );
    assert_eq!(program.fate(&own), Fate::Sent("other"));
    // UDP that was steered is not steered again.
    assert_eq!(
        program.fate(&mk_from("third", 64, vip, 17, &mk_udp(9, 80, b"x"))),
        Fate::Next
    );
}

#[test]
fn who_says_that_it_holds_a_bucket_is_asked() {
    let mut program = Program::load();
    let vip = V4.into();
    let port = port_of(vip, &[("here", &["here", "other", "third"])]);
    let data = mk(vip, 6, &mk_tcp(port, 80, ACK));
    assert_eq!(program.fate(&data), Fate::Next, "nobody else ever had it");
    program.change(&held_by(vip, port, &["third", "here"]));
    assert_eq!(program.fate(&data), Fate::HandedOn("third", FIRST_TTL));
    // Two of them: first the one with the lower seed, and not the one that steered it here, which has looked.
    program.change(&held_by(vip, port, &["third", "other"]));
    let seed = |node: &str| landfall_core::steering::seed(&node.into());
    let (low, high) = if seed("other") < seed("third") {
        ("other", "third")
    } else {
        ("third", "other")
    };
    assert_eq!(program.fate(&data), Fate::HandedOn(low, FIRST_TTL));
    assert_eq!(
        program.fate(&mk_from(low, 64, vip, 6, &mk_tcp(port, 80, ACK))),
        Fate::HandedOn(high, FIRST_TTL)
    );
    // Who did not know it has sent it back: the next is asked, and then nobody is left.
    assert_eq!(
        program.fate(&mk_from(low, FIRST_TTL - 1, vip, 6, &mk_tcp(port, 80, ACK))),
        Fate::HandedOn(high, FIRST_TTL - 2)
    );
    assert_eq!(
        program.fate(&mk_from(
            high,
            FIRST_TTL - 3,
            vip,
            6,
            &mk_tcp(port, 80, ACK)
        )),
        Fate::Next
    );
    program.change(&held_by(vip, port, &[]));
    assert_eq!(program.fate(&data), Fate::Next);
}

/// Of more changes than there is room for those are forgotten that did not last.
#[test]
fn in_a_flurry_of_changes_the_table_that_lasted_is_remembered() {
    let mut program = Program::load();
    for vip in VIPS {
        program.port(vip, Protocol::Tcp, 80, mk_port(&["other"]));
        std::thread::sleep(std::time::Duration::from_millis(50));
        let crowd: Vec<String> = (0..MAX_HISTORY + 3)
            .map(|number| format!("new-{number}"))
            .collect();
        for size in 1..=crowd.len() {
            let mut nodes = vec!["here", "third"];
            nodes.extend(crowd[..size].iter().map(String::as_str));
            program.port(vip, Protocol::Tcp, 80, mk_port(&nodes));
        }
        program.port(vip, Protocol::Tcp, 80, mk_port(&["here"]));
        let port = port_of(vip, &[("here", &["here"])]);
        let asked = program.asked_about(vip, port);
        assert!(asked.contains(&"other"), "{asked:?}");
    }
}

impl Program {
    /// Who is asked for a flow that this node does not know.
    fn asked_about(&mut self, vip: IpAddr, port: u16) -> Vec<&'static str> {
        let mut asked = Vec::new();
        let mut fate = self.fate(&mk(vip, 6, &mk_tcp(port, 80, ACK)));
        while let Fate::HandedOn(node, ttl) = fate {
            asked.push(node);
            fate = self.fate(&mk_from(node, ttl - 1, vip, 6, &mk_tcp(port, 80, ACK)));
        }
        asked
    }
}

/// Those who held flows under tables that ended seconds ago have said so; who was first a moment ago has not.
#[test]
fn the_last_table_is_remembered_before_those_of_long_ago() {
    let mut program = Program::load();
    for vip in VIPS {
        for number in 0..MAX_HISTORY {
            let name = format!("old-{number}");
            program.port(vip, Protocol::Tcp, 80, mk_port(&[&name, "third"]));
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        program.port(vip, Protocol::Tcp, 80, mk_port(&["third"]));
        std::thread::sleep(std::time::Duration::from_secs(3));
        program.port(vip, Protocol::Tcp, 80, mk_port(&["other"]));
        program.port(vip, Protocol::Tcp, 80, mk_port(&["here"]));
        let port = port_of(vip, &[("here", &["here"])]);
        let asked = program.asked_about(vip, port);
        assert!(asked.contains(&"other"), "{asked:?}");
        assert!(asked.contains(&"third"), "{asked:?}");
    }
}

/// There is room for a few holders of a bucket: it is not wasted on this node and on the dead.
#[test]
fn of_many_holders_those_that_are_alive_are_asked() {
    let mut program = Program::load();
    let vip = V4.into();
    let port = port_of(vip, &[("here", &NODES)]);
    let seed = |node: &str| landfall_core::steering::seed(&node.into());
    let dead: Vec<String> = (0..100)
        .map(|number| format!("dead-{number}"))
        .filter(|name| seed(name) < seed("other").min(seed("third")))
        .take(MAX_HOLDERS)
        .collect();
    assert_eq!(dead.len(), MAX_HOLDERS);
    let mut all: Vec<&str> = dead.iter().map(String::as_str).collect();
    all.extend(["here", "other"]);
    program.change(&held_by(vip, port, &all));
    let data = mk(vip, 6, &mk_tcp(port, 80, ACK));
    assert_eq!(program.fate(&data), Fate::HandedOn("other", FIRST_TTL));
}

/// Two changes in quick succession, and somebody has spoken of another flow of the bucket: who held it before both is
/// asked too.
#[test]
fn one_holders_word_is_not_taken_for_all() {
    let mut program = Program::load();
    for vip in VIPS {
        program.port(vip, Protocol::Tcp, 80, mk_port(&["third"]));
        program.port(vip, Protocol::Tcp, 80, mk_port(&["here"]));
        program.port(vip, Protocol::Tcp, 80, mk_port(&["here", "other"]));
        let port = port_of(vip, &[("here", &["here", "other"])]);
        program.change(&held_by(vip, port, &["other"]));
        let asked = |program: &mut Program, from, ttl| {
            program.fate(&mk_from(from, ttl, vip, 6, &mk_tcp(port, 80, ACK)))
        };
        let data = mk(vip, 6, &mk_tcp(port, 80, ACK));
        let Fate::HandedOn(first, ttl) = program.fate(&data) else {
            panic!("somebody is asked")
        };
        let Fate::HandedOn(second, _) = asked(&mut program, first, ttl - 1) else {
            panic!("and then the other")
        };
        assert_eq!(
            BTreeSet::from([first, second]),
            BTreeSet::from(["other", "third"])
        );
    }
}

#[test]
fn an_own_flow_of_anothers_bucket_is_not_steered_away() {
    let mut program = Program::load();
    let vip = V4.into();
    let port = port_of(vip, &[("here", &NODES), ("other", &["other", "third"])]);
    assert_eq!(
        program.fate(&mk(vip, 6, &mk_tcp(port, 80, SYN))),
        Fate::Next
    );
    let data = mk(vip, 6, &mk_tcp(port, 80, ACK));
    assert_eq!(program.fate(&data), Fate::Next);
    program.port(vip, Protocol::Tcp, 80, mk_port(&["other", "third"]));
    // Long after the change, when earlier spreads are forgotten, what counts is that this node says it holds it.
    program.change(&held_by(vip, port, &["here"]));
    program.tables.forget_history().expect("the maps take it");
    assert_eq!(program.fate(&data), Fate::Next, "it is known here");
    program.change(&held_by(vip, port, &[]));
    assert_eq!(program.fate(&data), Fate::Sent("other"));
}
