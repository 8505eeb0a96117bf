//! A gateway that no other node hears, and that reaches the outside all the same: it begins nothing, for its own pods
//! either, and after a while nothing leaves it by the policy's addresses. The others' pods go on by another gateway.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::iter;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::server::PodServer;
use landfall_lab::{Lab, Netns, Pod, Topology};
use landfall_tests::Cluster;
use landfall_tests::flows::{self, Flow};
use landfall_tests::tenants::{self, await_egress, egress, outside};

/// How long a try to connect may take.
const TRY: Duration = Duration::from_secs(2);
/// How old news has to be to be known at another gateway in any case.
const AGE: Duration = Duration::from_secs(2);
/// For how long a gateway without a majority keeps what it has, and how much longer it may need to notice.
const LEASE: Duration = Duration::from_secs(30 + 5);

#[test]
fn a_gateway_that_is_cut_off_begins_nothing_and_falls_silent() {
    Cluster::run(Topology::default(), |cluster| {
        tenants::start(cluster)?;
        let lab = cluster.lab();
        let _near = PodServer::start(lab.client(), "near")?;
        let _far = PodServer::start(lab.remote(), "far")?;
        for pod in lab.pods() {
            await_egress(pod, outside());
        }
        let gateway = tenants::gateway(lab, egress()[0]);
        let (own, others): (Vec<&Pod>, Vec<&Pod>) = lab.pods().partition(|pod| pod.node == gateway);
        let mut kept: Vec<Flow> = others.iter().flat_map(|pod| open(pod, 5)).collect();
        let mut left: Vec<Flow> = own.iter().flat_map(|pod| open(pod, 1)).collect();
        thread::sleep(AGE);
        let tap = Tap::start(lab, &gateway);

        let nodes = lab.nodes().iter().map(|node| node.name.as_str());
        let rest: Vec<&str> = nodes.filter(|node| *node != gateway).collect();
        println!("{gateway} is the gateway, and is cut off from {rest:?}");
        lab.partition(&rest, &[&gateway], false)?;
        let cut = Instant::now();
        for pod in &others {
            await_egress(pod, outside());
        }
        let lost = flows::ask(&mut kept).err().unwrap_or_default();
        assert!(lost.is_empty(), "of the others' flows: {lost:?}");
        println!("the others' pods go on after {:?}", cut.elapsed());

        // What it has it still translates, whether or not the answers come to it.
        let _ = flows::ask(&mut left[..1]);
        // It has noticed by then: what its own pods begin is dropped, and only that.
        let begun = tap.begun();
        let mut tries = 0;
        while cut.elapsed() < LEASE {
            for pod in &own {
                for server in outside() {
                    let flow = Flow::open_within(&pod.netns, server, TRY);
                    assert!(flow.is_err(), "{} reached {server}", pod.name);
                    tries += 1;
                }
            }
        }
        assert_eq!(
            tap.begun(),
            begun,
            "{tries} tries to connect are on the wire"
        );
        println!("none of {tries} tries of its own pods is on the wire");
        // By now it ends what it had.
        let sent = tap.sent();
        assert!(sent > 0, "the test sees no packets");
        let lost = flows::ask(&mut left).expect_err("nobody translates them");
        assert!(!lost.is_empty());
        assert_eq!(tap.sent(), sent, "it is not silent");
        println!(
            "silent: {} packets before, none after; {} flows of its own pods wait",
            sent,
            lost.len()
        );
        for pod in &others {
            await_egress(pod, outside());
        }
        let lost = flows::ask(&mut kept).err().unwrap_or_default();
        assert!(lost.is_empty(), "of the others' flows: {lost:?}");

        lab.heal()?;
        let healed = Instant::now();
        for pod in &own {
            await_egress(pod, outside());
        }
        println!(
            "its pods leave by the policy again after {:?}",
            healed.elapsed()
        );
        let lost = flows::ask(&mut kept).err().unwrap_or_default();
        assert!(lost.is_empty(), "of the others' flows: {lost:?}");
        Ok(())
    });
}

/// So many flows of a pod to each server, which see the policy's addresses.
fn open(pod: &Pod, each: usize) -> Vec<Flow> {
    let servers = outside().flat_map(|server| iter::repeat_n(server, each));
    let flows = servers.map(|server| {
        let flow = Flow::open(&pod.netns, server).unwrap();
        assert!(egress().contains(&flow.seen_from), "{}", flow.seen_from);
        flow
    });
    flows.collect()
}

/// Counts what a node sends by the policy's addresses, at the switch.
struct Tap {
    switch: Netns,
}

impl Tap {
    fn start(lab: &Lab, node: &str) -> Self {
        let [v4, v6] = egress();
        let port = format!("{node}-eth0");
        let begins = "tcp flags & (syn | ack) == syn counter name begun";
        lab.switch()
            .nft(&format!(
                "add table netdev tap
                 add counter netdev tap begun
                 add counter netdev tap sent
                 add chain netdev tap in {{ type filter hook ingress device {port} priority -500; }}
                 add rule netdev tap in ip saddr {v4} {begins}
                 add rule netdev tap in ip6 saddr {v6} {begins}
                 add rule netdev tap in ip saddr {v4} counter name sent
                 add rule netdev tap in ip6 saddr {v6} meta l4proto tcp counter name sent
"
            ))
            .unwrap();
        Self {
            switch: lab.switch().share(),
        }
    }

    /// How many first segments of connections.
    fn begun(&self) -> u64 {
        self.count("begun")
    }

    /// How many packets.
    fn sent(&self) -> u64 {
        self.count("sent")
    }

    fn count(&self, counter: &str) -> u64 {
        let listed = self
            .switch
            .exec(&format!("nft list counter netdev tap {counter}"))
            .unwrap();
        let mut words = listed.split_whitespace();
        words.find(|word| *word == "packets").unwrap();
        words.next().unwrap().parse().unwrap()
    }
}
