//! Frames through `BPF_PROG_TEST_RUN`: what is counted, answered, sent elsewhere, and left as it is.

mod flows;
mod guard;
mod guessed;
mod headers;
mod judge;
mod kinds;
mod marks;
mod native;
mod sequences;
mod tunnel;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::programs::TestRunResult;
use aya::{Ebpf, TestRun, TestRunOptions};
use landfall_core::model::{NodeName, Protocol};
use landfall_core::steering::first;
use landfall_ebpf_common::{
    TUNNEL_INGRESS, UPLINK_EGRESS, UPLINK_INGRESS, Verdict, egress, rendezvous, seeded,
};

use super::super::driver::{Drivers, driver};
use super::super::tables::Tables;
use super::super::uplink::{classifier, object};
use super::super::{Change, NodeId, NodeState, PortId, PortState, Reach, VipCount, VipState};
use super::packets::*;

const V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);
const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x200);
const VIPS: [IpAddr; 2] = [IpAddr::V4(V4), IpAddr::V6(V6)];
/// A VIP that is not steered.
const COUNTED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 201);
/// What the kernel gives a test frame for interface: `lo`.
const INTERFACE: u32 = 1;
/// `enum xdp_action` (`linux/bpf.h`).
pub(super) const XDP_PASS: u32 = 2;
pub(super) const XDP_TX: u32 = 3;
pub(super) const NODES: [&str; 3] = ["here", "other", "third"];

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Left to the next program, as it was.
    Next,
    /// Sent to this node, otherwise as it was.
    Sent(&'static str),
    /// Sent to this node with another TTL, its header's checksum right, as a question or what goes back.
    HandedOn(&'static str, u8),
    /// The same, as a client's packet.
    Lowered(&'static str, u8),
    Dropped,
}

pub(super) struct Program {
    pub(super) ebpf: Ebpf,
    tables: Tables,
    drivers: Drivers,
}

fn mac(node: &str) -> [u8; 6] {
    let last = NODES
        .iter()
        .position(|known| *known == node)
        .expect("one of them");
    [2, 0, 0, 0, 1, u8::try_from(last).expect("few")]
}

pub(super) fn mk_id(node: &str) -> NodeId {
    NodeId {
        name: node.into(),
        interface: INTERFACE,
    }
}

fn mk_node(node: &str) -> NodeState {
    NodeState {
        here: node == "here",
        alive: true,
        steers: true,
        mac: Some(mac(node)),
        routed: BTreeSet::from([format!("10.{}.0.0/16", mac(node)[5])
            .parse()
            .expect("a literal")]),
        ..NodeState::default()
    }
}

fn mk_spread(nodes: &[&str]) -> BTreeMap<NodeName, u16> {
    nodes.iter().map(|node| ((*node).into(), 1)).collect()
}

pub(super) fn mk_port(nodes: &[&str]) -> PortState {
    PortState {
        nodes: mk_spread(nodes),
        here: nodes.contains(&"here"),
        reach: Reach::by(INTERFACE),
        ..PortState::default()
    }
}

/// What a program answers to a frame, and the frame then.
fn tried<P>(program: &P, frame: &[u8]) -> (u32, Vec<u8>)
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0; frame.len() + 64];
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            repeat: 1,
            ..Default::default()
        })
        .expect("the kernel runs it");
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}

impl Program {
    /// The program, with three nodes and two VIPs that are spread over all of them.
    pub(super) fn load() -> Self {
        let mut ebpf = object(None).expect("these tests load eBPF programs and need root");
        for name in [
            UPLINK_INGRESS,
            UPLINK_EGRESS,
            TUNNEL_INGRESS,
            egress::guard::PROGRAM,
            egress::judge::PROGRAM,
            egress::judge::RESTORE,
        ] {
            classifier(&mut ebpf, name)
                .expect("the object holds it")
                .load()
                .expect("the verifier accepts it");
        }
        driver(&mut ebpf)
            .expect("the object holds it")
            .load()
            .expect("the verifier accepts it");
        let mut drivers = Drivers::adopt(&mut ebpf).expect("the object holds the map");
        // The test device's.
        drivers.tell(INTERFACE, [0; 6]).expect("the map has room");
        let mut program = Self {
            drivers,
            tables: Tables::adopt(&mut ebpf, true).expect("the object holds the maps"),
            ebpf,
        };
        for node in NODES {
            program.change(&Change::Node(mk_id(node), Some(mk_node(node))));
        }
        for vip in VIPS {
            let steer = VipState {
                steer: true,
                udp_port: None,
            };
            program.change(&Change::Vip(vip, Some(steer)));
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                program.port(vip, protocol, 80, mk_port(&NODES));
            }
        }
        program.change(&Change::Vip(COUNTED.into(), Some(VipState::default())));
        program
            .tables
            .set_seeded(seeded::SETTLED)
            .expect("the map takes it");
        program
    }

    pub(super) fn change(&mut self, change: &Change) {
        self.tables.change(change).expect("the maps have room");
    }

    pub(super) fn port(&mut self, vip: IpAddr, protocol: Protocol, port: u16, state: PortState) {
        let id = PortId {
            vip,
            protocol,
            port,
        };
        self.change(&Change::Port(id, Some(state)));
    }

    /// The test device's answer and frame.
    pub(super) fn raw(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        self.run(UPLINK_INGRESS, frame)
    }

    fn run(&mut self, program: &'static str, frame: &[u8]) -> (u32, Vec<u8>) {
        tried(
            classifier(&mut self.ebpf, program).expect("the object holds it"),
            frame,
        )
    }

    /// The answer and frame of the program for drivers.
    pub(super) fn driven(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        tried(driver(&mut self.ebpf).expect("the object holds it"), frame)
    }

    /// What becomes of a frame; it is counted as what it is.
    fn fate(&mut self, frame: &[u8]) -> Fate {
        // At the driver first, as on a node: it sends the same frames to the same nodes, and leaves all others alone.
        let driven = self.driven(frame);
        let before = self.tables.verdicts();
        let (action, out) = self.raw(frame);
        if action == 7 {
            assert_eq!(driven, (XDP_TX, out.clone()), "at the driver");
        } else {
            assert_eq!(driven, (XDP_PASS, frame.to_vec()), "at the driver");
        }
        let fate = match action {
            // TCX_NEXT, TC_ACT_SHOT, TC_ACT_REDIRECT.
            u32::MAX => {
                assert_eq!(out, frame, "the frame must stay as it is");
                Fate::Next
            }
            2 => Fate::Dropped,
            7 => {
                let to = NODES
                    .into_iter()
                    .find(|node| mac(node) == out[..6])
                    .expect("a node's MAC");
                assert_eq!(out[6..12], frame[..6], "from this node's MAC");
                assert_eq!(out[12..14], frame[12..14]);
                if out[14..] == frame[14..] {
                    Fate::Sent(to)
                } else {
                    let at = if frame[12..14] == [0x08, 0] { 22 } else { 21 };
                    let mut expected = frame[14..].to_vec();
                    expected[at - 14] = out[at];
                    if at == 22 {
                        expected[10..12].copy_from_slice(&out[24..26]);
                        assert_eq!(is_sound(&out[14..]), is_sound(&frame[14..]), "the checksum");
                    }
                    assert_eq!(out[14..], expected, "the TTL and the checksum, and no more");
                    Fate::HandedOn(to, out[at])
                }
            }
            other => panic!("an action nobody should see: {other}"),
        };
        let after = self.tables.verdicts();
        let counted = Verdict::ALL.into_iter().filter(|verdict| {
            let grown = after[*verdict as usize] - before[*verdict as usize];
            assert!(grown <= 1, "{verdict:?} counts {grown} times");
            // It stands beside what became of the packet.
            grown == 1 && *verdict != Verdict::FlowsFull
        });
        let counted: Vec<Verdict> = counted.collect();
        let fate = match (fate, &counted[..]) {
            (Fate::HandedOn(to, ttl), [Verdict::Steered]) => Fate::Lowered(to, ttl),
            _ => fate,
        };
        let fits = match (fate, &counted[..]) {
            (Fate::Sent(_) | Fate::Lowered(..), [verdict]) => *verdict == Verdict::Steered,
            (Fate::HandedOn(..), [verdict]) => *verdict == Verdict::HandedOn,
            (Fate::Dropped, [verdict]) => matches!(
                verdict,
                Verdict::Unreachable | Verdict::Waiting | Verdict::Refused | Verdict::Collided
            ),
            (Fate::Next, [verdict]) => matches!(
                verdict,
                Verdict::Delivered | Verdict::Unserved | Verdict::StrayFragment
            ),
            // What is for nobody here, and what is not steered.
            (Fate::Next, []) => true,
            _ => false,
        };
        assert!(fits, "{fate:?} counts as {counted:?}");
        fate
    }

    fn verdict(&self, verdict: Verdict) -> u64 {
        self.tables.verdicts()[verdict as usize]
    }

    /// What was counted for a VIP by a frame that is left as it is.
    fn counted(&mut self, vip: IpAddr, frame: &[u8]) -> VipCount {
        let before = self.tables.counts()[&vip];
        assert_eq!(self.fate(frame), Fate::Next);
        let after = self.tables.counts()[&vip];
        VipCount {
            packets: after.packets - before.packets,
            bytes: after.bytes - before.bytes,
        }
    }
}

fn client(vip: IpAddr) -> IpAddr {
    match vip {
        IpAddr::V4(_) => Ipv4Addr::new(198, 51, 100, 7).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 7).into(),
    }
}

fn ethertype(vip: IpAddr) -> u16 {
    if vip.is_ipv4() { 0x0800 } else { 0x86dd }
}

/// A client's frame to a VIP.
pub(super) fn mk(vip: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    mk_frame(
        ethertype(vip),
        &mk_ip(client(vip), vip, protocol, 64, payload),
    )
}

/// The same, as another node sends it on.
fn mk_from(node: &str, ttl: u8, vip: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    mk_frame_from(
        mac(node),
        ethertype(vip),
        &mk_ip(client(vip), vip, protocol, ttl, payload),
    )
}

/// The bucket of a flow from a client.
fn bucket(vip: IpAddr, rest: u32) -> u32 {
    use landfall_ebpf_common::VipKey;
    rendezvous::bucket(rendezvous::hash(
        &VipKey::from_address(client(vip)).0,
        &VipKey::from_address(vip).0,
        rest,
    ))
}

/// A client's port and the VIP's, 80, as they go into a flow's hash.
fn ports(port: u16) -> u32 {
    u32::from(port) << 16 | 0x50
}

/// Whose a TCP flow from this port is.
fn owner(vip: IpAddr, port: u16, nodes: &[&'static str]) -> &'static str {
    let bucket = bucket(vip, ports(port));
    let name = first(&mk_spread(nodes), bucket).expect("somebody").clone();
    nodes
        .iter()
        .find(|node| **node == &*name.0)
        .expect("one of them")
}

/// A client's port whose flow is this node's by one spread, and that node's by another.
fn port_of(vip: IpAddr, spreads: &[(&'static str, &[&'static str])]) -> u16 {
    (1024..u16::MAX)
        .find(|port| {
            spreads
                .iter()
                .all(|(node, nodes)| owner(vip, *port, nodes) == *node)
        })
        .expect("there are many ports")
}
