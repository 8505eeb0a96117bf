//! Clients of the pods' UDP servers, and the moment a pod goes from under one.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_lab::manifests::ECHO;
use landfall_lab::server::WHO_AM_I;

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

/// Nothing ends a flow without connections but its endpoint's end: then its next datagrams are another's.
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
        // The last to go has another node's pod, or one of its own, to go to.
        while serving.len() > 1 {
            let (mine, _) = flow.answered();
            for _ in 0..20 {
                assert_eq!(flow.answered().0, mine, "{vip}: it stays with its pod");
            }
            serving.retain(|pod| pod.name != mine);
            let gone = Instant::now();
            cluster.serve(&serving);
            let next = loop {
                let (next, _) = flow.answered();
                if next != mine {
                    break next;
                }
                assert!(gone.elapsed() < PATIENCE, "{vip}: still with {mine}");
            };
            println!(
                "{vip}: from {mine} to {next} after {:.3} s",
                gone.elapsed().as_secs_f64()
            );
            assert!(serving.iter().any(|pod| pod.name == next));
        }
    }
}
