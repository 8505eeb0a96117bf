use super::*;
use crate::model::{EgressPolicy, EgressSource};
use crate::selector::LabelSelector;
use crate::steering::Distribution;

fn mk_node(name: &str, labels: &[(&str, &str)]) -> Event {
    Event::Apply(Object::Node(Node {
        name: name.into(),
        labels: labels
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect(),
        addresses: vec![format!("10.88.0.1{}", name.len()).parse().unwrap()],
        pod_cidrs: Vec::new(),
        network_unavailable: false,
    }))
}

fn mk_advertisement(name: &str) -> Advertisement {
    Advertisement::plain(name)
}

fn mk_vip(address: &str, group: &str, service: &str) -> Event {
    Event::Apply(Object::VirtualIp(VirtualIp {
        services: vec![ObjectKey::new("default", service)],
        ..VirtualIp::unheld(address.parse().unwrap(), "lan".into(), group.into())
    }))
}

fn mk_index() -> GroupIndex {
    let mut index = GroupIndex::new(Options::default());
    index.apply(mk_node("a", &[]));
    index.apply(mk_node("bb", &[("rack", "2"), (EXCLUDE_LABEL, "")]));
    index.apply(mk_vip("10.88.0.200", "g", "web"));
    index.apply(mk_vip("fd00:88::200", "g", "web"));
    index
}

fn admitted(index: &GroupIndex, node: &str) -> Result<u32, Refused> {
    let group = &index.groups()["g"];
    group.vips[0]
        .placement
        .admission(&node.into())
        .map(|admission| admission.weight)
}

#[test]
fn both_families_are_one_group_and_no_advertisement_means_everywhere() {
    let mut index = mk_index();
    assert_eq!(index.reconcile().len(), 1);
    assert_eq!(index.groups()["g"].vips.len(), 2);
    assert_eq!(admitted(&index, "a"), Ok(1));
    assert_eq!(admitted(&index, "bb"), Err(Refused::Excluded));
    assert!(index.reconcile().is_empty());
}

#[test]
fn a_node_is_admitted_when_any_advertisement_admits_it() {
    let mut index = mk_index();
    let mut picky = mk_advertisement("picky");
    picky.node_selectors = vec![LabelSelector::of_labels([("rack", "1")])];
    index.apply(Event::Apply(Object::Advertisement(picky)));
    index.reconcile();
    assert_eq!(admitted(&index, "a"), Err(Refused::NotSelected));
    let mut rack = mk_advertisement("rack");
    rack.node_selectors = vec![LabelSelector::of_labels([("rack", "2")])];
    rack.ignore_exclude_lb = true;
    rack.interfaces = vec!["eth*".into()];
    index.apply(Event::Apply(Object::Advertisement(rack)));
    assert_eq!(index.reconcile().len(), 1);
    assert_eq!(admitted(&index, "bb"), Ok(1));
    let group = &index.groups()["g"];
    let admission = group.vips[0].placement.admission(&"bb".into()).unwrap();
    assert!(admission.names("eth7") && !admission.names("wlan0") && !admission.by_subnet);
}

#[test]
fn an_advertisement_of_another_pool_changes_nothing() {
    let mut index = mk_index();
    index.reconcile();
    let mut other = mk_advertisement("other");
    other.pools = vec!["dmz".into()];
    index.apply(Event::Apply(Object::Advertisement(other)));
    assert!(index.reconcile().is_empty());
}

#[test]
fn service_selectors_that_match_nothing_admit_nobody() {
    let mut index = mk_index();
    let mut picky = mk_advertisement("picky");
    picky.service_selectors = vec![LabelSelector::of_labels([("tier", "mail")])];
    index.apply(Event::Apply(Object::Advertisement(picky)));
    index.reconcile();
    assert_eq!(admitted(&index, "a"), Err(Refused::NoAdvertisement));
}

#[test]
fn a_resting_address_is_in_no_group() {
    let mut index = mk_index();
    index.reconcile();
    for address in ["10.88.0.200", "fd00:88::200"] {
        index.apply(Event::Delete(ObjectId::VirtualIp(address.parse().unwrap())));
    }
    assert_eq!(index.reconcile().len(), 1);
    assert!(index.groups().is_empty() && index.groups_of.is_empty());
}

#[test]
fn who_drains_serves_until_a_ready_one_can() {
    let nodes =
        |names: &[&str]| -> Distribution { names.iter().map(|name| ((*name).into(), 1)).collect() };
    let spread = Spread {
        ready: nodes(&["new", "other"]),
        draining: nodes(&["gone", "old"]),
    };
    let over = |serving: &[&str]| spread.over(|node| serving.contains(&&*node.0), |_| true);
    assert_eq!(over(&["old"]), nodes(&["old"]));
    assert_eq!(over(&["old", "new"]), nodes(&["new"]));
    assert_eq!(over(&["old", "new", "other"]), nodes(&["new", "other"]));
    assert_eq!(over(&[]), nodes(&[]));
    let near = |near: &str| spread.over(|_| true, |node| *node.0 == *near);
    assert_eq!(near("new"), nodes(&["new"]));
    assert_eq!(
        near("old"),
        nodes(&["new", "other"]),
        "who is ready goes before who is near"
    );
}

fn mk_egress_vip(address: &str, group: &str, service: Option<&str>) -> Event {
    let services = service.map(|name| ObjectKey::new("default", name));
    Event::Apply(Object::VirtualIp(VirtualIp {
        services: services.into_iter().collect(),
        egress_policies: vec!["mail".into()],
        ..VirtualIp::unheld(address.parse().unwrap(), "lan".into(), group.into())
    }))
}

fn mk_policy(gateways: Option<LabelSelector>) -> Event {
    let mut policy = EgressPolicy::plain("mail", EgressSource::Addresses(Vec::new()));
    policy.spec.pods = Some(LabelSelector::of_labels([("app", "mail")]));
    policy.spec.gateways = gateways;
    Event::Apply(Object::EgressPolicy(Box::new(policy)))
}

#[test]
fn a_policys_addresses_are_a_group_of_its_own_on_its_gateways() {
    let mut index = mk_index();
    let mut all = mk_advertisement("all");
    (all.failback, all.ignore_exclude_lb) = (true, true);
    index.apply(Event::Apply(Object::Advertisement(all)));
    index.apply(mk_policy(None));
    index.apply(mk_egress_vip("10.88.0.201", "e", None));
    index.reconcile();
    let group = index.groups()["e"].clone();
    assert!(group.services.is_empty() && group.egress.contains("mail"));
    assert!(!group.failback() && !group.rebalance());
    assert!(index.groups()["g"].failback(), "a Service's is as it was");
    let of = |index: &GroupIndex, group: &str, node: &str| {
        let placement = &index.groups()[group].vips[0].placement;
        placement.admission(&node.into()).map(|_| ())
    };
    assert_eq!(
        (of(&index, "e", "a"), of(&index, "e", "bb")),
        (Ok(()), Ok(()))
    );
    // It names its gateways; the Service's group goes where it went.
    let rack = Some(LabelSelector::of_labels([("rack", "2")]));
    index.apply(mk_policy(rack));
    assert_eq!(index.reconcile(), BTreeSet::from(["e".into()]));
    assert_eq!(of(&index, "e", "a"), Err(Refused::NotGateway));
    assert_eq!(of(&index, "e", "bb"), Ok(()));
    assert_eq!(of(&index, "e", "unknown"), Err(Refused::NotGateway));
    assert_eq!(of(&index, "g", "a"), Ok(()));
    // It uses the Service's addresses: its gateways are these addresses' leaders, and all of the group's.
    index.apply(mk_egress_vip("10.88.0.200", "g", Some("web")));
    index.reconcile();
    assert_eq!(of(&index, "g", "a"), Err(Refused::NotGateway));
    let group = &index.groups()["g"];
    assert!(!group.failback() && !group.rebalance() && group.services.len() == 1);
    assert_eq!(group.egress.len(), 1);
    index.apply(Event::Delete(ObjectId::EgressPolicy("mail".into())));
    assert_eq!(index.reconcile().len(), 2);
    assert_eq!(of(&index, "g", "a"), Ok(()));
}
