//! Nothing is led to a gateway before it is one: pods are seen outside by their policy's addresses, or not at all.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use landfall_lab::Netns;
use landfall_lab::fault::SPEAKER;
use landfall_lab::server::{UDP_PORT, WHO_AM_I};
use landfall_runtime::control::{Armed, path, post};
use serde_json::json;

use super::cluster::{Cluster, NODE, PATIENCE, PLAIN, POLICIES};
use super::flow::remote;
use super::masquerade::Cni;
use super::pods::Pod;
use super::soon::bridge;

/// The gateway of the first policy, and that.
const GATEWAY: &str = POLICIES[0].1;
const POLICY: &str = POLICIES[0].0;
/// How often policies come, each time with nothing of them in any kernel before.
const ROUNDS: usize = 5;

/// Whom the node has for the policy's gateway, and whether that one is ready.
fn gateway(cluster: &Cluster) -> (Option<String>, bool) {
    let state = cluster.lab.speaker_state(NODE).unwrap_or_default();
    let gateway = &state["egress"]["gateways"][POLICY];
    let node = gateway["node"].as_str().map(str::to_owned);
    (node, gateway["settled"] == json!(true))
}

/// Waits until a speaker's metrics say so.
fn shows(cluster: &Cluster, node: &str, metric: &str) {
    cluster.until(metric, || {
        let metrics = cluster.lab.speaker_metrics(node).unwrap_or_default();
        metrics.lines().any(|line| line == metric)
    });
}

/// Whatever has arrived outside came from these.
fn assert_arrived(cluster: &Cluster, from: &[IpAddr]) {
    let arrived = cluster.wire.arrived();
    let others: BTreeSet<_> = arrived.iter().filter(|it| !from.contains(it)).collect();
    assert!(
        others.is_empty(),
        "{others:?} have arrived\n{}",
        cluster.state()
    );
}

#[test]
fn nobody_is_led_to_a_gateway_before_it_is_one() {
    let cluster = Cluster::build(&bridge(), [20, 30]);
    // What is led to it all the same leaves by its own address.
    Cni::Nftables.masquerade(cluster.lab.host(GATEWAY).unwrap());
    cluster.write_policies();
    cluster.tell("mta", POLICY, &[]);
    for node in cluster.lab.nodes() {
        cluster.speak_as(&node.name, node.name != GATEWAY);
    }
    let elected = Some(GATEWAY.to_owned());
    cluster.until("the gateway is known", || gateway(&cluster).0 == elected);
    cluster.until("the plugin is chained", || cluster.is_chained());
    let mut pod = Pod::new(&cluster, "mta".into(), POLICY);
    pod.add();
    for _ in 0..3 {
        let seen = pod.connect(Duration::from_millis(500));
        assert_eq!(seen.iter().flatten().count(), 0, "{seen:?}");
    }
    assert_eq!(gateway(&cluster), (elected.clone(), false));
    shows(&cluster, NODE, "landfall_egress_policies_waiting 1");
    assert!(cluster.wire.outbound().is_empty(), "{}", cluster.state());
    assert_arrived(&cluster, &[]);

    cluster.speak_as(GATEWAY, true);
    let by = cluster.leaves_by(POLICY);
    let serves = |pod: &Pod<'_>| {
        let seen = pod.connect(PATIENCE).into_iter();
        let seen: Vec<_> = seen.map(|seen| seen.unwrap().by).collect();
        assert_eq!(seen, by);
    };
    serves(&pod);
    assert_arrived(&cluster, &by);
    shows(&cluster, GATEWAY, "landfall_egress_policies_settled 2");
    shows(&cluster, NODE, "landfall_egress_policies_waiting 0");

    // Killed, it is one still: its kernel goes on, and the next speaker goes by that.
    cluster.lab.stop(GATEWAY, SPEAKER);
    serves(&pod);
    cluster.speak_as(GATEWAY, true);
    for _ in 0..20 {
        serves(&pod);
        thread::sleep(Duration::from_millis(100));
    }

    // Begun without egress policies, it is none any more.
    cluster.speak_as(GATEWAY, false);
    cluster.until("its word is taken back", || !gateway(&cluster).1);
    cluster.until("nothing is led there", || {
        let seen = pod.connect(Duration::from_millis(300));
        seen.iter().flatten().count() == 0
    });
    assert_arrived(&cluster, &by);
}

/// Takes out of a node's kernel what flows that have ended have left of its gateway.
fn begin_anew(cluster: &Cluster, node: &str) {
    let socket = cluster.lab.control_socket(node);
    let ask = |path| {
        let asked = cluster.node().block_on(post::<Armed>(&socket, path));
        asked.unwrap();
    };
    ask(path::DISARM);
    let pins = cluster.lab.mount_pins().unwrap().join(node);
    cluster.until("the gateway is out of the kernel", || {
        let layouts = fs::read_dir(&pins).unwrap().flatten();
        let maps = layouts.flat_map(|layout| fs::read_dir(layout.path()).unwrap().flatten());
        let mut names = maps.map(|map| map.file_name().into_string().unwrap());
        !names.any(|name| name.starts_with("GATE_"))
    });
    ask(path::ARM);
}

/// Sends what begins flows, without an end.
fn send(pod: &Netns, addresses: &[IpAddr], stop: &AtomicBool, sent: &AtomicU64) {
    pod.run(|| {
        while !stop.load(Ordering::Relaxed) {
            for (from, to) in addresses.iter().zip(remote()) {
                let socket = UdpSocket::bind((*from, 0)).unwrap();
                // What the node refuses is not sent.
                let _ = socket.send_to(WHO_AM_I.as_bytes(), (to, UDP_PORT));
                sent.fetch_add(1, Ordering::Relaxed);
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn new_policies_in_a_row_lead_nobody_astray() {
    let cluster = Cluster::armed(&bridge(), [20, 30]);
    Cni::Nftables.masquerade(cluster.lab.host(GATEWAY).unwrap());
    cluster.tell("mta", POLICY, &[]);
    let mut pod = Pod::new(&cluster, "mta".into(), POLICY);
    pod.add();
    cluster.tell("mta", POLICY, &pod.addresses);
    let allowed = [cluster.leaves_by(POLICY), cluster.leaves_by(PLAIN)].concat();
    for round in 0..ROUNDS {
        cluster.remove_policies();
        for node in cluster.lab.nodes() {
            cluster.until("nothing of policies is left", || {
                cluster.dropped_at(&node.name).is_none()
            });
        }
        begin_anew(&cluster, GATEWAY);
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            scope.spawn(|| send(&pod.netns, &pod.addresses, &stop, &sent));
            cluster.write_policies();
            cluster.until("the policy is in effect", || {
                let seen = pod.connect(Duration::from_millis(300)).into_iter();
                let by: Vec<IpAddr> = seen.flatten().map(|seen| seen.by).collect();
                by == cluster.leaves_by(POLICY)
            });
            stop.store(true, Ordering::Relaxed);
        });
        assert_arrived(&cluster, &allowed);
        let astray = cluster.dropped_at(GATEWAY);
        println!(
            "round {round}: {} datagrams sent, {astray:?} astray",
            sent.load(Ordering::Relaxed)
        );
        assert_eq!(astray, Some(0), "{}", cluster.state());
    }
}
