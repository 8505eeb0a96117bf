//! Which pool a Service is served from.

use ipnet::IpNet;

use super::world::*;
use crate::ipam::Overlap;
use crate::model::{Node, Object, ServiceAllocation, ServiceCidr};

fn mk_rules(priority: u32) -> ServiceAllocation {
    ServiceAllocation {
        priority,
        ..ServiceAllocation::default()
    }
}

#[test]
fn lower_priority_goes_first_then_name_and_pools_without_rules_last() {
    let mut world = World::new();
    for (name, range, rules) in [
        ("a-open", "192.0.2.0/32", None),
        ("a-zero", "192.0.2.4/32", Some(mk_rules(0))),
        ("b-late", "192.0.2.1/32", Some(mk_rules(20))),
        ("z-early", "192.0.2.2/32", Some(mk_rules(10))),
        ("c-late", "192.0.2.3/32", Some(mk_rules(20))),
    ] {
        let mut pool = mk_pool(name, &[range]);
        pool.allocation = rules;
        world.pool(pool);
    }
    for (name, expected) in [
        ("s1", "192.0.2.2"),
        ("s2", "192.0.2.1"),
        ("s3", "192.0.2.3"),
        ("s4", "192.0.2.4"),
        ("s5", "192.0.2.0"),
    ] {
        world.service(mk_service(name));
        assert_eq!(world.shown(name), [expected]);
    }
}

#[test]
fn auto_assign_false_needs_a_request() {
    let mut pool = mk_pool("reserved", &["192.0.2.0/29"]);
    pool.auto_assign = false;
    let mut world = World::with_pools(vec![pool]);
    world.service(mk_service("plain"));
    assert_eq!(world.condition("plain"), "False NotAdmitted");
    let mut asking = mk_service("asking");
    asking.request.pool = Some("reserved".into());
    world.service(asking);
    assert_eq!(world.shown("asking"), ["192.0.2.0"]);
    let mut exact = mk_service("exact");
    exact.request.addresses = addresses(&["192.0.2.5"]);
    world.service(exact);
    assert_eq!(world.shown("exact"), ["192.0.2.5"]);
}

#[test]
fn buggy_addresses_are_avoided() {
    let mut pool = mk_pool("a", &["192.0.2.254-192.0.3.1"]);
    pool.avoid_buggy_ips = true;
    let mut world = World::with_pools(vec![pool]);
    for (name, expected) in [("s1", "192.0.2.254"), ("s2", "192.0.3.1")] {
        world.service(mk_service(name));
        assert_eq!(world.shown(name), [expected]);
    }
    world.service(mk_service("s3"));
    assert_eq!(world.condition("s3"), "False PoolExhausted");
    let counts = world.statuses["a"].v4;
    assert_eq!((counts.total, counts.assigned, counts.available), (2, 2, 0));
    let mut exact = mk_service("exact");
    exact.request.addresses = addresses(&["192.0.3.0"]);
    world.service(exact);
    assert!(
        world.message("exact").contains("avoidBuggyIPs"),
        "{}",
        world.message("exact")
    );
}

#[test]
fn tenancy_fails_closed_even_for_explicit_requests() {
    let mut pool = mk_pool("tenant", &["192.0.2.0/29"]);
    pool.allocation = Some(ServiceAllocation {
        namespace_selectors: vec![mk_selector("tenant", "mail")],
        ..mk_rules(0)
    });
    let mut world = World::with_pools(vec![pool]);
    // The selector matches no namespace at all: nobody is admitted.
    let mut exact = mk_service("exact");
    exact.request.addresses = addresses(&["192.0.2.1"]);
    world.service(exact);
    assert_eq!(world.condition("exact"), "False NotAdmitted");
    let mut named = mk_service("named");
    named.request.pool = Some("tenant".into());
    world.service(named);
    assert_eq!(world.condition("named"), "False NotAdmitted");
    world.service(mk_service("plain"));
    assert_eq!(world.condition("plain"), "False NotAdmitted");
    // A label on the namespace lets all three in.
    world.namespace("default", &[("tenant", "mail")]);
    assert_eq!(world.shown("exact"), ["192.0.2.1"]);
    assert_eq!(world.condition("named"), "True Assigned");
    assert_eq!(world.condition("plain"), "True Assigned");
    // And its loss takes the addresses back.
    world.namespace("default", &[]);
    assert_eq!(world.condition("exact"), "False NotAdmitted");
    assert!(world.shown("exact").is_empty());
    assert!(
        world
            .notices
            .contains(&("exact".into(), "AddressTakenBack".into()))
    );
}

#[test]
fn namespaces_and_service_selectors_must_both_match() {
    let mut pool = mk_pool("tenant", &["192.0.2.0/29"]);
    pool.allocation = Some(ServiceAllocation {
        namespaces: vec!["mail".into()],
        service_selectors: vec![mk_selector("tier", "front")],
        ..mk_rules(0)
    });
    let mut world = World::with_pools(vec![pool]);
    world.namespace("mail", &[]);
    for (name, label, admitted) in [
        ("mail/front", true, true),
        ("mail/back", false, false),
        ("default/front", true, false),
    ] {
        let mut service = mk_service(name);
        if label {
            service.labels.insert("tier".into(), "front".into());
        }
        world.service(service);
        assert_eq!(!world.shown(name).is_empty(), admitted, "{name}");
    }
}

#[test]
fn a_service_seen_before_its_namespace_waits_in_silence() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    world.service(mk_service("new/web"));
    assert_eq!(world.condition("new/web"), "");
    assert!(world.notices.is_empty());
    world.namespace("new", &[]);
    assert_eq!(world.shown("new/web"), ["192.0.2.0"]);
}

#[test]
fn overlaps_are_conditions_and_never_double_assignments() {
    let mut world = World::with_pools(vec![
        mk_pool("a", &["192.0.2.0-192.0.2.1"]),
        mk_pool("b", &["192.0.2.1-192.0.2.2"]),
        mk_pool("c", &["198.51.100.0/24"]),
    ]);
    world.apply(Object::Node(Node {
        name: "n1".into(),
        labels: std::collections::BTreeMap::new(),
        addresses: addresses(&["192.0.2.0"]),
        pod_cidrs: vec!["198.51.100.128/25".parse().unwrap()],
        network_unavailable: false,
    }));
    let overlaps = |world: &World, pool: &str| world.statuses[pool].overlaps.clone();
    assert_eq!(
        overlaps(&world, "a").into_iter().collect::<Vec<_>>(),
        [
            Overlap::Pool("b".into()),
            Overlap::Node("n1".into(), "192.0.2.0".parse().unwrap())
        ]
    );
    assert_eq!(
        overlaps(&world, "b").into_iter().collect::<Vec<_>>(),
        [Overlap::Pool("a".into())]
    );
    let of_pods = Overlap::PodCidr("n1".into(), "198.51.100.128/25".parse().unwrap());
    assert_eq!(overlaps(&world, "c"), [of_pods.clone()].into());
    let services: IpNet = "198.51.100.0/26".parse().unwrap();
    world.apply(Object::ServiceCidr(ServiceCidr {
        name: "kubernetes".into(),
        cidrs: vec![services],
    }));
    assert_eq!(
        overlaps(&world, "c"),
        [of_pods, Overlap::ServiceCidr(services)].into()
    );
    // The node's own address is handed to nobody, not even on request; the shared one to one only.
    let mut exact = mk_service("exact");
    exact.request.addresses = addresses(&["192.0.2.0"]);
    world.service(exact);
    assert_eq!(world.condition("exact"), "False AddressOfNode");
    for (name, expected) in [
        ("s1", "192.0.2.1"),
        ("s2", "192.0.2.2"),
        ("s3", "198.51.100.0"),
    ] {
        world.service(mk_service(name));
        assert_eq!(world.shown(name), [expected]);
    }
    world.check();
}

#[test]
fn edits_take_back_what_left_the_pool_and_replace_it() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/30"])]);
    world.service(mk_service("web"));
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    world.pool(mk_pool("a", &["198.51.100.0/30"]));
    assert_eq!(world.shown("web"), ["198.51.100.0"]);
    assert_eq!(world.notices.last().unwrap().1, "AddressReplaced");
    world.check();
    world.delete_pool("a");
    assert!(world.shown("web").is_empty());
    assert_eq!(world.condition("web"), "False NoPool");
    assert_eq!(world.notices.last().unwrap().1, "AddressTakenBack");
}

#[test]
fn retained_addresses_stay_over_edit_delete_and_restart() {
    let mut pool = mk_pool("a", &["192.0.2.0/30"]);
    pool.retain_assigned = true;
    let mut world = World::with_pools(vec![pool.clone()]);
    world.service(mk_service("web"));
    pool.ranges = vec!["198.51.100.0/30".parse().unwrap()];
    world.pool(pool);
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    world.restart();
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    world.delete_pool("a");
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    world.restart();
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    assert_eq!(world.notices.len(), 1);
}

#[test]
fn an_address_that_moves_to_another_pool_stays() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/30"])]);
    world.service(mk_service("web"));
    world.pool(mk_pool("b", &["192.0.2.0/29"]));
    world.delete_pool("a");
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    assert_eq!(&*world.virtual_ips[&"192.0.2.0".parse().unwrap()].pool, "b");
    assert_eq!(world.statuses["b"].v4.assigned, 1);
}

#[test]
fn a_large_pool_costs_no_scan() {
    let mut world = World::with_pools(vec![
        mk_pool("a", &["10.0.0.0/8"]),
        mk_pool("b", &["fd00::/16"]),
    ]);
    let started = std::time::Duration::ZERO;
    for number in 0..2000 {
        let service = mk_service(&format!("s{number}"));
        world.services.insert(service.key.clone(), service.clone());
        world.ipam.apply(
            crate::model::Event::Apply(Object::Service(service)),
            started,
        );
    }
    world.settle();
    assert_eq!(world.statuses["a"].v4.assigned, 2000);
    assert_eq!(world.writes, 4000, "one record and one status each");
    world.check();
}

#[test]
fn addresses_that_cannot_be_read_are_a_condition_and_take_nothing_away() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/30"])]);
    world.service(mk_service("s1"));
    assert_eq!(world.shown("s1"), ["192.0.2.0"]);

    let mut broken = mk_pool("a", &["198.51.100.0/30"]);
    broken.generation = 2;
    broken.flaw = Some("spec.addresses: backwards".into());
    world.pool(broken.clone());
    assert_eq!(world.statuses["a"].flaw, broken.flaw);
    assert_eq!(world.shown("s1"), ["192.0.2.0"]);
    world.service(mk_service("s2"));
    assert_eq!(
        world.shown("s2"),
        ["192.0.2.1"],
        "from the last good addresses"
    );

    // A controller that starts now has never seen the good ones.
    world.restart();
    assert_eq!(world.shown("s1"), ["192.0.2.0"]);
    assert_eq!(world.shown("s2"), ["192.0.2.1"]);
    world.service(mk_service("s3"));
    assert_eq!(world.shown("s3"), ["198.51.100.0"]);

    let mut good = mk_pool("a", &["198.51.100.0/30"]);
    good.generation = 3;
    world.pool(good);
    assert_eq!(world.statuses["a"].flaw, None);
    assert_eq!(
        world.shown("s1"),
        ["198.51.100.1"],
        "now it is known to be gone"
    );
}
