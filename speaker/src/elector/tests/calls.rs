//! Calls of the CNI plugin: when they are answered.

use landfall_cni::call::{Attachment, Reply, Request};
use landfall_core::model::Pod;
use tokio::sync::oneshot::{self, Receiver};

use super::egress::{mk_world, tell_mail};
use super::*;
use crate::cni::Call;

pub(super) const ADDRESS: &str = "10.244.1.5";

/// A pod as the API server knows it before it has an address.
fn mk_pod(name: &str, app: &str) -> Object {
    Object::Pod(mk_pod_at("n1", name, app))
}

pub(super) fn mk_pod_at(node: &str, name: &str, app: &str) -> Pod {
    Pod {
        key: ObjectKey::new("default", name),
        uid: String::new(),
        labels: BTreeMap::from([("app".into(), app.into())]),
        addresses: Vec::new(),
        node: Some(node.into()),
        host_network: false,
        created: 0,
        terminating: false,
    }
}

pub(super) fn mk_attachment(container: &str, name: Option<&str>) -> Attachment {
    Attachment {
        container: container.into(),
        interface: "eth0".into(),
        namespace: name.map(|_| "default".into()),
        name: name.map(str::to_owned),
        uid: None,
        addresses: vec![ADDRESS.parse().unwrap()],
        host_interfaces: Vec::new(),
    }
}

fn call(world: &mut World, request: Request) -> Receiver<Reply> {
    call_at(world, "n1", request)
}

pub(super) fn call_at(world: &mut World, node: &str, request: Request) -> Receiver<Reply> {
    let (answer, answered) = oneshot::channel();
    let now = world.now;
    world.host(node).speaker.cni(Call { request, answer }, now);
    answered
}

fn add(world: &mut World, container: &str, name: &str) -> Receiver<Reply> {
    call(world, Request::Add(mk_attachment(container, Some(name))))
}

fn put_in_force(world: &mut World, part: usize) {
    world.put_in_force("n1", part);
    world.step();
}

fn tenant(world: &World) -> Option<String> {
    let lower = &world.hosts[&NodeName::from("n1")].lower;
    let leaving = lower.rules().egress?;
    let pod = leaving.egress.pods.get(&ADDRESS.parse().unwrap())?;
    Some(pod.tenant.as_ref().map_or("nobody", |it| &it.policy).into())
}

#[test]
fn a_call_is_answered_when_the_kernel_goes_by_it() {
    let mut world = mk_world();
    tell_mail(&mut world);
    world.tell(&mk_pod("mta", "mta"));
    world.run(Duration::from_secs(1));
    for part in [0, 1] {
        put_in_force(&mut world, part);
    }
    assert_eq!(tenant(&world), None);
    let mut answered = add(&mut world, "c1", "mta");
    world.step();
    assert_eq!(tenant(&world).as_deref(), Some("mail"), "it is not put off");
    assert!(answered.try_recv().is_err());
    put_in_force(&mut world, 1);
    assert!(answered.try_recv().is_err(), "the rules are not there");
    put_in_force(&mut world, 0);
    assert!(answered.try_recv().unwrap().judged);
    // It goes, and its address is another's before the API server knows.
    let mut answered = call(&mut world, Request::Del(mk_attachment("c1", Some("mta"))));
    assert!(answered.try_recv().unwrap().judged);
    world.tell(&mk_pod("web", "web"));
    let mut answered = add(&mut world, "c2", "web");
    world.step();
    assert!(
        answered.try_recv().is_err(),
        "in force is what the address was before"
    );
    world.run(Duration::from_millis(40));
    assert_eq!(tenant(&world).as_deref(), Some("nobody"));
    for part in [0, 1] {
        put_in_force(&mut world, part);
    }
    assert!(answered.try_recv().unwrap().judged);
}

#[test]
fn a_pod_that_the_api_server_has_not_told_of_is_waited_for() {
    let mut world = mk_world();
    tell_mail(&mut world);
    let mut answered = add(&mut world, "c1", "mta");
    for _ in 0..10 {
        world.run(Duration::from_millis(100));
        put_in_force(&mut world, 0);
        put_in_force(&mut world, 1);
    }
    assert!(answered.try_recv().is_err());
    world.tell(&mk_pod("mta", "mta"));
    world.step();
    put_in_force(&mut world, 0);
    put_in_force(&mut world, 1);
    assert!(answered.try_recv().unwrap().judged);
    // Nobody knows which pod that is.
    let nameless = Request::Add(mk_attachment("c3", None));
    let mut answered = call(&mut world, nameless);
    world.step();
    let reply = answered.try_recv().unwrap();
    assert!(!reply.judged && reply.reason.unwrap().contains("which pod"));
}

#[test]
fn without_a_policy_nobody_waits_but_for_an_earlier_ones_rules_to_go() {
    let mut world = mk_world();
    let mut answered = add(&mut world, "c1", "mta");
    world.step();
    assert!(
        answered.try_recv().is_err(),
        "what is in the kernel is not known"
    );
    put_in_force(&mut world, 0);
    put_in_force(&mut world, 1);
    assert!(answered.try_recv().unwrap().judged);
    // One who has gone is forgotten.
    tell_mail(&mut world);
    drop(add(&mut world, "c2", "mta"));
    world.run(Duration::from_millis(100));
    assert!(!world.host("n1").speaker.is_waited_for());
}
