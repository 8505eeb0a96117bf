//! Classes, foreign statuses, release and rest, restarts, drift, and what the records are for.

use std::collections::BTreeSet;

use super::world::*;
use crate::ipam::{ANNOUNCED, Config, RecordChange};
use crate::model::{Condition, Event, Ingress, Kind, Object};

#[test]
fn classes_decide_whose_a_service_is() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    for (name, class, ours) in [
        ("none", None, true),
        ("l2", Some("landfall.dev/l2"), true),
        ("else", Some("example.com/lb"), false),
    ] {
        let mut service = mk_service(name);
        service.class = class.map(Into::into);
        world.service(service);
        assert_eq!(!world.shown(name).is_empty(), ours, "{name}");
        assert_eq!(world.condition(name).is_empty(), !ours, "{name}");
    }
    let config = Config {
        class_less: false,
        ..Config::default()
    };
    let listing = world.listing();
    world.restart_with(config, listing);
    world.service(mk_service("later"));
    assert_eq!(world.condition("later"), "");
}

#[test]
fn another_controllers_ingress_is_left_alone() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    let mut foreign = mk_service("foreign");
    foreign.ingress = vec![Ingress {
        address: Some("203.0.113.9".parse().unwrap()),
        ip_mode: Some("VIP".into()),
    }];
    world.raw_service(foreign);
    assert_eq!(world.shown("foreign"), ["203.0.113.9"]);
    assert_eq!(world.condition("foreign"), "False ForeignIngress");
    // Cleared, it is ours.
    let mut cleared = world.services[&key_of("foreign")].clone();
    cleared.ingress.clear();
    world.raw_service(cleared);
    assert_eq!(world.shown("foreign"), ["192.0.2.0"]);
    // Taken over while it is ours, it is not fought over.
    let mut taken = world.services[&key_of("foreign")].clone();
    taken.ingress = vec![Ingress {
        address: Some("203.0.113.9".parse().unwrap()),
        ip_mode: Some("VIP".into()),
    }];
    world.raw_service(taken);
    assert_eq!(world.shown("foreign"), ["203.0.113.9"]);
    assert_eq!(world.condition("foreign"), "False ForeignIngress");
}

#[test]
fn a_wiped_status_is_written_again_without_another_event() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    world.service(mk_service("web"));
    let told = world.notices.len();
    let mut wiped = world.services[&key_of("web")].clone();
    wiped.ingress.clear();
    world.raw_service(wiped);
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    assert_eq!(world.notices.len(), told);
}

#[test]
fn freed_addresses_rest_but_their_former_owner_has_them_back() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0-192.0.2.1"])]);
    world.service(mk_service("s1"));
    world.service(mk_service("s2"));
    world.delete("s1");
    let counts = world.statuses["a"].v4;
    assert_eq!(
        (counts.assigned, counts.quarantined, counts.available),
        (1, 1, 0)
    );
    world.service(mk_service("s3"));
    assert_eq!(world.condition("s3"), "False PoolExhausted");
    // The rest is on record: a new process knows of it.
    world.restart();
    assert_eq!(world.condition("s3"), "False PoolExhausted");
    world.service(mk_service("s1"));
    assert_eq!(world.shown("s1"), ["192.0.2.0"]);
    world.delete("s1");
    world.pass(59);
    assert_eq!(world.condition("s3"), "False PoolExhausted");
    assert!(world.ipam.next_wakeup().is_some());
    world.pass(1);
    assert_eq!(world.shown("s3"), ["192.0.2.0"]);
    world.check();
}

#[test]
fn no_quarantine_still_waits_for_the_record_to_go() {
    let mut pool = mk_pool("a", &["192.0.2.0/32"]);
    pool.quarantine = std::time::Duration::ZERO;
    let mut world = World::with_pools(vec![pool]);
    world.service(mk_service("s1"));
    world.service(mk_service("s2"));
    let key = key_of("s1");
    world.services.remove(&key);
    let now = world.now;
    world
        .ipam
        .apply(Event::Delete(crate::model::ObjectId::Service(key)), now);
    let changes = world.ipam.reconcile(now);
    assert_eq!(
        changes.records,
        [RecordChange::Remove("192.0.2.0".parse().unwrap())]
    );
    assert!(world.ipam.reconcile(now).is_empty());
    world.write(changes);
    world.settle();
    assert_eq!(world.shown("s2"), ["192.0.2.0"]);
}

#[test]
fn a_type_change_clears_what_we_wrote() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    world.service(mk_service("web"));
    let mut internal = mk_service("web");
    internal.load_balancer = false;
    world.service(internal);
    assert!(world.shown("web").is_empty());
    assert_eq!(world.condition("web"), "");
    assert!(
        world
            .virtual_ips
            .values()
            .all(|vip| vip.services.is_empty())
    );
    world.pass(60);
    assert!(world.virtual_ips.is_empty());
}

#[test]
fn a_status_waits_for_its_record() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    let service = mk_service("web");
    world.services.insert(service.key.clone(), service.clone());
    let now = world.now;
    world
        .ipam
        .apply(Event::Apply(Object::Service(service)), now);
    let changes = world.ipam.reconcile(now);
    assert_eq!((changes.records.len(), changes.services.len()), (1, 0));
    assert!(
        world.ipam.reconcile(now).is_empty(),
        "nothing is asked for twice"
    );
    world.write(changes);
    let changes = world.ipam.reconcile(now);
    assert_eq!((changes.records.len(), changes.services.len()), (0, 1));
    world.write(changes);
    assert!(world.ipam.reconcile(now).is_empty());
}

#[test]
fn a_record_without_a_status_is_kept_over_a_restart() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29"])]);
    for name in ["s1", "s2"] {
        let service = mk_service(name);
        world.services.insert(service.key.clone(), service.clone());
        world
            .ipam
            .apply(Event::Apply(Object::Service(service)), world.now);
    }
    let changes = world.ipam.reconcile(world.now);
    // The process dies after the second record was written.
    world.write_record(changes.records[1].clone());
    let earlier = mk_service("a0");
    world.services.insert(earlier.key.clone(), earlier);
    world.restart();
    assert_eq!(world.shown("s2"), ["192.0.2.1"]);
    assert_eq!(world.shown("a0"), ["192.0.2.0"]);
    assert_eq!(world.shown("s1"), ["192.0.2.2"]);
    world.check();
}

#[test]
fn leftover_records_rest_and_go() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/32"])]);
    world.service(mk_service("s1"));
    let key = key_of("s1");
    world.services.remove(&key);
    world.restart();
    world.service(mk_service("s2"));
    assert_eq!(world.condition("s2"), "False PoolExhausted");
    world.pass(60);
    assert_eq!(world.shown("s2"), ["192.0.2.0"]);
}

#[test]
fn a_deleted_record_is_written_again() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/32"])]);
    world.service(mk_service("s1"));
    let address = "192.0.2.0".parse().unwrap();
    world.virtual_ips.remove(&address);
    let now = world.now;
    world.ipam.apply(
        Event::Delete(crate::model::ObjectId::VirtualIp(address)),
        now,
    );
    world.settle();
    world.check();
}

#[test]
fn announced_is_mirrored_only_once_it_was_false() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/32"])]);
    world.service(mk_service("web"));
    let writes = world.writes;
    let announced = |world: &mut World, status: &str| {
        let mut vip = world.virtual_ips.values().next().unwrap().clone();
        vip.conditions = vec![Condition {
            kind: "Announced".into(),
            status: status.into(),
            reason: "NoEligibleNode".into(),
            message: "n1: down".into(),
        }];
        world.virtual_ips.insert(vip.address, vip.clone());
        world.apply(Object::VirtualIp(vip));
        let service = &world.services[&key_of("web")];
        service
            .conditions
            .iter()
            .find(|c| c.kind == ANNOUNCED)
            .map(|c| (c.status.clone(), c.message.clone()))
    };
    assert_eq!(announced(&mut world, "True"), None);
    assert_eq!(world.writes, writes);
    let bad = announced(&mut world, "False").unwrap();
    assert_eq!(bad, ("False".into(), "192.0.2.0: n1: down".into()));
    assert_eq!(announced(&mut world, "True").unwrap().0, "True");
    world.restart();
    assert_eq!(world.services[&key_of("web")].conditions.len(), 2);
}

#[test]
fn manifests_need_no_namespaces() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/32"])]);
    let config = Config {
        kinds: BTreeSet::from([Kind::Service, Kind::Pool, Kind::VirtualIp]),
        ..Config::default()
    };
    world.namespaces.clear();
    let listing = world.listing();
    world.restart_with(config, listing);
    world.service(mk_service("elsewhere/web"));
    assert_eq!(world.shown("elsewhere/web"), ["192.0.2.0"]);
}
