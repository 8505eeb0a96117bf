//! What is steered to the real kube-proxy arrives as it was sent: many bytes, fragments, errors of routers, clients
//! behind others; and what a node's firewall says holds.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use landfall_lab::packets::{Raw, fragments};
use landfall_lab::server::{TCP_PORT, UDP_PORT};
use landfall_lab::{Lab, Netns, Network, Node, behind};
use landfall_tests::PATIENCE;
use landfall_tests::flows::Flow;
use serde_json::json;

use crate::scene::{Scene, eventually};
use crate::steering::pods;
use crate::table::Table;

/// As many connections reach every one of three nodes, but for one time in ten thousand.
const CONNECTIONS: usize = 30;
/// For how long silence is silence.
const SILENCE: Duration = Duration::from_secs(1);

/// How many bytes go each way: a gigabyte, unless a variable says otherwise.
fn size() -> u64 {
    std::env::var("LANDFALL_TRANSFER_BYTES").map_or(1_000_000_000, |text| text.parse().unwrap())
}

/// A Service whose pods see their clients, served by all nodes.
fn create(scene: &Scene<'_>, name: &str) -> Vec<IpAddr> {
    let vips = scene.create(name, json!({"externalTrafficPolicy": "Local"}), json!({}));
    for vip in &vips {
        let all = |from: &Netns| pods(from, *vip).len() == 3;
        eventually(
            "all nodes to serve",
            || all(scene.lab().client()) && all(scene.lab().remote()),
            |all| *all,
        );
    }
    vips
}

/// A flow to a pod that is not on the leader's node.
fn elsewhere(scene: &Scene<'_>, from: &Netns, vip: IpAddr) -> Flow {
    let leader = scene.leader(vip);
    let mut flows = (0..CONNECTIONS).map(|_| Flow::open(from, (vip, TCP_PORT).into()).unwrap());
    flows.find(|flow| flow.node() != leader).unwrap()
}

/// A gigabyte each way at once, past a node that steers it.
pub(crate) fn many_bytes(scene: &Scene<'_>) {
    let vip = create(scene, "bulk")[0];
    let flow = elsewhere(scene, scene.lab().client(), vip);
    let (pod, begun) = (flow.pod.clone(), Instant::now());
    flow.exchange(size(), &AtomicU64::new(0)).unwrap();
    let took = begun.elapsed().as_secs_f64();
    println!("{} bytes each way with {pod}: {took:.1} s", size());
}

/// 4 000 bytes in fragments that come in any order.
pub(crate) fn shuffled_fragments(scene: &Scene<'_>) {
    const PORT: u16 = 25_000;
    const ORDERS: [[usize; 3]; 4] = [[2, 0, 1], [2, 1, 0], [1, 0, 2], [0, 1, 2]];
    let vips = create(scene, "fragments");
    let clients = [
        (scene.lab().client(), Network::Lan.both(100)),
        (scene.lab().remote(), Network::Remote.both(100)),
    ];
    for (at, vip) in vips.into_iter().enumerate() {
        let to = SocketAddr::new(vip, UDP_PORT);
        for (from, addresses) in &clients {
            let own = SocketAddr::new(addresses[at], PORT);
            let socket = from.run(|| UdpSocket::bind(own).unwrap());
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            let raw = Raw::open(from, vip);
            let mut buffer = vec![0; 8192];
            // Once the way is known, nothing is lost.
            let begun = Instant::now();
            while socket.send_to(b"?", to).is_err() || socket.recv(&mut buffer).is_err() {
                assert!(begun.elapsed() < PATIENCE, "{to} is silent to {own}");
            }
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            for (number, order) in ORDERS.iter().enumerate() {
                let seed = u32::try_from(number).unwrap();
                let data: Vec<u8> = (seed..seed + 4000)
                    .map(|at| u8::try_from(at % 251).unwrap())
                    .collect();
                let parts = fragments(own, to, 1000 + seed, &data);
                for part in order {
                    raw.send(vip, &parts[*part]).unwrap();
                }
                let length = socket
                    .recv(&mut buffer)
                    .unwrap_or_else(|error| panic!("{own} to {to}, {order:?}: {error}"));
                assert!(
                    buffer[..length].ends_with(&data),
                    "{own} to {to}, {order:?}"
                );
            }
        }
    }
}

/// A router on the way takes smaller packets only, and says so to the VIP: the pod that has the flow hears it.
pub(crate) fn smaller_mtu(scene: &Scene<'_>) {
    const MTU: u32 = 1300;
    let vips = create(scene, "narrow");
    let [v4, v6] = Network::Remote.both(100);
    let narrow = Narrow(
        scene.lab().router(),
        [format!("{v4}/32"), format!("{v6}/128")],
    );
    narrow.set(MTU);
    for (vip, client) in vips.into_iter().zip([v4, v6]) {
        let flow = elsewhere(scene, scene.lab().remote(), vip);
        let pod = scene.lab().host(&flow.pod).unwrap();
        flow.exchange(20_000_000, &AtomicU64::new(0)).unwrap();
        let route = pod.ip(&format!("route get {client}")).unwrap();
        assert!(route.contains(&format!("mtu {MTU}")), "{route}");
    }
}

/// Routes of a router's with an MTU of their own, for a while.
struct Narrow<'a>(&'a Netns, [String; 2]);

impl Narrow<'_> {
    fn set(&self, mtu: u32) {
        let [v4, v6] = &self.1;
        self.0
            .ip_batch(&format!(
                "route add {v4} dev eth1 mtu lock {mtu}\nroute add {v6} dev eth1 mtu {mtu}\n"
            ))
            .unwrap();
    }
}

impl Drop for Narrow<'_> {
    fn drop(&mut self) {
        for route in &self.1 {
            let _ = self.0.ip(&format!("route del {route} dev eth1"));
        }
    }
}

/// Opens connections, all of which must be served by pods that see `address`: the pods.
fn served(from: &Netns, vip: IpAddr, address: IpAddr) -> BTreeSet<String> {
    (0..CONNECTIONS)
        .map(|_| {
            let flow = Flow::open(from, (vip, TCP_PORT).into());
            let flow = flow.unwrap_or_else(|error| panic!("{vip} from {}: {error}", from.name()));
            assert_eq!(flow.seen_from, address, "{vip} from {}", from.name());
            flow.pod
        })
        .collect()
}

/// Two clients with one address for the world are two clients, and all nodes serve them.
pub(crate) fn behind_one_nat(scene: &Scene<'_>) {
    let vips = create(scene, "nat");
    let router = scene.lab().router();
    let clients = [1, 2].map(|number| behind::host(scene.lab(), router, number).unwrap());
    let _table = Table::load(
        router,
        "nat_of_clients",
        "chain out {
            type nat hook postrouting priority srcnat
            ip saddr 10.66.0.0/16 masquerade
            ip6 saddr fd00:66::/32 masquerade
        }",
    );
    for (vip, shared) in vips.into_iter().zip(Network::Lan.both(1)) {
        for client in &clients {
            assert_eq!(served(client, vip, shared).len(), 3, "not by all pods");
        }
    }
}

/// On a host whose way leads through a node: the pod sees the client's own address. That node's kube-proxy takes what comes
/// by it, and picks a pod; where nobody does, the data path's own tests see it steered.
pub(crate) fn behind_nodes(scene: &Scene<'_>) {
    let vips = create(scene, "behind");
    let leader = scene.leader(vips[0]);
    let other = |node: &&Node| node.name != leader;
    let through = scene.lab().nodes().iter().find(other).unwrap();
    let client = behind::host(scene.lab(), &through.netns, 3).unwrap();
    let gateways = through.addresses(Network::Lan);
    let router = scene.lab().router();
    for (network, gateway) in behind::networks(3).iter().zip(gateways) {
        router
            .ip(&format!("route add {network} via {gateway}"))
            .unwrap();
    }
    for (vip, address) in vips.into_iter().zip(behind::addresses(3)) {
        println!("{vip}: served by {:?}", served(&client, vip, address));
    }
    for network in behind::networks(3) {
        router.ip(&format!("route del {network}")).unwrap();
    }
}

/// A policy in a node's forward hook that denies a client denies it the pods of that node, and nobody else.
pub(crate) fn forward_drop(scene: &Scene<'_>) {
    let vips = create(scene, "denied");
    let lab: &Lab = scene.lab();
    let leader = scene.leader(vips[0]);
    let denying = lab.nodes().iter().find(|node| node.name != leader).unwrap();
    let [v4, v6] = Network::Lan.both(100);
    let _table = Table::load(
        &denying.netns,
        "firewall",
        &format!(
            "chain forward {{
                type filter hook forward priority filter
                ip saddr {v4} tcp dport {TCP_PORT} drop
                ip6 saddr {v6} tcp dport {TCP_PORT} drop
            }}"
        ),
    );
    for vip in vips {
        let outcomes: Vec<Option<String>> = (0..CONNECTIONS)
            .map(|_| {
                let to = SocketAddr::new(vip, TCP_PORT);
                Some(Flow::open_within(lab.client(), to, SILENCE).ok()?.pod)
            })
            .collect();
        let denied = outcomes.iter().filter(|outcome| outcome.is_none()).count();
        println!("{vip}: {denied} of {CONNECTIONS} denied");
        assert!(denied > 0, "{vip}: nobody is denied");
        let others: BTreeSet<&str> = outcomes.iter().flatten().map(String::as_str).collect();
        assert!(!others.is_empty(), "{vip}: everybody is denied");
        let of_node = |pod: &&str| pod.starts_with(&format!("{}-", denying.name));
        assert!(!others.iter().any(of_node), "{vip}: {others:?}");
        assert_eq!(pods(lab.remote(), vip).len(), 3, "others are not denied");
    }
}
