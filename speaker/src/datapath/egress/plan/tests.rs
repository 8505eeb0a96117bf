use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::egress::{Gateway, Pod, Policy, Tenant};

const UPLINK: u32 = 3;
const TUNNEL: u32 = 9;

fn mk_around() -> Surroundings {
    let uplink = Uplink {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        addresses: ["10.88.0.11", "fe80::1", "fd00:88::11"]
            .map(|address| address.parse().unwrap())
            .into(),
        connected: ["10.88.0.11/24", "fd00:88::11/64"]
            .map(|net| net.parse().unwrap())
            .into(),
        router_v4: Some(Ipv4Addr::new(10, 88, 0, 1)),
        router_v6: None,
    };
    let id = PeerId {
        node: "node2".into(),
        interface: UPLINK,
    };
    Surroundings {
        node: "node1".into(),
        uplinks: BTreeMap::from([(UPLINK, uplink.clone()), (TUNNEL, uplink)]),
        tunnel: Some(TUNNEL),
        peers: BTreeMap::from([(
            id,
            Peer {
                mac: [2, 0, 0, 0, 0, 2],
                address: None,
            },
        )]),
    }
}

fn mk_policy(gateway: Option<&str>) -> Policy {
    Policy {
        gateway: gateway.map(|node| Gateway {
            node: node.into(),
            uplink: "eth0".into(),
            interface: UPLINK,
            mac: None,
            epoch: 1,
            settled: true,
        }),
        ports_per_pod: Some(10),
        ..Policy::default()
    }
}

fn mk_pod(node: &str, tenant: Option<(&str, Option<&str>)>) -> Pod {
    Pod {
        node: node.into(),
        tenant: tenant.map(|(policy, address)| Tenant {
            policy: policy.into(),
            egress_ip: address.map(|address| address.parse().unwrap()),
        }),
        identity: 1,
        former: None,
    }
}

fn of(pods: &[(&str, Pod)], policies: &[(&str, Policy)]) -> Plan {
    let egress = Egress {
        policies: policies
            .iter()
            .map(|(name, policy)| ((*name).into(), policy.clone()))
            .collect(),
        pods: pods
            .iter()
            .map(|(address, pod)| (address.parse().unwrap(), pod.clone()))
            .collect(),
        inside: BTreeSet::from(["10.244.0.0/16".parse().unwrap()]),
        ..Egress::default()
    };
    let egress = egress.with_addresses_of_tenants();
    plan(&egress, &mk_around(), &BTreeSet::new())
}

#[test]
fn without_a_policy_there_is_nothing() {
    assert_eq!(of(&[], &[]), Plan::default());
    assert_eq!(
        of(&[("10.244.1.5", mk_pod("node1", None))], &[]),
        Plan::default()
    );
}

#[test]
fn pods_of_policies_whose_gateway_is_here_are_translated() {
    let address = Some("10.88.0.200");
    let plan = of(
        &[
            ("10.244.1.5", mk_pod("node1", Some(("mail", address)))),
            ("10.244.2.5", mk_pod("node2", Some(("mail", address)))),
            ("10.244.3.5", mk_pod("node3", Some(("mail", address)))),
            // It does not leave, is nobody's, or is another gateway's.
            ("10.244.2.6", mk_pod("node2", Some(("mail", None)))),
            ("10.244.2.7", mk_pod("node2", None)),
            ("10.244.2.8", mk_pod("node2", Some(("far", address)))),
            ("10.244.2.9", mk_pod("node2", Some(("none", address)))),
        ],
        &[
            ("mail", mk_policy(Some("node1"))),
            ("far", mk_policy(Some("node2"))),
            ("none", mk_policy(None)),
        ],
    );
    let here = plan.sources.iter().filter(|(_, it)| it.here.is_some());
    let names: Vec<String> = here.map(|(address, _)| address.to_string()).collect();
    assert_eq!(names, ["10.244.1.5", "10.244.2.5", "10.244.3.5"]);
    assert_eq!(plan.sources.values().next().unwrap().node, None);
    assert_eq!(
        plan.egress,
        BTreeSet::from(["10.88.0.200".parse().unwrap()])
    );
    let macs: Vec<Option<[u8; 6]>> = plan.nodes.values().map(|node| node.mac).collect();
    // Of a node that is not heard nothing is taken.
    assert_eq!(macs, [Some([2, 0, 0, 0, 0, 2]), None]);
    assert_eq!(plan.policies.len(), 1);
    assert_eq!(plan.policies["mail"].ports_per_pod, 10);
}

#[test]
fn remotes_are_on_the_segment_behind_the_router_or_inside() {
    let plan = of(&[], &[("mail", mk_policy(Some("node1")))]);
    let of = |net: &str| plan.routes.get(&(UPLINK, net.parse().unwrap()));
    let hop = |routed| {
        Some(HopId {
            interface: UPLINK,
            routed,
        })
    };
    assert_eq!(of("10.88.0.0/24"), Some(&hop(false)));
    assert_eq!(of("fd00:88::/64"), Some(&hop(false)));
    assert_eq!(of("0.0.0.0/0"), Some(&hop(true)));
    assert_eq!(of("::/0"), None, "no router, no way");
    assert_eq!(of("10.244.0.0/16"), Some(&None));
    let routed = plan.hops[&hop(true).unwrap()];
    assert_eq!(routed.via_v4, Some(Ipv4Addr::new(10, 88, 0, 1)));
    assert_eq!(routed.own_v6, Some("fd00:88::11".parse().unwrap()));
}

#[test]
fn answers_of_the_gateway_elsewhere_are_known() {
    let plan = of(
        &[(
            "10.244.1.5",
            mk_pod("node1", Some(("far", Some("10.88.0.200")))),
        )],
        &[("far", mk_policy(Some("node2")))],
    );
    let source = plan.sources.values().next().unwrap();
    assert!(source.here.is_none());
    let gateway = source.gateway.clone().unwrap();
    assert!(plan.nodes[&gateway].is_gateway);
    assert!(plan.egress.is_empty());
}

/// Whoever would take over knows what copies of bindings need, and translates nothing.
#[test]
fn a_standby_knows_the_pods_of_its_addresses() {
    let address = Some("10.88.0.200");
    let mut egress = Egress {
        policies: BTreeMap::from([
            ("mail".into(), mk_policy(Some("node2"))),
            ("far".into(), mk_policy(Some("node2"))),
        ]),
        ..Egress::default()
    };
    for (pod, node, policy, by) in [
        ("10.244.1.5", "node1", "mail", address),
        ("10.244.3.5", "node3", "mail", address),
        ("10.244.3.6", "node3", "far", Some("10.88.0.201")),
        ("10.244.3.7", "node3", "mail", None),
    ] {
        let pod = (pod.parse().unwrap(), mk_pod(node, Some((policy, by))));
        egress.pods.extend([pod]);
    }
    let addresses = BTreeSet::from(["10.88.0.200".parse().unwrap()]);
    let egress = egress.with_addresses_of_tenants();
    let plan = plan(&egress, &mk_around(), &addresses);
    let stands_by = |it: &&SourcePlan| it.standby.is_some();
    assert!(plan.sources.values().all(|it| it.here.is_none()));
    assert_eq!(plan.sources.values().filter(stands_by).count(), 2);
    // Of the others it is known where they are: they may have flows from before.
    assert!(
        plan.sources
            .values()
            .filter(|it| !stands_by(it))
            .all(|it| it.node.is_some())
    );
    assert_eq!(plan.sources.len(), 4);
    assert!(plan.sources.values().next().unwrap().gateway.is_some());
    assert_eq!(plan.policies.len(), 1);
    let policy = plan.policies["mail"];
    assert_eq!(
        (policy.uplink, policy.link, policy.ports_per_pod),
        (0, UPLINK, 10)
    );
    assert!(plan.egress.is_empty());
    assert!(
        plan.routes
            .contains_key(&(UPLINK, "0.0.0.0/0".parse().unwrap()))
    );
    assert_eq!(plan.nodes.len(), 2);
}

#[test]
fn nodes_that_are_not_on_the_segment_are_reached_by_the_tunnel() {
    let mut around = mk_around();
    let mut peer = |node: &str, interface, last| {
        let id = PeerId {
            node: node.into(),
            interface,
        };
        let mac = [2, 0, 0, 0, 0, last];
        let address = (interface == TUNNEL).then_some("172.16.0.9".parse().unwrap());
        around.peers.insert(id, Peer { mac, address });
    };
    peer("node2", TUNNEL, 20);
    peer("node3", TUNNEL, 30);
    let near = around.nearest(&"node2".into(), UPLINK);
    assert_eq!(near.interface, UPLINK, "it is on the segment, too");
    assert_eq!(around.nearest(&"node3".into(), UPLINK).interface, TUNNEL);
    assert_eq!(around.nearest(&"node4".into(), UPLINK).interface, UPLINK);
}
