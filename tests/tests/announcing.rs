//! Who announces an address, where, and what the objects say about it, on a real control plane; one scenario after
//! the other on one cluster whose nodes have two NICs. `LANDFALL_SCENARIO` selects.
//!
//! The default route of all nodes is by `eth1`, most VIPs are on `eth0`: routed clients are answered by the node
//! rules' policy routes.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

#[path = "announcing/conflict.rs"]
mod conflict;
#[path = "announcing/delivery.rs"]
mod delivery;
#[path = "announcing/endpoints.rs"]
mod endpoints;
#[path = "announcing/interfaces.rs"]
mod interfaces;
#[path = "announcing/native.rs"]
mod native;
#[path = "announcing/nodes.rs"]
mod nodes;
#[path = "announcing/restarts.rs"]
mod restarts;
#[path = "announcing/scene.rs"]
mod scene;
#[path = "announcing/steering.rs"]
mod steering;
#[path = "announcing/table.rs"]
mod table;
#[path = "announcing/wire.rs"]
mod wire;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use landfall_lab::{Nic, Topology};
use landfall_tests::Cluster;
use scene::Scene;

/// A scenario by name.
type Scenario = (&'static str, fn(&Scene<'_>));

macro_rules! scenarios {
    ($($path:path),* $(,)?) => {
        [$((stringify!($path), $path)),*]
    };
}

#[test]
fn announcing() {
    let scenarios: &[Scenario] = &scenarios![
        nodes::selectors,
        nodes::preferences,
        nodes::excluded,
        nodes::nobody_eligible,
        nodes::local_endpoints,
        steering::local_endpoints,
        steering::hindered_node,
        steering::unwanted,
        steering::unknown_ports,
        steering::no_endpoints,
        endpoints::removed_and_added,
        endpoints::added_under_load,
        delivery::cluster_policy,
        delivery::iptables,
        wire::many_bytes,
        wire::shuffled_fragments,
        wire::smaller_mtu,
        wire::behind_one_nat,
        wire::behind_nodes,
        wire::forward_drop,
        native::delivers,
        native::without_steering,
        native::no_endpoints,
        interfaces::by_name,
        interfaces::second_nic,
        interfaces::no_subnet,
        conflict::before_the_first_announcement,
        conflict::later,
        restarts::one_after_the_other,
        restarts::all_at_once,
    ];
    let only = std::env::var("LANDFALL_SCENARIO").unwrap_or_default();
    let topology = Topology {
        second_nic: true,
        default_route: Nic::Eth1,
        ..Topology::default()
    };
    Cluster::run(topology, |cluster| {
        let scene = Scene::start(cluster)?;
        let mut failed = Vec::new();
        for (name, scenario) in scenarios {
            if !name.contains(&only) {
                continue;
            }
            let begun = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| scenario(&scene)));
            let word = if outcome.is_ok() { "ok    " } else { "FAILED" };
            println!("{word} {name} ({:.1} s)", begun.elapsed().as_secs_f64());
            if outcome.is_err() {
                failed.push(*name);
            }
            scene.clear();
        }
        anyhow::ensure!(failed.is_empty(), "failed: {failed:?}");
        Ok(())
    });
}
