//! What Landfall has no part in goes on as if it were not there, while it delivers natively and under traffic.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use landfall_lab::address::pod_cidrs;
use landfall_lab::manifests::LINES;
use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::server::{PodServer, TCP_PORT};
use landfall_lab::{Lab, Netns, Network, Node, Pod, ping};
use socket2::{Domain, Protocol, Socket, Type};

use super::cluster::{Cluster, PATIENCE, mk_three, vips};
use super::datagrams::Datagrams;
use super::flow::Flow;

/// How many connections of each kind are made.
const CONNECTIONS: usize = 20;
/// How much goes each way.
const BYTES: u64 = 20_000_000;
const NODE_PORT: u16 = 30_080;

/// Clients of the VIPs, all the while, by TCP and UDP, old flows and new. None of them may be lost.
struct Traffic {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Traffic {
    fn start(lab: &Lab) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for from in [lab.client(), lab.remote()] {
            for vip in vips() {
                let (stop, inside) = (Arc::clone(&stop), from.share());
                let talk = move || talk(&inside, vip, &stop);
                threads.push(from.spawn("traffic", talk));
            }
        }
        Self { stop, threads }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let rounds = thread.join().unwrap();
            assert!(rounds > 0, "there was no traffic");
            println!("{rounds} rounds of traffic");
        }
    }
}

fn talk(from: &Netns, vip: IpAddr, stop: &AtomicBool) -> u64 {
    let to = (vip, LINES).into();
    let mut old = Flow::open(from, to).unwrap();
    let datagrams = Datagrams::open(from, vip);
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        assert_eq!(old.say("again").unwrap(), "again");
        Flow::open(from, to).unwrap();
        datagrams.answered();
        rounds += 1;
    }
    rounds
}

/// The leader and another node.
fn two<'a>(cluster: &'a Cluster, leader: &str) -> [&'a Node; 2] {
    let mut others = cluster.lab.nodes().iter();
    let other = others.find(|node| node.name != leader).unwrap();
    [cluster.lab.node(leader).unwrap(), other]
}

/// Connections are all answered by one server that sees this address, and what is exchanged is intact.
fn is_answered(from: &Netns, to: SocketAddr, by: &str, seen: IpAddr) {
    let what = format!("{to} from {}", from.name());
    for _ in 0..CONNECTIONS {
        let mut flow = Flow::open(from, to).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(flow.pod, by, "{what}");
        assert_eq!(flow.seen_as(), seen, "{what}");
    }
    let flow = Flow::open(from, to).unwrap();
    flow.exchange(BYTES, &AtomicU64::new(0)).unwrap();
}

fn clients(lab: &Lab) -> [(&Netns, [IpAddr; 2]); 2] {
    [
        (lab.client(), Network::Lan.both(100)),
        (lab.remote(), Network::Remote.both(100)),
    ]
}

/// As a CNI plugin and kube-proxy have it: a port of the node's for a pod, and the node's address for what pods ask
/// outside of the cluster.
fn translate(node: &Node, pod: &Pod) {
    let [node_v4, node_v6] = node.addresses(Network::Lan);
    let [pod_v4, pod_v6] = pod.addresses;
    node.netns
        .nft(&format!(
            "table inet others {{
                chain in {{
                    type nat hook prerouting priority dstnat
                    ip daddr {node_v4} tcp dport {NODE_PORT} dnat ip to {pod_v4}:{TCP_PORT}
                    ip6 daddr {node_v6} tcp dport {NODE_PORT} dnat ip6 to [{pod_v6}]:{TCP_PORT}
                }}
                chain out {{
                    type nat hook postrouting priority srcnat
                    ip saddr 10.244.0.0/16 oifname eth0 masquerade
                    ip6 saddr fd00:244::/32 oifname eth0 masquerade
                }}
            }}"
        ))
        .unwrap();
}

#[test]
fn connections_to_nodes_and_of_pods_are_nobodys_business() {
    let (cluster, leader) = mk_three(false);
    let lab = &cluster.lab;
    for node in lab.nodes() {
        translate(node, &node.pods[0]);
    }
    // What pods reach outside of the cluster.
    let _outside = PodServer::start(lab.observer(), "outside").unwrap();
    let outside = Network::Lan.both(101);
    let traffic = Traffic::start(lab);
    for node in two(&cluster, &leader) {
        // As SSH would be.
        let _own = PodServer::start(&node.netns, "own").unwrap();
        let pod = &node.pods[0];
        let mut others = lab.pods();
        let peer = others.find(|other| other.node != node.name).unwrap();
        for family in [0, 1] {
            let address = node.addresses(Network::Lan)[family];
            for (from, seen) in clients(lab) {
                let own = SocketAddr::new(address, TCP_PORT);
                is_answered(from, own, "own", seen[family]);
                let node_port = SocketAddr::new(address, NODE_PORT);
                is_answered(from, node_port, &pod.name, seen[family]);
                ping(from, address, PATIENCE).unwrap();
            }
            let across = SocketAddr::new(peer.addresses[family], TCP_PORT);
            is_answered(&pod.netns, across, &peer.name, pod.addresses[family]);
            let out = SocketAddr::new(outside[family], TCP_PORT);
            is_answered(&pod.netns, out, "outside", address);
        }
    }
    traffic.end();
    println!("{:?}", cluster.verdicts());
}

/// A connection from this port.
fn open_from(from: &Netns, own: SocketAddr, to: SocketAddr) -> Flow {
    let stream = from.run(|| -> std::io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&own.into())?;
        socket.connect_timeout(&to.into(), PATIENCE)?;
        Ok(socket.into())
    });
    Flow::over(stream.unwrap_or_else(|error| panic!("{to} from {own}: {error}"))).unwrap()
}

/// Where pods have addresses that the segment reaches: the pods and ports that serve the VIP too, from a port of the
/// client's from which it has just had a flow of the VIP's with the same pod.
#[test]
fn pods_are_reached_by_their_own_addresses() {
    let (cluster, _) = mk_three(false);
    let lab = &cluster.lab;
    for node in lab.nodes() {
        for (cidr, via) in pod_cidrs(node.index)
            .into_iter()
            .zip(node.addresses(Network::Lan))
        {
            let route = format!("route add {cidr} via {via}");
            lab.client().ip(&route).unwrap();
            lab.router().ip(&route).unwrap();
        }
    }
    let traffic = Traffic::start(lab);
    for (family, vip) in vips().into_iter().enumerate() {
        for (from, seen) in clients(lab) {
            // Below those that the traffic's are of.
            for port in 20_000..20_030 {
                let own = SocketAddr::new(seen[family], port);
                let flow = open_from(from, own, (vip, LINES).into());
                let pod = flow.pod.clone();
                flow.close().unwrap();
                let pod = lab.pods().find(|known| known.name == pod).unwrap();
                let to = SocketAddr::new(pod.addresses[family], TCP_PORT);
                let mut flow = open_from(from, own, to);
                assert_eq!(flow.pod, pod.name);
                assert_eq!(flow.seen_as(), own.ip());
                if port == 20_000 {
                    flow.exchange(BYTES, &AtomicU64::new(0)).unwrap();
                }
            }
            for pod in lab.pods() {
                ping(from, pod.addresses[family], PATIENCE).unwrap();
            }
        }
    }
    traffic.end();
}

#[test]
fn what_configures_a_node_and_finds_it_reaches_it() {
    let (cluster, leader) = mk_three(false);
    let lab = &cluster.lab;
    let traffic = Traffic::start(lab);
    for node in two(&cluster, &leader) {
        by_dhcp(lab, node);
        by_router_advertisement(lab, node);
        for address in node.addresses(Network::Lan) {
            let answers = who_answers(lab, address, Duration::from_secs(1)).unwrap();
            let answers: BTreeSet<&str> = answers.keys().map(String::as_str).collect();
            assert_eq!(answers, BTreeSet::from([&*node.name]), "{address}");
        }
        // It asks as well as it answers.
        node.netns.ip("neighbour flush dev eth0").unwrap();
        for address in Network::Lan.both(101) {
            ping(&node.netns, address, PATIENCE).unwrap();
        }
    }
    traffic.end();
}

fn mk_broadcaster(on: &Netns, port: u16) -> UdpSocket {
    on.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.set_broadcast(true).unwrap();
        socket.bind_device(Some(b"eth0")).unwrap();
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        socket.bind(&any.into()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.into()
    })
}

/// Discover, offer, request, acknowledgement, in all but content: everything is broadcast.
fn by_dhcp(lab: &Lab, node: &Node) {
    let (server, client) = (
        mk_broadcaster(lab.router(), 67),
        mk_broadcaster(&node.netns, 68),
    );
    let mut buffer = [0; 64];
    for round in 0..CONNECTIONS {
        let question = format!("{} asks {round}", node.name);
        client
            .send_to(question.as_bytes(), (Ipv4Addr::BROADCAST, 67))
            .unwrap();
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], question.as_bytes());
        assert_eq!(from.port(), 68);
        let answer = format!("the answer to {round}");
        server
            .send_to(answer.as_bytes(), (Ipv4Addr::BROADCAST, 68))
            .unwrap();
        let length = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], answer.as_bytes());
    }
}

/// A router advertisement (RFC 4861, 4.2) without a router's lifetime, that tells a prefix to make addresses of.
fn advertisement(prefix: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // Prefix information (4.6.2): on the link, and for autonomous configuration.
    message.extend([3, 4, 64, 0xc0]);
    message.extend(3600_u32.to_be_bytes());
    message.extend(1800_u32.to_be_bytes());
    message.extend([0; 4]);
    message.extend(prefix.octets());
    message
}

fn by_router_advertisement(lab: &Lab, node: &Node) {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Also where it forwards.
    node.netns
        .sysctl("net.ipv6.conf.eth0.accept_ra", "2")
        .unwrap();
    let prefix = Ipv6Addr::new(0xfd00, 0x4242, node.index.into(), 0, 0, 0, 0, 0);
    let interface = lab.router().interface_index("eth0").unwrap();
    let socket = lab.router().run(|| {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
        socket.set_multicast_hops_v6(255).unwrap();
        socket
    });
    let to = SocketAddrV6::new(ALL_NODES, 0, 0, interface);
    let begun = Instant::now();
    let has_address = || {
        let shown = node.netns.ip("-6 -o address show dev eth0").unwrap();
        shown.contains(&format!("fd00:4242:{}:", node.index))
    };
    while !has_address() {
        assert!(begun.elapsed() < PATIENCE, "{}: no address", node.name);
        socket.send_to(&advertisement(prefix), &to.into()).unwrap();
        thread::sleep(Duration::from_millis(200));
    }
}
