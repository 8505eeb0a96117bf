//! Other nodes' question whether this one takes packets: answered here, so that no speaker has to live.

use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::echo::{ANSWER, ETHERTYPE, LENGTH, REQUEST};

use crate::NEXT;
use crate::packet::ETH_HEADER;

/// Turns a frame for this host round, if it is such a question.
#[inline(always)]
pub(crate) fn answer(context: &TcContext) -> i32 {
    // SAFETY: the context's pointer is the program's argument; the verifier checks the reads.
    let (protocol, interface) =
        unsafe { ((*context.skb.skb).protocol, (*context.skb.skb).ifindex) };
    if protocol as u16 != ETHERTYPE.to_be() {
        return NEXT;
    }
    let Ok(message) = context.load::<[u8; LENGTH]>(ETH_HEADER) else {
        return NEXT;
    };
    if message[0] != REQUEST || turn(context).is_none() {
        return NEXT;
    }
    // SAFETY: it takes numbers only.
    unsafe { bpf_redirect(interface, 0) as i32 }
}

#[inline(always)]
fn turn(context: &TcContext) -> Option<()> {
    context.store(ETH_HEADER, &ANSWER, 0).ok()?;
    turn_addresses(context)
}

/// Sends a frame back to where it came from.
#[inline(always)]
pub(crate) fn turn_addresses(context: &TcContext) -> Option<()> {
    let macs: [u8; 12] = context.load(0).ok()?;
    let mut turned = [0_u8; 12];
    turned[..6].copy_from_slice(&macs[6..]);
    turned[6..].copy_from_slice(&macs[..6]);
    context.store(0, &turned, 0).ok()
}
