//! Whatever happened, and however it was taken in: the index says what a new one says of what there is now, and what the
//! rules say when they are written down a second time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proptest::prelude::*;

use super::choice::choose;
use super::tests::{mk_labels, mk_pod, mk_policy, mk_pool, mk_vip};
use super::*;
use crate::model::{EgressSource, Namespace, Purpose, VirtualIp};
use crate::selector::{LabelSelector, Operator, Requirement};

const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const PODS: [&str; 4] = ["10.0.0.0", "10.0.0.1", "fd00::", "fd00::1"];
const VIPS: [&str; 4] = ["192.0.2.0", "192.0.2.1", "2001:db8::", "2001:db8::1"];
const POLICIES: [&str; 4] = ["p0", "p1", "p2", "p3"];

/// What there is.
#[derive(Clone, Debug, Default)]
struct Objects(BTreeMap<ObjectId, Object>);

impl Objects {
    fn take(&mut self, event: &Event) {
        match event {
            Event::Apply(object) => {
                self.0.insert(object.id(), object.clone());
            }
            Event::Delete(id) => {
                self.0.remove(id);
            }
            Event::Unwatched(_) => self.0.retain(|id, _| !matches!(id, ObjectId::Pod(_))),
            Event::Synced(_) => {}
        }
    }

    fn all<'a, T: 'a>(&'a self, pick: impl Fn(&'a Object) -> Option<&'a T>) -> Vec<&'a T> {
        self.0.values().filter_map(pick).collect()
    }

    fn policies(&self) -> Vec<&EgressPolicy> {
        self.all(|object| match object {
            Object::EgressPolicy(policy) => Some(&**policy),
            _ => None,
        })
    }

    fn vips(&self) -> Vec<&VirtualIp> {
        self.all(|object| match object {
            Object::VirtualIp(vip) => Some(vip),
            _ => None,
        })
    }

    fn pods(&self) -> Vec<&Pod> {
        self.all(|object| match object {
            Object::Pod(pod) => Some(pod),
            _ => None,
        })
    }

    fn labels(&self, name: &str, listed: bool) -> Option<Labels> {
        let id = ObjectId::Namespace(name.into());
        let mut labels = match self.0.get(&id) {
            Some(Object::Namespace(namespace)) => namespace.labels.clone(),
            _ if listed => return None,
            _ => Labels::new(),
        };
        labels.insert(NAME_LABEL.into(), name.into());
        Some(labels)
    }

    /// The policies that select a pod, the winner first.
    fn claims(&self, pod: &Pod, namespace: &Labels) -> Vec<&EgressPolicy> {
        let mut claims = self.policies();
        claims.retain(|policy| {
            let spec = &policy.spec;
            spec.namespaces
                .as_ref()
                .is_none_or(|s| s.matches(namespace))
                && spec.pods.as_ref().is_none_or(|s| s.matches(&pod.labels))
        });
        claims.sort_by_key(|policy| {
            let count = |s: &Option<LabelSelector>| s.as_ref().map(|s| s.requirements.len());
            let (pods, namespaces) = (count(&policy.spec.pods), count(&policy.spec.namespaces));
            let both = pods.is_some() && namespaces.is_some();
            let requirements = pods.unwrap_or(0) + namespaces.unwrap_or(0);
            (!both, usize::MAX - requirements, policy.name.clone())
        });
        claims
    }

    fn admits(&self, policy: &EgressPolicy, pool: &str, name: &str, labels: &Labels) -> bool {
        if let EgressSource::Service(service) = &policy.spec.source {
            return *service.namespace == *name;
        }
        match self.0.get(&ObjectId::Pool(pool.into())) {
            Some(Object::Pool(pool)) => {
                pool.purpose != Purpose::Ingress
                    && pool.allocation.as_ref().is_none_or(|rules| {
                        rules.namespaces.iter().any(|listed| listed == name)
                            || rules.namespace_selectors.iter().any(|s| s.matches(labels))
                    })
            }
            _ => false,
        }
    }

    /// Whose an address is, by the rules.
    fn judged(&self, address: IpAddr, listed: bool) -> Option<Judged> {
        let mut owners = self.pods();
        owners.retain(|pod| !pod.host_network && pod.addresses.contains(&address));
        owners.sort_by_key(|pod| (pod.terminating, -pod.created, pod.key.clone()));
        let pod = owners.first()?;
        let name = &pod.key.namespace;
        let labels = self.labels(name, listed)?;
        let tenant = self.claims(pod, &labels).first().map(|policy| {
            let mut offered: Vec<IpAddr> = self
                .vips()
                .into_iter()
                .filter(|vip| vip.egress_policies.contains(&policy.name))
                .filter(|vip| vip.address.is_ipv4() == address.is_ipv4())
                .filter(|vip| self.admits(policy, &vip.pool, name, &labels))
                .map(|vip| vip.address)
                .collect();
            offered.sort_unstable();
            Tenant {
                policy: policy.name.clone(),
                egress_ip: choose(&pod.key, &offered),
            }
        });
        Some(Judged {
            pod: pod.key.clone(),
            identity: Judged::identity_of(pod),
            node: pod.node.clone(),
            tenant,
        })
    }

    /// How many pods a policy has, loses to others, and does not match.
    fn counts(&self, policy: &EgressPolicy, listed: bool) -> (usize, usize, usize) {
        let mut counts = (0, 0, 0);
        for pod in self.pods() {
            let Some(labels) = self.labels(&pod.key.namespace, listed) else {
                continue;
            };
            let claims = self.claims(pod, &labels);
            if pod.addresses.is_empty() || !claims.contains(&policy) {
                continue;
            }
            if pod.host_network {
                counts.2 += 1;
            } else if claims[0] == policy {
                counts.0 += 1;
            } else {
                counts.1 += 1;
            }
        }
        counts
    }
}

/// Some of two labels with two values each.
fn mk_random_labels() -> impl Strategy<Value = Vec<(&'static str, &'static str)>> {
    let value = || prop_oneof![Just(None), Just(Some("1")), Just(Some("2"))];
    (value(), value()).prop_map(|(x, y)| {
        let x = x.map(|value| ("x", value));
        x.into_iter().chain(y.map(|value| ("y", value))).collect()
    })
}

fn mk_random_selector() -> impl Strategy<Value = Option<LabelSelector>> {
    let operator = prop_oneof![
        4 => Just(Operator::In(BTreeSet::from(["1".into()]))),
        2 => Just(Operator::In(BTreeSet::from(["1".into(), "2".into()]))),
        1 => Just(Operator::NotIn(BTreeSet::from(["1".into()]))),
        1 => Just(Operator::Exists),
        1 => Just(Operator::DoesNotExist),
    ];
    let requirement =
        (prop_oneof![Just("x"), Just("y")], operator).prop_map(|(key, operator)| Requirement {
            key: key.into(),
            operator,
        });
    prop_oneof![
        1 => Just(None),
        3 => proptest::collection::vec(requirement, 1..3)
            .prop_map(|requirements| Some(LabelSelector { requirements })),
    ]
}

fn mk_random_pod() -> impl Strategy<Value = Pod> {
    let name = (0..3usize, 0..3u8).prop_map(|(n, name)| format!("{}/{name}", NAMESPACES[n]));
    let addresses = proptest::collection::btree_set(0..4usize, 0..3);
    let host = proptest::bool::weighted(0.1);
    (
        name,
        mk_random_labels(),
        addresses,
        host,
        any::<bool>(),
        0..2i64,
    )
        .prop_map(
            |(name, labels, addresses, host_network, terminating, created)| {
                let addresses: Vec<&str> = addresses.into_iter().map(|n| PODS[n]).collect();
                Pod {
                    host_network,
                    created,
                    terminating,
                    ..mk_pod(&name, &labels, &addresses)
                }
            },
        )
}

fn mk_random_policy() -> impl Strategy<Value = EgressPolicy> {
    let source = prop_oneof![
        3 => Just(EgressSource::Pool { name: "out".into(), count: 1, families: Vec::new() }),
        1 => Just(EgressSource::Addresses(vec!["192.0.2.0".parse().unwrap()])),
        1 => (0..3usize).prop_map(|n| EgressSource::Service(ObjectKey::new(NAMESPACES[n], "s"))),
    ];
    (
        0..4usize,
        mk_random_selector(),
        mk_random_selector(),
        source,
    )
        .prop_map(|(number, namespaces, pods, source)| {
            let mut policy = mk_policy(POLICIES[number], &[], &[]);
            policy.spec.source = source;
            policy.spec.namespaces = namespaces;
            policy.spec.pods = pods;
            policy
        })
}

fn mk_random_pool() -> impl Strategy<Value = Pool> {
    let name = prop_oneof![2 => Just("out"), 1 => Just("other")];
    let admitted = prop_oneof![Just(vec![]), Just(vec!["a"]), Just(vec!["b", "c"])];
    (name, admitted, any::<bool>(), proptest::bool::weighted(0.2)).prop_map(
        |(name, admitted, by_label, ingress)| {
            let mut pool = mk_pool(name, &admitted);
            if let Some(rules) = pool.allocation.as_mut().filter(|_| by_label) {
                rules.namespace_selectors = vec![LabelSelector::of_labels([("x", "2")])];
            }
            if ingress {
                pool.purpose = Purpose::Ingress;
            }
            pool
        },
    )
}

fn mk_event() -> impl Strategy<Value = Event> {
    let namespace = (0..3usize, mk_random_labels()).prop_map(|(n, labels)| Namespace {
        name: NAMESPACES[n].into(),
        labels: mk_labels(&labels),
    });
    let vip = (
        0..4usize,
        any::<bool>(),
        proptest::collection::btree_set(0..4usize, 0..3),
    )
        .prop_map(|(n, out, policies)| {
            let policies: Vec<&str> = policies.into_iter().map(|n| POLICIES[n]).collect();
            mk_vip(VIPS[n], if out { "out" } else { "other" }, &policies)
        });
    let gone = prop_oneof![
        6 => mk_random_pod().prop_map(|pod| ObjectId::Pod(pod.key)),
        3 => (0..4usize).prop_map(|n| ObjectId::EgressPolicy(POLICIES[n].into())),
        1 => (0..3usize).prop_map(|n| ObjectId::Namespace(NAMESPACES[n].into())),
        1 => Just(ObjectId::Pool("out".into())),
        2 => (0..4usize).prop_map(|n| ObjectId::VirtualIp(VIPS[n].parse().unwrap())),
    ];
    prop_oneof![
        12 => mk_random_pod().prop_map(|pod| Event::Apply(Object::Pod(pod))),
        8 => mk_random_policy().prop_map(|p| Event::Apply(Object::EgressPolicy(Box::new(p)))),
        4 => namespace.prop_map(|namespace| Event::Apply(Object::Namespace(namespace))),
        3 => mk_random_pool().prop_map(|pool| Event::Apply(Object::Pool(pool))),
        5 => vip.prop_map(|vip| Event::Apply(Object::VirtualIp(vip))),
        8 => gone.prop_map(Event::Delete),
        1 => Just(Event::Unwatched(Kind::Pod)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_history_ends_as_its_objects_say(
        steps in proptest::collection::vec((mk_event(), proptest::bool::weighted(0.4)), 1..60),
        listed in any::<bool>(),
        backwards in any::<bool>(),
    ) {
        let options = Options { namespaces_listed: listed };
        let (mut index, mut objects) = (EgressIndex::new(options), Objects::default());
        // What a reader knows who looks only at what it is told has changed.
        let mut told: BTreeMap<IpAddr, Judged> = BTreeMap::new();
        let mut reports: BTreeMap<Arc<str>, Report> = BTreeMap::new();
        let last = steps.len() - 1;
        for (at, (event, look)) in steps.into_iter().enumerate() {
            objects.take(&event);
            index.apply(event);
            if !look && at != last {
                continue;
            }
            let changed = index.reconcile();
            for address in changed.addresses {
                match index.judged().get(&address) {
                    Some(judged) => told.insert(address, judged.clone()),
                    None => told.remove(&address),
                };
            }
            for name in changed.policies {
                match index.report(&name) {
                    Some(report) => reports.insert(name, report),
                    None => reports.remove(&name),
                };
            }
            prop_assert_eq!(&told, index.judged());
            for address in PODS {
                let address: IpAddr = address.parse().unwrap();
                let (said, ruled) = (index.judged().get(&address), objects.judged(address, listed));
                prop_assert_eq!(said, ruled.as_ref());
            }
            for policy in objects.policies() {
                let report = index.report(&policy.name).unwrap();
                let counts = (report.matched, report.taken.values().sum(), report.host_network);
                prop_assert_eq!(counts, objects.counts(policy, listed), "{}", policy.name);
                prop_assert_eq!(reports.get(&policy.name), Some(&report));
            }
        }
        let mut fresh = EgressIndex::new(options);
        let mut all: Vec<Object> = objects.0.into_values().collect();
        if backwards {
            all.reverse();
        }
        for object in all {
            fresh.apply(Event::Apply(object));
        }
        fresh.reconcile();
        prop_assert_eq!(fresh.judged(), index.judged());
        prop_assert_eq!(fresh.policies().count(), reports.len());
        for (name, report) in reports {
            prop_assert_eq!(fresh.report(&name), Some(report));
        }
    }
}
