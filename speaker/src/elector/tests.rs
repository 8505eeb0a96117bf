//! The loop's owner with all four seams in memory, under virtual time.

mod calls;
mod copies;
mod early;
mod egress;
mod gates;
mod steered;
mod suspected;

use std::sync::{Mutex, PoisonError};

use landfall_core::model::{
    Endpoint, EndpointPort, EndpointSlice, Node, Object, ObjectKey, Pool, Protocol, Service,
    ServicePort, VirtualIp,
};
use landfall_ebpf_common::egress::gateway::PolicyCount;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::sync::watch;

use super::*;
use crate::announcer::twin::{Twin as Announcing, twin};
use crate::datapath::egress::{Bound, Standing, State, Usage};
use crate::datapath::{Attachment, Change as Told, Held, Interfaces, VipCount};
use crate::egress::{InForce, PolicyName};
use crate::membership::twin::{Hub, Twin as Member};
use crate::node_rules::Rules;
use crate::replication::{Bindings, Copied, Copying, Happened, Roles};

/// By which mark the node's rules know what was translated.
const ARRIVAL: u32 = 0x1000;
const STEP: Duration = Duration::from_millis(20);
const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/// Node rules and data path that note what they are told.
#[derive(Default)]
struct Lower {
    rules: Mutex<Rules>,
    /// Nothing, if nobody has said where to be attached.
    uplinks: Mutex<Option<BTreeSet<u32>>>,
    told: Mutex<Vec<Told>>,
    /// How often it was told something, and what of it is written.
    said: Mutex<u64>,
    written: watch::Sender<u64>,
    /// It writes nothing for now.
    slow: Mutex<bool>,
    /// Why the programs are not attached.
    hindrance: Mutex<Option<String>>,
    roles: Mutex<Roles>,
    standings: Mutex<BTreeMap<IpAddr, Standing>>,
    /// What each part has put into the kernel, once it is told to: the rules, the programs, the gateway's.
    in_force: [watch::Sender<InForce>; 3],
    /// The policies that a process before was the gateway of.
    left: Mutex<BTreeSet<PolicyName>>,
    /// What policies' pods use here.
    usage: Mutex<BTreeMap<PolicyName, Usage>>,
    /// The gateway is to be out of the kernel.
    disarmed: Mutex<bool>,
    /// Whether its programs are in force.
    gateway: Mutex<State>,
    /// Packets that the rules have dropped for want of a gateway.
    dropped: Mutex<BTreeMap<PolicyName, u64>>,
    /// And the guard.
    unled: Mutex<BTreeMap<PolicyName, u64>>,
}

impl Lower {
    fn rules(&self) -> Rules {
        self.rules
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn write_slowly(&self, slow: bool) {
        *self.slow.lock().unwrap() = slow;
        if !slow {
            self.written.send_replace(*self.said.lock().unwrap());
        }
    }
}

impl NodeRules for Lower {
    fn apply(&self, rules: Rules) {
        *self.rules.lock().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    fn kube_proxy_serves(&self, _: IpAddr, _: Protocol, _: u16) -> Option<bool> {
        None
    }

    fn arrival_mark(&self) -> Option<u32> {
        Some(ARRIVAL)
    }

    fn in_force(&self) -> watch::Receiver<InForce> {
        self.in_force[0].subscribe()
    }

    fn egress_dropped(&self) -> BTreeMap<PolicyName, u64> {
        self.dropped.lock().unwrap().clone()
    }
}

impl DataPath for Lower {
    fn attach(&self, interfaces: Interfaces) {
        *self.uplinks.lock().unwrap_or_else(PoisonError::into_inner) = Some(interfaces.uplinks);
    }

    fn change(&self, changes: Vec<Told>) -> u64 {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.extend(changes);
        let mut said = self.said.lock().unwrap();
        *said += 1;
        if !*self.slow.lock().unwrap() {
            self.written.send_replace(*said);
        }
        *said
    }

    fn written(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }

    fn held(&self) -> Arc<Held> {
        Arc::default()
    }

    fn counts(&self) -> BTreeMap<IpAddr, VipCount> {
        BTreeMap::new()
    }

    fn egress_dropped(&self) -> BTreeMap<PolicyName, u64> {
        self.unled.lock().unwrap().clone()
    }

    fn unguarded(&self) -> BTreeMap<u32, String> {
        BTreeMap::new()
    }

    fn gateway(&self) -> State {
        self.gateway.lock().unwrap().clone()
    }

    fn stand(&self, standings: BTreeMap<IpAddr, Standing>) {
        *self.standings.lock().unwrap() = standings;
    }

    fn replicate(&self) -> (Arc<dyn Bindings>, Receiver<Happened>) {
        unreachable!("who copies is in memory too")
    }

    fn gateway_counts(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::new()
    }

    fn usage(&self) -> BTreeMap<PolicyName, Usage> {
        self.usage.lock().unwrap().clone()
    }

    fn pod_counts(&self) -> std::io::Result<BTreeMap<IpAddr, PolicyCount>> {
        Ok(BTreeMap::new())
    }

    fn bindings(
        &self,
        _: usize,
        _: &dyn Fn(&Bound) -> bool,
    ) -> std::io::Result<(Vec<Bound>, usize)> {
        Ok((Vec::new(), 0))
    }

    fn disarm(&self, disarmed: bool) {
        *self.disarmed.lock().unwrap() = disarmed;
    }

    fn attachments(&self) -> BTreeMap<u32, Attachment> {
        let hindrance = self.hindrance.lock().unwrap().clone();
        let attachment = hindrance.map_or(Attachment::Tcx, |reason| Attachment::Absent { reason });
        let uplinks = self.uplinks.lock().unwrap();
        let attached = uplinks.iter().flatten().map(|it| (*it, attachment.clone()));
        attached.collect()
    }

    fn in_force(&self) -> watch::Receiver<InForce> {
        self.in_force[1].subscribe()
    }

    fn gateway_in_force(&self) -> watch::Receiver<InForce> {
        self.in_force[2].subscribe()
    }

    fn was_gateway_of(&self, policy: &PolicyName) -> bool {
        self.left.lock().unwrap().contains(policy)
    }
}

impl Copying for Lower {
    fn take_roles(&self, roles: Roles) {
        *self.roles.lock().unwrap() = roles;
    }

    fn rekey(&self, _: Keys) {}

    fn copied(&self) -> Copied {
        Copied::new()
    }
}

struct Host {
    speaker: Speaker,
    announcing: Announcing,
    lower: Arc<Lower>,
    news: UnboundedReceiver<MembershipEvent>,
    told: usize,
    /// The groups whose status may have changed.
    touched: BTreeSet<GroupId>,
}

struct World {
    /// Speakers that begin treat packets by egress policies.
    egress: bool,
    /// And a program judges them.
    cilium: bool,
    /// Objects come from files: nobody waits for kube-proxy.
    manifests: bool,
    now: Duration,
    hub: Hub,
    hosts: BTreeMap<NodeName, Host>,
    objects: Vec<Object>,
}

/// The Ethernet address of a node called n and its number.
fn mac_of(name: &NodeName) -> MacAddr {
    let number = name.0.trim_start_matches('n').parse().unwrap();
    mk_interface(number).mac
}

fn mk_interface(node: u8) -> Interface {
    Interface {
        index: 2,
        name: "eth0".into(),
        mac: MacAddr([2, 0, 0, 0, 0, node]),
        mtu: 1500,
        up: true,
        enslaved: false,
        addresses: vec![format!("10.88.0.{}/24", 10 + node).parse().unwrap()],
        default_route: (true, false),
        routers: (Some([10, 88, 0, 1].into()), None),
    }
}

fn mk_objects(vips: u16) -> Vec<Object> {
    let mut objects: Vec<Object> = (1..=3)
        .map(|n| {
            Object::Node(Node {
                name: format!("n{n}").as_str().into(),
                labels: BTreeMap::new(),
                addresses: vec![format!("10.88.0.{}", 10 + n).parse().unwrap()],
                pod_cidrs: Vec::new(),
                network_unavailable: false,
            })
        })
        .collect();
    objects.push(Object::Pool(Pool {
        name: "lan".into(),
        generation: 0,
        labels: BTreeMap::new(),
        ranges: vec!["10.88.0.200-10.88.0.250".parse().unwrap()],
        purpose: landfall_core::model::Purpose::Ingress,
        auto_assign: true,
        avoid_buggy_ips: false,
        allocation: None,
        quarantine: Duration::ZERO,
        retain_assigned: false,
        flaw: None,
    }));
    objects.extend((0..vips).map(|n| {
        let address: IpAddr = format!("10.88.0.{}", 200 + n).parse().unwrap();
        Object::VirtualIp(VirtualIp {
            services: vec![ObjectKey::new("default", format!("s{n}"))],
            ..VirtualIp::unheld(address, "lan".into(), address.to_string().as_str().into())
        })
    }));
    objects
}

impl World {
    fn new(vips: u16) -> Self {
        Self::of(vips, true)
    }

    fn of(vips: u16, manifests: bool) -> Self {
        let mut world = Self {
            egress: true,
            cilium: false,
            manifests,
            now: Duration::from_secs(10),
            hub: Hub::default(),
            hosts: BTreeMap::new(),
            objects: mk_objects(vips),
        };
        for n in 1..=3 {
            world.boot(n, u64::from(n));
        }
        world
    }

    fn boot(&mut self, n: u8, boot: u64) {
        let host = self.boot_blind(n, boot);
        let interfaces: Arc<[Interface]> = Arc::new([mk_interface(n)]);
        let now = self.now;
        self.host(&host)
            .speaker
            .announcer(AnnouncerEvent::Interfaces(interfaces), now);
    }

    /// One that knows no interfaces yet; its name.
    fn boot_blind(&mut self, n: u8, boot: u64) -> String {
        let name = NodeName::from(format!("n{n}").as_str());
        let lower = Arc::new(Lower::default());
        self.boot_over(&name, boot, lower)
    }

    /// One over what is in the kernel.
    fn boot_over(&mut self, name: &NodeName, boot: u64, lower: Arc<Lower>) -> String {
        let (member, news): (Member, _) = self.hub.join(name.clone(), BootId(boot));
        let (announcing, _events) = twin();
        let parts = Parts {
            announcer: Arc::new(announcing.clone()),
            rules: lower.clone(),
            datapath: lower.clone(),
            membership: Arc::new(member),
            copying: Some(lower.clone()),
        };
        let identity = Identity {
            node: name.clone(),
            boot: BootId(boot),
            manifests: self.manifests,
            delivery: crate::datapath::Delivery::KubeProxy,
            egress_mark: self.egress.then_some(crate::egress::MARK),
            cilium: self.cilium.then(|| "/maps".into()),
            routers: Vec::new(),
            gossip: "10.88.0.1:7950".parse().unwrap(),
            replication_port: 7953,
            peers: Vec::new(),
        };
        let metrics = Metrics::register(&mut Registry::default());
        let mut speaker = Speaker::new(identity, parts, Keys::parse(KEY).unwrap(), metrics);
        for object in &self.objects {
            speaker.source(Event::Apply(object.clone()));
        }
        for kind in kinds() {
            speaker.source(Event::Synced(kind));
        }
        let host = Host {
            speaker,
            announcing,
            lower,
            news,
            told: 0,
            touched: BTreeSet::new(),
        };
        self.hosts.insert(name.clone(), host);
        name.to_string()
    }

    fn step(&mut self) {
        self.now += STEP;
        let mut said: Vec<(NodeName, Vec<u8>)> = Vec::new();
        for (name, host) in &mut self.hosts {
            while let Ok(event) = host.news.try_recv() {
                host.speaker.membership(event, self.now);
            }
            let touched = host.speaker.settle(self.now, 0);
            host.touched.extend(touched);
            let hellos = host.announcing.asked().hellos;
            said.extend(
                hellos[host.told..]
                    .iter()
                    .map(|(_, payload)| (name.clone(), payload.clone())),
            );
            host.told = hellos.len();
        }
        for (from, payload) in said {
            for (to, host) in &mut self.hosts {
                if *to != from {
                    let event = AnnouncerEvent::Hello {
                        interface: 2,
                        from: mac_of(&from),
                        payload: payload.clone(),
                    };
                    host.speaker.announcer(event, self.now);
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

    fn announcers(&self) -> BTreeMap<IpAddr, Vec<String>> {
        let mut all: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
        for (name, host) in &self.hosts {
            for vip in host.announcing.asked().announced.into_keys() {
                all.entry(vip).or_default().push(name.to_string());
            }
        }
        all
    }

    fn assert_one_owner_each(&self, vips: usize) {
        let all = self.announcers();
        assert_eq!(all.len(), vips);
        for (vip, owners) in all {
            assert_eq!(owners.len(), 1, "{vip}: {owners:?}");
        }
    }

    fn host(&mut self, name: &str) -> &mut Host {
        self.hosts.get_mut(&NodeName::from(name)).unwrap()
    }

    /// The kernel goes by what this node was told last: its rules, its programs, or the gateway's.
    fn put_in_force(&mut self, name: &str, part: usize) {
        let lower = &self.host(name).lower;
        let egress = lower.rules().egress.map(|leaving| leaving.egress.clone());
        lower.in_force[part].send_replace(egress.as_ref().into());
    }

    fn tell(&mut self, object: &Object) {
        for host in self.hosts.values_mut() {
            host.speaker.source(Event::Apply(object.clone()));
        }
        self.objects.push(object.clone());
    }
}

#[test]
fn one_announces_each_and_a_dead_one_is_replaced() {
    let mut world = World::new(30);
    world.run(Duration::from_secs(2));
    world.assert_one_owner_each(30);
    let first = world.announcers();
    assert!(world.hosts.values().all(|host| host.speaker.is_ready()));
    world.hosts.remove(&NodeName::from("n2"));
    world.hub.lose(&"n2".into());
    world.run(Duration::from_secs(2));
    world.assert_one_owner_each(30);
    let second = world.announcers();
    for (vip, owners) in &first {
        if owners[0] != "n2" {
            assert_eq!(second[vip], *owners, "{vip} moved for nothing");
        }
    }
    world.boot(2, 99);
    world.run(Duration::from_secs(3));
    assert_eq!(world.announcers(), second, "a returning node takes nothing");
}

#[test]
fn a_stopping_speaker_hands_over_without_a_gap_and_falls_silent() {
    let mut world = World::new(12);
    world.run(Duration::from_secs(2));
    world.host("n1").speaker.leave();
    for _ in 0..50 {
        world.step();
        assert_eq!(world.announcers().len(), 12, "a gap");
    }
    assert!(world.host("n1").speaker.is_drained());
    world.host("n1").speaker.silence();
    let before = world.host("n1").announcing.asked().hellos.len();
    world.run(Duration::from_secs(1));
    let asked = world.host("n1").announcing.asked();
    assert!(asked.announced.is_empty() && asked.listening.is_empty());
    assert_eq!(asked.hellos.len(), before);
    world.assert_one_owner_each(12);
}

#[test]
fn rules_and_data_path_follow() {
    let mut world = World::new(2);
    world.run(Duration::from_secs(2));
    let host = world.host("n1");
    let rules = host.lower.rules();
    assert_eq!(rules.vips.len(), 2);
    assert!(rules.uplinks.values().all(|uplink| &**uplink == "eth0"));
    let uplinks = host.lower.uplinks.lock().unwrap().clone();
    assert_eq!(uplinks, Some(BTreeSet::from([2])));
    assert_eq!(host.announcing.asked().listening, [2]);
    let told = host.lower.told.lock().unwrap();
    let marks = told.iter().filter(|it| matches!(it, Told::Mark(_)));
    assert_eq!(marks.collect::<Vec<_>>(), [&Told::Mark(ARRIVAL)]);
}

/// What an earlier run has attached stays where it is.
#[test]
fn nothing_is_taken_away_before_the_interfaces_are_known() {
    let mut world = World::new(1);
    let name = world.boot_blind(2, 7);
    world.run(Duration::from_secs(3));
    let lower = world.host(&name).lower.clone();
    assert_eq!(*lower.uplinks.lock().unwrap(), None);
    assert!(lower.told.lock().unwrap().is_empty());
    let interfaces: Arc<[Interface]> = Arc::new([mk_interface(2)]);
    let now = world.now;
    world
        .host(&name)
        .speaker
        .announcer(AnnouncerEvent::Interfaces(interfaces), now);
    world.run(Duration::from_secs(1));
    assert_eq!(*lower.uplinks.lock().unwrap(), Some(BTreeSet::from([2])));
}

/// Nodes hear each other on a segment before there is any address to announce there.
#[test]
fn a_pool_that_comes_later_is_listened_for() {
    let mut world = World::new(2);
    let second = Interface {
        index: 3,
        name: "eth1".into(),
        mac: MacAddr([2, 0, 0, 0, 1, 1]),
        addresses: vec!["10.89.0.11/24".parse().unwrap()],
        default_route: (false, false),
        routers: (None, None),
        ..mk_interface(1)
    };
    let now = world.now;
    let both: Arc<[Interface]> = Arc::new([mk_interface(1), second]);
    let host = world.host("n1");
    host.speaker
        .announcer(AnnouncerEvent::Interfaces(both), now);
    world.run(Duration::from_secs(5));
    assert_eq!(world.host("n1").announcing.asked().listening, [2]);
    let mut pools = mk_objects(0).into_iter().filter_map(|object| match object {
        Object::Pool(pool) => Some(pool),
        _ => None,
    });
    let pool = Pool {
        name: "second-lan".into(),
        ranges: vec!["10.89.0.200-10.89.0.250".parse().unwrap()],
        ..pools.next().unwrap()
    };
    world.tell(&Object::Pool(pool));
    world.run(Duration::from_secs(1));
    assert_eq!(world.host("n1").announcing.asked().listening, [2, 3]);
}

/// What an earlier speaker has left in its kernel goes on: to its peers it steers all the time.
#[test]
fn a_speaker_that_begins_anew_stays_in_the_data_path_of_others() {
    let mut world = World::new(2);
    world.run(Duration::from_secs(3));
    world.host("n2").lower.told.lock().unwrap().clear();
    world.boot(1, 77);
    world.run(Duration::from_secs(3));
    assert!(world.host("n1").speaker.is_ready());
    for change in &*world.host("n2").lower.told.lock().unwrap() {
        if let Told::Node(id, state) = change
            && *id.name.0 == *"n1"
        {
            let goes_on = state.as_ref().is_some_and(|it| it.alive && it.steers);
            assert!(goes_on, "told of n1: {state:?}");
        }
    }
}

/// A Service with a port.
fn mk_port(key: &ObjectKey) -> Object {
    Object::Service(Service {
        ports: vec![ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 6443,
            node_port: None,
        }],
        ..mk_service(key)
    })
}

/// Its ready endpoints, on the nodes whose addresses they have, or on `n1`.
fn mk_slice(key: &ObjectKey, addresses: impl Iterator<Item = String>) -> Object {
    let endpoint = |address: String| Endpoint {
        node: (!address.starts_with("10.88.")).then(|| "n1".into()),
        address: address.parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
    };
    Object::EndpointSlice(EndpointSlice {
        key: ObjectKey::new("default", format!("{}-1", key.name)),
        service: key.clone(),
        family: landfall_core::ip::Family::V4,
        ports: vec![EndpointPort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 6443,
        }],
        endpoints: addresses.map(endpoint).collect(),
    })
}

/// kube-proxy cannot be asked: a Service counts as served after two seconds, and goes on so while its endpoints
/// change, but not when they were all gone.
#[test]
fn what_was_waited_for_once_stays_served() {
    let mut world = World::of(1, false);
    let key = ObjectKey::new("default", "s0");
    let pods = |number: u8| {
        let pods = (0..number).map(|n| format!("10.244.1.{}", 10 + n));
        mk_slice(&ObjectKey::new("default", "s0"), pods)
    };
    let ready = |world: &mut World| {
        let host = world.host("n2");
        host.speaker.election().is_ready("10.88.0.200")
    };
    world.tell(&mk_port(&key));
    world.run(Duration::from_secs(1));
    world.tell(&pods(1));
    world.run(Duration::from_secs(1));
    assert!(!ready(&mut world));
    world.run(Duration::from_millis(1500));
    assert!(ready(&mut world));
    for number in [2, 3, 1] {
        world.tell(&pods(number));
        world.run(Duration::from_millis(100));
        assert!(ready(&mut world), "{number}");
    }
    world.tell(&pods(0));
    world.run(Duration::from_secs(1));
    world.tell(&pods(1));
    world.run(Duration::from_millis(100));
    assert!(!ready(&mut world));
}

#[test]
fn processes_of_nodes_are_delivered_to_and_lead() {
    let mut world = World::new(1);
    let key = ObjectKey::new("default", "s0");
    world.tell(&mk_port(&key));
    world.tell(&mk_slice(
        &key,
        (1..=3).map(|n| format!("10.88.0.{}", 10 + n)),
    ));
    world.run(Duration::from_secs(1));
    let own: SocketAddr = "10.88.0.12:6443".parse().unwrap();
    let now = world.now;
    let host = world.host("n2");
    assert_eq!(host.speaker.host_questions(), BTreeSet::from([own]));
    host.speaker.host_endpoint(own, true, now);
    world.run(Duration::from_secs(1));
    assert_eq!(
        world.announcers().into_values().collect::<Vec<_>>(),
        [["n2"]],
        "the one whose process answers leads"
    );
    let rules = world.host("n2").lower.rules();
    let targets = rules.host_services.values().next().unwrap();
    assert_eq!((targets.local, targets.remote.len()), (Some(own), 2));
    let rules = world.host("n1").lower.rules();
    let targets = rules.host_services.values().next().unwrap();
    assert_eq!((targets.local, targets.remote.len()), (None, 2));
}

#[test]
fn another_station_that_answers_is_shown() {
    let mut world = World::new(1);
    world.run(Duration::from_secs(2));
    let vip: IpAddr = "10.88.0.200".parse().unwrap();
    let owner = world.announcers()[&vip][0].clone();
    let now = world.now;
    let event = AnnouncerEvent::Conflict {
        vip,
        by: MacAddr([6; 6]),
        interface: "eth0".into(),
    };
    world.host(&owner).speaker.announcer(event, now);
    let mut reporter = crate::status::Reporter::default();
    let touched = BTreeSet::from(["10.88.0.200".into()]);
    let later = now + Duration::from_secs(1);
    let speaker = &world.host(&owner).speaker;
    assert!(reporter.look(speaker, touched, now, 0).is_empty());
    let writes = reporter.look(speaker, BTreeSet::new(), later, 0);
    let text = format!("{writes:?}");
    assert!(text.contains("AddressConflict"), "{text}");
    assert_eq!(writes.len(), 2, "an Event and a status: {text}");
    assert!(
        reporter
            .look(
                speaker,
                BTreeSet::from(["10.88.0.200".into()]),
                later * 2,
                0
            )
            .iter()
            .all(|write| !matches!(write, crate::status::Write::Event { .. })),
        "told once"
    );
}

#[test]
fn idle_speakers_write_nothing_more() {
    let mut world = World::new(5);
    let mut reporters: BTreeMap<NodeName, crate::status::Reporter> = BTreeMap::new();
    let mut writes = 0;
    for _ in 0..250 {
        world.step();
        for (name, host) in &mut world.hosts {
            let touched = host.speaker.settle(world.now, 0);
            let reporter = reporters.entry(name.clone()).or_default();
            let groups = host.speaker.index().groups().keys().cloned();
            let touched: BTreeSet<_> = groups.chain(touched).collect();
            writes += reporter.look(&host.speaker, touched, world.now, 0).len();
        }
    }
    assert_eq!(writes, 5, "one write an address");
}

fn mk_service(key: &ObjectKey) -> Service {
    Service {
        key: key.clone(),
        uid: String::new(),
        labels: BTreeMap::new(),
        created: 0,
        load_balancer: true,
        class: None,
        ports: Vec::new(),
        selector: BTreeMap::new(),
        traffic_policy: landfall_core::model::TrafficPolicy::Cluster,
        health_check_node_port: 0,
        affinity: false,
        udp_ports: false,
        source_ranges: None,
        families: Vec::new(),
        family_policy: landfall_core::model::FamilyPolicy::SingleStack,
        request: landfall_core::model::AddressRequest::default(),
        ingress: Vec::new(),
        conditions: Vec::new(),
        assigned_pool: None,
    }
}
