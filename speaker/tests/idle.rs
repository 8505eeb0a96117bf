//! What a speaker costs that has a thousand addresses and nothing to do.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use landfall_lab::fault::SPEAKER;
use landfall_lab::manifests::Manifests;
use landfall_lab::{Lab, Topology};

const SERVICES: usize = 1000;
const WATCHED: Duration = Duration::from_secs(20);

/// CPU seconds and resident MiB of a process.
fn usage(pid: i32) -> (f64, f64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    let pages: f64 = fields[21].parse().unwrap();
    (ticks / 100.0, pages * 4096.0 / f64::from(1 << 20))
}

#[test]
#[ignore = "a measurement: cargo test --release -p landfall-speaker --test idle -- --ignored --nocapture"]
fn a_thousand_addresses() {
    let lab = Lab::build(Topology::default()).unwrap();
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_nodes(&lab).unwrap();
    let mut text = String::from(
        "apiVersion: landfall.dev/v1alpha1\nkind: IPAddressPool\nmetadata: {name: many}\n\
         spec: {addresses: [10.88.100.0/22]}\n",
    );
    for n in 0..SERVICES {
        writeln!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: default}}\n\
             spec: {{type: LoadBalancer, ports: [{{port: 80, protocol: TCP}}]}}"
        )
        .unwrap();
    }
    for node in lab.nodes() {
        node.netns.ip("addr add 10.88.101.250/16 dev eth0").unwrap();
    }
    std::fs::write(manifests.directory().join("many.yaml"), text).unwrap();
    lab.start_speakers().unwrap();
    let start = Instant::now();
    loop {
        let state = lab.speaker_state("node1").unwrap_or_default();
        let led = state["groups"].as_array().map_or(0, |groups| {
            groups
                .iter()
                .filter(|group| group["leader"].is_string())
                .count()
        });
        if led == SERVICES {
            break;
        }
        assert!(start.elapsed() < Duration::from_mins(2), "{led} led");
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("all led after {:?}", start.elapsed());
    std::thread::sleep(Duration::from_secs(20));
    let pids: Vec<i32> = lab
        .nodes()
        .iter()
        .map(|node| lab.pid(&node.name, SPEAKER).unwrap())
        .collect();
    let before: Vec<_> = pids.iter().map(|pid| usage(*pid)).collect();
    std::thread::sleep(WATCHED);
    for (pid, (cpu, _)) in pids.iter().zip(before) {
        let (now, resident) = usage(*pid);
        println!(
            "{:.2} CPU s in {WATCHED:?}, {resident:.1} MiB resident",
            now - cpu
        );
    }
}
