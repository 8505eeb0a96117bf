//! A lab with speakers and one Service, whose pods a test chooses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::manifests::{Manifests, Policy};
use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::{Lab, Node, Pod, Topology};

use super::flow::await_served;

/// What a busy machine can promise.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
pub(super) const SERVICE: &str = "web";

pub(super) fn vips() -> [IpAddr; 2] {
    landfall_lab::address::vips(0)
}

/// Nodes with pods, a Service of the pods that are named in turn, and speakers.
pub(super) struct Cluster {
    pub(super) lab: Lab,
    pub(super) manifests: Manifests,
}

impl Cluster {
    pub(super) fn start(nodes: u8, pods_per_node: u8) -> Self {
        Self::build(Topology {
            nodes,
            pods_per_node,
            ..Topology::default()
        })
    }

    pub(super) fn build(topology: Topology) -> Self {
        let lab = Lab::build(topology).unwrap();
        lab.serve_pods().unwrap();
        let manifests = Manifests::new(lab.manifests_dir());
        manifests.write_nodes(&lab).unwrap();
        manifests.write_pool().unwrap();
        manifests
            .write_service(SERVICE, vips(), Policy::Local)
            .unwrap();
        Self { lab, manifests }
    }

    /// Starts the speakers, and waits until all of them steer.
    pub(super) fn speak(&self) {
        self.lab.start_speakers().unwrap();
        self.await_steering();
    }

    pub(super) fn await_steering(&self) {
        let begun = Instant::now();
        let steers = |node: &Node| {
            let state = self.lab.speaker_state(&node.name).unwrap_or_default();
            let nodes = state["steering"]["nodes"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            // By each way that a node is reached.
            let names: BTreeSet<&str> = nodes.iter().filter_map(|it| it["name"].as_str()).collect();
            names.len() == self.lab.nodes().len() && nodes.iter().all(|node| node["steers"] == true)
        };
        while !self.lab.nodes().iter().all(steers) {
            assert!(begun.elapsed() < PATIENCE, "some speaker does not steer");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The pods, first of each node, then the second of each.
    pub(super) fn pods(&self) -> Vec<&Pod> {
        let mut pods: Vec<&Pod> = self.lab.pods().collect();
        pods.sort_by_key(|pod| {
            let (node, number) = pod.name.split_once("-pod").unwrap();
            (number.to_owned(), node.to_owned())
        });
        pods
    }

    pub(super) fn serve(&self, pods: &[&Pod]) {
        self.manifests
            .write_endpoints(SERVICE, pods.iter().copied())
            .unwrap();
    }

    pub(super) fn leader(&self, vip: IpAddr) -> Option<String> {
        let answers = who_answers(&self.lab, vip, Duration::from_millis(300)).unwrap();
        (answers.len() == 1).then(|| answers.into_keys().next().unwrap())
    }

    pub(super) fn await_leader(&self, vip: IpAddr, wanted: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            if let Some(leader) = self.leader(vip).filter(|leader| wanted(leader)) {
                return leader;
            }
            assert!(begun.elapsed() < PATIENCE, "no such leader of {vip}");
        }
    }

    /// What each node's programs did with packets, by verdict, all nodes together.
    pub(super) fn verdicts(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for node in self.lab.nodes() {
            for (verdict, count) in self.verdicts_of(&node.name) {
                *sums.entry(verdict).or_default() += count;
            }
        }
        sums
    }

    pub(super) fn verdicts_of(&self, node: &str) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        if let Ok(text) = self.lab.speaker_metrics(node) {
            for line in text.lines() {
                if let Some(rest) = line.strip_prefix("landfall_datapath_packets_total{verdict=\"")
                    && let Some((verdict, count)) = rest.split_once("\"} ")
                {
                    *sums.entry(verdict.to_owned()).or_default() += count.parse::<u64>().unwrap();
                }
            }
        }
        sums
    }
}

/// Starts three nodes with a pod each; the cluster and its leader.
pub(super) fn mk_three(offloads: bool) -> (Cluster, String) {
    let topology = Topology {
        offloads,
        ..Topology::default()
    };
    let cluster = Cluster::build(topology);
    let pods = cluster.pods();
    cluster.serve(&pods);
    cluster.speak();
    let leader = cluster.await_leader(vips()[0], |_| true);
    await_served(&cluster, vips()[0], &pods);
    (cluster, leader)
}
