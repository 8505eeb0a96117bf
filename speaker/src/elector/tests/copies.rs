//! Who copies whose bindings, and who may make new ones.

use super::egress::{VIP, leader, mk_world, mk_world_of, tell_policy};
use super::*;
use crate::datapath::egress::Licence;
use crate::replication::Role;

fn role(world: &World, node: &str) -> Option<Role> {
    let lower = &world.hosts[&NodeName::from(node)].lower;
    let roles = lower.roles.lock().unwrap();
    assert!(roles.len() <= 1, "there is one group of egress addresses");
    roles.values().next().cloned()
}

fn standing(world: &World, node: &str) -> Option<Standing> {
    let lower = &world.hosts[&NodeName::from(node)].lower;
    let standings = lower.standings.lock().unwrap();
    standings.values().next().copied()
}

/// What a gateway may do.
fn licence(world: &World, node: &str) -> Option<Licence> {
    match standing(world, node)? {
        Standing::Leads { licence, .. } => Some(licence),
        Standing::StandsBy => None,
    }
}

/// The nodes that copy, each with what it is.
fn copying(world: &World) -> BTreeMap<String, Role> {
    let nodes = world.hosts.keys();
    let roles = nodes.filter_map(|node| Some((node.to_string(), role(world, &node.0)?)));
    roles.collect()
}

fn kill(world: &mut World, node: &str) {
    world.hosts.remove(&NodeName::from(node));
    world.hub.lose(&node.into());
}

/// The only node that is left.
fn the_last(world: &World) -> String {
    assert_eq!(world.hosts.len(), 1);
    world.hosts.keys().next().unwrap().to_string()
}

#[test]
fn the_next_in_rank_copies_from_the_gateway_and_goes_on_as_it() {
    let mut world = mk_world();
    assert_eq!(copying(&world), BTreeMap::new());
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let gateway = leader(&world);
    let of = copying(&world);
    assert_eq!(of.len(), 2, "the gateway and the next: {of:?}");
    let led = &of[&gateway];
    assert_eq!(led.gateway, None);
    let Some(Standing::Leads { since, .. }) = standing(&world, &gateway) else {
        panic!("{gateway} leads");
    };
    let addresses = BTreeSet::from([VIP.parse().unwrap()]);
    assert_eq!(led.addresses, addresses);
    let (standby, follows) = of.iter().find(|(node, _)| **node != gateway).unwrap();
    let number = gateway.trim_start_matches('n');
    let at = format!("10.88.0.1{number}:7953").parse().unwrap();
    let expected = Role {
        gateway: Some((gateway.as_str().into(), at)),
        ..led.clone()
    };
    assert_eq!(*follows, expected);
    assert_eq!(standing(&world, standby), Some(Standing::StandsBy));

    // The gateway dies: until the next one is known, nobody forgets what it has.
    let standby = standby.clone();
    kill(&mut world, &gateway);
    let mut leads = false;
    for _ in 0..200 {
        world.step();
        let role = role(&world, &standby).expect("what was copied stays");
        leads |= role.gateway.is_none();
        assert!(!leads || role.gateway.is_none(), "and it leads for good");
    }
    assert!(leads, "{:?}", copying(&world));
    let taken_over = standing(&world, &standby).unwrap();
    assert!(matches!(taken_over, Standing::Leads { since: later, .. } if later > since));
    let epoch = role(&world, &standby).unwrap().epoch;
    assert!(epoch > led.epoch);
    assert_eq!(copying(&world).len(), 2, "the third copies now");

    // Flows may outlive their policy, but not the record of their address.
    let policy = ObjectId::EgressPolicy("mail".into());
    let record = ObjectId::VirtualIp(VIP.parse().unwrap());
    for (gone, copying_then) in [(policy, 2), (record, 0)] {
        for host in world.hosts.values_mut() {
            host.speaker.source(Event::Delete(gone.clone()));
        }
        world.run(Duration::from_secs(1));
        assert_eq!(copying(&world).len(), copying_then, "{gone:?}");
    }
}

/// Sets the links of some nodes.
fn set_links(world: &mut World, up: bool, of: impl Fn(&str) -> bool) {
    let now = world.now;
    let hosts = (1..).zip(&mut world.hosts);
    for (number, (_, host)) in hosts.filter(|(_, (node, _))| of(&node.0)) {
        let interface = Interface {
            up,
            ..mk_interface(number)
        };
        let event = AnnouncerEvent::Interfaces(Arc::new([interface]));
        host.speaker.announcer(event, now);
    }
}

/// The switch restarts: for a moment no node can be the gateway. Who was it has all flows, and keeps them.
#[test]
fn a_gateway_keeps_what_it_has_while_no_node_can_lead() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let gateway = leader(&world);
    let (led, stood) = (role(&world, &gateway), standing(&world, &gateway));
    set_links(&mut world, false, |_| true);
    let mut leaderless = false;
    for _ in 0..100 {
        world.step();
        assert_eq!(role(&world, &gateway), led);
        assert_eq!(standing(&world, &gateway), stood);
        leaderless |= world.announcers().is_empty();
    }
    assert!(leaderless, "nobody can announce it");
    set_links(&mut world, true, |node| node == gateway);
    world.run(Duration::from_secs(1));
    set_links(&mut world, true, |node| node != gateway);
    world.run(Duration::from_secs(3));
    let announcers = BTreeMap::from([(VIP.parse().unwrap(), vec![gateway.clone()])]);
    assert_eq!(world.announcers(), announcers);
    assert_eq!(standing(&world, &gateway), stood);
    assert_eq!(copying(&world).len(), 2, "and another copies again");
}

/// Of three, one alone may have been cut off: it begins nothing at once, and ends what it has when its lease is over.
#[test]
fn a_minority_begins_nothing_and_ends_what_it_has() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    assert_eq!(licence(&world, &leader(&world)), Some(Licence::Full));
    let dies = leader(&world);
    kill(&mut world, &dies);
    world.run(Duration::from_secs(5));
    assert_eq!(licence(&world, &leader(&world)), Some(Licence::Full));
    let dies = leader(&world);
    kill(&mut world, &dies);
    world.run(Duration::from_secs(5));
    let last = the_last(&world);
    assert_eq!(licence(&world, &last), Some(Licence::Frozen));
    assert_eq!(world.announcers(), BTreeMap::new(), "nor does it announce");
    world.run(Duration::from_secs(20));
    assert_eq!(licence(&world, &last), Some(Licence::Frozen));
    world.run(Duration::from_secs(10));
    assert_eq!(licence(&world, &last), Some(Licence::Silent));
    // One of the others is back.
    let number = (1..=3).find(|number| format!("n{number}") != last).unwrap();
    world.boot(number, 7);
    world.run(Duration::from_secs(5));
    assert_eq!(licence(&world, &leader(&world)), Some(Licence::Full));
    let announcers = BTreeMap::from([(VIP.parse().unwrap(), vec![leader(&world)])]);
    assert_eq!(world.announcers(), announcers);
}

/// The address's record, of a policy's leader.
fn mk_record(leader: &str, epoch: u64) -> Object {
    Object::VirtualIp(VirtualIp {
        egress_policies: vec!["mail".into()],
        leader: Some(leader.into()),
        epoch,
        ..VirtualIp::unheld(VIP.parse().unwrap(), "out".into(), VIP.into())
    })
}

/// What the only node that is left says of the address, the last of three to lead it; and what it says over again once the
/// record is as given.
#[test]
fn a_minority_says_that_it_does_not_announce_and_leaves_others_records_alone() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let mut dead = String::new();
    for _ in 0..2 {
        dead = leader(&world);
        kill(&mut world, &dead);
        world.run(Duration::from_secs(5));
    }
    let last = the_last(&world);
    let epoch = {
        let election = world.host(&last).speaker.election();
        election.view(VIP).unwrap().epoch
    };
    let said = |world: &mut World, reporter: &mut crate::status::Reporter, record: &Object| {
        world.tell(record);
        world.run(Duration::from_secs(1));
        let mut reasons = Vec::new();
        for after in 1..40 {
            let now = world.now + Duration::from_secs(after);
            let speaker = &world.host(&last).speaker;
            let writes = reporter.look(speaker, BTreeSet::from([VIP.into()]), now, 0);
            reasons.extend(writes.into_iter().filter_map(|write| match write {
                crate::status::Write::Status { patch, .. } => {
                    Some(patch["status"]["conditions"][0]["reason"].to_string())
                }
                crate::status::Write::Event { .. } => None,
            }));
        }
        reasons
    };
    // Where most nodes are, one has taken over: before this one, at once with it, after it.
    for theirs in [epoch, epoch + 1] {
        let mut reporter = crate::status::Reporter::default();
        let record = mk_record(&dead, theirs);
        assert_eq!(said(&mut world, &mut reporter, &record), [""; 0]);
    }
    // The record is of who led before; then of this node; then another's again, which stays.
    let mut reporter = crate::status::Reporter::default();
    let record = mk_record(&dead, epoch - 1);
    assert_eq!(
        said(&mut world, &mut reporter, &record),
        ["\"NoMajority\""],
        "once"
    );
    assert_eq!(
        said(&mut world, &mut reporter, &mk_record(&last, epoch)),
        [""; 0]
    );
    assert_eq!(
        said(&mut world, &mut reporter, &mk_record(&dead, epoch + 1)),
        [""; 0]
    );
}

/// After the end of all, one alone is back: the record says that another announces, which nobody does.
#[test]
fn who_is_back_alone_says_so_whatever_the_records_epoch() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    for node in ["n1", "n2", "n3"] {
        kill(&mut world, node);
    }
    world.tell(&Object::VirtualIp(VirtualIp {
        egress_policies: vec!["mail".into()],
        leader: Some("n2".into()),
        standby: Some("n3".into()),
        epoch: 40,
        ..VirtualIp::unheld(VIP.parse().unwrap(), "out".into(), VIP.into())
    }));
    world.boot(1, 9);
    world.run(Duration::from_secs(8));
    assert_eq!(licence(&world, "n1"), Some(Licence::Frozen));
    let speaker = &world.hosts[&"n1".into()].speaker;
    let mut reporter = crate::status::Reporter::default();
    let all = BTreeSet::from([VIP.into()]);
    let mut writes = reporter.look(speaker, all, world.now, 0);
    writes.extend(reporter.look(speaker, BTreeSet::new(), world.now + LATER, 0));
    let text = format!("{writes:?}");
    assert!(text.contains("NoMajority"), "{text}");

    // So it is on record; and then another's who takes it from this one, or puts back what was there.
    let said = |world: &mut World, leader: &str, epoch: u64| {
        world.tell(&mk_record(leader, epoch));
        world.run(Duration::from_secs(1));
        let mut reporter = crate::status::Reporter::default();
        let speaker = &world.hosts[&"n1".into()].speaker;
        let all = || BTreeSet::from([VIP.into()]);
        let mut writes = reporter.look(speaker, all(), world.now, 0);
        writes.extend(reporter.look(speaker, all(), world.now + LATER, 0));
        writes.len()
    };
    let epoch = world.hosts[&"n1".into()].speaker.election().view(VIP);
    let epoch = epoch.unwrap().epoch;
    assert_eq!(epoch, 1, "it has heard of no claim");
    said(&mut world, "n1", epoch);
    assert_eq!(said(&mut world, "n2", 40), 0);
}

/// The first leader that an address ever had is cut off, and another takes over.
#[test]
fn the_first_leader_of_all_leaves_its_successors_record_alone() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let first = leader(&world);
    for node in ["n1", "n2", "n3"] {
        if node != first {
            kill(&mut world, node);
        }
    }
    world.run(Duration::from_secs(5));
    assert_eq!(licence(&world, &first), Some(Licence::Frozen));
    let other = if first == "n1" { "n2" } else { "n1" };
    world.tell(&mk_record(other, 2));
    world.run(LATER);
    let speaker = &world.host(&first).speaker;
    assert_eq!(speaker.election().view(VIP).unwrap().epoch, 1);
    let mut reporter = crate::status::Reporter::default();
    for after in 0..20 {
        let now = world.now + LATER * after;
        let writes = reporter.look(
            &world.host(&first).speaker,
            BTreeSet::from([VIP.into()]),
            now,
            0,
        );
        assert!(writes.is_empty(), "{writes:?}");
    }
}

const LATER: Duration = Duration::from_secs(1);

/// A node that begins anew and hears nobody knows from the record that others have led.
#[test]
fn who_led_by_the_record_counts() {
    for recorded in [false, true] {
        let mut world = mk_world();
        tell_policy(&mut world);
        world.run(Duration::from_secs(2));
        for node in ["n1", "n2", "n3"] {
            kill(&mut world, node);
        }
        if recorded {
            let address: IpAddr = VIP.parse().unwrap();
            world.tell(&Object::VirtualIp(VirtualIp {
                egress_policies: vec!["mail".into()],
                leader: Some("n2".into()),
                standby: Some("n3".into()),
                ..VirtualIp::unheld(address, "out".into(), VIP.into())
            }));
        }
        world.boot(1, 9);
        world.run(Duration::from_secs(5));
        let expected = if recorded {
            Licence::Frozen
        } else {
            Licence::Full
        };
        assert_eq!(licence(&world, "n1"), Some(expected), "{recorded}");
    }
}

/// All speakers end at once: whose kernel translates the flows is on record, and goes on as their gateway.
#[test]
fn after_the_end_of_all_the_gateway_is_who_was() {
    for recorded in ["n1", "n2", "n3"] {
        let mut world = mk_world();
        tell_policy(&mut world);
        world.run(Duration::from_secs(2));
        for node in ["n1", "n2", "n3"] {
            kill(&mut world, node);
        }
        world.tell(&Object::VirtualIp(VirtualIp {
            egress_policies: vec!["mail".into()],
            leader: Some(recorded.into()),
            ..VirtualIp::unheld(VIP.parse().unwrap(), "out".into(), VIP.into())
        }));
        for number in 1..=3 {
            world.boot(number, 9);
        }
        world.run(Duration::from_secs(5));
        assert_eq!(leader(&world), recorded);
    }
}

/// Speakers that are stopped are as a rule restarted: they count until they have been away for too long for that.
#[test]
fn who_was_stopped_does_not_count_for_long() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    for _ in 0..2 {
        let stops = leader(&world);
        world.host(&stops).speaker.leave();
        world.run(Duration::from_millis(500));
        kill(&mut world, &stops);
        world.run(Duration::from_secs(3));
    }
    let last = the_last(&world);
    assert_eq!(licence(&world, &last), Some(Licence::Frozen));
    world.run(Duration::from_secs(20));
    assert_eq!(licence(&world, &last), Some(Licence::Full));
    // Who is back counts again, and is missed if it dies.
    for number in (1..=3).filter(|number| format!("n{number}") != last) {
        world.boot(number, 7);
    }
    world.run(Duration::from_secs(5));
    for _ in 0..2 {
        let dies = leader(&world);
        kill(&mut world, &dies);
        world.run(Duration::from_secs(5));
    }
    world.run(Duration::from_secs(20));
    let last = the_last(&world);
    assert_eq!(licence(&world, &last), Some(Licence::Frozen));
}

/// One is stopped, and another is gone without a word: they may be together elsewhere.
#[test]
fn who_was_stopped_counts_where_another_is_missed() {
    for apart in [Duration::ZERO, Duration::from_mins(11)] {
        let mut world = mk_world();
        tell_policy(&mut world);
        world.run(Duration::from_secs(2));
        let stops = leader(&world);
        world.host(&stops).speaker.leave();
        world.run(Duration::from_millis(500));
        kill(&mut world, &stops);
        world.run(Duration::from_secs(3) + apart);
        let dies = leader(&world);
        kill(&mut world, &dies);
        world.run(Duration::from_secs(25));
        // Stopped long ago it is not counted, nor when it is forgotten.
        let expected = if apart.is_zero() {
            Licence::Frozen
        } else {
            Licence::Full
        };
        let last = the_last(&world);
        assert_eq!(licence(&world, &last), Some(expected), "{apart:?}");
    }
}

/// One that was stopped is forgotten while another is missed. That is no reason to wait for it once the other is back.
#[test]
fn who_was_stopped_and_is_forgotten_was_stopped_still() {
    let mut world = mk_world();
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let stop = |world: &mut World, node: &str| {
        world.host(node).speaker.leave();
        world.run(Duration::from_millis(500));
        kill(world, node);
    };
    let stops = leader(&world);
    stop(&mut world, &stops);
    world.run(Duration::from_secs(3));
    let dies = leader(&world);
    kill(&mut world, &dies);
    world.run(Duration::from_mins(11));
    let last = the_last(&world);
    assert_eq!(licence(&world, &last), Some(Licence::Silent));
    let number = dies.trim_start_matches('n').parse().unwrap();
    world.boot(number, 7);
    world.run(Duration::from_secs(5));
    assert_eq!(
        licence(&world, &last),
        Some(Licence::Full),
        "both are there"
    );
    stop(&mut world, &dies);
    world.run(Duration::from_secs(30));
    assert_eq!(licence(&world, &last), Some(Licence::Full));
}

/// Who led by the record is not waited for where it can lead no more.
#[test]
fn after_the_end_of_all_who_was_the_gateway_and_cannot_be_is_not_waited_for() {
    let recorded = "n2";
    let took = |hindered: bool| {
        let mut world = mk_world();
        tell_policy(&mut world);
        world.run(Duration::from_secs(2));
        for node in ["n1", "n2", "n3"] {
            kill(&mut world, node);
        }
        world.tell(&Object::VirtualIp(VirtualIp {
            egress_policies: vec!["mail".into()],
            leader: Some(recorded.into()),
            ..VirtualIp::unheld(VIP.parse().unwrap(), "out".into(), VIP.into())
        }));
        let begun = world.now;
        for number in 1..=3 {
            world.boot(number, 9);
        }
        if hindered {
            world.host(recorded).speaker.leave();
        }
        while world.announcers().is_empty() {
            assert!(world.now.saturating_sub(begun) < Duration::from_secs(10));
            world.step();
        }
        (leader(&world), world.now.saturating_sub(begun))
    };
    let (goes_on, _) = took(false);
    assert_eq!(goes_on, recorded);
    let (other, after) = took(true);
    assert_ne!(other, recorded);
    assert!(after < Duration::from_secs(2), "{after:?}");
}

/// Nodes that are gone for good have no say.
#[test]
fn who_is_no_node_any_more_does_not_count() {
    let mut world = mk_world_of(false);
    tell_policy(&mut world);
    world.run(Duration::from_secs(2));
    let mut gone = Vec::new();
    for _ in 0..2 {
        let dies = leader(&world);
        kill(&mut world, &dies);
        world.run(Duration::from_secs(5));
        gone.push(dies);
    }
    let last = the_last(&world);
    assert_eq!(licence(&world, &last), Some(Licence::Frozen));
    let host = world.hosts.values_mut().next().unwrap();
    for gone in gone {
        let node = ObjectId::Node(gone.as_str().into());
        host.speaker.source(Event::Delete(node));
    }
    world.run(Duration::from_secs(1));
    assert_eq!(licence(&world, &last), Some(Licence::Full));
}
