//! The program at the driver: attached where it can be, refused with a reason, watched, inherited, taken off.

use std::collections::BTreeSet;

use aya::programs::XdpMode;
use landfall_core::model::Protocol;
use landfall_ebpf_common::link::Link;
use landfall_ebpf_common::{LAYOUT, Verdict};
use landfall_lab::Mac;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::super::driver::driver;
use super::super::uplink::object;
use super::super::worker::lock;
use super::super::{
    Attachment, Change, Config, DataPath as _, NodeId, NodeState, PortId, PortState, Reach,
    VipState, Worker, uninstall,
};
use super::lifecycle::{Bpffs, NODE_MAC, Segment, VIP, attached, eventually, packets};

/// A station beside the client, which takes the frames that the node sends on.
const OTHER: Mac = Mac([2, 0, 0, 0, 0, 12]);

/// A segment on which drivers see frames as they were sent, and take what a driver sends.
fn mk_segment() -> Segment {
    let segment = Segment::build();
    segment
        .node
        .exec("ethtool -K up0 rxvlan off")
        .expect("veth can");
    segment
        .client
        .exec("ethtool -K eth0 gro on")
        .expect("veth can");
    segment
}

fn start(segment: &Segment, bpffs: &Bpffs, xdp: &[&str]) -> (Worker, Registry) {
    segment.start_with(Config {
        xdp: xdp.iter().map(|name| (*name).to_owned()).collect(),
        ..Config::new(bpffs.pin_dir())
    })
}

/// Everything to the VIP belongs to the other station.
fn serve_elsewhere(worker: &Worker, interface: u32) {
    let id = NodeId {
        name: "other".into(),
        interface,
    };
    let node = NodeState {
        alive: true,
        steers: true,
        mac: Some(OTHER.0),
        ..NodeState::default()
    };
    let port = PortState {
        nodes: [("other".into(), 1)].into(),
        reach: Reach::by(interface),
        ..PortState::default()
    };
    let id_of_port = PortId {
        vip: VIP,
        protocol: Protocol::Udp,
        port: 9,
    };
    let steer = VipState {
        steer: true,
        udp_port: None,
    };
    worker.change(vec![
        Change::Node(id, Some(node)),
        Change::Port(id_of_port, Some(port)),
        Change::Vip(VIP, Some(steer)),
    ]);
}

fn text(registry: &Registry) -> String {
    let mut text = String::new();
    encode(&mut text, registry).expect("a string takes it");
    text
}

/// What is reported of the interface's driver.
fn reported(registry: &Registry, interface: &str, value: u8) -> bool {
    text(registry).contains(&format!(
        "datapath_attached{{interface=\"{interface}\",hook=\"xdp\"}} {value}\n"
    ))
}

/// Frames that the driver itself has sent.
fn sent_by_driver(segment: &Segment) -> u64 {
    let shown = segment
        .node
        .exec("ethtool -S up0")
        .expect("veth has counters");
    shown
        .lines()
        .filter_map(|line| line.trim().strip_prefix("rx_queue_0_xdp_tx: "))
        .map(|count| count.parse::<u64>().expect("a number"))
        .sum()
}

/// The program at the driver, by number; nothing if there is none, or it runs behind the driver.
fn program(segment: &Segment) -> Option<u64> {
    let text = segment.node.ip("-j -d link show up0").expect("it is there");
    let links: serde_json::Value = serde_json::from_str(&text).expect("ip speaks JSON");
    let xdp = &links[0]["xdp"];
    (xdp["mode"] == 1).then(|| xdp["prog"]["id"].as_u64().expect("a number"))
}

fn steered(worker: &Worker) -> u64 {
    let tables = lock(&worker.shared.tables);
    let verdicts = tables.as_ref().expect("they are loaded").verdicts();
    verdicts[Verdict::Steered as usize]
}

#[test]
fn the_driver_sends_on_what_is_anothers_and_each_is_counted_once() {
    let bpffs = Bpffs::mount();
    let segment = mk_segment();
    let (worker, registry) = start(&segment, &bpffs, &["up0", "absent0"]);
    eventually("attached", || reported(&registry, "up0", 1));
    assert!(attached(&worker, segment.uplink, &Attachment::Tcx));
    assert!(program(&segment).is_some());
    serve_elsewhere(&worker, segment.uplink);
    segment.send(1);
    eventually("steered", || {
        segment.send(1);
        sent_by_driver(&segment) > 0
    });
    let (before, by_driver, verdicts) =
        (packets(&worker), sent_by_driver(&segment), steered(&worker));
    segment.send(20);
    eventually("sent", || sent_by_driver(&segment) == by_driver + 20);
    assert_eq!(packets(&worker), before + 20);
    assert_eq!(steered(&worker), verdicts + 20);
    // The interface gets another address: what is sent to it is ours, what is sent to the old one is not.
    segment
        .node
        .ip("link set up0 address 02:00:00:00:00:77")
        .expect("it can");
    segment
        .client
        .ip(&format!(
            "neigh replace {VIP} lladdr 02:00:00:00:00:77 dev eth0"
        ))
        .expect("it can");
    let by_driver = sent_by_driver(&segment);
    eventually("told", || {
        segment.send(1);
        sent_by_driver(&segment) > by_driver
    });
    segment
        .client
        .ip(&format!("neigh replace {VIP} lladdr {NODE_MAC} dev eth0"))
        .expect("it can");
    let by_driver = sent_by_driver(&segment);
    segment.send(5);
    assert_eq!(sent_by_driver(&segment), by_driver);
}

#[test]
fn what_stands_against_it_is_said_and_the_uplink_steers_all_the_same() {
    let bpffs = Bpffs::mount();
    let segment = mk_segment();
    // Tags are taken out before XDP.
    segment
        .node
        .exec("ethtool -K up0 rxvlan on")
        .expect("veth can");
    let (worker, registry) = start(&segment, &bpffs, &["up0"]);
    let reason = |worker: &Worker| match lock(&worker.shared.drivers).get(&segment.uplink) {
        Some(Attachment::Absent { reason }) => reason.clone(),
        _ => String::new(),
    };
    eventually("refused", || reason(&worker).contains("rxvlan off"));
    assert!(reported(&registry, "up0", 0));
    assert!(attached(&worker, segment.uplink, &Attachment::Tcx));
    assert_eq!(program(&segment), None);
    segment.send(2);
    assert_eq!(packets(&worker), 2);

    // The slot is taken.
    let mut foreign = segment.node.run(|| {
        let mut ebpf = object(None).expect("the object loads");
        let program = driver(&mut ebpf).expect("the object holds it");
        program.load().expect("the verifier accepts it");
        program
            .attach("up0", XdpMode::Driver)
            .expect("the slot is free");
        ebpf
    });
    let theirs = program(&segment);
    assert!(theirs.is_some());
    segment
        .node
        .exec("ethtool -K up0 rxvlan off")
        .expect("veth can");
    eventually("refused", || {
        reason(&worker).contains("another XDP program")
    });
    assert_eq!(program(&segment), theirs, "it is left where it is");
    // It goes: then there is room.
    driver(&mut foreign)
        .expect("the object holds it")
        .unload()
        .expect("it was loaded");
    drop(foreign);
    eventually("attached", || reported(&registry, "up0", 1));
    assert_ne!(program(&segment), theirs);
    // And tags again.
    segment
        .node
        .exec("ethtool -K up0 rxvlan on")
        .expect("veth can");
    eventually("taken off", || program(&segment).is_none());
    assert!(reason(&worker).contains("rxvlan off"));
    drop(worker);

    // A driver that cannot.
    segment
        .node
        .ip("link add br0 type bridge")
        .and_then(|_| segment.node.ip("link set br0 up"))
        .expect("a bridge");
    let bridge = segment.node.interface_index("br0").expect("it is there");
    let (worker, registry) = start(&segment, &bpffs, &["br0"]);
    worker.attach(BTreeSet::from([segment.uplink, bridge]).into());
    eventually("refused", || {
        matches!(
            lock(&worker.shared.drivers).get(&bridge),
            Some(Attachment::Absent { reason }) if reason.contains("no native XDP")
        )
    });
    assert!(reported(&registry, "br0", 0));
    assert!(attached(&worker, bridge, &Attachment::Tcx));
}

#[test]
fn it_outlives_the_process_comes_back_and_goes_when_it_is_not_wanted() {
    let bpffs = Bpffs::mount();
    let segment = mk_segment();
    let (worker, registry) = start(&segment, &bpffs, &["up0"]);
    eventually("attached", || reported(&registry, "up0", 1));
    let first = program(&segment).expect("at the driver");
    drop(worker);
    assert_eq!(program(&segment), Some(first), "it stays");

    let (worker, registry) = start(&segment, &bpffs, &["up0"]);
    eventually("inherited", || reported(&registry, "up0", 1));
    let second = program(&segment).expect("at the driver");
    assert_ne!(first, second, "the new process's own");
    serve_elsewhere(&worker, segment.uplink);
    eventually("sent on", || {
        segment.send(1);
        sent_by_driver(&segment) > 0
    });

    // Somebody takes it off.
    let pin = bpffs
        .pin_dir()
        .join(format!("layout-{LAYOUT}/links/{}-xdp", segment.uplink));
    Link::open(&pin)
        .and_then(|link| link.detach())
        .expect("the pin is there");
    eventually("attached again", || program(&segment).is_some());
    eventually("reported", || {
        text(&registry).contains("cause=\"removed\"} 1")
    });

    // The uplink is left, then wanted again.
    worker.attach(BTreeSet::new().into());
    eventually("left", || program(&segment).is_none());
    worker.attach(BTreeSet::from([segment.uplink]).into());
    eventually("back", || program(&segment).is_some());
    drop(worker);

    // The user does not say so any more.
    let (worker, _registry) = start(&segment, &bpffs, &[]);
    eventually("taken off", || program(&segment).is_none());
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    assert!(!pin.exists());
    drop(worker);

    let (worker, registry) = start(&segment, &bpffs, &["up0"]);
    eventually("attached", || reported(&registry, "up0", 1));
    drop(worker);
    let removed = segment
        .node
        .run(|| uninstall(&bpffs.pin_dir()))
        .expect("everything can be removed");
    assert_eq!(removed.links, 2, "the uplink's and its driver's");
    assert_eq!(program(&segment), None);
    assert!(!bpffs.pin_dir().exists());
}
