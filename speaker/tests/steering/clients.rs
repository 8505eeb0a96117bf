//! Wherever a client is, it is served, and the pod sees its own address.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Instant;

use landfall_lab::manifests::LINES;
use landfall_lab::{Netns, Network, behind};
use socket2::{Domain, Socket, Type};

use super::cluster::{Cluster, PATIENCE, mk_three, vips};
use super::flow::{Flow, await_served};

/// As many connections reach every one of three nodes, but for one time in ten thousand.
const CONNECTIONS: usize = 30;

/// Opens connections, all of which must be served by pods that see `address`: the pods.
fn served(from: &Netns, vip: IpAddr, address: IpAddr) -> BTreeSet<String> {
    (0..CONNECTIONS)
        .map(|_| {
            let mut flow = Flow::open(from, (vip, LINES).into())
                .unwrap_or_else(|error| panic!("{vip} from {}: {error}", from.name()));
            assert_eq!(flow.seen_as(), address, "{vip} from {}", from.name());
            flow.pod
        })
        .collect()
}

#[test]
fn on_the_segment_and_routed() {
    let (cluster, _) = mk_three(false);
    let clients = [
        (cluster.lab.client(), Network::Lan.both(100)),
        (cluster.lab.remote(), Network::Remote.both(100)),
    ];
    for (from, addresses) in clients {
        for (vip, address) in vips().into_iter().zip(addresses) {
            assert_eq!(served(from, vip, address).len(), 3, "not by all pods");
        }
    }
}

/// Two clients with one address for the world, and the same source ports before translation.
#[test]
fn two_behind_one_nat() {
    const PORTS: std::ops::Range<u16> = 20_000..20_020;
    let (cluster, _) = mk_three(false);
    let router = cluster.lab.router();
    let clients =
        [1, 2].map(|number| (number, behind::host(&cluster.lab, router, number).unwrap()));
    router
        .nft(
            "table inet nat_of_clients {
                chain out {
                    type nat hook postrouting priority srcnat
                    ip saddr 10.66.0.0/16 masquerade
                    ip6 saddr fd00:66::/32 masquerade
                }
            }",
        )
        .unwrap();
    for (vip, shared) in vips().into_iter().zip(Network::Lan.both(1)) {
        let mut flows = Vec::new();
        for port in PORTS {
            for (number, from) in &clients {
                let own = behind::addresses(*number)[usize::from(vip.is_ipv6())];
                let to: SocketAddr = (vip, LINES).into();
                let stream = from.run(|| -> std::io::Result<TcpStream> {
                    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                    socket.bind(&SocketAddr::new(own, port).into())?;
                    socket.connect_timeout(&to.into(), PATIENCE)?;
                    Ok(socket.into())
                });
                let flow = Flow::over(stream.unwrap()).unwrap();
                flows.push((format!("client {number}, port {port}"), flow));
            }
        }
        for round in 0..3 {
            for (client, flow) in &mut flows {
                let line = format!("{client}, round {round}");
                assert_eq!(flow.say(&line).unwrap(), line, "flows are mixed");
            }
        }
        for (client, flow) in &mut flows {
            assert_eq!(flow.seen_as(), shared, "{client}");
        }
        let pods: BTreeSet<&str> = flows.iter().map(|(_, flow)| &*flow.pod).collect();
        assert_eq!(pods.len(), 3, "not by all pods");
    }
}

/// What a node's own process sends is a client's, though it comes from a peer's Ethernet address.
#[test]
fn on_the_host_of_another_node() {
    let cluster = Cluster::start(3, 1);
    cluster.serve(&[]);
    cluster.speak();
    let [vip, _] = vips();
    let leader = cluster.await_leader(vip, |_| true);
    // The pod is where the client is not, nor the leader.
    let others: Vec<_> = cluster
        .pods()
        .into_iter()
        .filter(|pod| pod.node != leader)
        .collect();
    cluster.serve(&others[..1]);
    for vip in vips() {
        await_served(&cluster, vip, &others[..1]);
    }
    assert_eq!(
        cluster.leader(vip),
        Some(leader),
        "the leadership moved by itself"
    );
    let host = cluster.lab.node(&others[1].node).unwrap();
    for (vip, address) in vips().into_iter().zip(host.addresses(Network::Lan)) {
        let pods = served(&host.netns, vip, address);
        assert_eq!(pods, BTreeSet::from([others[0].name.clone()]));
    }
}

/// A client whose way leads through a node: what comes from that node's Ethernet address is the client's all the same.
#[test]
fn routed_through_a_node() {
    let (cluster, leader) = mk_three(false);
    let lab = &cluster.lab;
    let through = lab.nodes().iter().find(|node| node.name != leader).unwrap();
    let client = behind::host(lab, &through.netns, 3).unwrap();
    // The way back: by the default route of the pods' nodes, and the router knows the rest.
    let [v4, v6] = through.addresses(Network::Lan);
    lab.router()
        .ip_batch(&format!(
            "route add 10.66.3.0/24 via {v4}\nroute add fd00:66:3::/64 via {v6}\n"
        ))
        .unwrap();
    for (vip, address) in vips().into_iter().zip(behind::addresses(3)) {
        println!("{vip}: served by {:?}", served(&client, vip, address));
    }
    // Without a pod on the way, it is the pods of the other nodes that serve.
    let elsewhere: Vec<_> = cluster
        .pods()
        .into_iter()
        .filter(|pod| pod.node != through.name)
        .collect();
    cluster.serve(&elsewhere);
    let names: BTreeSet<String> = elsewhere.iter().map(|pod| pod.name.clone()).collect();
    for (vip, address) in vips().into_iter().zip(behind::addresses(3)) {
        await_served(&cluster, vip, &elsewhere);
        // The node on the way has rules of its own for what does not come in by its uplink.
        let begun = Instant::now();
        while served(&client, vip, address) != names {
            assert!(begun.elapsed() < PATIENCE, "{vip}: not by {names:?} alone");
        }
    }
}
