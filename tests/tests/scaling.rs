//! A Deployment's pods come, go and are replaced on eight nodes, with the real kube-proxy delivering to them: what
//! lives goes on. `LANDFALL_SCENARIO` selects.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

#[path = "scaling/deployment.rs"]
mod deployment;
#[path = "scaling/flows.rs"]
mod flows;
#[path = "scaling/rollout.rs"]
mod rollout;

use std::time::Instant;

use landfall_lab::Topology;
use landfall_tests::{Cluster, chart};

const POOL: &str = "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: lan}
spec:
  addresses: [10.88.0.200-10.88.0.249]
  quarantine: 1h
";

/// A scenario by name.
type Scenario = (&'static str, fn(&Cluster));

#[test]
fn scaling() {
    let scenarios: [Scenario; 3] = [
        ("rollout::of_four", rollout::of_four),
        ("rollout::of_one", rollout::of_one),
        // Last: a node stays dead.
        ("flows::outlive_everything", flows::outlive_everything),
    ];
    // A pod may be replaced by another of the same node while a third still ends.
    let topology = Topology {
        nodes: 8,
        pods_per_node: 3,
        ..Topology::default()
    };
    let only = std::env::var("LANDFALL_SCENARIO").unwrap_or_default();
    Cluster::run(topology, |cluster| {
        chart::apply(cluster.plane(), POOL)?;
        cluster.start_landfall()?;
        for (name, scenario) in scenarios {
            if name.contains(&only) {
                let begun = Instant::now();
                scenario(cluster);
                println!("ok     {name} ({:.1} s)", begun.elapsed().as_secs_f64());
            }
        }
        Ok(())
    });
}
