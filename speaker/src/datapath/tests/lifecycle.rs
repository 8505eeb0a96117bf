//! Attaching, living with others, outliving the process, being adopted, leaving nothing.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, TcAttachType};
use landfall_ebpf_common::{LAYOUT, UPLINK_INGRESS, map, tcx};
use landfall_lab::raw::send_frame;
use landfall_lab::{Mac, Netns};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::super::layout::SHAPES;
use super::super::pins::Pins;
use super::super::tables::Tables;
use super::super::uplink::{classifier, object};
use super::super::{
    Attachment, Change, Config, DataPath, Delivery, Hook, Removed, VipCount, VipState, Worker,
    uninstall,
};
use super::packets::{mk_frame, mk_v4, mk_v6};

pub(super) const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 88, 0, 200));

pub(super) const NODE_MAC: Mac = Mac([2, 0, 0, 0, 0, 11]);

/// A bpf file system of the test's own.
pub(super) struct Bpffs(tempfile::TempDir);

impl Bpffs {
    pub(super) fn mount() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        mount(
            Some("bpf"),
            directory.path(),
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("these tests mount a bpf file system and need root");
        Self(directory)
    }

    pub(super) fn pin_dir(&self) -> PathBuf {
        self.0.path().join("landfall")
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// A node with an uplink, and a client at the other end of it.
pub(super) struct Segment {
    pub(super) node: Netns,
    pub(super) client: Netns,
    pub(super) uplink: u32,
}

impl Segment {
    pub(super) fn build() -> Self {
        let node = Netns::create("node").expect("these tests make namespaces and need root");
        let client = Netns::create("client").expect("a second one");
        node.veth("up0", &client, "eth0").expect("a veth pair");
        node.ip("addr add 10.88.0.11/24 dev up0")
            .expect("an address");
        client
            .ip("addr add 10.88.0.100/24 dev eth0")
            .expect("an address");
        node.ip(&format!("link set up0 address {NODE_MAC}"))
            .expect("a MAC of its own");
        client
            .ip(&format!("neigh add {VIP} lladdr {NODE_MAC} dev eth0"))
            .expect("a neighbour");
        let uplink = node.interface_index("up0").expect("the link is there");
        Self {
            node,
            client,
            uplink,
        }
    }

    /// Sends datagrams to the VIP; they have arrived when this returns.
    pub(super) fn send(&self, count: u32) {
        self.client.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            for _ in 0..count {
                socket
                    .send_to(b"landfall", (VIP, 9))
                    .expect("the way is there");
            }
        });
        thread::sleep(Duration::from_millis(20));
    }

    /// Sends a frame to the node's MAC.
    pub(super) fn send_frame(&self, frame: &[u8]) {
        let mut frame = frame.to_vec();
        frame[..6].copy_from_slice(&NODE_MAC.0);
        let interface = self
            .client
            .interface_index("eth0")
            .expect("the link is there");
        self.client
            .run(|| send_frame(interface, &frame))
            .expect("the link takes it");
    }

    fn programs(&self) -> Vec<u32> {
        self.node
            .run(|| tcx::programs(self.uplink, tcx::Hook::Ingress).expect("the kernel has TCX"))
    }

    fn start(&self, pin_dir: &Path, hook: Hook) -> (Worker, Registry) {
        self.start_with(Config {
            hook,
            ..Config::new(pin_dir)
        })
    }

    pub(super) fn start_with(&self, config: Config) -> (Worker, Registry) {
        let config = Config {
            watch: Duration::from_millis(100),
            ..config
        };
        self.node.run(|| {
            let mut registry = Registry::default();
            let worker = Worker::start(config, &mut registry);
            worker.attach(BTreeSet::from([self.uplink]).into());
            worker.change(vec![
                Change::Vip(VIP, Some(VipState::default())),
                Change::Complete,
            ]);
            (worker, registry)
        })
    }

    /// Another's program at the uplink: ours once more, with a map of its own, so that it tells what it saw.
    fn foreign(&self, order: LinkOrder) -> Foreign {
        self.node.run(|| {
            let mut ebpf = object(None).expect("the object loads");
            let mut tables = Tables::adopt(&mut ebpf, false).expect("the object holds the maps");
            tables
                .change(&Change::Vip(VIP, Some(VipState::default())))
                .expect("the map has room");
            let program = classifier(&mut ebpf, UPLINK_INGRESS).expect("the object holds it");
            program.load().expect("the verifier accepts it");
            program
                .attach_with_options(
                    "up0",
                    TcAttachType::Ingress,
                    TcAttachOptions::TcxOrder(order),
                )
                .expect("the kernel has TCX");
            Foreign {
                _ebpf: ebpf,
                tables,
            }
        })
    }
}

struct Foreign {
    _ebpf: Ebpf,
    tables: Tables,
}

impl Foreign {
    fn packets(&self) -> u64 {
        self.tables.counts()[&VIP].packets
    }
}

pub(super) fn packets(worker: &Worker) -> u64 {
    worker
        .counts()
        .get(&VIP)
        .copied()
        .unwrap_or(VipCount::default())
        .packets
}

pub(super) fn eventually(what: &str, mut come: impl FnMut() -> bool) {
    let start = Instant::now();
    while !come() {
        assert!(start.elapsed() < Duration::from_secs(10), "not yet: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

pub(super) fn attached(worker: &Worker, interface: u32, attachment: &Attachment) -> bool {
    worker.attachments().get(&interface) == Some(attachment)
}

#[test]
fn it_is_first_and_others_run_behind_it() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let before = segment.foreign(LinkOrder::first());
    let (worker, registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    let after = segment.foreign(LinkOrder::last());
    let programs = segment.programs();
    assert_eq!(programs.len(), 3);

    segment.send(7);
    assert_eq!(packets(&worker), 7);
    assert_eq!(
        worker.counts()[&VIP].bytes,
        7 * (14 + 20 + 8 + 8),
        "link-layer header, IPv4, UDP, payload"
    );
    assert_eq!((before.packets(), after.packets()), (7, 7));
    let mut text = String::new();
    encode(&mut text, &registry).expect("a string takes it");
    assert!(
        text.contains("vip_received_packets_total{vip=\"10.88.0.200\"} 7"),
        "{text}"
    );
    assert!(
        text.contains("datapath_attached{interface=\"up0\",hook=\"tcx\"} 1"),
        "{text}"
    );
}

#[test]
fn tagged_and_truncated_frames_are_not_counted() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let (worker, _registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    let whole = mk_frame(
        0x0800,
        &mk_v4("10.88.0.200".parse().expect("a literal address")),
    );
    // The kernel takes the tag out of the frame before our hook: this is the tag in the metadata.
    let mut tagged = whole[..12].to_vec();
    tagged.extend([0x81, 0, 0, 7]);
    tagged.extend(&whole[12..]);
    let mut frames = vec![tagged];
    frames.extend((15..34).map(|length| whole[..length].to_vec()));
    let other = mk_frame(0x86dd, &mk_v6("fd00:88::200".parse().expect("a literal")));
    frames.extend((15..54).map(|length| other[..length].to_vec()));

    let before = received(&segment.node, "up0");
    for frame in &frames {
        segment.send_frame(frame);
    }
    eventually("they arrived", || {
        received(&segment.node, "up0") >= before + frames.len() as u64
    });
    assert_eq!(packets(&worker), 0);
    segment.send_frame(&whole);
    eventually("the whole one counts", || packets(&worker) == 1);
}

fn received(netns: &Netns, interface: &str) -> u64 {
    let text = netns
        .ip(&format!("-j -s link show {interface}"))
        .expect("the link is there");
    let links: serde_json::Value = serde_json::from_str(&text).expect("ip speaks JSON");
    links[0]["stats64"]["rx"]["packets"]
        .as_u64()
        .expect("a number")
}

#[test]
fn it_outlives_the_process_and_the_next_one_adopts_it() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let (worker, _registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    segment.send(3);
    // What a killed process does not do is to take anything away; neither does one that ends.
    drop(worker);
    let left = segment.programs();
    assert_eq!(left.len(), 1, "it stays attached");
    segment.send(4);

    let (worker, _registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("adopted", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    assert_eq!(segment.programs().len(), 1, "one program, not two");
    assert_ne!(segment.programs(), left, "the new process's own");
    segment.send(5);
    assert_eq!(packets(&worker), 3 + 4 + 5);

    // A VIP that goes is forgotten; an uplink that goes is left.
    worker.change(vec![Change::Vip(VIP, None)]);
    worker.attach(BTreeSet::new().into());
    eventually("detached", || segment.programs().is_empty());
    assert!(worker.counts().is_empty());
}

#[test]
fn what_goes_in_front_or_takes_it_away_is_answered_within_a_second() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let (worker, registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    let ours = segment.programs();
    let foreign = segment.foreign(LinkOrder::first());
    eventually("first again", || segment.programs().first() == ours.first());
    segment.send(2);
    assert_eq!(
        (packets(&worker), foreign.packets()),
        (2, 2),
        "the other still runs"
    );

    let pin = bpffs
        .pin_dir()
        .join(format!("layout-{LAYOUT}/links"))
        .join(format!("{}-ingress", segment.uplink));
    fs::remove_file(pin).expect("the pin is there");
    eventually("attached again", || {
        segment.programs().first() == ours.first()
    });
    eventually("reported", || {
        let mut text = String::new();
        encode(&mut text, &registry).expect("a string takes it");
        text.contains("cause=\"overtaken\"} 1") && text.contains("cause=\"removed\"} 1")
    });
}

#[test]
fn uninstalling_leaves_nothing() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let (worker, _registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    drop(worker);
    // Another version's, too.
    let other = bpffs.pin_dir().join("layout-999/links");
    fs::create_dir_all(&other).expect("bpffs has directories");

    let removed = segment
        .node
        .run(|| uninstall(&bpffs.pin_dir()))
        .expect("everything can be removed");
    assert_eq!(
        removed,
        Removed {
            links: 1,
            maps: SHAPES.len(),
            filters: 0,
            qdiscs: 0,
        }
    );
    assert!(segment.programs().is_empty());
    assert!(!bpffs.pin_dir().exists());
    let shown = segment
        .node
        .exec("bpftool net show dev up0")
        .expect("bpftool is installed");
    assert!(!shown.contains("landfall"), "{shown}");
    // Twice is no error.
    let again = segment
        .node
        .run(|| uninstall(&bpffs.pin_dir()))
        .expect("nothing to do");
    assert_eq!(again, Removed::default());
}

#[test]
fn another_layout_is_replaced_and_a_misfit_is_refused() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let other = bpffs.pin_dir().join("layout-999/links");
    fs::create_dir_all(&other).expect("bpffs has directories");
    let (worker, _registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("the other is gone", || !other.exists());
    drop(worker);
    segment
        .node
        .run(|| uninstall(&bpffs.pin_dir()))
        .expect("everything can be removed");

    // Under our number lies what is no map at all.
    fs::create_dir_all(
        bpffs
            .pin_dir()
            .join(format!("layout-{LAYOUT}"))
            .join(map::VIPS),
    )
    .expect("bpffs has directories");
    let (worker, _registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("refused", || {
        matches!(
            worker.attachments().get(&segment.uplink),
            Some(Attachment::Absent { reason }) if reason.contains("uninstall")
        )
    });
    assert!(segment.programs().is_empty());
}

#[test]
fn without_a_bpf_file_system_the_reason_says_what_to_do() {
    let segment = Segment::build();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (worker, _registry) = segment.start(&directory.path().join("landfall"), Hook::Auto);
    eventually("refused", || {
        matches!(
            worker.attachments().get(&segment.uplink),
            Some(Attachment::Absent { reason }) if reason.contains("mount -t bpf")
        )
    });
    assert!(worker.counts().is_empty());
}

#[test]
fn an_uplink_that_goes_is_absent_and_its_successor_attached() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let (worker, _registry) = segment.start(&bpffs.pin_dir(), Hook::Auto);
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    segment.node.ip("link del up0").expect("the link is there");
    eventually("absent", || {
        matches!(
            worker.attachments().get(&segment.uplink),
            Some(Attachment::Absent { .. })
        )
    });
    segment
        .node
        .veth("up0", &segment.client, "eth0")
        .expect("a veth pair");
    let successor = segment
        .node
        .interface_index("up0")
        .expect("the link is there");
    worker.attach(BTreeSet::from([successor]).into());
    eventually("attached", || {
        attached(&worker, successor, &Attachment::Tcx)
    });
}

#[test]
fn clsact_does_the_same_below_6_6() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let (worker, registry) = segment.start(&bpffs.pin_dir(), Hook::Clsact);
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Clsact)
    });
    segment.send(3);
    drop(worker);
    segment.send(4);
    let (worker, registry_of_second) = segment.start(&bpffs.pin_dir(), Hook::Clsact);
    drop(registry);
    eventually("adopted", || {
        attached(&worker, segment.uplink, &Attachment::Clsact)
    });
    let filters = || {
        let shown = segment
            .node
            .exec("tc filter show dev up0 ingress")
            .unwrap_or_default();
        shown.matches("handle 0x4c460001").count()
    };
    assert_eq!(filters(), 1);
    segment.send(5);
    assert_eq!(packets(&worker), 3 + 4 + 5);

    segment
        .node
        .exec("tc qdisc del dev up0 clsact")
        .expect("it is there");
    eventually("restored", || filters() == 1);
    eventually("reported", || {
        let mut text = String::new();
        encode(&mut text, &registry_of_second).expect("a string takes it");
        text.contains("cause=\"removed\"} 1")
    });
    drop(worker);
    let removed = segment
        .node
        .run(|| uninstall(&bpffs.pin_dir()))
        .expect("everything can be removed");
    assert_eq!(removed.filters, 1);
    assert_eq!(filters(), 0);
}

/// Where the programs deliver, one sees what leaves; it goes when kube-proxy is to deliver again.
#[test]
fn what_leaves_is_seen_where_the_programs_deliver() {
    for hook in [Hook::Auto, Hook::Clsact] {
        let bpffs = Bpffs::mount();
        let segment = Segment::build();
        let at_egress = || {
            let programs = segment.node.run(|| {
                tcx::programs(segment.uplink, tcx::Hook::Egress).expect("the kernel has TCX")
            });
            let filters = segment
                .node
                .exec("tc filter show dev up0 egress")
                .unwrap_or_default();
            programs.len() + filters.matches("handle 0x4c460001").count()
        };
        for (delivery, expected) in [
            (Delivery::Native, 1),
            (Delivery::Native, 1),
            (Delivery::KubeProxy, 0),
            (Delivery::Native, 1),
        ] {
            let (worker, _registry) = segment.start_with(Config {
                hook,
                delivery,
                ..Config::new(bpffs.pin_dir())
            });
            eventually("as it should be", || {
                worker
                    .attachments()
                    .get(&segment.uplink)
                    .is_some_and(|it| !matches!(it, Attachment::Absent { .. }))
                    && at_egress() == expected
            });
        }
        segment
            .node
            .run(|| uninstall(&bpffs.pin_dir()))
            .expect("everything can be removed");
        assert_eq!(at_egress(), 0);
    }
}

/// The worker and the gateway begin at the same time, each with a thread of its own.
#[test]
fn two_threads_load_beside_each_other() {
    for _ in 0..3 {
        let bpffs = Bpffs::mount();
        let load = || {
            let pins = Pins::open(&bpffs.pin_dir()).expect("the directory is made");
            object(Some(&pins))
                .map(drop)
                .map_err(|error| error.to_string())
        };
        let [one, other] = thread::scope(|scope| {
            [scope.spawn(load), scope.spawn(load)].map(|it| it.join().expect("it does not panic"))
        });
        assert_eq!((one, other), (Ok(()), Ok(())));
    }
}
