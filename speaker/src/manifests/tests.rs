use std::time::Duration;

use landfall_core::model::{EgressPolicy, EgressSource, Pool, Purpose};
use landfall_core::selector::{LabelSelector, Labels};

use super::*;

fn mk_policy(name: &str) -> Event {
    let mut policy = EgressPolicy::plain(name, EgressSource::of_pool("out"));
    policy.spec.pods = Some(LabelSelector::of_labels([("app", name)]));
    Event::Apply(Object::EgressPolicy(Box::new(policy)))
}

fn mk_pool() -> Event {
    Event::Apply(Object::Pool(Pool {
        name: "out".into(),
        generation: 0,
        labels: Labels::new(),
        ranges: vec!["192.0.2.0/31".parse().unwrap()],
        purpose: Purpose::Egress,
        auto_assign: true,
        avoid_buggy_ips: false,
        allocation: None,
        quarantine: Duration::from_mins(1),
        retain_assigned: false,
        flaw: None,
    }))
}

/// A process that finds these files.
fn mk_allocator(directory: &Path, files: Vec<Event>) -> Allocator {
    let (mut allocator, _) = Allocator::new(true, Some(directory)).unwrap();
    let kinds = [Kind::Service, Kind::Pool, Kind::Node, Kind::EgressPolicy];
    for event in files.into_iter().chain(kinds.map(Event::Synced)) {
        allocator.apply(event, Duration::ZERO);
    }
    allocator.reconcile(Duration::ZERO);
    allocator
}

fn of(allocator: &Allocator, policy: &str) -> Vec<String> {
    let held = |vip: &&VirtualIp| vip.egress_policies.iter().any(|name| **name == *policy);
    let vips = allocator.records.values().filter(held);
    vips.map(|vip| vip.address.to_string()).collect()
}

#[test]
fn policies_keep_their_addresses_over_restarts_and_say_what_they_lack() {
    let directory = tempfile::tempdir().unwrap();
    let allocator = mk_allocator(directory.path(), vec![mk_pool(), mk_policy("b")]);
    assert_eq!(of(&allocator, "b"), ["192.0.2.0"]);
    let files = || vec![mk_pool(), mk_policy("a"), mk_policy("b"), mk_policy("c")];
    let allocator = mk_allocator(directory.path(), files());
    assert_eq!(of(&allocator, "b"), ["192.0.2.0"]);
    assert_eq!(of(&allocator, "a"), ["192.0.2.1"]);
    let refusals = allocator.refusals();
    assert_eq!(refusals.keys().collect::<Vec<_>>(), ["c"]);
    assert!(refusals["c"].contains("no IPv4 address is available"));
    // Its file is gone: the address rests for it, over a restart too.
    let allocator = mk_allocator(directory.path(), vec![mk_pool(), mk_policy("a")]);
    let freed = &allocator.records[&"192.0.2.0".parse::<IpAddr>().unwrap()];
    assert!(freed.egress_policies.is_empty());
    assert_eq!(freed.former_policies, ["b".into()]);
    let allocator = mk_allocator(directory.path(), files());
    assert_eq!(of(&allocator, "b"), ["192.0.2.0"]);
}

#[test]
fn a_file_that_knows_no_policies_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let old = r#"[{"address": "192.0.2.0", "pool": "out", "group": "192.0.2.0", "services": [],
        "former": [{"namespace": "default", "name": "web"}], "retain": false}]"#;
    std::fs::write(directory.path().join(FILE), old).unwrap();
    let allocator = mk_allocator(directory.path(), vec![mk_pool(), mk_policy("a")]);
    assert_eq!(of(&allocator, "a"), ["192.0.2.1"], "the first rests");
}
