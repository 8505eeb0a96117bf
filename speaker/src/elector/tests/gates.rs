//! Nothing is led to a gateway before it is one.

use super::egress::{VIP, leader, mk_world, tell_policy};
use super::*;
use crate::datapath::egress::State;
use crate::egress::Gateway;
use landfall_core::election::policy_id;

const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// What a node leads the policy's packets to.
fn led_to(world: &World, node: &str) -> Option<Gateway> {
    let rules = world.hosts[&NodeName::from(node)].lower.rules();
    rules.egress?.egress.policies["mail"].led_to().cloned()
}

/// The nodes that lead them to somebody, and to whom.
fn led(world: &World) -> BTreeMap<String, String> {
    let nodes = world.hosts.keys().map(ToString::to_string);
    let led = nodes.filter_map(|node| {
        let gateway = led_to(world, &node)?;
        Some((node, gateway.node.to_string()))
    });
    led.collect()
}

fn all_to(world: &World, gateway: &str) -> BTreeMap<String, String> {
    let nodes = world.hosts.keys();
    nodes
        .map(|node| (node.to_string(), gateway.to_owned()))
        .collect()
}

/// A policy that all nodes can be the gateway of; who it is.
fn mk_settled() -> (World, String) {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    for node in NODES {
        for part in 0..3 {
            world.put_in_force(node, part);
        }
    }
    world.run(Duration::from_millis(200));
    let gateway = leader(&world);
    assert_eq!(led(&world), all_to(&world, &gateway));
    (world, gateway)
}

/// What the programs of a node's gateway were told last.
fn told(world: &World, node: &str) -> Option<Gateway> {
    let told = world.hosts[&NodeName::from(node)]
        .lower
        .told
        .lock()
        .unwrap();
    let mut told = told.iter().rev();
    let leaving = told.find_map(|change| match change {
        Told::Egress(leaving) => leaving.clone(),
        _ => None,
    })?;
    leaving.egress.policies["mail"].gateway.clone()
}

#[test]
fn nobody_is_led_to_a_gateway_before_it_is_one() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(3));
    let gateway = leader(&world);
    for parts in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let mut world = mk_world();
        tell_policy(&mut world);
        world.run(Duration::from_secs(3));
        let known = told(&world, &gateway).unwrap();
        assert_eq!(*known.node.0, *gateway, "the gateway's programs are told");
        for part in parts {
            assert_eq!(led(&world), BTreeMap::new(), "before {part} of {parts:?}");
            world.put_in_force(&gateway, part);
            world.step();
        }
        world.run(Duration::from_millis(200));
        assert_eq!(led(&world), all_to(&world, &gateway));
    }
}

/// Who stands by has said so long ago.
#[test]
fn a_take_over_waits_for_nothing() {
    let (mut world, first) = mk_settled();
    world.hosts.remove(&NodeName::from(first.as_str()));
    world.hub.lose(&first.as_str().into());
    let nodes = world.hosts.len();
    for _ in 0..150 {
        world.step();
        assert_eq!(led(&world).len(), nodes, "{:?}", led(&world));
    }
    let second = leader(&world);
    assert_ne!(first, second);
    assert_eq!(led(&world), all_to(&world, &second));
}

/// Who has not said so is waited for.
#[test]
fn another_gateway_is_waited_for() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let first = leader(&world);
    for part in 0..3 {
        world.put_in_force(&first, part);
    }
    world.run(Duration::from_millis(200));
    assert_eq!(led(&world), all_to(&world, &first));
    world.hosts.remove(&NodeName::from(first.as_str()));
    world.hub.lose(&first.as_str().into());
    world.run(Duration::from_secs(3));
    let second = leader(&world);
    assert_eq!(led(&world), BTreeMap::new());
    for part in 0..3 {
        world.put_in_force(&second, part);
    }
    world.run(Duration::from_millis(200));
    assert_eq!(led(&world), all_to(&world, &second));
}

fn restart(world: &mut World, node: &str, boot: u64, left: &[&str]) {
    let lower = Lower {
        left: Mutex::new(left.iter().map(|policy| (*policy).into()).collect()),
        ..Lower::default()
    };
    let name = world.boot_over(&node.into(), boot, Arc::new(lower));
    let number = node.trim_start_matches('n').parse().unwrap();
    let interfaces: Arc<[Interface]> = Arc::new([mk_interface(number)]);
    let now = world.now;
    let speaker = &mut world.host(&name).speaker;
    speaker.announcer(AnnouncerEvent::Interfaces(interfaces), now);
}

/// The kernel's state outlives a speaker, and so does its word.
#[test]
fn a_speaker_that_begins_anew_goes_by_what_is_in_the_kernel() {
    let (mut world, gateway) = mk_settled();
    let others: Vec<&str> = NODES.into_iter().filter(|node| *node != gateway).collect();
    restart(&mut world, &gateway, 99, &["mail"]);
    for _ in 0..150 {
        world.step();
        for other in &others {
            assert!(led_to(&world, other).is_some(), "{other}");
        }
    }
    assert_eq!(led(&world).len(), 3);
    // Its own word stands before it has put anything into the kernel; of nothing that is not there.
    let said =
        |world: &mut World| world.host(&gateway).speaker.debug()["egress"]["settled"].clone();
    assert_eq!(said(&mut world), serde_json::json!(["mail"]));
    restart(&mut world, &gateway, 100, &[]);
    world.run(Duration::from_secs(1));
    assert_eq!(said(&mut world), serde_json::json!([]));
}

#[test]
fn who_is_disarmed_or_begins_without_egress_takes_its_word_back() {
    let (mut world, gateway) = mk_settled();
    let policies = |world: &World, node: &str| {
        let election = &world.hosts[&NodeName::from(node)].speaker.election;
        election.gates(&gateway.as_str().into(), &VIP.into(), policy_id("mail"))
    };
    let now = world.now;
    world.host(&gateway).speaker.disarm(true, now);
    world.run(Duration::from_secs(1));
    for node in NODES {
        assert!(!policies(&world, node), "{node}");
    }
    let (mut world, _) = mk_settled();
    world.egress = false;
    restart(&mut world, &gateway, 99, &["mail"]);
    world.run(Duration::from_secs(1));
    for node in NODES {
        assert!(!policies(&world, node), "{node}");
    }
}

/// Whose programs fail for a while hands over to who can; where nobody can, somebody leads all the same.
#[test]
fn who_cannot_be_a_gateway_is_none_while_another_can() {
    let (mut world, first) = mk_settled();
    let fail = |world: &World, node: &str, is: bool| {
        let state = if is {
            State::Failed("the kernel is too old".into())
        } else {
            State::Idle
        };
        *world.hosts[&NodeName::from(node)]
            .lower
            .gateway
            .lock()
            .unwrap() = state;
    };
    fail(&world, &first, true);
    world.run(Duration::from_secs(5));
    assert_eq!(leader(&world), first, "it may be over soon");
    world.run(Duration::from_secs(10));
    let second = leader(&world);
    assert_ne!(second, first);
    for node in NODES {
        fail(&world, node, true);
    }
    world.run(Duration::from_secs(15));
    assert!(
        NODES.contains(&&*leader(&world)),
        "nobody can, and one leads"
    );
    fail(&world, &first, false);
    world.run(Duration::from_secs(15));
    assert_eq!(leader(&world), first);
}

#[test]
fn who_treats_no_packets_by_policies_is_no_gateway_while_another_does() {
    let (mut world, gateway) = mk_settled();
    world.egress = false;
    restart(&mut world, &gateway, 99, &[]);
    world.run(Duration::from_secs(15));
    assert_ne!(leader(&world), gateway);
}
