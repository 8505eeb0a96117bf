//! The policy's addresses are on a segment that the node's default route does not lead to.

use std::time::Duration;

use landfall_lab::Mac;

use super::cni::Cni;
use super::flow::{A_WHILE, Datagrams, Pair, line, remote, seen_as};
use super::node::{Cluster, Plan, until};

const EXCLUDED: &str = "10.77.0.0/25";

fn mk_two(cni: Cni) -> Cluster {
    Cluster::armed(&Plan {
        cni,
        second_nic: true,
        ..Plan::default()
    })
}

/// Whatever the first segment has seen beyond it is the node's own.
fn only_by_the_second(cluster: &Cluster) {
    let gateway = Mac(cluster.gateway_mac());
    assert_eq!(gateway.0[4], 89, "the gateway's address on the second LAN");
    cluster.assert_clean(&cluster.node_ips());
}

#[test]
fn tenants_leave_by_the_second_and_others_by_the_first() {
    Cni::each(|cni| {
        let cluster = mk_two(cni);
        for (family, remote) in remote().into_iter().enumerate() {
            let egress = Some(cluster.egress_ips()[family]);
            let node = Some(cluster.node_ips()[family]);
            assert_eq!(
                seen_as(&cluster.pod(0).netns, remote),
                (egress, egress),
                "{}",
                cluster.state()
            );
            assert_eq!(
                seen_as(&cluster.pod(1).netns, remote),
                (node, node),
                "{}",
                cluster.state()
            );
        }
        only_by_the_second(&cluster);
    });
}

/// The kernel would route what nobody marks by the first; the guard sends it by the second.
#[test]
fn a_flow_goes_on_by_the_second_while_the_table_is_away() {
    Cni::each(|cni| {
        let mut cluster = mk_two(cni);
        let (pod, outside) = (cluster.pod(0).netns.share(), cluster.lab.remote().share());
        let mut flows: Vec<Pair> = remote()
            .into_iter()
            .map(|remote| Pair::open(&pod, &outside, remote).unwrap())
            .collect();
        let led = cluster.guarded()["led-unjudged"];
        // Nobody puts it back.
        cluster.stop();
        cluster.node().nft("flush ruleset\n").unwrap();
        cni.resync_what_is_left(cluster.node());
        for flow in &mut flows {
            for _ in 0..20 {
                flow.pod_speaks().unwrap();
                flow.outside_speaks().unwrap();
            }
        }
        cluster.start();
        cluster.apply();
        cluster.await_armed();
        until("they were led", || {
            cluster
                .guarded()
                .get("led-unjudged")
                .is_some_and(|now| *now > led)
        });
        for flow in &mut flows {
            flow.pod_speaks().unwrap();
        }
        only_by_the_second(&cluster);
    });
}

/// With a strict reverse path the kernel takes what comes back by the second for what it is only by its mark.
#[test]
fn a_strict_reverse_path_is_told_to_look_at_marks() {
    Cni::each(|cni| {
        let mut cluster = Cluster::build(&Plan {
            cni,
            second_nic: true,
            ..Plan::default()
        });
        cluster
            .node()
            .sysctl("net.ipv4.conf.all.rp_filter", "1")
            .unwrap();
        cluster.start();
        cluster.apply();
        cluster.await_armed();
        let setting = "net.ipv4.conf.eth1.src_valid_mark";
        assert_eq!(cluster.node().read_sysctl(setting).unwrap(), "1");
        let pod = &cluster.pod(0).netns;
        let remote = remote()[0];
        let egress = Some(cluster.egress_ips()[0]);
        assert_eq!(seen_as(pod, remote), (egress, egress));
        // It is that which does it.
        cluster.node().sysctl(setting, "0").unwrap();
        assert_eq!(Datagrams::open(pod, remote).seen_as(A_WHILE), None);
        cluster.node().sysctl(setting, "1").unwrap();
        assert_eq!(
            Datagrams::open(pod, remote).seen_as(Duration::from_secs(5)),
            egress
        );
        cluster.egress.policies.clear();
        cluster.apply();
        let asked = || cluster.node().read_sysctl(setting).unwrap() != "0";
        until("it is as it was", || !asked());
    });
}

/// A destination that the policy is not for is left to whoever else masquerades, by the route that it has.
#[test]
fn what_a_policy_is_not_for_leaves_as_it_did() {
    Cni::each(|cni| {
        let mut cluster = mk_two(cni);
        let policy = cluster.egress.policies.values_mut().next().unwrap();
        policy.excluded = [EXCLUDED.parse().unwrap()].into();
        cluster.apply();
        until("it is told", || cluster.table().contains(EXCLUDED));
        let pod = &cluster.pod(0).netns.share();
        let [v4, v6] = remote();
        let port = landfall_lab::server::TCP_PORT;
        assert_eq!(
            line(pod, (v4, port).into(), A_WHILE).unwrap(),
            cluster.node_ips()[0]
        );
        assert_eq!(
            line(pod, (v6, port).into(), A_WHILE).unwrap(),
            cluster.egress_ips()[1]
        );
        let mut flow = Pair::open(pod, cluster.lab.remote(), v6).unwrap();
        assert_eq!(flow.seen_as, cluster.egress_ips()[1]);
        let policy = cluster.egress.policies.values_mut().next().unwrap();
        policy.excluded.clear();
        policy.destinations = [EXCLUDED.parse().unwrap()].into();
        cluster.apply();
        until("it is told", || {
            cluster.table().contains(&format!("!= {EXCLUDED}"))
        });
        assert_eq!(
            line(pod, (v4, port).into(), A_WHILE).unwrap(),
            cluster.egress_ips()[0]
        );
        assert_eq!(
            line(pod, (v6, port).into(), A_WHILE).unwrap(),
            cluster.node_ips()[1]
        );
        // What left by it goes on so, to its end.
        flow.pod_speaks().unwrap();
        flow.outside_speaks().unwrap();
        only_by_the_second(&cluster);
    });
}
