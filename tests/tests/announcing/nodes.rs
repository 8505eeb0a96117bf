//! Which nodes may lead: labels, preferences, exclusion, endpoints, nobody.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::{Network, speakers::http_get};
use serde_json::json;

use crate::scene::{Scene, eventually};

const ZONE_A: &str = r#"[{"matchLabels": {"zone": "a"}}]"#;

fn zone_a() -> serde_json::Value {
    serde_json::from_str(ZONE_A).unwrap()
}

/// The node that the selectors admit leads; the label moves and the leadership with it.
pub(crate) fn selectors(scene: &Scene<'_>) {
    scene.zone("node1", Some("a"));
    scene.advertise(&json!({"nodeSelectors": zone_a()}));
    let vips = scene.create("selectors", json!({}), json!({}));
    scene.led_by(&vips, "node1");
    scene.zone("node2", Some("a"));
    scene.zone("node1", None);
    let moved = Instant::now();
    scene.led_by(&vips, "node2");
    println!(
        "      moved and served {:.1} s after the label",
        moved.elapsed().as_secs_f64()
    );
    scene.expect(vips[0], "True LeaderElected");
}

/// A preferred node is elected first; it takes nothing from who leads.
///
/// A weight of 100 is odds of 101:1 for each address, not a certainty: the majority is asked for.
/// The Services have no endpoints, so that it is not the pace of each node's kube-proxy that decides.
pub(crate) fn preferences(scene: &Scene<'_>) {
    let prefer = |zone: &str| {
        scene.advertise(&json!({"preferredNodeSelectors": [
            {"weight": 100, "preference": {"matchLabels": {"zone": zone}}},
        ]}));
        // Longer than the advertisement takes to every speaker.
        thread::sleep(Duration::from_secs(2));
    };
    let create = |names: [&str; 5]| {
        names.map(|name| scene.create(name, json!({"selector": {"app": "nobody"}}), json!({}))[0])
    };
    let leaders = |vips: [IpAddr; 5]| vips.map(|vip| scene.leader(vip));
    let on = |leaders: &[String; 5], node: &str| leaders.iter().filter(|it| *it == node).count();

    scene.zone("node3", Some("a"));
    scene.zone("node1", Some("b"));
    prefer("a");
    let early = create(["one", "two", "three", "four", "five"]);
    let before = leaders(early);
    assert!(on(&before, "node3") >= 3, "{before:?}");

    prefer("b");
    assert_eq!(leaders(early), before, "a preference took an address");
    let after = leaders(create(["six", "seven", "eight", "nine", "ten"]));
    assert!(on(&after, "node1") >= 3, "{after:?}");
    println!("      node3 preferred: {before:?}, then node1: {after:?}");
}

/// An excluded leader hands over and takes nothing back; `ignoreExcludeLB` lets it lead.
pub(crate) fn excluded(scene: &Scene<'_>) {
    let vips = scene.create("excluded", json!({}), json!({}));
    let first = scene.leader(vips[0]);
    scene.served(&vips);
    scene.exclude(&first, true);
    eventually(
        "the excluded node to hand over",
        || scene.leader(vips[0]),
        |leader| *leader != first,
    );
    let second = scene.leader(vips[0]);
    scene.led_by(&vips, &second);
    scene.exclude(&first, false);
    thread::sleep(Duration::from_secs(3));
    scene.led_by(&vips, &second);

    scene.zone("node3", Some("a"));
    scene.exclude("node3", true);
    let only = |ignore: bool| {
        scene.advertise(&json!({"nodeSelectors": zone_a(), "ignoreExcludeLB": ignore}));
    };
    only(false);
    thread::sleep(Duration::from_secs(2));
    let vips = scene.create("ignored", json!({}), json!({}));
    let why = scene.expect(vips[0], "False NoEligibleNode");
    assert!(
        why.contains("exclude-from-external-load-balancers"),
        "{why}"
    );
    only(true);
    scene.led_by(&vips, "node3");
}

/// Nobody may lead: the objects say why, node by node, once; and that it is over.
pub(crate) fn nobody_eligible(scene: &Scene<'_>) {
    scene.advertise(&json!({"nodeSelectors": zone_a()}));
    thread::sleep(Duration::from_secs(2));
    let vips = scene.create("nobody", json!({}), json!({}));
    for vip in &vips {
        let why = scene.expect(*vip, "False NoEligibleNode");
        for node in scene.lab().nodes() {
            assert!(why.contains(&format!("{}: ", node.name)), "{why}");
        }
        assert!(scene.answers(*vip).is_empty(), "nobody answers for {vip}");
    }
    let why = scene.expect_on_service("nobody", "False NoEligibleNode");
    println!("      {why}");
    let notes = scene.expect_events("nobody", "NoEligibleNode", 1);
    assert!(notes[0].contains("node2: "), "{notes:?}");

    scene.zone("node2", Some("a"));
    scene.led_by(&vips, "node2");
    for vip in &vips {
        scene.expect(*vip, "True LeaderElected");
    }
    scene.expect_on_service("nobody", "True Announced");
    scene.expect_events("nobody", "NoEligibleNode", 1);
    scene.expect_events("nobody", "Announced", 1);
}

/// `externalTrafficPolicy: Local` without steering: who leads has an endpoint, and says so at the health check's port.
pub(crate) fn local_endpoints(scene: &Scene<'_>) {
    scene.advertise(&json!({"steering": "Off"}));
    thread::sleep(Duration::from_secs(2));
    let local = json!({"externalTrafficPolicy": "Local"});
    let vips = scene.create("local", local, json!({}));
    let first = scene.leader(vips[0]);
    assert_eq!(scene.served(&vips), format!("{first}-pod0"));
    let port = scene.service("local").spec.unwrap().health_check_node_port;
    let port = u16::try_from(port.expect("a port for health checks")).unwrap();
    healthy(scene, &first, port, true);

    scene.report_pods(&first, false);
    let gone = Instant::now();
    eventually(
        "the leadership to follow the endpoints",
        || scene.leader(vips[0]),
        |leader| *leader != first,
    );
    let second = scene.leader(vips[0]);
    scene.led_by(&vips, &second);
    assert_eq!(scene.served(&vips), format!("{second}-pod0"));
    println!(
        "      {first} -> {second}, served {:.1} s after the last endpoint went",
        gone.elapsed().as_secs_f64()
    );
    healthy(scene, &first, port, false);
    healthy(scene, &second, port, true);

    scene.report_pods(&first, true);
    thread::sleep(Duration::from_secs(3));
    scene.led_by(&vips, &second);
}

/// What kube-proxy answers to a health check, asked by the node itself.
fn healthy(scene: &Scene<'_>, node: &str, port: u16, expected: bool) {
    let node = scene.lab().node(node).unwrap();
    let address: IpAddr = node.addresses(Network::Management)[0];
    let look =
        || http_get(&node.netns, SocketAddr::new(address, port), "/").map_err(|it| it.to_string());
    let _ = eventually("the health check's answer", look, |answer| match answer {
        Ok(text) => expected && text.contains("\"localEndpoints\": 1"),
        Err(why) => !expected && why.contains("503"),
    });
}
