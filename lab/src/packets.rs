//! IP packets made by hand, and sent past the sender's own network stack.

use std::net::{IpAddr, SocketAddr, TcpStream};

use crate::{Netns, sys};
use pnet_packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet_packet::ipv4::MutableIpv4Packet;
use pnet_packet::ipv6::MutableIpv6Packet;
use pnet_packet::tcp::{self, MutableTcpPacket};
use pnet_packet::udp::{self, MutableUdpPacket};
use socket2::{Domain, Protocol, Socket, Type};

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;
const TCP_HEADER: usize = 20;
/// What a fragment carries, at most: as much as fits into 1500 bytes with either header, in units of eight.
const FRAGMENT: usize = 1448;

/// Sends IP packets as they are, but for IPv4's header checksum, which the kernel fills in.
#[derive(Debug)]
pub struct Raw(Socket);

impl Raw {
    /// From a host, for destinations of a family.
    pub fn open(from: &Netns, to: IpAddr) -> Self {
        let domain = Domain::for_address((to, 0).into());
        // Of this protocol a socket takes whole packets, of both families (raw(7)).
        let raw = Protocol::from(libc::IPPROTO_RAW);
        Self(from.run(|| Socket::new(domain, Type::RAW, Some(raw)).expect("the sizes are right")))
    }

    /// Sends one; how many bytes that were.
    pub fn send(&self, to: IpAddr, packet: &[u8]) -> std::io::Result<usize> {
        self.0.send_to(packet, &SocketAddr::new(to, 0).into())
    }
}

/// The sequence number of what a connection sends next.
///
/// # Errors
/// Those of the socket: it takes `CAP_NET_ADMIN`.
pub fn next_sequence(connection: &TcpStream) -> std::io::Result<u32> {
    sys::next_sequence(connection)
}

/// An IP packet. `fragment`: the datagram's identification, this one's offset, and whether more follow.
fn ip(
    from: IpAddr,
    to: IpAddr,
    protocol: IpNextHeaderProtocol,
    fragment: Option<(u32, usize, bool)>,
    payload: &[u8],
) -> Vec<u8> {
    let short = |length: usize| u16::try_from(length).expect("the sizes are right");
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut packet = vec![0; IPV4_HEADER];
            let mut header = MutableIpv4Packet::new(&mut packet).expect("the sizes are right");
            header.set_version(4);
            header.set_header_length(5);
            header.set_total_length(short(IPV4_HEADER + payload.len()));
            header.set_ttl(64);
            header.set_next_level_protocol(protocol);
            header.set_source(from);
            header.set_destination(to);
            if let Some((id, offset, more)) = fragment {
                header.set_identification(u16::try_from(id).expect("the sizes are right"));
                header.set_flags(u8::from(more));
                header.set_fragment_offset(short(offset / 8));
            }
            packet.extend(payload);
            packet
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut inside = Vec::new();
            if let Some((id, offset, more)) = fragment {
                inside.extend([protocol.0, 0]);
                inside.extend((short(offset) | u16::from(more)).to_be_bytes());
                inside.extend(id.to_be_bytes());
            }
            let next = match fragment {
                Some(_) => IpNextHeaderProtocols::Ipv6Frag,
                None => protocol,
            };
            inside.extend(payload);
            let mut packet = vec![0; IPV6_HEADER];
            let mut header = MutableIpv6Packet::new(&mut packet).expect("the sizes are right");
            header.set_version(6);
            header.set_payload_length(short(inside.len()));
            header.set_next_header(next);
            header.set_hop_limit(64);
            header.set_source(from);
            header.set_destination(to);
            packet.extend(inside);
            packet
        }
        _ => panic!("{from} and {to} are of two families"),
    }
}

/// A UDP header and data.
fn udp_datagram(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0; UDP_HEADER];
    datagram.extend(data);
    let length = u16::try_from(datagram.len()).expect("the sizes are right");
    let mut header = MutableUdpPacket::new(&mut datagram).expect("the sizes are right");
    header.set_source(from.port());
    header.set_destination(to.port());
    header.set_length(length);
    let sum = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            udp::ipv4_checksum(&header.to_immutable(), &from, &to)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            udp::ipv6_checksum(&header.to_immutable(), &from, &to)
        }
        _ => panic!("{from} and {to} are of two families"),
    };
    header.set_checksum(sum);
    datagram
}

/// A UDP datagram in one packet.
pub fn datagram(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let datagram = udp_datagram(from, to, data);
    ip(
        from.ip(),
        to.ip(),
        IpNextHeaderProtocols::Udp,
        None,
        &datagram,
    )
}

/// The fragments of a UDP datagram, in their order.
pub fn fragments(from: SocketAddr, to: SocketAddr, id: u32, data: &[u8]) -> Vec<Vec<u8>> {
    let datagram = udp_datagram(from, to, data);
    let number = datagram.len().div_ceil(FRAGMENT);
    datagram
        .chunks(FRAGMENT)
        .enumerate()
        .map(|(at, part)| {
            let place = Some((id, at * FRAGMENT, at + 1 < number));
            ip(from.ip(), to.ip(), IpNextHeaderProtocols::Udp, place, part)
        })
        .collect()
}

/// A SYN.
pub fn syn(from: SocketAddr, to: SocketAddr, sequence: u32) -> Vec<u8> {
    segment(from, to, [sequence, 0], tcp::TcpFlags::SYN)
}

/// A TCP segment without data, with these numbers, its own and the one that it acknowledges, and these flags (RFC 9293, 3.1).
pub fn segment(from: SocketAddr, to: SocketAddr, numbers: [u32; 2], flags: u8) -> Vec<u8> {
    let mut segment = vec![0; TCP_HEADER];
    let mut header = MutableTcpPacket::new(&mut segment).expect("the sizes are right");
    header.set_source(from.port());
    header.set_destination(to.port());
    header.set_sequence(numbers[0]);
    header.set_acknowledgement(numbers[1]);
    header.set_data_offset(5);
    header.set_flags(flags);
    header.set_window(64_240);
    let sum = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            tcp::ipv4_checksum(&header.to_immutable(), &from, &to)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            tcp::ipv6_checksum(&header.to_immutable(), &from, &to)
        }
        _ => panic!("{from} and {to} are of two families"),
    };
    header.set_checksum(sum);
    ip(
        from.ip(),
        to.ip(),
        IpNextHeaderProtocols::Tcp,
        None,
        &segment,
    )
}
