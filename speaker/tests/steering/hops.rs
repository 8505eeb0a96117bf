//! Frames of clients on a segment whose nodes disagree about everything: who is first, who was before, who holds.
//!
//! The speakers are killed and the programs' pinned tables are written at random, each node's otherwise. What the
//! property test of `handing_on` says of one function is then seen on the wire, of the programs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use landfall_ebpf_common::handing_on::{self, FIRST_TTL, LOW_FIRST_TTL, LOW_TTL};
use landfall_ebpf_common::rendezvous::{bucket, hash};
use landfall_ebpf_common::{MAX_ASKED, VipKey};
use landfall_lab::fault::{Fault, SPEAKER};
use landfall_lab::manifests::{ECHO, LINES};
use landfall_lab::raw::send_frames;
use landfall_lab::{Mac, Network, Nic};
use pnet_packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet_packet::ipv4::{self, MutableIpv4Packet};
use pnet_packet::ipv6::MutableIpv6Packet;
use pnet_packet::tcp::TcpFlags;

use super::cluster::{Cluster, PATIENCE, vips};
use super::flow::await_served;
use landfall_lab::packets::{datagram, segment};
use tables::{Tables, is_seeded};
use tap::{Identity, Seen, Tap};

mod tables;
mod tap;

const NODES: u8 = 8;
/// How often all tables are written anew.
const ROUNDS: u32 = 8;
/// How many packets of a kind are sent to a VIP in a round.
const PACKETS: u32 = 60;
/// Whose packets they seem to be: nobody's, so that nobody answers what is answered to it.
const NOBODY: u8 = 177;
/// The host number of the lab's client, which sends them.
const CLIENT: u8 = 100;

/// Numbers that are the same each time (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(self.0 % u64::from(below)).unwrap()
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(u32::try_from(of.len()).unwrap()) as usize]
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Any segment but a SYN, of a connection that nobody knows.
    MidStream,
    Syn,
    Datagram,
}

impl Kind {
    const ALL: [Self; 3] = [Self::MidStream, Self::Syn, Self::Datagram];

    fn protocol(self) -> IpNextHeaderProtocol {
        match self {
            Self::MidStream | Self::Syn => IpNextHeaderProtocols::Tcp,
            Self::Datagram => IpNextHeaderProtocols::Udp,
        }
    }

    fn port(self) -> u16 {
        match self {
            Self::MidStream | Self::Syn => LINES,
            Self::Datagram => ECHO,
        }
    }
}

/// A packet to be sent.
#[derive(Clone, Copy, Debug)]
struct Probe {
    vip: IpAddr,
    kind: Kind,
    client_port: u16,
    ttl: u8,
    /// The node it is sent to.
    entry: Mac,
    /// The TCP flags.
    flags: u8,
}

impl Probe {
    fn client(&self) -> IpAddr {
        let [v4, v6] = Network::Lan.both(NOBODY);
        if self.vip.is_ipv4() { v4 } else { v6 }
    }

    fn identity(&self) -> Identity {
        Identity {
            vip: self.vip,
            protocol: self.kind.protocol().0,
            client_port: self.client_port,
        }
    }

    fn bucket(&self) -> u32 {
        let client = VipKey::from_address(self.client()).0;
        let ports = u32::from(self.client_port) << 16 | u32::from(self.kind.port());
        bucket(hash(&client, &VipKey::from_address(self.vip).0, ports))
    }

    fn frame(&self, source: Mac) -> Vec<u8> {
        let from = SocketAddr::new(self.client(), self.client_port);
        let to = SocketAddr::new(self.vip, self.kind.port());
        let mut packet = match self.kind {
            Kind::MidStream | Kind::Syn => segment(from, to, [1, 0], self.flags),
            Kind::Datagram => datagram(from, to, b"who are you?"),
        };
        if self.vip.is_ipv4() {
            let mut header = MutableIpv4Packet::new(&mut packet).unwrap();
            header.set_ttl(self.ttl);
            let sum = ipv4::checksum(&header.to_immutable());
            header.set_checksum(sum);
        } else {
            let mut header = MutableIpv6Packet::new(&mut packet).unwrap();
            header.set_hop_limit(self.ttl);
        }
        let ethertype: [u8; 2] = if self.vip.is_ipv4() {
            [0x08, 0x00]
        } else {
            [0x86, 0xdd]
        };
        [&self.entry.0[..], &source.0, &ethertype, &packet].concat()
    }
}

/// Checks the way of a packet; how many nodes were asked for its flow.
fn check(probe: &Probe, way: &[Seen], client: Mac) -> usize {
    let hops: Vec<String> = way
        .iter()
        .map(|it| format!("{} > {} ttl {}", it.from, it.to, it.ttl))
        .collect();
    let what = format!("{probe:?} went {hops:#?}");
    assert!(!way.is_empty(), "{probe:?} was not seen");
    let first = way[0];
    assert_eq!(
        (first.from, first.to, first.ttl),
        (client, probe.entry, probe.ttl),
        "{what}"
    );
    for (one, next) in way.iter().zip(&way[1..]) {
        assert_eq!(
            next.from, one.to,
            "whoever was sent it sends it, once: {what}"
        );
        assert!(next.sound, "its header's checksum is right: {what}");
    }
    // Steered it looks like no question.
    let sent = match probe.kind {
        Kind::MidStream => handing_on::steered(probe.ttl),
        Kind::Syn | Kind::Datagram => probe.ttl,
    };
    let steered = way[1..].iter().filter(|it| it.ttl == sent).count();
    assert!(steered <= 1, "it is steered once: {what}");
    let (first_ttl, most) = if sent > LOW_TTL {
        (FIRST_TTL, usize::from(MAX_ASKED))
    } else if sent > LOW_FIRST_TTL {
        (LOW_FIRST_TTL, 2)
    } else {
        (0, 0)
    };
    let most = match probe.kind {
        Kind::MidStream => 2 * most,
        Kind::Syn => most.min(1),
        Kind::Datagram => 0,
    };
    let handed_on = &way[1 + steered..];
    if sent <= FIRST_TTL && probe.kind == Kind::Syn || sent <= LOW_FIRST_TTL {
        // It looks as if it had been handed on before it was.
        assert!(
            way[steered..].is_sorted_by(|one, next| one.ttl > next.ttl),
            "each time lowers the TTL: {what}"
        );
        return 0;
    }
    assert!(handed_on.len() <= most, "at most {most} times: {what}");
    let [asks, asked] = [0, 1].map(|turn| handed_on.iter().skip(turn).step_by(2));
    for (turn, hop) in (0..).zip(handed_on) {
        assert_eq!(hop.ttl, first_ttl - turn, "{what}");
        let one = way[steered].to;
        assert!([hop.from, hop.to].contains(&one), "one node asks: {what}");
    }
    if probe.kind == Kind::MidStream {
        assert_eq!(asks.len(), asked.len(), "nobody knows it: {what}");
        let distinct: BTreeSet<Mac> = asks.clone().map(|it| it.to).collect();
        assert_eq!(distinct.len(), asks.len(), "each is asked once: {what}");
    }
    asks.len()
}

#[test]
fn with_tables_that_disagree_nothing_goes_round() {
    let cluster = Cluster::start(NODES, 1);
    let pods = cluster.pods();
    // The others have nobody to deliver to.
    cluster.serve(&pods[..4]);
    cluster.speak();
    cluster.await_leader(vips()[0], |_| true);
    for vip in vips() {
        await_served(&cluster, vip, &pods[..4]);
    }
    let lab = &cluster.lab;
    let begun = Instant::now();
    while !lab.nodes().iter().all(|node| is_seeded(lab, node)) {
        assert!(begun.elapsed() < PATIENCE, "some node hands nothing on");
        thread::sleep(Duration::from_millis(100));
    }
    for node in lab.nodes() {
        lab.inject(&node.name, Fault::Kill).unwrap();
    }
    for node in lab.nodes() {
        lab.wait(&node.name, SPEAKER, PATIENCE).unwrap();
    }
    let mut tables: Vec<Tables> = lab
        .nodes()
        .iter()
        .map(|node| Tables::open(lab, node))
        .collect();
    let entries: Vec<Mac> = lab.nodes().iter().map(|it| it.mac(Nic::Eth0)).collect();
    let interface = lab.client().interface_index("eth0").unwrap();
    let client = Network::Lan.mac(CLIENT);
    let tap = Tap::open(lab);
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut client_port = 1024;
    let mut asks = BTreeMap::<(Kind, usize), u32>::new();
    for _ in 0..ROUNDS {
        let mut probes = Vec::new();
        for vip in vips() {
            for kind in Kind::ALL {
                for _ in 0..PACKETS {
                    client_port += 1;
                    let flags = match kind {
                        Kind::MidStream => dice.pick(&[
                            TcpFlags::ACK,
                            TcpFlags::ACK | TcpFlags::PSH,
                            TcpFlags::ACK | TcpFlags::FIN,
                            TcpFlags::RST,
                        ]),
                        Kind::Syn | Kind::Datagram => TcpFlags::SYN,
                    };
                    probes.push(Probe {
                        vip,
                        kind,
                        client_port,
                        ttl: dice.pick(&[255, 64, 64, 64, 64, 21, 20, 19, 12, 9, 8, 7, 6, 3, 2]),
                        entry: dice.pick(&entries),
                        flags,
                    });
                }
            }
        }
        for tables in &mut tables {
            tables.believe(&probes, &mut dice);
        }
        let frames = probes.iter().map(|probe| probe.frame(client));
        let frames: Vec<Vec<u8>> = frames.collect();
        lab.client()
            .run(|| send_frames(interface, &frames))
            .unwrap();
        let seen = tap.drain();
        for probe in &probes {
            let way = seen.get(&probe.identity()).map_or(&[][..], Vec::as_slice);
            let asked = check(probe, way, client);
            *asks.entry((probe.kind, asked)).or_default() += 1;
        }
    }
    println!("how many nodes were asked: {asks:?}");
    for number in 0..=usize::from(MAX_ASKED) {
        assert!(
            asks.contains_key(&(Kind::MidStream, number)),
            "{number} nodes were asked for no segment: the tables agree"
        );
    }
    assert!(asks.contains_key(&(Kind::Syn, 1)));
}
