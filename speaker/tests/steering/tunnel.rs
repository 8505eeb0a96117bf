//! A node that is not on the VIPs' segment: its pods are reached by the tunnel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::Nic;
use landfall_lab::fault::Fault;
use landfall_lab::manifests::LINES;
use landfall_lab::{Network, Topology};
use serde_json::json;

use super::cluster::{Cluster, PATIENCE, vips};
use super::flow::{Flow, all_alive, await_served, open};

/// How much goes each way.
const BYTES: u64 = 20_000_000;
/// How many connections are made.
const CONNECTIONS: usize = 40;
/// By then gossip has given up a node.
const GIVEN_UP: Duration = Duration::from_secs(5);
/// The node that has a leg in another segment only.
const FAR: &str = "node3";

fn advertise(cluster: &Cluster, cross_segment: &str) {
    let object = json!({
        "apiVersion": "landfall.dev/v1alpha1",
        "kind": "L2Advertisement",
        "metadata": {"name": "lab"},
        "spec": {"ipAddressPools": ["lab"], "crossSegment": cross_segment},
    });
    cluster
        .manifests
        .write("advertisement-lab", &object)
        .unwrap();
}

#[test]
fn a_node_off_the_segment_serves_by_the_tunnel() {
    let cluster = Cluster::build(Topology {
        second_nic: true,
        default_route: Nic::Eth1,
        ..Topology::default()
    });
    let lab = &cluster.lab;
    lab.node(FAR)
        .unwrap()
        .netns
        .ip("link set eth0 down")
        .unwrap();
    let pods = cluster.pods();
    let far: Vec<_> = pods.iter().copied().filter(|pod| pod.node == FAR).collect();
    cluster.serve(&far);
    lab.start_speakers().unwrap();
    let leader = cluster.await_leader(vips()[0], |node| node != FAR);
    println!("{leader} leads, {FAR} serves");

    // Nobody on the segment has an endpoint. Full-sized packets do not fit the tunnel's path, and arrive all the same.
    let [client_v4, client_v6] = Network::Lan.both(100);
    let mut flows = Vec::new();
    for (vip, client) in vips().into_iter().zip([client_v4, client_v6]) {
        await_served(&cluster, vip, &far);
        let mut flow = Flow::open(lab.client(), (vip, LINES).into()).unwrap();
        assert_eq!(flow.seen_as(), client, "the pod sees the client");
        flow.exchange(BYTES, &AtomicU64::new(0)).unwrap();
        flows.extend(open(&cluster, vip, 20));
    }
    all_alive(&cluster, &mut flows, "by the tunnel");

    // Who is on the segment goes before who is not; what is established stays.
    let near: Vec<_> = pods
        .iter()
        .copied()
        .filter(|pod| pod.node == leader)
        .collect();
    cluster.serve(&[near[0], far[0]]);
    for vip in vips() {
        await_served(&cluster, vip, &near);
    }
    all_alive(&cluster, &mut flows, "with a pod on the segment");

    // Unless all are to serve.
    advertise(&cluster, "Always");
    for vip in vips() {
        await_served(&cluster, vip, &[near[0], far[0]]);
    }
    all_alive(&cluster, &mut flows, "with both");

    // A node whose speaker is absent keeps its place on the segment: its kernel answers there.
    let mut local = open(&cluster, vips()[0], 30);
    lab.inject(&leader, Fault::Kill).unwrap();
    thread::sleep(GIVEN_UP);
    all_alive(&cluster, &mut flows, "without the leader's speaker");
    all_alive(&cluster, &mut local, "without the leader's speaker");
    assert!(local.iter().any(|flow| flow.node() == leader));
    await_served(&cluster, vips()[0], &[near[0], far[0]]);

    // The leader goes, and its successor knows the way.
    lab.inject(&leader, Fault::PowerOff).unwrap();
    cluster.await_leader(vips()[0], |node| node != leader);
    all_alive(&cluster, &mut flows, "with another leader");
    let pods: BTreeSet<&str> = flows.iter().map(|flow| &*flow.pod).collect();
    assert_eq!(pods, BTreeSet::from([&*far[0].name]));
}

/// A node whose uplink fails is reached by the tunnel from then on. What its pods answer had that uplink for way.
#[test]
fn a_node_without_a_way_to_clients_serves_nobody() {
    let cluster = Cluster::build(Topology::default());
    let lab = &cluster.lab;
    let pods = cluster.pods();
    cluster.serve(&pods);
    advertise(&cluster, "Always");
    cluster.speak();
    let leader = cluster.await_leader(vips()[0], |_| true);
    for vip in vips() {
        await_served(&cluster, vip, &pods);
    }
    let cut = lab.nodes().iter().find(|node| node.name != leader).unwrap();
    cut.netns.ip("link set eth0 down").unwrap();
    let others: Vec<_> = pods
        .iter()
        .copied()
        .filter(|pod| pod.node != cut.name)
        .collect();
    thread::sleep(GIVEN_UP);
    let tunnel = lab.node(&leader).unwrap().netns.ip("link show landfall0");
    assert!(tunnel.is_ok(), "it is not reached by a tunnel: {tunnel:?}");
    // None of so many is lost: a third of them would be the cut node's.
    for vip in vips() {
        for _ in 0..CONNECTIONS {
            let flow = Flow::open(lab.client(), (vip, LINES).into()).unwrap();
            assert_ne!(flow.node(), cut.name);
        }
        await_served(&cluster, vip, &others);
    }

    // When nobody else serves, it is better than nobody.
    let own: Vec<_> = pods
        .iter()
        .copied()
        .filter(|pod| pod.node == cut.name)
        .collect();
    cluster.serve(&own);
    let begun = Instant::now();
    loop {
        let state = lab.speaker_state(&leader).unwrap();
        let ports = state["steering"]["ports"].as_object().unwrap();
        if !ports.is_empty() && ports.values().all(|nodes| nodes[&*cut.name] == 1) {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{}", state["steering"]);
        thread::sleep(Duration::from_millis(100));
    }
    cluster.serve(&pods);

    // With a way it serves again.
    let [_, v6] = cut.addresses(Network::Lan);
    let [router_v4, router_v6] = Network::Lan.both(1);
    cut.netns
        .ip_batch(&format!(
            "link set eth0 up\naddress replace {v6}/64 dev eth0 nodad\n\
             route replace default via {router_v4} dev eth0\n\
             route replace default via {router_v6} dev eth0\n"
        ))
        .unwrap();
    for vip in vips() {
        await_served(&cluster, vip, &pods);
    }
}

/// Nobody but the other nodes sends into the tunnel.
#[test]
fn strangers_do_not_come_in() {
    let cluster = Cluster::build(Topology {
        second_nic: true,
        default_route: Nic::Eth1,
        ..Topology::default()
    });
    let lab = &cluster.lab;
    let far = lab.node(FAR).unwrap();
    far.netns.ip("link set eth0 down").unwrap();
    cluster.serve(&cluster.pods());
    lab.start_speakers().unwrap();
    cluster.await_leader(vips()[0], |_| true);
    let begun = std::time::Instant::now();
    let dropped = || {
        let chain = far.netns.exec("nft list chain inet landfall tunnel").ok()?;
        let counts = chain.lines().filter_map(|line| line.split_once("packets "));
        let numbers = counts.filter_map(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
        Some(numbers.sum::<u64>())
    };
    while dropped().is_none() {
        assert!(begun.elapsed() < PATIENCE, "there is no tunnel");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let to: IpAddr = far.addresses(Network::SecondLan)[0];
    lab.client()
        .run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            socket.send_to(&[8, 0, 0, 0, 0, 0x4c, 0x46, 0], (to, 7952))
        })
        .unwrap();
    while dropped() == Some(0) {
        assert!(begun.elapsed() < PATIENCE, "it was let in");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
