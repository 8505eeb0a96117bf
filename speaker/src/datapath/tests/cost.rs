//! What the program costs a packet, by `BPF_PROG_TEST_RUN`. For people: nothing is asserted about time.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use aya::{TestRun, TestRunOptions};
use landfall_core::model::{NodeName, Protocol};

use super::super::uplink::classifier;
use super::super::{Change, NodeState, PortState, VipState};
use super::golden::{NODES, Program, mk, mk_id, mk_port};
use super::packets::{ACK, SYN, mk_tcp, mk_udp};

const REPEAT: u32 = 200_000;

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
}

fn mk_node(number: u8) -> NodeState {
    NodeState {
        alive: true,
        steers: true,
        mac: Some([2, 0, 0, 0, 2, number]),
        ..NodeState::default()
    }
}

#[test]
fn cost() {
    println!(
        "{:>8} {:>8} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "Services", "nodes", "not a VIP", "counted", "steered", "delivered", "UDP steered"
    );
    for services in [1_u32, 1_000, 10_000] {
        for nodes in [3_u8, 8, 20] {
            let mut program = Program::load();
            let mut names: BTreeMap<NodeName, u16> =
                NODES.into_iter().map(|node| (node.into(), 1)).collect();
            for extra in 3..nodes {
                let name = format!("node-{extra}");
                names.insert(name.as_str().into(), 1);
                program.change(&Change::Node(mk_id(&name), Some(mk_node(extra))));
            }
            let state = || PortState {
                nodes: names.clone(),
                ..mk_port(&[])
            };
            for number in 1..=services {
                let vip: IpAddr = Ipv4Addr::from(0x0a40_0000 + number).into();
                program.change(&Change::Vip(
                    vip,
                    Some(VipState {
                        steer: true,
                        udp_port: None,
                    }),
                ));
                program.port(vip, Protocol::Tcp, 80, state());
                program.port(vip, Protocol::Udp, 80, state());
            }
            let vip: IpAddr = Ipv4Addr::from(0x0a40_0000 + services.div_ceil(2)).into();
            let counted: IpAddr = Ipv4Addr::new(192, 0, 2, 201).into();
            let [here, there] = ["here", "other"].map(|node| {
                (1024..u16::MAX)
                    .find(|port| {
                        let fate = program.raw(&mk(vip, 6, &mk_tcp(*port, 80, SYN))).0;
                        (fate == 7) == (node == "other")
                    })
                    .expect("there are many ports")
            });
            let figures = [
                program.cost(&mk(
                    Ipv4Addr::new(192, 0, 2, 99).into(),
                    6,
                    &mk_tcp(1, 80, ACK),
                )),
                program.cost(&mk(counted, 6, &mk_tcp(1, 80, ACK))),
                program.cost(&mk(vip, 6, &mk_tcp(there, 80, ACK))),
                program.cost(&mk(vip, 6, &mk_tcp(here, 80, ACK))),
                program.cost(&mk(vip, 17, &mk_udp(7, 80, b"x"))),
            ];
            print!("{services:>8} {nodes:>8}");
            for figure in figures {
                print!(" {figure:>7} ns");
            }
            println!();
        }
    }
}
