//! Five hundred flows, opened at the start: each lives as long as its own pod, whatever happens around it.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::fault::SPEAKER;
use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::{Fault, Lab, Pod};
use landfall_tests::flows::{self, Flow};
use landfall_tests::{Cluster, PATIENCE, objects, tables};

use crate::deployment::Deployment;

const FLOWS: usize = 500;
/// Between two steps: tables change before kube-proxy has caught up with the change before.
const STEP: Duration = Duration::from_millis(300);

/// How long a new speaker's word may take to be everybody's, generously.
const BACK: Duration = Duration::from_secs(2);

struct Play<'a> {
    cluster: &'a Cluster,
    deployment: Deployment<'a>,
    /// Pods of nodes that are up and that have not been used, in the order they come.
    fresh: Vec<&'a Pod>,
    /// Those that serve, in the order they came.
    serving: Vec<&'a Pod>,
    flows: Vec<Flow>,
    slowest: Duration,
}

/// 3 to 16 pods and back, one at a time; in between the leader loses its power, a speaker starts anew with nothing,
/// and others than the flows' pods are replaced.
pub(crate) fn outlive_everything(cluster: &Cluster) {
    let mut play = Play::begin(cluster, 3);
    let kept: BTreeSet<String> = play.serving.iter().map(|pod| pod.name.clone()).collect();

    play.grow_to(10);
    let dead = play.leader_loses_power();
    play.grow_to(16);
    play.speaker_restarts();
    play.speaker_starts_with_nothing(&dead);
    play.replace_others(&kept, 4);
    // Longer than earlier tables are remembered: from here on the holders' own word counts.
    thread::sleep(Duration::from_secs(8));
    play.all_alive("long after");
    while let Some(at) = play
        .serving
        .iter()
        .rposition(|pod| !kept.contains(&pod.name))
    {
        let pod = play.serving.remove(at);
        play.deployment.end(pod);
        thread::sleep(STEP);
        play.all_alive(&format!("with {} pods", play.serving.len()));
    }
    play.deployment.await_ended();
    play.deployment.await_tables(&play.serving);
    play.all_alive("at the end");

    let verdicts = tables::verdicts(cluster.lab());
    println!(
        "      slowest answer of all flows {:?}; {verdicts:?}",
        play.slowest
    );
    assert!(verdicts["handed-on"] > 0, "some flows had to be looked for");
    assert_eq!(verdicts["flows-full"], 0);
    play.deployment.delete();
}

impl<'a> Play<'a> {
    /// With the first pods, and flows to them.
    fn begin(cluster: &'a Cluster, number: usize) -> Self {
        let lab = cluster.lab();
        // First of each node, then the second of each, and the third.
        let mut fresh: Vec<&Pod> = lab.pods().collect();
        fresh.sort_by_key(|pod| {
            pod.name
                .split_once("-pod")
                .map(|(node, at)| (at.to_owned(), node.to_owned()))
        });
        let serving: Vec<&Pod> = fresh.drain(..number).collect();
        let deployment = Deployment::create(cluster, "scaled", &serving);
        let flows = flows::open(lab.client(), deployment.address(), FLOWS).unwrap();
        println!("      {FLOWS} flows: {:?}", flows::spread(&flows));
        Self {
            cluster,
            deployment,
            fresh,
            serving,
            flows,
            slowest: Duration::ZERO,
        }
    }

    fn lab(&self) -> &'a Lab {
        self.cluster.lab()
    }

    /// Each flow asks its pod and is answered by it.
    fn all_alive(&mut self, when: &str) {
        match flows::ask(&mut self.flows) {
            Ok(took) => self.slowest = self.slowest.max(took),
            Err(lost) => {
                for node in self.lab().nodes() {
                    let state = self.lab().speaker_state(&node.name).unwrap_or_default();
                    println!("{}: {}", node.name, state["steering"]);
                }
                println!("{:?}", tables::verdicts(self.lab()));
                panic!("{when}: {} flows lost: {lost:?}", lost.len());
            }
        }
    }

    fn grow(&mut self) {
        let pod = self.fresh.remove(0);
        self.deployment.start(pod);
        self.serving.push(pod);
    }

    fn grow_to(&mut self, number: usize) {
        while self.serving.len() < number {
            self.grow();
            thread::sleep(STEP);
            self.all_alive(&format!("with {} pods", self.serving.len()));
        }
    }

    /// Waits until one node leads, and not this one.
    fn leader(&self, not: &str) -> String {
        let vip = self.deployment.address().ip();
        let begun = Instant::now();
        loop {
            let answers = who_answers(self.lab(), vip, Duration::from_millis(300)).unwrap();
            if answers.len() == 1 && !answers.contains_key(not) {
                return answers.into_keys().next().unwrap();
            }
            assert!(begun.elapsed() < PATIENCE, "no leader but {answers:?}");
        }
    }

    /// The flows of its pods end, no other does. The node's pods are soon reported not ready, as the node's
    /// controller does.
    fn leader_loses_power(&mut self) -> String {
        let dead = self.leader("");
        self.flows.retain(|flow| flow.node() != dead);
        println!(
            "      {dead} loses its power; {} flows are not its own",
            self.flows.len()
        );
        self.lab().inject(&dead, Fault::PowerOff).unwrap();
        self.all_alive("after the leader's death");
        self.leader(&dead);
        self.fresh.retain(|pod| pod.node != dead);
        self.serving.retain(|pod| pod.node != dead);
        self.cluster.block_on(async {
            let client = self.cluster.client().await.unwrap();
            for pod in &self.lab().node(&dead).unwrap().pods {
                objects::set_pod(&client, pod, false).await.unwrap();
            }
        });
        self.all_alive("with its pods not ready");
        dead
    }

    /// The speaker of a node with flows dies, and the next one finds no table of flows.
    fn speaker_starts_with_nothing(&mut self, dead: &str) {
        let lab = self.lab();
        let node = self.flows[0].node().to_owned();
        assert_ne!(node, dead);
        lab.inject(&node, Fault::Kill).unwrap();
        self.all_alive("without a speaker");
        // As another version would have left them: they are not read.
        let pins = lab.mount_pins().unwrap().join(&node);
        let layouts: Vec<_> = fs::read_dir(&pins)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| {
                path.file_name()
                    .unwrap()
                    .to_string_lossy()
                    .starts_with("layout-")
            })
            .collect();
        assert_eq!(layouts.len(), 1, "{layouts:?}");
        fs::rename(&layouts[0], pins.join("layout-999")).unwrap();
        self.speaker_comes_back(&node);
    }

    /// A speaker is killed, and the next one goes on with its tables.
    fn speaker_restarts(&mut self) {
        let node = self.flows[0].node().to_owned();
        self.lab().inject(&node, Fault::Kill).unwrap();
        self.all_alive("without a speaker");
        self.speaker_comes_back(&node);
    }

    /// The flows are asked all the while, and until what it says has long been heard.
    fn speaker_comes_back(&mut self, node: &str) {
        self.lab().restart(node, SPEAKER).unwrap();
        let begun = Instant::now();
        while !self.steers(node) {
            assert!(begun.elapsed() < PATIENCE, "{node} does not steer again");
            self.all_alive(&format!(
                "{:?} after the new speaker's start",
                begun.elapsed()
            ));
        }
        let took = begun.elapsed();
        println!("      {node}'s speaker is back after {took:?}");
        while begun.elapsed() < took + BACK {
            self.all_alive(&format!(
                "{:?} after the new speaker's start",
                begun.elapsed()
            ));
        }
    }

    /// Whether a node's speaker says that it steers.
    fn steers(&self, node: &str) -> bool {
        let state = self.lab().speaker_state(node).unwrap_or_default();
        let nodes = state["steering"]["nodes"].as_array();
        nodes.is_some_and(|nodes| {
            nodes
                .iter()
                .any(|known| known["name"] == node && known["steers"] == true)
        })
    }

    /// A rolling update of pods that have no flow.
    fn replace_others(&mut self, kept: &BTreeSet<String>, number: usize) {
        for _ in 0..number {
            self.grow();
            let at = self
                .serving
                .iter()
                .position(|pod| !kept.contains(&pod.name));
            let old = self.serving.remove(at.unwrap());
            self.deployment.end(old);
            thread::sleep(STEP);
            self.all_alive(&format!("{} replaced", old.name));
        }
    }
}
