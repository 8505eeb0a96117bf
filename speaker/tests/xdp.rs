//! Nodes whose drivers steer (native XDP): connections go where they would go without.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::programs::{Xdp, XdpMode};
use landfall_ebpf_common::UPLINK_DRIVER;
use landfall_lab::fault::SPEAKER;
use landfall_lab::manifests::{LINES, Manifests, Policy};
use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::{Lab, Netns, Topology};

/// What a busy machine can promise.
const PATIENCE: Duration = Duration::from_secs(30);
const FLOWS: usize = 60;
const ROUNDS: usize = 20;

/// A program for the switch's ports: ours, which has nothing to steer there.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("LANDFALL_UPLINK_OBJECT"));

/// Puts a program at the driver of each of the switch's ports: a veth looks after what its other end's driver sends
/// only where there is one. It stays as long as what this returns.
fn wake_ports(lab: &Lab) -> Ebpf {
    lab.switch().run(|| {
        let mut ebpf = Ebpf::load(OBJECT).unwrap();
        let program: &mut Xdp = ebpf.program_mut(UPLINK_DRIVER).unwrap().try_into().unwrap();
        program.load().unwrap();
        for node in lab.nodes() {
            program
                .attach(&format!("{}-eth0", node.name), XdpMode::Driver)
                .unwrap();
        }
        ebpf
    })
}

/// Three nodes with a pod each, whose speakers are told to use XDP.
fn build() -> (Lab, Ebpf) {
    let lab = Lab::build(Topology::default()).unwrap();
    lab.serve_pods().unwrap();
    // A NIC shows its driver frames as they were on the wire; a veth shows what its other end has put off: checksums
    // and tags.
    for host in [lab.client(), lab.router(), lab.remote()] {
        host.exec("ethtool -K eth0 tx off").unwrap();
    }
    for node in lab.nodes() {
        node.netns
            .exec("ethtool -K eth0 rxvlan off tx off")
            .unwrap();
    }
    let ports = wake_ports(&lab);
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_nodes(&lab).unwrap();
    manifests.write_pool().unwrap();
    manifests
        .write_service("web", landfall_lab::address::vips(0), Policy::Local)
        .unwrap();
    manifests.write_endpoints("web", lab.pods()).unwrap();
    for node in lab.nodes() {
        let program = lab
            .speaker(&node.name)
            .unwrap()
            .option("--manifests", lab.manifests_dir().display())
            .option("--delivery", "native")
            .option("--xdp", "eth0");
        lab.start(&node.name, SPEAKER, &program).unwrap();
    }
    (lab, ports)
}

fn eventually(what: &str, mut come: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !come() {
        assert!(begun.elapsed() < PATIENCE, "not yet: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// How many frames a node's driver has sent by itself.
fn sent_by_driver(node: &Netns) -> u64 {
    node.exec("ethtool -S eth0")
        .unwrap()
        .lines()
        .filter_map(|line| line.trim().split_once("_xdp_tx: "))
        .map(|(_, count)| count.parse::<u64>().unwrap())
        .sum()
}

/// An established flow, and the pod at its end.
struct Flow {
    stream: BufReader<TcpStream>,
    pod: String,
}

impl Flow {
    fn open(from: &Netns, to: SocketAddr) -> Option<Self> {
        let stream = from
            .run(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)))
            .ok()?;
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut flow = Self {
            stream: BufReader::new(stream),
            pod: String::new(),
        };
        flow.pod = flow.ask("who")?;
        Some(flow)
    }

    /// Sends a line; the pod that sends it back, with its name in front.
    fn ask(&mut self, line: &str) -> Option<String> {
        self.stream
            .get_mut()
            .write_all(format!("{line}\n").as_bytes())
            .ok()?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer).ok()?;
        let (pod, rest) = answer.trim_end().split_once(' ')?;
        assert_eq!(rest, line, "what was sent comes back");
        Some(pod.to_owned())
    }
}

/// On the segment and routed, both families: every pod is used, no flow changes its pod, the leader's driver sends.
#[test]
fn flows_pass_a_leader_whose_driver_steers() {
    let (lab, _ports) = build();
    for node in lab.nodes() {
        eventually("XDP on every node", || {
            lab.speaker_metrics(&node.name).is_ok_and(|text| {
                text.contains("landfall_datapath_attached{interface=\"eth0\",hook=\"xdp\"} 1")
            })
        });
    }
    let pods: BTreeSet<String> = lab.pods().map(|pod| pod.name.clone()).collect();
    for vip in landfall_lab::address::vips(0) {
        for from in [lab.client(), lab.remote()] {
            let to = (vip, LINES).into();
            let mut seen = BTreeSet::new();
            eventually("served by all pods", || {
                seen.extend(Flow::open(from, to).map(|flow| flow.pod));
                seen == pods
            });
            let leader = leader(&lab, vip);
            let (driver, noted) = (
                sent_by_driver(&lab.node(&leader).unwrap().netns),
                steered(&lab, &leader),
            );
            let mut flows: Vec<Flow> = (0..FLOWS)
                .map(|_| Flow::open(from, to).expect("a connection"))
                .collect();
            for round in 0..ROUNDS {
                for flow in &mut flows {
                    let line = format!("{round} {}", "x".repeat(1 + round * 400));
                    assert_eq!(flow.ask(&line).as_ref(), Some(&flow.pod));
                }
            }
            let elsewhere = flows
                .iter()
                .filter(|flow| !flow.pod.starts_with(&format!("{leader}-")))
                .count();
            let by_driver = sent_by_driver(&lab.node(&leader).unwrap().netns) - driver;
            let noted = steered(&lab, &leader) - noted;
            println!(
                "{vip} from {}: {elsewhere} of {FLOWS} flows on other nodes, {noted} packets steered, {by_driver} by the driver",
                from.name()
            );
            // At least the SYN, an ACK and a line a round of each; all that was steered was so by the driver.
            assert!(by_driver >= (elsewhere * (ROUNDS + 2)) as u64);
            assert_eq!(noted, by_driver, "each packet is noted once");
        }
    }
}

fn leader(lab: &Lab, vip: IpAddr) -> String {
    let answers = who_answers(lab, vip, Duration::from_millis(300)).unwrap();
    assert_eq!(answers.len(), 1, "{answers:?}");
    answers.into_keys().next().unwrap()
}

/// Packets that a node's programs have sent to other nodes.
fn steered(lab: &Lab, node: &str) -> u64 {
    let text = lab.speaker_metrics(node).unwrap();
    text.lines()
        .find_map(|line| line.strip_prefix("landfall_datapath_packets_total{verdict=\"steered\"} "))
        .unwrap()
        .parse()
        .unwrap()
}
