//! A whole cluster under virtual time: electors, a gossip network, LAN segments and a failure detector.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::groups::{GroupId, GroupIndex};
use crate::model::{Endpoint, EndpointSlice, Event, Node, NodeName, Object, ObjectKey, VirtualIp};

const STEP: Duration = Duration::from_millis(10);
/// What the failure detector needs, about as measured.
const DETECT: Duration = Duration::from_millis(900);
const REJOIN: Duration = Duration::from_millis(300);

pub(super) fn mk_vip(n: u16) -> Event {
    let address = format!("10.88.{}.{}", 1 + n / 200, n % 200);
    let group = format!("g{n}").as_str().into();
    Event::Apply(Object::VirtualIp(VirtualIp {
        services: vec![ObjectKey::new("default", format!("s{n}"))],
        ..VirtualIp::unheld(address.parse().unwrap(), "lan".into(), group)
    }))
}

pub(super) fn mk_interface(up: bool) -> InterfaceFact {
    InterfaceFact {
        name: "eth0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        addresses: Vec::new(),
        subnets: vec!["10.88.0.0/16".parse().unwrap()],
        up,
        default_route: (true, true),
        heard: BTreeSet::new(),
    }
}

struct Host {
    elector: Elector,
    index: GroupIndex,
    changed: BTreeSet<GroupId>,
    up: bool,
    frozen: bool,
    /// Management network part, LAN part: those with equal numbers reach each other.
    management: u8,
    lan: u8,
    inbox: Vec<Vec<u8>>,
    heard: Vec<(NodeName, BootId)>,
    /// Peer -> (is seen alive, since when the truth differs).
    swim: BTreeMap<NodeName, (bool, Option<Duration>)>,
    leads: BTreeSet<GroupId>,
}

pub(super) struct Sim {
    now: Duration,
    hosts: BTreeMap<NodeName, Host>,
    loss: f64,
    random: StdRng,
    next_boot: u64,
    events: Vec<Event>,
    pub(super) transitions: usize,
}

impl Sim {
    fn new(nodes: usize, groups: u16) -> Self {
        let mut sim = Self {
            now: Duration::from_secs(100),
            hosts: BTreeMap::new(),
            loss: 0.0,
            random: StdRng::seed_from_u64(7),
            next_boot: 1,
            events: (0..groups).map(mk_vip).collect(),
            transitions: 0,
        };
        for n in 0..nodes {
            sim.boot(&format!("n{n}"));
        }
        sim
    }

    fn boot(&mut self, name: &str) {
        let mut index = GroupIndex::default();
        for event in &self.events {
            index.apply(event.clone());
        }
        let changed = index.reconcile();
        let mut elector = Elector::new(name.into(), BootId(self.next_boot), Config::default());
        self.next_boot += 1;
        elector.set_interfaces(vec![mk_interface(true)]);
        elector.set_synced();
        for id in &changed {
            elector.set_ready(id, true);
        }
        let host = Host {
            elector,
            index,
            changed,
            up: true,
            frozen: false,
            management: 0,
            lan: 0,
            inbox: Vec::new(),
            heard: Vec::new(),
            swim: BTreeMap::new(),
            leads: BTreeSet::new(),
        };
        self.hosts.insert(name.into(), host);
    }

    fn host(&mut self, name: &str) -> &mut Host {
        self.hosts.get_mut(&NodeName::from(name)).unwrap()
    }

    fn tell(&mut self, event: &Event) {
        for host in self.hosts.values_mut() {
            host.index.apply(event.clone());
            host.changed.append(&mut host.index.reconcile());
        }
        self.events.push(event.clone());
    }

    fn lost(&mut self) -> bool {
        let loss = self.loss;
        self.random.random_bool(loss)
    }

    fn detect(&mut self) {
        let truth: BTreeMap<NodeName, (bool, u8, BootId)> = self
            .hosts
            .iter()
            .map(|(name, host)| {
                let lives = host.up && !host.frozen;
                (name.clone(), (lives, host.management, host.elector_boot()))
            })
            .collect();
        let now = self.now;
        for (name, host) in &mut self.hosts {
            if !host.up || host.frozen {
                continue;
            }
            for (peer, (lives, part, boot)) in &truth {
                if peer == name {
                    continue;
                }
                let real = *lives && *part == host.management;
                let (seen, since) = host.swim.entry(peer.clone()).or_insert((false, None));
                if real == *seen {
                    *since = None;
                    continue;
                }
                let patience = if real { REJOIN } else { DETECT };
                if now.saturating_sub(*since.get_or_insert(now)) >= patience {
                    *seen = real;
                    *since = None;
                    if real {
                        host.elector.peer_alive(peer, *boot);
                    } else {
                        host.elector.peer_dead(peer);
                    }
                }
            }
        }
    }

    fn step(&mut self) {
        self.now += STEP;
        let now = self.now;
        self.detect();
        let names: Vec<NodeName> = self.hosts.keys().cloned().collect();
        if now.as_millis().is_multiple_of(300) {
            for from in &names {
                let sender = &self.hosts[from];
                if !sender.up || sender.frozen {
                    continue;
                }
                let (lan, boot) = (sender.lan, sender.elector_boot());
                for to in names.iter().filter(|to| *to != from) {
                    let receiver = &self.hosts[to];
                    if receiver.up && receiver.lan == lan && !self.lost() {
                        self.host(&to.0).heard.push((from.clone(), boot));
                    }
                }
            }
        }
        let mut sent = Vec::new();
        for (name, host) in &mut self.hosts {
            if !host.up || host.frozen {
                continue;
            }
            for (peer, boot) in std::mem::take(&mut host.heard) {
                host.elector.hello(&peer, boot, &"eth0".into(), now);
            }
            for frame in std::mem::take(&mut host.inbox) {
                let answers = host.elector.receive(&frame, now);
                sent.extend(answers.into_iter().map(|out| (name.clone(), out)));
            }
            let changed = std::mem::take(&mut host.changed);
            let tick = host.elector.tick(now, 0, &host.index, &changed);
            sent.extend(tick.frames.into_iter().map(|out| (name.clone(), out)));
            for change in tick.changes {
                match change {
                    Change::Lead(id) => {
                        self.transitions += usize::from(host.leads.insert(id));
                    }
                    Change::Quit(id) => {
                        host.leads.remove(&id);
                    }
                    Change::Reannounce(_) | Change::Seen(_) => {}
                }
            }
        }
        for (from, out) in sent {
            let part = self.hosts[&from].management;
            for to in &names {
                let receives = out.to.as_ref().is_none_or(|wanted| wanted == to) && *to != from;
                let there = self.hosts[to].up && self.hosts[to].management == part;
                if receives && there && !self.lost() {
                    self.host(&to.0).inbox.push(out.frame.clone());
                }
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    /// The owners of a group among hosts that are up.
    fn owners(&self, id: &str) -> Vec<&str> {
        self.hosts
            .iter()
            .filter(|(_, host)| host.up && host.leads.contains(id))
            .map(|(name, _)| &*name.0)
            .collect()
    }

    fn owner(&self, id: &str) -> String {
        let owners = self.owners(id);
        assert_eq!(
            owners.len(),
            1,
            "owners of {id} at {:?}: {owners:?}",
            self.now
        );
        owners[0].to_owned()
    }

    fn map(&self, groups: u16) -> BTreeMap<String, String> {
        (0..groups)
            .map(|n| (format!("g{n}"), self.owner(&format!("g{n}"))))
            .collect()
    }

    /// Runs until every group has one owner; returns how long that took.
    fn converge(&mut self, groups: u16, within: Duration) -> Duration {
        let start = self.now;
        loop {
            if (0..groups).all(|n| self.owners(&format!("g{n}")).len() == 1) {
                return self.now.saturating_sub(start);
            }
            assert!(
                self.now.saturating_sub(start) < within,
                "no convergence within {within:?}"
            );
            self.step();
        }
    }
}

impl Host {
    fn elector_boot(&self) -> BootId {
        self.elector.boot()
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

#[test]
fn cold_start_spreads_groups_and_settles() {
    let mut sim = Sim::new(5, 200);
    sim.run(secs(3));
    let map = sim.map(200);
    assert_eq!(sim.transitions, 200, "nobody was led twice");
    for n in 0..5 {
        let led = map
            .values()
            .filter(|owner| **owner == format!("n{n}"))
            .count();
        assert!((20..=60).contains(&led), "n{n} leads {led}");
    }
    sim.run(secs(60));
    assert_eq!(sim.map(200), map);
    assert_eq!(sim.transitions, 200);
}

#[test]
fn a_dying_node_loses_all_groups_and_gets_none_back() {
    let mut sim = Sim::new(3, 200);
    sim.run(secs(3));
    let before = sim.map(200);
    sim.host("n1").up = false;
    sim.host("n1").leads.clear();
    // Detection by gossip and by hellos, then one step to claim.
    let took = sim.converge(200, secs(2));
    assert!(took < Duration::from_millis(1500), "{took:?}");
    let after = sim.map(200);
    for (group, owner) in &before {
        if owner != "n1" {
            assert_eq!(after[group], *owner, "{group} moved for nothing");
        }
    }
    sim.boot("n1");
    sim.run(secs(10));
    assert_eq!(sim.map(200), after, "a returning node takes nothing");
}

#[test]
fn pauses_and_loss_move_nothing() {
    let mut sim = Sim::new(4, 40);
    sim.run(secs(3));
    let map = sim.map(40);
    sim.loss = 0.2;
    for round in 0..20 {
        let name = format!("n{}", round % 4);
        sim.host(&name).frozen = true;
        sim.run(Duration::from_millis(500));
        sim.host(&name).frozen = false;
        sim.run(Duration::from_millis(700));
    }
    sim.loss = 0.0;
    sim.run(secs(2));
    assert_eq!(sim.map(40), map);
}

#[test]
fn a_long_freeze_loses_the_lead_and_wakes_up_to_it() {
    let mut sim = Sim::new(3, 6);
    sim.run(secs(3));
    let frozen = sim.owner("g0");
    sim.host(&frozen).frozen = true;
    sim.run(secs(5));
    assert_eq!(
        sim.owners("g0").len(),
        2,
        "the frozen one does not know yet"
    );
    sim.host(&frozen).frozen = false;
    sim.run(Duration::from_millis(600));
    assert_ne!(sim.owner("g0"), frozen);
    let map = sim.map(6);
    sim.run(secs(20));
    assert_eq!(sim.map(6), map);
}

#[test]
fn a_partition_has_one_owner_a_side_and_heals_within_a_second() {
    let mut sim = Sim::new(5, 30);
    sim.run(secs(3));
    for name in ["n3", "n4"] {
        sim.host(name).management = 1;
        sim.host(name).lan = 1;
    }
    sim.run(secs(5));
    for n in 0..30 {
        let id = format!("g{n}");
        let owners = sim.owners(&id);
        let minority = owners
            .iter()
            .filter(|owner| ["n3", "n4"].contains(owner))
            .count();
        assert_eq!((owners.len(), minority), (2, 1), "{id}: {owners:?}");
    }
    for name in ["n3", "n4"] {
        sim.host(name).management = 0;
        sim.host(name).lan = 0;
    }
    let took = sim.converge(30, secs(3));
    assert!(took < secs(1), "{took:?}");
    let map = sim.map(30);
    sim.run(secs(30));
    assert_eq!(sim.map(30), map, "no ping-pong after the heal");
}

#[test]
fn the_management_network_down_moves_nothing() {
    let mut sim = Sim::new(3, 12);
    sim.run(secs(3));
    let map = sim.map(12);
    for n in 0..3 {
        sim.host(&format!("n{n}")).management = n;
    }
    sim.run(secs(10));
    assert_eq!(sim.map(12), map);
    // A death is noticed all the same, and everybody picks the same successor without a word.
    sim.host("n2").up = false;
    sim.host("n2").leads.clear();
    sim.converge(12, secs(3));
    for n in 0..3 {
        sim.host(&format!("n{n}")).management = 0;
    }
    sim.run(secs(5));
    sim.map(12);
}

#[test]
fn a_port_in_another_vlan_or_a_dead_uplink_moves_the_groups() {
    let mut sim = Sim::new(3, 12);
    sim.run(secs(3));
    let (first, kept) = (sim.owner("g0"), sim.map(12));
    sim.host(&first).lan = 9;
    sim.run(secs(3));
    let moved = sim.map(12);
    assert!(moved.values().all(|owner| *owner != first));
    for (group, owner) in kept.iter().filter(|(_, owner)| **owner != first) {
        assert_eq!(moved[group], *owner);
    }
    sim.host(&first).lan = 0;
    sim.run(secs(5));
    assert_eq!(sim.map(12), moved);
    let second = sim.owner("g0");
    sim.host(&second)
        .elector
        .set_interfaces(vec![mk_interface(false)]);
    sim.step();
    let took = sim.converge(12, secs(1));
    assert!(took < Duration::from_millis(200), "{took:?}");
    assert_ne!(sim.owner("g0"), second);
}

#[test]
fn two_nodes_that_lose_each_other_on_the_lan_keep_the_leader() {
    let mut sim = Sim::new(2, 8);
    sim.run(secs(3));
    let map = sim.map(8);
    sim.host("n0").lan = 5;
    sim.run(secs(10));
    assert_eq!(sim.map(8), map);
}

#[test]
fn a_stopping_node_hands_over_before_it_goes() {
    let mut sim = Sim::new(3, 30);
    sim.run(secs(3));
    sim.host("n0").elector.leave();
    for _ in 0..100 {
        sim.step();
        for n in 0..30 {
            assert!(!sim.owners(&format!("g{n}")).is_empty(), "a gap in g{n}");
        }
    }
    assert!(sim.host("n0").leads.is_empty());
    sim.map(30);
}

#[test]
fn a_local_service_is_led_where_its_endpoints_are() {
    let mut sim = Sim::new(3, 1);
    let slice = |nodes: &[&str]| {
        Event::Apply(Object::EndpointSlice(EndpointSlice {
            key: ObjectKey::new("default", "s0-x"),
            service: ObjectKey::new("default", "s0"),
            family: crate::ip::Family::V4,
            ports: Vec::new(),
            endpoints: nodes
                .iter()
                .map(|node| Endpoint {
                    address: "10.244.0.7".parse().unwrap(),
                    node: Some((*node).into()),
                    ready: true,
                    serving: true,
                    terminating: false,
                })
                .collect(),
        }))
    };
    let mut service = super::tests::mk_service("s0");
    service.traffic_policy = crate::model::TrafficPolicy::Local;
    sim.tell(&Event::Apply(Object::Service(service)));
    sim.tell(&slice(&["n1"]));
    sim.run(secs(2));
    assert_eq!(sim.owner("g0"), "n1");
    sim.tell(&slice(&["n1", "n2"]));
    sim.run(secs(2));
    assert_eq!(
        sim.owner("g0"),
        "n1",
        "the leader stays while it has an endpoint"
    );
    sim.tell(&slice(&["n2"]));
    sim.run(Duration::from_millis(300));
    assert_eq!(sim.owner("g0"), "n2");
    sim.tell(&slice(&[]));
    sim.run(secs(4));
    assert!(sim.owners("g0").is_empty());
}

#[test]
fn a_node_that_is_not_served_yet_waits_for_one_that_is() {
    let mut sim = Sim::new(3, 0);
    let vip = mk_vip(0);
    sim.run(secs(2));
    sim.tell(&vip);
    sim.run(secs(1));
    assert!(sim.owners("g0").is_empty());
    sim.host("n2").elector.set_ready(&"g0".into(), true);
    sim.run(Duration::from_millis(300));
    assert_eq!(sim.owner("g0"), "n2");
    // Where nobody ever is, the hash's choice leads after a while.
    sim.tell(&mk_vip(1));
    sim.run(secs(4));
    sim.owner("g1");
}

#[test]
fn a_node_with_other_inputs_than_the_majority_hands_over() {
    let mut sim = Sim::new(3, 6);
    sim.run(secs(3));
    let owner = sim.owner("g0");
    let stray = Event::Apply(Object::VirtualIp(VirtualIp {
        services: vec![ObjectKey::new("default", "s0")],
        ..VirtualIp::unheld("10.88.9.9".parse().unwrap(), "lan".into(), "g0".into())
    }));
    let host = sim.host(&owner);
    host.index.apply(stray);
    host.changed = host.index.reconcile();
    sim.run(Duration::from_millis(1500));
    assert_eq!(sim.owner("g0"), owner);
    sim.run(secs(2));
    assert_ne!(sim.owner("g0"), owner);
}

#[test]
fn failback_is_opt_in() {
    let mut sim = Sim::new(3, 6);
    sim.run(secs(3));
    let before = sim.map(6);
    let mut advertisement = super::tests::mk_advertisement();
    advertisement.failback = true;
    sim.tell(&Event::Apply(Object::Advertisement(advertisement)));
    let first = sim.owner("g0");
    sim.host(&first).up = false;
    sim.host(&first).leads.clear();
    sim.run(secs(3));
    assert_ne!(sim.owner("g0"), first);
    let name = first.clone();
    sim.boot(&name);
    sim.run(secs(10));
    assert_eq!(sim.map(6), before);
}

#[test]
fn an_overloaded_node_gives_groups_away_in_time() {
    let mut sim = Sim::new(1, 30);
    sim.run(secs(3));
    for name in ["n1", "n2"] {
        sim.boot(name);
    }
    sim.run(secs(60));
    assert!(sim.map(30).values().all(|owner| owner == "n0"));
    sim.run(secs(600));
    let left = sim.map(30).values().filter(|owner| *owner == "n0").count();
    assert!((9..=13).contains(&left), "n0 still leads {left}");
    let map = sim.map(30);
    sim.run(secs(60));
    assert_eq!(sim.map(30), map);
}

#[test]
fn nodes_that_cannot_talk_learn_of_each_other_by_a_third() {
    let mut index = GroupIndex::default();
    index.apply(Event::Apply(Object::Node(Node {
        name: "a".into(),
        labels: BTreeMap::new(),
        addresses: Vec::new(),
        pod_cidrs: Vec::new(),
        network_unavailable: false,
    })));
    let mk = |name: &str, boot| {
        let mut elector = Elector::new(name.into(), BootId(boot), Config::default());
        elector.set_synced();
        elector
    };
    let (mut a, mut b, mut c) = (mk("a", 1), mk("b", 2), mk("c", 3));
    let at = Duration::from_secs(1);
    for elector in [&mut a, &mut b, &mut c] {
        for (peer, boot) in [("a", 1), ("b", 2), ("c", 3)] {
            elector.peer_alive(&peer.into(), BootId(boot));
        }
        elector.tick(at, 0, &index, &BTreeSet::new());
    }
    // a -> b, then b tells c where a stands, c asks b, b answers.
    for out in a.greet(&"b".into()) {
        for want in b.receive(&out.frame, at) {
            for update in a.receive(&want.frame, at) {
                b.receive(&update.frame, at);
            }
        }
    }
    for out in b.greet(&"c".into()) {
        for want in c.receive(&out.frame, at) {
            for update in b.receive(&want.frame, at) {
                c.receive(&update.frame, at);
            }
        }
    }
    assert!(c.peers().any(|peer| &*peer.name.0 == "a" && peer.alive));
    assert!(c.knows(&"a".into()));
}

#[test]
fn a_leader_that_is_no_longer_admitted_stops_also_without_a_successor() {
    let mut sim = Sim::new(3, 1);
    sim.run(secs(3));
    sim.owner("g0");
    let mut advertisement = super::tests::mk_advertisement();
    let nowhere = crate::selector::LabelSelector::of_labels([("zone", "nowhere")]);
    advertisement.node_selectors = vec![nowhere];
    sim.tell(&Event::Apply(Object::Advertisement(advertisement.clone())));
    sim.run(secs(1));
    assert!(sim.owners("g0").is_empty());
    advertisement.node_selectors.clear();
    sim.tell(&Event::Apply(Object::Advertisement(advertisement)));
    sim.run(secs(2));
    sim.owner("g0");
}

/// Programs outlive speakers: what a run said of its data path stands until the next one has spoken, unless it is gone.
#[test]
fn what_was_said_of_a_data_path_outlives_the_run() {
    let (group, node): (GroupId, NodeName) = ("g0".into(), "n1".into());
    let port = HeldPort {
        vip: "10.88.1.0".parse().unwrap(),
        port: 80,
    };
    for gone in [false, true] {
        let mut sim = Sim::new(2, 1);
        let elector = &mut sim.host("n1").elector;
        elector.set_steers(true);
        elector.set_serves(&group, BTreeSet::from([7]));
        elector.set_held(port, &BTreeSet::from([5]));
        let known = |sim: &mut Sim| {
            let elector = &sim.host("n0").elector;
            let steers = elector
                .register(&node)
                .is_some_and(|register| register.capabilities.steers);
            let held = !elector.holders(port, 0).is_empty();
            (steers, elector.serves(&node, &group, 7), held)
        };
        sim.run(secs(3));
        assert_eq!(known(&mut sim), (true, true, true));

        if gone {
            sim.host("n0").elector.gone(&node);
        }
        sim.boot("n1");
        sim.run(secs(2));
        assert_eq!(known(&mut sim), (!gone, !gone, !gone));
        sim.host("n1").elector.set_steers(true);
        sim.run(secs(2));
        assert_eq!(known(&mut sim), (true, !gone, !gone));
        sim.run(secs(2));
        assert_eq!(known(&mut sim), (true, false, false), "its own word counts");
    }
}
