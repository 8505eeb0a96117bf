//! Steering on real nodes: established flows stay with their pods while everything around them changes.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use landfall_ebpf_common::LAYOUT;
use landfall_lab::fault::{Fault, SPEAKER};
use landfall_lab::manifests::{ECHO, LINES, Manifests, Policy};
use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::{Lab, Netns, Node, Pod, Topology};

/// What a busy machine can promise.
const PATIENCE: Duration = Duration::from_secs(30);
const SERVICE: &str = "web";
const FLOWS: usize = 500;

fn vips() -> [IpAddr; 2] {
    landfall_lab::address::vips(0)
}

/// Nodes with pods, a Service of the pods that are named in turn, and speakers.
struct Cluster {
    lab: Lab,
    manifests: Manifests,
}

impl Cluster {
    fn start(nodes: u8, pods_per_node: u8) -> Self {
        Self::build(Topology {
            nodes,
            pods_per_node,
            ..Topology::default()
        })
    }

    fn build(topology: Topology) -> Self {
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
    fn speak(&self) {
        self.lab.start_speakers().unwrap();
        self.await_steering();
    }

    fn await_steering(&self) {
        let begun = Instant::now();
        let steers = |node: &Node| {
            let state = self.lab.speaker_state(&node.name).unwrap_or_default();
            let nodes = state["steering"]["nodes"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            nodes.len() == self.lab.nodes().len() && nodes.iter().all(|node| node["steers"] == true)
        };
        while !self.lab.nodes().iter().all(steers) {
            assert!(begun.elapsed() < PATIENCE, "some speaker does not steer");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The pods, first of each node, then the second of each.
    fn pods(&self) -> Vec<&Pod> {
        let mut pods: Vec<&Pod> = self.lab.pods().collect();
        pods.sort_by_key(|pod| {
            let (node, number) = pod.name.split_once("-pod").unwrap();
            (number.to_owned(), node.to_owned())
        });
        pods
    }

    fn serve(&self, pods: &[&Pod]) {
        self.manifests
            .write_endpoints(SERVICE, pods.iter().copied())
            .unwrap();
    }

    fn leader(&self, vip: IpAddr) -> Option<String> {
        let answers = who_answers(&self.lab, vip, Duration::from_millis(300)).unwrap();
        (answers.len() == 1).then(|| answers.into_keys().next().unwrap())
    }

    fn await_leader(&self, vip: IpAddr, wanted: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            if let Some(leader) = self.leader(vip).filter(|leader| wanted(leader)) {
                return leader;
            }
            assert!(begun.elapsed() < PATIENCE, "no such leader of {vip}");
        }
    }

    /// What each node's programs did with packets, by verdict, all nodes together.
    fn verdicts(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for node in self.lab.nodes() {
            for (verdict, count) in self.verdicts_of(&node.name) {
                *sums.entry(verdict).or_default() += count;
            }
        }
        sums
    }

    fn verdicts_of(&self, node: &str) -> BTreeMap<String, u64> {
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

/// An established flow, and the pod at its end.
struct Flow {
    stream: BufReader<TcpStream>,
    pod: String,
}

impl Flow {
    fn open(from: &Netns, to: SocketAddr) -> std::io::Result<Self> {
        let stream = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut flow = Self {
            stream: BufReader::new(stream),
            pod: String::new(),
        };
        flow.ask()?;
        flow.pod = flow.answer()?;
        Ok(flow)
    }

    fn ask(&mut self) -> std::io::Result<()> {
        self.stream.get_mut().write_all(b"still there?\n")
    }

    fn answer(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.split(' ').next().unwrap_or_default().to_owned())
    }

    fn node(&self) -> &str {
        self.pod.split_once("-pod").unwrap().0
    }
}

/// Each of the flows asks its pod and is answered by it.
fn all_alive(cluster: &Cluster, flows: &mut [Flow], when: &str) {
    let lost = |flow: &Flow, error: std::io::Error| -> ! {
        for node in cluster.lab.nodes() {
            let state = cluster.lab.speaker_state(&node.name).unwrap_or_default();
            println!(
                "{}: {:?} {}",
                node.name,
                cluster.verdicts_of(&node.name),
                state["steering"]
            );
            let log = cluster.lab.log(&node.name, SPEAKER).unwrap_or_default();
            for line in log.lines().filter(|line| line.contains("WARN")) {
                println!("{line}");
            }
        }
        panic!("{when}: a flow to {}: {error}", flow.pod)
    };
    for flow in flows.iter_mut() {
        if let Err(error) = flow.ask() {
            lost(flow, error);
        }
    }
    for flow in flows.iter_mut() {
        match flow.answer() {
            Ok(pod) => assert_eq!(pod, flow.pod, "{when}: another pod answered"),
            Err(error) => lost(flow, error),
        }
    }
}

fn open(cluster: &Cluster, vip: IpAddr, number: usize) -> Vec<Flow> {
    (0..number)
        .map(|_| Flow::open(cluster.lab.client(), (vip, LINES).into()).unwrap())
        .collect()
}

/// Opens connections until these pods have all served, and no other has among the last of them.
fn await_served(cluster: &Cluster, vip: IpAddr, pods: &[&Pod]) {
    let begun = Instant::now();
    let wanted: BTreeSet<&str> = pods.iter().map(|pod| &*pod.name).collect();
    loop {
        let seen: BTreeSet<String> = (0..pods.len() * 12)
            .filter_map(|_| Flow::open(cluster.lab.client(), (vip, LINES).into()).ok())
            .map(|flow| flow.pod)
            .collect();
        if seen.iter().map(String::as_str).collect::<BTreeSet<_>>() == wanted {
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "served by {seen:?}, not by {wanted:?}"
        );
    }
}

/// 3 to 16 pods on 8 nodes and back, one at a time, a leader's death in the middle: what lives goes on.
#[test]
fn flows_outlive_scaling_and_the_leader() {
    let cluster = Cluster::start(8, 2);
    let pods = cluster.pods();
    cluster.serve(&pods[..3]);
    cluster.speak();
    let [vip, _] = vips();
    let first = cluster.await_leader(vip, |_| true);
    await_served(&cluster, vip, &pods[..3]);
    let mut flows = open(&cluster, vip, FLOWS);
    let spread = |flows: &[Flow]| {
        let mut spread = BTreeMap::<String, usize>::new();
        for flow in flows {
            *spread.entry(flow.pod.clone()).or_default() += 1;
        }
        spread
    };
    println!("{FLOWS} flows, {first} leads: {:?}", spread(&flows));

    for number in 4..=10 {
        cluster.serve(&pods[..number]);
        thread::sleep(Duration::from_millis(300));
        all_alive(&cluster, &mut flows, &format!("with {number} pods"));
    }
    let off = cluster.await_leader(vip, |_| true);
    flows.retain(|flow| flow.node() != off);
    println!("{off} loses power; {} flows are not its own", flows.len());
    cluster.lab.inject(&off, Fault::PowerOff).unwrap();
    all_alive(&cluster, &mut flows, "after the leader's death");
    cluster.await_leader(vip, |leader| leader != off);
    let up: Vec<&Pod> = pods.iter().copied().filter(|pod| pod.node != off).collect();
    for number in 10..=up.len() {
        cluster.serve(&up[..number]);
        thread::sleep(Duration::from_millis(300));
        all_alive(&cluster, &mut flows, &format!("with {number} pods"));
    }
    println!("up: {:?}", cluster.verdicts());
    // Longer than earlier tables are remembered: from here on the holders' own word counts.
    thread::sleep(Duration::from_secs(8));
    all_alive(&cluster, &mut flows, "long after");
    let kept: BTreeSet<&str> = pods[..3].iter().map(|pod| &*pod.name).collect();
    for number in (kept.len()..up.len()).rev() {
        let mut serving: Vec<&Pod> = up
            .iter()
            .copied()
            .filter(|pod| kept.contains(&*pod.name))
            .collect();
        serving.extend(up.iter().copied().filter(|pod| !kept.contains(&*pod.name)));
        serving.truncate(number);
        cluster.serve(&serving);
        thread::sleep(Duration::from_millis(300));
        all_alive(&cluster, &mut flows, &format!("with {number} pods again"));
    }
    let verdicts = cluster.verdicts();
    println!("down: {verdicts:?}");
    assert!(verdicts["handed-on"] > 0, "some flows had to be looked for");
    assert_eq!(verdicts["flows-full"], 0);
}

/// Starts three nodes with a pod each; the cluster and its leader.
fn mk_three(offloads: bool) -> (Cluster, String) {
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

/// A flow to a pod that is not the leader's.
fn elsewhere(cluster: &Cluster, vip: IpAddr, leader: &str) -> Flow {
    let to = (vip, LINES).into();
    (0..100)
        .map(|_| Flow::open(cluster.lab.client(), to).unwrap())
        .find(|flow| flow.node() != leader)
        .unwrap()
}

/// Sends lines and compares what comes back, byte by byte; `midway` happens after the third part.
fn transfer(flow: Flow, midway: impl FnOnce()) {
    const LINES_SENT: usize = 600;
    const LENGTH: usize = 60_000;
    let line = |number: usize| -> Vec<u8> {
        let byte = |at: usize| b'!' + u8::try_from((at * 7 + number * 13 + at / 251) % 90).unwrap();
        let mut line: Vec<u8> = (0..LENGTH).map(byte).collect();
        line.push(b'\n');
        line
    };
    let pod = flow.pod.clone();
    let mut reader = flow.stream;
    let mut writer = reader.get_ref().try_clone().unwrap();
    let sender = thread::spawn(move || {
        for number in 0..LINES_SENT {
            writer.write_all(&line(number)).unwrap();
        }
    });
    let mut midway = Some(midway);
    for number in 0..LINES_SENT {
        let mut answer = Vec::new();
        reader.read_until(b'\n', &mut answer).unwrap();
        let expected = [pod.as_bytes(), b" ", &line(number)].concat();
        assert!(answer == expected, "line {number} is not what was sent");
        if number == LINES_SENT / 3
            && let Some(midway) = midway.take()
        {
            midway();
        }
    }
    sender.join().unwrap();
}

/// Merged by the NIC, or segment by segment: what arrives is what was sent, also past the leader's death.
#[test]
fn bytes_are_intact_with_offloads_on_and_off() {
    for offloads in [true, false] {
        let (cluster, leader) = mk_three(offloads);
        if !offloads {
            for node in cluster.lab.nodes() {
                node.netns
                    .exec("ethtool -K eth0 gro off tso off gso off tx off rx off")
                    .unwrap();
            }
        }
        let [v4, v6] = vips();
        transfer(elsewhere(&cluster, v6, &leader), || {});
        let flow = elsewhere(&cluster, v4, &leader);
        let off = cluster.await_leader(v4, |_| true);
        assert_ne!(flow.node(), off, "the leadership moved by itself");
        transfer(flow, || cluster.lab.inject(&off, Fault::PowerOff).unwrap());
        println!("offloads {offloads}: {:?}", cluster.verdicts());
    }
}

/// Datagrams longer than the MTU reach the node that serves the client, whole.
#[test]
fn fragments_meet() {
    let (cluster, _) = mk_three(false);
    for vip in vips() {
        for from in [cluster.lab.client(), cluster.lab.remote()] {
            let socket = from.run(|| {
                let any: IpAddr = match vip {
                    IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                    IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                };
                UdpSocket::bind((any, 0)).unwrap()
            });
            socket
                .set_read_timeout(Some(Duration::from_secs(1)))
                .unwrap();
            let datagram: Vec<u8> = (0..4000_u32)
                .map(|at| u8::try_from(at % 251).unwrap())
                .collect();
            let mut buffer = vec![0; 8192];
            let answered = (0..20).any(|_| {
                socket.send_to(&datagram, (vip, ECHO)).unwrap();
                socket
                    .recv(&mut buffer)
                    .is_ok_and(|length| buffer[..length].ends_with(&datagram))
            });
            assert!(answered, "{vip} from {}", from.name());
        }
    }
    let verdicts = cluster.verdicts();
    println!("{verdicts:?}");
    assert_eq!(verdicts["stray-fragment"], 0);
}

/// A speaker that finds nothing of an earlier one takes the flows from connection tracking, and says again which it
/// holds; one that finds its maps goes on with them.
#[test]
fn flows_outlive_restarts_of_the_speakers() {
    let cluster = Cluster::start(3, 1);
    let pods = cluster.pods();
    cluster.serve(&pods[..2]);
    cluster.speak();
    let vip = vips()[0];
    cluster.await_leader(vip, |_| true);
    await_served(&cluster, vip, &pods[..2]);
    let mut flows = open(&cluster, vip, 60);
    cluster.serve(&pods);
    await_served(&cluster, vip, &pods);
    all_alive(&cluster, &mut flows, "with a third pod");
    for empty in [false, true] {
        for node in cluster.lab.nodes() {
            cluster.lab.inject(&node.name, Fault::Kill).unwrap();
            all_alive(&cluster, &mut flows, "without a speaker");
            if empty {
                // As another version would have left them: they are not read.
                let pins = cluster.lab.mount_pins().unwrap().join(&node.name);
                let ours = pins.join(format!("layout-{LAYOUT}"));
                std::fs::rename(ours, pins.join("layout-999")).unwrap();
            }
            cluster.lab.restart(&node.name, SPEAKER).unwrap();
            cluster.await_steering();
            // Long enough for earlier spreads to be forgotten, had there been any.
            thread::sleep(Duration::from_secs(6));
            all_alive(
                &cluster,
                &mut flows,
                &format!("{} restarted, without its maps: {empty}", node.name),
            );
        }
    }
    println!("{:?}", cluster.verdicts());
}
