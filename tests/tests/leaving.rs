//! Tenants' pods leave by their policies' own addresses: the real control plane, kube-proxy, controller and speakers,
//! and packets to a server on the segment and to one behind the router.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

#[path = "leaving/cli.rs"]
mod cli;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use landfall_lab::server::PodServer;
use landfall_lab::{Fault, Lab, Network, Pod, Topology};
use landfall_tests::tenants::{self, egress, outside};
use landfall_tests::{Cluster, until};

/// How long a try to connect may take.
const TRY: Duration = Duration::from_secs(3);

#[test]
fn tenants() {
    let topology = Topology {
        nodes: 3,
        pods_per_node: 2,
        ..Topology::default()
    };
    Cluster::run(topology, |cluster| {
        tenants::start(cluster)?;
        let lab = cluster.lab();
        let _near = PodServer::start(lab.client(), "near")?;
        let _far = PodServer::start(lab.remote(), "far")?;
        let pods: Vec<&Pod> = lab.pods().collect();
        follow(lab, &pods, By::Node, By::Policy);
        cli::says_what_is(cluster);
        cli::names_problems(cluster);
        cli::disarms(cluster);
        cli::names_what_is_dropped(cluster);
        let pods = the_gateway_loses_power(lab);
        follow(lab, &pods, By::Policy, By::Policy);
        tenants::delete(cluster, "mail")?;
        follow(lab, &pods, By::Policy, By::Node);
        Ok(())
    });
}

/// What pods leave by.
#[derive(Clone, Copy, Debug)]
enum By {
    Node,
    Policy,
}

impl By {
    fn addresses(self, lab: &Lab, pod: &Pod) -> [IpAddr; 2] {
        match self {
            Self::Node => lab.node(&pod.node).unwrap().addresses(Network::Lan),
            Self::Policy => egress(),
        }
    }
}

/// Waits until each pod is seen outside by these addresses, whichever node it runs on; until then by the former ones and
/// by no others.
fn follow(lab: &Lab, pods: &[&Pod], before: By, after: By) {
    let begun = Instant::now();
    for pod in pods {
        let (before, after) = (before.addresses(lab, pod), after.addresses(lab, pod));
        for server in outside() {
            until("all to follow", || {
                let seen = seen_from(pod, server);
                if after.contains(&seen) {
                    return Ok(());
                }
                assert!(before.contains(&seen), "{} at {server}: {seen}", pod.name);
                Err(format!("{} at {server}: {seen}", pod.name))
            });
        }
    }
    println!("all leave by {after:?} after {:?}", begun.elapsed());
}

/// The pods that are left.
fn the_gateway_loses_power(lab: &Lab) -> Vec<&Pod> {
    let gateway = tenants::gateway(lab, egress()[0]);
    println!("{gateway} is the gateway, and loses its power");
    lab.inject(&gateway, Fault::PowerOff).unwrap();
    lab.pods().filter(|pod| pod.node != gateway).collect()
}

/// From where a pod is seen at a server, once it can reach it.
fn seen_from(pod: &Pod, server: SocketAddr) -> IpAddr {
    let what = format!("{} to reach {server}", pod.name);
    until(&what, || tenants::seen_from(pod, server))
}
