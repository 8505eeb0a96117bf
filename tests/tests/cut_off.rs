//! A gateway that no other node hears, and that reaches the outside all the same: it begins nothing, for its own pods
//! either, and after a while nothing leaves it by the policy's addresses. The others' pods go on by another gateway.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::fmt::Write as _;
use std::iter;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::server::PodServer;
use landfall_lab::{Lab, Netns, Pod, Topology};
use landfall_tests::flows::{self, Flow};
use landfall_tests::tenants::{self, await_egress, egress, outside};
use landfall_tests::{Cluster, until_some};

const FAMILIES: [&str; 2] = ["ip", "ip6"];
/// How long a try to connect may take.
const TRY: Duration = Duration::from_secs(2);
/// How old news has to be to be known at another gateway in any case.
const AGE: Duration = Duration::from_secs(2);
/// For how long a gateway without a majority keeps what it has, and how much longer it may need to notice.
const LEASE: Duration = Duration::from_secs(30 + 15);

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
        let seen: Vec<Flow> = own.iter().flat_map(|pod| open(pod, 1)).collect();
        assert!(
            tap.begun().iter().all(|begun| *begun > 0),
            "the tap is blind"
        );
        drop(seen);

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
        let answers = || who_answers(lab, egress()[0], Duration::from_secs(1)).unwrap();
        until_some("another to answer, and it alone", || {
            let answers = answers();
            (answers.len() == 1 && !answers.contains_key(&gateway)).then_some(())
        });

        let recorded = || {
            let record = cluster.virtual_ip(egress()[0]);
            record.and_then(|it| it.status?.leader)
        };
        until_some("the record to be the other's", || {
            recorded().filter(|leader| *leader != gateway)
        });

        // What it has it still translates, whether or not the answers come to it: one of each family.
        let sent = tap.sent();
        let _ = flows::ask(&mut left[..2]);
        assert!(
            tap.sent()
                .iter()
                .zip(sent)
                .all(|(now, before)| *now > before),
            "nothing is translated"
        );
        // It has noticed by then: what its own pods begin is dropped, and only that.
        let begun = tap.begun();
        let mut tries = 0;
        while tries == 0 || cut.elapsed() < LEASE {
            for pod in &own {
                for server in outside() {
                    let flow = Flow::open_within(&pod.netns, server, TRY);
                    assert!(flow.is_err(), "{} reached {server}", pod.name);
                    tries += 1;
                }
            }
            assert_ne!(recorded().as_ref(), Some(&gateway), "it says that it leads");
        }
        assert_eq!(
            tap.begun(),
            begun,
            "{tries} tries to connect are on the wire"
        );
        println!("none of {tries} tries of its own pods is on the wire");
        let now = answers();
        assert!(!now.contains_key(&gateway), "{now:?}");
        // By now it ends what it had.
        let sent = tap.sent();
        let lost = flows::ask(&mut left).expect_err("nobody translates them");
        assert_eq!(lost.len(), left.len(), "{lost:?}");
        assert_eq!(tap.sent(), sent, "it is not silent");
        println!(
            "silent: {sent:?} packets before, none after; {} flows of its own pods wait",
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

/// Counts what a node sends to the servers outside, at the switch, by family.
struct Tap {
    switch: Netns,
}

impl Tap {
    fn start(lab: &Lab, node: &str) -> Self {
        let mut script = String::from("add table netdev tap\n");
        let chain = format!("type filter hook ingress device {node}-eth0 priority -500;");
        let _ = writeln!(script, "add chain netdev tap in {{ {chain} }}");
        for (family, own) in FAMILIES.into_iter().zip(egress()) {
            let servers = outside().filter(|server| server.is_ipv4() == own.is_ipv4());
            let servers: Vec<String> = servers.map(|server| server.ip().to_string()).collect();
            let servers = servers.join(", ");
            let _ = write!(
                script,
                "add counter netdev tap begun-{family}
                 add counter netdev tap sent-{family}
                 add rule netdev tap in {family} daddr {{ {servers} }} tcp flags & (syn | ack) == syn counter name begun-{family}
                 add rule netdev tap in {family} saddr {own} meta l4proto tcp counter name sent-{family}
"
            );
        }
        lab.switch().nft(&script).unwrap();
        Self {
            switch: lab.switch().share(),
        }
    }

    /// How many first segments of connections, whoever they are from.
    fn begun(&self) -> [u64; 2] {
        FAMILIES.map(|family| self.count(&format!("begun-{family}")))
    }

    /// How many segments by the policy's addresses.
    fn sent(&self) -> [u64; 2] {
        FAMILIES.map(|family| self.count(&format!("sent-{family}")))
    }

    fn count(&self, counter: &str) -> u64 {
        let counter = format!("netdev tap {counter}");
        self.switch.counted(&counter).unwrap()
    }
}
