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
    let mut packet = from.to_be_bytes().to_vec();
    packet.extend(to.to_be_bytes());
    packet.extend([
        0, 0, 0, 7, 0, 0, 0, 9, 0x50, flags, 0x10, 0, 0xab, 0xcd, 0, 0,
    ]);
    packet
}

pub(super) fn mk_sctp(from: u16, to: u16) -> Vec<u8> {
    let mut packet = from.to_be_bytes().to_vec();
    packet.extend(to.to_be_bytes());
    packet.extend([0; 8]);
    packet
}
