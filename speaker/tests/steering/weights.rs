//! Each pod of a Service has its share, however they lie on the nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpStream};

use landfall_lab::Pod;
use landfall_lab::manifests::LINES;

use super::cluster::{Cluster, PATIENCE, vips};
use super::flow::{Flow, await_served};

/// How many pods serve on each node.
const PODS: [usize; 3] = [1, 5, 10];
/// Of so many a pod's share has a standard deviation of 4.3 %: 20 % is 4.6 of them.
const CONNECTIONS: usize = 8_000;

#[test]
fn one_five_and_ten_pods() {
    let cluster = Cluster::start(3, 10);
    let pods: Vec<&Pod> = cluster
        .lab
        .nodes()
        .iter()
        .zip(PODS)
        .flat_map(|(node, number)| &node.pods[..number])
        .collect();
    cluster.serve(&pods);
    cluster.speak();
    cluster.await_leader(vips()[0], |_| true);
    for vip in vips() {
        await_served(&cluster, vip, &pods);
        let to = (vip, LINES).into();
        assert_eq!(
            digests(&cluster, to).len(),
            1,
            "the nodes' tables are the same"
        );
        let mut counts: BTreeMap<&str, usize> = pods.iter().map(|pod| (&*pod.name, 0)).collect();
        let connected = cluster.lab.client().run(|| {
            (0..CONNECTIONS)
                .map(|_| {
                    Flow::over(TcpStream::connect_timeout(&to, PATIENCE).unwrap())
                        .unwrap()
                        .pod
                })
                .collect::<Vec<String>>()
        });
        for pod in &connected {
            *counts.get_mut(&**pod).unwrap() += 1;
        }
        println!("{vip}: {counts:?}");
        let fair = CONNECTIONS / pods.len();
        for (pod, count) in counts {
            assert!(
                count.abs_diff(fair) * 5 <= fair,
                "{pod} got {count} connections to {vip}, {fair} were fair"
            );
        }
    }
}

/// What the nodes show of a port's table.
fn digests(cluster: &Cluster, port: SocketAddr) -> BTreeSet<String> {
    let port = format!("{port}/TCP");
    let nodes = cluster.lab.nodes().iter();
    nodes
        .map(|node| {
            let state = cluster.lab.speaker_state(&node.name).unwrap();
            let digest = &state["steering"]["tables"][&port]["digest"];
            digest.as_str().unwrap().to_owned()
        })
        .collect()
}
