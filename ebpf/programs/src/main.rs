//! What Landfall runs at the uplinks.
//!
//! ```text
//!  frame ──> packet   who it is for, from whom, and to which flow it belongs
//!              └─> steer    whose it is: this node's, another's, an earlier holder's
//!                    ├─ spread   bucket to node
//!                    └─ flows    what this node delivers
//!              └─> echo     answers to echo requests
//!        └─> witness  answers to other nodes that ask whether this one takes packets
//! ```
//!
//! The program looks at every frame that comes in by an uplink, in front of all other programs. What it does not
//! send elsewhere it leaves to the next program, as if it were not there.
#![no_std]
#![no_main]

mod echo;
mod flows;
mod maps;
mod packet;
mod spread;
mod steer;
mod witness;

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

/// `TCX_NEXT`, which is `TC_ACT_UNSPEC` too: the next program of the chain decides.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`: the frame is dropped.
const DROP: i32 = 2;

#[classifier]
pub fn landfall_uplink(context: TcContext) -> i32 {
    let Some(frame) = packet::Frame::of(&context) else {
        return witness::answer(&context);
    };
    let Some(vip) = maps::vip(&frame.vip) else {
        return NEXT;
    };
    maps::count(&context, vip.number);
    if vip.flags & landfall_ebpf_common::vip_flag::STEER == 0 {
        return NEXT;
    }
    steer::steer(&context, &frame, &vip)
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
