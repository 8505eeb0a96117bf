//! What steering leaves to kube-proxy: delivery, in each of its modes and by either traffic policy.

use std::net::{IpAddr, SocketAddr};

use landfall_lab::server::TCP_PORT;
use landfall_lab::{Fault, Lab};
use landfall_tests::flows::{self, Flow};
use landfall_tests::{ProxyMode, client};
use serde_json::json;

use crate::scene::{Scene, eventually};
use crate::steering::pods;

/// As many flows reach every one of three nodes, but for one time in ten million.
const FLOWS: usize = 42;

/// With `externalTrafficPolicy: Cluster` kube-proxy picks any pod and hides the client, on the node that the packet was
/// steered to: flows by other nodes than the leader to other nodes' pods outlive it.
pub(crate) fn cluster_policy(scene: &Scene<'_>) {
    let vips = scene.create("anywhere", json!({}), json!({}));
    scene.served(&vips);
    let by = |flow: &Flow| node_of(scene.lab(), flow.seen_from);
    for vip in vips {
        let to = SocketAddr::new(vip, TCP_PORT);
        let nodes = || {
            let flows = flows::open(scene.lab().client(), to, FLOWS).unwrap();
            let mut nodes: Vec<String> = flows.iter().map(by).collect();
            nodes.sort();
            nodes.dedup();
            nodes
        };
        eventually("all nodes to deliver", nodes, |nodes| nodes.len() == 3);
        outlive_the_leader(scene, vip, |flow, leader| {
            flow.node() != leader && by(flow) != leader
        });
        scene.served(&[vip]);
    }
}

/// kube-proxy by iptables: all nodes' pods serve and see the client, and established flows outlive the leader.
pub(crate) fn iptables(scene: &Scene<'_>) {
    let _mode = Mode::set(scene, ProxyMode::Iptables);
    for node in scene.lab().nodes() {
        let rules = || node.netns.exec("nft list table ip kube-proxy").is_ok();
        eventually("the nftables mode's rules to go", rules, |there| !there);
    }
    let vips = scene.create(
        "iptables",
        json!({"externalTrafficPolicy": "Local"}),
        json!({}),
    );
    scene.served(&vips);
    for vip in vips {
        for from in [scene.lab().client(), scene.lab().remote()] {
            eventually(
                "all three nodes to serve",
                || pods(from, vip),
                |pods| pods.len() == 3,
            );
        }
        outlive_the_leader(scene, vip, |flow, leader| flow.node() != leader);
        scene.served(&[vip]);
    }
}

/// The leader loses its power: flows that do not need its node go on. Afterwards it is back.
pub(crate) fn outlive_the_leader(
    scene: &Scene<'_>,
    vip: IpAddr,
    lives: impl Fn(&Flow, &str) -> bool,
) {
    let lab = scene.lab();
    let to = SocketAddr::new(vip, TCP_PORT);
    let mut flows = flows::open(lab.client(), to, FLOWS).unwrap();
    let leader = scene.leader(vip);
    flows.retain(|flow| lives(flow, &leader));
    assert!(!flows.is_empty());
    let healed = Healed(scene);
    lab.inject(&leader, Fault::PowerOff).unwrap();
    match flows::ask(&mut flows) {
        Ok(took) => println!(
            "      {vip} without {leader}: {} of {FLOWS} flows are others', all answer within {took:?}",
            flows.len()
        ),
        Err(lost) => panic!("{vip} without {leader}: {lost:?} of {}", flows.len()),
    }
    let after = eventually(
        "another leader",
        || scene.leader(vip),
        |after| *after != leader,
    );
    println!("      {leader} -> {after}");
    drop(healed);
    scene.all_take_part();
}

/// All nodes have a kube-proxy again, as the other scenarios expect.
pub(crate) fn back_in_nftables_mode(scene: &Scene<'_>) {
    // Its end is what does it.
    drop(Mode(scene));
}

/// The node that has an address.
fn node_of(lab: &Lab, address: IpAddr) -> String {
    let mut nodes = lab.nodes().iter();
    let node = nodes.find(|node| client::addresses(&node.netns).contains(&address));
    match node {
        Some(node) => node.name.clone(),
        None => panic!("{address} is no node's"),
    }
}

/// Mends everything in the end, whatever happens before.
struct Healed<'a>(&'a Scene<'a>);

impl Drop for Healed<'_> {
    fn drop(&mut self) {
        self.0.lab().heal().unwrap();
    }
}

/// All nodes' kube-proxies are in another mode, for a while.
struct Mode<'a>(&'a Scene<'a>);

impl<'a> Mode<'a> {
    fn set(scene: &'a Scene<'a>, mode: ProxyMode) -> Self {
        let set = Self(scene);
        set.start(mode);
        set
    }

    fn start(&self, mode: ProxyMode) {
        self.0.cluster.start_kube_proxies(mode).unwrap();
    }
}

impl Drop for Mode<'_> {
    fn drop(&mut self) {
        self.start(ProxyMode::Nftables);
    }
}
