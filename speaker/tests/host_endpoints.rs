//! What `kubeadm` needs before there is a cluster: a VIP for processes of the nodes themselves, from manifests.
//!
//! Nobody else delivers here: no kube-proxy, no stand-in. On each node a server on port 6443 says where it runs.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use landfall_lab::address::Network;
use landfall_lab::fault::{Fault, SPEAKER};
use landfall_lab::manifests::Manifests;
use landfall_lab::measure::neighbours;
use landfall_lab::{Lab, Netns, Topology};
use serde_json::{Value, json};

/// What a busy machine can promise.
const PATIENCE: Duration = Duration::from_secs(30);
const PORT: u16 = 6443;
const VIPS: [&str; 2] = ["10.88.0.200", "fd00:88::200"];

/// A server of a node; it ends when dropped.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(netns: &Netns, name: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let listener = netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)).unwrap());
        listener.set_nonblocking(true).unwrap();
        let (ended, said) = (stop.clone(), name.to_owned());
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if let Ok((mut stream, _)) = listener.accept() {
                    // Whoever asked may be gone.
                    let _ = stream.write_all(said.as_bytes());
                } else {
                    thread::sleep(Duration::from_millis(5));
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn mk_service(lab: &Lab, manifests: &Manifests) {
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "kube-apiserver", "namespace": "kube-system",
            "annotations": {"landfall.dev/ips": VIPS.join(",")},
        },
        "spec": {
            "type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
            "ports": [{"port": PORT, "protocol": "TCP"}],
        },
    });
    manifests.write("service", &service).unwrap();
    for (family, of_family) in [("IPv4", 0), ("IPv6", 1)] {
        let endpoints: Vec<Value> = lab
            .nodes()
            .iter()
            .map(|node| {
                let address = node.addresses(Network::Lan)[of_family];
                json!({"addresses": [address.to_string()], "nodeName": node.name})
            })
            .collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("kube-apiserver-{family}").to_lowercase(), "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "kube-apiserver"},
            },
            "addressType": family,
            "ports": [{"port": PORT, "protocol": "TCP"}],
            "endpoints": endpoints,
        });
        manifests.write(&format!("slice-{family}"), &slice).unwrap();
    }
}

/// One question: who answered.
fn ask(from: &Netns, vip: IpAddr) -> Option<String> {
    from.run(|| {
        let to = SocketAddr::new(vip, PORT);
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(500)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        let mut said = String::new();
        stream.read_to_string(&mut said).ok()?;
        Some(said)
    })
}

/// Asks until one of `wanted` answers: a server that has just begun or ended takes its node a moment to see.
fn reaches(when: &str, from: &Netns, vip: IpAddr, wanted: &[&str]) {
    let begun = Instant::now();
    let mut asked = 0;
    loop {
        let said = ask(from, vip);
        asked += 1;
        if let Some(said) = said.as_deref().filter(|said| wanted.contains(said)) {
            let took = begun.elapsed();
            println!(
                "{when}: {vip} from {}: {said} after {took:?}, asked {asked} times",
                from.name()
            );
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{when}: {} asks {vip} and wants {wanted:?}, but last got {said:?}",
            from.name()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Who answers ARP or ND for the VIP: one node.
fn leader(lab: &Lab, vip: IpAddr) -> String {
    let begun = Instant::now();
    loop {
        let answers = neighbours::who_answers(lab, vip, Duration::from_millis(500)).unwrap();
        assert!(answers.len() <= 1, "only the leader answers: {answers:?}");
        if let Some(leader) = answers.into_keys().next() {
            return leader;
        }
        assert!(begun.elapsed() < PATIENCE, "nobody answers for {vip}");
    }
}

/// Asks both VIPs from every living node and from both clients. Whoever has a server of its own gets that one,
/// the leader's clients among them.
fn all_reach(lab: &Lab, when: &str, servers: &BTreeMap<String, Server>, alive: &[&str]) {
    let all: Vec<&str> = servers.keys().map(String::as_str).collect();
    let nearest = |node: &str| match servers.get_key_value(node) {
        Some((own, _)) => vec![own.as_str()],
        None => all.clone(),
    };
    for vip in VIPS.map(|vip| vip.parse().unwrap()) {
        let leads = leader(lab, vip);
        for node in alive {
            reaches(when, &lab.node(node).unwrap().netns, vip, &nearest(node));
        }
        for client in [lab.client(), lab.remote()] {
            reaches(when, client, vip, &nearest(&leads));
        }
        assert_eq!(leader(lab, vip), leads, "nothing moved meanwhile");
    }
}

#[test]
fn a_control_plane_vip_is_reached_from_everywhere_before_and_after_the_leaders_death() {
    let lab = Lab::build(Topology {
        pods_per_node: 0,
        management: false,
        ..Topology::default()
    })
    .unwrap();
    let mut servers: BTreeMap<String, Server> = lab
        .nodes()
        .iter()
        .map(|node| (node.name.clone(), Server::start(&node.netns, &node.name)))
        .collect();
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_nodes(&lab).unwrap();
    manifests.write_pool().unwrap();
    mk_service(&lab, &manifests);
    lab.start_speakers().unwrap();
    let nodes: Vec<&str> = lab.nodes().iter().map(|node| &*node.name).collect();
    all_reach(&lab, "at first", &servers, &nodes);

    let first = leader(&lab, VIPS[0].parse().unwrap());
    assert_eq!(first, leader(&lab, VIPS[1].parse().unwrap()), "one group");
    // A server ends, the manifests still name it: its node asks the others.
    let without = *nodes.iter().find(|node| **node != first).unwrap();
    servers.remove(without);
    all_reach(
        &lab,
        &format!("without {without}'s server"),
        &servers,
        &nodes,
    );
    servers.insert(
        without.to_owned(),
        Server::start(&lab.node(without).unwrap().netns, without),
    );
    all_reach(&lab, "with it again", &servers, &nodes);

    lab.inject(&first, Fault::PowerOff).unwrap();
    servers.remove(&first);
    let alive: Vec<&str> = nodes.into_iter().filter(|node| *node != first).collect();
    let vip = VIPS[0].parse().unwrap();
    let begun = Instant::now();
    while neighbours::who_answers(&lab, vip, Duration::from_millis(200))
        .unwrap()
        .is_empty()
    {
        assert!(begun.elapsed() < PATIENCE, "nobody took over");
    }
    println!(
        "somebody answers again {:?} after the leader's death",
        begun.elapsed()
    );
    all_reach(&lab, "after the leader's death", &servers, &alive);

    // The manifests still name the dead node, whose endpoint nobody is sent to.
    servers.remove(without);
    all_reach(
        &lab,
        &format!("then without {without}'s server"),
        &servers,
        &alive,
    );
    for _ in 0..6 {
        assert!(ask(&lab.node(without).unwrap().netns, vip).is_some());
    }
}

/// As README's example has it: nobody names the nodes but the flags.
#[test]
fn it_needs_no_node_manifests_where_the_flags_name_the_nodes() {
    let lab = Lab::build(Topology {
        pods_per_node: 0,
        management: false,
        ..Topology::default()
    })
    .unwrap();
    let mut servers: BTreeMap<String, Server> = lab
        .nodes()
        .iter()
        .map(|node| (node.name.clone(), Server::start(&node.netns, &node.name)))
        .collect();
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_pool().unwrap();
    mk_service(&lab, &manifests);
    let address = |node: &landfall_lab::Node| node.addresses(Network::Lan)[0].to_string();
    // The first node is up before the others, which the manifests name already.
    for node in lab.nodes() {
        let state = lab.directory().join("state").join(&node.name);
        std::fs::create_dir_all(&state).unwrap();
        let others = lab.nodes().iter().filter(|other| other.name != node.name);
        let peers: Vec<String> = others.map(address).collect();
        let program = lab
            .speaker(&node.name)
            .unwrap()
            .option("--manifests", lab.manifests_dir().display())
            .option("--state-dir", state.display())
            .option("--gossip-address", address(node))
            .option("--peers", peers.join(","));
        lab.start(&node.name, SPEAKER, &program).unwrap();
        if node.name == "node1" {
            for vip in VIPS.map(|vip| vip.parse().unwrap()) {
                for from in [&node.netns, lab.client(), lab.remote()] {
                    reaches("alone", from, vip, &["node1"]);
                }
            }
        }
    }
    let nodes: Vec<&str> = lab.nodes().iter().map(|node| &*node.name).collect();
    all_reach(&lab, "with all three", &servers, &nodes);
    let first = leader(&lab, VIPS[0].parse().unwrap());
    lab.inject(&first, Fault::PowerOff).unwrap();
    servers.remove(&first);
    let alive: Vec<&str> = nodes.into_iter().filter(|node| *node != first).collect();
    all_reach(&lab, "after the leader's death", &servers, &alive);
}
