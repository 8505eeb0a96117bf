//! Datagrams longer than the MTU.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use landfall_lab::manifests::ECHO;

use super::cluster::{mk_three, vips};

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
