//! Frames, built and read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use pnet_packet::ipv4::{self, MutableIpv4Packet};

/// TCP flags.
pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;

/// A frame for the test device, whose MAC is all zeroes.
pub(super) fn mk_frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    mk_frame_from([2, 0, 0, 0, 0, 1], ethertype, payload)
}

pub(super) fn mk_frame_from(source: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 6];
    frame.extend(source);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

pub(super) fn mk_v4(destination: Ipv4Addr) -> Vec<u8> {
    mk_ip(
        Ipv4Addr::new(192, 0, 2, 1).into(),
        destination.into(),
        17,
        64,
        &mk_udp(12_345, 53, &[]),
    )
}

pub(super) fn mk_v6(destination: Ipv6Addr) -> Vec<u8> {
    mk_ip(
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        destination.into(),
        17,
        64,
        &mk_udp(12_345, 53, &[]),
    )
}

/// An IP packet of either family, its header's checksum right.
pub(super) fn mk_ip(from: IpAddr, to: IpAddr, protocol: u8, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("short");
    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 0, 0, 0, ttl, protocol, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([protocol, ttl]);
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        _ => panic!("one family"),
    };
    packet.extend(payload);
    if to.is_ipv4() {
        repair(&mut packet);
    }
    packet
}

/// Makes an IPv4 header's checksum right.
pub(super) fn repair(packet: &mut [u8]) {
    let mut header = MutableIpv4Packet::new(packet).expect("long enough");
    header.set_checksum(0);
    let sum = ipv4::checksum(&header.to_immutable());
    header.set_checksum(sum);
}

/// Whether an IPv4 header's checksum is right.
pub(super) fn is_sound(packet: &[u8]) -> bool {
    let mut copy = packet.to_vec();
    repair(&mut copy);
    copy == packet
}

pub(super) fn mk_udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = from.to_be_bytes().to_vec();
    packet.extend(to.to_be_bytes());
    packet.extend(
        u16::try_from(8 + payload.len())
            .expect("short")
            .to_be_bytes(),
    );
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

pub(super) fn mk_tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    mk_tcp_at(from, to, flags, 7)
}

/// The same with a sequence number.
pub(super) fn mk_tcp_at(from: u16, to: u16, flags: u8, sequence: u32) -> Vec<u8> {
    let mut packet = from.to_be_bytes().to_vec();
    packet.extend(to.to_be_bytes());
    packet.extend(sequence.to_be_bytes());
    packet.extend([0, 0, 0, 9, 0x50, flags, 0x10, 0, 0xab, 0xcd, 0, 0]);
    packet
}

pub(super) fn mk_sctp(from: u16, to: u16) -> Vec<u8> {
    let mut packet = from.to_be_bytes().to_vec();
    packet.extend(to.to_be_bytes());
    packet.extend([0; 8]);
    packet
}

/// The sum in ones' complement of a transport's packet and what its checksum covers besides; 0xffff if that is right.
fn sum(from: IpAddr, to: IpAddr, protocol: u8, packet: &[u8]) -> u16 {
    let mut covered = Vec::new();
    match (from, to) {
        // An ICMP message's checksum covers no addresses.
        (IpAddr::V4(_), _) if protocol == 1 => {}
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            covered.extend(from.octets());
            covered.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            covered.extend(from.octets());
            covered.extend(to.octets());
        }
        _ => panic!("one family"),
    }
    if protocol != 1 {
        covered.extend([0, protocol]);
        covered.extend(u16::try_from(packet.len()).expect("short").to_be_bytes());
    }
    covered.extend(packet);
    covered.push(0);
    let mut sum: u32 = covered
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded")
}

/// SCTP's checksum, over a packet whose own is zero.
fn crc32c(packet: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for byte in packet {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 0 { 0 } else { 0x82f6_3b78 };
        }
    }
    (!crc).to_le_bytes()
}

/// Where the checksum lies in a transport's packet.
fn checksum_at(protocol: u8) -> usize {
    match protocol {
        6 => 16,
        17 => 6,
        132 => 8,
        _ => 2,
    }
}

/// A transport's packet with its checksum right.
pub(super) fn sealed(from: IpAddr, to: IpAddr, protocol: u8, packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let at = checksum_at(protocol);
    if protocol == 132 {
        packet[at..at + 4].fill(0);
        let sum = crc32c(&packet);
        packet[at..at + 4].copy_from_slice(&sum);
        return packet;
    }
    packet[at..at + 2].fill(0);
    let checksum = match !sum(from, to, protocol, &packet) {
        0 if protocol == 17 => u16::MAX,
        checksum => checksum,
    };
    packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// Whether the transport's checksum in a frame is right.
pub(super) fn has_sound_transport(frame: &[u8]) -> bool {
    let (from, to, protocol, packet): (IpAddr, IpAddr, u8, &[u8]) = if frame[12..14] == [8, 0] {
        let address = |at: usize| {
            let octets: [u8; 4] = frame[at..at + 4].try_into().expect("four");
            Ipv4Addr::from(octets).into()
        };
        (address(26), address(30), frame[23], &frame[34..])
    } else {
        let address = |at: usize| {
            let octets: [u8; 16] = frame[at..at + 16].try_into().expect("sixteen");
            Ipv6Addr::from(octets).into()
        };
        (address(22), address(38), frame[20], &frame[54..])
    };
    if protocol == 132 {
        return sealed(from, to, protocol, packet) == packet;
    }
    sum(from, to, protocol, packet) == 0xffff
}
