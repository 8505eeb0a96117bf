//! One Service on a cluster, struck by faults while clients use it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::PostParams;
use landfall_lab::Lab;
use landfall_lab::measure::census::Flows;
use landfall_lab::measure::neighbours::{self, Watch};
use landfall_lab::measure::{connects, datagrams, stream, stream::Fate};
use landfall_lab::server::{TCP_PORT, UDP_PORT};
use landfall_tests::{Cluster, PATIENCE, chart, client, eventually, objects};
use serde_json::json;

const POOL: &str = "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: lan}
spec:
  addresses: [10.88.0.200-10.88.0.201, 'fd00:88::200-fd00:88::201', 10.88.1.1-10.88.1.250]
---
apiVersion: landfall.dev/v1alpha1
kind: L2Advertisement
metadata: {name: lan}
spec: {interfaces: [eth0]}
";

/// How long everything must have been well for a fault to be over.
pub(crate) const CALM: Duration = Duration::from_secs(1);
/// How long a fault is watched at the least: a lost SYN costs one second, the next three.
const WATCH: Duration = Duration::from_secs(4);
/// How long kube-proxy may take to follow a change: it gathers changes for a second.
const PROXY: Duration = Duration::from_millis(2500);

/// The Service `echo`, served.
pub(crate) struct Scene<'a> {
    pub(crate) cluster: &'a Cluster,
    vips: Vec<IpAddr>,
}

/// What clients saw of a fault.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) what: String,
    pub(crate) leader_before: String,
    pub(crate) leader_after: String,
    /// The outage, by client.
    pub(crate) gaps: Vec<(&'static str, Duration)>,
    pub(crate) lost: usize,
    pub(crate) sent: usize,
    pub(crate) stall: Option<Duration>,
    pub(crate) connect: Option<Duration>,
    /// What became of the established flows, by pod.
    pub(crate) flows: Vec<(String, Fate)>,
    /// Who answered for the VIP before and after, by number of answers.
    pub(crate) answers: [BTreeMap<String, usize>; 2],
}

impl Outcome {
    fn count(&self, fate: Fate) -> usize {
        self.flows.iter().filter(|(_, of)| *of == fate).count()
    }

    /// Whether a pod was on the node that was struck.
    fn was_struck(&self, pod: &str) -> bool {
        let node = pod.split_once("-pod").map(|(node, _)| node);
        node == Some(&self.leader_before)
    }

    /// The pods on other nodes whose flows were reset.
    pub(crate) fn reset_elsewhere(&self) -> Vec<&str> {
        let reset = self.flows.iter().filter(|(_, fate)| *fate == Fate::Reset);
        reset
            .map(|(pod, _)| pod.as_str())
            .filter(|pod| !self.was_struck(pod))
            .collect()
    }
}

/// Prints it, in a line that can be read across faults, and a line for each flow that is not alive.
pub(crate) fn report(outcome: &Outcome) {
    let millis = |duration: Duration| format!("{:.0}", duration.as_secs_f64() * 1000.0);
    let gaps: Vec<String> = outcome
        .gaps
        .iter()
        .map(|(client, gap)| format!("{client} {}", millis(*gap)))
        .collect();
    println!(
        "{:<32} {} -> {}: outage ms: {}; lost {}/{}; TCP stall {} ms, worst connect {} ms; flows alive {} reset {} \
         stalled {}; answers before {:?}, after {:?}",
        outcome.what,
        outcome.leader_before,
        outcome.leader_after,
        gaps.join(", "),
        outcome.lost,
        outcome.sent,
        outcome.stall.map_or_else(|| "-".to_owned(), millis),
        outcome.connect.map_or_else(|| "-".to_owned(), millis),
        outcome.count(Fate::Alive),
        outcome.count(Fate::Reset),
        outcome.count(Fate::Stalled),
        outcome.answers[0],
        outcome.answers[1],
    );
    for (pod, fate) in outcome
        .flows
        .iter()
        .filter(|(_, fate)| *fate != Fate::Alive)
    {
        let place = if outcome.was_struck(pod) {
            "on the node that was struck"
        } else {
            "on another node"
        };
        println!("      {fate:?}: a flow to {pod}, {place}");
    }
}

impl<'a> Scene<'a> {
    /// Starts Landfall and the Service.
    pub(crate) fn start(cluster: &'a Cluster) -> anyhow::Result<Self> {
        chart::apply(cluster.plane(), POOL)?;
        cluster.start_landfall()?;
        let vips = cluster.block_on(async {
            let services: Api<Service> = Api::default_namespaced(cluster.client().await?);
            let service = objects::service("echo", json!({}));
            services.create(&PostParams::default(), &service).await?;
            let vips = eventually("the Service's addresses", async || {
                let service = services.get_status("echo").await.ok()?;
                Some(objects::ingress(&service)).filter(|addresses| addresses.len() == 2)
            });
            anyhow::Ok(vips.await)
        })?;
        let scene = Self { cluster, vips };
        scene.served();
        Ok(scene)
    }

    pub(crate) fn lab(&self) -> &Arc<Lab> {
        self.cluster.lab()
    }

    /// Waits until all clients are served.
    fn served(&self) {
        for vip in &self.vips {
            for from in [self.lab().client(), self.lab().remote()] {
                assert!(
                    client::first_answer(from, *vip, PATIENCE).is_some(),
                    "{vip} does not answer {}",
                    from.name()
                );
            }
        }
    }

    /// Who leads.
    pub(crate) fn leader(&self) -> anyhow::Result<String> {
        let begun = Instant::now();
        loop {
            let answers =
                neighbours::who_answers(self.lab(), self.vips[0], Duration::from_millis(300))?;
            let mut names = answers.into_keys();
            if let (Some(leader), None) = (names.next(), names.next()) {
                return Ok(leader);
            }
            assert!(begun.elapsed() < PATIENCE, "no leader");
        }
    }

    /// Waits until one and the same node alone has answered for [`CALM`]; that node.
    pub(crate) fn one_owner(&self) -> anyhow::Result<String> {
        let begun = Instant::now();
        loop {
            let answers = neighbours::who_answers(self.lab(), self.vips[0], CALM)?;
            if answers.len() == 1
                && let Some(owner) = answers.into_keys().next()
            {
                return Ok(owner);
            }
            assert!(begun.elapsed() < PATIENCE, "more than one owner, or none");
        }
    }

    /// Lets something happen while clients use the Service. Whether the leadership is to move is known
    /// beforehand. The pods on the leader's node are out of service before: that the endpoints of a dead node
    /// stay in service for a while is Kubernetes' part of an outage, not ours.
    pub(crate) fn strike(
        &self,
        what: &str,
        moves: bool,
        happen: impl FnOnce(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Outcome> {
        let lab = self.lab();
        let leader_before = self.leader()?;
        // But where nothing moves the leader's own pods serve: its way to the others may be what fails.
        for node in lab.nodes() {
            if (node.name == leader_before) == moves {
                self.report_pods(&node.name, false)?;
            }
        }
        self.lead_to(|node| (node == leader_before) != moves);
        thread::sleep(PROXY);
        self.served();
        let echo = |vip| SocketAddr::new(vip, UDP_PORT);
        let lines = SocketAddr::new(self.vips[0], TCP_PORT);
        let watch = Watch::start(lab, self.vips[0], Duration::from_millis(50))?;
        let probes = [
            ("v4", lab.client(), self.vips[0]),
            ("v6", lab.client(), self.vips[1]),
            ("routed", lab.remote(), self.vips[0]),
        ];
        let mut datagrams = Vec::new();
        for (name, from, vip) in probes {
            datagrams.push((name, datagrams::Probe::start(from, echo(vip))?));
        }
        let stream = stream::Probe::start(lab.client(), lines);
        let connects = connects::Probe::start(lab.client(), lines);
        let flows = Flows::open(lab.client(), lines, 20);
        thread::sleep(CALM);

        let struck = Instant::now();
        happen(&leader_before)?;
        let leader_after = loop {
            let owner = watch
                .latest(Duration::from_millis(300))
                .and_then(|mac| lab.owner_of(mac));
            let calm = datagrams
                .iter()
                .all(|(_, probe)| probe.answered_since() >= CALM);
            if let Some(owner) = owner
                && (owner != leader_before) == moves
                && calm
                && struck.elapsed() >= WATCH
            {
                break owner.to_owned();
            }
            assert!(
                struck.elapsed() < PATIENCE,
                "{what} of {leader_before}: owner now {owner:?}, clients served: {calm}"
            );
            thread::sleep(Duration::from_millis(20));
        };
        let reports: Vec<_> = datagrams
            .into_iter()
            .map(|(name, probe)| (name, probe.stop()))
            .collect();
        let heard = watch.stop();
        Ok(Outcome {
            what: what.to_owned(),
            leader_before,
            leader_after,
            gaps: reports
                .iter()
                .filter_map(|(name, report)| Some((*name, report.longest_gap()?)))
                .collect(),
            lost: reports.iter().map(|(_, report)| report.lost()).sum(),
            sent: reports.iter().map(|(_, report)| report.sent.len()).sum(),
            flows: flows.fates(),
            stall: stream.stop().map(|report| report.longest_stall),
            connect: connects.stop().worst(),
            answers: [
                neighbours::by_node(lab, &heard, |at| at < struck),
                neighbours::by_node(lab, &heard, |at| at >= struck),
            ],
        })
    }

    /// Mends everything and waits until all nodes take part again.
    pub(crate) fn recover(&self) -> anyhow::Result<()> {
        self.lab().heal()?;
        for node in self.lab().nodes() {
            self.report_pods(&node.name, true)?;
        }
        self.lead_to(|_| true);
        thread::sleep(PROXY);
        for node in self.lab().nodes() {
            let begun = Instant::now();
            while self.alive_peers(&node.name) != Some(self.lab().nodes().len()) {
                assert!(
                    begun.elapsed() < PATIENCE,
                    "{} does not know all peers again",
                    node.name
                );
                thread::sleep(Duration::from_millis(100));
            }
        }
        // A returning speaker joins within a second and listens for half of one.
        thread::sleep(Duration::from_secs(2));
        self.served();
        Ok(())
    }

    /// Waits until all nodes lead new flows to those that serve, and to no other.
    fn lead_to(&self, serves: impl Fn(&str) -> bool) {
        let nodes = self.lab().nodes().iter().map(|node| node.name.as_str());
        let wanted: BTreeSet<&str> = nodes.filter(|node| serves(node)).collect();
        let port = SocketAddr::new(self.vips[0], TCP_PORT);
        for node in self.lab().nodes() {
            let begun = Instant::now();
            loop {
                let state = self.lab().speaker_state(&node.name).unwrap_or_default();
                let table = &state["steering"]["ports"][format!("{port}/TCP")];
                let table = table.as_object().into_iter().flatten();
                if table
                    .map(|(node, _)| node.as_str())
                    .eq(wanted.iter().copied())
                {
                    break;
                }
                assert!(
                    begun.elapsed() < PATIENCE,
                    "{} does not lead to {wanted:?}",
                    node.name
                );
                thread::sleep(Duration::from_millis(50));
            }
        }
    }

    /// How many speakers take part as a speaker sees it, itself included.
    fn alive_peers(&self, node: &str) -> Option<usize> {
        let state = self.lab().speaker_state(node).ok()?;
        let peers = state["peers"].as_array()?;
        let alive = peers.iter().filter(|peer| {
            peer["alive"] == true && peer["gossip"] == true && peer["synced"] == true
        });
        Some(alive.count() + 1)
    }

    /// Takes the pods of a node into service or out of it; kube-proxy follows within [`PROXY`].
    fn report_pods(&self, node: &str, ready: bool) -> anyhow::Result<()> {
        let node = self.lab().node(node)?;
        self.cluster.block_on(async {
            let client = self.cluster.client().await?;
            for pod in &node.pods {
                objects::set_pod(&client, pod, ready).await?;
            }
            anyhow::Ok(())
        })
    }
}
