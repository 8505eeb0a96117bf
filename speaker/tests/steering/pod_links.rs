//! Pods without a bridge: each on a link of its own, with a route to it.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;

use landfall_lab::fault::Fault;
use landfall_lab::{Network, PodLinks, Topology};

use super::cluster::{Cluster, vips};
use super::datagrams::Datagrams;
use super::flow::{all_alive, await_served, elsewhere, open, open_from};

/// As many flows reach every one of three nodes' pods, but for one time in a million.
const FLOWS: usize = 40;
/// How much goes each way.
const BYTES: u64 = 20_000_000;

#[test]
fn pods_on_links_of_their_own_are_served_as_on_a_bridge() {
    let cluster = Cluster::build(Topology {
        pod_links: PodLinks::PointToPoint,
        ..Topology::default()
    });
    let lab = &cluster.lab;
    let pods = cluster.pods();
    cluster.serve(&pods);
    cluster.speak();
    let leader = cluster.await_leader(vips()[0], |_| true);
    let names: BTreeSet<String> = pods.iter().map(|pod| pod.name.clone()).collect();
    let clients = [
        (lab.client(), Network::Lan.both(100)),
        (lab.remote(), Network::Remote.both(100)),
    ];
    for (family, vip) in vips().into_iter().enumerate() {
        await_served(&cluster, vip, &pods);
        for (from, addresses) in clients {
            let mut flows = open_from(from, vip, FLOWS);
            for flow in &mut flows {
                assert_eq!(flow.seen_as(), addresses[family], "{}", flow.pod);
            }
            let seen: BTreeSet<String> = flows.into_iter().map(|flow| flow.pod).collect();
            assert_eq!(seen, names, "{vip} from {}", from.name());
            let (pod, seen) = Datagrams::open(from, vip).answered();
            assert_eq!(seen, addresses[family], "{vip}: a datagram to {pod}");
        }
        let flow = elsewhere(lab.client(), vip, &leader);
        flow.exchange(BYTES, &AtomicU64::new(0)).unwrap();
    }

    let mut flows = Vec::new();
    for vip in vips() {
        flows.extend(open(&cluster, vip, FLOWS));
    }
    let off = cluster.await_leader(vips()[0], |_| true);
    flows.retain(|flow| flow.node() != off);
    println!("{off} loses power; {} flows are not its own", flows.len());
    lab.inject(&off, Fault::PowerOff).unwrap();
    all_alive(&cluster, &mut flows, "after the leader's death");
    cluster.await_leader(vips()[0], |leader| leader != off);
    all_alive(&cluster, &mut flows, "with another leader");
    println!("{:?}", cluster.verdicts());
}
