//! The switch forwards multicast as a rack's switch does, and a topology's options do what they say.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use landfall_lab::{Lab, Netns, Network, Nic, Topology, ping};

/// What a busy machine can promise.
const PATIENCE: Duration = Duration::from_secs(30);
/// More than the ways of a frame through the lab take.
const SETTLED: Duration = Duration::from_millis(100);
const GROUPS: [&str; 2] = ["239.88.0.1", "ff05::88:1"];
const PORT: u16 = 5353;
const BURST: u64 = 5;

fn eventually(what: &str, mut come: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !come() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not in {PATIENCE:?}");
    }
    println!("{what}: after {:?}", begun.elapsed());
}

/// Counts what comes in at a NIC, whoever it is for.
fn count(netns: &Netns, name: &str, matches: &str) {
    netns
        .nft(&format!(
            "table netdev lab_test {{\n counter {name} {{ }}\n chain {name} {{\n\
             type filter hook ingress device eth0 priority 0;\n{matches} counter name {name}\n }}\n}}\n"
        ))
        .unwrap();
}

fn counted(netns: &Netns, name: &str) -> u64 {
    let text = netns
        .exec(&format!("nft list counter netdev lab_test {name}"))
        .unwrap();
    let mut words = text.split_whitespace();
    words.find(|word| *word == "packets").unwrap();
    words.next().unwrap().parse().unwrap()
}

/// A socket that sends to, or listens to, a group on `eth0`.
fn mk_member(netns: &Netns, group: IpAddr, own: IpAddr, joins: bool) -> UdpSocket {
    let index = netns.interface_index("eth0").unwrap();
    netns.run(|| {
        let socket = UdpSocket::bind((own, 0)).unwrap();
        match (group, own) {
            (IpAddr::V4(group), IpAddr::V4(own)) if joins => {
                socket.join_multicast_v4(&group, &own).unwrap();
            }
            (IpAddr::V6(group), _) if joins => socket.join_multicast_v6(&group, index).unwrap(),
            _ => {}
        }
        socket
    })
}

/// How many of a burst reached each of the two nodes.
fn burst(lab: &Lab, sender: &UdpSocket, group: IpAddr) -> [u64; 2] {
    let now = || {
        [0, 1].map(|node: usize| {
            let family = if group.is_ipv4() { "v4" } else { "v6" };
            counted(&lab.nodes()[node].netns, family)
        })
    };
    let before = now();
    let to = match group {
        IpAddr::V4(_) => SocketAddr::new(group, PORT),
        IpAddr::V6(group) => {
            let index = lab.client().interface_index("eth0").unwrap();
            SocketAddrV6::new(group, PORT, 0, index).into()
        }
    };
    for _ in 0..BURST {
        sender.send_to(b"x", to).unwrap();
    }
    std::thread::sleep(SETTLED);
    let after = now();
    [after[0] - before[0], after[1] - before[1]]
}

#[test]
fn a_group_reaches_only_the_ports_that_have_reported_it() {
    let lab = Lab::build(Topology {
        nodes: 2,
        pods_per_node: 0,
        ..Topology::default()
    })
    .unwrap();
    for node in lab.nodes() {
        count(
            &node.netns,
            "v4",
            &format!("ether type ip ip daddr {}", GROUPS[0]),
        );
        count(
            &node.netns,
            "v6",
            &format!("ether type ip6 ip6 daddr {}", GROUPS[1]),
        );
    }
    let own = Network::Lan.both(11);
    for (family, group) in GROUPS
        .map(|group| group.parse().unwrap())
        .iter()
        .enumerate()
    {
        let client = Network::Lan.both(100)[family];
        let sender = mk_member(lab.client(), *group, client, false);
        // A switch that has just begun to ask forwards everything until it may expect reports.
        eventually("nobody reported it, nobody gets it", || {
            burst(&lab, &sender, *group) == [0, 0]
        });
        let member = mk_member(&lab.nodes()[0].netns, *group, own[family], true);
        eventually("the one that joined gets it, the other not", || {
            burst(&lab, &sender, *group) == [BURST, 0]
        });
        drop(member);
        eventually("it left: nobody gets it", || {
            burst(&lab, &sender, *group) == [0, 0]
        });
    }
}

/// Sends `bytes` to the first node over TCP, and says how many frames the switch put on its cable.
fn frames_for(lab: &Lab, bytes: usize) -> u64 {
    let node = &lab.nodes()[0];
    let address = node.addresses(Network::Lan)[0];
    let frames = || -> u64 {
        let text = lab.switch().ip("-s -j link show dev node1-eth0").unwrap();
        let links: serde_json::Value = serde_json::from_str(&text).unwrap();
        links[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
    };
    let listener = node
        .netns
        .run(|| TcpListener::bind((address, 5000)).unwrap());
    let before = frames();
    let reader = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.take(bytes as u64).read_to_end(&mut all).unwrap();
        all.len()
    });
    let mut stream = lab
        .client()
        .run(|| TcpStream::connect((address, 5000)).unwrap());
    stream.write_all(&vec![0; bytes]).unwrap();
    assert_eq!(reader.join().unwrap(), bytes);
    frames() - before
}

#[test]
fn with_offloads_the_cable_carries_single_frames_and_the_node_aggregates_them() {
    const BYTES: usize = 4 << 20;
    const SEGMENTS: u64 = BYTES as u64 / 1460;
    let mut seen = Vec::new();
    for offloads in [false, true] {
        let lab = Lab::build(Topology {
            nodes: 1,
            pods_per_node: 0,
            offloads,
            ..Topology::default()
        })
        .unwrap();
        let netns = &lab.nodes()[0].netns;
        count(netns, "long", "ether type ip meta length > 1600");
        let frames = frames_for(&lab, BYTES);
        let aggregated = counted(netns, "long");
        println!("offloads {offloads}: {frames} frames for {SEGMENTS} segments, {aggregated} long");
        seen.push((frames, aggregated));
    }
    assert!(
        seen[0].0 < SEGMENTS,
        "as veth comes, it carries long frames"
    );
    assert!(seen[1].0 >= SEGMENTS, "the switch's port still does TSO");
    assert!(seen[1].1 > 0, "the node's NIC does no GRO");
}

#[test]
fn the_default_route_goes_by_the_nic_that_was_asked_for() {
    for (nic, second_nic, management) in [
        (Nic::Eth0, false, false),
        (Nic::Eth0, true, true),
        (Nic::Eth1, true, true),
        (Nic::Eth1, true, false),
    ] {
        let lab = Lab::build(Topology {
            nodes: 1,
            pods_per_node: 0,
            default_route: nic,
            second_nic,
            management,
            ..Topology::default()
        })
        .unwrap();
        let netns = &lab.nodes()[0].netns;
        let [v4, v6] = Network::Remote.both(100);
        for target in [v4, v6] {
            let route = netns.ip(&format!("route get {target}")).unwrap();
            let dev = format!(" dev {} ", nic.name());
            assert!(route.contains(&dev), "{nic:?}: {route}");
            ping(netns, target, PATIENCE).unwrap();
        }
    }
}
