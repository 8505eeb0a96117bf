//! Clients of the pods' UDP servers, and the moment a pod goes from under one.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use landfall_lab::manifests::ECHO;
use landfall_lab::server::WHO_AM_I;
use landfall_lab::{Netns, Pod};

use super::cluster::{Cluster, PATIENCE, vips};

/// How long one datagram is waited for: a lost one is no reason to wait longer.
const TRY: Duration = Duration::from_millis(500);

/// A UDP socket of a client's, connected to a VIP.
pub(super) struct Datagrams(UdpSocket);

impl Datagrams {
    pub(super) fn open(from: &Netns, vip: IpAddr) -> Self {
        let any: IpAddr = match vip {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = from.run(|| {
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.connect((vip, ECHO)).unwrap();
            socket
        });
        socket.set_read_timeout(Some(TRY)).unwrap();
        Self(socket)
    }

    /// Asks once: the pod that answers, and the client's address as it sees it. Nothing: silence.
    pub(super) fn ask(&self) -> Option<(String, IpAddr)> {
        self.0.send(WHO_AM_I.as_bytes()).ok()?;
        let mut buffer = [0; 256];
        let length = match self.0.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) => {
                let expected = [ErrorKind::WouldBlock, ErrorKind::ConnectionRefused];
                assert!(expected.contains(&error.kind()), "{error}");
                return None;
            }
        };
        let text = std::str::from_utf8(&buffer[..length]).unwrap();
        let (pod, address) = text.split_once(' ').unwrap();
        Some((pod.to_owned(), address.parse().unwrap()))
    }

    /// The same, until an answer comes.
    pub(super) fn answered(&self) -> (String, IpAddr) {
        let begun = Instant::now();
        loop {
            if let Some(answer) = self.ask() {
                return answer;
            }
            assert!(begun.elapsed() < PATIENCE, "no answer to a datagram");
        }
    }
}

/// The nodes with their weights, as the tables have them when these pods serve: in the smallest numbers.
fn weights(pods: &[&Pod]) -> BTreeMap<String, u64> {
    let mut weights = BTreeMap::new();
    for pod in pods {
        *weights.entry(pod.node.clone()).or_default() += 1;
    }
    // No node has more than two.
    if weights.values().all(|weight| *weight == 2) {
        for weight in weights.values_mut() {
            *weight = 1;
        }
    }
    weights
}

/// Whether all nodes' tables of datagrams to a VIP are these.
fn are_told(cluster: &Cluster, vip: IpAddr, wanted: &BTreeMap<String, u64>) -> bool {
    let port = format!("{}/UDP", SocketAddr::new(vip, ECHO));
    cluster.lab.nodes().iter().all(|node| {
        let state = cluster.lab.speaker_state(&node.name).unwrap_or_default();
        let table = &state["steering"]["ports"][&port];
        *table == serde_json::json!(wanted)
    })
}

/// How long the programs may take to have what the tables say, and what was under way is no more.
const SETTLES: Duration = Duration::from_secs(1);

/// Asks until one of the pods that serve answers, all nodes' tables are theirs, and what is under way has come. The
/// pods that answered, each as often as the flow moved to it.
fn settle(cluster: &Cluster, vip: IpAddr, serving: &[&Pod], flow: &Datagrams) -> Vec<String> {
    let wanted = weights(serving);
    let mut answered: Vec<String> = Vec::new();
    let (begun, mut settled) = (Instant::now(), None);
    while settled.is_none_or(|since: Instant| since.elapsed() < SETTLES) {
        let (pod, _) = flow.answered();
        let served = serving.iter().any(|served| served.name == pod);
        if settled.is_none() && served && are_told(cluster, vip, &wanted) {
            settled = Some(Instant::now());
        }
        if answered.last() != Some(&pod) {
            answered.push(pod);
        }
        assert!(
            settled.is_some() || begun.elapsed() < PATIENCE,
            "{vip}: answered by {answered:?}; not all have {wanted:?}: {}",
            cluster.lab.speaker_state("node1").unwrap_or_default()["steering"]
        );
    }
    answered
}

/// Nothing ends a flow without connections but its endpoint's end: then its next datagrams are another's.
///
/// It may move twice then: its node gives it to another pod of its own as soon as that node knows, and the node that
/// steers, which may know later, has another node for its bucket by the new weights.
#[test]
fn a_flow_moves_to_a_living_pod_when_its_own_goes() {
    let cluster = Cluster::start(2, 2);
    let pods = cluster.pods();
    cluster.serve(&pods);
    cluster.speak();
    for vip in vips() {
        cluster.await_leader(vip, |_| true);
        cluster.serve(&pods);
        super::flow::await_served(&cluster, vip, &pods);
        let flow = Datagrams::open(cluster.lab.client(), vip);
        let mut serving = pods.clone();
        let mut moves = settle(&cluster, vip, &serving, &flow);
        // The last to go has another node's pod, or one of its own, to go to.
        loop {
            let mine = moves.pop().expect("it was answered");
            for _ in 0..20 {
                assert_eq!(flow.answered().0, mine, "{vip}: it stays with its pod");
            }
            serving.retain(|pod| pod.name != mine);
            if serving.is_empty() {
                break;
            }
            cluster.serve(&serving);
            moves = settle(&cluster, vip, &serving, &flow);
            println!("{vip}: from {mine} by {moves:?}");
            // The old one may have answered until all knew.
            let moved = moves
                .strip_prefix(std::slice::from_ref(&mine))
                .unwrap_or(&moves);
            let is_served = |pod: &String| serving.iter().any(|served| served.name == *pod);
            assert!(
                moved.iter().all(is_served),
                "{vip}: back to a pod that is gone"
            );
            let node = |pod: &str| pod.split_once("-pod").unwrap().0.to_owned();
            match moved {
                [_] => {}
                [first, second] => assert_ne!(
                    node(first),
                    node(second),
                    "{vip}: the second move is by the tables, to another node"
                ),
                _ => panic!("{vip}: from {mine} by {moves:?}"),
            }
        }
    }
}
