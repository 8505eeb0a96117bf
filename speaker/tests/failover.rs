//! Real speakers in network namespaces: who leads, and what moves it.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use landfall_lab::fault::{Fault, SPEAKER};
use landfall_lab::manifests::{Manifests, Policy};
use landfall_lab::speakers::ADMIN;
use landfall_lab::{Lab, Program, Topology};
use serde_json::Value;

/// What a busy machine can promise.
const PATIENCE: Duration = Duration::from_secs(30);
const SERVICES: u8 = 6;

fn vips(n: u8) -> [IpAddr; 2] {
    [
        format!("10.88.0.{}", 200 + n).parse().unwrap(),
        format!("fd00:88::{}", 200 + n).parse().unwrap(),
    ]
}

/// Three nodes with a management network, six dual-stack Services with a pod on each node, speakers running.
fn mk_cluster() -> (Lab, Manifests) {
    let lab = Lab::build(Topology::default()).unwrap();
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_nodes(&lab).unwrap();
    manifests.write_pool().unwrap();
    for n in 0..SERVICES {
        let name = format!("web{n}");
        manifests
            .write_service(&name, vips(n), Policy::Cluster)
            .unwrap();
        manifests.write_endpoints(&name, lab.pods()).unwrap();
    }
    lab.start_speakers().unwrap();
    (lab, manifests)
}

type Map = BTreeMap<String, String>;

/// Group to leader, as one speaker sees it; a group without leader is absent.
fn seen_by(lab: &Lab, node: &str) -> Option<Map> {
    let state = lab.speaker_state(node).ok()?;
    let groups = state["groups"].as_array()?;
    Some(
        groups
            .iter()
            .filter_map(|group| {
                Some((
                    group["group"].as_str()?.to_owned(),
                    group["leader"].as_str()?.to_owned(),
                ))
            })
            .collect(),
    )
}

/// Waits until these speakers agree on a leader for every group, all of which pass `wanted`.
fn agree(lab: &Lab, nodes: &[&str], what: &str, wanted: impl Fn(&Map) -> bool) -> Map {
    let start = Instant::now();
    loop {
        let views: Vec<Option<Map>> = nodes.iter().map(|node| seen_by(lab, node)).collect();
        if let Some(Some(first)) = views.first()
            && first.len() == usize::from(SERVICES)
            && views.iter().all(|view| view.as_ref() == Some(first))
            && wanted(first)
        {
            println!("{what}: agreed after {:?}", start.elapsed());
            return first.clone();
        }
        if start.elapsed() > PATIENCE {
            for node in nodes {
                let state = lab.speaker_state(node).unwrap_or(Value::Null);
                println!("{node}: {state:#}");
                println!("{}", lab.log(node, SPEAKER).unwrap_or_default());
            }
            panic!("{what}: no agreement within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn stays(lab: &Lab, nodes: &[&str], map: &Map, how_long: Duration, what: &str) {
    let end = Instant::now() + how_long;
    while Instant::now() < end {
        for node in nodes {
            assert_eq!(
                seen_by(lab, node).as_ref(),
                Some(map),
                "{what}: {node} sees a change"
            );
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Whether a speaker's gossip has all others as members.
fn gossips(lab: &Lab, node: &str) -> bool {
    lab.speaker_state(node).is_ok_and(|state| {
        let peers = state["peers"].as_array();
        peers.is_some_and(|peers| peers.iter().all(|peer| peer["gossip"] == true))
    })
}

const ALL: [&str; 3] = ["node1", "node2", "node3"];

fn others(node: &str) -> Vec<&'static str> {
    ALL.into_iter().filter(|other| *other != node).collect()
}

#[test]
fn kill_return_drain_and_management_down() {
    let (lab, _manifests) = mk_cluster();
    let first = agree(&lab, &ALL, "start", |_| true);

    // SIGKILL of a leader: its groups move, no others, and its return takes nothing.
    let victim = first["10.88.0.200"].clone();
    lab.inject(&victim, Fault::Kill).unwrap();
    let rest = others(&victim);
    let moved = agree(&lab, &rest, "kill", |map| {
        map.values().all(|l| *l != victim)
    });
    for (group, leader) in first.iter().filter(|(_, leader)| **leader != victim) {
        assert_eq!(moved[group], *leader, "{group} moved for nothing");
    }
    lab.restart(&victim, SPEAKER).unwrap();
    let back = agree(&lab, &ALL, "return", |_| true);
    assert_eq!(back, moved, "a returning node takes nothing");

    // The management network goes down: the LAN is alive, nothing moves.
    lab.management_network_down().unwrap();
    stays(&lab, &ALL, &back, Duration::from_secs(5), "management down");
    lab.heal().unwrap();
    agree(&lab, &ALL, "management back", |map| *map == back);

    // SIGTERM, once the gossip has found together: hands over before it is silent, and leaves.
    let leaving = back["10.88.0.201"].clone();
    let start = Instant::now();
    while !gossips(&lab, &leaving) {
        assert!(
            start.elapsed() < PATIENCE,
            "the gossip does not find together"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("gossip back after {:?}", start.elapsed());
    lab.inject(&leaving, Fault::Drain).unwrap();
    let rest = others(&leaving);
    agree(&lab, &rest, "drain", |map| {
        map.values().all(|l| *l != leaving)
    });
    let log = lab.log(&leaving, SPEAKER).unwrap();
    assert!(log.contains("falling silent"), "{log}");
}

#[test]
fn partition_heals_and_another_vlan_moves() {
    let (lab, _manifests) = mk_cluster();
    let first = agree(&lab, &ALL, "start", |_| true);
    lab.partition(&["node1", "node2"], &["node3"], false)
        .unwrap();
    agree(&lab, &["node1", "node2"], "majority side", |map| {
        map.values().all(|leader| leader != "node3")
    });
    lab.heal().unwrap();
    let healed = agree(&lab, &ALL, "heal", |_| true);
    stays(
        &lab,
        &ALL,
        &healed,
        Duration::from_secs(3),
        "after the heal",
    );
    drop(first);

    let lost = healed["10.88.0.200"].clone();
    lab.inject(&lost, Fault::OtherVlan).unwrap();
    agree(&lab, &ALL, "another VLAN", |map| {
        map.values().all(|l| *l != lost)
    });
    lab.heal().unwrap();

    let off = healed
        .values()
        .find(|leader| **leader != lost)
        .cloned()
        .unwrap_or_else(|| others(&lost)[0].to_owned());
    lab.inject(&off, Fault::PowerOff).unwrap();
    agree(&lab, &others(&off), "power-off", |map| {
        map.values().all(|leader| *leader != off)
    });
}

#[test]
fn keys_rotate_without_a_change_and_strangers_stay_outside() {
    let (lab, _manifests) = mk_cluster();
    let first = agree(&lab, &ALL, "start", |_| true);
    let file = lab.gossip_key().unwrap();
    let old = std::fs::read_to_string(&file).unwrap();
    let new = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n";
    for text in [format!("{old}{new}"), format!("{new}{old}"), new.to_owned()] {
        std::fs::write(&file, text).unwrap();
        stays(&lab, &ALL, &first, Duration::from_secs(5), "rotation");
    }
    let metrics = lab.speaker_metrics("node1").unwrap();
    assert!(metrics.contains("landfall_gossip_key{"), "{metrics}");
    assert!(!metrics.contains("MDEyMzQ1"), "a key in the metrics");

    // A speaker with another key is nobody: not to the gossip, not on the LAN.
    lab.stop("node3", SPEAKER);
    agree(&lab, &["node1", "node2"], "kill", |map| {
        map.values().all(|leader| leader != "node3")
    });
    let stranger = lab.directory().join("stranger.key");
    std::fs::write(&stranger, "//////////////////////////////////////////8=\n").unwrap();
    let program = Program::landfall("landfall-speaker")
        .unwrap()
        .option("--node-name", "node3")
        .option("--admin-address", ADMIN)
        .option("--manifests", lab.manifests_dir().display())
        .option("--bpf-pin-dir", lab.bpf_directory().join("node3").display())
        .option("--gossip-key-file", stranger.display());
    lab.start("node3", "stranger", &program).unwrap();
    let start = Instant::now();
    while seen_by(&lab, "node3").is_none() && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(200));
    }
    std::thread::sleep(Duration::from_secs(3));
    for node in ["node1", "node2"] {
        let state = lab.speaker_state(node).unwrap();
        let peers = state["peers"].as_array().unwrap();
        let node3 = peers.iter().find(|peer| peer["name"] == "node3");
        assert!(
            node3.is_none_or(|peer| peer["alive"] == false),
            "{node} takes the stranger for alive: {node3:?}"
        );
    }
    let metrics = lab.speaker_metrics("node1").unwrap();
    assert!(metrics.contains("other-key"), "{metrics}");
}

#[test]
fn without_a_key_nothing_starts() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_landfall-speaker"))
        .args(["--node-name", "x", "--manifests", "/tmp"])
        .env_remove("LANDFALL_GOSSIP_KEY")
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("must be encrypted"), "{said}");
}
