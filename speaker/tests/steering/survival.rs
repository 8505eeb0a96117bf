//! Flows go on while endpoints, leaders and speakers come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use landfall_ebpf_common::LAYOUT;
use landfall_ebpf_common::handing_on::{FIRST_TTL, LOW_TTL};
use landfall_lab::Pod;
use landfall_lab::fault::{Fault, SPEAKER};
use landfall_lab::manifests::LINES;
use socket2::{Domain, Socket, Type};

use super::cluster::{Cluster, PATIENCE, vips};
use super::flow::{Flow, all_alive, await_served, open};

const FLOWS: usize = 500;

/// 3 to 16 pods on 8 nodes and back, one at a time, a leader's death in the middle: what lives goes on.
#[test]
fn flows_outlive_scaling_and_the_leader() {
    let cluster = Cluster::start(8, 2);
    let pods = cluster.pods();
    cluster.serve(&pods[..3]);
    cluster.speak();
    let [vip, _] = vips();
    let first = cluster.await_leader(vip, |_| true);
    await_served(&cluster, vip, &pods[..3]);
    let mut flows = open(&cluster, vip, FLOWS);
    let spread = |flows: &[Flow]| {
        let mut spread = BTreeMap::<String, usize>::new();
        for flow in flows {
            *spread.entry(flow.pod.clone()).or_default() += 1;
        }
        spread
    };
    println!("{FLOWS} flows, {first} leads: {:?}", spread(&flows));

    for number in 4..=10 {
        cluster.serve(&pods[..number]);
        thread::sleep(Duration::from_millis(300));
        all_alive(&cluster, &mut flows, &format!("with {number} pods"));
    }
    let off = cluster.await_leader(vip, |_| true);
    flows.retain(|flow| flow.node() != off);
    println!("{off} loses power; {} flows are not its own", flows.len());
    cluster.lab.inject(&off, Fault::PowerOff).unwrap();
    all_alive(&cluster, &mut flows, "after the leader's death");
    cluster.await_leader(vip, |leader| leader != off);
    let up: Vec<&Pod> = pods.iter().copied().filter(|pod| pod.node != off).collect();
    for number in 10..=up.len() {
        cluster.serve(&up[..number]);
        thread::sleep(Duration::from_millis(300));
        all_alive(&cluster, &mut flows, &format!("with {number} pods"));
    }
    println!("up: {:?}", cluster.verdicts());
    // Longer than earlier tables are remembered: from here on the holders' own word counts.
    thread::sleep(Duration::from_secs(8));
    all_alive(&cluster, &mut flows, "long after");
    let kept: BTreeSet<&str> = pods[..3].iter().map(|pod| &*pod.name).collect();
    for number in (kept.len()..up.len()).rev() {
        let mut serving: Vec<&Pod> = up
            .iter()
            .copied()
            .filter(|pod| kept.contains(&*pod.name))
            .collect();
        serving.extend(up.iter().copied().filter(|pod| !kept.contains(&*pod.name)));
        serving.truncate(number);
        cluster.serve(&serving);
        thread::sleep(Duration::from_millis(300));
        all_alive(&cluster, &mut flows, &format!("with {number} pods again"));
    }
    let verdicts = cluster.verdicts();
    println!("down: {verdicts:?}");
    assert!(verdicts["handed-on"] > 0, "some flows had to be looked for");
    assert_eq!(verdicts["flows-full"], 0);
}

/// What little of its way a client's packet has left is what nodes mark their questions by: its flows are found all the
/// same.
#[test]
fn flows_of_clients_whose_packets_arrive_with_little_ttl_are_found() {
    const OF_EACH: usize = 8;
    let cluster = Cluster::start(3, 1);
    let pods = cluster.pods();
    cluster.serve(&pods);
    cluster.speak();
    for vip in vips() {
        cluster.await_leader(vip, |_| true);
    }
    // Whichever of them leads: it asks, or is asked, or neither.
    for new in &pods {
        let mut others = pods.clone();
        others.retain(|pod| pod.name != new.name);
        cluster.serve(&others);
        let mut flows = Vec::new();
        for vip in vips() {
            await_served(&cluster, vip, &others);
            for ttl in LOW_TTL - 1..=FIRST_TTL + 1 {
                let open = || Flow::over(connect_with(ttl, (vip, LINES).into())?);
                let opened = (0..OF_EACH).map(|_| cluster.lab.client().run(open));
                flows.extend(opened.map(Result::unwrap));
            }
        }
        cluster.serve(&pods);
        for vip in vips() {
            await_served(&cluster, vip, &pods);
        }
        all_alive(&cluster, &mut flows, &format!("{} is new", new.name));
        // Longer than earlier tables are remembered: from here on the holders' own word counts.
        thread::sleep(Duration::from_secs(6));
        all_alive(&cluster, &mut flows, "long after");
    }
    let verdicts = cluster.verdicts();
    println!("{verdicts:?}");
    assert!(verdicts["handed-on"] > 0, "some flows had to be looked for");
}

fn connect_with(ttl: u8, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if to.is_ipv4() {
        socket.set_ttl_v4(ttl.into())?;
    } else {
        socket.set_unicast_hops_v6(ttl.into())?;
    }
    socket.connect_timeout(&to.into(), PATIENCE)?;
    Ok(socket.into())
}

/// A speaker that finds nothing of an earlier one takes the flows from connection tracking, and says again which it
/// holds; one that finds its maps goes on with them.
#[test]
fn flows_outlive_restarts_of_the_speakers() {
    let cluster = Cluster::start(3, 1);
    let pods = cluster.pods();
    cluster.serve(&pods[..2]);
    cluster.speak();
    let vip = vips()[0];
    cluster.await_leader(vip, |_| true);
    await_served(&cluster, vip, &pods[..2]);
    let mut flows = open(&cluster, vip, 60);
    cluster.serve(&pods);
    await_served(&cluster, vip, &pods);
    all_alive(&cluster, &mut flows, "with a third pod");
    for empty in [false, true] {
        for node in cluster.lab.nodes() {
            cluster.lab.inject(&node.name, Fault::Kill).unwrap();
            all_alive(&cluster, &mut flows, "without a speaker");
            if empty {
                // As another version would have left them: they are not read.
                let pins = cluster.lab.mount_pins().unwrap().join(&node.name);
                let ours = pins.join(format!("layout-{LAYOUT}"));
                std::fs::rename(ours, pins.join("layout-999")).unwrap();
            }
            cluster.lab.restart(&node.name, SPEAKER).unwrap();
            cluster.await_steering();
            // Long enough for earlier spreads to be forgotten, had there been any.
            thread::sleep(Duration::from_secs(6));
            all_alive(
                &cluster,
                &mut flows,
                &format!("{} restarted, without its maps: {empty}", node.name),
            );
        }
    }
    println!("{:?}", cluster.verdicts());
}
