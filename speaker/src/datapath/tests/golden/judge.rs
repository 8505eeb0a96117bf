//! Whose a packet is that no packet filter has seen: the programs say so to each other in the packet mark, and give it back.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use aya::maps::{HashMap, MapData};
use ipnet::IpNet;
use landfall_ebpf_common::FlowKey;
use landfall_ebpf_common::egress::guard::Guarded;
use landfall_ebpf_common::egress::judge::cilium::{FROM_OUTSIDE, MASQUERADED, key_v4, key_v6};
use landfall_ebpf_common::egress::judge::{IDLE, Judgement, MAX_DESTINATIONS, PROGRAM, RESTORE};
use nix::time::{ClockId, clock_gettime};

use super::guard::{
    CONTEXT, EGRESS, FROM, JUDGED, Left, MARK, NOBODYS, OUTSIDE, OWN, POD_LINK, TENANT, inside,
    mk_gateway, mk_leaving, pod,
};
use super::native::{mk_error, mk_fragment};
use super::*;
use crate::datapath::Leaving;
use crate::egress::{Egress, Pod, Policy};

/// Where the packet's control block lies in `__sk_buff`.
const BLOCK: std::ops::Range<usize> = 48..68;
/// An identity of Cilium's in the mark, which has both of our bits.
const CILIUMS: u32 = 0x3fff_0f00;
const BOTH: u32 = JUDGED | EGRESS;
/// A node's address, and one of no pod.
const NODE: u8 = 14;
const UNKNOWN: u8 = 15;

/// Whose pods there are, to be changed.
fn mk(change: impl FnOnce(&mut Egress)) -> Change {
    let Change::Egress(Some(leaving)) = mk_leaving(Some(mk_gateway())) else {
        unreachable!("it is that");
    };
    let mut egress = Egress::clone(&leaving.egress);
    for family in 0..2 {
        let plain = Pod {
            node: "here".into(),
            tenant: None,
            identity: 1,
            former: None,
        };
        egress.pods.insert(pod(family, NOBODYS), plain);
        egress.inside.insert(pod(family, NODE).into());
    }
    change(&mut egress);
    Change::Egress(Some(Arc::new(Leaving {
        egress: Arc::new(egress),
        ..Leaving::clone(&leaving)
    })))
}

/// A policy's pods become another's.
fn to_other(egress: &mut Egress, family: usize, former: bool) {
    let web = Policy {
        gateway: Some(mk_gateway()),
        ..Policy::default()
    };
    egress.policies.insert("web".into(), web);
    let of = egress
        .pods
        .get_mut(&pod(family, TENANT))
        .expect("it is there");
    of.tenant.as_mut().expect("it is one").policy = "web".into();
    of.former = former.then(|| "mail".into());
}

/// What a program makes of a frame: its action and the context then.
pub(super) fn run(
    program: &mut Program,
    name: &'static str,
    frame: &[u8],
    context: &[u8],
) -> (u32, Vec<u8>) {
    let mut out = vec![0; frame.len()];
    let mut after = vec![0; CONTEXT];
    let result = classifier(&mut program.ebpf, name)
        .expect("the object holds it")
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(context),
            ctx_out: Some(&mut after),
            repeat: 1,
            ..Default::default()
        })
        .expect("the kernel runs it");
    assert_eq!(out, frame, "nothing of the frame is changed");
    (result.return_value, after)
}

pub(super) fn mark(context: &[u8]) -> u32 {
    u32::from_ne_bytes(context[MARK].try_into().expect("four bytes"))
}

impl Program {
    /// Our bits of the mark when a frame has been judged; nothing, if it was dropped. What is restored is Cilium's, or says
    /// that the frame has its source.
    fn judges(&mut self, frame: &[u8], from: u32) -> Option<u32> {
        let mut context = [0; CONTEXT];
        context[MARK].copy_from_slice(&CILIUMS.to_ne_bytes());
        context[FROM].copy_from_slice(&from.to_ne_bytes());
        let (action, after) = run(self, PROGRAM, frame, &context);
        if action == 2 {
            return None;
        }
        assert_eq!(action, u32::MAX);
        let judged = mark(&after);
        assert_eq!(judged & !BOTH, CILIUMS & !BOTH, "the others' bits stay");
        let (action, restored) = run(self, RESTORE, frame, &after);
        assert_eq!(action, u32::MAX);
        let expected = if judged & EGRESS != 0 {
            CILIUMS & !0xf00 | 0x300
        } else {
            CILIUMS
        };
        assert_eq!(mark(&restored), expected);
        assert_eq!(restored[BLOCK], [0; 20], "nothing stays behind");
        Some(judged & BOTH)
    }

    /// The same of a TCP packet from a port to port 25, in the middle of a connection.
    fn says(&mut self, source: IpAddr, to: IpAddr, port: u16) -> Option<u32> {
        self.judges(&of_tcp(source, to, [port, 25], ACK), POD_LINK)
    }

    /// The same of one that begins a connection.
    fn begins(&mut self, source: IpAddr, to: IpAddr, port: u16) -> Option<u32> {
        self.judges(&tcp(source, to, [port, 25]), POD_LINK)
    }

    /// All flows were last heard so many seconds ago.
    fn age(&mut self, idle: u32) {
        let map = self.tables.guard.judge().expect("it judges").flows();
        let all: Vec<(FlowKey, Judgement)> = map.iter().flatten().collect();
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("there is one");
        let now = u32::try_from(now.tv_sec()).expect("not so long");
        for (flow, judgement) in all {
            let seen = now.wrapping_sub(idle);
            map.insert(flow, Judgement { seen, ..judgement }, 0)
                .expect("it is there");
        }
    }

    /// Cilium knows a flow.
    fn lend(&mut self, source: IpAddr, to: IpAddr, ports: [u16; 2], protocol: u8, flags: u8) {
        let word = match (flags, protocol) {
            (MASQUERADED, _) => "SNAT",
            (_, 6) => "TCP",
            _ => "ANY",
        };
        let of = |suffix| format!("CILIUM_{word}_{suffix}");
        match (source, to) {
            (IpAddr::V4(source), IpAddr::V4(to)) => {
                let map = self.ebpf.map_mut(&of("V4")).expect("the object holds it");
                let mut map: HashMap<&mut MapData, [u8; 14], u64> =
                    map.try_into().expect("it is one");
                let key = key_v4(&source.octets(), &to.octets(), ports, protocol, flags);
                map.insert(key, 1, 0).expect("there is room");
            }
            (IpAddr::V6(source), IpAddr::V6(to)) => {
                let map = self.ebpf.map_mut(&of("V6")).expect("the object holds it");
                let mut map: HashMap<&mut MapData, [u8; 38], u64> =
                    map.try_into().expect("it is one");
                let key = key_v6(&source.octets(), &to.octets(), ports, protocol, flags);
                map.insert(key, 1, 0).expect("there is room");
            }
            _ => unreachable!("one family"),
        }
    }
}

pub(super) fn tcp(source: IpAddr, to: IpAddr, ports: [u16; 2]) -> Vec<u8> {
    of_tcp(source, to, ports, SYN)
}

fn of_tcp(source: IpAddr, to: IpAddr, [from, port]: [u16; 2], flags: u8) -> Vec<u8> {
    let segment = mk_tcp(from, port, flags);
    mk_frame(ethertype(source), &mk_ip(source, to, 6, 63, &segment))
}

#[test]
fn it_says_what_the_packet_filter_would_and_gives_the_mark_back() {
    let mut program = Program::load();
    program.change(&mk(|_| {}));
    for (family, vip) in VIPS.into_iter().enumerate() {
        let [tenant, plain, node, unknown] =
            [TENANT, NOBODYS, NODE, UNKNOWN].map(|last| pod(family, last));
        let remote = client(vip);
        for (source, to, from, expected) in [
            (tenant, remote, POD_LINK, BOTH),
            (tenant, remote, OUTSIDE, 0),
            // By a proxy of Cilium's on this node.
            (tenant, remote, OWN, BOTH),
            (plain, remote, OWN, 0),
            (node, remote, OWN, 0),
            (tenant, inside(family), POD_LINK, 0),
            (tenant, vip, POD_LINK, 0),
            (plain, remote, POD_LINK, JUDGED),
            (plain, remote, OUTSIDE, 0),
            // A Service's answer: Cilium has given it its source at the pod's interface.
            (node, remote, POD_LINK, JUDGED),
            (vip, remote, POD_LINK, JUDGED),
            (unknown, remote, POD_LINK, 0),
            (remote, remote, POD_LINK, 0),
        ] {
            let said = program.judges(&tcp(source, to, [4000, 25]), from);
            assert_eq!(said, Some(expected), "{source} to {to} by {from}");
        }
        // By a device that does not say where from, or by a proxy: nobody knows whose it is.
        let stray = |to| tcp(unknown, to, [4000, 25]);
        assert_eq!(program.judges(&stray(remote), OWN), None);
        assert_eq!(program.judges(&stray(inside(family)), OWN), Some(0));
    }
    // Without policies it does nothing.
    program.change(&Change::Egress(None));
    let frame = tcp(pod(0, TENANT), client(VIPS[0]), [4000, 25]);
    let mut context = [0; CONTEXT];
    context[MARK].copy_from_slice(&CILIUMS.to_ne_bytes());
    for name in [PROGRAM, RESTORE] {
        let (action, after) = run(&mut program, name, &frame, &context);
        assert_eq!((action, mark(&after)), (u32::MAX, CILIUMS), "{name}");
    }
}

#[test]
fn what_cilium_knows_to_be_an_answer_or_masqueraded_stays_what_it_is() {
    let mut program = Program::load();
    program.change(&mk(|_| {}));
    for (family, vip) in VIPS.into_iter().enumerate() {
        let (tenant, remote) = (pod(family, TENANT), client(vip));
        let seen = |program: &mut Program, ports| {
            program.judges(&of_tcp(tenant, remote, ports, ACK), POD_LINK)
        };
        program.lend(tenant, remote, [25, 5000], 6, FROM_OUTSIDE);
        assert_eq!(seen(&mut program, [25, 5000]), Some(JUDGED), "an answer");
        assert_eq!(seen(&mut program, [5000, 25]), Some(BOTH), "turned round");
        // What began outside is over, and Cilium remembers it still.
        program.lend(tenant, remote, [5005, 25], 6, FROM_OUTSIDE);
        assert_eq!(program.begins(tenant, remote, 5005), Some(BOTH));
        assert_eq!(seen(&mut program, [5005, 25]), Some(BOTH), "and goes on");
        // It was there when the first policy came.
        program.lend(tenant, remote, [5001, 25], 6, MASQUERADED);
        assert_eq!(seen(&mut program, [5001, 25]), Some(JUDGED), "from before");
        let begins = program.begins(tenant, remote, 5001);
        assert_eq!(begins, Some(BOTH), "another from the same port");
        assert_eq!(
            seen(&mut program, [5001, 25]),
            Some(BOTH),
            "and that goes on"
        );
        let udp = mk_frame(
            ethertype(tenant),
            &mk_ip(tenant, remote, 17, 63, &mk_udp(53, 5002, &[])),
        );
        assert_eq!(program.judges(&udp, POD_LINK), Some(BOTH));
        let (protocol, request) = if vip.is_ipv4() { (1, 8) } else { (58, 128) };
        let echo = [request, 0, 0, 0, 0x12, 0x34, 0, 1];
        let echo = mk_ip(tenant, remote, protocol, 63, &echo);
        program.lend(tenant, remote, [0x1234, 0], protocol, MASQUERADED);
        let said = program.judges(&mk_frame(ethertype(tenant), &echo), POD_LINK);
        assert_eq!(said, Some(JUDGED), "echo from before");
        // What left by its gateway does so for good, whatever Cilium takes it for by now.
        for flags in [FROM_OUTSIDE, MASQUERADED] {
            program.lend(tenant, remote, [53, 5002], 17, flags);
        }
        assert_eq!(program.judges(&udp, POD_LINK), Some(BOTH));
        let udp = mk_frame(
            ethertype(tenant),
            &mk_ip(tenant, remote, 17, 63, &mk_udp(54, 5002, &[])),
        );
        program.lend(tenant, remote, [54, 5002], 17, FROM_OUTSIDE);
        assert_eq!(program.judges(&udp, POD_LINK), Some(JUDGED));
    }
    // Another pod has the address: what was masqueraded was not its own.
    let (tenant, remote) = (pod(0, TENANT), client(VIPS[0]));
    program.change(&mk(|egress| {
        egress.pods.get_mut(&tenant).expect("it is there").identity = 2;
    }));
    program.lend(tenant, remote, [5003, 25], 6, MASQUERADED);
    assert_eq!(program.says(tenant, remote, 5003), Some(BOTH));
    // A pod that was known before it was a tenant has what it had, unless its policy cuts that.
    let plain = pod(0, NOBODYS);
    for cuts in [false, true] {
        program.change(&mk(|egress| {
            let tenant = egress.pods[&pod(0, TENANT)].tenant.clone();
            egress.pods.get_mut(&plain).expect("it is there").tenant = tenant;
            let policies = egress.policies.values_mut();
            policies.for_each(|policy| policy.cuts = cuts);
        }));
        program.lend(plain, remote, [5004, 25], 6, MASQUERADED);
        let expected = if cuts { BOTH } else { JUDGED };
        assert_eq!(program.says(plain, remote, 5004), Some(expected));
    }
}

#[test]
fn a_flow_keeps_what_it_began_with() {
    let mut program = Program::load();
    program.change(&mk(|_| {}));
    for (family, vip) in VIPS.into_iter().enumerate() {
        let (tenant, remote) = (pod(family, TENANT), client(vip));
        program.change(&mk(|_| {}));
        assert_eq!(program.says(tenant, remote, 1), Some(BOTH));
        // The pod becomes another policy's, whose flows go on by the first one's gateway; then they are forgotten.
        program.change(&mk(|egress| to_other(egress, family, true)));
        assert_eq!(program.says(tenant, remote, 1), Some(EGRESS));
        assert_eq!(program.says(tenant, remote, 2), Some(BOTH));
        program.change(&mk(|egress| {
            let of = egress.pods.get_mut(&tenant).expect("it is there");
            of.former = Some("mail".into());
            of.tenant = None;
        }));
        assert_eq!(program.says(tenant, remote, 1), Some(EGRESS));
        assert_eq!(program.says(tenant, remote, 3), Some(JUDGED));
        program.lend(tenant, remote, [3, 25], 6, MASQUERADED);
        program.change(&mk(|egress| to_other(egress, family, false)));
        assert_eq!(program.says(tenant, remote, 3), Some(JUDGED), "it stays");
        assert_eq!(
            program.says(tenant, remote, 1),
            Some(BOTH),
            "it begins anew"
        );
        // A policy for other destinations has its flows still, and what it was not for is not its own later.
        program.change(&mk(|_| {}));
        assert_eq!(program.says(tenant, remote, 4), Some(BOTH));
        let elsewhere = |egress: &mut Egress, cuts: bool| {
            let policy = egress.policies.get_mut("mail").expect("it is there");
            let nets = ["203.0.113.0/24", "2001:db8:99::/48"];
            policy.destinations = nets.map(|net| net.parse().expect("a literal")).into();
            policy.cuts = cuts;
        };
        program.change(&mk(|egress| elsewhere(egress, false)));
        assert_eq!(program.says(tenant, remote, 4), Some(BOTH));
        for port in [5, 9] {
            assert_eq!(program.begins(tenant, remote, port), Some(JUDGED));
        }
        program.change(&mk(|_| {}));
        program.lend(tenant, remote, [5, 25], 6, MASQUERADED);
        assert_eq!(program.says(tenant, remote, 5), Some(JUDGED));
        assert_eq!(program.says(tenant, remote, 9), Some(BOTH), "it is over");
        assert_eq!(program.says(tenant, remote, 6), Some(BOTH));
        program.change(&mk(|egress| {
            let policy = egress.policies.get_mut("mail").expect("it is there");
            policy.excluded.insert(remote.into());
        }));
        assert_eq!(program.says(tenant, remote, 6), Some(BOTH));
        assert_eq!(program.says(tenant, remote, 7), Some(JUDGED));
        program.change(&mk(|egress| {
            egress.policies.get_mut("mail").expect("it is there").cuts = true;
        }));
        assert_eq!(program.says(tenant, remote, 5), Some(BOTH), "it is cut");
        // What has become the cluster's own ends, if it left by a gateway.
        program.change(&mk(|egress| {
            egress.inside.insert(remote.into());
        }));
        assert_eq!(program.says(tenant, remote, 6), None);
        assert_eq!(program.says(tenant, remote, 8), Some(0));
    }
    assert_eq!(program.guarded(Guarded::Joined), 2);
}

/// What was idle for longer than a gateway keeps it begins anew; TCP may be idle for long.
#[test]
fn a_flow_that_was_idle_for_long_is_another() {
    let mut program = Program::load();
    for (family, vip) in VIPS.into_iter().enumerate() {
        let (tenant, remote) = (pod(family, TENANT), client(vip));
        let datagram = mk_ip(tenant, remote, 17, 63, &mk_udp(53, 5000, &[]));
        let datagram = mk_frame(ethertype(tenant), &datagram);
        let segment = of_tcp(tenant, remote, [53, 5000], ACK);
        for (idle, said) in [(IDLE - 60, EGRESS), (IDLE + 60, BOTH)] {
            program.change(&mk(|_| {}));
            for frame in [&datagram, &segment] {
                assert_eq!(program.judges(frame, POD_LINK), Some(BOTH));
            }
            program.change(&mk(|egress| to_other(egress, family, true)));
            program.age(idle);
            assert_eq!(program.judges(&datagram, POD_LINK), Some(said), "{idle} s");
            // It is heard again.
            program.age(0);
            assert_eq!(program.judges(&segment, POD_LINK), Some(EGRESS));
        }
    }
}

/// Who judges was taken away: the guard leads a tenant's packets all the same, and Cilium must not give them its source.
#[test]
fn what_nobody_has_judged_is_said_to_have_its_source_if_it_is_a_tenants() {
    let mut program = Program::load();
    program.change(&mk(|_| {}));
    let mut context = [0; CONTEXT];
    context[MARK].copy_from_slice(&CILIUMS.to_ne_bytes());
    for (family, vip) in VIPS.into_iter().enumerate() {
        for (source, expected) in [(TENANT, CILIUMS & !0xf00 | 0x300), (NOBODYS, CILIUMS)] {
            let frame = tcp(pod(family, source), client(vip), [4000, 25]);
            let (action, after) = run(&mut program, RESTORE, &frame, &context);
            assert_eq!((action, mark(&after)), (u32::MAX, expected), "{source}");
        }
    }
}

/// Fragments go where the first went, and errors where what they are about came from.
#[test]
fn fragments_and_errors_are_of_their_flows() {
    let mut program = Program::load();
    program.change(&mk(|_| {}));
    for (family, vip) in VIPS.into_iter().enumerate() {
        let (tenant, remote) = (pod(family, TENANT), client(vip));
        program.lend(tenant, remote, [53, 5000], 17, FROM_OUTSIDE);
        for (port, said) in [(5000, JUDGED), (5001, BOTH)] {
            let datagram = mk_udp(53, port, &[0x5a; 64]);
            for part in [0, 1] {
                let fragment = mk_fragment(tenant, remote, &datagram, part);
                let judged = program.judges(&fragment, POD_LINK);
                assert_eq!(judged, Some(said), "to {port}, {part}");
            }
            let asked = mk_ip(remote, tenant, 17, 60, &mk_udp(port, 53, &[]));
            let error = program.judges(&mk_error(tenant, remote, &asked), POD_LINK);
            assert_eq!(error, Some(said), "about what came from {port}");
        }
        // Nobody has seen the first: it goes as the policy says.
        let stray = mk_fragment(tenant, pod(family, UNKNOWN), &mk_udp(53, 1, &[0; 64]), 1);
        assert_eq!(program.judges(&stray, POD_LINK), Some(0), "in the cluster");
        let protocol = mk_ip(tenant, remote, 47, 60, &[0; 8]);
        let said = program.judges(&mk_frame(ethertype(tenant), &protocol), POD_LINK);
        assert_eq!(said, Some(BOTH), "of a protocol that is not read");
    }
}

/// A policy's networks are of their own families: nothing of IPv6 is about an IPv4 address.
#[test]
fn families_are_told_apart() {
    let mut program = Program::load();
    for (excluded, said) in [(false, [JUDGED, BOTH]), (true, [BOTH, JUDGED])] {
        program.change(&mk(|egress| {
            let policy = egress.policies.get_mut("mail").expect("it is there");
            let nets = if excluded {
                &mut policy.excluded
            } else {
                &mut policy.destinations
            };
            nets.insert("::/0".parse().expect("a literal"));
        }));
        for (family, vip) in VIPS.into_iter().enumerate() {
            let begun = program.begins(pod(family, TENANT), client(vip), 4000);
            assert_eq!(begun, Some(said[family]), "{vip}, excluded: {excluded}");
        }
    }
}

/// There is no room for all networks of a policy: its pods are closed, whatever it is for, and others are not concerned.
#[test]
fn a_policy_whose_networks_are_not_all_known_lets_nobody_out() {
    let mut program = Program::load();
    let many = (0..MAX_DESTINATIONS + 10).map(|number| {
        let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + number);
        IpNet::from(IpAddr::from(address))
    });
    let many: BTreeSet<IpNet> = many.collect();
    let change = mk(|egress| {
        to_other(egress, 0, false);
        let web = egress.policies.get_mut("web").expect("it is there");
        web.destinations.clone_from(&many);
    });
    let (web, mail) = (pod(0, TENANT), pod(1, TENANT));
    let led = |program: &mut Program, pod: IpAddr, vip: IpAddr| {
        let said = program.begins(pod, client(vip), 4000);
        assert_eq!(said, Some(BOTH));
        program.guards(pod, client(vip), BOTH, POD_LINK)
    };
    program
        .tables
        .change(&change)
        .expect_err("there is no room");
    assert_eq!(led(&mut program, web, VIPS[0]), Left::Dropped);
    assert_ne!(led(&mut program, mail, VIPS[1]), Left::Dropped);
    // With room it is for what it says.
    program.change(&mk(|egress| {
        to_other(egress, 0, false);
        let web = egress.policies.get_mut("web").expect("it is there");
        web.destinations = many.iter().take(10).copied().collect();
    }));
    assert_eq!(program.begins(web, client(VIPS[0]), 4000), Some(JUDGED));
}
