//! Datagrams longer than the MTU.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use landfall_lab::manifests::ECHO;
use landfall_lab::{Network, Pod};

use super::cluster::{PATIENCE, mk_three, vips};
use super::flow::await_served;
use landfall_lab::packets::{Raw, fragments};

/// Datagrams longer than the MTU reach the node that serves the client, whole.
#[test]
fn fragments_meet() {
    let (cluster, _) = mk_three(false);
    for vip in vips() {
        for from in [cluster.lab.client(), cluster.lab.remote()] {
            let socket = from.run(|| {
                let any: IpAddr = match vip {
                    IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                    IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                };
                UdpSocket::bind((any, 0)).unwrap()
            });
            socket
                .set_read_timeout(Some(Duration::from_secs(1)))
                .unwrap();
            let datagram: Vec<u8> = (0..4000_u32)
                .map(|at| u8::try_from(at % 251).unwrap())
                .collect();
            let mut buffer = vec![0; 8192];
            let answered = (0..20).any(|_| {
                socket.send_to(&datagram, (vip, ECHO)).unwrap();
                socket
                    .recv(&mut buffer)
                    .is_ok_and(|length| buffer[..length].ends_with(&datagram))
            });
            assert!(answered, "{vip} from {}", from.name());
        }
    }
    let verdicts = cluster.verdicts();
    println!("{verdicts:?}");
    assert_eq!(verdicts["stray-fragment"], 0);
}

/// In whatever order the fragments come, they meet at the node of their pod: a Service whose UDP ports are spread alike
/// is steered by the client's address, which is in every fragment.
#[test]
fn shuffled_fragments_meet() {
    const PORT: u16 = 25_000;
    const ORDERS: [[usize; 3]; 6] = [
        [2, 0, 1],
        [2, 1, 0],
        [1, 2, 0],
        [1, 0, 2],
        [0, 2, 1],
        [0, 1, 2],
    ];
    let (cluster, leader) = mk_three(false);
    let elsewhere: Vec<&Pod> = cluster
        .pods()
        .into_iter()
        .filter(|pod| pod.node != leader)
        .collect();
    cluster.serve(&elsewhere);
    let clients = [
        (cluster.lab.client(), Network::Lan.both(100)),
        (cluster.lab.remote(), Network::Remote.both(100)),
    ];
    for (at, vip) in vips().into_iter().enumerate() {
        await_served(&cluster, vip, &elsewhere);
        let to = SocketAddr::new(vip, ECHO);
        for (from, addresses) in &clients {
            let own = SocketAddr::new(addresses[at], PORT);
            let socket = from.run(|| UdpSocket::bind(own).unwrap());
            let raw = Raw::open(from, vip);
            let mut buffer = vec![0; 8192];
            // Once the way is known, nothing is lost.
            socket
                .set_read_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            let begun = Instant::now();
            while socket.send_to(b"?", to).is_err() || socket.recv(&mut buffer).is_err() {
                assert!(begun.elapsed() < PATIENCE, "{to} is silent to {own}");
            }
            while socket.recv(&mut buffer).is_ok() {}
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            for (number, order) in ORDERS.iter().enumerate() {
                let seed = u32::try_from(number).unwrap();
                let data: Vec<u8> = (seed..seed + 4000)
                    .map(|at| u8::try_from(at % 251).unwrap())
                    .collect();
                let parts = fragments(own, to, 1000 + seed, &data);
                for part in order {
                    raw.send(vip, &parts[*part]).unwrap();
                }
                let length = socket
                    .recv(&mut buffer)
                    .unwrap_or_else(|error| panic!("{own} to {to}, {order:?}: {error}"));
                let answer = &buffer[..length];
                assert!(
                    answer.ends_with(&data),
                    "{own} to {to}, {order:?}: other bytes"
                );
                assert!(
                    !answer.starts_with(leader.as_bytes()),
                    "the leader's pod answered"
                );
            }
        }
    }
    let verdicts = cluster.verdicts();
    println!("{verdicts:?}");
    assert_eq!(verdicts["stray-fragment"], 0);
}
