//! Resets of what left untranslated. While the program at the egress is away, a client that has a route to the
//! endpoint's own address hears its answers from there, knows no such connection, and resets it there.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::{FlowKey, VipKey};

use crate::context::Context as _;
use crate::packet::{
    ETH_HEADER, ETH_P_IPV6, Frame, IPV4_DESTINATION, IPV4_HEADER, IPV4_SOURCE, IPV6_DESTINATION,
    IPV6_HEADER, IPV6_SOURCE, RST, TCP, load, mapped,
};
use crate::{flows, maps};

/// Where the flags and the offset of a fragment and the protocol lie in an IPv4 header, and in an IPv6 header the
/// protocol of what comes next.
const FRAGMENT: usize = 6;
const PROTOCOL: usize = 9;
const NEXT_HEADER: usize = 6;
/// Where the flags lie in a TCP header.
const FLAGS: usize = 13;
const V4: usize = ETH_HEADER + IPV4_HEADER;
const V6: usize = ETH_HEADER + IPV6_HEADER;

/// Whether a frame that is for no VIP resets a flow which its client has with one. Other connections of the client to
/// the same endpoint have other ports.
#[inline(always)]
pub(crate) fn is_stray(context: &TcContext, frame: &Frame) -> bool {
    is_reset(context, frame.v6).unwrap_or(false) && landfall_stray(context.skb.skb) != 0
}

/// No options and no extension headers: nobody sends a reset with them.
#[inline(always)]
fn is_reset(context: &TcContext, v6: bool) -> Option<bool> {
    const NO_OPTIONS: u8 = 0x45;
    let (protocol, transport) = if v6 {
        (ETH_HEADER + NEXT_HEADER, V6)
    } else {
        let head: u8 = load(context, ETH_HEADER)?;
        if head != NO_OPTIONS {
            return None;
        }
        (ETH_HEADER + PROTOCOL, V4)
    };
    let protocol: u8 = load(context, protocol)?;
    if protocol != TCP {
        return None;
    }
    let flags: u8 = load(context, transport + FLAGS)?;
    Some(flags & RST != 0)
}

/// Whether the TCP packet, without options, is of a flow whose answers are translated.
///
/// A global function: verified once, and the caller's stack is its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_stray(skb: *mut __sk_buff) -> u32 {
    let context = TcContext::new(skb);
    let Some(packet) = maps::packet() else {
        return 0;
    };
    let read = read(&context, &mut packet.answer);
    u32::from(read.is_some() && flows::is_answered(&packet.answer))
}

/// By what the answers to its flow would be known: what goes to the endpoint, read backwards.
#[inline(always)]
fn read(context: &TcContext, answer: &mut FlowKey) -> Option<()> {
    let ports: [u8; 4] = if u16::from_be(context.ethertype()?) == ETH_P_IPV6 {
        answer.vip = VipKey(context.load(ETH_HEADER + IPV6_SOURCE).ok()?);
        answer.client = context.load(ETH_HEADER + IPV6_DESTINATION).ok()?;
        context.load(V6).ok()?
    } else {
        let fragment: u16 = context.load(ETH_HEADER + FRAGMENT).ok()?;
        if u16::from_be(fragment) & 0x3fff != 0 {
            return None;
        }
        answer.vip = mapped(context.load(ETH_HEADER + IPV4_SOURCE).ok()?);
        answer.client = mapped(context.load(ETH_HEADER + IPV4_DESTINATION).ok()?).0;
        context.load(V4).ok()?
    };
    answer.client_port = u16::from_be_bytes([ports[2], ports[3]]);
    answer.port = u16::from_be_bytes([ports[0], ports[1]]);
    answer.protocol = u32::from(TCP);
    Some(())
}
