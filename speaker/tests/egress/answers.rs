//! What was asked from outside is answered by the address that was asked, whoever the tenant of the pod is; and a Service
//! of the cluster's is judged by the endpoint behind it.

use std::net::{IpAddr, SocketAddr};

use landfall_lab::server::TCP_PORT;
use landfall_lab::{Mac, Network};
use landfall_speaker::node_rules::NodeRules as _;

use super::cni::Cni;
use super::flow::{A_WHILE, line, remote};
use super::node::{Cluster, Plan};

const NODE_PORT: u16 = 30080;
const SERVICE_PORT: u16 = 80;

fn service_ips() -> [IpAddr; 2] {
    ["10.96.0.10", "fd00:96::10"].map(|address| address.parse().unwrap())
}

fn vips() -> [IpAddr; 2] {
    landfall_lab::address::vips(0)
}

fn at(addresses: [IpAddr; 2], port: u16) -> [SocketAddr; 2] {
    addresses.map(|address| (address, port).into())
}

/// The answers reach who has asked, and nothing else leaves.
fn answered(cluster: &Cluster, asked: [IpAddr; 2], port: u16, seen: [IpAddr; 2]) {
    for (to, seen) in at(asked, port).into_iter().zip(seen) {
        let heard = line(cluster.lab.remote(), to, A_WHILE)
            .unwrap_or_else(|error| panic!("{to}: {error}\n{}", cluster.state()));
        assert_eq!(heard, seen, "{to}");
    }
    cluster.assert_clean(&asked);
    for reason in ["unknown", "invalid", "translated", "no-gateway"] {
        assert_eq!(cluster.dropped(reason), 0, "{reason}");
    }
}

#[test]
fn a_node_port_answers_as_the_node() {
    Cni::each(|cni| {
        let cluster = Cluster::armed(&Plan {
            cni,
            ..Plan::default()
        });
        cluster.lab.serve_pods().unwrap();
        let node = cluster.node_ips();
        cni.deliver(
            cluster.node(),
            at(node, NODE_PORT),
            at(cluster.pod(0).addresses, TCP_PORT),
            false,
        );
        answered(&cluster, node, NODE_PORT, remote());
    });
}

#[test]
fn a_vip_answers_as_itself() {
    Cni::each(|cni| {
        let cluster = Cluster::armed(&Plan {
            cni,
            ..Plan::default()
        });
        cluster.lab.serve_pods().unwrap();
        for (vip, node) in vips().into_iter().zip(cluster.node_ips()) {
            cluster
                .lab
                .router()
                .ip(&format!("route add {vip} via {node}"))
                .unwrap();
        }
        cni.deliver(
            cluster.node(),
            at(vips(), SERVICE_PORT),
            at(cluster.pod(0).addresses, TCP_PORT),
            false,
        );
        answered(&cluster, vips(), SERVICE_PORT, remote());
    });
}

/// The pod is another node's, whose answers come back by an interface of the cluster's: this node has never heard of it.
#[test]
fn a_node_port_answers_for_the_pod_of_another_node() {
    Cni::each(|cni| {
        let cluster = Cluster::armed(&Plan {
            cni,
            management: true,
            ..Plan::default()
        });
        cluster.lab.serve_pods().unwrap();
        let node = cluster.node_ips();
        let there = cluster.lab.node("node2").unwrap().pods[0].addresses;
        cni.deliver(
            cluster.node(),
            at(node, NODE_PORT),
            at(there, TCP_PORT),
            true,
        );
        let own = cluster
            .lab
            .node("node1")
            .unwrap()
            .addresses(Network::Management);
        answered(&cluster, node, NODE_PORT, own);
    });
}

/// A pod that asks a Service whose endpoint is outside leaves as if it had asked that.
#[test]
fn a_service_is_judged_by_its_endpoint() {
    Cni::each(|cni| {
        let cluster = Cluster::armed(&Plan {
            cni,
            ..Plan::default()
        });
        let services = at(service_ips(), SERVICE_PORT);
        cni.deliver(cluster.node(), services, at(remote(), TCP_PORT), false);
        let by_pod = [cluster.egress_ips(), cluster.node_ips()];
        for (number, seen) in by_pod.into_iter().enumerate() {
            for (service, seen) in services.into_iter().zip(seen) {
                let heard = line(&cluster.pod(number).netns, service, A_WHILE)
                    .unwrap_or_else(|error| panic!("{service}: {error}\n{}", cluster.state()));
                assert_eq!(heard, seen, "{service} of pod {number}");
            }
        }
        cluster.assert_clean(&cluster.node_ips());
    });
}

/// And one whose endpoint is a pod stays in the cluster.
#[test]
fn a_service_of_pods_stays_in_the_cluster() {
    Cni::each(|cni| {
        let mut cluster = Cluster::build(&Plan {
            cni,
            management: true,
            ..Plan::default()
        });
        for policy in cluster.egress.policies.values_mut() {
            policy.gateway = None;
        }
        cluster.start();
        cluster.apply();
        cluster.await_armed();
        cluster.lab.serve_pods().unwrap();
        let there = cluster.lab.node("node2").unwrap().pods[0].addresses;
        let services = at(service_ips(), SERVICE_PORT);
        cni.deliver(cluster.node(), services, at(there, TCP_PORT), false);
        for (service, own) in services.into_iter().zip(cluster.pod(0).addresses) {
            assert_eq!(line(&cluster.pod(0).netns, service, A_WHILE).unwrap(), own);
        }
        assert_eq!(cluster.dropped("no-gateway"), 0);
    });
}

/// Where the programs deliver, a client's packet comes from the leader with the pod's address by now, and the leader may be
/// the gateway. The programs' mark tells it from what comes back to a tenant.
#[test]
fn what_the_programs_have_delivered_is_answered_and_not_led() {
    let cluster = Cluster::armed(&Plan {
        native: true,
        ..Plan::default()
    });
    cluster.lab.serve_pods().unwrap();
    let arrival = cluster.parts.as_ref().unwrap().rules.arrival_mark();
    assert_eq!(arrival, Some(0x1000), "it is asked for");
    // In place of the leader and of the program: who asks comes by the gateway, and is marked here.
    let gateway = cluster.lab.node("node2").unwrap().addresses(Network::Lan);
    let nets = landfall_lab::address::pod_cidrs(1);
    for (net, gateway) in nets.iter().zip(gateway) {
        let router = cluster.lab.router();
        router
            .ip(&format!("route replace {net} via {gateway}"))
            .unwrap();
    }
    for marked in [true, false] {
        if marked {
            let rule = "add rule inet program pre iifname eth0 tcp dport 8080 meta mark set 0x1000";
            let chain = "add chain inet program pre { type filter hook prerouting priority raw; }";
            let script = format!("add table inet program\n{chain}\n{rule}\n");
            cluster.node().nft(&script).unwrap();
        } else {
            cluster.node().nft("delete table inet program\n").unwrap();
        }
        let to = if marked {
            Network::Lan.mac(1)
        } else {
            Mac(cluster.gateway_mac())
        };
        for (pod, remote) in cluster.pod(0).addresses.into_iter().zip(remote()) {
            cluster.wire.clear();
            let heard = line(cluster.lab.remote(), (pod, TCP_PORT).into(), A_WHILE);
            assert_eq!(heard.unwrap(), remote);
            for frame in cluster.wire.outbound() {
                assert_eq!((frame.source, frame.to), (pod, to), "marked: {marked}");
            }
        }
    }
}
