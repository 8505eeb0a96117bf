use super::*;
use crate::groups::{GroupIndex, Options};
use crate::model::{Advertisement, Event, Node, Object, Terms, VirtualIp};
use crate::selector::LabelSelector;

const OLD: &str = "192.0.2.1";
const NEW: &str = "198.51.100.1";

fn mk_node(subnet: &str) -> NodeRegister {
    let interface = InterfaceFact {
        name: "eth0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        addresses: Vec::new(),
        subnets: vec![subnet.parse().unwrap()],
        up: true,
        default_route: (false, false),
        heard: BTreeSet::from(["a".into(), "b".into()]),
    };
    NodeRegister {
        interfaces: vec![interface],
        synced: true,
        ..NodeRegister::default()
    }
}

fn mk_record(address: &str, pool: &str, drains: bool) -> Object {
    let terms = Terms {
        drains,
        ..Terms::default()
    };
    Object::VirtualIp(VirtualIp {
        egress_policies: vec!["mail".into()],
        terms: BTreeMap::from([("mail".into(), terms)]),
        ..VirtualIp::unheld(address.parse().unwrap(), pool.into(), "g".into())
    })
}

/// A policy with an address of before and a new one.
fn mk_group(drains: bool, advertisements: Vec<Advertisement>) -> Arc<Group> {
    let mut index = GroupIndex::new(Options::default());
    index.apply(Event::Apply(mk_record(OLD, "old", drains)));
    index.apply(Event::Apply(mk_record(NEW, "new", false)));
    for name in ["a", "b"] {
        index.apply(Event::Apply(Object::Node(Node {
            name: name.into(),
            labels: BTreeMap::from([("name".into(), name.into())]),
            addresses: Vec::new(),
            pod_cidrs: Vec::new(),
            network_unavailable: false,
        })));
    }
    for advertisement in advertisements {
        index.apply(Event::Apply(Object::Advertisement(advertisement)));
    }
    index.reconcile();
    index.groups()["g"].clone()
}

/// Which addresses each of two nodes could announce, or why not.
fn verdicts(
    group: &Group,
    nodes: [&NodeRegister; 2],
    leader: Option<&str>,
) -> [Result<Vec<String>, Ineligible>; 2] {
    let names: [NodeName; 2] = ["a".into(), "b".into()];
    let subjects: Vec<Subject<'_>> = std::iter::zip(&names, nodes)
        .map(|(node, register)| Subject {
            node,
            register: Some(register),
            odd: false,
        })
        .collect();
    let leader = leader.map(NodeName::from);
    let verdicts = judge(group, &subjects, leader.as_ref(), &mut Segments::default());
    let addresses = |choices: BTreeMap<IpAddr, InterfaceChoice>| {
        let addresses = choices.into_keys();
        addresses.map(|address| address.to_string()).collect()
    };
    let verdicts = verdicts.into_iter().map(|it| it.map(addresses));
    verdicts.collect::<Vec<_>>().try_into().unwrap()
}

fn only(address: &str) -> Vec<String> {
    vec![address.to_owned()]
}

#[test]
fn an_address_where_flows_only_end_keeps_nobody_from_leading_the_new_one() {
    let (old, new) = (mk_node("192.0.2.0/24"), mk_node("198.51.100.0/24"));
    let lacks = |address: &str| Err(Ineligible::NoSubnet(address.parse().unwrap()));
    let group = mk_group(true, Vec::new());
    let judged = verdicts(&group, [&old, &new], Some("a"));
    assert_eq!(judged, [lacks(NEW), Ok(only(NEW))]);
    // Where something begins on both, one must have both.
    let group = mk_group(false, Vec::new());
    let judged = verdicts(&group, [&old, &new], Some("a"));
    assert_eq!(judged, [lacks(NEW), lacks(OLD)]);
}

#[test]
fn who_can_lead_both_goes_first() {
    let mut both = mk_node("192.0.2.0/24");
    let interface = &mut both.interfaces[0];
    interface.subnets.push("198.51.100.0/24".parse().unwrap());
    let new = mk_node("198.51.100.0/24");
    let group = mk_group(true, Vec::new());
    let [a, b] = verdicts(&group, [&both, &new], None);
    assert_eq!(a, Ok(vec![OLD.to_owned(), NEW.to_owned()]));
    assert_eq!(b, Err(Ineligible::NoSubnet(OLD.parse().unwrap())));
}

#[test]
fn a_leader_that_is_not_admitted_any_more_goes_on_with_both_until_the_flows_have_ended() {
    let advertisement = |pool: &str, node: &str| Advertisement {
        pools: [pool.into()].into(),
        node_selectors: vec![LabelSelector::of_labels([("name", node)])],
        ..Advertisement::plain(pool)
    };
    let advertisements = vec![advertisement("old", "a"), advertisement("new", "b")];
    let group = mk_group(true, advertisements);
    let node = mk_node("0.0.0.0/0");
    let [a, b] = verdicts(&group, [&node, &node], Some("a"));
    assert!(matches!(a, Err(Ineligible::Refused(_))), "{a:?}");
    assert!(matches!(b, Err(Ineligible::Refused(_))), "{b:?}");
    // Who stops hands over what can be handed over.
    let leaving = NodeRegister {
        leaving: true,
        ..node.clone()
    };
    let judged = verdicts(&group, [&leaving, &node], Some("a"));
    assert_eq!(judged, [Err(Ineligible::Leaving), Ok(only(NEW))]);
    // And once it is gone, or was never there.
    let [a, b] = verdicts(&group, [&node, &node], None);
    assert!(matches!(a, Err(Ineligible::Refused(_))), "{a:?}");
    assert_eq!(b, Ok(only(NEW)));
}
