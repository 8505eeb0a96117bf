//! Pods whose gateway hears of them before the API server does.

use landfall_cni::call::{Reply, Request};
use tokio::sync::oneshot::Receiver;

use super::calls::{ADDRESS, call_at, mk_attachment, mk_pod_at};
use super::egress::{leader, mk_world, tell_mail};
use super::*;

const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// A cluster with a policy in force, a node with a pod of it that has no address yet, and another that is its gateway.
struct Scene {
    world: World,
    node: &'static str,
    gateway: &'static str,
}

impl Scene {
    fn new() -> Self {
        let mut world = mk_world();
        tell_mail(&mut world);
        world.run(Duration::from_secs(2));
        let leader = leader(&world);
        let of = |is: bool| *NODES.iter().find(|node| (**node == leader) == is).unwrap();
        let (node, gateway) = (of(false), of(true));
        let mut scene = Self {
            world,
            node,
            gateway,
        };
        scene.tell(&[]);
        scene.settle(&NODES, &[0, 1, 2]);
        scene
    }

    /// What the API server says of the pod.
    fn tell(&mut self, addresses: &[&str]) {
        let mut pod = mk_pod_at(self.node, "mta", "mta");
        pod.addresses = addresses.iter().map(|it| it.parse().unwrap()).collect();
        self.world.tell(&Object::Pod(pod));
    }

    fn settle(&mut self, nodes: &[&str], parts: &[usize]) {
        self.world.run(Duration::from_millis(200));
        for node in nodes {
            for part in parts {
                self.world.put_in_force(node, *part);
            }
        }
        self.world.run(Duration::from_millis(200));
    }

    fn add(&mut self) -> Receiver<Reply> {
        let request = Request::Add(mk_attachment("c1", Some("mta")));
        call_at(&mut self.world, self.node, request)
    }

    fn del(&mut self) {
        let request = Request::Del(mk_attachment("c1", Some("mta")));
        let mut answered = call_at(&mut self.world, self.node, request);
        assert!(answered.try_recv().unwrap().judged);
    }

    /// Whether the gateway is to go by the pod's address.
    fn is_led(&self) -> bool {
        let lower = &self.world.hosts[&NodeName::from(self.gateway)].lower;
        let egress = lower.rules().egress.map(|leaving| leaving.egress.clone());
        let pods = &egress.unwrap().pods;
        let pod = pods.get(&ADDRESS.parse::<IpAddr>().unwrap());
        pod.is_some_and(|pod| pod.node.0 == self.node.into() && pod.tenant.is_some())
    }
}

#[test]
fn a_call_is_answered_when_the_gateway_goes_by_it() {
    let mut scene = Scene::new();
    assert!(!scene.is_led());
    let mut answered = scene.add();
    scene.settle(&[scene.node], &[0, 1]);
    assert!(scene.is_led(), "the API server has said nothing of it");
    assert!(answered.try_recv().is_err(), "its programs do not know it");
    scene.settle(&[scene.gateway], &[2]);
    assert!(answered.try_recv().unwrap().judged);
    let election = &scene.world.host(scene.node).speaker.election;
    let said = election.own_pod(&ObjectKey::new("default", "mta"));
    assert_eq!(
        said.unwrap().addresses.len(),
        1,
        "the API server has not said it yet"
    );
}

#[test]
fn what_a_node_says_stands_until_the_api_server_says_so() {
    let mut scene = Scene::new();
    drop(scene.add());
    scene.settle(&NODES, &[0, 1, 2]);
    // What it says late has no address.
    scene.tell(&[]);
    scene.settle(&NODES, &[0, 1, 2]);
    assert!(scene.is_led());
    scene.tell(&[ADDRESS]);
    scene.settle(&NODES, &[0, 1, 2]);
    assert!(scene.is_led());
    let election = &scene.world.host(scene.gateway).speaker.election;
    let key = ObjectKey::new("default", "mta");
    assert_eq!(election.pod(&key).count(), 0, "its node has taken it back");
    assert!(!election.knows_pod(&scene.gateway.into(), &key, 0));
    let id = ObjectId::Pod(key);
    for host in scene.world.hosts.values_mut() {
        host.speaker.source(Event::Delete(id.clone()));
    }
    scene.settle(&[], &[]);
    assert!(!scene.is_led());
}

#[test]
fn a_pod_that_goes_before_the_api_server_knows_it_is_forgotten() {
    let mut scene = Scene::new();
    drop(scene.add());
    scene.settle(&NODES, &[0, 1, 2]);
    assert!(scene.is_led());
    scene.del();
    scene.settle(&[], &[]);
    assert!(!scene.is_led());
}

/// Its node's speaker dies before the API server knows the pod: the pod goes on.
#[test]
fn what_a_dead_speaker_said_last_stands() {
    let mut scene = Scene::new();
    drop(scene.add());
    scene.settle(&NODES, &[0, 1, 2]);
    scene.world.hosts.remove(&NodeName::from(scene.node));
    scene.world.hub.lose(&scene.node.into());
    scene.world.run(Duration::from_secs(5));
    assert!(scene.is_led());
}
