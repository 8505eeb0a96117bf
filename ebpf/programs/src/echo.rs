//! Echo requests to a VIP, answered from where they come in (RFC 792, RFC 4443).

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::Verdict;

use crate::context::Context;
use crate::packet::{ETH_HEADER, Packet};
use crate::witness::turn_addresses;
use crate::{NEXT, maps};

/// The answer's TTL or hop limit: Linux's own.
const TTL: u8 = 64;

/// Turns the request round. A wrong checksum stays wrong.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_echo(skb: *mut __sk_buff) -> i32 {
    let context = TcContext::new(skb);
    let Some(packet) = maps::packet() else {
        return NEXT;
    };
    if packet.more || turn(&context, packet, packet.v6).is_none() {
        return NEXT;
    }
    maps::note(Verdict::Echoed);
    // SAFETY: the index is of the interface that the frame came in by.
    unsafe { bpf_redirect((*skb).ifindex, 0) as i32 }
}

#[inline(always)]
fn turn(context: &TcContext, packet: &Packet, v6: bool) -> Option<()> {
    // The type and the code share a word of the checksum; a pseudo header's addresses only change places.
    let (from, to, checksum) = if v6 {
        (128_u16 << 8, 129_u16 << 8, packet.transport + 2)
    } else {
        (8_u16 << 8, 0, packet.transport + 2)
    };
    context
        .l4_csum_replace(checksum, u64::from(from.to_be()), u64::from(to.to_be()), 2)
        .ok()?;
    context
        .store(packet.transport, &((to >> 8) as u8), 0)
        .ok()?;
    if v6 {
        let addresses: [u8; 32] = context.load(ETH_HEADER + 8).ok()?;
        let mut turned = [0_u8; 32];
        turned[..16].copy_from_slice(&addresses[16..]);
        turned[16..].copy_from_slice(&addresses[..16]);
        context.store(ETH_HEADER + 8, &turned, 0).ok()?;
        context.store(ETH_HEADER + 7, &TTL, 0).ok()?;
    } else {
        let addresses: [u8; 8] = context.load(ETH_HEADER + 12).ok()?;
        let mut turned = [0_u8; 8];
        turned[..4].copy_from_slice(&addresses[4..]);
        turned[4..].copy_from_slice(&addresses[..4]);
        context.store(ETH_HEADER + 12, &turned, 0).ok()?;
        set_ttl(context, packet.ttl, TTL)?;
    }
    turn_addresses(context)
}

/// Changes an IPv4 TTL, and the header's checksum by the difference.
#[inline(always)]
pub(crate) fn set_ttl(context: &impl Context, from: u8, to: u8) -> Option<()> {
    let (old, new) = (u16::from(from) << 8, u16::from(to) << 8);
    context.replace_checksum(ETH_HEADER + 10, old.to_be(), new.to_be())?;
    context.store(ETH_HEADER + 8, to)
}
