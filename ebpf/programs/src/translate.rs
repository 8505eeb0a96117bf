//! Replacing an address and a port of a packet, with the checksums that cover them (RFC 1624). A checksum that was
//! wrong stays wrong by as much.

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::sctp;

use crate::maps;
use crate::packet::{
    ETH_HEADER, ICMP, ICMPV6, IPV4_DESTINATION, IPV4_SOURCE, IPV6_DESTINATION, IPV6_HEADER,
    IPV6_SOURCE, Kind, Packet, SCTP, TCP, UDP,
};

/// What the packet carries in this place; the packet inside an error carries it in the other.
pub(crate) const SOURCE: u32 = 0;
pub(crate) const DESTINATION: u32 = 1;

/// Where checksums lie in an IPv4 header and in those of the transports.
const IPV4_CHECKSUM: usize = 10;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const SCTP_CHECKSUM: usize = 8;
const ICMP_CHECKSUM: usize = 2;
/// Where a packet inside an ICMP error begins, after the ICMP header.
const INSIDE: usize = 8;
/// Where the identifier of an echo request or its answer lies (RFC 792, RFC 4443): it takes a port's place.
const ECHO_IDENTIFIER: usize = 4;

/// Puts `to` in the place of `from` in the packet at hand, and returns 0. Not so if the packet is too short or cannot be
/// written: then it may be left half changed, and its checksum is wrong.
///
/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_translate(skb: *mut __sk_buff, side: u32) -> u32 {
    let context = TcContext::new(skb);
    let Some(packet) = maps::packet() else {
        return 1;
    };
    let side = if side == SOURCE { SOURCE } else { DESTINATION };
    let done = match (packet.kind, packet.v6) {
        (Kind::Error, false) => error_v4(&context, packet, side),
        (Kind::Error, true) => error_v6(&context, packet, side),
        (_, false) => plain_v4(&context, packet, side),
        (_, true) => plain_v6(&context, packet, side),
    };
    u32::from(done.is_none())
}

#[inline(always)]
fn v4(address: &[u8; 16]) -> u32 {
    u32::from_ne_bytes([address[12], address[13], address[14], address[15]])
}

/// Where an address lies.
#[inline(always)]
fn place(header: usize, v6: bool, side: u32) -> usize {
    header
        + match (v6, side) {
            (false, SOURCE) => IPV4_SOURCE,
            (false, _) => IPV4_DESTINATION,
            (true, SOURCE) => IPV6_SOURCE,
            (true, _) => IPV6_DESTINATION,
        }
}

/// Where the checksum of the transport lies, and flags by which it is changed; nothing where it does not cover addresses.
#[inline(always)]
fn checksum(protocol: u8, transport: usize) -> Option<(usize, u64)> {
    match protocol {
        TCP => Some((transport + TCP_CHECKSUM, 0)),
        // Zero means that there is none.
        UDP => Some((transport + UDP_CHECKSUM, u64::from(BPF_F_MARK_MANGLED_0))),
        ICMPV6 => Some((transport + ICMP_CHECKSUM, 0)),
        _ => None,
    }
}

/// Whether a packet carries ports, or what stands for one.
#[inline(always)]
fn has_port(packet: &Packet) -> bool {
    packet.kind == Kind::Whole || packet.kind == Kind::Echo
}

/// Where the port lies that is translated, from where the transport's header does.
#[inline(always)]
fn port_of(protocol: u8, side: u32) -> usize {
    match protocol {
        ICMP | ICMPV6 => ECHO_IDENTIFIER,
        _ => side as usize * 2,
    }
}

#[inline(always)]
fn plain_v4(context: &TcContext, packet: &Packet, side: u32) -> Option<()> {
    let (from, to) = (v4(&packet.from.address), v4(&packet.to.address));
    if has_port(packet) {
        if let Some((at, flags)) = checksum(packet.protocol, packet.transport) {
            let flags = flags | u64::from(BPF_F_PSEUDO_HDR) | 4;
            context
                .l4_csum_replace(at, u64::from(from), u64::from(to), flags)
                .ok()?;
        }
        port(context, packet, side)?;
    }
    address_v4(context, packet, side)
}

#[inline(always)]
fn address_v4(context: &TcContext, packet: &Packet, side: u32) -> Option<()> {
    let (from, to) = (v4(&packet.from.address), v4(&packet.to.address));
    context
        .l3_csum_replace(
            ETH_HEADER + IPV4_CHECKSUM,
            u64::from(from),
            u64::from(to),
            4,
        )
        .ok()?;
    context.store(place(ETH_HEADER, false, side), &to, 0).ok()
}

/// What a change of the address does to a checksum.
#[inline(always)]
fn difference(packet: &Packet) -> Option<u64> {
    let (from, to) = (&packet.from.address, &packet.to.address);
    // SAFETY: both are 16 bytes, which the helper reads.
    let difference = unsafe {
        bpf_csum_diff(
            from.as_ptr().cast_mut().cast(),
            16,
            to.as_ptr().cast_mut().cast(),
            16,
            0,
        )
    };
    u64::try_from(difference).ok()
}

#[inline(always)]
fn plain_v6(context: &TcContext, packet: &Packet, side: u32) -> Option<()> {
    if has_port(packet) {
        if let Some((at, flags)) = checksum(packet.protocol, packet.transport) {
            let flags = flags | u64::from(BPF_F_PSEUDO_HDR);
            context
                .l4_csum_replace(at, 0, difference(packet)?, flags)
                .ok()?;
        }
        port(context, packet, side)?;
    }
    let to = &packet.to.address;
    context.store(place(ETH_HEADER, true, side), to, 0).ok()
}

#[inline(always)]
fn port(context: &TcContext, packet: &Packet, side: u32) -> Option<()> {
    let (from, to) = (packet.from.port.to_be(), packet.to.port.to_be());
    if from == to {
        return Some(());
    }
    if packet.protocol == SCTP {
        return sctp_port(context, packet, side);
    }
    let covered = match packet.protocol {
        ICMP => Some((packet.transport + ICMP_CHECKSUM, 0)),
        protocol => checksum(protocol, packet.transport),
    };
    if let Some((at, flags)) = covered {
        context
            .l4_csum_replace(at, u64::from(from), u64::from(to), flags | 2)
            .ok()?;
    }
    let at = packet.transport + port_of(packet.protocol, side);
    context.store(at, &to, 0).ok()
}

/// Its checksum covers the whole packet, so how long that is matters. A fragment does not tell.
#[inline(always)]
fn sctp_port(context: &TcContext, packet: &Packet, side: u32) -> Option<()> {
    if packet.more {
        return None;
    }
    let end = if packet.v6 {
        let payload: u16 = context.load(ETH_HEADER + 4).ok()?;
        ETH_HEADER + IPV6_HEADER + usize::from(u16::from_be(payload))
    } else {
        let total: u16 = context.load(ETH_HEADER + 2).ok()?;
        ETH_HEADER + usize::from(u16::from_be(total))
    };
    let before: [u8; 4] = context.load(packet.transport).ok()?;
    let sum: [u8; 4] = context.load(packet.transport + SCTP_CHECKSUM).ok()?;
    let [high, low] = packet.to.port.to_be_bytes();
    let after = if side == SOURCE {
        [high, low, before[2], before[3]]
    } else {
        [before[0], before[1], high, low]
    };
    let length = end.checked_sub(packet.transport)?;
    let sum = sctp::checksum_after(sum, before, after, length as u32);
    context
        .store(packet.transport + SCTP_CHECKSUM, &sum, 0)
        .ok()?;
    context.store(packet.transport, &after, 0).ok()
}

/// An error about a packet of the flow. Its sender may be a router on the way, whose address is not ours to change.
#[inline(always)]
fn error_v4(context: &TcContext, packet: &Packet, side: u32) -> Option<()> {
    let (from, to) = (v4(&packet.from.address), v4(&packet.to.address));
    let outer: u32 = context.load(place(ETH_HEADER, false, side)).ok()?;
    if outer == from {
        address_v4(context, packet, side)?;
    }
    let inside = packet.transport + INSIDE;
    // A change of the address and that of the header's checksum cancel each other in the checksum of the message.
    let sum: u16 = context.load(inside + IPV4_CHECKSUM).ok()?;
    let changed = fold(u64::from(!sum) + sum_of(!from) + sum_of(to));
    context.store(inside + IPV4_CHECKSUM, &!changed, 0).ok()?;
    context.store(place(inside, false, 1 - side), &to, 0).ok()?;
    inner(context, packet, side, sum_of(!from) + sum_of(to))
}

#[inline(always)]
fn error_v6(context: &TcContext, packet: &Packet, side: u32) -> Option<()> {
    let message = packet.transport + ICMP_CHECKSUM;
    let difference = difference(packet)?;
    let outer: [u8; 16] = context.load(place(ETH_HEADER, true, side)).ok()?;
    if outer == packet.from.address {
        context
            .l4_csum_replace(message, 0, difference, u64::from(BPF_F_PSEUDO_HDR))
            .ok()?;
        let to = &packet.to.address;
        context.store(place(ETH_HEADER, true, side), to, 0).ok()?;
    }
    context.l4_csum_replace(message, 0, difference, 0).ok()?;
    let at = place(packet.transport + INSIDE, true, 1 - side);
    context.store(at, &packet.to.address, 0).ok()?;
    inner(context, packet, side, difference)
}

/// The port and the checksum of the packet inside, and what that does to the checksum of the message.
#[inline(always)]
fn inner(context: &TcContext, packet: &Packet, side: u32, address: u64) -> Option<()> {
    let message = packet.transport + ICMP_CHECKSUM;
    let (from, to) = (packet.from.port.to_be(), packet.to.port.to_be());
    if from != to {
        context
            .l4_csum_replace(message, u64::from(from), u64::from(to), 2)
            .ok()?;
        let at = packet.inner + port_of(packet.protocol, 1 - side);
        context.store(at, &to, 0).ok()?;
    }
    let (address, covered) = match packet.protocol {
        // Its checksum covers no address.
        ICMP => (0, Some((packet.inner + ICMP_CHECKSUM, 0))),
        // SCTP's own is of no use in eight bytes.
        protocol => (address, checksum(protocol, packet.inner)),
    };
    let Some((at, flags)) = covered else {
        return Some(());
    };
    // Eight bytes of it are there at least; a TCP header's checksum lies behind them.
    let Ok(sum) = context.load::<u16>(at) else {
        return Some(());
    };
    if flags != 0 && sum == 0 {
        return Some(());
    }
    let changed = !fold(u64::from(!sum) + address + u64::from(!from) + u64::from(to));
    context
        .l4_csum_replace(message, u64::from(sum), u64::from(changed), 2)
        .ok()?;
    context.store(at, &changed, 0).ok()
}

#[inline(always)]
fn sum_of(word: u32) -> u64 {
    u64::from(word & 0xffff) + u64::from(word >> 16)
}

/// A sum in ones' complement.
#[inline(always)]
fn fold(mut sum: u64) -> u16 {
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}
