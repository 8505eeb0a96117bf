//! Policies as holders: of addresses of their own, and beside a Service.

use std::net::IpAddr;
use std::sync::Arc;

use super::world::*;
use crate::ip::Family;
use crate::model::{EgressSource, Pool, Purpose, ServiceAllocation};

fn mk_egress_pool(name: &str, ranges: &[&str]) -> Pool {
    Pool {
        purpose: Purpose::Egress,
        ..mk_pool(name, ranges)
    }
}

fn by_number(texts: &[&str]) -> EgressSource {
    EgressSource::Addresses(addresses(texts))
}

fn on_record(world: &World, address: &str) -> (usize, Vec<Arc<str>>) {
    let vip = &world.virtual_ips[&address.parse::<IpAddr>().unwrap()];
    (vip.services.len(), vip.egress_policies.clone())
}

#[test]
fn a_pool_gives_so_many_of_each_family_it_has() {
    let mut world = World::with_pools(vec![mk_egress_pool("out", &["192.0.2.0/29", "fd00::/125"])]);
    world.policy(mk_policy("p", of_pool("out", 2)));
    let four = ["192.0.2.0", "192.0.2.1", "fd00::", "fd00::1"];
    assert_eq!(world.egress_of("p"), four);
    let group = &world.virtual_ips[&addresses(&["fd00::1"])[0]].group;
    assert_eq!(&**group, "192.0.2.0", "all move together");
    // Fewer: the highest go, and rest.
    world.policy(mk_policy("p", of_pool("out", 1)));
    assert_eq!(world.egress_of("p"), ["192.0.2.0", "fd00::"]);
    assert_eq!(world.statuses["out"].v4.quarantined, 1);
    // More again: those that rest for it come back at once.
    world.policy(mk_policy("p", of_pool("out", 2)));
    assert_eq!(world.egress_of("p"), four);
    let mut one = mk_policy("p", of_pool("out", 2));
    one.spec.source = EgressSource::Pool {
        name: "out".into(),
        count: 1,
        families: vec![Family::V6],
    };
    world.policy(one);
    assert_eq!(world.egress_of("p"), ["fd00::"]);
}

#[test]
fn what_a_pool_is_for_decides_who_has_its_addresses() {
    let mut world = World::with_pools(vec![
        mk_pool("in", &["192.0.2.0/30"]),
        mk_egress_pool("out", &["198.51.100.0/30"]),
    ]);
    world.policy(mk_policy("p", of_pool("in", 1)));
    assert_eq!(world.refused("p"), "PoolNotForEgress");
    world.policy(mk_policy("q", by_number(&["192.0.2.2"])));
    assert_eq!(world.refused("q"), "PoolNotForEgress");
    let mut asking = mk_service("asking");
    asking.request.pool = Some("out".into());
    world.service(asking);
    assert_eq!(world.condition("asking"), "False PoolNotForServices");
    world.service(mk_service("any"));
    assert_eq!(world.shown("any"), ["192.0.2.0"]);
    // Opened, both have what they ask for.
    for (name, range) in [("in", "192.0.2.0/30"), ("out", "198.51.100.0/30")] {
        let mut pool = mk_pool(name, &[range]);
        pool.purpose = Purpose::Both;
        world.pool(pool);
    }
    assert_eq!(world.egress_of("p"), ["192.0.2.1"]);
    assert_eq!(world.egress_of("q"), ["192.0.2.2"]);
    assert_eq!(world.shown("asking"), ["198.51.100.0"]);
    // Closed again, what is held is taken back.
    world.pool(mk_pool("in", &["192.0.2.0/30"]));
    assert_eq!(world.egress_of("p"), [""; 0]);
    assert_eq!(world.refused("p"), "PoolNotForEgress");
    world.pool(mk_egress_pool("out", &["198.51.100.0/30"]));
    assert_eq!(world.shown("asking"), [""; 0]);
}

#[test]
fn a_pool_that_picks_services_has_nothing_for_policies() {
    let mut pool = mk_egress_pool("out", &["192.0.2.0/30"]);
    pool.allocation = Some(ServiceAllocation {
        service_selectors: vec![mk_selector("app", "mail")],
        ..ServiceAllocation::default()
    });
    let mut world = World::with_pools(vec![pool]);
    world.policy(mk_policy("p", of_pool("out", 1)));
    world.policy(mk_policy("q", by_number(&["192.0.2.1"])));
    assert_eq!([world.refused("p"), world.refused("q")], ["NotAdmitted"; 2]);
}

#[test]
fn an_address_has_one_holder() {
    let mut pool = mk_pool("both", &["192.0.2.0/30"]);
    pool.purpose = Purpose::Both;
    let mut world = World::with_pools(vec![pool]);
    world.policy(mk_policy("p", by_number(&["192.0.2.1", "192.0.2.9"])));
    assert_eq!(world.egress_of("p"), ["192.0.2.1"]);
    assert_eq!(world.refused("p"), "AddressNotInPool");
    world.policy(mk_policy("q", by_number(&["192.0.2.1"])));
    assert_eq!(world.refused("q"), "AddressInUse");
    let mut service = mk_service("web");
    service.request.addresses = addresses(&["192.0.2.1"]);
    world.service(service);
    assert_eq!(world.condition("web"), "False AddressInUse");
    assert!(
        world.message("web").contains("EgressPolicy p"),
        "{}",
        world.message("web")
    );
    // Freed, it rests: for nobody but its former owner.
    world.delete_policy("p");
    assert_eq!(world.refused("q"), "AddressResting");
    assert_eq!(world.condition("web"), "False AddressResting");
    world.restart();
    assert_eq!(world.refused("q"), "AddressResting");
    world.policy(mk_policy("p", by_number(&["192.0.2.1"])));
    assert_eq!(world.egress_of("p"), ["192.0.2.1"]);
    world.delete_policy("p");
    world.pass(61);
    assert_eq!(world.egress_of("q").len() + world.shown("web").len(), 1);
}

#[test]
fn a_policy_uses_what_a_service_has() {
    let mut both = mk_pool("both", &["192.0.2.0/30"]);
    both.purpose = Purpose::Both;
    let mut world = World::with_pools(vec![both.clone()]);
    world.policy(mk_policy("p", EgressSource::Service(key_of("mail"))));
    assert_eq!(world.refused("p"), "ServiceNotFound");
    world.service(mk_service("mail"));
    assert_eq!(world.egress_of("p"), ["192.0.2.0"]);
    assert_eq!(on_record(&world, "192.0.2.0"), (1, vec!["p".into()]));
    assert_eq!(world.refused("p"), "");
    let records = world.virtual_ips.clone();
    world.restart();
    assert_eq!(world.virtual_ips, records);
    // The pool is for Services alone: the Service stays, the policy goes.
    world.pool(mk_pool("both", &["192.0.2.0/30"]));
    assert_eq!(world.shown("mail"), ["192.0.2.0"]);
    assert_eq!(on_record(&world, "192.0.2.0"), (1, vec![]));
    assert_eq!(world.refused("p"), "PoolNotForEgress");
    world.pool(both);
    assert_eq!(world.egress_of("p"), ["192.0.2.0"]);
    // The Service goes, and the address with it.
    world.delete("mail");
    assert_eq!(world.egress_of("p"), [""; 0]);
    assert_eq!(world.refused("p"), "ServiceNotFound");
    world.service(mk_service("mail"));
    assert_eq!(world.egress_of("p"), ["192.0.2.0"]);
    world.delete_policy("p");
    assert_eq!(on_record(&world, "192.0.2.0"), (1, vec![]));
    assert_eq!(world.shown("mail"), ["192.0.2.0"]);
}

#[test]
fn a_restart_moves_nothing_and_a_lost_pool_takes_back() {
    let mut world = World::with_pools(vec![mk_egress_pool("out", &["192.0.2.0/30"])]);
    for (name, created) in [("b", 1), ("a", 2), ("c", 3)] {
        let mut policy = mk_policy(name, of_pool("out", 1));
        policy.created = created;
        world.policy(policy);
    }
    world.delete_policy("b");
    let records = world.virtual_ips.clone();
    let writes = world.writes;
    world.restart();
    assert_eq!(world.virtual_ips, records);
    assert_eq!(world.writes, writes);
    assert_eq!(world.egress_of("a"), ["192.0.2.1"]);
    // Kept, if the pool wants it so.
    let mut retaining = mk_egress_pool("out", &["192.0.2.3/32"]);
    retaining.retain_assigned = true;
    world.pool(retaining);
    assert_eq!(world.egress_of("a"), ["192.0.2.1"]);
    world.delete_pool("out");
    world.restart();
    assert_eq!(world.egress_of("a"), ["192.0.2.1"]);
    assert_eq!(world.refused("a"), "PoolNotFound");
    // A pool that does not is the end of it.
    world.pool(mk_egress_pool("out", &["198.51.100.0/30"]));
    assert_eq!(world.egress_of("a"), ["198.51.100.0"]);
    assert_eq!(world.refused("a"), "");
}
