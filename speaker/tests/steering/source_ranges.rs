//! `loadBalancerSourceRanges` hold: for clients outside at the uplinks, for pods of the cluster in the node's rules.

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_lab::manifests::{LINES, Policy};
use serde_json::json;

use super::cluster::{Cluster, PATIENCE, SERVICE, mk_three, vips};
use super::datagrams::Datagrams;
use super::flow::{Flow, all_alive, open_from};

const LAN: [&str; 2] = ["10.88.0.0/24", "fd00:88::/64"];
const REMOTE: [&str; 2] = ["10.77.0.0/24", "fd00:77::/64"];
const PODS: [&str; 2] = ["10.244.0.0/16", "fd00:244::/32"];
/// For how long silence is silence.
const SILENCE: Duration = Duration::from_secs(2);
const FLOWS: usize = 20;

fn limit(cluster: &Cluster, ranges: &[[&str; 2]]) {
    let fields = json!({"loadBalancerSourceRanges": ranges.as_flattened()});
    cluster
        .manifests
        .write_service_with(SERVICE, vips(), Policy::Local, &fields)
        .unwrap();
}

fn connect(from: &Netns, vip: IpAddr) -> Result<Flow, ErrorKind> {
    let stream = from
        .run(|| TcpStream::connect_timeout(&(vip, LINES).into(), SILENCE))
        .map_err(|error| error.kind())?;
    Ok(Flow::over(stream).unwrap())
}

fn is_let_in(from: &Netns, vip: IpAddr) {
    for _ in 0..FLOWS {
        let flow = connect(from, vip);
        assert!(flow.is_ok(), "{vip} from {}: {:?}", from.name(), flow.err());
    }
    Datagrams::open(from, vip).answered();
}

/// Nobody tells it anything, no refusal either.
fn is_met_with_silence(from: &Netns, vip: IpAddr) {
    let errors: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..FLOWS)
            .map(|_| scope.spawn(|| connect(from, vip).map(|flow| flow.pod)))
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect()
    });
    for error in errors {
        assert_eq!(
            error,
            Err(ErrorKind::TimedOut),
            "{vip} from {}",
            from.name()
        );
    }
    let datagrams = Datagrams::open(from, vip);
    for _ in 0..3 {
        assert_eq!(datagrams.ask(), None, "{vip} from {}", from.name());
    }
}

/// Waits until a change of the ranges is in force.
fn await_open(from: &Netns, vip: IpAddr, open: bool) {
    let begun = Instant::now();
    while connect(from, vip).is_ok() != open {
        assert!(
            begun.elapsed() < PATIENCE,
            "{vip} from {}: not yet {open}",
            from.name()
        );
    }
    // All nodes hear of it at about the same time.
    thread::sleep(Duration::from_millis(500));
}

#[test]
fn ranges_hold_for_new_flows_and_spare_the_established() {
    let (cluster, _) = mk_three(false);
    let lab = &cluster.lab;
    let mut flows = Vec::new();
    for vip in vips() {
        flows.extend(open_from(lab.client(), vip, FLOWS));
        flows.extend(open_from(lab.remote(), vip, FLOWS));
    }
    for (ranges, inside, outside) in [
        (LAN, lab.client(), lab.remote()),
        (REMOTE, lab.remote(), lab.client()),
    ] {
        limit(&cluster, &[ranges]);
        for vip in vips() {
            await_open(outside, vip, false);
            await_open(inside, vip, true);
            is_let_in(inside, vip);
            is_met_with_silence(outside, vip);
            flows.extend(open_from(inside, vip, FLOWS));
        }
        all_alive(&cluster, &mut flows, &format!("limited to {ranges:?}"));
    }
    println!("{:?}", cluster.verdicts());
    assert!(cluster.verdicts()["refused"] > 0);
    cluster
        .manifests
        .write_service(SERVICE, vips(), Policy::Local)
        .unwrap();
    for vip in vips() {
        for from in [lab.client(), lab.remote()] {
            await_open(from, vip, true);
            is_let_in(from, vip);
        }
    }
    all_alive(&cluster, &mut flows, "with no limit again");
}

/// kube-proxy spares the nodes' own processes too: what they send has been let in already.
#[test]
fn pods_are_bound_by_ranges_and_the_nodes_own_processes_are_not() {
    let (cluster, leader) = mk_three(false);
    let lab = &cluster.lab;
    let mut pods = cluster.pods();
    // The one that asks does not serve.
    pods.retain(|pod| pod.node == leader);
    let asking = pods[0];
    let others: Vec<_> = cluster
        .pods()
        .into_iter()
        .filter(|pod| pod.name != asking.name)
        .collect();
    cluster.serve(&others);
    for vip in vips() {
        await_open(&asking.netns, vip, true);
    }
    let mut before = open_from(&asking.netns, vips()[0], FLOWS);
    limit(&cluster, &[REMOTE]);
    for vip in vips() {
        await_open(&asking.netns, vip, false);
        is_met_with_silence(&asking.netns, vip);
        for node in lab.nodes() {
            is_let_in(&node.netns, vip);
        }
    }
    all_alive(&cluster, &mut before, "opened before it was shut out");
    limit(&cluster, &[REMOTE, PODS]);
    for vip in vips() {
        await_open(&asking.netns, vip, true);
        is_let_in(&asking.netns, vip);
        is_met_with_silence(lab.client(), vip);
    }
}
