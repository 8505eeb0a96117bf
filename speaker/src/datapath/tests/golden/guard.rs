//! What leaves by an uplink and is a pod's.

use std::sync::Arc;

use landfall_core::steering::seed;
use landfall_ebpf_common::egress::guard::{Guarded, PROGRAM};
use landfall_ebpf_common::tunnel_mac;

use super::judge::{mark, run, tcp};
use super::*;
use crate::datapath::Leaving;
use crate::datapath::egress::Surroundings;
use crate::egress::{Egress, Gateway, Pod, Policy, Tenant};
use crate::node_rules::TUNNEL;

/// What `__sk_buff` is to the kernel, and where its mark and the interface that it came by lie.
pub(super) const CONTEXT: usize = 256;
pub(super) const MARK: std::ops::Range<usize> = 8..12;
pub(super) const FROM: std::ops::Range<usize> = 36..40;

pub(super) const JUDGED: u32 = 0x1000_0000;
pub(super) const EGRESS: u32 = 0x2000_0000;
const NO_MARK: u32 = 0x11;
/// Interfaces that frames come in by: none, a pod's, one to the outside.
pub(super) const OWN: u32 = 0;
pub(super) const POD_LINK: u32 = 5;
pub(super) const OUTSIDE: u32 = 9;
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 9, 9];

/// The last numbers of pods' addresses.
pub(super) const TENANT: u8 = 10;
const CLOSED: u8 = 11;
pub(super) const ELSEWHERE: u8 = 12;
pub(super) const NOBODYS: u8 = 13;

pub(super) fn pod(family: usize, last: u8) -> IpAddr {
    match family {
        0 => Ipv4Addr::new(10, 244, 1, last).into(),
        _ => Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, last.into()).into(),
    }
}

pub(super) fn inside(family: usize) -> IpAddr {
    match family {
        0 => Ipv4Addr::new(10, 96, 0, 1).into(),
        _ => Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1).into(),
    }
}

pub(super) fn mk_gateway() -> Gateway {
    Gateway {
        node: "other".into(),
        uplink: "lo".into(),
        interface: INTERFACE,
        mac: Some(GATEWAY),
        epoch: 1,
        settled: true,
    }
}

pub(super) fn mk_leaving(gateway: Option<Gateway>) -> Change {
    let policy = Policy {
        gateway,
        ..Policy::default()
    };
    let mut egress = Egress {
        policies: [("mail".into(), policy)].into(),
        inside: ["10.0.0.0/8", "fd00::/16"]
            .map(|net| net.parse().expect("a literal"))
            .into(),
        ..Egress::default()
    };
    for (family, vip) in VIPS.into_iter().enumerate() {
        for (last, node, egress_ip) in [
            (TENANT, "here", Some(vip)),
            (CLOSED, "here", None),
            (ELSEWHERE, "other", Some(vip)),
        ] {
            let tenant = Some(Tenant {
                policy: "mail".into(),
                egress_ip,
            });
            let node = node.into();
            let pod_of = Pod {
                node,
                tenant,
                identity: 1,
                former: None,
            };
            egress.pods.insert(pod(family, last), pod_of);
        }
    }
    Change::Egress(Some(Arc::new(Leaving {
        node: "here".into(),
        egress: Arc::new(egress),
        outside: [INTERFACE, OUTSIDE].into(),
        mark: JUDGED | EGRESS,
        around: Arc::new(Surroundings::nowhere()),
    })))
}

/// What becomes of a frame that leaves.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// As it was.
    Passed,
    /// From this Ethernet address to that one.
    Led([u8; 6], [u8; 6]),
    Dropped,
}

impl Program {
    pub(super) fn guards(&mut self, source: IpAddr, to: IpAddr, mark: u32, from: u32) -> Left {
        let frame = mk_frame(
            ethertype(source),
            &mk_ip(source, to, 6, 63, &mk_tcp(4000, 25, SYN)),
        );
        let mut context = [0; CONTEXT];
        context[MARK].copy_from_slice(&mark.to_ne_bytes());
        context[FROM].copy_from_slice(&from.to_ne_bytes());
        let mut out = vec![0; frame.len()];
        let result = classifier(&mut self.ebpf, PROGRAM)
            .expect("the object holds it")
            .test_run(TestRunOptions {
                data_in: Some(&frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                repeat: 1,
                ..Default::default()
            })
            .expect("the kernel runs it");
        assert_eq!(out[12..], frame[12..], "what is behind the addresses stays");
        match result.return_value {
            u32::MAX if out == frame => Left::Passed,
            u32::MAX => Left::Led(
                out[6..12].try_into().expect("six bytes"),
                out[..6].try_into().expect("six bytes"),
            ),
            2 => Left::Dropped,
            other => panic!("an action nobody should see: {other}"),
        }
    }

    pub(super) fn guarded(&self, what: Guarded) -> u64 {
        self.tables.guarded()[what as usize]
    }
}

#[test]
fn a_tenants_packets_go_to_its_gateway_and_those_of_the_cluster_stay() {
    let mut program = Program::load();
    program.change(&mk_leaving(Some(mk_gateway())));
    let led = || Left::Led([0; 6], GATEWAY);
    for (family, vip) in VIPS.into_iter().enumerate() {
        let tenant = pod(family, TENANT);
        let remote = client(vip);
        for (to, mark, from, expected) in [
            (remote, JUDGED | EGRESS, POD_LINK, led()),
            (remote, JUDGED, POD_LINK, Left::Passed),
            (inside(family), NO_MARK, POD_LINK, Left::Passed),
            (vip, NO_MARK, POD_LINK, Left::Passed),
            // A flow that goes by its gateway also to a VIP.
            (vip, JUDGED | EGRESS, POD_LINK, led()),
            (inside(family), NO_MARK, OUTSIDE, Left::Passed),
            (remote, NO_MARK, OUTSIDE, Left::Dropped),
            (remote, NO_MARK, POD_LINK, led()),
            // Nobody judged the last, and connection tracking may take the next for an answer.
            (remote, JUDGED, POD_LINK, led()),
        ] {
            let left = program.guards(tenant, to, mark, from);
            assert_eq!(left, expected, "to {to}, {mark:#x}, by {from}");
        }
        for mark in [NO_MARK, JUDGED | EGRESS] {
            let closed = program.guards(pod(family, CLOSED), remote, mark, POD_LINK);
            assert_eq!(closed, Left::Dropped, "it has no address");
        }
    }
    let counts = Guarded::ALL.map(|what| program.guarded(what));
    // Led, led unjudged or after that, unjudged, without a gateway, forged, unsendable, joined: of both families.
    assert_eq!(counts, [2 * 2, 2 * 2, 0, 2 * 2, 2, 0, 0]);
}

#[test]
fn others_leave_when_they_are_judged() {
    let mut program = Program::load();
    program.change(&mk_leaving(Some(mk_gateway())));
    for (family, vip) in VIPS.into_iter().enumerate() {
        let remote = client(vip);
        for source in [NOBODYS, ELSEWHERE].map(|last| pod(family, last)) {
            for (to, mark, from, expected) in [
                (remote, NO_MARK, POD_LINK, Left::Dropped),
                (remote, NO_MARK | JUDGED, POD_LINK, Left::Passed),
                // A tenant to the packet filter, that the maps have not been told of.
                (remote, JUDGED | EGRESS, POD_LINK, Left::Dropped),
                (remote, NO_MARK, OWN, Left::Passed),
                (remote, JUDGED | EGRESS, OWN, Left::Passed),
                (inside(family), JUDGED | EGRESS, POD_LINK, Left::Passed),
                (remote, NO_MARK, OUTSIDE, Left::Passed),
                (inside(family), NO_MARK, POD_LINK, Left::Passed),
                (vip, NO_MARK, POD_LINK, Left::Passed),
            ] {
                let left = program.guards(source, to, mark, from);
                assert_eq!(left, expected, "{source} to {to}, {mark:#x}, by {from}");
            }
        }
    }
    assert_eq!(program.guarded(Guarded::Unjudged), 4);
    assert_eq!(program.guarded(Guarded::NoGateway), 4);
    // Without policies nobody is guarded.
    program.change(&Change::Egress(None));
    for last in [TENANT, CLOSED, NOBODYS] {
        let left = program.guards(pod(0, last), client(VIPS[0]), NO_MARK, POD_LINK);
        assert_eq!(left, Left::Passed);
    }
}

/// A pod that was a tenant of one policy and is another's, or nobody's: what it had goes where it went, what it begins does
/// not, and what nobody has told apart goes nowhere.
#[test]
fn flows_from_before_go_to_the_gateway_that_they_began_with() {
    const SECOND: [u8; 6] = [2, 0, 0, 0, 9, 7];
    let remote = client(VIPS[0]);
    let (moved, left) = (pod(0, TENANT), pod(0, CLOSED));
    let mut program = Program::load();
    let Change::Egress(Some(leaving)) = mk_leaving(Some(mk_gateway())) else {
        panic!("it is what is made");
    };
    let mut egress = Egress::clone(&leaving.egress);
    let second = Policy {
        gateway: Some(Gateway {
            mac: Some(SECOND),
            ..mk_gateway()
        }),
        ..egress.policies["mail"].clone()
    };
    egress.policies.insert("shop".into(), second);
    for (address, tenant) in [(moved, Some("shop")), (left, None)] {
        let of = egress.pods.get_mut(&address).expect("it is there");
        of.former = Some("mail".into());
        of.tenant = tenant.map(|policy| Tenant {
            policy: policy.into(),
            egress_ip: Some(VIPS[0]),
        });
    }
    program.change(&Change::Egress(Some(Arc::new(Leaving {
        egress: Arc::new(egress),
        ..Leaving::clone(&leaving)
    }))));
    let former = Left::Led([0; 6], GATEWAY);
    for (source, mark, expected) in [
        (moved, EGRESS, &former),
        (moved, JUDGED | EGRESS, &Left::Led([0; 6], SECOND)),
        (moved, NO_MARK, &Left::Dropped),
        (left, EGRESS, &former),
        (left, JUDGED, &Left::Passed),
        (left, NO_MARK, &Left::Dropped),
        (left, JUDGED | EGRESS, &Left::Dropped),
    ] {
        let went = program.guards(source, remote, mark, POD_LINK);
        assert_eq!(went, *expected, "{source} with {mark:#x}");
    }
}

#[test]
fn a_gateway_is_one_write_for_all_its_tenants() {
    let mut program = Program::load();
    let tenant = pod(0, TENANT);
    let remote = client(VIPS[0]);
    let mut leaves = |gateway| {
        program.change(&mk_leaving(gateway));
        program.guards(tenant, remote, JUDGED | EGRESS, POD_LINK)
    };
    assert_eq!(leaves(None), Left::Dropped);
    assert_eq!(leaves(Some(mk_gateway())), Left::Led([0; 6], GATEWAY));
    let moved = Gateway {
        mac: Some([2, 0, 0, 0, 9, 8]),
        ..mk_gateway()
    };
    assert_eq!(leaves(Some(moved)), Left::Led([0; 6], [2, 0, 0, 0, 9, 8]));
    let unheard = Gateway {
        mac: None,
        ..mk_gateway()
    };
    assert_eq!(leaves(Some(unheard)), Left::Dropped);
    let here = Gateway {
        node: "here".into(),
        mac: None,
        ..mk_gateway()
    };
    assert_eq!(
        leaves(Some(here.clone())),
        Left::Passed,
        "what comes behind translates it"
    );
    let by_another = Gateway {
        interface: OUTSIDE,
        ..here
    };
    assert_eq!(
        leaves(Some(by_another)),
        Left::Dropped,
        "it would leave by the wrong uplink"
    );
}

/// The gateway's program, which comes behind, goes by the mark.
#[test]
fn what_nobody_has_judged_is_translated_where_the_gateway_is() {
    let mut program = Program::load();
    let here = Gateway {
        node: "here".into(),
        mac: None,
        ..mk_gateway()
    };
    program.change(&mk_leaving(Some(here)));
    for (family, vip) in VIPS.into_iter().enumerate() {
        let frame = tcp(pod(family, TENANT), client(vip), [4000, 25]);
        // The last may be taken for an answer by connection tracking, since nobody judged the one before.
        for before in [JUDGED | EGRESS, NO_MARK, JUDGED] {
            let mut context = [0; CONTEXT];
            context[MARK].copy_from_slice(&before.to_ne_bytes());
            context[FROM].copy_from_slice(&POD_LINK.to_ne_bytes());
            let (action, after) = run(&mut program, PROGRAM, &frame, &context);
            let marked = before | JUDGED | EGRESS;
            assert_eq!((action, mark(&after)), (u32::MAX, marked), "{before:#x}");
        }
    }
    assert_eq!(program.guarded(Guarded::LedUnjudged), 4);
}

#[test]
fn a_gateway_off_the_segment_is_reached_by_the_tunnel() {
    let mut program = Program::load();
    let state = NodeState {
        mac: Some(tunnel_mac(seed(&"other".into()))),
        address: Some("203.0.113.9".parse().unwrap()),
        ..mk_node("other")
    };
    program.change(&Change::Node(mk_id("other"), Some(state)));
    let mac = tunnel_mac(seed(&"other".into()));
    program.change(&mk_leaving(Some(Gateway {
        uplink: TUNNEL.into(),
        mac: Some(mac),
        ..mk_gateway()
    })));
    let here = tunnel_mac(seed(&"here".into()));
    for (family, vip) in VIPS.into_iter().enumerate() {
        let left = program.guards(pod(family, TENANT), client(vip), JUDGED | EGRESS, POD_LINK);
        assert_eq!(left, Left::Led(here, mac));
    }
}
