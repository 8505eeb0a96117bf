//! Tenants' pods leave by their policies' own addresses: the real control plane, kube-proxy, controller and speakers,
//! and packets to a server on the segment and to one behind the router.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::server::{PodServer, TCP_PORT};
use landfall_lab::{Lab, Network, Pod, Topology};
use landfall_tests::flows::Flow;
use landfall_tests::{Cluster, PATIENCE, chart};

const OBJECTS: &str = "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: out}
spec:
  purpose: Egress
  addresses: [10.88.0.230-10.88.0.239, 'fd00:88::230-fd00:88::239']
---
apiVersion: landfall.dev/v1alpha1
kind: EgressPolicy
metadata: {name: mail}
spec:
  podSelector: {matchLabels: {app: echo}}
  egressIPs: {pool: out, ipFamilies: [IPv4, IPv6]}
";

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
        chart::apply(cluster.plane(), OBJECTS)?;
        cluster.start_controller("controller", &[])?;
        for node in cluster.lab().nodes() {
            cluster.start_speaker(&node.name, &["--egress"])?;
        }
        let lab = cluster.lab();
        let _near = PodServer::start(lab.client(), "near")?;
        let _far = PodServer::start(lab.remote(), "far")?;
        all_leave_by_their_own(lab);
        Ok(())
    });
}

fn egress() -> [IpAddr; 2] {
    Network::Lan.both(230)
}

/// The servers outside, of both families.
fn outside() -> Vec<SocketAddr> {
    let near = Network::Lan.both(100);
    let far = Network::Remote.both(100);
    [near, far]
        .into_iter()
        .flatten()
        .map(|address| SocketAddr::new(address, TCP_PORT))
        .collect()
}

/// Each pod is seen outside by its policy's address, whichever node it runs on.
fn all_leave_by_their_own(lab: &Lab) {
    let begun = Instant::now();
    for pod in lab.pods() {
        for server in outside() {
            let seen = seen_from(pod, server, begun);
            let expected = egress()
                .into_iter()
                .find(|it| it.is_ipv4() == seen.is_ipv4());
            assert_eq!(Some(seen), expected, "{} at {server}", pod.name);
        }
    }
    println!("all leave by their own after {:?}", begun.elapsed());
}

/// From where a pod is seen at a server, once it can reach it.
fn seen_from(pod: &Pod, server: SocketAddr, begun: Instant) -> IpAddr {
    loop {
        match Flow::open_within(&pod.netns, server, TRY) {
            Ok(flow) => return flow.seen_from,
            Err(error) => assert!(
                begun.elapsed() < PATIENCE,
                "{} does not reach {server}: {error}",
                pod.name
            ),
        }
        thread::sleep(Duration::from_millis(100));
    }
}
