//! Addresses of policies that go: flows that are there keep them.

use std::net::IpAddr;
use std::sync::Arc;

use super::world::*;
use crate::ipam::RecordChange;
use crate::model::{
    EgressPolicy, EgressSource, Event, Object, ObjectId, OldFlows, Pool, Purpose, VirtualIp,
};

const FIRST: &str = "192.0.2.0";

fn mk_both(name: &str, range: &str) -> Pool {
    Pool {
        purpose: Purpose::Both,
        ..mk_pool(name, &[range])
    }
}

/// One pool, with one policy that has its first address, whose pods have so many flows there.
fn mk_world(on_delete: OldFlows, flows: u64) -> World {
    let mut world = World::with_pools(vec![mk_both("out", "192.0.2.0/30")]);
    let mut policy = mk_policy("p", of_pool("out", 1));
    policy.spec.on_delete = on_delete;
    policy.spec.gateways = Some(mk_selector("egress", "yes"));
    world.policy(policy);
    world.report(FIRST, "p", flows, false);
    world
}

fn vip<'a>(world: &'a World, address: &str) -> Option<&'a VirtualIp> {
    let address: IpAddr = address.parse().unwrap();
    world.virtual_ips.get(&address)
}

/// The policies that a record names, and of which of them flows alone are left.
fn named(world: &World, address: &str) -> (Vec<Arc<str>>, Vec<Arc<str>>) {
    let vip = vip(world, address).expect("there is a record");
    let drains = vip.terms.iter().filter(|(_, terms)| terms.drains);
    let drains = drains.map(|(name, _)| name.clone()).collect();
    (vip.egress_policies.clone(), drains)
}

fn drains(world: &World, address: &str) -> bool {
    named(world, address) == (vec!["p".into()], vec!["p".into()])
}

fn rests(world: &World, address: &str) -> bool {
    vip(world, address).is_some_and(|vip| !vip.is_held() && vip.former_policies == ["p".into()])
}

fn of_number(name: &str, address: &str) -> EgressPolicy {
    mk_policy(name, EgressSource::Addresses(addresses(&[address])))
}

#[test]
fn a_policy_that_goes_keeps_its_address_until_its_flows_have_ended() {
    let mut world = mk_world(OldFlows::Keep, 3);
    let group = vip(&world, FIRST).unwrap().group.clone();
    world.delete_policy("p");
    assert!(drains(&world, FIRST));
    let record = vip(&world, FIRST).unwrap();
    assert_eq!(record.group, group);
    let gateways = &record.terms["p"].gateways;
    assert_eq!(*gateways, Some(mk_selector("egress", "yes")));
    // It is nobody else's, whatever is asked for, and however long it takes; nor in another process.
    for restarts in [false, true] {
        if restarts {
            world.restart();
        }
        world.pass(3600);
        world.policy(of_number("q", FIRST));
        assert_eq!(world.refused("q"), "AddressInUse");
        let mut web = mk_service("web");
        web.request.addresses = addresses(&[FIRST]);
        world.service(web);
        assert_eq!(world.condition("web"), "False AddressInUse");
        world.report(FIRST, "p", 1, false);
        assert!(drains(&world, FIRST));
    }
    // A pool that goes does not take it.
    world.delete_pool("out");
    world.restart();
    assert!(drains(&world, FIRST));
    world.pool(mk_both("out", "192.0.2.0/30"));
    // Released, it rests like any.
    world.report(FIRST, "p", 0, true);
    assert!(rests(&world, FIRST));
    assert_eq!(world.statuses["out"].v4.quarantined, 1);
    world.delete("web");
    world.pass(61);
    assert_eq!(world.egress_of("q"), [FIRST]);
}

#[test]
fn a_policy_that_cuts_gives_its_address_back_at_once() {
    let mut world = mk_world(OldFlows::Cut, 3);
    assert_eq!(
        vip(&world, FIRST).unwrap().terms["p"].on_delete,
        OldFlows::Cut
    );
    world.delete_policy("p");
    assert!(rests(&world, FIRST));
    // Also if nobody was there to see it go.
    let mut world = mk_world(OldFlows::Cut, 3);
    world.policies.remove("p");
    world.restart();
    assert!(rests(&world, FIRST));
    // And what drained before goes with it.
    let mut world = mk_world(OldFlows::Keep, 3);
    let mut elsewhere = of_number("p", "192.0.2.2");
    elsewhere.spec.on_delete = OldFlows::Cut;
    world.policy(elsewhere);
    assert!(drains(&world, FIRST));
    world.delete_policy("p");
    assert!(rests(&world, FIRST));
}

#[test]
fn an_address_that_nobody_ever_led_has_no_flows() {
    let mut world = World::with_pools(vec![mk_both("out", "192.0.2.0/30")]);
    world.policy(mk_policy("p", of_pool("out", 1)));
    world.delete_policy("p");
    assert!(rests(&world, FIRST));
}

#[test]
fn a_policy_that_goes_while_no_controller_is_there_drains_all_the_same() {
    let mut world = mk_world(OldFlows::Keep, 3);
    world.policies.remove("p");
    world.restart();
    assert!(drains(&world, FIRST));
    world.report(FIRST, "p", 0, true);
    assert!(rests(&world, FIRST));
}

#[test]
fn a_policy_that_comes_again_has_its_address_and_its_flows_again() {
    let mut world = mk_world(OldFlows::Keep, 3);
    world.delete_policy("p");
    world.policy(mk_policy("p", of_pool("out", 1)));
    assert_eq!(world.egress_of("p"), [FIRST]);
    assert_eq!(named(&world, FIRST), (vec!["p".into()], vec![]));
    // What was said of the one before is not about this one.
    world.report(FIRST, "p", 0, true);
    assert_eq!(world.egress_of("p"), [FIRST]);
    // With another address it moves with the one where its flows drain.
    world.delete_policy("p");
    assert!(drains(&world, FIRST), "nor about these flows");
    world.report(FIRST, "p", 2, false);
    world.policy(of_number("p", "192.0.2.2"));
    assert!(drains(&world, FIRST));
    let group = |address| vip(&world, address).unwrap().group.clone();
    assert_eq!(group(FIRST), group("192.0.2.2"));
    world.report(FIRST, "p", 0, true);
    assert!(rests(&world, FIRST));
    assert_eq!(named(&world, "192.0.2.2"), (vec!["p".into()], vec![]));
}

#[test]
fn flows_keep_the_address_that_a_policy_exchanges() {
    let mut world = mk_world(OldFlows::Keep, 3);
    world.pool(mk_both("other", "198.51.100.0/30"));
    let group = vip(&world, FIRST).unwrap().group.clone();
    world.policy(mk_policy("p", of_pool("other", 1)));
    assert!(drains(&world, FIRST));
    assert_eq!(vip(&world, "198.51.100.0").unwrap().group, group);
    let records = world.virtual_ips.clone();
    world.restart();
    assert_eq!(world.virtual_ips, records);
    // Back again, the same address is there.
    world.report("198.51.100.0", "p", 1, false);
    world.policy(mk_policy("p", of_pool("out", 1)));
    assert_eq!(named(&world, FIRST), (vec!["p".into()], vec![]));
    assert!(drains(&world, "198.51.100.0"));
}

#[test]
fn what_a_service_has_drains_beside_it_and_after_it() {
    let mut world = World::with_pools(vec![mk_both("out", "192.0.2.0/30")]);
    world.service(mk_service("mail"));
    world.policy(mk_policy("p", EgressSource::Service(key_of("mail"))));
    world.report(FIRST, "p", 3, false);
    world.delete_policy("p");
    assert!(drains(&world, FIRST));
    assert_eq!(world.shown("mail"), [FIRST]);
    world.restart();
    assert!(drains(&world, FIRST));
    world.delete("mail");
    assert!(
        drains(&world, FIRST),
        "the Service is gone, the flows are not"
    );
    // It has it again, as it would have while it rests.
    world.restart();
    world.service(mk_service("mail"));
    assert_eq!(world.shown("mail"), [FIRST]);
    world.report(FIRST, "p", 0, true);
    assert_eq!(named(&world, FIRST), (vec![], vec![]));
    assert_eq!(world.shown("mail"), [FIRST]);
}

fn group_of(world: &World, address: &str) -> Arc<str> {
    vip(world, address).unwrap().group.clone()
}

/// A Service with the first address, and a policy whose pods leave by what it has, with flows there.
fn mk_following() -> World {
    let mut world = World::with_pools(vec![mk_both("out", "192.0.2.0/30")]);
    world.service(mk_service("mail"));
    world.policy(mk_policy("p", EgressSource::Service(key_of("mail"))));
    world.report(FIRST, "p", 3, false);
    world
}

#[test]
fn what_a_service_exchanges_moves_with_where_flows_drain() {
    let mut world = mk_following();
    let group = group_of(&world, FIRST);
    let mut moved = mk_service("mail");
    moved.request.addresses = addresses(&["192.0.2.2"]);
    world.service(moved);
    assert_eq!(world.shown("mail"), ["192.0.2.2"]);
    assert!(drains(&world, FIRST));
    assert_eq!(named(&world, "192.0.2.2"), (vec!["p".into()], vec![]));
    assert_eq!(group_of(&world, FIRST), group);
    assert_eq!(group_of(&world, "192.0.2.2"), group);
    // Nor in another process.
    let records = world.virtual_ips.clone();
    world.restart();
    assert_eq!(world.virtual_ips, records);
    // A Service that nobody follows is on its own.
    world.service(mk_service("other"));
    assert_ne!(group_of(&world, &world.shown("other")[0]), group);
}

#[test]
fn a_policy_that_follows_no_more_goes_on_where_its_flows_drain() {
    let mut world = mk_following();
    world.policy(of_number("p", "192.0.2.2"));
    assert!(drains(&world, FIRST));
    assert_eq!(world.shown("mail"), [FIRST]);
    assert_eq!(group_of(&world, FIRST), group_of(&world, "192.0.2.2"));
    world.report(FIRST, "p", 0, true);
    assert_eq!(named(&world, FIRST), (vec![], vec![]));
}

#[test]
fn what_a_pool_takes_from_followers_drains() {
    let mut world = mk_following();
    // Services keep what policies lose.
    world.pool(mk_pool("out", &["192.0.2.0/30"]));
    assert_eq!(world.shown("mail"), [FIRST]);
    assert_eq!(world.refused("p"), "PoolNotForEgress");
    assert!(drains(&world, FIRST));
    let records = world.virtual_ips.clone();
    world.restart();
    assert_eq!(world.virtual_ips, records);
    world.pool(mk_both("out", "192.0.2.0/30"));
    assert_eq!(named(&world, FIRST), (vec!["p".into()], vec![]));
    // Both lose it.
    for restarts in [false, true] {
        let mut world = mk_following();
        world.delete_pool("out");
        if restarts {
            world.restart();
        }
        assert!(world.shown("mail").is_empty());
        assert!(drains(&world, FIRST));
        world.report(FIRST, "p", 0, true);
        assert!(rests(&world, FIRST));
    }
    // It counts for another pool for both.
    let mut world = mk_following();
    world.pool(mk_both("zone", "192.0.2.0/29"));
    world.delete_pool("out");
    assert_eq!(world.shown("mail"), [FIRST]);
    assert_eq!(named(&world, FIRST), (vec!["p".into()], vec![]));
}

#[test]
fn another_process_leaves_a_policy_where_it_is() {
    let mut world = mk_world(OldFlows::Keep, 3);
    world.policy(of_number("p", "192.0.2.2"));
    world.report("192.0.2.2", "p", 1, false);
    world.policy(mk_policy("p", of_pool("out", 1)));
    assert_eq!(named(&world, "192.0.2.2"), (vec!["p".into()], vec![]));
    assert!(drains(&world, FIRST));
    let records = world.virtual_ips.clone();
    world.restart();
    assert_eq!(world.virtual_ips, records);
}

#[test]
fn a_service_that_comes_again_shares_what_drained_meanwhile() {
    let shared = |name| {
        let mut service = mk_service(name);
        service.request.sharing_key = Some("k".into());
        service.ports[0].port = if name == "mail" { 25 } else { 80 };
        service.request.addresses = addresses(&[FIRST]);
        service
    };
    let mut world = World::with_pools(vec![mk_both("out", "192.0.2.0/30")]);
    world.service(shared("mail"));
    world.policy(mk_policy("p", EgressSource::Service(key_of("mail"))));
    world.report(FIRST, "p", 3, false);
    world.delete("mail");
    assert!(drains(&world, FIRST));
    world.service(shared("mail"));
    assert_eq!(named(&world, FIRST), (vec!["p".into()], vec![]));
    world.service(shared("web"));
    assert_eq!(world.shown("web"), [FIRST]);
    world.service(shared("mail"));
    assert_eq!(world.shown("mail"), [FIRST]);
    let records = world.virtual_ips.clone();
    world.restart();
    assert_eq!(world.virtual_ips, records);
}

#[test]
fn that_flows_have_ended_is_heard_with_that_they_drain() {
    let mut world = mk_world(OldFlows::Keep, 3);
    world.policies.remove("p");
    world
        .ipam
        .apply(Event::Delete(ObjectId::EgressPolicy("p".into())), world.now);
    for change in world.ipam.reconcile(world.now).records {
        let RecordChange::Put(record) = change else {
            panic!("it stays");
        };
        // What was between the two is not seen: a watch began anew.
        let mut vip = record.virtual_ip();
        vip.leader = Some("n1".into());
        vip.drained = [Arc::from("p")].into();
        world.virtual_ips.insert(vip.address, vip.clone());
        world
            .ipam
            .apply(Event::Apply(Object::VirtualIp(vip)), world.now);
    }
    world.settle();
    assert!(rests(&world, FIRST));
}
