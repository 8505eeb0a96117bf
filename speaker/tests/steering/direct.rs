//! Connections to pods by the pods' own addresses are nobody's flows, though a VIP's port leads to the same endpoint: not
//! for the comparisons of the flow tables with connection tracking, and not for new tables that look for what was before.
//! Nor do flows end where answers come by those addresses while nobody translates them.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use landfall_ebpf_common::LAYOUT;
use landfall_lab::address::pod_cidrs;
use landfall_lab::fault::{Fault, SPEAKER};
use landfall_lab::manifests::LINES;
use landfall_lab::server::TCP_PORT;
use landfall_lab::{Lab, Netns, Network, Pod, Topology};

use super::cluster::{Cluster, PATIENCE, mk_three, vips};
use super::flow::{Flow, all_alive, await_served, open};

/// What a speaker logs when it has compared.
const COMPARED: &str = "compared with connection tracking";
/// How often each is to do so under the same connections.
const COMPARISONS: usize = 3;
/// How many connections of a kind there are; so many of the cluster's own reach pods of other nodes, but for one time in
/// a hundred thousand.
const CONNECTIONS: usize = 10;

fn comparisons(lab: &Lab, node: &str) -> usize {
    lab.log(node, SPEAKER).unwrap().matches(COMPARED).count()
}

/// Waits until every speaker has compared a few times more, and has each connection say something meanwhile.
fn outlive_comparisons(cluster: &Cluster, flows: &mut [Flow], when: &str) {
    let lab = &cluster.lab;
    let wanted: Vec<(&str, usize)> = lab
        .nodes()
        .iter()
        .map(|node| (&*node.name, comparisons(lab, &node.name) + COMPARISONS))
        .collect();
    let begun = Instant::now();
    while wanted
        .iter()
        .any(|(node, wanted)| comparisons(lab, node) < *wanted)
    {
        assert!(begun.elapsed() < 2 * PATIENCE, "{when}: who compares?");
        thread::sleep(Duration::from_millis(500));
        all_alive(cluster, flows, when);
    }
    all_alive(cluster, flows, when);
}

/// Has a host reach the pods straight, by way of their nodes.
fn route_to_pods(lab: &Lab, from: &Netns) {
    for node in lab.nodes() {
        for (cidr, via) in pod_cidrs(node.index)
            .iter()
            .zip(node.addresses(Network::Lan))
        {
            from.ip(&format!("route add {cidr} via {via}")).unwrap();
        }
    }
}

/// Connections from a host to these pods, or to the VIPs.
fn connect(from: &Netns, to: &[SocketAddr]) -> Vec<Flow> {
    let to = to.iter().cycle().take(CONNECTIONS);
    to.map(|to| Flow::open(from, *to).unwrap()).collect()
}

#[test]
fn connections_past_the_vip_outlive_comparisons() {
    // No second network: what pods of different nodes say to each other goes by the uplinks.
    let cluster = Cluster::build(Topology {
        management: false,
        ..Topology::default()
    });
    let lab = &cluster.lab;
    let pods = cluster.pods();
    cluster.serve(&pods);
    lab.start_speakers_with(|speaker| {
        speaker
            .option("--compare-every", 1)
            .option("--log", "info,landfall_speaker::datapath=debug")
    })
    .unwrap();
    cluster.await_steering();
    let mut flows = Vec::new();
    for (family, vip) in vips().into_iter().enumerate() {
        cluster.await_leader(vip, |_| true);
        await_served(&cluster, vip, &pods);
        flows.extend(open(&cluster, vip, CONNECTIONS));
        let straight = |pod: &Pod| SocketAddr::new(pod.addresses[family], TCP_PORT);
        let all: Vec<SocketAddr> = pods.iter().copied().map(straight).collect();
        if family == 0 {
            route_to_pods(lab, lab.client());
            route_to_pods(lab, lab.router());
        }
        for from in [lab.client(), lab.remote()] {
            flows.extend(connect(from, &all));
        }
        let node = &lab.nodes()[0];
        for from in [&node.netns, &node.pods[0].netns] {
            flows.extend(connect(from, &all));
            // Translated where the client is: for the pod's node it comes to the pod's own address.
            flows.extend(connect(from, &[(vip, LINES).into()]));
        }
    }
    let elsewhere = flows.iter().filter(|flow| flow.node() != "node1").count();
    println!(
        "{} connections, {elsewhere} to pods not of node1",
        flows.len()
    );
    outlive_comparisons(&cluster, &mut flows, "under comparisons");

    for node in lab.nodes() {
        lab.inject(&node.name, Fault::Kill).unwrap();
        // As another version would have left them: they are not read, and what was before is looked for.
        let pins = lab.mount_pins().unwrap().join(&node.name);
        std::fs::rename(
            pins.join(format!("layout-{LAYOUT}")),
            pins.join("layout-999"),
        )
        .unwrap();
        lab.restart(&node.name, SPEAKER).unwrap();
        cluster.await_steering();
        all_alive(&cluster, &mut flows, "with new tables");
    }
    outlive_comparisons(&cluster, &mut flows, "under comparisons of new tables");
    println!("{:?}", cluster.verdicts());
}

/// Somebody takes the program off a node's egress: what leaves meanwhile carries the pods' addresses, which the client
/// can reach, and it resets there what it does not know.
#[test]
fn answers_that_leave_untranslated_end_no_flow() {
    let (cluster, _) = mk_three(true);
    let lab = &cluster.lab;
    route_to_pods(lab, lab.client());
    let [v4, v6] = vips();
    await_served(&cluster, v6, &cluster.pods());
    let mut flows = open(&cluster, v4, 3 * CONNECTIONS);
    flows.extend(open(&cluster, v6, 3 * CONNECTIONS));
    let pins = lab.mount_pins().unwrap();
    for node in lab.nodes() {
        let links = pins.join(&node.name).join(format!("layout-{LAYOUT}/links"));
        let mut links = std::fs::read_dir(links)
            .unwrap()
            .map(|it| it.unwrap().path());
        let egress = links.find(|link| link.to_string_lossy().ends_with("-egress"));
        let refused = || cluster.verdicts_of(&node.name)["refused"];
        let before = refused();
        let egress = egress.unwrap();
        let begun = Instant::now();
        // Until the client has reset something: the program goes a moment after its pin, which is all that holds it, and
        // may be back before anybody has answered.
        while refused() == before {
            let _ = std::fs::remove_file(&egress);
            all_alive(&cluster, &mut flows, "while nobody translates");
            assert!(begun.elapsed() < PATIENCE, "the client resets nothing");
        }
        println!(
            "{}: {} flows, all answered after {:?}, {} resets dropped",
            node.name,
            flows.iter().filter(|flow| flow.node() == node.name).count(),
            begun.elapsed(),
            refused() - before
        );
    }
}
