//! What the objects say of steering: what the leaders' speakers write.

use landfall_core::model::{Advertisement, Steering};
use serde_json::Value;

use super::*;
use crate::status::{Reporter, Write};

/// Two VIPs, and what is written of them.
struct Reported {
    world: World,
    reporters: BTreeMap<NodeName, Reporter>,
    writes: Vec<(String, Value)>,
}

impl Reported {
    fn new() -> Self {
        let mut reported = Self {
            world: World::new(2),
            reporters: BTreeMap::new(),
            writes: Vec::new(),
        };
        reported.run(3);
        reported
    }

    fn run(&mut self, seconds: u64) {
        let end = self.world.now + Duration::from_secs(seconds);
        while self.world.now < end {
            self.world.step();
            let now = self.world.now;
            let wall = u64::try_from(now.as_millis()).unwrap();
            let mut written = Vec::new();
            for (name, host) in &mut self.world.hosts {
                let reporter = self.reporters.entry(name.clone()).or_default();
                let touched = std::mem::take(&mut host.touched);
                for write in reporter.look(&host.speaker, touched, now, wall) {
                    if let Write::Status { name, patch } = write {
                        written.push((name, patch));
                    }
                }
            }
            for (name, patch) in &written {
                self.observe(name, patch);
            }
            self.writes.append(&mut written);
        }
    }

    /// The API server hands what was written to all.
    fn observe(&mut self, name: &str, patch: &Value) {
        let mut vips = self.world.objects.iter().filter_map(|object| match object {
            Object::VirtualIp(vip) if vip.address.to_string() == name => Some(vip),
            _ => None,
        });
        let vip = VirtualIp {
            leader: patch["status"]["leader"].as_str().map(NodeName::from),
            ..vips.next().unwrap().clone()
        };
        self.world.tell(&Object::VirtualIp(vip));
    }

    fn hinder(&mut self, node: &str, why: Option<&str>) {
        *self.world.host(node).lower.hindrance.lock().unwrap() = why.map(str::to_owned);
    }

    /// The condition that was written last of each VIP, all of which are alike but for the time.
    fn condition(&self) -> Value {
        let of = |name: &str| {
            let mut writes = self.writes.iter().rev();
            let (_, patch) = writes.find(|(of, _)| of == name).unwrap();
            let conditions = patch["status"]["conditions"].as_array().unwrap();
            let mut steered = conditions.iter().filter(|it| it["type"] == "Steered");
            steered.next().unwrap().clone()
        };
        let (one, other) = (of("10.88.0.200"), of("10.88.0.201"));
        for key in ["status", "reason", "message"] {
            assert_eq!(one[key], other[key]);
        }
        one
    }
}

fn mk_advertisement(steering: Steering) -> Object {
    Object::Advertisement(Advertisement {
        steering,
        ..Advertisement::plain("it")
    })
}

#[test]
fn nodes_that_cannot_steer_are_named_until_they_can() {
    let mut reported = Reported::new();
    let before = reported.condition();
    assert_eq!(before["status"], "True");
    assert_eq!(before["reason"], "AllNodesSteer");
    assert_eq!(reported.writes.len(), 2, "one for each VIP");

    reported.hinder("n2", Some("no bpf file system"));
    reported.run(10);
    let hindered = reported.condition();
    assert_eq!(hindered["status"], "False");
    assert_eq!(hindered["reason"], "NodesCannotSteer");
    let message = hindered["message"].as_str().unwrap();
    assert!(message.ends_with("; n2: no bpf file system"), "{message}");
    assert_ne!(hindered["lastTransitionTime"], before["lastTransitionTime"]);

    reported.hinder("n3", Some("not permitted"));
    reported.run(20);
    let both = reported.condition();
    let message = both["message"].as_str().unwrap();
    assert!(
        message.ends_with("; n2: no bpf file system; n3: not permitted"),
        "{message}"
    );
    assert_eq!(both["lastTransitionTime"], hindered["lastTransitionTime"]);

    reported.writes.clear();
    reported.run(30);
    assert_eq!(reported.writes, [], "said once");

    reported.hinder("n2", None);
    reported.hinder("n3", None);
    reported.run(20);
    assert_eq!(reported.condition()["reason"], "AllNodesSteer");
}

/// Its speaker says nothing for a moment, and then what it said before.
#[test]
fn a_speaker_that_begins_anew_is_no_news() {
    let mut reported = Reported::new();
    reported.hinder("n2", Some("no bpf file system"));
    reported.run(20);
    let before = reported.condition();
    assert_eq!(before["reason"], "NodesCannotSteer");
    reported.world.boot(2, 77);
    reported.hinder("n2", Some("no bpf file system"));
    reported.reporters.remove(&NodeName::from("n2"));
    let said = reported.writes.len();
    reported.run(20);
    for (_, patch) in &reported.writes[said..] {
        assert_eq!(patch["status"]["conditions"][1], before, "{patch}");
    }
    assert_eq!(reported.condition(), before);
}

#[test]
fn who_does_not_want_steering_is_told_that_there_is_none() {
    let mut reported = Reported::new();
    reported.world.tell(&mk_advertisement(Steering::Off));
    reported.run(15);
    let condition = reported.condition();
    assert_eq!(condition["status"], "False");
    assert_eq!(condition["reason"], "SteeringOff");
    reported.world.tell(&mk_advertisement(Steering::Auto));
    reported.run(15);
    assert_eq!(reported.condition()["reason"], "AllNodesSteer");
}

/// A Service's pods on these nodes.
fn mk_pods(nodes: &[&str]) -> Object {
    let addresses = (10..).take(nodes.len()).map(|n| format!("10.244.1.{n}"));
    let Object::EndpointSlice(mut slice) = mk_slice(&ObjectKey::new("default", "s0"), addresses)
    else {
        unreachable!("a slice was made");
    };
    for (endpoint, node) in slice.endpoints.iter_mut().zip(nodes) {
        endpoint.node = Some((*node).into());
    }
    Object::EndpointSlice(slice)
}

/// How often the data path of a node was told of a port.
fn told_ports(world: &mut World) -> usize {
    let told = world.host("n1").lower.told.lock().unwrap();
    told.iter()
        .filter(|it| matches!(it, Told::Port(..)))
        .count()
}

#[test]
fn every_change_of_a_table_is_a_generation_and_all_nodes_show_the_same_table() {
    const PORT: &str = "10.88.0.200:6443/TCP";
    let mut world = World::new(2);
    world.tell(&mk_port(&ObjectKey::new("default", "s0")));
    world.run(Duration::from_secs(3));
    let look = |world: &mut World| {
        world.run(Duration::from_secs(3));
        let mut generations = Vec::new();
        let mut digests = BTreeSet::new();
        for host in world.hosts.values() {
            let table = host.speaker.debug()["steering"]["tables"][PORT].clone();
            generations.push(table["generation"].as_u64().unwrap());
            digests.insert(table["digest"].as_str().unwrap().to_owned());
        }
        assert_eq!(digests.len(), 1, "the nodes' tables are the same");
        (generations, digests.pop_first().unwrap())
    };
    let grew = |before: &[u64], after: &[u64]| before.iter().zip(after).all(|(one, two)| one < two);
    let (empty, of_none) = look(&mut world);
    world.tell(&mk_pods(&["n1", "n2", "n2"]));
    let (first, one_to_two) = look(&mut world);
    assert!(grew(&empty, &first), "{empty:?} {first:?}");
    assert_ne!(one_to_two, of_none);
    assert_eq!(look(&mut world).0, first, "nothing changed");

    world.tell(&mk_pods(&["n2", "n1", "n2", "n2", "n1", "n2"]));
    let (second, digest) = look(&mut world);
    assert_eq!(
        (second, digest),
        (first.clone(), one_to_two.clone()),
        "the same weights"
    );

    // How its clients are told apart is the port's, not the table's.
    let Object::Service(service) = mk_port(&ObjectKey::new("default", "s0")) else {
        unreachable!("a Service was made");
    };
    let before = told_ports(&mut world);
    world.tell(&Object::Service(Service {
        affinity: true,
        ..service
    }));
    let (second, digest) = look(&mut world);
    assert!(told_ports(&mut world) > before, "the data path was told");
    assert_eq!((second, digest), (first.clone(), one_to_two.clone()));

    world.tell(&mk_pods(&["n1", "n2"]));
    let (third, one_to_one) = look(&mut world);
    assert!(grew(&first, &third), "{first:?} {third:?}");
    assert_ne!(one_to_one, one_to_two);

    world.tell(&mk_pods(&["n1", "n2", "n2"]));
    let (fourth, again) = look(&mut world);
    assert!(grew(&third, &fourth), "{third:?} {fourth:?}");
    assert_eq!(
        again, one_to_two,
        "what it was before is shown as it was before"
    );
}

/// Who steers by what a node says is never ahead of that node's own tables, which would drop what comes.
#[test]
fn what_a_node_serves_others_hear_when_its_own_tables_have_it_and_what_it_does_not_at_once() {
    let mut world = World::new(2);
    world.tell(&mk_port(&ObjectKey::new("default", "s0")));
    world.tell(&mk_pods(&["n1"]));
    world.run(Duration::from_secs(5));
    // Whom the tables of a node name for what is new.
    let named = |world: &mut World, node: &str| -> BTreeSet<String> {
        let told = world.host(node).lower.told.lock().unwrap();
        let ports = told.iter().rev().filter_map(|change| match change {
            Told::Port(_, Some(state)) => Some(state),
            _ => None,
        });
        let nodes = ports.take(1).flat_map(|state| state.nodes.keys());
        nodes.map(|node| node.0.to_string()).collect()
    };
    let of = |nodes: &[&str]| -> BTreeSet<String> { nodes.iter().map(|it| (*it).into()).collect() };
    assert_eq!(named(&mut world, "n1"), of(&["n1"]));

    world.host("n2").lower.write_slowly(true);
    world.tell(&mk_pods(&["n1", "n2"]));
    world.run(Duration::from_secs(5));
    assert_eq!(named(&mut world, "n2"), of(&["n1", "n2"]), "its own");
    assert_eq!(named(&mut world, "n1"), of(&["n1"]), "others do not know");
    world.host("n2").lower.write_slowly(false);
    world.run(Duration::from_millis(500));
    assert_eq!(named(&mut world, "n1"), of(&["n1", "n2"]));

    world.host("n2").lower.write_slowly(true);
    world.tell(&mk_pods(&["n1"]));
    world.run(Duration::from_millis(500));
    assert_eq!(named(&mut world, "n1"), of(&["n1"]));
    assert_eq!(named(&mut world, "n2"), of(&["n1"]));
    // The slice alone would take it out of the tables: so is its word.
    let service = landfall_core::election::service_id(&ObjectKey::new("default", "s0"));
    let speaker = &world.host("n1").speaker;
    let mut groups = speaker.index().groups().keys();
    assert!(!groups.any(|id| speaker.election().serves(&"n2".into(), id, service)));
}
