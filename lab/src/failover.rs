//! A lab with speakers and one Service, and fail-overs of it, measured.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::address;
use crate::error::{LabError, Result};
use crate::fault::{Fault, SPEAKER};
use crate::lab::Lab;
use crate::manifests::{ECHO, LINES, Manifests, Policy};
use crate::measure::census::Flows;
use crate::measure::neighbours::{self, Watch};
use crate::measure::{connects, datagrams, stream};
use crate::process::Program;
use crate::report::Run;
use crate::speakers::{ADMIN, http_get};
use crate::topology::Topology;

/// The name of the scene's Service.
pub const SERVICE: &str = "echo";
/// How long speakers have to start, and a VIP to be served.
const START: Duration = Duration::from_secs(60);
/// How long a fail-over may take before it counts as none.
const LIMIT: Duration = Duration::from_secs(30);
/// How long everything is watched before the fault.
const BEFORE: Duration = Duration::from_secs(1);
/// How long it is watched after it, at the least: a lost SYN costs one second, the next three.
const AFTER: Duration = Duration::from_secs(3);
/// How long all datagrams must have been answered for the fail-over to be over.
const CALM: Duration = Duration::from_secs(1);
/// How many flows are established before the fault.
const FLOWS: usize = 20;
/// How often the observer asks who has the VIP.
const ASK: Duration = Duration::from_millis(50);

/// Something to show while a scene plays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// What is being done.
    Step(String),
    /// A node began to answer for the VIP, this long after the fault.
    Answers {
        /// The node.
        node: String,
        /// Since the fault; `None` before it.
        after: Option<Duration>,
    },
}

/// Where progress goes.
pub type Notify<'a> = &'a (dyn Fn(Progress) + Sync);

/// A lab with a speaker on every node, and a dual-stack Service with all pods behind it.
#[derive(Debug)]
pub struct Scene {
    lab: Lab,
    vips: [IpAddr; 2],
    played: AtomicU32,
}

impl Scene {
    /// Builds the lab, starts everything and waits until the Service is served.
    pub fn start(topology: Topology, policy: Policy, notify: Notify<'_>) -> Result<Self> {
        let step = |text: &str| notify(Progress::Step(text.to_owned()));
        // Missing binaries are better noticed before anything is built.
        Program::landfall("landfall-speaker")?;
        step("building the LAN");
        let lab = Lab::build(topology)?;
        lab.serve_pods()?;
        let manifests = Manifests::new(lab.manifests_dir());
        let vips = address::vips(0);
        manifests.write_nodes(&lab)?;
        manifests.write_pool()?;
        manifests.write_service(SERVICE, vips, policy)?;
        manifests.write_endpoints(SERVICE, lab.pods())?;
        for node in lab.nodes() {
            // See `fresh_ports`.
            node.netns
                .sysctl("net.netfilter.nf_conntrack_tcp_timeout_established", "120")?;
        }
        step("starting the speakers");
        lab.start_speakers()?;
        let scene = Self {
            lab,
            vips,
            played: AtomicU32::new(0),
        };
        scene.await_ready()?;
        step("waiting for a leader");
        for vip in scene.vips {
            scene.await_leader(vip)?;
        }
        Ok(scene)
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The Service's addresses, IPv4 and IPv6.
    pub fn vips(&self) -> [IpAddr; 2] {
        self.vips
    }

    /// Who answers for a VIP, asked for 300 ms; answers by node. More than one node is a fault of Landfall's.
    pub fn leaders(&self, vip: IpAddr) -> Result<BTreeMap<String, usize>> {
        neighbours::who_answers(&self.lab, vip, Duration::from_millis(300))
    }

    /// Waits until every speaker says it is ready.
    pub fn await_ready(&self) -> Result<()> {
        self.wait("every speaker to be ready", || {
            for node in self.lab.nodes() {
                if !self.lab.runs(&node.name, SPEAKER) {
                    let log = self.lab.log(&node.name, SPEAKER).unwrap_or_default();
                    let tail: Vec<&str> = log.lines().rev().take(5).collect();
                    return Err(LabError::Invalid(format!(
                        "the speaker of {} ended; the last lines of its log:\n{}",
                        node.name,
                        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
                    )));
                }
                if http_get(&node.netns, ADMIN, "/readyz").is_err() {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    /// Waits until exactly one node answers for a VIP, and clients are served; that node.
    pub fn await_leader(&self, vip: IpAddr) -> Result<String> {
        self.wait(&format!("{vip} to be served by one leader"), || {
            let leaders = self.leaders(vip)?;
            let mut names = leaders.into_keys();
            let (Some(leader), None) = (names.next(), names.next()) else {
                return Ok(None);
            };
            let probe = datagrams::Probe::start(self.lab.client(), SocketAddr::new(vip, ECHO))?;
            thread::sleep(Duration::from_millis(100));
            let served = probe.stop().lost() == 0;
            Ok(served.then_some(leader))
        })
    }

    fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let begun = Instant::now();
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            if begun.elapsed() > START {
                return Err(LabError::Timeout {
                    what: what.to_owned(),
                    after: START,
                    hint: self.hint(),
                });
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The ends of the speakers' logs, since the files go with the lab.
    fn hint(&self) -> String {
        let mut hint = String::from("; the ends of the speakers' logs:");
        for node in self.lab.nodes() {
            let log = self.lab.log(&node.name, SPEAKER).unwrap_or_default();
            for line in log.lines().rev().take(3).collect::<Vec<_>>().iter().rev() {
                hint.extend(["\n  ", &node.name, ": ", line]);
            }
        }
        hint
    }

    /// Lets `fault` happen to the leader of `vip`, and measures what the client on the segment and the routed
    /// client see of it.
    pub fn fail_over(&self, fault: Fault, vip: IpAddr, notify: Notify<'_>) -> Result<Run> {
        let leader_before = self.await_leader(vip)?;
        notify(Progress::Answers {
            node: leader_before.clone(),
            after: None,
        });
        self.fresh_ports()?;
        let probes = Probes::start(&self.lab, vip)?;
        thread::sleep(BEFORE);
        notify(Progress::Step(format!("{fault} of {leader_before}")));
        let struck = Instant::now();
        self.lab.inject(&leader_before, fault)?;
        let leader_after = self.await_takeover(&probes, &leader_before, fault, struck, notify)?;
        let mut dead = BTreeSet::new();
        if fault.kills_pods() {
            let pods = &self.lab.node(&leader_before)?.pods;
            dead.extend(pods.iter().map(|pod| pod.name.as_str()));
        }
        Ok(probes.stop(
            &self.lab,
            struck,
            leader_before.clone(),
            leader_after,
            &dead,
        ))
    }

    /// Gives the client source ports that no recent run has used. A flow that was reset by a new leader is still
    /// established in the connection tracking of the old one, and a new flow of the same ports would be taken
    /// for it when that node leads again.
    fn fresh_ports(&self) -> Result<()> {
        let window = self.played.fetch_add(1, Ordering::Relaxed) % 28;
        let first = 32_768 + window * 1000;
        self.lab.client().sysctl(
            "net.ipv4.ip_local_port_range",
            &format!("{first} {}", first + 999),
        )
    }

    /// Waits until another node leads and all clients have been served for a while; that node.
    fn await_takeover(
        &self,
        probes: &Probes,
        before: &str,
        fault: Fault,
        struck: Instant,
        notify: Notify<'_>,
    ) -> Result<String> {
        // Nothing of the VIP's is lost with the management network: its leader should stay.
        let moves = fault != Fault::ManagementDown;
        let mut shown = before.to_owned();
        loop {
            let mac = probes.watch.latest(Duration::from_millis(300));
            let now = mac
                .and_then(|mac| self.lab.owner_of(mac))
                .map(str::to_owned);
            if let Some(now) = &now
                && *now != shown
            {
                shown.clone_from(now);
                notify(Progress::Answers {
                    node: now.clone(),
                    after: Some(struck.elapsed()),
                });
            }
            let calm = probes
                .datagrams
                .iter()
                .all(|probe| probe.answered_since() >= CALM);
            if let Some(now) = now
                && (now != before) == moves
                && calm
                && struck.elapsed() >= AFTER
            {
                return Ok(now);
            }
            if struck.elapsed() > LIMIT {
                return Err(LabError::Timeout {
                    what: format!("the end of the outage after {fault} of {before}"),
                    after: LIMIT,
                    hint: self.hint(),
                });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Mends everything and waits until it is as before a fault.
    pub fn recover(&self) -> Result<()> {
        self.lab.heal()?;
        self.await_ready()?;
        // A returning speaker joins within a second and listens for half of one.
        thread::sleep(Duration::from_secs(3));
        for vip in self.vips {
            self.await_leader(vip)?;
        }
        Ok(())
    }
}

/// All that is measured at once.
struct Probes {
    watch: Watch,
    datagrams: Vec<datagrams::Probe>,
    stream: stream::Probe,
    connects: connects::Probe,
    flows: Flows,
}

impl Probes {
    fn start(lab: &Lab, vip: IpAddr) -> Result<Self> {
        let echo = SocketAddr::new(vip, ECHO);
        let lines = SocketAddr::new(vip, LINES);
        Ok(Self {
            watch: Watch::start(lab, vip, ASK)?,
            datagrams: vec![
                datagrams::Probe::start(lab.client(), echo)?,
                datagrams::Probe::start(lab.remote(), echo)?,
            ],
            stream: stream::Probe::start(lab.client(), lines),
            connects: connects::Probe::start(lab.client(), lines),
            flows: Flows::open(lab.client(), lines, FLOWS),
        })
    }

    /// `dead` are the pods that died with the leader.
    fn stop(
        self,
        lab: &Lab,
        struck: Instant,
        leader_before: String,
        leader_after: String,
        dead: &BTreeSet<&str>,
    ) -> Run {
        let datagrams: Vec<_> = self
            .datagrams
            .into_iter()
            .map(datagrams::Probe::stop)
            .collect();
        let flows = self.flows.count_apart(|pod| dead.contains(pod));
        let stream = self.stream.stop();
        let connects = self.connects.stop();
        let heard = self.watch.stop();
        Run {
            longest_gap: datagrams
                .iter()
                .filter_map(datagrams::Datagrams::longest_gap)
                .max()
                .unwrap_or_default(),
            tcp_stall: stream.map(|report| report.longest_stall),
            connect: connects.worst(),
            lost: datagrams.iter().map(datagrams::Datagrams::lost).sum(),
            sent: datagrams.iter().map(|probe| probe.sent.len()).sum(),
            flows,
            leader_before,
            leader_after,
            answers_before: neighbours::by_node(lab, &heard, |at| at < struck),
            answers_after: neighbours::by_node(lab, &heard, |at| at >= struck),
        }
    }
}

/// A fault that `landfall lab failover` measures.
pub const MEASURED: [Fault; 4] = [
    Fault::PowerOff,
    Fault::UplinkDown,
    Fault::Kill,
    Fault::Drain,
];
