//! Segments with the addresses and ports of a connection that are none of its own: of one before it, or of somebody who
//! guesses.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use landfall_lab::manifests::LINES;
use landfall_lab::packets::{Raw, next_sequence, segment};
use landfall_lab::{Network, Pod};
use pnet_packet::tcp::TcpFlags;
use socket2::{Domain, Socket, Type};

use super::cluster::{Cluster, PATIENCE, vips};
use super::flow::{Flow, all_alive, await_served};

const PORTS: std::ops::Range<u16> = 21_000..21_060;
/// How far from a connection its strays are: the last are behind it.
const AWAY: [u32; 6] = [
    200_000,
    10_000_000,
    1_000_000_000,
    2_000_000_000,
    4_000_000_000,
    0_u32.wrapping_sub(100_000),
];
/// The host number of the lab's client.
const CLIENT: u8 = 100;

/// Opens a flow from each of the ports.
fn open(cluster: &Cluster, vip: IpAddr) -> Vec<Flow> {
    let to: SocketAddr = (vip, LINES).into();
    let own = own(vip);
    let connect = |port| -> std::io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(own, port).into())?;
        socket.connect_timeout(&to.into(), PATIENCE)?;
        Ok(socket.into())
    };
    PORTS
        .map(|port| {
            let stream = cluster.lab.client().run(|| connect(port));
            Flow::over(stream.unwrap()).unwrap()
        })
        .collect()
}

/// The client's address.
fn own(vip: IpAddr) -> IpAddr {
    Network::Lan.both(CLIENT)[usize::from(vip.is_ipv6())]
}

/// A client's ports are used again, and what it sent before or never sent is still on its way; then all flows of a node
/// become those of the others, which ask it.
#[test]
fn what_others_send_ends_no_flow() {
    let cluster = Cluster::start(3, 1);
    let pods: Vec<&Pod> = cluster.pods();
    let few = [pods[0], pods[2]];
    cluster.serve(&few);
    cluster.speak();
    for vip in vips() {
        await_served(&cluster, vip, &few);
        let raw = Raw::open(cluster.lab.client(), vip);
        let to: SocketAddr = (vip, LINES).into();
        // Nobody knows these: the pods that are here now answer.
        for port in PORTS {
            for flags in [TcpFlags::ACK, TcpFlags::SYN, TcpFlags::ACK] {
                let packet = segment((own(vip), port).into(), to, [1, 0], flags);
                raw.send(vip, &packet).unwrap();
            }
        }
        thread::sleep(Duration::from_millis(500));
        cluster.serve(&pods);
        await_served(&cluster, vip, &pods);
        let mut flows = open(&cluster, vip);
        for (number, flow) in flows.iter().enumerate() {
            let flags = [TcpFlags::RST, TcpFlags::FIN | TcpFlags::ACK][number % 2];
            let stream = flow.stream.get_ref();
            let sequence = next_sequence(stream).unwrap();
            let from = stream.local_addr().unwrap();
            for away in AWAY {
                for flags in [TcpFlags::ACK, flags] {
                    let packet = segment(from, to, [sequence.wrapping_add(away), 0], flags);
                    raw.send(vip, &packet).unwrap();
                }
            }
        }
        all_alive(&cluster, &mut flows, "before the change");
        let moved = flows.iter().filter(|flow| flow.pod == pods[1].name).count();
        assert!(moved > 0, "no flow is with the pod that goes");
        cluster.serve(&few);
        await_served(&cluster, vip, &few);
        for round in 0..3 {
            all_alive(&cluster, &mut flows, &format!("{vip}: after it, {round}"));
        }
    }
}
