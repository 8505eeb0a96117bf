//! `landfall-speaker uninstall` against what real speakers leave behind.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use landfall_ebpf_common::tcx;
use landfall_lab::fault::SPEAKER;
use landfall_lab::manifests::{Manifests, Policy};
use landfall_lab::{Lab, Netns, Topology};

const PATIENCE: Duration = Duration::from_secs(30);

/// A node with a speaker that serves one Service by both families on its second interface, so that there is a
/// policy route too.
fn mk_lab() -> Lab {
    let lab = Lab::build(Topology {
        nodes: 1,
        ..Topology::default()
    })
    .unwrap();
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_nodes(&lab).unwrap();
    manifests.write_pool().unwrap();
    let vips = ["10.88.0.200", "fd00:88::200"].map(|vip| vip.parse().unwrap());
    manifests
        .write_service("web", vips, Policy::Cluster)
        .unwrap();
    manifests.write_endpoints("web", lab.pods()).unwrap();
    lab.start_speakers().unwrap();
    lab
}

fn uninstalling(netns: &Netns, pins: &Path) -> Command {
    let mut command = netns.command(env!("CARGO_BIN_EXE_landfall-speaker"));
    command.arg("uninstall").arg("--bpf-pin-dir").arg(pins);
    command
}

fn uninstall(netns: &Netns, pins: &Path) -> Output {
    uninstalling(netns, pins).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// How many programs are at the uplink by TCX: one for what comes in, one for what leaves.
fn attached(netns: &Netns) -> usize {
    netns.run(|| {
        let uplink = nix::net::if_::if_nametoindex("eth0").unwrap();
        let at = |hook| tcx::programs(uplink, hook).unwrap().len();
        at(tcx::Hook::Ingress) + at(tcx::Hook::Egress)
    })
}

fn has_table(netns: &Netns) -> bool {
    netns.exec("nft list tables").unwrap().contains("landfall")
}

#[test]
fn nothing_is_left_on_the_node() {
    let lab = mk_lab();
    let netns = &lab.node("node1").unwrap().netns;
    let pins = lab.mount_pins().unwrap().join("node1");
    until("the data path is attached", || attached(netns) == 2);
    until("the table is written", || has_table(netns));
    lab.stop("node1", SPEAKER);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(attached(netns), 2, "a killed speaker's program goes on");
    assert!(has_table(netns), "a killed speaker's table stays");
    // As a speaker makes it where a node is off the segment.
    netns
        .ip("link add landfall0 type vxlan external dstport 7952")
        .unwrap();

    let output = uninstall(netns, &pins);
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        text(&output).contains("eBPF links: 2 removed"),
        "{}",
        text(&output)
    );
    assert!(
        text(&output).contains("eBPF maps: 27 removed"),
        "{}",
        text(&output)
    );
    assert_eq!(attached(netns), 0);
    assert!(!has_table(netns));
    assert!(!netns.ip("link").unwrap().contains("landfall0"));
    assert!(!pins.exists(), "{} is gone", pins.display());
    for family in ["-4", "-6"] {
        let rules = netns.ip(&format!("{family} rule")).unwrap();
        assert!(!rules.contains("fwmark"), "{rules}");
    }

    let (_, to_nobody) = std::io::pipe().unwrap();
    let unread = uninstalling(netns, &pins)
        .stdout(to_nobody)
        .output()
        .unwrap();
    assert!(unread.status.success(), "{}", text(&unread));
    let again = uninstall(netns, &pins);
    assert!(again.status.success(), "{}", text(&again));
    assert!(
        text(&again).contains("eBPF links: 0 removed"),
        "{}",
        text(&again)
    );
}

#[test]
fn what_cannot_be_removed_is_told() {
    let netns = Netns::create("uninstall").unwrap();
    netns.nft("add table inet landfall\n").unwrap();
    let pins = std::env::temp_dir().join(format!("landfall-uninstall-{}", std::process::id()));
    // No map, but a directory with something in it.
    let stranger = pins.join("layout-1/stranger");
    std::fs::create_dir_all(stranger.join("thing")).unwrap();
    let output = uninstall(&netns, &pins);
    std::fs::remove_dir_all(&pins).unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("still there"), "{}", text(&output));
    assert!(!has_table(&netns), "the rest is removed");
}
