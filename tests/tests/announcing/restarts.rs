//! Processes are killed and started again while clients send.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use landfall_lab::fault::SPEAKER;
use landfall_lab::measure::datagrams::Probe;
use landfall_lab::server::UDP_PORT;
use landfall_tests::CONTROL_HOST;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::scene::Scene;

const CONTROLLER: &str = "controller";
/// How long a process stays away: longer than its absence takes to be noticed.
const AWAY: Duration = Duration::from_secs(3);
/// How long a returning speaker could take things back.
const BACK: Duration = Duration::from_secs(3);

/// Each speaker in turn, and the controller: nothing moves but what its leader's death moves.
pub(crate) fn one_after_the_other(scene: &Scene<'_>) {
    let vips = scene.create("restarted", json!({}), json!({}));
    let nodes = scene.lab().nodes();
    let mut processes: Vec<_> = nodes
        .iter()
        .map(|node| (node.name.as_str(), SPEAKER))
        .collect();
    processes.push((CONTROL_HOST, CONTROLLER));
    for process in processes {
        strike(scene, "restarted", &vips, &[process]);
    }
}

/// All of them at the same moment.
pub(crate) fn all_at_once(scene: &Scene<'_>) {
    let vips = scene.create("restarted-all", json!({}), json!({}));
    let nodes = scene.lab().nodes();
    let mut processes: Vec<_> = nodes
        .iter()
        .map(|node| (node.name.as_str(), SPEAKER))
        .collect();
    processes.push((CONTROL_HOST, CONTROLLER));
    strike(scene, "restarted-all", &vips, &processes);
}

fn strike(scene: &Scene<'_>, name: &str, vips: &[IpAddr], processes: &[(&str, &str)]) {
    let lab = scene.lab();
    scene.served(vips);
    let before = scene.leader(vips[0]);
    let assigned = scene.assigned(name);
    let probes: Vec<Probe> = vips
        .iter()
        .map(|vip| Probe::start(lab.client(), SocketAddr::new(*vip, UDP_PORT)).unwrap())
        .collect();
    thread::sleep(Duration::from_secs(1));
    for (host, process) in processes {
        lab.signal(host, process, Signal::SIGKILL).unwrap();
    }
    thread::sleep(AWAY);
    let all = processes.len() > 1;
    // While all are away nobody answers, but neighbour tables still lead to the last leader.
    let meanwhile = (!all).then(|| scene.leader(vips[0]));
    for (host, process) in processes {
        lab.restart(host, process).unwrap();
    }
    scene.all_take_part();
    thread::sleep(BACK);
    scene.served(vips);
    let after = scene.leader(vips[0]);
    let names: Vec<_> = processes.iter().map(|(host, _)| *host).collect();
    for (vip, probe) in vips.iter().zip(probes) {
        let report = probe.stop();
        println!(
            "      {names:?} killed: {vip} {before} -> {after}, outage {:?}, lost {}/{}",
            report.longest_gap(),
            report.lost(),
            report.sent.len()
        );
    }
    assert_eq!(scene.assigned(name), assigned, "the assignment stays");
    if let Some(meanwhile) = meanwhile {
        assert_eq!(after, meanwhile, "who returns takes nothing back");
        if !names.contains(&before.as_str()) {
            assert_eq!(after, before, "another's restart moves nothing");
        }
    }
    scene.led_by(vips, &after);
}
