//! The cluster's own clients: pods and processes of its nodes, among them pods that serve what they ask for.

use std::collections::BTreeSet;
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use landfall_lab::manifests::LINES;
use landfall_lab::{Netns, Network, Node, Pod, PodLinks, Topology};

use super::cluster::{Cluster, PATIENCE, vips};
use super::datagrams::Datagrams;
use super::flow::{Flow, await_served};

/// As many connections reach every one of four pods, but for one time in four thousand.
const CONNECTIONS: usize = 36;

/// Who asks, and by which addresses pods are to see it.
struct Asking<'a> {
    name: &'a str,
    from: &'a Netns,
    addresses: [IpAddr; 2],
    /// The addresses by which it sees itself, if it is a pod.
    as_itself: Vec<IpAddr>,
}

impl<'a> Asking<'a> {
    fn pod(cluster: &'a Cluster, pod: &'a Pod) -> Self {
        let node = cluster.lab.node(&pod.node).unwrap();
        let host = node.netns.ip("-o address show").unwrap();
        let as_itself = host
            .split_whitespace()
            .filter_map(|word| word.split_once('/')?.0.parse().ok())
            .collect();
        Self {
            name: &pod.name,
            from: &pod.netns,
            addresses: pod.addresses,
            as_itself,
        }
    }

    fn host(node: &'a Node) -> Self {
        Self {
            name: &node.name,
            from: &node.netns,
            addresses: node.addresses(Network::Lan),
            as_itself: Vec::new(),
        }
    }

    /// It is served by all of these pods and by no other, by TCP and UDP, and seen as what it is.
    fn is_served(&self, by: &[&Pod]) {
        let wanted: BTreeSet<&str> = by.iter().map(|pod| &*pod.name).collect();
        for (vip, own) in vips().into_iter().zip(self.addresses) {
            let what = format!("{vip} from {}", self.name);
            let check = |pod: &str, seen: IpAddr| {
                if pod == self.name {
                    assert!(self.as_itself.contains(&seen), "{what}: itself, {seen}");
                } else {
                    assert_eq!(seen, own, "{what}, by {pod}");
                }
            };
            self.await_rules(vip, &wanted);
            let mut seen = [BTreeSet::new(), BTreeSet::new()];
            for _ in 0..CONNECTIONS {
                let mut flow = Flow::open(self.from, (vip, LINES).into())
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                let address = flow.seen_as();
                check(&flow.pod, address);
                seen[0].insert(flow.pod);
                let (pod, address) = Datagrams::open(self.from, vip).answered();
                check(&pod, address);
                seen[1].insert(pod);
            }
            for seen in seen {
                assert_eq!(
                    seen.iter().map(String::as_str).collect::<BTreeSet<_>>(),
                    wanted,
                    "{what}"
                );
            }
        }
    }

    /// Waits until the node's rules know who serves: for a moment they may name who did before.
    fn await_rules(&self, vip: IpAddr, wanted: &BTreeSet<&str>) {
        let begun = Instant::now();
        let to = (vip, LINES).into();
        let one = || {
            let stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok()?;
            Some(Flow::over(stream).ok()?.pod)
        };
        loop {
            let seen: BTreeSet<_> = self.from.run(|| (0..CONNECTIONS).map(|_| one()).collect());
            let pods: Option<BTreeSet<&str>> = seen.iter().map(Option::as_deref).collect();
            if pods.as_ref() == Some(wanted) {
                return;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{vip} from {}: served by {seen:?}, not by {wanted:?}",
                self.name
            );
        }
    }
}

/// Two pods on each of three nodes; the leader.
fn mk_cluster(pod_links: PodLinks) -> (Cluster, String) {
    let cluster = Cluster::build(Topology {
        pods_per_node: 2,
        pod_links,
        ..Topology::default()
    });
    cluster.serve(&[]);
    cluster.speak();
    let leader = cluster.await_leader(vips()[0], |_| true);
    (cluster, leader)
}

/// The pods of a node.
fn pods_of(cluster: &Cluster, of: impl Fn(&str) -> bool) -> Vec<&Pod> {
    let mut pods = cluster.pods();
    pods.retain(|pod| of(&pod.node));
    pods
}

fn serve(cluster: &Cluster, pods: &[&Pod]) {
    cluster.serve(pods);
    for vip in vips() {
        await_served(cluster, vip, pods);
    }
}

#[test]
fn a_pod_reaches_itself() {
    for pod_links in [PodLinks::Bridge, PodLinks::PointToPoint] {
        let (cluster, leader) = mk_cluster(pod_links);
        for own in [true, false] {
            let pods = pods_of(&cluster, |node| (node == leader) == own);
            println!("{pod_links:?}: {} alone", pods[0].name);
            serve(&cluster, &pods[..1]);
            Asking::pod(&cluster, pods[0]).is_served(&pods[..1]);
        }
    }
}

/// On one bridge with another, answers pass the node's rules only where bridged packets do (`br_netfilter`), which
/// Kubernetes asks of such a node.
#[test]
fn pods_reach_pods_of_other_nodes_and_of_their_own() {
    for pod_links in [PodLinks::Bridge, PodLinks::PointToPoint] {
        let (cluster, leader) = mk_cluster(pod_links);
        let of_leader = pods_of(&cluster, |node| node == leader);
        let others = pods_of(&cluster, |node| node != leader);
        serve(&cluster, &others);
        println!("{pod_links:?}: a pod of the leader, served by others");
        Asking::pod(&cluster, of_leader[0]).is_served(&others);
        println!("{pod_links:?}: a pod among those that serve, on another node");
        Asking::pod(&cluster, others[0]).is_served(&others);
        serve(&cluster, &of_leader);
        println!("{pod_links:?}: of another node, served by the leader's");
        Asking::pod(&cluster, others[0]).is_served(&of_leader);
    }
}

#[test]
fn processes_of_the_nodes_are_served() {
    let (cluster, leader) = mk_cluster(PodLinks::Bridge);
    let other = cluster
        .lab
        .nodes()
        .iter()
        .find(|node| node.name != leader)
        .unwrap();
    let hosts = [cluster.lab.node(&leader).unwrap(), other];
    let of = |node: &str| pods_of(&cluster, |of| of == node);
    let (of_leader, of_other) = (of(&leader), of(&other.name));
    for pods in [&of_leader, &of_other] {
        serve(&cluster, pods);
        for host in hosts {
            println!("{} by pods of {}", host.name, pods[0].node);
            Asking::host(host).is_served(pods);
        }
    }
    let both: Vec<&Pod> = of_leader.iter().chain(&of_other).copied().collect();
    serve(&cluster, &both);
    for host in hosts {
        println!("{} by pods of both", host.name);
        Asking::host(host).is_served(&both);
    }
}

/// Connection tracking translates a client's datagrams as it did the first, until there have been none for a while: they
/// are another's at once when their pod goes.
#[test]
fn datagrams_of_the_clusters_own_clients_move_when_their_pod_goes() {
    let (cluster, leader) = mk_cluster(PodLinks::Bridge);
    let of_leader = pods_of(&cluster, |node| node == leader);
    let others = pods_of(&cluster, |node| node != leader);
    let host = cluster.lab.node(&leader).unwrap();
    for vip in vips() {
        for from in [&of_leader[0].netns, &host.netns] {
            let mut serving = others.clone();
            serve(&cluster, &serving);
            let flow = Datagrams::open(from, vip);
            while serving.len() > 1 {
                let (mine, _) = flow.answered();
                for _ in 0..20 {
                    assert_eq!(flow.answered().0, mine, "{vip}: it stays with its pod");
                }
                serving.retain(|pod| pod.name != mine);
                cluster.serve(&serving);
                let gone = Instant::now();
                while flow.answered().0 == mine {
                    assert!(
                        gone.elapsed() < PATIENCE,
                        "{vip} from {}: still with {mine}",
                        from.name()
                    );
                }
                println!(
                    "{vip} from {}: moved after {:.3} s",
                    from.name(),
                    gone.elapsed().as_secs_f64()
                );
            }
        }
    }
}
