//! What the program costs a packet, by `BPF_PROG_TEST_RUN`; what tables cost to build, and to hold. For people: nothing
//! is asserted about time. Prints tables, and writes `target/bench/test-run.json` for `make bench-ingress`.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Instant;

use aya::{TestRun, TestRunOptions};
use landfall_core::model::{NodeName, Protocol};
use landfall_ebpf_common::UPLINK_INGRESS;
use serde_json::{Value, json};

use super::super::layout::SHAPES;
use super::super::uplink::classifier;
use super::super::{Change, NodeId, NodeState, PortState, Reach, VipState};
use super::golden::{NODES, Program, mk, mk_port};
use super::packets::{ACK, SYN, mk_tcp, mk_udp};

const REPEAT: u32 = 200_000;
/// Another interface than that of the frames: the test device runs the same frame again and again, and what was sent to
/// a node must not look as if it came from there.
const INTERFACE: u32 = 2;

impl Program {
    /// Nanoseconds a run, the best of five times many.
    fn cost(&mut self, frame: &[u8]) -> u32 {
        let mut once = || {
            let result = classifier(&mut self.ebpf, UPLINK_INGRESS)
                .expect("the object holds it")
                .test_run(TestRunOptions {
                    data_in: Some(frame),
                    repeat: REPEAT,
                    ..Default::default()
                })
                .expect("the kernel runs it");
            u32::try_from(result.duration.as_nanos()).expect("short")
        };
        (0..5).map(|_| once()).min().expect("five times")
    }

    fn know(&mut self, name: &str, number: u16, alive: bool) {
        let id = NodeId {
            name: name.into(),
            interface: INTERFACE,
        };
        let [high, low] = number.to_be_bytes();
        let state = NodeState {
            here: name == "here",
            alive,
            steers: true,
            mac: Some([2, 0, 0, 0, 2 + high, low]),
            ..NodeState::default()
        };
        self.change(&Change::Node(id, Some(state)));
    }

    /// The program with so many Services on so many nodes, this one among them.
    fn with(services: u32, nodes: u16) -> Self {
        let mut program = Self::load();
        let names: BTreeMap<NodeName, u16> =
            (0..nodes).map(|it| (name(it).as_str().into(), 1)).collect();
        for number in 0..nodes {
            program.know(&name(number), number, true);
        }
        for number in 1..=services {
            program.serve(vip(number), &names);
        }
        program
    }

    fn serve(&mut self, vip: IpAddr, nodes: &BTreeMap<NodeName, u16>) {
        let steer = VipState {
            steer: true,
            udp_port: None,
        };
        self.change(&Change::Vip(vip, Some(steer)));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let state = PortState {
                nodes: nodes.clone(),
                reach: Reach::by(INTERFACE),
                udp_ports: true,
                ..mk_port(&[])
            };
            self.port(vip, protocol, 80, state);
        }
    }
}

fn name(number: u16) -> String {
    NODES
        .get(usize::from(number))
        .map_or_else(|| format!("node-{number}"), |name| (*name).to_owned())
}

fn vip(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a40_0000 + number).into()
}

fn write(key: &str, value: &Value) {
    write_to("test-run.json", key, value);
}

/// Adds figures to a file, under a name.
pub(super) fn write_to(name: &str, key: &str, value: &Value) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    fs::create_dir_all(&directory).expect("the target directory is ours");
    let file = directory.join(name);
    let mut whole: Value = fs::read(&file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_else(|| json!({}));
    whole[key] = value.clone();
    let text = serde_json::to_string_pretty(&whole).expect("JSON");
    fs::write(&file, text).expect("the target directory is ours");
    println!("written to {}", file.display());
}

#[test]
fn cost() {
    const WAYS: [&str; 8] = [
        "another host's",
        "not a VIP",
        "counted only",
        "UDP steered",
        "TCP new steered",
        "TCP steered",
        "UDP delivered",
        "TCP delivered",
    ];
    print!("{:>8} {:>5}", "Services", "nodes");
    for way in WAYS {
        print!(" {way:>15}");
    }
    println!();
    let mut rows = Vec::new();
    for services in [1_u32, 1_000, 10_000] {
        for nodes in [3, 8, 20] {
            let mut program = Program::with(services, nodes);
            let vip = vip(services.div_ceil(2));
            let counted: IpAddr = Ipv4Addr::new(192, 0, 2, 201).into();
            let mut port_of = |protocol: u8, sent: bool| {
                (1024..u16::MAX)
                    .find(|port| {
                        let payload = if protocol == 6 {
                            mk_tcp(*port, 80, SYN)
                        } else {
                            mk_udp(*port, 80, b"x")
                        };
                        (program.raw(&mk(vip, protocol, &payload)).0 == 7) == sent
                    })
                    .expect("there are many ports")
            };
            let ports = [
                port_of(17, true),
                port_of(6, true),
                port_of(17, false),
                port_of(6, false),
            ];
            let not_ours = Ipv4Addr::new(192, 0, 2, 99).into();
            let mut others = mk(vip, 6, &mk_tcp(1, 80, ACK));
            others[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
            let frames = [
                others,
                mk(not_ours, 6, &mk_tcp(1, 80, ACK)),
                mk(counted, 6, &mk_tcp(1, 80, ACK)),
                mk(vip, 17, &mk_udp(ports[0], 80, b"x")),
                mk(vip, 6, &mk_tcp(ports[1], 80, SYN)),
                mk(vip, 6, &mk_tcp(ports[1], 80, ACK)),
                mk(vip, 17, &mk_udp(ports[2], 80, b"x")),
                mk(vip, 6, &mk_tcp(ports[3], 80, ACK)),
            ];
            // Looking for the ports has opened the flow that is delivered; one more, and it is established.
            assert_eq!(program.raw(&frames[7]).0, u32::MAX);
            let figures = frames.map(|frame| program.cost(&frame));
            print!("{services:>8} {nodes:>5}");
            for figure in figures {
                print!(" {figure:>12} ns");
            }
            println!();
            let by_way: BTreeMap<&str, u32> = WAYS.into_iter().zip(figures).collect();
            rows.push(json!({"services": services, "nodes": nodes, "ns": by_way}));
            if services == 10_000 && nodes == 3 {
                let most = figures[3..6].iter().max().expect("three");
                let met = if *most <= 100 { "met" } else { "not met" };
                println!(
                    "goal: at most 100 ns a steered packet: {most} ns, {met}; what is looked at and left: {} ns",
                    figures[0]
                );
            }
        }
    }
    write("ns_per_packet", &rows.into());
}

#[test]
fn cost_of_a_rebuild() {
    const MANY: u16 = 500;
    let mut program = Program::with(0, MANY);
    let names: BTreeMap<NodeName, u16> =
        (0..MANY).map(|it| (name(it).as_str().into(), 1)).collect();
    let mut timed = |work: &mut dyn FnMut(&mut Program)| {
        let begun = Instant::now();
        work(&mut program);
        begun.elapsed().as_secs_f64() * 1e3
    };
    let full = timed(&mut |program| {
        let state = PortState {
            nodes: names.clone(),
            reach: Reach::by(INTERFACE),
            ..mk_port(&[])
        };
        program.port(vip(1), Protocol::Tcp, 80, state);
    });
    let death = timed(&mut |program| program.know("node-77", 77, false));
    let mut fewer = names.clone();
    fewer.remove(&"node-77".into());
    let without = timed(&mut |program| {
        let state = PortState {
            nodes: fewer.clone(),
            reach: Reach::by(INTERFACE),
            ..mk_port(&[])
        };
        program.port(vip(1), Protocol::Tcp, 80, state);
    });
    println!(
        "a port over {MANY} nodes: built in {full:.1} ms; a node's death {death:.3} ms, the table without it {without:.1} ms"
    );
    write(
        "rebuild_ms",
        &json!({"nodes": MANY, "full": full, "death": death, "without_the_dead": without}),
    );
}

#[test]
fn cost_in_memory() {
    let empty = memory();
    let program = Program::with(10_000, 8);
    let full = memory();
    drop(program);
    // A program with nothing but what the tests load it with.
    let program = Program::load();
    let base = memory();
    drop(program);
    println!(
        "{:<10} {:>12} {:>14}",
        "map", "default KiB", "10 000 Services KiB"
    );
    let mut maps = BTreeMap::new();
    for shape in SHAPES {
        let [none, some, many] =
            [&empty, &base, &full].map(|all| all.get(shape.name).copied().unwrap_or_default());
        let (some, many) = (some - none, many - none);
        println!("{:<10} {:>12} {:>14}", shape.name, some / 1024, many / 1024);
        maps.insert(shape.name, json!({"default": some, "services_10000": many}));
    }
    let sum = |key: &str| -> u64 { maps.values().filter_map(|map| map[key].as_u64()).sum() };
    let (default, many) = (sum("default"), sum("services_10000"));
    println!("{:<10} {:>12} {:>14}", "all", default / 1024, many / 1024);
    write(
        "map_bytes",
        &json!({"maps": maps, "default": default, "services_10000": many}),
    );
}

/// What the kernel holds for the maps that this process has open, by name.
fn memory() -> BTreeMap<&'static str, u64> {
    let mut sums = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fdinfo")
        .expect("proc is mounted")
        .flatten()
    {
        let Ok(text) = fs::read_to_string(entry.path()) else {
            continue;
        };
        let field = |name: &str| -> Option<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse().ok()
        };
        let Some(memlock) = field("memlock:") else {
            continue;
        };
        let (kind, key, value, entries) = (
            field("map_type:"),
            field("key_size:"),
            field("value_size:"),
            field("max_entries:"),
        );
        let shape = SHAPES.iter().find(|shape| {
            kind == Some(shape.kind as u64)
                && key == Some(shape.key as u64)
                && value == Some(shape.value as u64)
                && entries == Some(u64::from(shape.entries))
        });
        if let Some(shape) = shape {
            *sums.entry(shape.name).or_default() += memlock;
        }
    }
    sums
}
