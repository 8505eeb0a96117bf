//! Routers on the way, and what they say.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use nix::sys::socket::SockaddrStorage;
use socket2::{Domain, Protocol, Socket, Type};

use super::bytes::exchange;
use super::world::{
    EGRESS, LINES, PATIENCE, REMOTE, SERVER, World, ip, pod_addresses, tcp_seen_as,
};

/// Who answers a datagram with this TTL, and how: the ICMP message's type.
pub(super) fn hop(from: &Netns, to: IpAddr, ttl: u32) -> (IpAddr, u8) {
    from.run(|| {
        let v4 = to.is_ipv4();
        let (domain, protocol) = if v4 {
            (Domain::IPV4, Protocol::ICMPV4)
        } else {
            (Domain::IPV6, Protocol::ICMPV6)
        };
        let raw = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
        raw.set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let any = if v4 { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        if v4 {
            socket.set_ttl(ttl).unwrap();
        } else {
            socket2::SockRef::from(&socket)
                .set_unicast_hops_v6(ttl)
                .unwrap();
        }
        let begun = Instant::now();
        let port = 33_434 + u16::try_from(ttl).unwrap();
        while begun.elapsed() < PATIENCE {
            // An earlier error is told here.
            let _ = socket.send_to(b"who is there?", (to, port));
            let mut bytes = [0; 512];
            while let Ok((length, Some(sender))) =
                nix::sys::socket::recvfrom::<SockaddrStorage>(raw.as_raw_fd(), &mut bytes)
            {
                let bytes = &bytes[..length];
                let message = if v4 { &bytes[20..] } else { bytes };
                let wanted: &[u8] = if v4 { &[3, 11] } else { &[1, 3] };
                let inner = if v4 { 8 + 20 } else { 8 + 40 };
                let quoted = message.get(inner + 2..inner + 4);
                if wanted.contains(&message[0]) && quoted == Some(&port.to_be_bytes()[..]) {
                    let sender = sender
                        .as_sockaddr_in()
                        .map(|it| IpAddr::from(it.ip()))
                        .or(sender.as_sockaddr_in6().map(|it| it.ip().into()));
                    return (sender.unwrap(), message[0]);
                }
            }
        }
        panic!("nobody answers {ttl} to {to}");
    })
}

#[test]
fn a_traceroute_shows_the_way() {
    let world = World::build();
    for (family, expired, unreachable) in [(0, 11, 3), (1, 3, 1)] {
        let to = ip(REMOTE[family]);
        let [gateway, router] = [
            ["10.88.0.11", "fd00:88::11"][family],
            ["10.88.0.1", "fd00:88::1"][family],
        ];
        let pod = &world.pods[0];
        // The first is the pod's own node.
        assert_eq!(hop(pod, to, 1).1, expired);
        assert_eq!(hop(pod, to, 2), (ip(gateway), expired));
        assert_eq!(hop(pod, to, 3), (ip(router), expired));
        assert_eq!(hop(pod, to, 4), (to, unreachable));
        // The gateway's own pods: one hop less.
        let own = &world.pods[4];
        assert_eq!(hop(own, to, 2), (ip(router), expired));
        assert_eq!(hop(own, to, 3), (to, unreachable));
    }
    world.no_leak();
    println!("{:?}", world.gateway().counts());
}

/// Whether a host knows that packets to an address must not be longer.
fn knows(host: &Netns, to: IpAddr, mtu: u32) -> bool {
    let route = host.ip(&format!("route get {to}")).unwrap();
    route.contains(&format!("mtu {mtu}"))
}

/// A router behind the gateway has a smaller MTU, and says so to the egress address: the pod hears it.
#[test]
fn a_router_with_a_smaller_mtu_is_heard_by_the_pod() {
    const MTU: u32 = 1300;
    let world = World::build();
    world
        .router
        .ip_batch(&format!(
            "route add {}/32 dev eth1 mtu lock {MTU}\nroute add {}/128 dev eth1 mtu {MTU}\n",
            REMOTE[0], REMOTE[1]
        ))
        .unwrap();
    for to in REMOTE.map(ip) {
        for pod in [&world.pods[0], &world.pods[4]] {
            assert!(!knows(pod, to, MTU));
            exchange(pod, SocketAddr::new(to, LINES), 2_000_000);
            assert!(knows(pod, to, MTU), "{} to {to}", pod.name());
        }
    }
    world.no_leak();
}

/// The way between gateway and pods is narrower: the gateway itself says so, to either side.
#[test]
fn the_gateways_own_way_may_be_narrow() {
    const MTU: u32 = 1400;
    let mut world = World::bare();
    for uplink in world.around.uplinks.values_mut() {
        uplink.mtu = MTU;
    }
    world.start();
    for (family, to) in SERVER.map(ip).into_iter().enumerate() {
        let pod = &world.pods[0];
        exchange(pod, SocketAddr::new(to, LINES), 2_000_000);
        assert!(knows(pod, to, MTU), "the pod");
        assert!(knows(&world.server, ip(EGRESS[family]), MTU), "the server");
    }
    assert!(world.count("too-big") > 0);
    world.no_leak();
}

/// A port that nobody listens at is refused by the remote itself, to the pod.
#[test]
fn refusals_come_back() {
    let world = World::build();
    for (family, remote) in REMOTE.into_iter().enumerate() {
        for (place, pod) in world.pods.iter().enumerate() {
            let to = SocketAddr::new(ip(remote), 9);
            let error = super::world::connect(pod, to).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            let own = pod_addresses(place)[family];
            let refused = pod.run(|| {
                let socket = UdpSocket::bind((own, 0)).unwrap();
                socket.connect(to).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.send(b"x").unwrap();
                socket.recv(&mut [0; 16]).unwrap_err().kind()
            });
            assert_eq!(refused, std::io::ErrorKind::ConnectionRefused);
        }
        tcp_seen_as(&world.pods[0], ip(remote));
    }
    world.no_leak();
}
