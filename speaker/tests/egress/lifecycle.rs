//! What is there while policies are, and what is left: by a process that ends, by one that comes, by others.

use std::fs;
use std::io::{Read as _, Write as _};
use std::time::Duration;

use landfall_ebpf_common::link::Link;
use landfall_ebpf_common::tcx;
use landfall_speaker::node_rules;

use super::flow::{Pair, remote, seen_as};
use super::node::{Cluster, NODE, POLICY, Plan, until};

fn egress_programs(cluster: &Cluster) -> Vec<u32> {
    let uplink = cluster.node().interface_index("eth0").unwrap();
    cluster
        .node()
        .run(|| tcx::programs(uplink, tcx::Hook::Egress).unwrap())
}

/// All that policies put into the kernel besides programs.
fn left(cluster: &Cluster) -> Vec<String> {
    let node = cluster.node();
    let mut left = Vec::new();
    let table = cluster.table();
    left.extend(
        table
            .lines()
            .filter(|line| line.contains("egress"))
            .map(str::to_owned),
    );
    for line in ["ip rule", "ip -6 rule"] {
        let printed = node.exec(line).unwrap();
        left.extend(
            printed
                .lines()
                .filter(|line| line.contains("fwmark"))
                .map(str::to_owned),
        );
    }
    for line in ["ip route show table 7934", "ip -6 route show table 7934"] {
        let printed = node.exec(line).unwrap_or_default();
        left.extend(printed.lines().map(str::to_owned));
    }
    for line in [
        "ip neigh show nud permanent",
        "ip -6 neigh show nud permanent",
    ] {
        let printed = node.exec(line).unwrap();
        left.extend(printed.lines().map(str::to_owned));
    }
    left
}

#[test]
fn when_the_last_policy_goes_nothing_is_left() {
    let mut cluster = Cluster::build(&Plan::default());
    let policies = cluster.egress.policies.clone();
    cluster.egress.policies.clear();
    cluster.start();
    cluster.apply();
    until("the table is there", || cluster.table().contains("guard4"));
    assert_eq!(left(&cluster), [""; 0]);
    for _ in 0..2 {
        cluster.egress.policies.clone_from(&policies);
        cluster.apply();
        cluster.await_armed();
        until("the routes are there", || left(&cluster).len() > 20);
        let egress = Some(cluster.egress_ips()[0]);
        assert_eq!(
            seen_as(&cluster.pod(0).netns, remote()[0]),
            (egress, egress)
        );
        cluster.egress.policies.clear();
        cluster.apply();
        until("nothing of it is left", || left(&cluster).is_empty());
        until("nor the guard", || cluster.guards() == 0);
    }
    assert!(cluster.table().contains("guard4"), "the rest stays");
}

/// A speaker that is killed stops nothing; the next takes over what is there, before it knows anything and after.
#[test]
fn the_next_process_goes_on_with_what_is_there() {
    let mut cluster = Cluster::armed(&Plan::default());
    let (pod, outside) = (cluster.pod(0).netns.share(), cluster.lab.remote().share());
    let mut flows: Vec<Pair> = remote()
        .into_iter()
        .map(|remote| Pair::open(&pod, &outside, remote).unwrap())
        .collect();
    let mut speak = || {
        for flow in &mut flows {
            flow.pod_speaks().unwrap();
            flow.outside_speaks().unwrap();
        }
    };
    cluster.stop();
    assert_eq!(cluster.guards(), 1, "the guard stays");
    speak();
    let again = Pair::open(&pod, &outside, remote()[0]).unwrap();
    assert_eq!(again.seen_as, cluster.egress_ips()[0], "new flows too");
    let before = egress_programs(&cluster);
    cluster.start();
    cluster.apply();
    until("the next process's program is in its place", || {
        let now = egress_programs(&cluster);
        now.len() == 1 && now != before
    });
    for _ in 0..20 {
        speak();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(cluster.dropped("translated"), 0);
    cluster.assert_clean(&[]);
}

#[test]
fn a_guard_that_somebody_removes_is_put_back() {
    let cluster = Cluster::armed(&Plan::default());
    let uplink = cluster.node().interface_index("eth0").unwrap();
    let pins = cluster.lab.mount_pins().unwrap().join(NODE);
    for round in 0..2 {
        let links = fs::read_dir(&pins)
            .unwrap()
            .flatten()
            .map(|entry| entry.path().join("links"));
        let link = links
            .map(|links| links.join(format!("{uplink}-guard")))
            .find(|link| link.exists())
            .expect("it is pinned");
        Link::open(&link).unwrap().detach().unwrap();
        assert_eq!(cluster.guards(), 0);
        until("it is put back", || cluster.guards() == 1);
        let egress = Some(cluster.egress_ips()[0]);
        assert_eq!(
            seen_as(&cluster.pod(0).netns, remote()[0]),
            (egress, egress),
            "round {round}"
        );
    }
    cluster.assert_clean(&[]);
}

#[test]
fn routes_that_somebody_removes_are_put_back() {
    let cluster = Cluster::armed(&Plan::default());
    let node = cluster.node();
    let all = left(&cluster).len();
    for line in [
        "ip rule del priority 7949",
        "ip -6 rule del priority 7949",
        "ip route flush table 7934",
        "ip neigh del 169.254.76.70 dev eth0",
        "ip link set eth0 down",
    ] {
        node.exec(line).unwrap();
        node.exec("ip link set eth0 up").unwrap();
        until(line, || left(&cluster).len() == all);
    }
    // With the link the kernel has taken the default routes too.
    for (flag, router) in ["-4", "-6"]
        .into_iter()
        .zip(landfall_lab::Network::Lan.both(1))
    {
        node.ip(&format!(
            "{flag} route replace default via {router} dev eth0"
        ))
        .unwrap();
    }
    let egress = Some(cluster.egress_ips()[0]);
    assert_eq!(
        seen_as(&cluster.pod(0).netns, remote()[0]),
        (egress, egress),
        "{}",
        cluster.state()
    );
    cluster.assert_clean(&[]);
}

/// What leaves by an uplink that is gone, or down, is dropped; what leaves by others is not the worse for it.
#[test]
fn an_uplink_that_is_gone_stops_its_own_tenants_only() {
    let mut cluster = Cluster::build(&Plan::default());
    let mut policy = cluster.mk_policy();
    policy.gateway.as_mut().unwrap().uplink = "eth7".into();
    cluster.egress.policies.insert("other".into(), policy);
    let mut egress = cluster.egress.clone();
    cluster.place(&mut egress, 1, Some("other"));
    cluster.egress = egress;
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    for (remote, egress) in remote().into_iter().zip(cluster.egress_ips()) {
        assert_eq!(
            seen_as(&cluster.pod(0).netns, remote),
            (Some(egress), Some(egress)),
            "{}",
            cluster.state()
        );
        assert_eq!(seen_as(&cluster.pod(1).netns, remote), (None, None));
    }
    cluster.assert_clean(&[]);
}

/// The gateway moves: one word to the node, and packets go there.
#[test]
fn another_gateway_is_one_more_word() {
    let mut cluster = Cluster::armed(&Plan::default());
    let flow = Pair::open(&cluster.pod(0).netns, cluster.lab.remote(), remote()[0]).unwrap();
    let gateway = cluster.egress.policies[POLICY].gateway.clone().unwrap();
    let mut another = gateway.clone();
    another.mac = Some([2, 0, 0, 0, 0xff, 1]);
    for gateway in [another, gateway] {
        let mac = gateway.mac.unwrap();
        cluster.egress.policies.get_mut(POLICY).unwrap().gateway = Some(gateway);
        cluster.wire.clear();
        cluster.apply();
        until("packets go there", || {
            (&flow.pod).write_all(&[0]).unwrap();
            cluster
                .wire
                .outbound()
                .iter()
                .any(|frame| frame.to.0 == mac)
        });
    }
    let mut heard = [1];
    (&flow.outside).read_exact(&mut heard).unwrap();
    assert_eq!(heard, [0], "nothing is lost for good");
}

/// What uninstalling removes.
#[test]
fn uninstalling_takes_all_of_it() {
    let mut cluster = Cluster::armed(&Plan::default());
    until("the routes are there", || left(&cluster).len() > 20);
    cluster.stop();
    let pins = cluster.lab.mount_pins().unwrap().join(NODE);
    cluster
        .node()
        .block_on(async { node_rules::remove(&node_rules::Config::default()).await })
        .unwrap();
    cluster
        .node()
        .run(|| landfall_speaker::datapath::uninstall(&pins).unwrap());
    assert_eq!(left(&cluster), [""; 0]);
    assert_eq!(cluster.guards(), 0);
    assert!(!pins.exists());
}
