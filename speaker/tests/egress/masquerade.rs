//! Pods leave by their policy's address, whoever masquerades besides, and what the forward hook drops stays dropped.

use landfall_lab::PodLinks;
use landfall_lab::server::TCP_PORT;

use super::cni::Cni;
use super::flow::{A_WHILE, Pair, line, remote, seen_as};
use super::node::{Cluster, Plan};

fn leaves_by_the_policy(cni: Cni, pod_links: PodLinks) {
    println!("{cni:?}, {pod_links:?}");
    let cluster = Cluster::armed(&Plan {
        cni,
        pod_links,
        ..Plan::default()
    });
    for (family, remote) in remote().into_iter().enumerate() {
        let egress = Some(cluster.egress_ips()[family]);
        let node = Some(cluster.node_ips()[family]);
        let seen = seen_as(&cluster.pod(0).netns, remote);
        assert_eq!(seen, (egress, egress), "the tenant\n{}", cluster.state());
        let seen = seen_as(&cluster.pod(1).netns, remote);
        assert_eq!(seen, (node, node), "nobody's\n{}", cluster.state());
    }
    // A rule of the forward hook sees the tenant's packets.
    cni.forbid(cluster.node(), TCP_PORT);
    for remote in remote() {
        let pod = &cluster.pod(0).netns;
        let connection = line(pod, (remote, TCP_PORT).into(), A_WHILE);
        assert!(connection.is_err(), "forbidden: {connection:?}");
        Pair::open(pod, cluster.lab.remote(), remote).expect("another port is allowed");
    }
    cluster.assert_clean(&cluster.node_ips());
    for reason in ["unknown", "forged", "invalid", "no-gateway", "translated"] {
        assert_eq!(cluster.dropped(reason), 0, "{reason}");
    }
}

#[test]
fn beside_nftables() {
    leaves_by_the_policy(Cni::Nftables, PodLinks::Bridge);
}

#[test]
fn beside_nftables_on_links_of_their_own() {
    leaves_by_the_policy(Cni::Nftables, PodLinks::PointToPoint);
}

#[test]
fn beside_iptables_nft() {
    leaves_by_the_policy(Cni::IptablesNft, PodLinks::Bridge);
}

#[test]
fn beside_iptables_nft_on_links_of_their_own() {
    leaves_by_the_policy(Cni::IptablesNft, PodLinks::PointToPoint);
}

#[test]
fn beside_iptables_legacy() {
    leaves_by_the_policy(Cni::IptablesLegacy, PodLinks::Bridge);
}

#[test]
fn beside_iptables_legacy_on_links_of_their_own() {
    leaves_by_the_policy(Cni::IptablesLegacy, PodLinks::PointToPoint);
}
