//! Where both sides of an uplink have a program of ours: other people's run as if ours were not there.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use aya::Ebpf;
use aya::programs::LinkOrder;
use aya::programs::tc::TcAttachOptions;
use aya::sys::{Stats, enable_stats};
use landfall_core::model::Protocol;
use landfall_ebpf_common::tcx;

use super::super::attached::{Side as _, attach_type};
use super::super::uplink::{Side, classifier, object};
use super::super::{
    Attachment, Change, Config, DataPath as _, Delivery, Native, NodeId, NodeState, PortId,
    PortState, Reach, VipState,
};
use super::lifecycle::{Bpffs, Segment, VIP, attached, eventually};

const ENDPOINT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 244, 0, 10)), 7777);
const PORT: u16 = 9;
const DATAGRAMS: u64 = 50;
const SIDES: [(Side, tcx::Hook); 2] = [
    (Side::Ingress, tcx::Hook::Ingress),
    (Side::Egress, tcx::Hook::Egress),
];

/// Another's program at one side: ours once more, with maps of its own, so that it leaves everything alone.
struct Foreign {
    ebpf: Ebpf,
    side: Side,
}

impl Foreign {
    fn attach(segment: &Segment, side: Side, order: LinkOrder) -> Self {
        segment.node.run(|| {
            let mut ebpf = object(None).expect("the object loads");
            let program = classifier(&mut ebpf, side.program()).expect("the object holds it");
            program.load().expect("the verifier accepts it");
            let options = TcAttachOptions::TcxOrder(order);
            program
                .attach_with_options("up0", attach_type(side.hook()), options)
                .expect("the kernel has TCX");
            Self { ebpf, side }
        })
    }

    fn id(&mut self) -> u32 {
        self.info().id()
    }

    /// How often it has run while that was counted.
    fn runs(&mut self) -> u64 {
        self.info().run_count()
    }

    fn info(&mut self) -> aya::programs::ProgramInfo {
        let program = classifier(&mut self.ebpf, self.side.program());
        let program = program.expect("the object holds it");
        program.info().expect("the kernel tells")
    }
}

/// What is to be delivered to the endpoint.
fn mk_changes(uplink: u32) -> Vec<Change> {
    let node = NodeId {
        name: "here".into(),
        interface: uplink,
    };
    let state = NodeState {
        here: true,
        alive: true,
        steers: true,
        ..NodeState::default()
    };
    let port = PortState {
        nodes: BTreeMap::from([("here".into(), 1)]),
        here: true,
        reach: Reach::by(uplink),
        native: Some(Native {
            endpoints: [ENDPOINT].into(),
            ranges: None,
        }),
        ..PortState::default()
    };
    let id = PortId {
        vip: VIP,
        protocol: Protocol::Udp,
        port: PORT,
    };
    let steered = VipState {
        steer: true,
        udp_port: None,
    };
    vec![
        Change::Node(node, Some(state)),
        Change::Vip(VIP, Some(steered)),
        Change::Port(id, Some(port)),
    ]
}

#[test]
fn other_programs_run_before_and_after_translation() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    segment
        .node
        .ip(&format!("addr add {}/32 dev lo", ENDPOINT.ip()))
        .expect("an address");
    let before = SIDES.map(|(side, _)| Foreign::attach(&segment, side, LinkOrder::first()));
    let (worker, _registry) = segment.start_with(Config {
        delivery: Delivery::Native,
        ..Config::new(bpffs.pin_dir())
    });
    worker.change(mk_changes(segment.uplink));
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    let after = SIDES.map(|(side, _)| Foreign::attach(&segment, side, LinkOrder::first()));
    let mut others: Vec<Foreign> = before.into_iter().chain(after).collect();
    // Ours is first again, and none of theirs is gone.
    let theirs: Vec<u32> = others.iter_mut().map(Foreign::id).collect();
    eventually("first again on both sides", || {
        SIDES.iter().all(|(_, hook)| {
            let programs = segment.node.run(|| tcx::programs(segment.uplink, *hook));
            let programs = programs.expect("the kernel has TCX");
            programs.len() == 3 && !theirs.contains(&programs[0])
        })
    });

    let server = segment
        .node
        .run(|| UdpSocket::bind(ENDPOINT))
        .expect("a socket");
    let client = segment.client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        socket.connect((VIP, PORT)).expect("the way is there");
        socket
    });
    for socket in [&server, &client] {
        let patience = Some(Duration::from_secs(10));
        socket.set_read_timeout(patience).expect("no zero");
    }
    let _counted = enable_stats(Stats::RunTime).expect("the kernel counts runs");
    let counts: Vec<u64> = others.iter_mut().map(Foreign::runs).collect();
    let mut buffer = [0; 16];
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 16];
            for _ in 0..DATAGRAMS {
                let (length, from) = server.recv_from(&mut buffer).expect("it is delivered");
                server.send_to(&buffer[..length], from).expect("sent");
            }
        });
        for number in 0..DATAGRAMS {
            client.send(&number.to_be_bytes()).expect("sent");
            // A connected socket takes answers from the VIP alone.
            let length = client.recv(&mut buffer).expect("it is answered");
            assert_eq!(buffer[..length], number.to_be_bytes());
        }
    });
    for (other, before) in others.iter_mut().zip(counts) {
        let ran = other.runs() - before;
        println!("{:?}: {ran} times", other.side);
        assert!(ran >= DATAGRAMS, "{:?}: {ran} times", other.side);
    }
}
