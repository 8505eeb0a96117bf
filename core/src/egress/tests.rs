use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::*;
use crate::model::{
    EgressSource, Endpoint, EndpointSlice, Namespace, Purpose, ServiceAllocation, VirtualIp,
};
use crate::selector::{LabelSelector, Labels};

pub(super) fn mk_labels(labels: &[(&str, &str)]) -> Labels {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    labels.iter().map(owned).collect()
}

/// A pod `namespace/name` on node `n1`.
pub(super) fn mk_pod(name: &str, labels: &[(&str, &str)], addresses: &[&str]) -> Pod {
    let (namespace, name) = name.split_once('/').unwrap();
    Pod {
        key: ObjectKey::new(namespace, name),
        uid: String::new(),
        labels: mk_labels(labels),
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        node: Some("n1".into()),
        host_network: false,
        created: 0,
        terminating: false,
    }
}

/// A policy for pods and namespaces with these labels, of pool `out`.
pub(super) fn mk_policy(
    name: &str,
    namespaces: &[(&str, &str)],
    pods: &[(&str, &str)],
) -> EgressPolicy {
    let selector = |labels: &[(&str, &str)]| {
        (!labels.is_empty()).then(|| LabelSelector::of_labels(labels.iter().copied()))
    };
    let mut policy = EgressPolicy::plain(name, EgressSource::of_pool("out"));
    policy.generation = 1;
    policy.spec.namespaces = selector(namespaces);
    policy.spec.pods = selector(pods);
    policy
}

pub(super) fn mk_pool(name: &str, namespaces: &[&str]) -> Pool {
    Pool {
        name: name.into(),
        generation: 1,
        labels: Labels::new(),
        ranges: Vec::new(),
        purpose: Purpose::Both,
        auto_assign: true,
        avoid_buggy_ips: false,
        allocation: (!namespaces.is_empty()).then(|| ServiceAllocation {
            namespaces: namespaces.iter().map(|name| (*name).to_owned()).collect(),
            ..ServiceAllocation::default()
        }),
        quarantine: Duration::ZERO,
        retain_assigned: false,
        flaw: None,
    }
}

/// A slice of the API server's Service.
pub(super) fn mk_slice(name: &str, address: &str) -> EndpointSlice {
    let address = address.parse().unwrap();
    EndpointSlice {
        key: ObjectKey::new("default", name),
        service: ObjectKey::new("default", "kubernetes"),
        family: Family::of(address),
        ports: Vec::new(),
        endpoints: vec![Endpoint {
            address,
            node: None,
            ready: true,
            serving: true,
            terminating: false,
        }],
    }
}

pub(super) fn mk_vip(address: &str, pool: &str, policies: &[&str]) -> VirtualIp {
    VirtualIp {
        egress_policies: policies.iter().map(|name| (*name).into()).collect(),
        ..VirtualIp::unheld(address.parse().unwrap(), pool.into(), "g".into())
    }
}

/// An index that knows namespaces `a` and `b` (labelled `tenant` like their names) and pool `out`.
fn mk_index() -> EgressIndex {
    let mut index = EgressIndex::new(Options {
        namespaces_listed: true,
    });
    for name in ["a", "b"] {
        put(
            &mut index,
            Object::Namespace(Namespace {
                name: name.into(),
                labels: mk_labels(&[("tenant", name)]),
            }),
        );
    }
    put(&mut index, Object::Pool(mk_pool("out", &[])));
    index
}

fn put(index: &mut EgressIndex, object: Object) {
    index.apply(Event::Apply(object));
}

fn put_policy(index: &mut EgressIndex, policy: EgressPolicy) {
    put(index, Object::EgressPolicy(Box::new(policy)));
}

/// `policy address` of whose an address is; `-` for what there is not.
fn fate(index: &EgressIndex, address: &str) -> String {
    let Some(judged) = index.judged().get(&address.parse::<IpAddr>().unwrap()) else {
        return "unknown".to_owned();
    };
    let Some(tenant) = &judged.tenant else {
        return format!("{} -", judged.pod);
    };
    let egress = tenant.egress_ip.map_or("-".to_owned(), |ip| ip.to_string());
    format!("{} {} {egress}", judged.pod, tenant.policy)
}

const MAIL: (&str, &str) = ("app", "mail");

#[test]
fn the_most_specific_policy_wins_and_the_others_say_so() {
    let mut index = mk_index();
    put(
        &mut index,
        Object::Pod(mk_pod("a/p", &[MAIL, ("tier", "1")], &["10.0.0.1"])),
    );
    for (policy, winner) in [
        (mk_policy("z-pods", &[], &[MAIL]), "z-pods"),
        (mk_policy("y-pods", &[], &[MAIL]), "y-pods"),
        (mk_policy("z-more", &[], &[MAIL, ("tier", "1")]), "z-more"),
        (mk_policy("z-both", &[("tenant", "a")], &[MAIL]), "z-both"),
        (
            mk_policy("other", &[("tenant", "b")], &[MAIL, ("tier", "1")]),
            "z-both",
        ),
    ] {
        put_policy(&mut index, policy);
        index.reconcile();
        assert_eq!(fate(&index, "10.0.0.1"), format!("a/p {winner} -"));
    }
    let report = index.report("y-pods").unwrap();
    assert_eq!(report.matched, 0);
    assert_eq!(report.taken, BTreeMap::from([("z-both".into(), 1)]));
    let pod = ObjectKey::new("a", "p");
    assert_eq!(report.taken_pod, Some((pod, "z-both".into())));
    assert_eq!(index.report("z-both").unwrap().matched, 1);
    assert_eq!(index.report("other").unwrap(), Report::default());
    index.apply(Event::Delete(ObjectId::EgressPolicy("z-both".into())));
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "a/p z-more -");
}

#[test]
fn pods_on_the_hosts_network_and_without_address_are_not_matched() {
    let mut index = mk_index();
    put_policy(&mut index, mk_policy("p", &[], &[MAIL]));
    let mut host = mk_pod("a/host", &[MAIL], &["10.88.0.11"]);
    host.host_network = true;
    put(&mut index, Object::Pod(host));
    put(&mut index, Object::Pod(mk_pod("a/new", &[MAIL], &[])));
    index.reconcile();
    let report = index.report("p").unwrap();
    assert_eq!((report.matched, report.host_network), (0, 1));
    assert_eq!(fate(&index, "10.88.0.11"), "unknown");
    // It gets an address, loses its label, and ends.
    put(
        &mut index,
        Object::Pod(mk_pod("a/new", &[MAIL], &["10.0.0.1"])),
    );
    let changed = index.reconcile();
    assert_eq!(changed.addresses.len(), 1);
    assert_eq!(index.report("p").unwrap().matched, 1);
    put(&mut index, Object::Pod(mk_pod("a/new", &[], &["10.0.0.1"])));
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "a/new -");
    put(&mut index, Object::Pod(mk_pod("a/new", &[], &[])));
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "unknown");
}

#[test]
fn an_address_is_the_present_pods() {
    let mut index = mk_index();
    let mut old = mk_pod("a/old", &[MAIL], &["10.0.0.1"]);
    old.terminating = true;
    put(&mut index, Object::Pod(old));
    put(&mut index, Object::Pod(mk_pod("b/new", &[], &["10.0.0.1"])));
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "b/new -");
    index.apply(Event::Delete(ObjectId::Pod(ObjectKey::new("b", "new"))));
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "a/old -");
}

#[test]
fn a_pod_whose_namespace_is_not_known_is_not_judged() {
    let mut index = mk_index();
    put(
        &mut index,
        Object::Pod(mk_pod("late/p", &[MAIL], &["10.0.0.1"])),
    );
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "unknown");
    let late = Namespace {
        name: "late".into(),
        labels: Labels::new(),
    };
    put(&mut index, Object::Namespace(late));
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "late/p -");
    // Without Namespace objects it counts as one that has its name.
    let mut index = EgressIndex::new(Options::default());
    put_policy(&mut index, mk_policy("p", &[(NAME_LABEL, "late")], &[]));
    put(
        &mut index,
        Object::Pod(mk_pod("late/p", &[MAIL], &["10.0.0.1"])),
    );
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "late/p p -");
}

#[test]
fn a_namespace_that_the_pool_does_not_admit_has_no_address() {
    let mut index = mk_index();
    put(&mut index, Object::Pool(mk_pool("out", &["a"])));
    put_policy(&mut index, mk_policy("p", &[], &[MAIL]));
    put(
        &mut index,
        Object::VirtualIp(mk_vip("192.0.2.1", "out", &["p"])),
    );
    put(
        &mut index,
        Object::Pod(mk_pod("a/p", &[MAIL], &["10.0.0.1", "fd00::1"])),
    );
    put(
        &mut index,
        Object::Pod(mk_pod("b/p", &[MAIL], &["10.0.0.2"])),
    );
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "a/p p 192.0.2.1");
    assert_eq!(fate(&index, "fd00::1"), "a/p p -");
    assert_eq!(fate(&index, "10.0.0.2"), "b/p p -");
    let report = index.report("p").unwrap();
    assert_eq!(
        report.matched, 2,
        "it is its tenant all the same: nothing leaks"
    );
    assert_eq!(report.not_admitted, BTreeMap::from([("b".into(), 1)]));
    assert_eq!(report.lacking, BTreeSet::from([Family::V6]));
    put(&mut index, Object::Pool(mk_pool("out", &["a", "b"])));
    let changed = index.reconcile();
    assert_eq!(
        changed.addresses,
        BTreeSet::from(["10.0.0.2".parse().unwrap()])
    );
    assert!(index.report("p").unwrap().not_admitted.is_empty());
    index.apply(Event::Delete(ObjectId::Pool("out".into())));
    index.reconcile();
    assert_eq!(
        fate(&index, "10.0.0.1"),
        "a/p p -",
        "nobody knows whom it admitted"
    );
}

#[test]
fn a_services_address_is_for_its_own_namespace() {
    let mut index = mk_index();
    let mut policy = mk_policy("p", &[], &[MAIL]);
    policy.spec.source = EgressSource::Service(ObjectKey::new("a", "mail"));
    put_policy(&mut index, policy);
    put(
        &mut index,
        Object::VirtualIp(mk_vip("192.0.2.1", "out", &["p"])),
    );
    put(
        &mut index,
        Object::Pod(mk_pod("a/p", &[MAIL], &["10.0.0.1"])),
    );
    put(
        &mut index,
        Object::Pod(mk_pod("b/thief", &[MAIL], &["10.0.0.2"])),
    );
    index.reconcile();
    assert_eq!(fate(&index, "10.0.0.1"), "a/p p 192.0.2.1");
    assert_eq!(fate(&index, "10.0.0.2"), "b/thief p -");
    let report = index.report("p").unwrap();
    assert_eq!(report.not_admitted, BTreeMap::from([("b".into(), 1)]));
}

#[test]
fn a_pod_keeps_its_address_of_several() {
    let mut index = mk_index();
    put_policy(&mut index, mk_policy("p", &[], &[MAIL]));
    for n in 0..4 {
        let vip = mk_vip(&format!("192.0.2.{n}"), "out", &["p"]);
        put(&mut index, Object::VirtualIp(vip));
    }
    for n in 0..100 {
        let pod = mk_pod(&format!("a/p{n}"), &[MAIL], &[&format!("10.0.0.{n}")]);
        put(&mut index, Object::Pod(pod));
    }
    index.reconcile();
    let of = |index: &EgressIndex| -> BTreeMap<IpAddr, IpAddr> {
        let judged = index.judged().iter();
        judged
            .map(|(ip, judged)| (*ip, judged.tenant.as_ref().unwrap().egress_ip.unwrap()))
            .collect()
    };
    let before = of(&index);
    let gone: IpAddr = "192.0.2.3".parse().unwrap();
    let spread: BTreeMap<IpAddr, usize> =
        before.values().fold(BTreeMap::new(), |mut spread, ip| {
            *spread.entry(*ip).or_default() += 1;
            spread
        });
    println!("100 pods over 4 addresses: {spread:?}");
    assert_eq!(spread.len(), 4);
    index.apply(Event::Delete(ObjectId::VirtualIp(gone)));
    let changed = index.reconcile();
    assert_eq!(changed.addresses.len(), spread[&gone]);
    for (pod, egress) in of(&index) {
        assert!(egress != gone && (before[&pod] == egress || before[&pod] == gone));
    }
}

#[test]
fn pods_are_listed_only_while_there_is_a_policy() {
    let mut index = mk_index();
    for kind in [
        Kind::Namespace,
        Kind::Pool,
        Kind::VirtualIp,
        Kind::EgressPolicy,
    ] {
        assert!(!index.is_synced());
        index.apply(Event::Synced(kind));
    }
    assert!(index.is_synced());
    put_policy(&mut index, mk_policy("p", &[], &[MAIL]));
    assert!(!index.is_synced());
    put(
        &mut index,
        Object::Pod(mk_pod("a/p", &[MAIL], &["10.0.0.1"])),
    );
    index.apply(Event::Synced(Kind::Pod));
    assert!(index.is_synced());
    index.reconcile();
    index.apply(Event::Unwatched(Kind::Pod));
    assert!(!index.is_synced());
    let changed = index.reconcile();
    assert_eq!(changed.addresses.len(), 1);
    assert!(index.judged().is_empty());
    assert_eq!(index.report("p").unwrap(), Report::default());
}

/// 10 000 pods of 1 000 tenants under 1 000 policies. What is compared is counted; the times are printed.
#[test]
fn ten_thousand_pods_under_a_thousand_policies() {
    let mut index = EgressIndex::new(Options {
        namespaces_listed: true,
    });
    let begun = Instant::now();
    put(&mut index, Object::Pool(mk_pool("out", &[])));
    for n in 0..1_000 {
        let tenant = format!("t{n}");
        put(
            &mut index,
            Object::Namespace(Namespace {
                name: tenant.as_str().into(),
                labels: mk_labels(&[("tenant", &tenant), ("kind", "customer")]),
            }),
        );
        // All ask for the same labels of pods: only the namespace tells them apart.
        let policy = mk_policy(
            &tenant,
            &[("kind", "customer"), ("tenant", &tenant)],
            &[MAIL],
        );
        put_policy(&mut index, policy);
        let vip = mk_vip(&format!("192.0.{}.{}", n / 250, n % 250), "out", &[&tenant]);
        put(&mut index, Object::VirtualIp(vip));
    }
    for n in 0..10_000 {
        let name = format!("t{}/p{n}", n % 1_000);
        let address = format!("10.{}.{}.1", n / 250, n % 250);
        let pod = mk_pod(&name, &[MAIL, ("tier", "1")], &[&address]);
        put(&mut index, Object::Pod(pod));
    }
    let changed = index.reconcile();
    let all = begun.elapsed();
    assert_eq!(changed.addresses.len(), 10_000);
    assert!(index.judged().values().all(|judged| {
        let tenant = judged.tenant.as_ref().unwrap();
        *tenant.policy == *judged.pod.namespace && tenant.egress_ip.is_some()
    }));

    let namespace = &index.namespaces["t7"];
    let compared = index
        .seekers
        .of(namespace, &mk_labels(&[MAIL, ("tier", "1")]));
    // The first policy was filed under the label that all share, before that was known.
    assert!(
        compared.len() <= 2,
        "a pod is compared with the policies of its tenant, not {compared:?}"
    );
    let policy = &index.policies["t7"].policy;
    assert_eq!(index.could_match(policy).len(), 10);

    let begun = Instant::now();
    for n in 0..1_000 {
        let name = format!("t{n}/p{n}");
        let address = format!("10.{}.{}.1", n / 250, n % 250);
        put(&mut index, Object::Pod(mk_pod(&name, &[MAIL], &[&address])));
        index.reconcile();
    }
    let pods = begun.elapsed();
    let begun = Instant::now();
    for n in 0..1_000 {
        let tenant = format!("t{n}");
        put_policy(
            &mut index,
            mk_policy(&tenant, &[("tenant", &tenant)], &[MAIL]),
        );
        index.reconcile();
    }
    let policies = begun.elapsed();
    println!(
        "10 000 pods, 1 000 policies: all at once {all:?}; a pod that changes {:?}, a policy that changes {:?}",
        pods / 1_000,
        policies / 1_000
    );
}
