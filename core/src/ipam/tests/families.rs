//! One family, two families, and the way between.

use super::world::*;
use crate::ip::Family;
use crate::model::{FamilyPolicy, Service};

fn mk_dual(name: &str, policy: FamilyPolicy) -> Service {
    Service {
        families: vec![Family::V4, Family::V6],
        family_policy: policy,
        ..mk_service(name)
    }
}

#[test]
fn both_families_come_from_one_pool_and_move_together() {
    let mut world = World::with_pools(vec![
        mk_pool("a", &["192.0.2.0/30"]),
        mk_pool("b", &["198.51.100.0/30", "fd00::/126"]),
    ]);
    world.service(mk_dual("web", FamilyPolicy::RequireDualStack));
    assert_eq!(world.shown("web"), ["198.51.100.0", "fd00::"]);
    world.check();
    let groups: Vec<_> = world
        .virtual_ips
        .values()
        .map(|vip| vip.group.to_string())
        .collect();
    assert_eq!(groups, ["198.51.100.0", "198.51.100.0"]);
}

#[test]
fn two_pools_serve_when_none_has_both() {
    let mut world = World::with_pools(vec![
        mk_pool("a", &["192.0.2.0/30"]),
        mk_pool("b", &["fd00::/126"]),
    ]);
    world.service(mk_dual("web", FamilyPolicy::RequireDualStack));
    assert_eq!(world.shown("web"), ["192.0.2.0", "fd00::"]);
}

#[test]
fn the_primary_family_comes_first_in_the_status() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/30", "fd00::/126"])]);
    let mut service = mk_dual("web", FamilyPolicy::PreferDualStack);
    service.families = vec![Family::V6, Family::V4];
    world.service(service);
    assert_eq!(world.shown("web"), ["fd00::", "192.0.2.0"]);
}

#[test]
fn require_dual_stack_gets_both_or_nothing() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/30"])]);
    world.service(mk_dual("web", FamilyPolicy::RequireDualStack));
    assert!(world.shown("web").is_empty());
    assert_eq!(world.condition("web"), "False NoPoolOfFamily");
    assert!(world.virtual_ips.is_empty());
    world.pool(mk_pool("a", &["192.0.2.0/30", "fd00::/126"]));
    assert_eq!(world.shown("web"), ["192.0.2.0", "fd00::"]);
}

#[test]
fn prefer_dual_stack_takes_one_and_is_upgraded_and_downgraded() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/30"])]);
    world.service(mk_dual("web", FamilyPolicy::PreferDualStack));
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    assert_eq!(world.condition("web"), "True Assigned");
    world.pool(mk_pool("b", &["fd00::/126"]));
    assert_eq!(world.shown("web"), ["192.0.2.0", "fd00::"]);
    world.delete_pool("b");
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    world.check();
    // The Service itself gives one family up.
    world.pool(mk_pool("b", &["fd00:1::/126"]));
    assert_eq!(world.shown("web"), ["192.0.2.0", "fd00:1::"]);
    world.service(mk_service("web"));
    assert_eq!(world.shown("web"), ["192.0.2.0"]);
    assert_eq!(world.condition("web"), "True Assigned");
}

#[test]
fn one_explicit_address_leaves_the_other_family_to_the_pools() {
    let mut world = World::with_pools(vec![mk_pool("a", &["192.0.2.0/29", "fd00::/126"])]);
    let mut service = mk_dual("web", FamilyPolicy::RequireDualStack);
    service.request.addresses = addresses(&["192.0.2.5"]);
    world.service(service);
    assert_eq!(world.shown("web"), ["192.0.2.5", "fd00::"]);
}
