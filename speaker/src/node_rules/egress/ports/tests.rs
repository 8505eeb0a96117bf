//! Where addresses are, and what the table is told of it.

use super::*;

fn mk_port(name: &str, addresses: &[&str]) -> Port {
    Port {
        name: name.into(),
        end: (!addresses.is_empty()).then_some((0, 2)),
        addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
    }
}

fn mk_pods(pods: &[(&str, u64)]) -> Pods {
    pods.iter()
        .map(|(address, pod)| (address.parse().unwrap(), *pod))
        .collect()
}

/// What is said of these ports, before and after a change.
fn said(pods: [&Pods; 2], ports: [&[(u32, Port)]; 2]) -> Said {
    let mut known = Ports::default();
    for (pods, ports) in pods.into_iter().zip(ports) {
        let ports = ports.iter().cloned().collect();
        known.places = places(&known.places, &known.pods, pods, &ports);
        known.seen = ports;
        known.pods = pods.clone();
    }
    known.saying()
}

fn at(said: &Said) -> Vec<String> {
    said.at.iter().map(Element::text).collect()
}

#[test]
fn an_address_stays_where_it_was_for_as_long_as_it_is_its_pods() {
    let first = (7, mk_port("veth7", &["10.0.0.7"]));
    let both = [
        first.clone(),
        (9, mk_port("veth9", &["10.0.0.9", "10.0.0.7"])),
    ];
    let pods = mk_pods(&[("10.0.0.7", 1), ("10.0.0.9", 1)]);
    let known = said([&pods, &pods], [&both[..1], &both]);
    assert_eq!(at(&known), ["\"veth7\" . 10.0.0.7", "\"veth9\" . 10.0.0.9"]);
    // Both at once: nobody knows.
    let new = said([&Pods::new(), &pods], [&[], &both]);
    assert_eq!(at(&new), ["\"veth9\" . 10.0.0.9"]);
    assert_eq!(
        new.pods.len(),
        2,
        "what is nobody's is not sent from anywhere"
    );
    // It is another pod's now, and the port of the one before is still there.
    let next = mk_pods(&[("10.0.0.7", 2), ("10.0.0.9", 1)]);
    let handed_on = said([&pods, &next], [&both[..1], &both]);
    assert_eq!(at(&handed_on), ["\"veth9\" . 10.0.0.9"]);
    // And when that has gone.
    let moved = said([&pods, &pods], [&both[..1], &both[1..]]);
    assert_eq!(at(&moved), ["\"veth9\" . 10.0.0.7", "\"veth9\" . 10.0.0.9"]);
}

#[test]
fn what_leads_elsewhere_is_not_judged() {
    let ports = [
        (3, mk_port("eth1", &[])),
        (7, mk_port("veth7", &["10.0.0.7"])),
    ];
    let pods = mk_pods(&[("10.0.0.7", 1), ("10.0.0.8", 1)]);
    let said = said([&Pods::new(), &pods], [&[], &ports]);
    assert_eq!(said.trunks, BTreeSet::from(["eth1".into()]));
    assert_eq!(
        said.pods.len(),
        1,
        "of a pod that is at no bridge nothing is said"
    );
}
