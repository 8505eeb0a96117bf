use super::super::tests::{mk_labels, mk_pod, mk_policy, mk_pool, mk_slice, mk_vip};
use super::super::*;
use super::*;
use crate::model::{Bandwidth, Event, Namespace, Node, Object, ServiceCidr};

const OUT: &str = "203.0.113.7";

struct World {
    index: EgressIndex,
    cluster: Cluster,
}

impl World {
    /// Namespace `a`; pool `out` with 192.0.2.32, which policy `mail` has for pods `app=mta`, led by `n2`; pod `a/mta` on `n1`.
    fn new() -> Self {
        let mut world = Self {
            index: EgressIndex::new(Options {
                namespaces_listed: true,
            }),
            cluster: Cluster::default(),
        };
        for name in ["a", "b"] {
            world.put(Object::Namespace(Namespace {
                name: name.into(),
                labels: mk_labels(&[]),
            }));
        }
        world.put(Object::Pool(mk_pool("out", &[])));
        world.policy(|_| {});
        world.vip(|_| {});
        world.put(Object::Pod(mk_pod(
            "a/mta",
            &[("app", "mta")],
            &["10.0.0.5"],
        )));
        for (name, pods, own) in [
            ("n1", "10.0.0.0/24", "192.0.2.11"),
            ("n2", "10.0.1.0/24", "192.0.2.12"),
        ] {
            let node = Node {
                name: name.into(),
                labels: mk_labels(&[]),
                addresses: vec![own.parse().unwrap()],
                pod_cidrs: vec![pods.parse().unwrap()],
                network_unavailable: false,
            };
            world.network(Object::Node(node));
            world.cluster.nodes.insert(name.into());
        }
        world
    }

    fn network(&mut self, object: Object) {
        assert!(self.cluster.networks.apply(&Event::Apply(object)));
    }

    fn put(&mut self, object: Object) {
        self.index.apply(Event::Apply(object));
    }

    fn policy(&mut self, change: impl FnOnce(&mut EgressPolicy)) {
        let mut policy = mk_policy("mail", &[], &[("app", "mta")]);
        change(&mut policy);
        self.put(Object::EgressPolicy(Box::new(policy)));
    }

    fn vip(&mut self, change: impl FnOnce(&mut VirtualIp)) {
        let mut vip = mk_vip("192.0.2.32", "out", &["mail"]);
        vip.leader = Some("n2".into());
        change(&mut vip);
        self.cluster.vips.insert(vip.address, vip.clone());
        self.put(Object::VirtualIp(vip));
    }

    fn explain(&mut self, pod: &str, to: &str) -> Explanation {
        self.index.reconcile();
        let (namespace, name) = pod.split_once('/').unwrap();
        let pod = ObjectKey::new(namespace, name);
        let found = self.index.explain(&pod, to.parse().unwrap(), &self.cluster);
        found.unwrap()
    }

    fn outcome(&mut self, to: &str) -> Outcome {
        self.explain("a/mta", to).outcome
    }

    fn why(&mut self) -> String {
        match self.outcome(OUT) {
            Outcome::Dropped { policy, why } => {
                assert_eq!(policy.as_deref(), Some("mail"));
                why
            }
            other => panic!("{other:?}"),
        }
    }
}

fn leaves() -> Outcome {
    Outcome::Leaves {
        policy: "mail".into(),
        address: "192.0.2.32".parse().unwrap(),
        gateway: "n2".into(),
    }
}

fn text(explanation: &Explanation) -> String {
    let lines = explanation.steps.iter();
    let lines: Vec<String> = lines
        .map(|(topic, text)| format!("{topic}: {text}"))
        .collect();
    lines.join("\n")
}

#[test]
fn a_tenant_leaves_by_its_address() {
    let mut world = World::new();
    let found = world.explain("a/mta", OUT);
    assert_eq!(found.outcome, leaves());
    let expected = "pod: a/mta on n1: 10.0.0.5\n\
                    destination: 203.0.113.7 is outside the cluster\n\
                    policy: mail has the pod\n\
                    egress address: 192.0.2.32\n\
                    gateway: n2\n\
                    quota: 0 ports in use, no limit";
    assert_eq!(text(&found), expected);
}

#[test]
fn who_is_not_known_is_not_explained() {
    let world = World::new();
    let nobody = ObjectKey::new("a", "nobody");
    let to = OUT.parse().unwrap();
    assert_eq!(world.index.explain(&nobody, to, &world.cluster), None);
}

#[test]
fn pods_on_the_hosts_network_are_the_nodes() {
    let mut world = World::new();
    let mut pod = mk_pod("a/host", &[("app", "mta")], &["192.0.2.11"]);
    pod.host_network = true;
    world.put(Object::Pod(pod));
    let found = world.explain("a/host", OUT);
    assert_eq!(found.outcome, Outcome::Plain);
    assert!(text(&found).contains("host's network"), "{found:?}");
}

#[test]
fn whom_no_policy_selects_leaves_plain() {
    let mut world = World::new();
    world.put(Object::Pod(mk_pod("a/web", &[], &["10.0.0.6"])));
    assert_eq!(world.explain("a/web", OUT).outcome, Outcome::Plain);
    assert_eq!(world.explain("a/web", "10.0.1.9").outcome, Outcome::Stays);
}

#[test]
fn the_more_specific_policy_wins_and_the_other_is_named() {
    let mut world = World::new();
    world.put(Object::EgressPolicy(Box::new(mk_policy(
        "all",
        &[("kubernetes.io/metadata.name", "a")],
        &[],
    ))));
    let found = world.explain("a/mta", OUT);
    // As many requirements: the name decides.
    let Outcome::Dropped { policy, .. } = &found.outcome else {
        panic!("{found:?}");
    };
    assert_eq!(policy.as_deref(), Some("all"), "and it has no address");
    let said = text(&found);
    assert!(said.contains("policy: all has the pod"), "{said}");
    assert!(
        said.contains(
            "other policy: mail selects it too, and is as specific: the first by name has it"
        ),
        "{said}"
    );
    world.put(Object::EgressPolicy(Box::new(mk_policy("any", &[], &[]))));
    let said = text(&world.explain("a/mta", OUT));
    assert!(
        said.contains("other policy: any selects it too, and is less specific"),
        "{said}"
    );
}

#[test]
fn what_is_the_clusters_own_stays() {
    let mut world = World::new();
    let service = ObjectKey::new("b", "db");
    world
        .cluster
        .cluster_ips
        .insert("10.96.0.9".parse().unwrap(), service);
    world.put(Object::Pod(mk_pod("b/stray", &[], &["172.16.0.9"])));
    world.network(Object::ServiceCidr(ServiceCidr {
        name: "kubernetes".into(),
        cidrs: vec!["10.96.0.0/16".parse().unwrap()],
    }));
    world.network(Object::EndpointSlice(mk_slice("kubernetes", "203.0.113.6")));
    for (to, said) in [
        ("192.0.2.32", "a VIP of this cluster, of EgressPolicy mail"),
        ("10.96.0.9", "the cluster address of Service b/db"),
        (
            "10.96.0.77",
            "in 10.96.0.0/16, the network of Services' cluster addresses, and no Service has it",
        ),
        ("203.0.113.6", "the API server"),
        ("172.16.0.9", "pod b/stray"),
        ("192.0.2.12", "node n2"),
        ("10.0.1.77", "in 10.0.1.0/24, which is the cluster's own"),
        ("169.254.169.254", "in 169.254.0.0/16"),
    ] {
        let found = world.explain("a/mta", to);
        assert_eq!(found.outcome, Outcome::Stays, "{to}");
        assert!(text(&found).contains(said), "{to}: {}", text(&found));
    }
}

#[test]
fn vips_are_outside_for_who_hairpins() {
    let mut world = World::new();
    let vip = mk_vip("192.0.2.40", "lan", &[]);
    world.cluster.vips.insert(vip.address, vip);
    assert_eq!(world.outcome("192.0.2.40"), Outcome::Stays);
    world.policy(|policy| policy.spec.hairpin = true);
    let found = world.explain("a/mta", "192.0.2.40");
    assert_eq!(found.outcome, leaves());
    assert!(text(&found).contains("to VIPs, too"), "{found:?}");
    let found = world.explain("a/mta", "192.0.2.32");
    assert_eq!(found.outcome, Outcome::Stays);
    assert!(text(&found).contains("not for its own"), "{found:?}");
    let double = mk_vip("208.0.2.40", "lan", &[]);
    world.cluster.vips.insert(double.address, double);
    let found = world.explain("a/mta", "192.0.2.40");
    assert_eq!(found.outcome, Outcome::Stays);
    assert!(text(&found).contains("first four bits"), "{found:?}");
    world.cluster.vips.remove(&"208.0.2.40".parse().unwrap());
    world.policy(|policy| {
        policy.spec.hairpin = true;
        policy.spec.destinations = ["203.0.113.0/24".parse().unwrap()].into();
    });
    // It is not for the VIP: kube-proxy short-circuits it.
    assert_eq!(world.outcome("192.0.2.40"), Outcome::Stays);
}

#[test]
fn destinations_are_the_policys_or_not() {
    let mut world = World::new();
    world.policy(|policy| {
        policy.spec.destinations = ["203.0.113.0/24".parse().unwrap()].into();
        policy.spec.excluded = ["203.0.113.128/25".parse().unwrap()].into();
    });
    assert_eq!(world.outcome(OUT), leaves());
    assert_eq!(world.outcome("203.0.113.200"), Outcome::Plain);
    assert_eq!(world.outcome("198.51.100.1"), Outcome::Plain);
    let found = world.explain("a/mta", "203.0.113.200");
    assert!(text(&found).contains("203.0.113.128/25 is among spec.excludedCIDRs"));
    let found = world.explain("a/mta", "198.51.100.1");
    assert!(text(&found).contains("do not hold it"));
}

#[test]
fn a_family_that_the_pod_or_the_policy_has_not_is_dropped() {
    let mut world = World::new();
    let out = "2001:db8:9::1";
    let found = world.outcome(out);
    let Outcome::Dropped { policy, why } = found else {
        panic!("{found:?}");
    };
    assert_eq!((policy, &*why), (None, "the pod has no IPv6 address"));
    let both = ["10.0.0.5", "fd00::5"];
    world.put(Object::Pod(mk_pod("a/mta", &[("app", "mta")], &both)));
    let found = world.outcome(out).to_string();
    assert!(
        found.contains("EgressPolicy mail has no IPv6 address"),
        "{found}"
    );
}

#[test]
fn who_has_no_address_is_dropped() {
    let mut world = World::new();
    world.put(Object::Pool(mk_pool("out", &["b"])));
    let why = world.why();
    assert!(why.contains("no address for pods of namespace a"), "{why}");
    let mut world = World::new();
    world.vip(|vip| vip.egress_policies.clear());
    world.policy(|policy| {
        policy.status.conditions = vec![Condition {
            kind: "Ready".into(),
            status: "False".into(),
            reason: "PoolExhausted".into(),
            message: "pool out has no address left".into(),
        }];
    });
    let why = world.why();
    assert!(
        why.contains("has no address: pool out has no address left"),
        "{why}"
    );
}

#[test]
fn without_a_gateway_it_is_dropped() {
    let mut world = World::new();
    world.vip(|vip| {
        vip.leader = None;
        vip.conditions = vec![Condition {
            kind: "Announced".into(),
            status: "False".into(),
            reason: "NoEligibleNode".into(),
            message: "n2: its speaker is stopping".into(),
        }];
    });
    let why = world.why();
    assert!(
        why.ends_with("192.0.2.32: n2: its speaker is stopping"),
        "{why}"
    );
}

#[test]
fn a_gateway_that_does_not_answer_for_its_address_has_no_flows() {
    let mut world = World::new();
    world.vip(|vip| {
        vip.conditions = vec![Condition {
            kind: "Announced".into(),
            status: "False".into(),
            reason: "NoMajority".into(),
            message: "gateway n2 hears less than half of the nodes".into(),
        }];
    });
    let why = world.why();
    assert!(
        why.ends_with("192.0.2.32: gateway n2 hears less than half of the nodes"),
        "{why}"
    );
}

#[test]
fn the_state_of_the_gateway_is_told() {
    let mut world = World::new();
    world.vip(|vip| vip.standby = Some("n1".into()));
    world.cluster.not_ready.insert("n2".into());
    let found = text(&world.explain("a/mta", OUT));
    assert!(found.contains("gateway: n2, standby n1"), "{found}");
    assert!(found.contains("node n2 is not ready"), "{found}");
    world.cluster.nodes.remove(&NodeName::from("n2"));
    let found = text(&world.explain("a/mta", OUT));
    assert!(found.contains("there is no node n2 any more"), "{found}");
    world.vip(|vip| vip.leader = Some("n1".into()));
    let found = text(&world.explain("a/mta", OUT));
    assert!(found.contains("the pod's own node"), "{found}");
}

#[test]
fn a_gateway_that_is_not_ready_yet_is_named() {
    let mut world = World::new();
    let said = |status: &str| Condition {
        kind: "GatewayReady".into(),
        status: status.into(),
        reason: "NotInForce".into(),
        message: "gateway n2 is not ready yet".into(),
    };
    world.vip(|vip| vip.conditions = vec![said("True")]);
    assert_eq!(world.outcome(OUT), leaves());
    world.vip(|vip| vip.conditions = vec![said("False")]);
    assert!(world.why().contains("gateway n2 is not ready yet"));
}

#[test]
fn quotas_are_told() {
    let mut world = World::new();
    world.policy(|policy| {
        policy.spec.ports = Some(100);
        policy.spec.ports_per_pod = Some(10);
        policy.status.ports_in_use = 40;
    });
    let found = world.explain("a/mta", OUT);
    assert_eq!(found.outcome, leaves());
    let said = text(&found);
    assert!(said.contains("40 of 100 ports in use, 60 left"), "{said}");
    assert!(said.contains("10 ports of the pod to one remote"), "{said}");
    world.policy(|policy| {
        policy.spec.ports = Some(100);
        policy.status.ports_in_use = 100;
    });
    let why = world.why();
    assert!(
        why.contains("all 100 ports of mail's spec.quota.ports"),
        "{why}"
    );
}

#[test]
fn the_bandwidth_is_told() {
    let mut world = World::new();
    assert!(!text(&world.explain("a/mta", OUT)).contains("bandwidth"));
    for (rate, burst, expected) in [
        (
            100_000_000,
            None,
            "100M bits a second in each direction, 25M at once",
        ),
        (
            1_500_000,
            Some(65_536),
            "1500k bits a second in each direction, 65536 at once",
        ),
        (
            8_000,
            None,
            "8k bits a second in each direction, 12k at once",
        ),
    ] {
        world.policy(|policy| policy.spec.bandwidth = Some(Bandwidth { rate, burst }));
        let said = text(&world.explain("a/mta", OUT));
        assert!(said.contains(&format!("bandwidth: {expected}")), "{said}");
    }
}
