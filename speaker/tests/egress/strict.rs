//! A node that drops what connection tracking calls invalid and what comes by another way than it would go: no flow of a
//! tenant's is the worse for it, nor for being silent longer than connection tracking remembers.

use std::thread;
use std::time::{Duration, Instant};

use super::cni::Cni;
use super::flow::{Datagrams, Pair, remote};
use super::node::{Cluster, PATIENCE, Plan};

/// In place of two minutes and more, in seconds.
const MEMORY: u64 = 1;

fn mk_strict(plan: &Plan) -> Cluster {
    let cluster = Cluster::build(plan);
    let node = cluster.node();
    for key in [
        "tcp_timeout_established",
        "tcp_timeout_fin_wait",
        "tcp_timeout_time_wait",
        "tcp_timeout_last_ack",
        "udp_timeout",
        "udp_timeout_stream",
    ] {
        node.sysctl(
            &format!("net.netfilter.nf_conntrack_{key}"),
            &MEMORY.to_string(),
        )
        .unwrap();
    }
    node.sysctl("net.ipv4.conf.all.rp_filter", "1").unwrap();
    plan.cni.forbid_invalid(node);
    let mut cluster = cluster;
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    cluster
}

/// Until connection tracking knows of no flow of the tenant's.
fn forget(cluster: &Cluster) {
    thread::sleep(Duration::from_secs(MEMORY));
    let own = cluster
        .pod(0)
        .addresses
        .map(|address| format!("={address} "));
    let begun = Instant::now();
    loop {
        let known = cluster.node().exec("conntrack -L").unwrap()
            + &cluster.node().exec("conntrack -L -f ipv6").unwrap();
        let Some(line) = known
            .lines()
            .find(|line| own.iter().any(|own| line.contains(own)))
        else {
            return;
        };
        assert!(begun.elapsed() < PATIENCE, "not forgotten: {line}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn is_silent_and_lives(plan: &Plan) {
    println!("{:?}, {:?}", plan.cni, plan.pod_links);
    let cluster = mk_strict(plan);
    let (pod, outside) = (&cluster.pod(0).netns, cluster.lab.remote());
    for (family, remote) in remote().into_iter().enumerate() {
        let egress = cluster.egress_ips()[family];
        let mut flow = Pair::open(pod, outside, remote).unwrap();
        assert_eq!(flow.seen_as, egress);
        let datagrams = Datagrams::open(pod, remote);
        assert_eq!(datagrams.surely_seen_as(), egress);
        for _ in 0..2 {
            flow.pod_speaks().unwrap();
            forget(&cluster);
            flow.pod_speaks()
                .unwrap_or_else(|error| panic!("the pod first: {error}\n{}", cluster.state()));
            forget(&cluster);
            flow.outside_speaks()
                .unwrap_or_else(|error| panic!("the other first: {error}\n{}", cluster.state()));
            // What was picked up from outside is no answer to it.
            flow.pod_speaks().unwrap();
            assert_eq!(datagrams.surely_seen_as(), egress);
        }
    }
    cluster.assert_clean(&[]);
    assert_eq!(cluster.dropped("invalid"), 0);
}

#[test]
fn beside_nftables() {
    is_silent_and_lives(&Plan::default());
}

#[test]
fn beside_iptables_nft() {
    is_silent_and_lives(&Plan {
        cni: Cni::IptablesNft,
        ..Plan::default()
    });
}

#[test]
fn beside_iptables_legacy() {
    is_silent_and_lives(&Plan {
        cni: Cni::IptablesLegacy,
        pod_links: landfall_lab::PodLinks::PointToPoint,
        ..Plan::default()
    });
}

/// The policy's addresses are on another segment than the default route: what comes back does not come by the way that
/// leads to its sender.
#[test]
fn on_another_uplink_than_the_default_routes() {
    is_silent_and_lives(&Plan {
        second_nic: true,
        ..Plan::default()
    });
}
