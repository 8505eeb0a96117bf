//! Policies that may take so much of the wire and no more.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::egress::gateway::Policy;
use landfall_ebpf_common::egress::pace::moment;

use super::{maps, word};
use crate::packet::{ETH_HEADER, Packet, TCP};

/// Whether the packet at hand is one too many for its policy, in a direction: [`OUT`](maps::OUT) or [`IN`](maps::IN).
#[inline(always)]
pub(super) fn is_over(context: &TcContext, policy: &Policy, number: u16, direction: u32) -> bool {
    policy.pace.is_limited()
        && landfall_gateway_pace(context.skb.skb, u32::from(number), direction) != 0
}

/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_pace(skb: *mut __sk_buff, number: u32, direction: u32) -> u32 {
    u32::from(spend(&TcContext::new(skb), number as u16, direction).is_none())
}

#[inline(always)]
fn spend(context: &TcContext, number: u16, direction: u32) -> Option<()> {
    let (policy, until) = (maps::policy(number)?, maps::until(number, direction)?);
    let (first, all) = lengths(context, crate::maps::packet()?);
    let (first, all) = (u64::from(first), u64::from(all));
    // SAFETY: it has no arguments and reads a clock.
    let now = moment(unsafe { bpf_ktime_get_ns() });
    for _ in 0..word::TRIES {
        let before = word::read(until);
        let after = policy.pace.pass(before, now, first, all)?;
        if word::exchange(until, before, after) {
            return Some(());
        }
    }
    // All CPUs are at it. It counts.
    word::add(until, policy.pace.time(all));
    Some(())
}

/// How long the packet is, or the first of those that it was put together from, and how long all of them are; in bytes,
/// with the IP header.
#[inline(always)]
pub(super) fn lengths(context: &TcContext, packet: &Packet) -> (u32, u32) {
    // SAFETY: the context's pointer is the program's argument; the verifier checks the reads.
    let (segment, whole) = unsafe { ((*context.skb.skb).gso_size, (*context.skb.skb).len) };
    let whole = whole - ETH_HEADER as u32;
    if segment == 0 {
        return (whole, whole);
    }
    let header = if packet.protocol == TCP {
        packet.tcp_header()
    } else {
        8
    };
    let headers = (packet.transport - ETH_HEADER) as u32 + header;
    // Each after the first has the headers once more.
    let more = whole.saturating_sub(headers + 1) / segment;
    (headers + segment, whole + more * headers)
}
