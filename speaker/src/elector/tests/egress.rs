//! What nodes are told of pods that leave by addresses of their own.

use landfall_core::model::{EgressPolicy, EgressSource, Pod as PodObject, Purpose, Terms};
use landfall_core::selector::LabelSelector;

use super::*;
use crate::egress::{Egress, Gateway, Pod};

pub(super) const VIP: &str = "10.88.0.240";

fn mk_policy() -> Object {
    let mut policy = EgressPolicy::plain("mail", EgressSource::of_pool("out"));
    policy.spec.pods = Some(LabelSelector::of_labels([("app", "mta")]));
    Object::EgressPolicy(Box::new(policy))
}

fn mk_pod(name: &str, node: &str, app: &str, address: &str) -> Object {
    Object::Pod(PodObject {
        key: ObjectKey::new("default", name),
        uid: String::new(),
        labels: BTreeMap::from([("app".into(), app.into())]),
        addresses: vec![address.parse().unwrap()],
        node: Some(node.into()),
        host_network: false,
        created: 0,
        terminating: false,
    })
}

pub(super) fn mk_world() -> World {
    mk_world_of(true)
}

pub(super) fn mk_world_of(manifests: bool) -> World {
    let mut world = World::of(0, manifests);
    let mut pool = world.objects.iter().find_map(|object| match object {
        Object::Pool(pool) => Some(pool.clone()),
        _ => None,
    });
    let pool = Pool {
        name: "out".into(),
        purpose: Purpose::Egress,
        ..pool.take().unwrap()
    };
    world.tell(&Object::Pool(pool));
    world.run(Duration::from_secs(2));
    world
}

/// A policy and its address.
pub(super) fn tell_mail(world: &mut World) {
    let address: IpAddr = VIP.parse().unwrap();
    world.tell(&Object::VirtualIp(VirtualIp {
        egress_policies: vec!["mail".into()],
        ..VirtualIp::unheld(address, "out".into(), VIP.into())
    }));
    world.tell(&mk_policy());
}

/// The policy goes; the controller notes in its address's record that its flows go on.
fn end_mail(world: &mut World) {
    for host in world.hosts.values_mut() {
        let policy = ObjectId::EgressPolicy("mail".into());
        host.speaker.source(Event::Delete(policy));
    }
    let terms = Terms {
        drains: true,
        ..Terms::default()
    };
    world.tell(&Object::VirtualIp(VirtualIp {
        egress_policies: vec!["mail".into()],
        terms: BTreeMap::from([("mail".into(), terms)]),
        ..VirtualIp::unheld(VIP.parse().unwrap(), "out".into(), VIP.into())
    }));
}

/// And pods, its tenants and others.
pub(super) fn tell_policy(world: &mut World) {
    tell_mail(world);
    world.tell(&mk_pod("mta", "n1", "mta", "10.244.1.5"));
    world.tell(&mk_pod("web", "n1", "web", "10.244.1.6"));
    world.tell(&mk_pod("far", "n3", "mta", "10.244.3.5"));
    world.tell(&mk_pod("away", "n3", "web", "10.244.3.6"));
}

fn egress(world: &World, node: &str) -> Option<Arc<Egress>> {
    let rules = world.hosts[&NodeName::from(node)].lower.rules();
    rules.egress.map(|leaving| leaving.egress.clone())
}

fn gateway(world: &World, node: &str) -> Option<Gateway> {
    egress(world, node)?.policies["mail"].gateway.clone()
}

pub(super) fn leader(world: &World) -> String {
    world.announcers()[&VIP.parse::<IpAddr>().unwrap()][0].clone()
}

#[test]
fn tenants_go_where_their_address_is_led() {
    let mut world = mk_world();
    assert_eq!(
        egress(&world, "n1"),
        None,
        "nothing is armed without a policy"
    );
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let leader = leader(&world);
    for node in ["n1", "n2", "n3"] {
        let gateway = gateway(&world, node).unwrap();
        let known: (&str, &str, u32) = (&gateway.node.0, &gateway.uplink, gateway.interface);
        assert_eq!(known, (leader.as_str(), "eth0", 2));
        let mac = (leader != node).then(|| mac_of(&gateway.node).0);
        assert_eq!(gateway.mac, mac, "as {node} sees {leader}");
    }
    // A node knows its own pods, and whom it may have to be the gateway of.
    let pods = |node: &str| {
        let egress = egress(&world, node).unwrap();
        let pods = egress.pods.iter().map(|(address, pod)| {
            let by = pod.tenant.as_ref().map(|tenant| tenant.egress_ip.unwrap());
            (address.to_string(), by.map(|by| by.to_string()))
        });
        pods.collect::<Vec<_>>()
    };
    let by = || Some(VIP.to_owned());
    let (mta, far) = (("10.244.1.5".into(), by()), ("10.244.3.5".into(), by()));
    let (web, away) = (("10.244.1.6".into(), None), ("10.244.3.6".into(), None));
    assert_eq!(pods("n1"), [mta.clone(), web, far.clone()]);
    assert_eq!(pods("n2"), [mta.clone(), far.clone()]);
    assert_eq!(pods("n3"), [mta, far, away]);
    // Pods that lie in no node's network are inside all the same.
    let inside = egress(&world, "n2").unwrap().inside.clone();
    for one in [
        "10.244.1.6/32",
        "10.88.0.11/32",
        "169.254.0.0/16",
        "ff00::/8",
    ] {
        assert!(
            inside.contains(&one.parse().unwrap()),
            "{one} in {inside:?}"
        );
    }
}

#[test]
fn a_gateway_stays_known_until_the_next_one_is() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let first = leader(&world);
    let epoch = gateway(&world, &first).unwrap().epoch;
    world.hosts.remove(&NodeName::from(first.as_str()));
    world.hub.lose(&first.as_str().into());
    let others: Vec<String> = world.hosts.keys().map(ToString::to_string).collect();
    for _ in 0..150 {
        world.step();
        for other in &others {
            assert!(gateway(&world, other).is_some(), "no rule is to change");
        }
    }
    let second = leader(&world);
    assert_ne!(first, second);
    for other in &others {
        let gateway = gateway(&world, other).unwrap();
        assert_eq!(*gateway.node.0, *second);
        assert!(gateway.epoch > epoch);
    }
}

#[test]
fn a_former_tenant_is_known_until_its_address_is_anothers() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let address: IpAddr = "10.244.3.5".parse().unwrap();
    let known = |world: &World| egress(world, "n2").unwrap().pods.get(&address).cloned();
    let tenant = known(&world).unwrap();
    assert!(tenant.tenant.is_some());
    // It is the same pod, and nobody's tenant: its flows may go on.
    world.tell(&mk_pod("far", "n3", "web", "10.244.3.5"));
    world.run(Duration::from_secs(1));
    let former = known(&world).unwrap();
    assert_eq!(
        former,
        Pod {
            tenant: None,
            former: Some("mail".into()),
            ..tenant
        }
    );
    // Another has its address.
    let gone = ObjectId::Pod(ObjectKey::new("default", "far"));
    let next = mk_pod("next", "n3", "mta", "10.244.3.5");
    for host in world.hosts.values_mut() {
        host.speaker.source(Event::Delete(gone.clone()));
        host.speaker.source(Event::Apply(next.clone()));
    }
    world.run(Duration::from_secs(1));
    let next = known(&world).unwrap();
    assert!(next.tenant.is_some() && next.identity != former.identity);
    // And then nobody.
    let gone = ObjectId::Pod(ObjectKey::new("default", "next"));
    for host in world.hosts.values_mut() {
        host.speaker.source(Event::Delete(gone.clone()));
    }
    world.run(Duration::from_secs(1));
    assert_eq!(known(&world), None);
}

/// A node that comes later has networks of its own.
#[test]
fn the_clusters_networks_follow_its_nodes() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let network = "10.244.9.0/24".parse().unwrap();
    assert!(!egress(&world, "n2").unwrap().inside.contains(&network));
    let mut node = world.objects.iter().find_map(|object| match object {
        Object::Node(node) => Some(node.clone()),
        _ => None,
    });
    world.tell(&Object::Node(Node {
        name: "n9".into(),
        pod_cidrs: vec![network],
        addresses: Vec::new(),
        ..node.take().unwrap()
    }));
    world.run(Duration::from_secs(1));
    assert!(egress(&world, "n2").unwrap().inside.contains(&network));
}

#[test]
fn programs_are_told_once_of_each_change_and_of_the_end() {
    let mut world = mk_world();
    let told = |world: &World| -> Vec<Option<usize>> {
        let host = &world.hosts[&NodeName::from("n1")];
        let told = host.lower.told.lock().unwrap();
        told.iter()
            .filter_map(|change| match change {
                Told::Egress(leaving) => Some(leaving.as_ref().map(|it| it.egress.pods.len())),
                _ => None,
            })
            .collect()
    };
    assert_eq!(told(&world), [None], "what an earlier process left goes");
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let some = told(&world).len();
    assert_eq!(told(&world).last(), Some(&Some(3)));
    world.run(Duration::from_secs(5));
    assert_eq!(told(&world).len(), some, "nothing is said twice");
    world.tell(&mk_pod("more", "n1", "web", "10.244.1.7"));
    world.run(Duration::from_secs(1));
    assert_eq!(told(&world).last(), Some(&Some(4)));
    for host in world.hosts.values_mut() {
        let policy = ObjectId::EgressPolicy("mail".into());
        host.speaker.source(Event::Delete(policy));
    }
    world.run(Duration::from_secs(1));
    // Its flows go on for as long as the record of its address names it.
    let drains = egress(&world, "n1").unwrap();
    assert!(drains.policies["mail"].gateway.is_some());
    assert!(drains.pods.values().all(|pod| pod.tenant.is_none()));
    let formers = drains.pods.values().filter(|pod| pod.former.is_some());
    assert_eq!(formers.count(), 2, "those that were its tenants");
    for host in world.hosts.values_mut() {
        let record = ObjectId::VirtualIp(VIP.parse().unwrap());
        host.speaker.source(Event::Delete(record));
    }
    world.run(Duration::from_secs(1));
    assert_eq!(told(&world).last(), Some(&None));
    assert_eq!(egress(&world, "n1"), None);
}

/// What a host says of the address when it is asked again and again for so long.
fn said(
    world: &mut World,
    name: &str,
    reporter: &mut crate::status::Reporter,
    time: Duration,
) -> Vec<crate::status::Write> {
    let end = world.now + time;
    let mut writes = Vec::new();
    while world.now < end {
        world.step();
        let now = world.now;
        let host = world.host(name);
        let touched = std::mem::take(&mut host.touched);
        writes.extend(reporter.look(&host.speaker, touched, now, 0));
    }
    writes
}

/// What each write to the record's status says of the policy.
fn said_of_mail(writes: &[crate::status::Write]) -> impl Iterator<Item = &serde_json::Value> {
    let patches = writes.iter().filter_map(|write| match write {
        crate::status::Write::Status { patch, .. } => Some(patch),
        crate::status::Write::Event { .. } => None,
    });
    patches.map(|patch| &patch["status"]["egress"][0])
}

fn ports_said(writes: &[crate::status::Write]) -> Vec<u64> {
    let said = said_of_mail(writes);
    said.filter_map(|said| said["portsInUse"].as_u64())
        .collect()
}

fn drained_of(writes: &[crate::status::Write]) -> Vec<bool> {
    let said = said_of_mail(writes);
    said.map(|said| said["drained"] == serde_json::json!(true))
        .collect()
}

fn mk_usage(ports: u64) -> BTreeMap<PolicyName, Usage> {
    let bindings = crate::datapath::egress::Bindings {
        live: ports,
        resting: 1,
    };
    let usage = Usage {
        is_gateway: true,
        ports,
        bindings: BTreeMap::from([(VIP.parse().unwrap(), bindings)]),
        ..Usage::default()
    };
    BTreeMap::from([("mail".into(), usage)])
}

#[test]
fn the_gateway_reports_ports_in_use_now_and_then() {
    const LONG: Duration = Duration::from_secs(30);
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let leader = leader(&world);
    // What is written shows.
    world.tell(&Object::VirtualIp(VirtualIp {
        egress_policies: vec!["mail".into()],
        leader: Some(leader.as_str().into()),
        ..VirtualIp::unheld(VIP.parse().unwrap(), "out".into(), VIP.into())
    }));
    let mut reporter = crate::status::Reporter::default();
    let mut set = |world: &mut World, ports: u64| {
        *world.host(&leader).lower.usage.lock().unwrap() = mk_usage(ports);
        ports_said(&said(world, &leader, &mut reporter, LONG))
    };
    assert_eq!(set(&mut world, 100).last(), Some(&100));
    // A twentieth is not worth a write, more is; and nothing is told always.
    assert_eq!(set(&mut world, 105), [0; 0]);
    assert_eq!(set(&mut world, 106), [106]);
    assert_eq!(set(&mut world, 1), [1]);
    assert_eq!(set(&mut world, 0), [0]);
    assert_eq!(set(&mut world, 0), [0; 0]);
    // Each look finds another number: one write in ten seconds.
    let mut writes = Vec::new();
    for ports in 1..30 {
        *world.host(&leader).lower.usage.lock().unwrap() = mk_usage(ports * 1000);
        writes.extend(said(
            &mut world,
            &leader,
            &mut reporter,
            Duration::from_secs(1),
        ));
    }
    assert!((1..=3).contains(&writes.len()), "{writes:?}");
    // Who does not lead says nothing of it.
    let other = ["n1", "n2", "n3"].into_iter().find(|it| *it != leader);
    let other = other.unwrap();
    *world.host(other).lower.usage.lock().unwrap() = mk_usage(7);
    let mut reporter = crate::status::Reporter::default();
    assert!(ports_said(&said(&mut world, other, &mut reporter, LONG)).is_empty());
}

#[test]
fn drops_are_events_of_the_policy() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let mut reporter = crate::status::Reporter::default();
    let mut events = |world: &mut World, dropped: u64| -> Vec<String> {
        // By the packet filter, and behind it by the guard.
        let counts = |packets| BTreeMap::from([("mail".into(), packets)]);
        let lower = &world.host("n1").lower;
        *lower.dropped.lock().unwrap() = counts(dropped / 3);
        *lower.unled.lock().unwrap() = counts(dropped - dropped / 3);
        let writes = said(world, "n1", &mut reporter, Duration::from_secs(30));
        let events = writes.into_iter().filter_map(|write| match write {
            crate::status::Write::Event {
                about,
                reason,
                note,
                ..
            } => Some(format!("{about} {reason} {note}")),
            crate::status::Write::Status { .. } => None,
        });
        events.collect()
    };
    assert_eq!(events(&mut world, 0), [""; 0]);
    let first = events(&mut world, 12);
    let expected =
        "EgressPolicy mail PacketsDroppedNoGateway node n1 dropped 12 packets of its pods";
    assert!(
        first.len() == 1 && first[0].starts_with(expected),
        "{first:?}"
    );
    // It goes on, and is said again minutes later, with all there were.
    let mut later = Vec::new();
    for more in 1..=11 {
        later.extend(events(&mut world, 12 + more * 10));
    }
    assert!(
        later.len() == 1 && later[0].contains(" dropped 1"),
        "{later:?}"
    );
}

/// The packet filter is told of them all the same, in case that they come its way.
#[test]
fn beside_cilium_a_program_judges() {
    let mut world = mk_world();
    world.cilium = true;
    world.boot(1, 7);
    tell_policy(&mut world);
    world.run(Duration::from_secs(3));
    let rules = |node: &str| world.hosts[&NodeName::from(node)].lower.rules();
    let (beside, other) = (rules("n1"), rules("n2"));
    assert!(beside.egress.is_none() && other.passed_by.is_none());
    let pods = |leaving: Option<Arc<crate::node_rules::Leaving>>| leaving.unwrap().egress.clone();
    let (passed_by, judged) = (pods(beside.passed_by), pods(other.egress));
    let tenant: IpAddr = "10.244.1.5".parse().unwrap();
    assert!(passed_by.pods[&tenant].tenant.is_some());
    assert_eq!(passed_by.policies, judged.policies.clone());
}

#[test]
fn who_is_disarmed_hands_over_and_lets_go() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let first = leader(&world);
    world.host(&first).speaker.hand_over_egress(true);
    world.run(Duration::from_secs(2));
    let second = leader(&world);
    assert_ne!(first, second, "another is the gateway");
    assert!(egress(&world, &first).is_some(), "and it is in force still");
    assert!(
        world.hosts[&NodeName::from(first.as_str())]
            .speaker
            .gateway_of()
            .is_empty()
    );
    let now = world.now;
    world.host(&first).speaker.disarm(true, now);
    world.run(Duration::from_secs(1));
    assert_eq!(egress(&world, &first), None);
    assert!(*world.host(&first).lower.disarmed.lock().unwrap());
    assert!(world.host(&first).speaker.is_disarmed());
    assert!(egress(&world, &second).is_some());
    // Others go on without it, whoever dies; and it comes back when it is told to.
    let now = world.now;
    world.host(&first).speaker.disarm(false, now);
    world.run(Duration::from_secs(1));
    assert!(egress(&world, &first).is_some());
    assert!(!*world.host(&first).lower.disarmed.lock().unwrap());
    assert_eq!(leader(&world), second, "it takes nothing back");
}

/// Who is the last that can be the gateway hands over to nobody, and stays it.
#[test]
fn the_last_gateway_stays_one() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let last = leader(&world);
    for node in ["n1", "n2", "n3"].into_iter().filter(|node| *node != last) {
        let now = world.now;
        world.host(node).speaker.disarm(true, now);
    }
    world.run(Duration::from_secs(1));
    world.host(&last).speaker.hand_over_egress(true);
    world.run(Duration::from_secs(10));
    assert_eq!(leader(&world), last);
    assert_eq!(world.host(&last).speaker.gateway_of().len(), 1);
}

/// Who waits for the word that all flows have ended is on record: said before, it would be taken for an earlier one.
#[test]
fn that_flows_have_ended_is_said_once_the_record_asks() {
    const LONG: Duration = Duration::from_secs(30);
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let leader = leader(&world);
    *world.host(&leader).lower.usage.lock().unwrap() = mk_usage(0);
    let mut reporter = crate::status::Reporter::default();
    let mut drained = |world: &mut World| {
        let writes = said(world, &leader, &mut reporter, LONG);
        drained_of(&writes).contains(&true)
    };
    assert!(!drained(&mut world));
    for host in world.hosts.values_mut() {
        let policy = ObjectId::EgressPolicy("mail".into());
        host.speaker.source(Event::Delete(policy));
    }
    assert!(!drained(&mut world));
    end_mail(&mut world);
    assert!(drained(&mut world));
}

/// Flows that drain on an address that nobody can lead are over one day: it is not kept for ever.
#[test]
fn what_drains_where_nobody_can_lead_ends() {
    drains_where_nobody_can_lead(true);
}

/// A node that hears less than half of the others does not know who leads, and says of nothing that it is over.
#[test]
fn what_drains_is_not_over_by_the_word_of_a_few() {
    drains_where_nobody_can_lead(false);
}

fn drains_where_nobody_can_lead(hears_most: bool) {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    end_mail(&mut world);
    if !hears_most {
        for other in ["n2", "n3"] {
            world.hosts.remove(&NodeName::from(other));
            world.hub.lose(&other.into());
        }
    }
    let now = world.now;
    for (number, host) in (1..).zip(world.hosts.values_mut()) {
        let down = Interface {
            up: false,
            ..mk_interface(number)
        };
        let event = AnnouncerEvent::Interfaces(Arc::new([down]));
        host.speaker.announcer(event, now);
    }
    world.run(Duration::from_secs(5));
    let mut reporter = crate::status::Reporter::default();
    let mut drained = |after: Duration| -> Vec<bool> {
        let now = world.now + after;
        let (all, vip) = (BTreeSet::from([VIP.into()]), &world.hosts[&"n1".into()]);
        let mut writes = reporter.look(&vip.speaker, all, now, 0);
        writes.extend(reporter.look(&vip.speaker, BTreeSet::new(), now + SECOND, 0));
        drained_of(&writes)
    };
    assert_eq!(drained(Duration::ZERO), [] as [bool; 0]);
    assert_eq!(drained(10 * SECOND), [false], "nobody leads it");
    assert_eq!(drained(19 * 60 * SECOND), [] as [bool; 0]);
    let over: &[bool] = if hears_most { &[true] } else { &[] };
    assert_eq!(drained(21 * 60 * SECOND), over);
    assert_eq!(drained(22 * 60 * SECOND), [] as [bool; 0], "once is enough");
}

/// Likewise where its policy has another one, and who leads that cannot announce it: what goes on there has no way back.
#[test]
fn what_drains_on_an_address_that_is_left_behind_ends() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let next: IpAddr = "10.89.0.9".parse().unwrap();
    let terms = Terms {
        drains: true,
        ..Terms::default()
    };
    for (address, terms) in [(VIP.parse().unwrap(), terms), (next, Terms::default())] {
        world.tell(&Object::VirtualIp(VirtualIp {
            egress_policies: vec!["mail".into()],
            terms: BTreeMap::from([("mail".into(), terms)]),
            ..VirtualIp::unheld(address, "out".into(), VIP.into())
        }));
    }
    let set_link = |world: &mut World, up: bool| {
        let now = world.now;
        for (number, host) in (1..).zip(world.hosts.values_mut()) {
            let first = Interface {
                up,
                ..mk_interface(number)
            };
            let second = Interface {
                index: 3,
                name: "eth1".into(),
                addresses: vec![format!("10.89.0.{}/24", 10 + number).parse().unwrap()],
                default_route: (false, false),
                ..mk_interface(number)
            };
            let event = AnnouncerEvent::Interfaces(Arc::new([first, second]));
            host.speaker.announcer(event, now);
        }
        world.run(5 * SECOND);
    };
    set_link(&mut world, false);
    let leader = world.announcers()[&next][0].clone();
    *world.host(&leader).lower.usage.lock().unwrap() = mk_usage(3);
    let mut reporter = crate::status::Reporter::default();
    let mut is_over = |world: &mut World, after: Duration| {
        let now = world.now + after;
        let host = &world.hosts[&NodeName::from(leader.as_str())];
        let all = BTreeSet::from([VIP.into()]);
        let mut writes = reporter.look(&host.speaker, all, now, 0);
        writes.extend(reporter.look(&host.speaker, BTreeSet::new(), now + SECOND, 0));
        drained_of(&writes).contains(&true)
    };
    for (minutes, expected) in [(0, false), (19, false), (21, true)] {
        let over = is_over(&mut world, Duration::from_mins(minutes));
        assert_eq!(over, expected, "after {minutes} min");
    }
    // Its link is back: its time begins anew.
    set_link(&mut world, true);
    assert_eq!(self::leader(&world), leader, "where it is led again");
    assert!(!is_over(&mut world, Duration::from_mins(22)));
    set_link(&mut world, false);
    assert!(!is_over(&mut world, Duration::from_mins(23)));
    assert!(is_over(&mut world, Duration::from_mins(45)));
}

const SECOND: Duration = Duration::from_secs(1);
