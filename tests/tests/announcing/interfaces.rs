//! On which interface an address is announced.

use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::scene::{Scene, eventually};

/// By name and by glob; a name that no node has is said.
pub(crate) fn by_name(scene: &Scene<'_>) {
    // Two match, one has the subnet.
    scene.advertise(&json!({"interfaces": ["eth*"]}));
    thread::sleep(Duration::from_secs(2));
    let vips = scene.create("named", json!({}), json!({}));
    let leader = scene.leader(vips[0]);
    scene.led_by(&vips, &leader);
    for vip in &vips {
        assert_eq!(scene.status(*vip)["interface"], "eth0");
    }
    scene.advertise(&json!({"interfaces": ["bond0"]}));
    let vips = scene.create("unnamed", json!({}), json!({}));
    let why = eventually(
        "no interface of that name",
        || scene.condition(vips[0]),
        |why| why.contains("is named bond0"),
    );
    println!("      {why}");
    scene.advertise(&json!({"interfaces": ["eth0"]}));
    let leader = scene.leader(vips[0]);
    scene.led_by(&vips, &leader);
}

/// The VIP's interface is not the default route's, and the other way round: routed clients reach both.
pub(crate) fn second_nic(scene: &Scene<'_>) {
    let vips = scene.create("first-nic", json!({}), json!({}));
    scene.served(&vips);
    let leader = scene.leader(vips[0]);
    let node = scene.lab().node(&leader).unwrap();
    let route = node.netns.ip("route show default").unwrap();
    assert!(route.contains("dev eth1"), "{route}");
    for vip in &vips {
        assert_eq!(scene.status(*vip)["interface"], "eth0");
    }
    let pool = json!({"landfall.dev/pool": "second-lan"});
    let vips = scene.create("second-nic", json!({}), pool);
    // The client is not on that segment: both are routed.
    scene.served(&vips);
    for vip in &vips {
        assert_eq!(scene.status(*vip)["interface"], "eth1");
        assert!(
            scene.answers(*vip).is_empty(),
            "{vip} is not announced on eth0"
        );
    }
}

/// An address in no node's subnet is announced on the default route's interface, and that is said.
pub(crate) fn no_subnet(scene: &Scene<'_>) {
    // The router takes the addresses to be on the second LAN.
    let router = scene.lab().router();
    router.ip("route replace 10.90.0.0/24 dev eth2").unwrap();
    router.ip("-6 route replace fd00:90::/64 dev eth2").unwrap();
    let pool = json!({"landfall.dev/pool": "far"});
    let vips = scene.create("far", json!({}), pool);
    for vip in &vips {
        let why = scene.expect(*vip, "True AnnouncedByDefaultRoute");
        assert!(why.contains("eth1"), "{why}");
        assert_eq!(scene.status(*vip)["interface"], "eth1");
    }
    scene.served(&vips);
}
