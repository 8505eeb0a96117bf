//! What is refused, with which reason, and what the message says to do.

use super::world::*;
use crate::ip::Family;
use crate::model::{Protocol, Service, ServicePort, TrafficPolicy};

fn mk_shared(name: &str, key: &str, port: u16) -> Service {
    let mut service = mk_service(name);
    service.request.sharing_key = Some(key.into());
    service.ports = vec![ServicePort {
        name: String::new(),
        protocol: Protocol::Tcp,
        port,
        node_port: None,
    }];
    service
}

/// Name, edit, condition, and what the message must contain.
type Case = (&'static str, fn(&mut Service), &'static str, &'static str);

#[test]
fn each_refusal_has_a_reason_and_a_cure() {
    let cases: Vec<Case> = vec![
        (
            "malformed",
            |s| {
                s.request.malformed =
                    Some("landfall.dev/ips: \"x\" is no address: write 192.0.2.1".into());
            },
            "False MalformedRequest",
            "write 192.0.2.1",
        ),
        (
            "two",
            |s| s.request.addresses = addresses(&["192.0.2.1", "192.0.2.2"]),
            "False MalformedRequest",
            "at most one",
        ),
        (
            "family",
            |s| s.request.addresses = addresses(&["fd00::1"]),
            "False WrongFamily",
            "spec.ipFamilies",
        ),
        (
            "pool",
            |s| s.request.pool = Some("nope".into()),
            "False UnknownPool",
            "create it",
        ),
        (
            "outside",
            |s| s.request.addresses = addresses(&["203.0.113.1"]),
            "False AddressNotInPool",
            "add it",
        ),
        (
            "mismatch",
            |s| {
                s.request.addresses = addresses(&["192.0.2.1"]);
                s.request.pool = Some("b".into());
            },
            "False AddressNotInPool",
            "drop one",
        ),
        (
            "taken",
            |s| s.request.addresses = addresses(&["192.0.2.0"]),
            "False AddressInUse",
            "sharing key",
        ),
        (
            "v6",
            |s| s.families = vec![Family::V6],
            "False NoPoolOfFamily",
            "IPv6 range",
        ),
    ];
    let mut world = World::with_pools(vec![
        mk_pool("a", &["192.0.2.0/30"]),
        mk_pool("b", &["198.51.100.0/30"]),
    ]);
    world.service(mk_service("first"));
    for (name, edit, condition, cure) in cases {
        let mut service = mk_service(name);
        edit(&mut service);
        world.service(service);
        assert_eq!(world.condition(name), condition, "{name}");
        assert!(
            world.message(name).contains(cure),
            "{name}: {}",
            world.message(name)
        );
        assert!(world.shown(name).is_empty());
    }
    let told = world.notices.len();
    world.restart();
    assert_eq!(world.notices.len(), told, "a restart repeats no Event");
}

#[test]
fn sharing_needs_key_ports_and_backend() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    world.service(mk_shared("s1", "k", 80));
    world.service(mk_shared("s2", "k", 443));
    assert_eq!(
        world.shown("s2"),
        ["192.0.2.0"],
        "Services of one key meet by themselves"
    );
    // The same port, another key, no key: an address of its own.
    for (name, service) in [
        ("s3", mk_shared("s3", "k", 80)),
        ("s4", mk_shared("s4", "other", 81)),
        ("s5", mk_service("s5")),
    ] {
        world.service(service);
        assert_ne!(world.shown(name), ["192.0.2.0"], "{name}");
    }
    // On request the reason is said.
    let mut port = mk_shared("port", "k", 443);
    port.request.addresses = addresses(&["192.0.2.0"]);
    world.service(port);
    assert_eq!(world.condition("port"), "False SharingConflict");
    assert!(world.message("port").contains("443/TCP"));
    let mut local = mk_shared("local", "k", 444);
    local.request.addresses = addresses(&["192.0.2.0"]);
    local.traffic_policy = TrafficPolicy::Local;
    local.selector.insert("app".into(), "x".into());
    world.service(local);
    assert_eq!(world.condition("local"), "False SharingConflict");
    assert!(world.message("local").contains("externalTrafficPolicy"));
    world.check();
    world.restart();
    world.check();
}

#[test]
fn local_services_share_with_the_same_selector() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    for (name, port, app) in [("s1", 80, "x"), ("s2", 443, "x"), ("s3", 25, "y")] {
        let mut service = mk_shared(name, "k", port);
        service.traffic_policy = TrafficPolicy::Local;
        service.selector.insert("app".into(), app.into());
        world.service(service);
    }
    assert_eq!(world.shown("s2"), world.shown("s1"));
    assert_ne!(world.shown("s3"), world.shown("s1"));
    world.check();
}

#[test]
fn who_changes_into_a_conflict_leaves() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    world.service(mk_shared("s1", "k", 80));
    world.service(mk_shared("s2", "k", 443));
    world.service(mk_shared("s2", "k", 80));
    assert_eq!(world.shown("s1"), ["192.0.2.0"]);
    assert_eq!(world.shown("s2"), ["192.0.2.1"]);
    assert_eq!(world.notices.last().unwrap().1, "AddressReplaced");
    world.check();
}

#[test]
fn a_wish_that_cannot_be_granted_costs_nothing() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    world.service(mk_service("s1"));
    world.service(mk_service("s2"));
    let mut wishing = mk_service("s2");
    wishing.request.addresses = addresses(&["192.0.2.0"]);
    world.service(wishing.clone());
    assert_eq!(world.shown("s2"), ["192.0.2.1"]);
    assert_eq!(world.condition("s2"), "True AddressInUse");
    world.restart();
    assert_eq!(world.shown("s2"), ["192.0.2.1"]);
    // Granted once the other is gone and its rest is over.
    world.delete("s1");
    assert_eq!(world.condition("s2"), "True AddressResting");
    world.pass(61);
    assert_eq!(world.shown("s2"), ["192.0.2.0"]);
    wishing.request.malformed = Some("typo: mend it".into());
    world.service(wishing);
    assert_eq!(world.shown("s2"), ["192.0.2.0"]);
    assert_eq!(world.condition("s2"), "True MalformedRequest");
}
