//! Rolling updates as a Deployment with `maxUnavailable: 0` makes them, while clients open a connection for each
//! request: a well-behaved app loses none.

use std::thread;
use std::time::Duration;

use landfall_lab::Pod;
use landfall_lab::measure::requests;
use landfall_tests::Cluster;

use crate::deployment::Deployment;

/// Two clients, a hundred requests a second together.
const PACE: Duration = Duration::from_millis(20);

/// Four pods are replaced one at a time, on the same node, on a node with pods, and on new nodes.
pub(crate) fn of_four(cluster: &Cluster) {
    let old = ["node1-pod0", "node2-pod0", "node3-pod0", "node4-pod0"];
    let new = ["node1-pod1", "node3-pod1", "node5-pod0", "node6-pod0"];
    update(cluster, "four", &old, &new, Duration::from_millis(1500));
}

/// The only pod is replaced: it ends as soon as the new one is ready, which is before the new one's node serves.
pub(crate) fn of_one(cluster: &Cluster) {
    for (old, new) in [("node1-pod0", "node2-pod0"), ("node3-pod0", "node3-pod1")] {
        update(cluster, "one", &[old], &[new], Duration::ZERO);
    }
}

fn update(cluster: &Cluster, name: &'static str, old: &[&str], new: &[&str], pause: Duration) {
    let lab = cluster.lab();
    let pod = |name: &&str| lab.pods().find(|pod| pod.name == **name).unwrap();
    let (old, new): (Vec<&Pod>, Vec<&Pod>) =
        (old.iter().map(pod).collect(), new.iter().map(pod).collect());
    let deployment = Deployment::create(cluster, name, &old);
    let probes = [lab.client(), lab.remote()]
        .map(|from| requests::Probe::start(from, deployment.address(), PACE));
    thread::sleep(Duration::from_secs(1));
    for (old, new) in old.iter().zip(&new) {
        deployment.start(new);
        deployment.end(old);
        thread::sleep(pause);
    }
    deployment.await_ended();
    deployment.await_tables(&new);
    thread::sleep(Duration::from_secs(1));
    for report in probes.map(requests::Probe::stop) {
        println!(
            "      {:?} answered, slowest {:?}, {} failed",
            report.answered,
            report.slowest,
            report.failed.len()
        );
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        assert!(
            new.iter()
                .all(|pod| report.answered.contains_key(&pod.name))
        );
    }
    deployment.delete();
}
