//! Ending bindings: those that nobody has used for long, and those that have rested; and counting those that are older than
//! their pods' quota. User space names the ones that may be due; what is done about them is decided here, where nobody else
//! can be in the middle of it.

use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::{Address, Key, Sides, phase};
use landfall_ebpf_common::egress::gateway::{egress_flag, keep};

use super::claim::{claim_of, count_late, is_of, mark, turn};
use super::flow::{close, now};
use super::maps::{self, Family, Four, Kept, Six};

/// Ends what is due of the bindings named, or counts them. Returns of how many there was nothing to do.
#[inline(always)]
pub(super) fn keep(context: &TcContext) -> i32 {
    let Ok([count, family]) = context.load::<[u8; 2]>(keep::HEAD) else {
        return -1;
    };
    let mut left = 0;
    for place in 0..keep::MOST {
        if place >= usize::from(count) {
            break;
        }
        let at_once = u32::from(family & keep::AT_ONCE);
        let counts = family & keep::COUNT != 0;
        let done = if family & !keep::FLAGS == 4 {
            name::<Kept<Four>>(context, place, at_once)
                && if counts {
                    landfall_gateway_count_v4() != 0
                } else {
                    landfall_gateway_end_v4() != 0
                }
        } else {
            name::<Kept<Six>>(context, place, at_once)
                && if counts {
                    landfall_gateway_count_v6() != 0
                } else {
                    landfall_gateway_end_v6() != 0
                }
        };
        left += i32::from(!done);
    }
    left
}

/// Puts a binding's key into the room.
#[inline(always)]
fn name<F: Family>(context: &TcContext, place: usize, at_once: u32) -> bool {
    let at = keep::KEYS + place * size_of::<Key<F::A>>();
    let (Some(room), Ok(key)) = (F::room(), context.load::<Key<F::A>>(at)) else {
        return false;
    };
    room.inward = key;
    room.at_once = at_once;
    true
}

/// Ends the binding whose key *in* is in the room, if it is due. Not 0, if it was.
#[inline(always)]
fn end<F: Family>() -> u32 {
    let Some(room) = F::room() else {
        return 0;
    };
    let Some(entry) = F::inward().get_ptr_mut(&room.inward) else {
        return 0;
    };
    let claim = claim_of(entry);
    // SAFETY: the map gave the pointer; what changes meanwhile changes the claim.
    let (pod, ours, theirs) = unsafe { ((*entry).to, (*entry).ours, (*entry).theirs) };
    let mut seen = claim.seen;
    room.out = Key {
        local: pod,
        remote: room.inward.remote,
        local_port: claim.port,
        remote_port: room.inward.remote_port,
        protocol: room.inward.protocol,
    };
    let out = F::out()
        .get_ptr_mut(&room.out)
        .filter(|out| is_of(*out, &room.inward));
    let heard = out.map_or(seen, |out| claim_of(out).seen);
    // Later than both.
    let now = now();
    if claim.phase == phase::LIVE && now.wrapping_sub(heard) < now.wrapping_sub(seen) {
        seen = heard;
    }
    // Nobody hears a copy: it is its gateway that says when it ends, or, once this node leads, its time begins.
    let state = maps::egress(&VipKey(room.inward.local.mapped()));
    let mut times = maps::settings().times;
    if claim.phase == phase::LIVE {
        if state.flags & egress_flag::STANDBY != 0 && room.at_once == 0 {
            return 0;
        }
        if state.flags & egress_flag::LED != 0
            && now.wrapping_sub(state.since) < now.wrapping_sub(seen)
        {
            seen = state.since;
            times = times.of_unheard();
        }
    }
    let limit = times.limit(room.inward.protocol, claim.phase, Sides { ours, theirs });
    if now.wrapping_sub(seen) < limit && room.at_once == 0 {
        return 0;
    }
    match claim.phase {
        phase::LIVE => {
            if !close::<F>(entry, claim) {
                return 0;
            }
            if out.is_some() {
                let _ = F::out().remove(&room.out);
            }
            1
        }
        phase::CLOSED => {
            if !turn(entry, claim, claim.turned(phase::BUSY)) {
                return 0;
            }
            if out.is_some() {
                let _ = F::out().remove(&room.out);
            }
            if room.at_once != 0 {
                // Nothing that is late reaches who has the pod's address next; the port rests all the same.
                // SAFETY: as above, and it is ours as long as it changes hands.
                unsafe {
                    (*entry).to = F::A::default();
                    (&raw mut (*entry).claim).write_volatile(claim.word());
                }
                return 1;
            }
            let _ = F::inward().remove(&room.inward);
            room.other = room.inward.target();
            mark::<F>(&room.other, room.inward.local_port, false);
            1
        }
        _ => 0,
    }
}

/// A global function: verified once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_end_v4() -> u32 {
    end::<Kept<Four>>()
}

/// As above.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_end_v6() -> u32 {
    end::<Kept<Six>>()
}

/// As above.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_count_v4() -> u32 {
    count_late::<Kept<Four>>()
}

/// As above.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_count_v6() -> u32 {
    count_late::<Kept<Six>>()
}
