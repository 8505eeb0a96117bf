//! What Landfall runs at the uplinks.
//!
//! ```text
//!  frame ──> packet   who it is for, from whom, and to which flow it belongs
//!              └─> steer    whose it is: this node's, another's, an earlier holder's
//!                    ├─ spread   bucket to node
//!                    ├─ flows    what this node delivers
//!                    └─ native   delivery to an endpoint, where no kube-proxy does it
//!              └─> echo     answers to echo requests
//!        └─> witness  answers to other nodes that ask whether this one takes packets
//!
//!        └─> resets   of what left untranslated, while nobody translated what leaves
//!
//! tunnel  ──> steer            what comes from nodes that are not on the segment
//! answers ──> packet, flows    what leaves, and answers a flow that was translated
//! egress_out ──> guard         what leaves and is a pod's, where pods have addresses of their own
//! egress_judge ─> judge        says whose it is, where no packet filter does; egress_restore takes back how it said so
//!      native, answers ──> translate   addresses, ports and checksums
//! ```
//!
//! One program looks at every frame that comes in by an uplink, in front of all other programs. What it does not
//! send elsewhere it leaves to the next program, as if it were not there. Another looks at every frame that leaves,
//! where this node delivers without kube-proxy.
//!
//! Behind a driver that can run it there is a third, by XDP, where the user wants it. It reads and chooses by
//! the same code as the first and sends what is another node's; all else it leaves to the first.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features)] // Atomic operations: see `gateway::word`.

mod answers;
mod context;
mod echo;
mod flows;
mod gateway;
mod guard;
mod judge;
mod maps;
mod native;
mod packet;
mod resets;
mod spread;
mod steer;
mod translate;
mod tunnel;
mod witness;

use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_TX};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use landfall_ebpf_common::{Verdict, vip_flag};

use crate::context::Context as _;
use crate::packet::Frame;

/// `TCX_NEXT`, which is `TC_ACT_UNSPEC` too: the next program of the chain decides.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`: the frame is dropped.
const DROP: i32 = 2;

#[classifier]
pub fn landfall_uplink(context: TcContext) -> i32 {
    if !is_ours(&context) {
        return NEXT;
    }
    let Some(frame) = Frame::of(&context) else {
        return witness::answer(&context);
    };
    let Some(vip) = maps::vip(&frame.vip) else {
        return if resets::is_stray(&context, &frame) {
            maps::note(Verdict::Refused);
            DROP
        } else {
            NEXT
        };
    };
    // SAFETY: the context's pointer is the program's argument; the verifier checks the reads.
    let segments = unsafe { (*context.skb.skb).gso_segs };
    maps::count(vip.number, segments, context.len());
    if vip.flags & vip_flag::STEER == 0 {
        return NEXT;
    }
    steer::steer(&context, &frame, &vip)
}

/// What it sends it counts; the rest comes to the other program.
#[xdp]
pub fn landfall_uplink_xdp(context: XdpContext) -> u32 {
    let Some(frame) = Frame::of(&context) else {
        return XDP_PASS;
    };
    let Some(vip) = maps::vip(&frame.vip) else {
        return XDP_PASS;
    };
    if vip.flags & vip_flag::STEER == 0 || context.at(0) != maps::address_of(context.interface()) {
        return XDP_PASS;
    }
    let action = steer::steer(&context, &frame, &vip) as u32;
    if action == XDP_TX {
        // Not before: it would be one more thing that differs between the ways that the verifier goes.
        let length = context.data_end() - context.data();
        maps::count(vip.number, 1, length as u32);
    }
    action
}

/// `PACKET_HOST` (`linux/if_packet.h`): the frame carries our MAC.
const PACKET_HOST: u32 = 0;

/// Whether a frame is for this host and carries no VLAN tag beside it.
#[inline(always)]
fn is_ours(context: &TcContext) -> bool {
    // SAFETY: the context's pointer is the program's argument; the verifier checks the reads.
    let packet_type = unsafe { (*context.skb.skb).pkt_type };
    packet_type == PACKET_HOST && is_untagged(context)
}

#[inline(always)]
fn is_untagged(context: &TcContext) -> bool {
    // SAFETY: as above.
    unsafe { (*context.skb.skb).vlan_present == 0 }
}

#[classifier]
pub fn landfall_tunnel(context: TcContext) -> i32 {
    tunnel::leave(&context)
}

#[classifier]
pub fn landfall_answers(context: TcContext) -> i32 {
    if is_untagged(&context) {
        answers::answer(&context);
    }
    NEXT
}

/// Behind the one for answers: what answers a client carries the VIP's address by then.
#[classifier]
pub fn landfall_egress_out(context: TcContext) -> i32 {
    if is_untagged(&context) {
        guard::guard(&context)
    } else {
        NEXT
    }
}

/// In front of the guard.
#[classifier]
pub fn landfall_egress_judge(context: TcContext) -> i32 {
    if is_untagged(&context) {
        judge::judge(&context)
    } else {
        NEXT
    }
}

/// Behind all others of ours.
#[classifier]
pub fn landfall_egress_restore(context: TcContext) -> i32 {
    judge::restore(&context);
    NEXT
}

#[classifier]
pub fn landfall_gateway_in(context: TcContext) -> i32 {
    if !is_ours(&context) {
        return NEXT;
    }
    gateway::enter(&context)
}

#[classifier]
pub fn landfall_gateway_out(context: TcContext) -> i32 {
    if !is_untagged(&context) {
        return NEXT;
    }
    gateway::leave(&context)
}

#[classifier]
pub fn landfall_gateway_keep(context: TcContext) -> i32 {
    gateway::keep(&context)
}

#[classifier]
pub fn landfall_gateway_copy(context: TcContext) -> i32 {
    gateway::copy(&context)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// What the kernel is told. It keeps some helpers for licences compatible with GPLv2; none of them is used.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
