//! Nodes without kube-proxy: the programs deliver, by either traffic policy alike.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::json;

use crate::delivery::{back_in_nftables_mode, outlive_the_leader};
use crate::scene::{Scene, eventually};
use crate::steering::pods;

/// All nodes' speakers deliver natively and there is no kube-proxy, for a while.
struct Native<'a>(&'a Scene<'a>);

impl<'a> Native<'a> {
    fn set(scene: &'a Scene<'a>) -> Self {
        let set = Self(scene);
        for node in scene.lab().nodes() {
            scene.lab().stop(&node.name, "kube-proxy");
            for family in ["ip", "ip6"] {
                let table = format!("table {family} kube-proxy");
                let gone = format!("add {table}\ndelete {table}\n");
                node.netns.nft(&gone).unwrap();
            }
        }
        set.start(&["--delivery", "native"]);
        scene.all_take_part();
        set
    }

    fn start(&self, args: &[&str]) {
        for node in self.0.lab().nodes() {
            self.0.cluster.start_speaker(&node.name, args).unwrap();
        }
    }
}

impl Drop for Native<'_> {
    fn drop(&mut self) {
        self.start(&[]);
        back_in_nftables_mode(self.0);
        if !std::thread::panicking() {
            self.0.all_take_part();
        }
    }
}

/// The nodes of the pods that serve both clients, each of which every pod sees as what it is.
fn nodes(scene: &Scene<'_>, vip: IpAddr) -> [BTreeSet<String>; 2] {
    [scene.lab().client(), scene.lab().remote()].map(|from| {
        let of = |pod: String| pod.split_once("-pod").unwrap().0.to_owned();
        pods(from, vip).into_keys().map(of).collect()
    })
}

/// All nodes' pods serve and see the client, and flows that are not of the leader's pods outlive it.
pub(crate) fn delivers(scene: &Scene<'_>) {
    let _native = Native::set(scene);
    for policy in ["Local", "Cluster"] {
        let name = format!("native-{}", policy.to_lowercase());
        let vips = scene.create(&name, json!({"externalTrafficPolicy": policy}), json!({}));
        scene.served(&vips);
        for vip in vips {
            eventually(
                "all three nodes to serve",
                || nodes(scene, vip),
                |seen| seen.iter().all(|nodes| nodes.len() == 3),
            );
            outlive_the_leader(scene, vip, |flow, leader| flow.node() != leader);
            scene.served(&[vip]);
        }
    }
}

/// Nobody serves, and clients are told at once.
pub(crate) fn no_endpoints(scene: &Scene<'_>) {
    let _native = Native::set(scene);
    crate::steering::no_endpoints(scene);
}

/// Announced only: the leader is a node with endpoints, and serves by its own pods alone.
pub(crate) fn without_steering(scene: &Scene<'_>) {
    let _native = Native::set(scene);
    scene.advertise(&json!({"steering": "Off"}));
    for policy in ["Local", "Cluster"] {
        let name = format!("alone-{}", policy.to_lowercase());
        let vips = scene.create(&name, json!({"externalTrafficPolicy": policy}), json!({}));
        scene.served(&vips);
        for vip in vips {
            let alone = |leader: &str| {
                eventually(
                    "the leader's pods alone to serve",
                    || nodes(scene, vip),
                    |seen| seen.iter().all(|nodes| nodes.iter().eq([leader])),
                );
            };
            let first = scene.leader(vip);
            alone(&first);
            scene.report_pods(&first, false);
            let second = eventually(
                "a leader with endpoints",
                || scene.leader(vip),
                |leader| *leader != first,
            );
            println!("      {vip} ({policy}): {first} -> {second}");
            alone(&second);
            scene.report_pods(&first, true);
        }
    }
}
