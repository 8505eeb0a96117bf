//! Telling user space what happens to bindings, so that it can be copied.

use aya_ebpf::macros::map;
use aya_ebpf::maps::RingBuf;
use landfall_ebpf_common::egress::binding::Address;
use landfall_ebpf_common::egress::copies::{Event, ROOM, kind};
use landfall_ebpf_common::egress::gateway::{Reason, settings_flag};

use super::maps::{self, Family, Four, Kept, Six};

#[map]
static GATE_CHANGES: RingBuf = RingBuf::with_byte_size(ROOM, 0);

/// Tells of the binding whose keys are in the room, if somebody wants to know. User space is woken once it has read all
/// that was told before.
#[inline(always)]
fn tell<F: Family>(what: u8) {
    let Some(room) = F::room() else {
        return;
    };
    if room.quiet != 0 {
        return;
    }
    let Some(mut event) = GATE_CHANGES.reserve::<Event>(0) else {
        maps::note(Reason::Untold);
        return;
    };
    event.write(Event {
        pod: room.out.local.words(),
        egress: room.inward.local.words(),
        remote: room.inward.remote.words(),
        pod_port: room.out.local_port,
        egress_port: room.inward.local_port,
        remote_port: room.inward.remote_port,
        protocol: room.inward.protocol as u8,
        kind: what,
    });
    event.submit(0);
}

/// The binding whose keys are in the room is there.
#[inline(always)]
pub(super) fn made<F: Family>() {
    if maps::flags() & settings_flag::TELL != 0 {
        F::tell(u32::from(kind::NEW));
    }
}

/// It is gone.
#[inline(always)]
pub(super) fn ended<F: Family>() {
    if maps::flags() & settings_flag::TELL != 0 {
        F::tell(u32::from(kind::CLOSED));
    }
}

macro_rules! functions {
    ($($name:ident: $family:ty),*) => {
        $(
            /// A global function: verified once, whoever calls it.
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub extern "C" fn $name(what: u32) -> u32 {
                tell::<$family>(what as u8);
                0
            }
        )*
    };
}

functions!(
    landfall_gateway_tell_v4: Four,
    landfall_gateway_tell_v6: Six,
    landfall_gateway_tell_kept_v4: Kept<Four>,
    landfall_gateway_tell_kept_v6: Kept<Six>
);
