//! Answers of our own: ICMP errors (RFC 792, RFC 4443), and resets (RFC 9293, 3.5.2).
//!
//! The frame is shortened and written anew. Where the packet's checksum was left to be filled in by a device, the kernel
//! still fills it in afterwards: it sums up what lies from the transport's header on, and writes the result where the
//! transport's checksum was, whatever lies there now. Two bytes of padding behind the packet are chosen so that what is
//! written there is what is there already.

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS};
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes};
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::egress::gateway::Reason;

use super::maps;
use crate::DROP;
use crate::packet::{
    ETH_HEADER, ICMP, ICMPV6, IPV4_HEADER, IPV6_DESTINATION, IPV6_HEADER, Kind, Packet, TCP, UDP,
};

/// The TTL, or hop limit, of what is sent.
const TTL: u8 = 64;
/// How much of an IPv4 packet is quoted: its header, if that is without options, and eight bytes.
const QUOTED_V4: usize = IPV4_HEADER + 8;
/// The same for IPv6, where the transport's header follows at once.
const QUOTED_V6: usize = IPV6_HEADER + 8;
/// ICMP's header.
const MESSAGE: usize = 8;
/// TCP's.
const SEGMENT: usize = 20;
/// The padding.
const PADDING: usize = 2;

/// What is said. In a word: the answer, what it is about in the next byte, and the MTU in the upper half.
pub(super) mod say {
    /// The TTL is over.
    pub(in super::super) const EXPIRED: u32 = 1;
    /// The packet is too big.
    pub(in super::super) const TOO_BIG: u32 = 2;
    /// Administratively prohibited; of TCP a reset.
    pub(in super::super) const PROHIBITED: u32 = 3;
    /// The sender is above the interface, not behind it.
    pub(in super::super) const UP: u32 = 1 << 8;
}

/// Answers the packet at hand. It is dropped in any case.
///
/// A global function: verified once, whoever calls it. The lower half of `own` is the number of the hop whose address signs
/// an error, 0 if the packet's own destination does; the upper half that of the pod's node, if it is another's pod.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_answer(skb: *mut __sk_buff, what: u32, own: u32) -> i32 {
    let context = TcContext::new(skb);
    let Some(packet) = crate::maps::packet() else {
        return DROP;
    };
    // Nothing answers an error (RFC 1122, 3.2.2), or part of a packet.
    if packet.kind == Kind::Error || packet.kind == Kind::LaterFragment {
        return DROP;
    }
    let sent = if what & 0xff == say::PROHIBITED && packet.protocol == TCP {
        if packet.v6 {
            reset_v6(&context, packet)
        } else {
            reset_v4(&context, packet)
        }
    } else if !maps::may_answer(super::flow::now() / 60, maps::settings().errors) {
        maps::note(Reason::Limited);
        return DROP;
    } else if packet.v6 {
        error_v6(&context, packet, what, own)
    } else {
        error_v4(&context, packet, what, own)
    };
    if sent.is_none() {
        return DROP;
    }
    if own >> 16 != 0 && super::tunnelled(skb, (own >> 16) as u16).is_none() {
        return DROP;
    }
    maps::note(Reason::Answered);
    let flags = if what & say::UP != 0 {
        // The mark is the packet's own: with it the answer would go the same way.
        context.set_mark(0);
        u64::from(BPF_F_INGRESS)
    } else {
        0
    };
    // SAFETY: it takes numbers only.
    unsafe { bpf_redirect((*skb).ifindex, flags) as i32 }
}

/// The sum of the words of the frame at hand, from a place up to another; both even.
///
/// A global function: verified once, and with a stack of its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_sum(from: u32, to: u32) -> u32 {
    let Some(frame) = maps::frame() else {
        return 0;
    };
    let words = frame.as_ptr().cast::<u16>();
    let mut sum = 0;
    let mut at = from / 2;
    for _ in 0..WORDS {
        if at >= to / 2 {
            break;
        }
        // SAFETY: the frame has so many words, and a map's value is aligned.
        sum += u32::from(u16::from_be(unsafe {
            words.add(at as usize & (WORDS - 1)).read_volatile()
        }));
        at += 1;
    }
    sum
}

/// How many words a frame has.
const WORDS: usize = 64;

#[inline(always)]
fn sum(from: usize, to: usize) -> u32 {
    landfall_gateway_sum(from as u32, to as u32)
}

/// Puts part of the packet into the frame.
#[inline(always)]
fn copy(
    context: &TcContext,
    from: usize,
    frame: &mut [u8; 128],
    at: usize,
    length: usize,
) -> Option<()> {
    let place = frame.get_mut(at..at + length)?;
    // SAFETY: the place is as long as is said.
    let outcome = unsafe {
        bpf_skb_load_bytes(
            context.skb.skb.cast(),
            from as u32,
            place.as_mut_ptr().cast(),
            length as u32,
        )
    };
    (outcome == 0).then_some(())
}

/// In ones' complement.
#[inline(always)]
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[inline(always)]
fn put<const N: usize>(frame: &mut [u8; 128], at: usize, bytes: [u8; N]) {
    frame[at..at + N].copy_from_slice(&bytes);
}

/// The Ethernet header: back to where the frame came from.
#[inline(always)]
fn ethernet(context: &TcContext, frame: &mut [u8; 128]) -> Option<()> {
    copy(context, 6, frame, 0, 6)?;
    copy(context, 0, frame, 6, 6)?;
    copy(context, 12, frame, 12, 2)
}

/// An IPv4 header, from whom the packet was for or from another, to its sender.
#[inline(always)]
fn ipv4(frame: &mut [u8; 128], packet: &Packet, protocol: u8, from: u32, length: usize) {
    put(frame, ETH_HEADER, [0x45, 0xc0]);
    put(frame, ETH_HEADER + 2, (length as u16).to_be_bytes());
    put(frame, ETH_HEADER + 4, [0, 0, 0x40, 0, TTL, protocol, 0, 0]);
    put(frame, ETH_HEADER + 12, from.to_ne_bytes());
    let [.., a, b, c, d] = packet.source;
    put(frame, ETH_HEADER + 16, [a, b, c, d]);
}

/// The IPv4 header's checksum. Whoever has a reference to the frame meanwhile must not have got it as an argument: the
/// compiler would take it for nobody else's.
#[inline(always)]
fn seal() -> Option<()> {
    let checksum = !fold(sum(ETH_HEADER, ETH_HEADER + IPV4_HEADER));
    put(maps::frame()?, ETH_HEADER + 10, checksum.to_be_bytes());
    Some(())
}

#[inline(always)]
fn ipv6(frame: &mut [u8; 128], packet: &Packet, protocol: u8, from: [u8; 16], length: usize) {
    put(frame, ETH_HEADER, [0x60, 0, 0, 0]);
    put(frame, ETH_HEADER + 4, (length as u16).to_be_bytes());
    put(frame, ETH_HEADER + 6, [protocol, TTL]);
    put(frame, ETH_HEADER + 8, from);
    put(frame, ETH_HEADER + 24, packet.source);
}

/// Chooses the padding, and writes the frame. The sum is of what lies between the transport's header and the padding;
/// `of` is the protocol of the packet that was there.
#[inline(always)]
fn write<const N: usize>(context: &TcContext, of: u8, transport: usize) -> Option<()> {
    let filled = if of == TCP {
        transport + 16
    } else if of == UDP {
        transport + 6
    } else {
        0
    };
    let all = sum(transport, N - PADDING);
    let frame = maps::frame()?;
    let there = if filled == transport + 16 {
        u16::from_be_bytes([frame[transport + 16], frame[transport + 17]])
    } else {
        u16::from_be_bytes([frame[transport + 6], frame[transport + 7]])
    };
    let padding = !fold(u32::from(fold(all)) + u32::from(there));
    put(frame, N - PADDING, padding.to_be_bytes());
    // SAFETY: the context is the program's own.
    if unsafe { bpf_skb_change_tail(context.skb.skb, N as u32, 0) } != 0 {
        return None;
    }
    let bytes: &[u8; N] = frame.first_chunk()?;
    context.skb.store(0, bytes, 0).ok()
}

/// Type, code and the rest of an error's header.
#[inline(always)]
fn header(what: u32, v6: bool) -> (u8, u8, u32) {
    match (what & 0xff, v6) {
        (say::EXPIRED, false) => (11, 0, 0),
        (say::EXPIRED, true) => (3, 0, 0),
        (say::TOO_BIG, false) => (3, 4, what >> 16),
        (say::TOO_BIG, true) => (2, 0, what >> 16),
        (_, false) => (3, 13, 0),
        (_, true) => (1, 1, 0),
    }
}

#[inline(always)]
fn error_v4(context: &TcContext, packet: &Packet, what: u32, own: u32) -> Option<()> {
    const AT: usize = ETH_HEADER + IPV4_HEADER;
    const INSIDE: usize = AT + MESSAGE;
    const END: usize = INSIDE + QUOTED_V4;
    let frame = maps::frame()?;
    ethernet(context, frame)?;
    copy(context, ETH_HEADER, frame, INSIDE, QUOTED_V4)?;
    if frame[INSIDE] != 0x45 {
        return None;
    }
    let from = match own as u16 {
        0 => {
            let [.., a, b, c, d] = packet.flow.vip.0;
            u32::from_ne_bytes([a, b, c, d])
        }
        own => maps::hop(own)?.own_v4,
    };
    if from == 0 {
        return None;
    }
    ipv4(frame, packet, ICMP, from, END - ETH_HEADER);
    seal()?;
    let (kind, code, rest) = header(what, false);
    put(frame, AT, [kind, code, 0, 0]);
    put(frame, AT + 4, rest.to_be_bytes());
    let checksum = !fold(sum(AT, END));
    put(frame, AT + 2, checksum.to_be_bytes());
    write::<{ END + PADDING }>(context, packet.protocol, AT)
}

#[inline(always)]
fn error_v6(context: &TcContext, packet: &Packet, what: u32, own: u32) -> Option<()> {
    const AT: usize = ETH_HEADER + IPV6_HEADER;
    const INSIDE: usize = AT + MESSAGE;
    const END: usize = INSIDE + QUOTED_V6;
    let frame = maps::frame()?;
    ethernet(context, frame)?;
    copy(context, ETH_HEADER, frame, INSIDE, QUOTED_V6)?;
    let from = match own as u16 {
        0 => packet.flow.vip.0,
        own => maps::hop(own)?.own_v6,
    };
    if from == [0; 16] {
        return None;
    }
    ipv6(frame, packet, ICMPV6, from, END - AT);
    let (kind, code, rest) = header(what, true);
    put(frame, AT, [kind, code, 0, 0]);
    put(frame, AT + 4, rest.to_be_bytes());
    let pseudo = sum(ETH_HEADER + 8, AT) + (END - AT) as u32 + u32::from(ICMPV6);
    let checksum = !fold(pseudo + sum(AT, END));
    put(frame, AT + 2, checksum.to_be_bytes());
    write::<{ END + PADDING }>(context, packet.protocol, AT)
}

/// The reset of a segment that was refused: with no number of its own, and the one that acknowledges the segment.
#[inline(always)]
fn segment(context: &TcContext, packet: &Packet, frame: &mut [u8; 128], at: usize) -> Option<()> {
    let numbers: [u8; 8] = context.load(packet.transport).ok()?;
    let sequence = u32::from_be_bytes([numbers[4], numbers[5], numbers[6], numbers[7]]);
    put(frame, at, packet.flow.port.to_be_bytes());
    put(frame, at + 2, packet.flow.client_port.to_be_bytes());
    put(frame, at + 4, [0; 4]);
    put(frame, at + 8, sequence.wrapping_add(1).to_be_bytes());
    // Five words, RST and ACK, no window.
    put(frame, at + 12, [0x50, 0x14, 0, 0, 0, 0, 0, 0]);
    Some(())
}

#[inline(always)]
fn reset_v4(context: &TcContext, packet: &Packet) -> Option<()> {
    const AT: usize = ETH_HEADER + IPV4_HEADER;
    const END: usize = AT + SEGMENT;
    let frame = maps::frame()?;
    ethernet(context, frame)?;
    segment(context, packet, frame, AT)?;
    let from: u32 = context.load(ETH_HEADER + 16).ok()?;
    ipv4(frame, packet, TCP, from, END - ETH_HEADER);
    seal()?;
    let pseudo = sum(ETH_HEADER + 12, AT) + SEGMENT as u32 + u32::from(TCP);
    let checksum = !fold(pseudo + sum(AT, END));
    put(frame, AT + 16, checksum.to_be_bytes());
    write::<{ END + PADDING }>(context, TCP, AT)
}

#[inline(always)]
fn reset_v6(context: &TcContext, packet: &Packet) -> Option<()> {
    const AT: usize = ETH_HEADER + IPV6_HEADER;
    const END: usize = AT + SEGMENT;
    let frame = maps::frame()?;
    ethernet(context, frame)?;
    segment(context, packet, frame, AT)?;
    let from: [u8; 16] = context.load(ETH_HEADER + IPV6_DESTINATION).ok()?;
    ipv6(frame, packet, TCP, from, SEGMENT);
    let pseudo = sum(ETH_HEADER + 8, AT) + SEGMENT as u32 + u32::from(TCP);
    let checksum = !fold(pseudo + sum(AT, END));
    put(frame, AT + 16, checksum.to_be_bytes());
    write::<{ END + PADDING }>(context, TCP, AT)
}
