//! What steering adds to `externalTrafficPolicy: Local`, with the real kube-proxy delivering.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_tests::{PATIENCE, client};
use serde_json::json;

use crate::scene::{Scene, eventually};

/// As many connections reach every one of three nodes, but for one time in a thousand.
const CONNECTIONS: usize = 24;

/// Every endpoint is used and sees the client's own address; a leader needs none itself.
pub(crate) fn local_endpoints(scene: &Scene<'_>) {
    let vips = scene.create(
        "steered",
        json!({"externalTrafficPolicy": "Local"}),
        json!({}),
    );
    let leader = scene.leader(vips[0]);
    scene.served(&vips);
    let clients = [scene.lab().client(), scene.lab().remote()];
    for vip in &vips {
        for from in clients {
            eventually(
                "all three nodes to serve",
                || pods(from, *vip),
                |pods| pods.len() == 3,
            );
        }
    }

    scene.report_pods(&leader, false);
    let gone = Instant::now();
    eventually(
        "the leader's pods to be left out",
        || pods(clients[0], vips[0]),
        |pods| pods.keys().all(|pod| !pod.starts_with(&*leader)),
    );
    println!(
        "      left out {:.1} s after they were not ready",
        gone.elapsed().as_secs_f64()
    );
    thread::sleep(Duration::from_secs(2));
    for vip in &vips {
        assert_eq!(scene.leader(*vip), leader, "the leadership stays");
        for from in clients {
            assert!(
                pods(from, *vip)
                    .keys()
                    .all(|pod| !pod.starts_with(&*leader))
            );
        }
    }

    scene.report_pods(&leader, true);
    eventually(
        "the leader's pods to serve again",
        || pods(clients[0], vips[0]),
        |pods| pods.keys().any(|pod| pod.starts_with(&*leader)),
    );
}

/// Opens connections, all of which must be served, by pods that see the client's address: how many each pod got.
fn pods(from: &Netns, vip: IpAddr) -> BTreeMap<String, usize> {
    let mut pods = BTreeMap::new();
    let mine = addresses(from);
    for _ in 0..CONNECTIONS {
        match client::seen_as(from, vip, PATIENCE) {
            Ok((pod, address)) => {
                assert!(
                    mine.contains(&address),
                    "{pod} saw {address}, not one of {mine:?}"
                );
                *pods.entry(pod).or_default() += 1;
            }
            Err(error) => panic!("{vip} from {}: {error}", from.name()),
        }
    }
    pods
}

fn addresses(netns: &Netns) -> Vec<IpAddr> {
    let text = netns.ip("-j addr show scope global").unwrap();
    let links: serde_json::Value = serde_json::from_str(&text).unwrap();
    let of_link =
        |link: &serde_json::Value| link["addr_info"].as_array().cloned().unwrap_or_default();
    links
        .as_array()
        .unwrap()
        .iter()
        .flat_map(of_link)
        .filter_map(|address| address["local"].as_str()?.parse().ok())
        .collect()
}
