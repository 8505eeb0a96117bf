//! The probes measure what really happened: a responder that is cut off for a known time.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::manifests::{ECHO, LINES, Manifests, Policy};
use landfall_lab::measure::census::Flows;
use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::measure::stream::Fate;
use landfall_lab::measure::{connects, datagrams, stream};
use landfall_lab::server::{TCP_PORT, UDP_PORT};
use landfall_lab::stand_in::StandIn;
use landfall_lab::{Fault, Lab, Network, Topology, address, ping};

fn mk_lab() -> Lab {
    let lab = Lab::build(Topology {
        nodes: 2,
        ..Topology::default()
    })
    .unwrap();
    lab.serve_pods().unwrap();
    // The pods' network, as seen from the segment.
    for (prefix, via) in [("10.244.1.0/24", 0), ("fd00:244:1::/64", 1)] {
        let via = Network::Lan.both(11)[via];
        lab.client()
            .ip(&format!("route add {prefix} via {via}"))
            .unwrap();
    }
    lab
}

#[test]
fn a_known_outage_is_measured() {
    let lab = mk_lab();
    for pod in lab.node("node1").unwrap().pods[0].addresses {
        let echo = datagrams::Probe::start(lab.client(), SocketAddr::new(pod, UDP_PORT)).unwrap();
        let lines = SocketAddr::new(pod, TCP_PORT);
        let flow = stream::Probe::start(lab.client(), lines);
        let connecting = connects::Probe::start(lab.client(), lines);
        let flows = Flows::open(lab.client(), lines, 5);
        thread::sleep(Duration::from_millis(500));
        let cut = Instant::now();
        lab.lose("node1", "client", 100).unwrap();
        let surely_cut = Instant::now();
        thread::sleep(Duration::from_millis(300));
        let surely_until = Instant::now();
        lab.heal_network().unwrap();
        let healed = cut.elapsed();
        thread::sleep(Duration::from_millis(1500));
        assert!(echo.answered_since() > Duration::from_millis(200));
        let datagrams = echo.stop();
        let gap = datagrams.longest_gap().unwrap();
        // A busy machine stretches everything but what was surely cut.
        assert!(gap >= surely_until - surely_cut, "{gap:?}");
        assert!(
            gap < healed + Duration::from_secs(1),
            "{gap:?}, cut for {healed:?}"
        );
        assert!(datagrams.lost() > 50, "{}", datagrams.lost());
        let report = flow.stop().unwrap();
        assert_eq!(report.fate, Fate::Alive);
        assert!(
            report.longest_stall >= Duration::from_millis(200),
            "{report:?}"
        );
        assert!(connecting.stop().worst().unwrap() >= Duration::from_millis(200));
        let census = flows.count();
        assert_eq!((census.alive, census.reset, census.stalled), (5, 0, 0));
    }
}

#[test]
fn a_dead_server_resets_and_a_dead_node_stalls() {
    let lab = mk_lab();
    let pod = &lab.node("node1").unwrap().pods[0];
    let lines = SocketAddr::new(pod.addresses[0], TCP_PORT);
    let flows = Flows::open(lab.client(), lines, 3);
    let flow = stream::Probe::start(lab.client(), lines);
    thread::sleep(Duration::from_millis(500));
    lab.inject("node1", Fault::PowerOff).unwrap();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(flows.count().stalled, 3);
    assert_eq!(flow.stop().unwrap().fate, Fate::Stalled);

    lab.heal().unwrap();
    ping(lab.client(), pod.addresses[0], Duration::from_secs(5)).unwrap();
    let flow = stream::Probe::start(lab.client(), lines);
    thread::sleep(Duration::from_millis(500));
    lab.stop_pod("node1-pod0");
    thread::sleep(Duration::from_millis(500));
    assert_eq!(flow.stop().unwrap().fate, Fate::Reset);
}

#[test]
fn answers_in_arp_and_nd_are_laid_to_their_node() {
    let lab = mk_lab();
    for address in Network::Lan.both(12) {
        let answers = who_answers(&lab, address, Duration::from_millis(500)).unwrap();
        assert_eq!(answers.keys().collect::<Vec<_>>(), ["node2"], "{address}");
    }
    for address in Network::Lan.both(77) {
        let answers = who_answers(&lab, address, Duration::from_millis(300)).unwrap();
        assert!(answers.is_empty(), "{address}: {answers:?}");
    }
}

/// Puts a VIP on a node as a route of the client's would: no speaker, only delivery.
fn route_vips(lab: &Lab, node: u8) {
    for (vip, via) in address::vips(0)
        .into_iter()
        .zip(Network::Lan.both(10 + node))
    {
        lab.client()
            .ip(&format!("route replace {vip} via {via}"))
            .unwrap();
    }
}

#[test]
fn the_stand_in_delivers_like_kube_proxy() {
    let lab = mk_lab();
    let manifests = Manifests::new(lab.manifests_dir());
    let vips = address::vips(0);
    manifests.write_nodes(&lab).unwrap();
    manifests.write_pool().unwrap();
    manifests
        .write_service("echo", vips, Policy::Local)
        .unwrap();
    manifests.write_endpoints("echo", lab.pods()).unwrap();
    let _stand_in = StandIn::start(&lab).unwrap();
    let answered_by = |vip: IpAddr| {
        let probe = datagrams::Probe::start(lab.client(), SocketAddr::new(vip, ECHO)).unwrap();
        thread::sleep(Duration::from_millis(300));
        let pods: Vec<String> = probe
            .stop()
            .answered_by()
            .keys()
            .map(ToString::to_string)
            .collect();
        pods
    };
    for node in [1, 2] {
        route_vips(&lab, node);
        for vip in vips {
            assert_eq!(answered_by(vip), [format!("node{node}-pod0")]);
        }
    }
    // Without a pod of its own a node serves nobody under Local, and everybody under Cluster.
    manifests
        .write_endpoints("echo", &lab.node("node1").unwrap().pods)
        .unwrap();
    thread::sleep(Duration::from_secs(1));
    assert!(answered_by(vips[0]).is_empty());
    manifests
        .write_service("echo", vips, Policy::Cluster)
        .unwrap();
    thread::sleep(Duration::from_secs(1));
    for vip in vips {
        assert_eq!(answered_by(vip), ["node1-pod0"]);
        let flows = Flows::open(lab.client(), SocketAddr::new(vip, LINES), 2);
        assert_eq!(flows.count().alive, 2);
    }
    for (family, vip) in [("ip", vips[0]), ("ip6", vips[1])] {
        let map = lab.nodes()[1]
            .netns
            .exec(&format!("nft list map {family} kube-proxy service-ips"))
            .unwrap();
        assert!(map.contains(&format!("{vip} . tcp . 80")), "{map}");
    }
}
