//! The guard is there while policies are, behind our own program and in front of all others, whatever the hook.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use aya::programs::LinkOrder;
use aya::programs::loaded_programs;
use aya::programs::tc::TcAttachOptions;
use landfall_ebpf_common::tcx;
use prometheus_client::registry::Registry;

use super::super::attached::{Side as _, attach_type};
use super::super::uplink::{Side, classifier, object};
use super::super::{Attachment, Change, Config, DataPath as _, Delivery, Hook, Leaving, Worker};
use super::lifecycle::{Bpffs, Segment, attached, eventually};
use crate::datapath::egress::Surroundings;
use crate::egress::{Egress, MARK};

/// What the kernel keeps of our programs' names.
const ANSWERS: &str = "landfall_answer";
const GUARD: &str = "landfall_egress";
const OTHERS: &str = "landfall_tunnel";

fn mk_leaving(segment: &Segment) -> Change {
    Change::Egress(Some(Arc::new(Leaving {
        node: "here".into(),
        egress: Arc::new(Egress::default()),
        outside: [segment.uplink].into(),
        mark: MARK,
        around: Arc::new(Surroundings::nowhere()),
    })))
}

/// The names of the programs that look at what leaves, as far as the kernel keeps them.
fn programs(segment: &Segment) -> Vec<String> {
    let names: BTreeMap<u32, String> = loaded_programs()
        .flatten()
        .map(|it| (it.id(), it.name_as_str().unwrap_or_default().to_owned()))
        .collect();
    let ids = segment
        .node
        .run(|| tcx::programs(segment.uplink, tcx::Hook::Egress));
    let ids = ids.expect("the kernel has TCX");
    ids.iter().map(|id| names[id].clone()).collect()
}

#[test]
fn it_is_behind_ours_and_in_front_of_others() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let config = || Config {
        delivery: Delivery::Native,
        ..Config::new(bpffs.pin_dir())
    };
    let (worker, registry) = segment.start_with(config());
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    assert_eq!(programs(&segment), [ANSWERS]);
    // Another's, which is ours by another name: a tunnel's, for what leaves.
    let mut other = object(None).expect("the object loads");
    segment.node.run(|| {
        let program = classifier(&mut other, Side::Tunnel.program()).expect("the object holds it");
        program.load().expect("the verifier accepts it");
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let egress = attach_type(Side::Egress.hook());
        program
            .attach_with_options("up0", egress, options)
            .expect("the kernel has TCX");
    });
    worker.change(vec![mk_leaving(&segment)]);
    let wanted = [ANSWERS, GUARD, OTHERS];
    eventually("all in their order", || programs(&segment) == wanted);
    // The next process, which knows nothing yet, leaves it there.
    drop((worker, registry));
    let mut registry = Registry::default();
    let worker = segment.node.run(|| {
        let config = Config {
            watch: Duration::from_millis(50),
            ..config()
        };
        let worker = Worker::start(config, &mut registry);
        worker.attach(BTreeSet::from([segment.uplink]).into());
        worker
    });
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Tcx)
    });
    thread::sleep(Duration::from_millis(200));
    assert_eq!(programs(&segment), wanted);
    worker.change(vec![mk_leaving(&segment), Change::Complete]);
    thread::sleep(Duration::from_millis(200));
    assert_eq!(programs(&segment), wanted);
    worker.change(vec![Change::Egress(None)]);
    eventually("gone with the policies", || {
        programs(&segment) == [ANSWERS, OTHERS]
    });
}

#[test]
fn by_clsact_too() {
    let bpffs = Bpffs::mount();
    let segment = Segment::build();
    let (worker, _registry) = segment.start_with(Config {
        hook: Hook::Clsact,
        delivery: Delivery::Native,
        ..Config::new(bpffs.pin_dir())
    });
    let filters = || {
        let shown = segment.node.exec("tc filter show dev up0 egress");
        let shown = shown.expect("iproute2 has it");
        let at = |name: &str| shown.find(name);
        (at("landfall_answers"), at("landfall_egress_out"))
    };
    eventually("attached", || {
        attached(&worker, segment.uplink, &Attachment::Clsact)
    });
    worker.change(vec![mk_leaving(&segment)]);
    eventually(
        "one behind the other",
        || matches!(filters(), (Some(answers), Some(guard)) if answers < guard),
    );
    segment
        .node
        .exec("tc filter del dev up0 egress pref 2")
        .expect("it is there");
    eventually("put back", || filters().1.is_some());
    worker.change(vec![Change::Egress(None)]);
    eventually("gone with the policies", || {
        matches!(filters(), (Some(_), None))
    });
}
