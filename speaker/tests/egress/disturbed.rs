//! Others take rules and connections away in the middle of flows: nothing leaves with another source, and flows go on.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::PodLinks;
use landfall_lab::server::TCP_PORT;

use super::cni::Cni;
use super::flow::{Datagrams, Pair, remote};
use super::node::{Cluster, Plan, until};

/// How often each disturbance.
const TIMES: u32 = 3;

/// Something that somebody does to the node.
type Disturbance = (&'static str, fn(&Cluster));

const DISTURBANCES: [Disturbance; 4] = [
    ("conntrack -F", |cluster| {
        cluster.node().exec("conntrack -F").unwrap();
    }),
    ("the CNI's rules anew", |cluster| {
        cluster.cni.resync(cluster.node());
    }),
    ("nft flush ruleset", |cluster| {
        cluster.node().nft("flush ruleset\n").unwrap();
        // In a real cluster it is its agent that does.
        cluster.cni.resync_what_is_left(cluster.node());
    }),
    ("both", |cluster| {
        cluster.node().nft("flush ruleset\n").unwrap();
        cluster.node().exec("conntrack -F").unwrap();
        cluster.cni.resync_what_is_left(cluster.node());
    }),
];

/// Opens one connection after another, none of which waits, until told to stop; how many.
fn hammer(cluster: &Cluster, remote: IpAddr, stop: &AtomicBool, opened: &AtomicU32) {
    let to = SocketAddr::new(remote, TCP_PORT);
    cluster.pod(0).netns.run(|| {
        while !stop.load(Ordering::Relaxed) {
            // Those that are dropped are tried again by the kernel for as long as the call waits.
            if TcpStream::connect_timeout(&to, Duration::from_millis(20)).is_ok() {
                opened.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
}

fn survives(cni: Cni, pod_links: PodLinks) {
    let cluster = Cluster::armed(&Plan {
        cni,
        pod_links,
        ..Plan::default()
    });
    let (pod, outside) = (&cluster.pod(0).netns, cluster.lab.remote());
    let mut flows: Vec<Pair> = remote()
        .into_iter()
        .flat_map(|remote| [remote; 4])
        .map(|remote| Pair::open(pod, outside, remote).unwrap())
        .collect();
    let datagrams = remote().map(|remote| Datagrams::open(pod, remote));
    for (name, disturb) in DISTURBANCES {
        let slowest = AtomicU64::new(0);
        for _ in 0..TIMES {
            let (stop, opened) = (AtomicBool::new(false), AtomicU32::new(0));
            thread::scope(|scope| {
                for remote in remote() {
                    let (cluster, stop, opened) = (&cluster, &stop, &opened);
                    scope.spawn(move || hammer(cluster, remote, stop, opened));
                }
                until("connections are opened", || {
                    opened.load(Ordering::Relaxed) > 4
                });
                let begun = Instant::now();
                disturb(&cluster);
                for (number, flow) in flows.iter_mut().enumerate() {
                    let (cluster, slowest) = (&cluster, &slowest);
                    // The first word after it comes now from the one side, now from the other.
                    scope.spawn(move || {
                        let spoken = if number % 2 == 0 {
                            flow.pod_speaks()
                        } else {
                            flow.outside_speaks()
                        };
                        for spoken in [spoken, flow.pod_speaks()] {
                            spoken.unwrap_or_else(|error| {
                                panic!("{name}: {error}\n{}", cluster.state())
                            });
                        }
                        let took = u64::try_from(begun.elapsed().as_millis()).unwrap();
                        slowest.fetch_max(took, Ordering::Relaxed);
                    });
                }
                until("it judges again", || {
                    cluster.table().contains("egress-judge")
                });
                let so_far = opened.load(Ordering::Relaxed);
                until("new connections again", || {
                    opened.load(Ordering::Relaxed) > so_far + 4
                });
                stop.store(true, Ordering::Relaxed);
            });
            for flow in &mut flows {
                flow.pod_speaks().unwrap();
                flow.outside_speaks().unwrap();
            }
            for (family, datagrams) in datagrams.iter().enumerate() {
                let egress = Some(cluster.egress_ips()[family]);
                let mut seen = None;
                until("datagrams go on", || {
                    seen = datagrams.seen_as(Duration::from_millis(500));
                    seen.is_some()
                });
                assert_eq!(seen, egress, "{name}");
            }
            cluster.assert_clean(&[]);
        }
        println!("{cni:?}, {pod_links:?}, {name}: all flows spoke within {slowest:?} ms");
    }
    println!("{cni:?}, {pod_links:?}: {:?}", cluster.guarded());
}

#[test]
fn beside_nftables() {
    survives(Cni::Nftables, PodLinks::Bridge);
}

#[test]
fn beside_iptables_nft() {
    survives(Cni::IptablesNft, PodLinks::Bridge);
}

#[test]
fn beside_iptables_legacy() {
    survives(Cni::IptablesLegacy, PodLinks::Bridge);
}

#[test]
fn on_links_of_their_own() {
    for cni in [Cni::Nftables, Cni::IptablesNft, Cni::IptablesLegacy] {
        survives(cni, PodLinks::PointToPoint);
    }
}
