//! The gateway's programs by `BPF_PROG_TEST_RUN`: what is translated and how, what is answered, refused, and left alone.

mod answers;
mod bandwidth;
mod changes;
mod copies;
#[cfg(feature = "bench")]
mod cost;
mod counts;
mod errors;
mod hairpin;
mod life;
mod others;
mod ports;
mod replicated;
mod standing;
mod translated;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use aya::programs::{Program, SchedClassifier};
use aya::{Ebpf, TestRun, TestRunOptions};
use landfall_ebpf_common::egress::binding::Times;
use landfall_ebpf_common::egress::gateway::{GateSettings, Reason};
use landfall_ebpf_common::{GATEWAY_EGRESS, GATEWAY_INGRESS, GATEWAY_KEEP};

use super::super::egress::{
    Copies, Keeper, Kernel, Known, Orphaned, Peer, PeerId, Plan, Source, Standing, Surroundings,
    Tables as GateTables, Uplink, mk_plan, states,
};
use super::super::tables::Tables;
use super::super::uplink::{classifier, object};
use super::super::{Change, PortId, PortState, VipState};
use super::packets::*;
use crate::egress::{Egress, Gateway, Pod, Policy, Tenant};

/// What the kernel gives a test frame for interface: `lo`.
const INTERFACE: u32 = 1;
/// `TCX_NEXT`, `TC_ACT_SHOT`, `TC_ACT_REDIRECT`.
const NEXT: u32 = u32::MAX;
const DROPPED: u32 = 2;
const SENT: u32 = 7;

/// The other node's Ethernet address, and one that is nobody's.
const OTHER: [u8; 6] = [2, 0, 0, 0, 1, 1];
const STRANGER: [u8; 6] = [2, 0, 0, 0, 9, 9];
/// The test device's.
const OWN: [u8; 6] = [0; 6];
const MTU: u32 = 1400;

/// A family of addresses, each with its part.
#[derive(Clone, Copy, Debug)]
struct World {
    egress: IpAddr,
    /// Another egress address, of another policy.
    second: IpAddr,
    /// Pods of the other node.
    pod: IpAddr,
    friend: IpAddr,
    /// A pod of the other policy.
    stranger: IpAddr,
    /// A pod of this node.
    local: IpAddr,
    /// A pod of this node whose gateway is the other node.
    away: IpAddr,
    remote: IpAddr,
    /// This node's own address.
    own: IpAddr,
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(first: u16, second: u16, last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, last))
}

const WORLDS: [World; 2] = [
    World {
        egress: v4(192, 0, 2, 200),
        second: v4(192, 0, 2, 201),
        pod: v4(10, 1, 0, 5),
        friend: v4(10, 1, 0, 6),
        stranger: v4(10, 1, 0, 7),
        local: v4(10, 0, 0, 5),
        away: v4(10, 0, 0, 6),
        remote: v4(198, 51, 100, 7),
        own: v4(192, 0, 2, 11),
    },
    World {
        egress: v6(0x2001, 0xdb8, 0x200),
        second: v6(0x2001, 0xdb8, 0x201),
        pod: v6(0xfd01, 1, 5),
        friend: v6(0xfd01, 1, 6),
        stranger: v6(0xfd01, 1, 7),
        local: v6(0xfd01, 0, 5),
        away: v6(0xfd01, 0, 6),
        remote: v6(0x2001, 0xdb9, 7),
        own: v6(0x2001, 0xdb8, 0x11),
    },
];

struct Gate {
    ebpf: Ebpf,
    tables: Tables,
    maps: GateTables,
    keeper: Option<Keeper>,
    copies: Arc<Copies>,
    /// One more way to the same maps.
    second: Option<Kernel>,
    changes: Option<Source>,
    /// What this node is to egress addresses.
    standings: BTreeMap<IpAddr, Standing>,
    plan: Plan,
}

fn mk_around() -> Surroundings {
    let uplink = Uplink {
        mac: OWN,
        mtu: MTU,
        addresses: WORLDS.iter().map(|world| world.own).collect(),
        connected: ["192.0.2.0/24", "2001:db8::/64"]
            .map(|net| net.parse().expect("a literal"))
            .into(),
        router_v4: Some(Ipv4Addr::new(192, 0, 2, 1)),
        router_v6: Some(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    };
    let other = PeerId {
        node: "other".into(),
        interface: INTERFACE,
    };
    Surroundings {
        node: "here".into(),
        uplinks: BTreeMap::from([(INTERFACE, uplink)]),
        tunnel: None,
        peers: BTreeMap::from([(
            other,
            Peer {
                mac: OTHER,
                address: None,
            },
        )]),
    }
}

fn mk_policy(gateway: &str) -> Policy {
    Policy {
        gateway: Some(Gateway {
            node: gateway.into(),
            uplink: "lo".into(),
            interface: INTERFACE,
            mac: (gateway != "here").then_some(OTHER),
            epoch: 1,
            settled: true,
        }),
        ..Policy::default()
    }
}

fn mk_pod(node: &str, policy: &str, egress_ip: IpAddr) -> Pod {
    Pod {
        node: node.into(),
        tenant: Some(Tenant {
            policy: policy.into(),
            egress_ip: Some(egress_ip),
        }),
        identity: 1,
        former: None,
    }
}

fn mk_egress() -> Egress {
    let mut egress = Egress {
        policies: BTreeMap::from([
            ("mail".into(), mk_policy("here")),
            ("shop".into(), mk_policy("here")),
            ("far".into(), mk_policy("other")),
        ]),
        pods: BTreeMap::new(),
        inside: ["10.0.0.0/8", "fd00::/8", "192.0.2.11/32"]
            .map(|net| net.parse().expect("a literal"))
            .into(),
        ..Egress::default()
    };
    for world in WORLDS {
        egress.pods.extend([
            (world.pod, mk_pod("other", "mail", world.egress)),
            (world.friend, mk_pod("other", "mail", world.egress)),
            (world.stranger, mk_pod("other", "shop", world.second)),
            (world.local, mk_pod("here", "mail", world.egress)),
            (world.away, mk_pod("here", "far", world.second)),
        ]);
    }
    egress.with_addresses_of_tenants()
}

impl Gate {
    fn load() -> Self {
        Self::with(&mk_egress(), Times::default(), 0)
    }

    fn with(egress: &Egress, times: Times, mark: u32) -> Self {
        let ebpf = object(None).expect("these tests load eBPF programs and need root");
        Self::of(ebpf, egress, times, mark)
    }

    fn of(mut ebpf: Ebpf, egress: &Egress, times: Times, mark: u32) -> Self {
        for name in [GATEWAY_INGRESS, GATEWAY_EGRESS, GATEWAY_KEEP] {
            classifier(&mut ebpf, name)
                .expect("the object holds it")
                .load()
                .expect("the verifier accepts it");
        }
        let kernel = Kernel::adopt(&mut ebpf).expect("the object holds it");
        let second = Kernel::adopt(&mut ebpf).expect("the object holds it");
        let copies = Arc::new(Copies::new(100_000));
        copies.adopt(Some(kernel));
        let mut gate = Self {
            copies,
            second: Some(second),
            changes: Some(Source::adopt(&mut ebpf).expect("the object holds the maps")),
            standings: BTreeMap::new(),
            tables: Tables::adopt(&mut ebpf, false).expect("the object holds the maps"),
            maps: GateTables::adopt(&mut ebpf).expect("the object holds the maps"),
            keeper: Some(Keeper::adopt(&mut ebpf, times).expect("the object holds the maps")),
            plan: Plan::default(),
            ebpf,
        };
        gate.settle(times, mark, 1000);
        gate.set(egress);
        // One egress address is a VIP that serves a port, too.
        for world in WORLDS {
            let steer = VipState {
                steer: true,
                udp_port: None,
            };
            gate.change(&Change::Vip(world.egress, Some(steer)));
            gate.serve(world, 25);
        }
        gate
    }

    fn settle(&mut self, times: Times, mark: u32, errors: u32) {
        self.maps
            .settle(GateSettings {
                times,
                mark,
                errors,
                flags: 0,
            })
            .expect("the map takes it");
    }

    fn set(&mut self, egress: &Egress) {
        self.set_there(egress, &mk_around(), |_| {}, |_| {});
    }

    /// The same with other surroundings, and what happens before and after what is new is written, as flows of those that are
    /// gone end.
    fn set_there(
        &mut self,
        egress: &Egress,
        around: &Surroundings,
        before: impl FnOnce(&mut Self),
        after: impl FnOnce(&mut Self),
    ) {
        self.plan = mk_plan(egress, around, &self.addresses());
        let orphaned = self.maps.orphaned(&self.plan);
        let busy = self.maps.busy(&orphaned);
        self.end(&orphaned);
        before(self);
        self.maps
            .write(&self.plan, 0x4000)
            .expect("the maps have room");
        after(self);
        let late = self.maps.but_what_is_planned(busy);
        self.end(&late);
    }

    fn end(&mut self, orphaned: &Orphaned) {
        if orphaned.is_empty() {
            return;
        }
        let keeper = self.keeper.take().expect("it is put back");
        keeper
            .end_all(self.program(GATEWAY_KEEP), orphaned)
            .expect("the kernel runs it");
        self.keeper = Some(keeper);
    }

    fn kernel(&mut self) -> Kernel {
        self.second.take().expect("it is taken once")
    }

    fn addresses(&self) -> BTreeSet<IpAddr> {
        self.standings.keys().copied().collect()
    }

    /// This node is so to these addresses, and to no others.
    fn stand(&mut self, standings: &[(IpAddr, Standing)]) {
        self.standings = standings.iter().copied().collect();
        self.maps
            .stand(&states(&self.standings))
            .expect("the map takes it");
    }

    fn change(&mut self, change: &Change) {
        self.tables.change(change).expect("the maps have room");
    }

    fn serve(&mut self, world: World, port: u16) {
        let id = PortId {
            vip: world.egress,
            protocol: landfall_core::model::Protocol::Tcp,
            port,
        };
        self.change(&Change::Port(id, Some(PortState::default())));
    }

    fn program(&mut self, name: &'static str) -> &SchedClassifier {
        classifier(&mut self.ebpf, name).expect("the object holds it")
    }

    /// A program's answer to a frame, the frame then, and its mark.
    fn run(&mut self, name: &'static str, frame: &[u8], mark: u32) -> (u32, Vec<u8>, u32) {
        // The mark is the third word of `struct __sk_buff`.
        let mut context = vec![0; 192];
        context[8..12].copy_from_slice(&mark.to_ne_bytes());
        self.run_in(name, frame, &context)
    }

    /// The same with what the kernel is to know of the frame.
    fn run_in(&mut self, name: &'static str, frame: &[u8], context: &[u8]) -> (u32, Vec<u8>, u32) {
        let mut out = vec![0; frame.len() + 256];
        let mut after = vec![0; 192];
        let result = self
            .program(name)
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(context),
                ctx_out: Some(&mut after),
                repeat: 1,
                ..TestRunOptions::default()
            })
            .expect("the kernel runs it");
        out.truncate(result.data_size_out as usize);
        let mark = u32::from_ne_bytes(after[8..12].try_into().expect("four"));
        (result.return_value, out, mark)
    }

    /// What becomes of a frame that comes in.
    fn comes(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        let (action, out, _) = self.run(GATEWAY_INGRESS, frame, 0);
        (action, out)
    }

    /// What becomes of one that leaves.
    fn leaves(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        let (action, out, _) = self.run(GATEWAY_EGRESS, frame, 0);
        (action, out)
    }

    fn count(&self, reason: Reason) -> u64 {
        self.maps.reasons()[reason as usize]
    }

    /// It is dropped for this reason.
    fn drops(&mut self, frame: &[u8], reason: Reason) {
        let before = self.count(reason);
        let (action, _) = self.comes(frame);
        assert_eq!(
            (action, self.count(reason)),
            (DROPPED, before + 1),
            "{reason:?}"
        );
    }

    /// It is left to others as it was.
    fn passes(&mut self, frame: &[u8]) {
        let (action, out) = self.comes(frame);
        assert_eq!(action, NEXT);
        assert_eq!(out, frame);
    }

    fn used(&self, policy: &str) -> u64 {
        self.maps.usage()[policy].ports
    }

    /// A look through all bindings.
    fn keep(&mut self) -> usize {
        let mut keeper = self.keeper.take().expect("it is put back");
        let (states, limited) = (states(&self.standings), self.maps.limited().clone());
        let known = Known {
            states: &states,
            limited: &limited,
        };
        let kept = keeper
            .look(self.program(GATEWAY_KEEP), &known)
            .expect("the kernel runs it");
        self.keeper = Some(keeper);
        self.maps
            .forget(&self.plan, &kept)
            .expect("the maps take it");
        kept.read
    }

    /// The port that a pod's SYN leaves by.
    fn port_of(&mut self, world: World, pod: IpAddr, own: u16) -> Option<u16> {
        let syn = segment(world, pod, own, SYN);
        let (action, out) = self.comes(&syn);
        if action != SENT || source(&out) == world.remote {
            return None;
        }
        Some(ports(&out).0)
    }
}

fn ethertype(address: IpAddr) -> u16 {
    if address.is_ipv4() { 0x0800 } else { 0x86dd }
}

fn icmp(address: IpAddr) -> u8 {
    if address.is_ipv4() { 1 } else { 58 }
}

/// A frame with all its checksums right.
fn mk(mac: [u8; 6], from: IpAddr, to: IpAddr, protocol: u8, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let payload = sealed(from, to, protocol, payload);
    mk_frame_from(
        mac,
        ethertype(to),
        &mk_ip(from, to, protocol, ttl, &payload),
    )
}

/// A TCP segment of another node's pod to its remote.
fn segment(world: World, pod: IpAddr, port: u16, flags: u8) -> Vec<u8> {
    mk(OTHER, pod, world.remote, 6, 64, &mk_tcp(port, 443, flags))
}

/// An echo request or its answer.
fn mk_echo(address: IpAddr, request: bool, identifier: u16, payload: &[u8]) -> Vec<u8> {
    let kind = match (address.is_ipv4(), request) {
        (true, true) => 8,
        (true, false) => 0,
        (false, true) => 128,
        (false, false) => 129,
    };
    let mut message = vec![kind, 0, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend([0, 1]);
    message.extend(payload);
    message
}

fn is_v4(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0]
}

fn address_at(frame: &[u8], at: usize, v4: bool) -> IpAddr {
    if v4 {
        let octets: [u8; 4] = frame[at..at + 4].try_into().expect("four");
        Ipv4Addr::from(octets).into()
    } else {
        let octets: [u8; 16] = frame[at..at + 16].try_into().expect("sixteen");
        Ipv6Addr::from(octets).into()
    }
}

fn source(frame: &[u8]) -> IpAddr {
    let v4 = is_v4(frame);
    address_at(frame, if v4 { 26 } else { 22 }, v4)
}

fn destination(frame: &[u8]) -> IpAddr {
    let v4 = is_v4(frame);
    address_at(frame, if v4 { 30 } else { 38 }, v4)
}

fn ttl(frame: &[u8]) -> u8 {
    if is_v4(frame) { frame[22] } else { frame[21] }
}

/// Where the transport's header lies.
fn transport(frame: &[u8]) -> usize {
    if is_v4(frame) { 34 } else { 54 }
}

fn ports(frame: &[u8]) -> (u16, u16) {
    let at = transport(frame);
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    (port(at), port(at + 2))
}

/// Whether both checksums are right.
fn is_right(frame: &[u8]) -> bool {
    (!is_v4(frame) || is_sound(&frame[14..34])) && has_sound_transport(frame)
}
