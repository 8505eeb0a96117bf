//! Policies come and go under living flows: a flow keeps the source it began with, or ends; none leaves with the pod's own
//! address.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use ipnet::IpNet;
use landfall_lab::server::UDP_PORT;
use landfall_speaker::egress::Policy;

use super::cni::Cni;
use super::flow::{Datagrams, Pair, remote, seen_as};
use super::node::{Cluster, NODE, POLICY, Plan, until};

fn is_armed(cluster: &Cluster) -> bool {
    cluster.table().contains("egress-judge")
}

/// A policy is kept for as long as its gateway has bindings. They are gone: no answer reaches a pod any more.
fn forget_bindings(cluster: &Cluster) {
    cluster
        .gateway()
        .nft(
            "
add chain inet plain forward { type filter hook forward priority 0; }
add rule inet plain forward ip daddr 10.244.0.0/16 drop
add rule inet plain forward ip6 daddr fd00:244::/32 drop
",
        )
        .unwrap();
}

fn comes_and_goes(cni: Cni) {
    let mut cluster = Cluster::build(&Plan {
        cni,
        ..Plan::default()
    });
    let (pod, outside) = (cluster.pod(0).netns.share(), cluster.lab.remote().share());
    let open = || -> Vec<Pair> {
        let of = |remote| Pair::open(&pod, &outside, remote).unwrap();
        remote().into_iter().map(of).collect()
    };
    let (node, egress) = (cluster.node_ips(), cluster.egress_ips());
    let mut early = open();
    let egress_of = cluster.egress.clone();
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    let mut later = open();
    for family in 0..2 {
        assert_eq!(
            (early[family].seen_as, later[family].seen_as),
            (node[family], egress[family])
        );
    }
    let speak = |flows: &mut Vec<Pair>, what: &str, cluster: &Cluster| {
        for flow in flows {
            for _ in 0..3 {
                flow.pod_speaks()
                    .and_then(|()| flow.outside_speaks())
                    .unwrap_or_else(|error| panic!("{what}: {error}\n{}", cluster.state()));
            }
        }
    };
    speak(&mut early, "from before the policy", &cluster);
    speak(&mut later, "from after it came", &cluster);

    // The pod is another's for a while: what left by the policy ends, what did not goes on.
    let mut plain = cluster.egress.clone();
    cluster.place(&mut plain, 0, None);
    cluster.egress = plain;
    cluster.apply();
    let plain = format!("{} : goto egress-plain", cluster.pod(0).addresses[0]);
    until("it is told", || cluster.table().contains(&plain));
    speak(&mut early, "from before the policy, after it", &cluster);
    for (remote, node) in remote().into_iter().zip(node) {
        assert_eq!(seen_as(&pod, remote), (Some(node), Some(node)));
    }
    for flow in &mut later {
        flow.wait_no_longer_than(Duration::from_millis(300));
        assert!(flow.pod_speaks().is_err(), "it has another source now");
    }
    cluster.assert_clean(&node);

    // A tenant again, and then the last policy goes.
    cluster.egress = egress_of;
    cluster.apply();
    let mut third = Vec::new();
    until("new flows leave by the policy", || {
        third = open();
        third
            .iter()
            .zip(egress)
            .all(|(flow, egress)| flow.seen_as == egress)
    });
    let datagrams = remote().map(|remote| Datagrams::open(&pod, remote));
    for (datagrams, egress) in datagrams.iter().zip(egress) {
        assert_eq!(datagrams.surely_seen_as(), egress);
    }
    forget_bindings(&cluster);
    cluster.egress.policies.clear();
    cluster.apply();
    for flow in &mut third {
        flow.wait_no_longer_than(Duration::from_millis(300));
        while flow.pod_speaks().is_ok() {}
    }
    until("the table is as without policies", || !is_armed(&cluster));
    for (datagrams, node) in datagrams.iter().zip(node) {
        // One socket, another source: what was tracked of it was ended.
        assert_eq!(datagrams.surely_seen_as(), node);
    }
    cluster.assert_clean(&node);
}

#[test]
fn beside_nftables() {
    comes_and_goes(Cni::Nftables);
}

#[test]
fn beside_iptables_nft() {
    comes_and_goes(Cni::IptablesNft);
}

#[test]
fn beside_iptables_legacy() {
    comes_and_goes(Cni::IptablesLegacy);
}

/// What was there before a policy that cuts it ends; what goes where the policy is not for goes on.
#[test]
fn a_policy_that_cuts_ends_what_was_there_before() {
    let mut cluster = Cluster::build(&Plan::default());
    let (pod, outside) = (cluster.pod(0).netns.share(), cluster.lab.remote().share());
    let flows = || remote().map(|remote| Pair::open(&pod, &outside, remote).unwrap());
    let [mut cut, mut kept] = flows();
    let policy = cluster.egress.policies.get_mut(POLICY).unwrap();
    policy.cuts = true;
    // Of the two families' destinations it is for the first.
    policy.destinations.retain(|net| net.addr().is_ipv4());
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    cut.wait_no_longer_than(Duration::from_millis(300));
    until("what was there before ends", || {
        cut.pod_speaks()
            .and_then(|()| cut.outside_speaks())
            .is_err()
    });
    for _ in 0..3 {
        kept.pod_speaks().unwrap();
        kept.outside_speaks().unwrap();
    }
    let [again, _] = flows();
    assert_eq!(again.seen_as, cluster.egress_ips()[0]);
    let node = cluster.node_ips();
    cluster.assert_clean(&node);
}

/// Connections and datagrams of a pod's, of both families, and by what they began.
struct Began {
    flows: Vec<Pair>,
    datagrams: [Datagrams; 2],
    by: [IpAddr; 2],
}

impl Began {
    /// Begins them, once what is new leaves by these addresses.
    fn by(cluster: &Cluster, by: [IpAddr; 2]) -> Self {
        let (pod, outside) = (&cluster.pod(0).netns, cluster.lab.remote());
        for (remote, by) in remote().into_iter().zip(by) {
            until("what is new follows", || {
                seen_as(pod, remote) == (Some(by), Some(by))
            });
        }
        let open = |remote| Pair::open(pod, outside, remote).unwrap();
        let mut began = Self {
            flows: remote().into_iter().map(open).collect(),
            datagrams: remote().map(|remote| Datagrams::open(pod, remote)),
            by,
        };
        began.goes_on("as it began", cluster);
        began
    }

    fn goes_on(&mut self, what: &str, cluster: &Cluster) {
        let flows = self.flows.iter_mut().zip(&self.datagrams);
        for ((flow, datagrams), by) in flows.zip(self.by) {
            assert_eq!(flow.seen_as, by, "{what}");
            for _ in 0..3 {
                flow.pod_speaks()
                    .and_then(|()| flow.outside_speaks())
                    .unwrap_or_else(|error| panic!("{what}: {error}\n{}", cluster.state()));
            }
            let seen = datagrams.surely_seen_as();
            assert_eq!(seen, by, "{what}\n{}", cluster.state());
        }
    }

    fn ends(&mut self) {
        for flow in &mut self.flows {
            flow.wait_no_longer_than(Duration::from_millis(300));
            until("it ends", || flow.pod_speaks().is_err());
        }
    }
}

/// A policy that is for what it was not for, or the other way round, changes no flow, unless it cuts what was there before.
fn is_for_others(change: impl Fn(&mut Policy, bool)) {
    let mut cluster = Cluster::armed(&Plan::default());
    let (node, egress) = (cluster.node_ips(), cluster.egress_ips());
    let set = |cluster: &mut Cluster, is_for: bool, cuts: bool| {
        let policy = cluster.egress.policies.get_mut(POLICY).unwrap();
        change(policy, is_for);
        policy.cuts = cuts;
        cluster.apply();
    };
    let mut left = Began::by(&cluster, egress);
    set(&mut cluster, false, false);
    let mut excluded = Began::by(&cluster, node);
    left.goes_on("left by the policy, which is not for it any more", &cluster);
    set(&mut cluster, true, false);
    let mut again = Began::by(&cluster, egress);
    left.goes_on("left by the policy, which is for it again", &cluster);
    excluded.goes_on("began while the policy was not for it", &cluster);
    set(&mut cluster, false, false);
    Began::by(&cluster, node);
    for flows in [&mut left, &mut excluded, &mut again] {
        flows.goes_on("the policy is not for it again", &cluster);
    }
    set(&mut cluster, true, true);
    Began::by(&cluster, egress);
    excluded.ends();
    for flows in [&mut left, &mut again] {
        flows.goes_on("left by the policy, which cuts others", &cluster);
    }
    cluster.assert_clean(&node);
}

/// A pod is nobody's tenant any more, then one of a policy that has no gateway, then the first one's again: what it began
/// goes on all the while, until nobody remembers it.
#[test]
fn what_a_pod_began_goes_on_whose_ever_it_is() {
    let mut cluster = Cluster::build(&Plan::default());
    let (pod, outside) = (cluster.pod(0).netns.share(), cluster.lab.remote().share());
    let (node, egress) = (cluster.node_ips(), cluster.egress_ips());
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    let mut flows = remote().map(|remote| Pair::open(&pod, &outside, remote).unwrap());
    let datagrams = remote().map(|remote| Datagrams::open(&pod, remote));
    let mut go_on = |when: &str, cluster: &Cluster| {
        for (flow, egress) in flows.iter_mut().zip(egress) {
            assert_eq!(flow.seen_as, egress);
            for _ in 0..3 {
                flow.pod_speaks()
                    .and_then(|()| flow.outside_speaks())
                    .unwrap_or_else(|error| panic!("{when}: {error}\n{}", cluster.state()));
            }
        }
        for (datagrams, egress) in datagrams.iter().zip(egress) {
            let seen = datagrams.surely_seen_as();
            assert_eq!(seen, egress, "{when}");
        }
    };
    go_on("as it began", &cluster);
    let mut lacks_gateway = cluster.egress.policies[POLICY].clone();
    lacks_gateway.gateway = None;
    let second = "second".into();
    cluster.egress.policies.insert(second, lacks_gateway);
    let place = |cluster: &mut Cluster, policy: Option<&str>, former: Option<&str>| {
        let mut placed = cluster.egress.clone();
        cluster.place(&mut placed, 0, policy);
        for address in cluster.pod(0).addresses {
            let of = placed.pods.get_mut(&address).unwrap();
            of.former = former.map(Into::into);
        }
        cluster.egress = placed;
        cluster.apply();
        let chain = policy.map_or("plain".to_owned(), |policy| format!("of-{policy}"));
        for address in cluster.pod(0).addresses {
            let told = format!("{address} : goto egress-{chain}");
            until("it is told", || cluster.table().contains(&told));
        }
    };
    place(&mut cluster, None, Some(POLICY));
    go_on("nobody's", &cluster);
    for (remote, node) in remote().into_iter().zip(node) {
        assert_eq!(seen_as(&pod, remote), (Some(node), Some(node)));
    }
    place(&mut cluster, Some("second"), Some(POLICY));
    go_on("another's", &cluster);
    for remote in remote() {
        assert_eq!(seen_as(&pod, remote), (None, None), "there is no gateway");
    }
    place(&mut cluster, Some(POLICY), Some("second"));
    go_on("the first one's again", &cluster);
    forget_bindings(&cluster);
    place(&mut cluster, None, None);
    cluster.egress.policies.remove(POLICY);
    cluster.apply();
    for flow in &mut flows {
        flow.wait_no_longer_than(Duration::from_millis(300));
        until("it ends", || flow.pod_speaks().is_err());
    }
    cluster.assert_clean(&node);
}

#[test]
fn a_flow_goes_on_whose_destination_is_excluded_or_not_any_more() {
    is_for_others(|policy, is_for| {
        policy.excluded.clear();
        if !is_for {
            policy.excluded.extend(remote().map(IpNet::from));
        }
    });
}

#[test]
fn a_flow_goes_on_whose_destination_is_the_policys_or_not_any_more() {
    is_for_others(|policy, is_for| {
        let nets = if is_for {
            ["0.0.0.0/0", "::/0"]
        } else {
            ["198.51.100.0/24", "2001:db8::/32"]
        };
        policy.destinations = nets.map(|net| net.parse().unwrap()).into();
    });
}

/// An address that was a pod's before and is another pod's now: connections of the old one do not decide for the new.
#[test]
fn an_address_that_is_used_again_begins_anew() {
    let mut cluster = Cluster::build(&Plan::default());
    let known = cluster.egress.clone();
    let (pod, outside) = (cluster.pod(0).netns.share(), cluster.lab.remote().share());
    let datagrams = remote().map(|remote| Datagrams::open(&pod, remote));
    for (datagrams, node) in datagrams.iter().zip(cluster.node_ips()) {
        assert_eq!(datagrams.surely_seen_as(), node, "as its node");
    }
    let [v4, _] = cluster.pod(0).addresses;
    cluster.egress.pods.remove(&v4);
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    assert_eq!(
        datagrams[0].seen_as(Duration::from_millis(300)),
        None,
        "nobody's"
    );
    cluster.egress = known;
    assert!(cluster.egress.policies.contains_key(POLICY));
    cluster.apply();
    let mut seen = None;
    until("it is served", || {
        seen = datagrams[0].seen_as(Duration::from_millis(300));
        seen.is_some()
    });
    assert_eq!(
        seen,
        Some(cluster.egress_ips()[0]),
        "the same ports, and a new pod's"
    );
    // The other address was known all the time, and keeps what it began with.
    assert_eq!(datagrams[1].surely_seen_as(), cluster.node_ips()[1]);
    cluster.assert_clean(&cluster.node_ips());
    let flow = Pair::open(&pod, &outside, remote()[1]).unwrap();
    assert_eq!(flow.seen_as, cluster.egress_ips()[1]);
}

/// A network becomes the cluster's own, and is not any more, in a table that stays.
#[test]
fn a_network_becomes_the_clusters_own_and_the_rules_stay() {
    let mut cluster = Cluster::armed(&Plan::default());
    let pod = cluster.pod(0).netns.share();
    let [remote, _] = remote();
    let [node, egress] = [cluster.node_ips()[0], cluster.egress_ips()[0]].map(Some);
    // What a table has counted goes with it.
    cluster
        .pod(1)
        .netns
        .ip("address add 10.244.9.9/32 dev eth0")
        .unwrap();
    cluster.pod(1).netns.run(|| {
        let socket = UdpSocket::bind("10.244.9.9:0").unwrap();
        socket.send_to(b"forged", (remote, UDP_PORT)).unwrap();
    });
    until("it has counted", || cluster.dropped("forged") > 0);
    let counted = cluster.dropped("forged");
    let mut flow = Pair::open(&pod, cluster.lab.remote(), remote).unwrap();
    assert_eq!(flow.seen_as, cluster.egress_ips()[0]);
    assert_eq!(seen_as(&pod, remote), (egress, egress));
    for (is_own, by) in [(true, node), (false, egress)] {
        let network: IpNet = "10.77.0.0/24".parse().unwrap();
        if is_own {
            cluster.egress.inside.insert(network);
        } else {
            cluster.egress.inside.remove(&network);
        }
        cluster.apply();
        let set = "nft list set inet landfall egress-inside4";
        until("it is told", || {
            let listed = cluster.node().exec(set).unwrap();
            listed.contains("10.77.0.0/24") == is_own
        });
        until("new flows follow", || seen_as(&pod, remote) == (by, by));
        if is_own {
            flow.wait_no_longer_than(Duration::from_millis(300));
            assert!(flow.pod_speaks().is_err(), "it has another source now");
        }
    }
    assert_eq!(cluster.dropped("forged"), counted);
    cluster.assert_clean(&cluster.node_ips());
}

/// Its routes change with that at the first try: until they are right the node's pods have no way.
#[test]
fn this_node_becomes_the_gateway_and_another_does() {
    let mut cluster = Cluster::armed(&Plan::default());
    let away = cluster.egress.clone();
    let mut here = away.clone();
    for policy in here.policies.values_mut() {
        let gateway = policy.gateway.as_mut().unwrap();
        (gateway.node, gateway.mac) = (NODE.into(), None);
    }
    let is_led_away = |cluster: &Cluster| {
        let routes = |family| {
            let line = format!("ip {family} route show table all");
            cluster.node().exec(&line).unwrap()
        };
        let nobody = ["default via 169.254.76.70", "default via fe80::4c46"];
        let led = ["-4", "-6"]
            .iter()
            .zip(nobody)
            .map(|(family, via)| routes(family).contains(via));
        let led: Vec<bool> = led.collect();
        (led[0] == led[1]).then_some(led[0])
    };
    assert_eq!(is_led_away(&cluster), Some(true));
    for (egress, led) in [(&here, false), (&away, true), (&here, false)] {
        cluster.egress = egress.clone();
        cluster.apply();
        until("its routes", || is_led_away(&cluster) == Some(led));
        assert_eq!(cluster.failures(), 0);
    }
}
