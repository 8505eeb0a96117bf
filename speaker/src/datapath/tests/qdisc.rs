//! Whose a clsact qdisc is, and when it goes.

use super::super::{Attachment, Config, Delivery, Hook, Removed, uninstall};
use super::lifecycle::{Bpffs, Segment, attached, eventually};

fn qdisc_is_there(segment: &Segment) -> bool {
    let shown = segment.node.exec("tc qdisc show dev up0");
    shown.expect("the interface is there").contains("clsact")
}

/// Runs a data path on filters, has others do something, and uninstalls.
fn uninstalled(segment: &Segment, meanwhile: Option<&str>) -> Removed {
    let bpffs = Bpffs::mount();
    for _ in 0..2 {
        // The second finds the qdisc of the first.
        let (worker, _registry) = segment.start_with(Config {
            hook: Hook::Clsact,
            delivery: Delivery::Native,
            ..Config::new(bpffs.pin_dir())
        });
        eventually("attached", || {
            attached(&worker, segment.uplink, &Attachment::Clsact)
        });
    }
    if let Some(command) = meanwhile {
        segment.node.exec(command).expect("it can be done");
    }
    let removed = segment.node.run(|| uninstall(&bpffs.pin_dir()));
    assert!(!bpffs.pin_dir().exists());
    removed.expect("everything can be removed")
}

#[test]
fn it_goes_if_it_was_made_here_and_nobody_uses_it() {
    let segment = Segment::build();
    let removed = uninstalled(&segment, None);
    assert_eq!((removed.filters, removed.qdiscs), (2, 1));
    assert!(!qdisc_is_there(&segment));
}

#[test]
fn it_stays_with_anothers_filter_on_either_side() {
    for side in ["ingress", "egress"] {
        let segment = Segment::build();
        let add = format!("tc filter add dev up0 {side} prio 9 protocol all u32 match u32 0 0");
        let removed = uninstalled(&segment, Some(&add));
        assert_eq!((removed.filters, removed.qdiscs), (2, 0), "{side}");
        assert!(qdisc_is_there(&segment), "{side}");
    }
}

#[test]
fn it_stays_if_it_was_there_before() {
    let segment = Segment::build();
    let add = segment.node.exec("tc qdisc add dev up0 clsact");
    add.expect("the kernel has it");
    let removed = uninstalled(&segment, None);
    assert_eq!((removed.filters, removed.qdiscs), (2, 0));
    assert!(qdisc_is_there(&segment));
}

#[test]
fn it_may_be_gone_already() {
    for gone in ["tc qdisc del dev up0 clsact", "ip link del up0"] {
        let segment = Segment::build();
        let removed = uninstalled(&segment, Some(gone));
        assert_eq!((removed.filters, removed.qdiscs), (0, 0), "{gone}");
    }
}
