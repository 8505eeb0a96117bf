//! An address that is another tenant's pod's within a second.

use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_lab::server::{UDP_PORT, WHO_AM_I};

use super::cluster::{Cluster, PATIENCE, PLAIN};
use super::flow::remote;
use super::pods::Pod;
use super::soon::bridge;

/// The port that each of the pods sends from.
const PORT: u16 = 4000;

/// By which address a datagram from always the same port is seen: connection tracking knows the flow from the pod before.
fn datagram(pod: &Netns, from: IpAddr, remote: IpAddr) -> Option<IpAddr> {
    pod.run(|| {
        let socket = UdpSocket::bind((from, PORT)).unwrap();
        socket.connect((remote, UDP_PORT)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        socket.send(WHO_AM_I.as_bytes()).ok()?;
        let mut answer = [0; 128];
        let length = socket.recv(&mut answer).ok()?;
        let text = std::str::from_utf8(&answer[..length]).ok()?;
        text.split_once(' ')?.1.parse().ok()
    })
}

#[test]
fn an_address_leaves_as_its_present_pod() {
    let cluster = Cluster::armed(&bridge(), [20, 20]);
    let turns = ["red", "blue", PLAIN, "red", PLAIN, "blue", "red"];
    let mut former: Option<Pod<'_>> = None;
    for (turn, tenant) in turns.into_iter().enumerate() {
        let name = format!("pod{turn}");
        cluster.tell(&name, tenant, &[]);
        let mut pod = Pod::new(&cluster, name.clone(), tenant);
        let freed = former.take().map(|mut former| {
            let begun = Instant::now();
            former.del();
            begun
        });
        // What the pod before has sent is no word of this one's.
        cluster.wire.clear();
        pod.add();
        let seen = pod.connect(PATIENCE);
        if let Some(freed) = freed {
            println!(
                "{tenant} speaks {:?} after the address was freed",
                freed.elapsed()
            );
        }
        for (seen, by) in seen.into_iter().zip(cluster.leaves_by(tenant)) {
            assert_eq!(seen.unwrap().by, by, "{name} of {tenant}");
        }
        for ((remote, from), by) in remote()
            .into_iter()
            .zip(pod.addresses.clone())
            .zip(cluster.leaves_by(tenant))
        {
            let mut seen = None;
            cluster.until("its datagrams are answered", || {
                seen = datagram(&pod.netns, from, remote);
                seen.is_some()
            });
            assert_eq!(seen, Some(by), "{name} of {tenant}");
        }
        cluster.assert_clean(&[(tenant, &pod.addresses)]);
        // The API server's word of the address comes now, and stays when the pod goes.
        cluster.tell(&name, tenant, &pod.addresses);
        former = Some(pod);
    }
}
