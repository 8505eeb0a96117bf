//! What sending a packet on to another node costs on the wire: `make bench-ingress`.
//!
//! ```text
//!  generator ──g0──b0── a node: drops at the traffic classifier          (TCX)
//!            ──g1──b1──  steers there, back by the interface it came in by
//!            ──g2──b2──  passes up to the real kube-proxy's nftables rules: DNAT to a pod of another node, masquerade
//!            ──g3──b3──  drops at the driver                              (XDP)
//!            ──g4──b4──  steers there
//! ```
//!
//! All in one run, a piece of each in turn, from one thread on one core: the frame's whole way, to where the generator
//! drops what comes back, is in the sender's time. What a way costs is its time less the drop's at the same hook in the
//! same round. Frames are UDP over IPv4, 64 bytes with their checksum, of 256 flows that each way has seen before.
//! Prints a table, and writes it with what `cost` found (`target/bench/test-run.json`) to `target/bench/ingress.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use landfall_core::model::Protocol;
use landfall_ebpf_common::constant::{self, Hook};
use landfall_lab::raw::flood;
use landfall_lab::{Netns, Topology};
use landfall_speaker::datapath::{
    self, Attachment, Change, DataPath, NodeId, NodeState, PortId, PortState, Reach, VipState,
};
use landfall_tests::{Cluster, objects};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

const ROUNDS: usize = 25;
const FRAMES: usize = 64 * 1024;
const FLOWS: u16 = 256;
const PORT: u16 = 5000;
const SERVICES: u32 = 1000;
/// The node whose ways are measured, and the pod of the other that kube-proxy sends to.
const NODE: &str = "node1";
const POD: &str = "node2-pod0";
/// The VIP of what kube-proxy delivers; the others follow it.
const VIP: u32 = 0x0a58_0800;

/// The nodes to choose from.
const OTHERS: [&str; 3] = ["other", "third", "fourth"];

/// The ways, by the number of their link.
const WAYS: [&str; 5] = [
    "drop (TCX)",
    "steer (TCX)",
    "nftables",
    "drop (XDP)",
    "steer (XDP)",
];

fn main() -> anyhow::Result<()> {
    let cluster = Cluster::build(Topology {
        nodes: 2,
        ..Topology::default()
    })?;
    let links = Links::build(&cluster)?;
    let steering = links.steer(&cluster)?;
    let mut results = BTreeMap::new();
    let mut made = 0;
    for services in [1, SERVICES] {
        cluster.block_on(create(&cluster, made..services))?;
        made = services;
        await_rules(&links.node, services)?;
        for number in 0..services {
            links.know(&steering, Ipv4Addr::from(0x0a59_0000 + number).into());
        }
        eprintln!("measuring with {services} Services …");
        let rounds = links.measure(&steering)?;
        let summary = summarise(&rounds);
        print_table(services, &summary);
        results.insert(services.to_string(), summary);
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench/ingress.json");
    let test_run = file.with_file_name("test-run.json");
    let test_run: Value = match std::fs::read(&test_run) {
        Ok(text) => serde_json::from_slice(&text)?,
        Err(_) => Value::Null,
    };
    std::fs::create_dir_all(file.parent().context("it has one")?)?;
    let whole = json!({"test_run": test_run, "wire_by_services": results});
    std::fs::write(&file, serde_json::to_string_pretty(&whole)?)?;
    println!("written to {}", file.canonicalize()?.display());
    Ok(())
}

/// Services of the other node's pod, with addresses as a controller would write them.
async fn create(cluster: &Cluster, numbers: std::ops::Range<u32>) -> anyhow::Result<()> {
    let client = cluster.client().await?;
    let services: Api<Service> = Api::default_namespaced(client);
    for number in numbers {
        let name = format!("s{number}");
        let spec = json!({
            "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "selector": {"pod": POD},
            "ports": [{"name": "udp", "protocol": "UDP", "port": PORT, "targetPort": PORT}],
            "allocateLoadBalancerNodePorts": false,
        });
        services
            .create(&PostParams::default(), &objects::service(&name, spec))
            .await?;
        let vip = Ipv4Addr::from(VIP + number).to_string();
        let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": vip}]}}});
        services
            .patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
            .await?;
    }
    Ok(())
}

/// Waits until kube-proxy has the rules of all Services.
fn await_rules(node: &Netns, services: u32) -> anyhow::Result<()> {
    let begun = Instant::now();
    let last = Ipv4Addr::from(VIP + services - 1).to_string();
    loop {
        let elements = node
            .exec("nft list map ip kube-proxy service-ips")
            .unwrap_or_default();
        // With an endpoint it is a jump to a chain of the Service's.
        if elements.contains(&format!("{last} . udp . {PORT} : goto external-")) {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "kube-proxy has no rules for {last}: {elements}"
        );
        thread::sleep(Duration::from_millis(200));
    }
}

/// Five cables between a generator and a node.
struct Links {
    node: Netns,
    generator: Netns,
    /// The indexes of their ends.
    at_node: [u32; 5],
    at_generator: [u32; 5],
    /// What drops, as long as it is here.
    _drops: Vec<std::os::fd::OwnedFd>,
}

fn mac(link: usize, node: bool) -> [u8; 6] {
    [2, 0, 0, 9, u8::from(node), u8::try_from(link).expect("few")]
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Links {
    fn build(cluster: &Cluster) -> anyhow::Result<Self> {
        let node = cluster.lab().node(NODE)?.netns.share();
        let generator = Netns::create("generator")?;
        let (mut at_node, mut at_generator) = ([0; 5], [0; 5]);
        for link in 0..WAYS.len() {
            let (here, there) = (format!("b{link}"), format!("g{link}"));
            node.veth(&here, &generator, &there)?;
            node.ip(&format!(
                "link set {here} address {} up",
                text(mac(link, true))
            ))?;
            generator.ip(&format!(
                "link set {there} address {} up",
                text(mac(link, false))
            ))?;
            node.exec(&format!("ethtool -K {here} gro off rxvlan off"))?;
            generator.exec(&format!("ethtool -K {there} gro off tx off"))?;
            at_node[link] = node.interface_index(&here)?;
            at_generator[link] = generator.interface_index(&there)?;
        }
        // The way of kube-proxy's: what it has translated goes back to the generator, as if the pod were there.
        let pod = cluster
            .lab()
            .pods()
            .find(|pod| pod.name == POD)
            .context("the lab has it")?
            .addresses[0];
        node.ip_batch(&format!(
            "address add 10.99.2.1/24 dev b2\n\
             neigh replace 10.99.2.2 lladdr {} dev b2 nud permanent\n\
             route replace {pod}/32 via 10.99.2.2 dev b2\n",
            text(mac(2, false))
        ))?;
        node.sysctl("net.ipv4.conf.all.send_redirects", "0")?;
        node.sysctl("net.ipv4.conf.b2.send_redirects", "0")?;
        let mut drops = Vec::new();
        for (at, hook, interface) in [
            (&node, Hook::Tcx, at_node[0]),
            (&generator, Hook::Tcx, at_generator[1]),
            (&generator, Hook::Tcx, at_generator[2]),
            (&node, Hook::Xdp, at_node[3]),
            (&generator, Hook::Xdp, at_generator[4]),
        ] {
            drops.push(at.run(|| constant::drop_all(hook, interface))?);
        }
        Ok(Self {
            node,
            generator,
            at_node,
            at_generator,
            _drops: drops,
        })
    }

    /// Starts the data path on the two links that steer.
    fn steer(&self, cluster: &Cluster) -> anyhow::Result<impl DataPath + use<>> {
        let config = datapath::Config {
            xdp: ["b4".to_owned()].into(),
            ..datapath::Config::new(cluster.lab().mount_pins()?.join("bench"))
        };
        let mut registry = Registry::default();
        let datapath = self.node.run(|| datapath::start(config, &mut registry));
        datapath.attach(BTreeSet::from([self.at_node[1], self.at_node[4]]).into());
        datapath.change(vec![Change::Complete]);
        for link in [1, 4] {
            for (place, name) in (1..).zip(OTHERS) {
                let id = NodeId {
                    name: name.into(),
                    interface: self.at_node[link],
                };
                let node = NodeState {
                    alive: true,
                    steers: true,
                    mac: Some([2, 0, 0, 8, place, mac(link, false)[5]]),
                    ..NodeState::default()
                };
                datapath.change(vec![Change::Node(id, Some(node))]);
            }
            self.serve(&datapath, vip_of(link), link);
        }
        let begun = Instant::now();
        loop {
            let at = datapath.attachments();
            if [1, 4]
                .iter()
                .all(|link| at.get(&self.at_node[*link]) == Some(&Attachment::Tcx))
                && self.driver_runs()?
            {
                return Ok(datapath);
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "the data path is not attached: {at:?}"
            );
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn driver_runs(&self) -> anyhow::Result<bool> {
        let links: Value = serde_json::from_str(&self.node.ip("-j -d link show b4")?)?;
        Ok(links[0]["xdp"]["mode"] == 1)
    }

    /// A VIP that is spread over other nodes.
    fn serve(&self, datapath: &impl DataPath, vip: IpAddr, link: usize) {
        let port = PortState {
            nodes: OTHERS.map(|name| (name.into(), 1)).into(),
            reach: Reach::by(self.at_node[link]),
            ..PortState::default()
        };
        let id = PortId {
            vip,
            protocol: Protocol::Udp,
            port: PORT,
        };
        let vip_state = VipState {
            steer: true,
            udp_port: None,
        };
        datapath.change(vec![
            Change::Port(id, Some(port)),
            Change::Vip(vip, Some(vip_state)),
        ]);
    }

    /// One VIP more that nobody asks for.
    fn know(&self, datapath: &impl DataPath, vip: IpAddr) {
        self.serve(datapath, vip, 1);
    }

    /// Frames of all flows to a link's VIP.
    fn frames(link: usize) -> Vec<Vec<u8>> {
        let to = match vip_of(link) {
            IpAddr::V4(vip) => vip,
            IpAddr::V6(_) => unreachable!("they are of IPv4"),
        };
        (0..FLOWS)
            .map(|flow| {
                let mut frame = mac(link, true).to_vec();
                frame.extend(mac(link, false));
                frame.extend([8, 0]);
                let mut header = vec![0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17, 0, 0];
                header.extend([10, 99, 2, 2]);
                header.extend(to.octets());
                let sum: u32 = header
                    .chunks(2)
                    .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
                    .sum();
                let sum = (sum & 0xffff) + (sum >> 16);
                let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("folded");
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend(header);
                frame.extend((20_000 + flow).to_be_bytes());
                frame.extend(PORT.to_be_bytes());
                frame.extend([0, 26, 0, 0]);
                frame.extend([0; 18]);
                frame
            })
            .collect()
    }

    /// Nanoseconds a frame of each way, by round.
    fn measure(&self, datapath: &impl DataPath) -> anyhow::Result<Vec<[f64; 5]>> {
        let frames: Vec<Vec<Vec<u8>>> = (0..WAYS.len()).map(Self::frames).collect();
        self.generator.run(|| {
            let mut core = nix::sched::CpuSet::new();
            core.set(1.min(thread::available_parallelism()?.get() - 1))?;
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &core)?;
            let mut rounds = Vec::new();
            for round in 0..=ROUNDS {
                let mut times = [0.0; 5];
                for link in 0..WAYS.len() {
                    let before = self.arrived(datapath, link)?;
                    let took = flood(self.at_generator[link], &frames[link], FRAMES)?;
                    times[link] = took.as_secs_f64() * 1e9 / f64::from(u32::try_from(FRAMES)?);
                    let arrived = self.arrived(datapath, link)? - before;
                    ensure!(
                        arrived >= u64::try_from(FRAMES)?,
                        "{}: {arrived} of {FRAMES} frames went the whole way",
                        WAYS[link]
                    );
                }
                // The first round warms up, and makes the flows known.
                if round > 0 {
                    rounds.push(times);
                }
            }
            Ok(rounds)
        })
    }

    /// How many frames of a way went all of it: back to the generator, as its link counts, or as our program does.
    fn arrived(&self, datapath: &impl DataPath, link: usize) -> anyhow::Result<u64> {
        if let 1 | 4 = link {
            let counts = datapath.counts();
            return Ok(counts.get(&vip_of(link)).map_or(0, |count| count.packets));
        }
        let (at, name) = match link {
            2 => (&self.generator, "g2".to_owned()),
            _ => (&self.node, format!("b{link}")),
        };
        let text = at.ip(&format!("-j -s link show {name}"))?;
        let links: Value = serde_json::from_str(&text)?;
        links[0]["stats64"]["rx"]["packets"]
            .as_u64()
            .context("ip counts packets")
    }
}

/// The VIP that a link's frames are for.
fn vip_of(link: usize) -> IpAddr {
    let number = match link {
        2 => VIP,
        link => VIP + 0x0001_0000 + u32::try_from(link).expect("few"),
    };
    Ipv4Addr::from(number).into()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Medians over the rounds: of each way, of what it costs over the drop, and of ratios within a round.
fn summarise(rounds: &[[f64; 5]]) -> Value {
    let of = |way: fn(&[f64; 5]) -> f64| median(rounds.iter().map(way).collect());
    json!({
        "rounds": rounds.len(),
        "frames_a_round": FRAMES,
        "ns_per_frame": {
            "drop_tcx": of(|r| r[0]), "steer_tcx": of(|r| r[1]), "nftables": of(|r| r[2]),
            "drop_xdp": of(|r| r[3]), "steer_xdp": of(|r| r[4]),
        },
        "net_ns": {
            "steer_tcx": of(|r| r[1] - r[0]), "nftables": of(|r| r[2] - r[0]), "steer_xdp": of(|r| r[4] - r[3]),
        },
        "net_of_nftables": {
            "steer_tcx": of(|r| (r[1] - r[0]) / (r[2] - r[0])),
            "steer_xdp": of(|r| (r[4] - r[3]) / (r[2] - r[0])),
        },
        "packets_per_second_over_nftables": {
            "steer_tcx": of(|r| r[2] / r[1]), "steer_xdp": of(|r| r[2] / r[4]),
        },
    })
}

fn print_table(services: u32, summary: &Value) {
    let number = |path: &str| {
        summary
            .pointer(path)
            .and_then(Value::as_f64)
            .unwrap_or(f64::NAN)
    };
    println!("\n{services} Services; medians of {ROUNDS} rounds of {FRAMES} frames");
    println!(
        "{:<14} {:>9} {:>9} {:>16} {:>14}",
        "way", "ns", "net ns", "net of nftables", "pps × nftables"
    );
    for (name, key) in
        WAYS.iter()
            .zip(["drop_tcx", "steer_tcx", "nftables", "drop_xdp", "steer_xdp"])
    {
        let cell = |value: f64, digits: usize| {
            if value.is_nan() {
                String::new()
            } else {
                format!("{value:.digits$}")
            }
        };
        println!(
            "{name:<14} {:>9} {:>9} {:>16} {:>14}",
            cell(number(&format!("/ns_per_frame/{key}")), 0),
            cell(number(&format!("/net_ns/{key}")), 0),
            cell(number(&format!("/net_of_nftables/{key}")), 2),
            cell(
                number(&format!("/packets_per_second_over_nftables/{key}")),
                2
            ),
        );
    }
    for (goal, key, met) in [
        (
            "steering's net cost at most 1/4 of nftables'",
            "net_of_nftables",
            (|v| v <= 0.25) as fn(f64) -> bool,
        ),
        (
            "at least twice its packets a second",
            "packets_per_second_over_nftables",
            |v| v >= 2.0,
        ),
    ] {
        for hook in ["tcx", "xdp"] {
            let value = number(&format!("/{key}/steer_{hook}"));
            println!(
                "goal, {hook}: {goal}: {value:.2}, {}",
                if met(value) { "met" } else { "not met" }
            );
        }
    }
}
