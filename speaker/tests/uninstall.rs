//! `landfall-speaker uninstall` against what real speakers leave behind.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use landfall_ebpf_common::tcx;
use landfall_lab::fault::SPEAKER;
use landfall_lab::manifests::{Manifests, Policy};
use landfall_lab::{Lab, Netns, Network, Topology};

const PATIENCE: Duration = Duration::from_secs(30);

/// The table of the first uplink's policy route.
const TABLE: u32 = 7950;

/// A node with a speaker that serves one Service by both families. Its default routes are by another interface than
/// the VIPs', so that there are policy routes too.
fn mk_lab() -> Lab {
    let lab = Lab::build(Topology {
        nodes: 1,
        ..Topology::default()
    })
    .unwrap();
    let netns = &lab.node("node1").unwrap().netns;
    for (flag, family) in [("-4", 0), ("-6", 1)] {
        netns.ip(&format!("{flag} route del default")).unwrap();
        for (network, nic, metric) in [
            (Network::Management, "mgmt0", 100),
            (Network::Lan, "eth0", 200),
        ] {
            let router = network.both(1)[family];
            netns
                .ip(&format!(
                    "{flag} route add default via {router} dev {nic} metric {metric}"
                ))
                .unwrap();
        }
    }
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

/// How many programs are by TCX at the VIPs' uplink and at the interface of the default route: at each one for what
/// comes in, one for what leaves.
fn attached(netns: &Netns) -> usize {
    netns.run(|| {
        let at = |nic| {
            let index = nix::net::if_::if_nametoindex(nic).unwrap();
            let at = |hook| tcx::programs(index, hook).unwrap().len();
            at(tcx::Hook::Ingress) + at(tcx::Hook::Egress)
        };
        at("eth0") + at("mgmt0")
    })
}

fn has_table(netns: &Netns) -> bool {
    netns.exec("nft list tables").unwrap().contains("landfall")
}

/// The rules by mark of a family, and the routes that they lead to.
fn policy_routes(netns: &Netns, family: &str) -> (Vec<String>, String) {
    let rules = netns.ip(&format!("{family} rule")).unwrap();
    let rules = rules.lines().filter(|line| line.contains("fwmark"));
    // A table without a route is none, which is an error.
    let routes = netns.ip(&format!("{family} route show table {TABLE}"));
    (
        rules.map(str::to_owned).collect(),
        routes.unwrap_or_default(),
    )
}

#[test]
fn nothing_is_left_on_the_node() {
    let lab = mk_lab();
    let netns = &lab.node("node1").unwrap().netns;
    let pins = lab.mount_pins().unwrap().join("node1");
    until("the data path is attached", || attached(netns) == 4);
    until("the table is written", || has_table(netns));
    let are_there = |family| {
        let (rules, routes) = policy_routes(netns, family);
        rules.len() == 2 && routes.contains("dev eth0")
    };
    for family in ["-4", "-6"] {
        until("the policy routes are made", || are_there(family));
    }
    lab.stop("node1", SPEAKER);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(attached(netns), 4, "a killed speaker's programs go on");
    assert!(has_table(netns), "a killed speaker's table stays");
    for family in ["-4", "-6"] {
        assert!(are_there(family), "a killed speaker's policy routes stay");
    }
    // As a speaker makes it where a node is off the segment.
    netns
        .ip("link add landfall0 type vxlan external dstport 7952")
        .unwrap();

    let output = uninstall(netns, &pins);
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        text(&output).contains("eBPF links: 4 removed"),
        "{}",
        text(&output)
    );
    assert!(
        text(&output).contains("eBPF maps: 29 removed"),
        "{}",
        text(&output)
    );
    assert_eq!(attached(netns), 0);
    assert!(!has_table(netns));
    assert!(!netns.ip("link").unwrap().contains("landfall0"));
    assert!(!pins.exists(), "{} is gone", pins.display());
    for family in ["-4", "-6"] {
        let left = policy_routes(netns, family);
        assert_eq!(left, (Vec::new(), String::new()), "{family}");
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
    netns
        .nft("add table inet landfall\nadd table bridge landfall\n")
        .unwrap();
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
