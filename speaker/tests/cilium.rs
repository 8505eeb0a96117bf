//! Real speakers beside what stands in for Cilium, from manifests: pods of the gateway and of another node leave by their
//! policy's addresses, others as they would without, and connections outlive the gateway.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

#[path = "egress/flow.rs"]
#[allow(dead_code, reason = "the scenarios of the node use the rest")]
mod flow;
#[path = "egress/stand_in.rs"]
#[allow(dead_code, reason = "the scenarios of the node use the rest")]
mod stand_in;

use std::net::IpAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::fault::{Fault, SPEAKER};
use landfall_lab::manifests::Manifests;
use landfall_lab::server::PodServer;
use landfall_lab::{Lab, Network, Node, PodLinks, Topology};
use serde_json::{Value, json};

use flow::{Pair, remote, seen_as};
use stand_in::{IDENTITY, mk_maps, pass_by};

/// What a busy machine can promise.
const PATIENCE: Duration = Duration::from_secs(60);
const POLICY: &str = "mail";
/// The number of its addresses.
const NUMBER: u8 = 240;

fn egress() -> [IpAddr; 2] {
    Network::Lan.both(NUMBER)
}

fn until(lab: &Lab, what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what}\n{}", state(lab));
        thread::sleep(Duration::from_millis(50));
    }
}

fn state(lab: &Lab) -> String {
    let of = |node: &Node| lab.log(&node.name, SPEAKER).unwrap_or_default();
    lab.nodes().iter().map(of).collect::<Vec<_>>().join("\n")
}

/// Who leads the policy's first address.
fn gateway(lab: &Lab) -> Option<String> {
    lab.nodes().iter().find_map(|node| {
        let state = lab.speaker_state(&node.name).ok()?;
        let gateway = &state["egress"]["gateways"][POLICY];
        let is_settled = gateway["settled"] == json!(true);
        let name = gateway["node"].as_str().filter(|_| is_settled)?;
        Some(name.to_owned())
    })
}

/// The stand-in on a node, and where its maps are.
fn mk_cilium(lab: &Lab, node: &Node) -> PathBuf {
    let links: Vec<String> = (0..node.pods.len())
        .map(|pod| format!("veth{pod}"))
        .collect();
    pass_by(&node.netns, &links, "eth0", Network::Lan.both(1), IDENTITY);
    let own = node.addresses(Network::Lan);
    for (net, via) in landfall_lab::address::pod_cidrs(node.index).iter().zip(own) {
        let router = lab.router();
        router
            .ip(&format!("route replace {net} via {via}"))
            .unwrap();
    }
    let directory = lab
        .mount_pins()
        .unwrap()
        .join(format!("{}-cilium", node.name));
    std::fs::create_dir(&directory).unwrap();
    mk_maps(&node.netns, &directory);
    directory
}

/// The first pod of each node is the policy's.
fn write(lab: &Lab, manifests: &Manifests) {
    let object = |kind: &str, name: &str, spec: Value| {
        json!({
            "apiVersion": "landfall.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec,
        })
    };
    let ranges = egress().map(|it| format!("{it}-{it}"));
    let pool = json!({"addresses": ranges, "purpose": "Egress", "autoAssign": false});
    let policy = json!({
        "podSelector": {"matchLabels": {"tenant": POLICY}},
        "egressIPs": {"addresses": egress()},
    });
    for (name, object) in [
        ("pool-out", object("IPAddressPool", "out", pool)),
        ("policy-mail", object("EgressPolicy", POLICY, policy)),
    ] {
        manifests.write(name, &object).unwrap();
    }
    for (number, pod) in lab
        .nodes()
        .iter()
        .flat_map(|node| node.pods.iter().enumerate())
    {
        let tenant = if number == 0 { POLICY } else { "plain" };
        let ips = pod.addresses.map(|ip| json!({"ip": ip}));
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": "default", "labels": {"tenant": tenant}},
            "spec": {"nodeName": pod.node, "containers": []},
            "status": {"podIPs": ips},
        });
        manifests
            .write(&format!("pod-{}", pod.name), &object)
            .unwrap();
    }
}

#[test]
fn pods_leave_by_their_policys_addresses_and_their_connections_outlive_the_gateway() {
    let lab = Lab::build(Topology {
        nodes: 3,
        pods_per_node: 2,
        pod_links: PodLinks::PointToPoint,
        ..Topology::default()
    })
    .expect("the lab needs root and Debian's iproute2 and nftables");
    let _server = PodServer::start(lab.remote(), "remote").unwrap();
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_nodes(&lab).unwrap();
    manifests.write_pool().unwrap();
    write(&lab, &manifests);
    for node in lab.nodes() {
        let maps = mk_cilium(&lab, node);
        let program = lab
            .speaker(&node.name)
            .unwrap()
            .option("--manifests", manifests.directory().display())
            .arg("--egress")
            .arg(format!("--cilium={}", maps.display()));
        lab.start(&node.name, SPEAKER, &program).unwrap();
    }
    until(&lab, "there is a gateway", || gateway(&lab).is_some());
    let first = gateway(&lab).unwrap();
    let tenant = |node: &Node| node.pods[0].netns.share();
    for node in lab.nodes() {
        for (family, remote) in remote().into_iter().enumerate() {
            let by_policy = (Some(egress()[family]), Some(egress()[family]));
            until(&lab, "the tenant leaves by its policy's address", || {
                seen_as(&tenant(node), remote) == by_policy
            });
            let own = Some(node.pods[1].addresses[family]);
            until(&lab, "the other leaves as it did", || {
                seen_as(&node.pods[1].netns, remote) == (own, own)
            });
        }
    }
    let others = || lab.nodes().iter().filter(|node| node.name != first);
    let mut flows: Vec<Pair> = others()
        .flat_map(|node| remote().map(|remote| (node, remote)))
        .map(|(node, remote)| Pair::open(&tenant(node), lab.remote(), remote).unwrap())
        .collect();
    for flow in &mut flows {
        assert!(egress().contains(&flow.seen_as));
        flow.pod_speaks().unwrap();
    }
    // What the standby has a copy of: longer than the copies' lag.
    thread::sleep(Duration::from_secs(1));
    lab.inject(&first, Fault::PowerOff).unwrap();
    until(&lab, "another is the gateway", || {
        let now = gateway(&lab);
        now.is_some_and(|now| now != first)
    });
    for flow in &mut flows {
        flow.pod_speaks()
            .and_then(|()| flow.outside_speaks())
            .unwrap_or_else(|error| panic!("{error}\n{}", state(&lab)));
    }
    for node in others() {
        let seen = seen_as(&tenant(node), remote()[0]);
        assert_eq!(seen, (Some(egress()[0]), Some(egress()[0])));
    }
}
