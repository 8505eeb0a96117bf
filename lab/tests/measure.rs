//! The probes measure what really happened: a responder that is cut off for a known time.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::measure::census::Flows;
use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::measure::stream::Fate;
use landfall_lab::measure::{connects, datagrams, stream};
use landfall_lab::server::{TCP_PORT, UDP_PORT};
use landfall_lab::{Fault, Lab, Network, Topology, ping};

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
        assert_eq!(census.on_living_nodes(), 5);
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
    let census = flows.count_apart(|dead| dead == pod.name);
    assert_eq!((census.stalled, census.on_dead_node), (3, 3));
    assert_eq!(census.on_living_nodes(), 0);
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
