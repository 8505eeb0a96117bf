//! Bindings of another gateway: put in and taken out as it says, so that this node can take over at any moment.
//!
//! A copy is a binding like any other, by this node's own numbers of policy, node and hop, and counts as one. What the
//! gateway has given it has given: quotas refuse no copy. Where a port, or a pod's flow, is bound otherwise here, the copy
//! has it, since its gateway's epoch is the highest that is known; the flow that was there is cut. Not so if this node leads
//! the address itself: then the epoch is its own, and the copy is late.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::{Address, Binding, Claim, Key, heard, phase};
use landfall_ebpf_common::egress::copies::{Named, message, outcome};
use landfall_ebpf_common::egress::gateway::{Reason, egress_flag};
use landfall_ebpf_common::egress::ports::{DRAWN, drawn, seed};

use super::claim::{EXISTS, claim_in, claim_of, count_copy, gather, hand, is_of, mark, release};
use super::flow::{close, is_vip, now};
use super::maps::{self, Family, Four, Kept, Room, Six};
use crate::packet::TCP;

/// Does what is asked for with each of the bindings named, and writes behind each what was done.
#[inline(always)]
pub(super) fn copy(context: &TcContext) -> i32 {
    let Ok([count, family]) = context.load::<[u8; 2]>(message::HEAD) else {
        return -1;
    };
    let remove = family & message::REMOVE != 0;
    for place in 0..message::MOST {
        if place >= usize::from(count) {
            break;
        }
        let done = if family & !message::REMOVE == 4 {
            let at = message::NAMED + place * size_of::<Named<<Four as Family>::A>>();
            name::<Kept<Four>>(context, at).and_then(|()| {
                let done = if remove {
                    landfall_gateway_displace_v4()
                } else {
                    match landfall_gateway_clear_v4() {
                        outcome::DONE => landfall_gateway_place_v4(),
                        other => other,
                    }
                };
                answer::<Kept<Four>>(context, at, done)
            })
        } else {
            let at = message::NAMED + place * size_of::<Named<<Six as Family>::A>>();
            name::<Kept<Six>>(context, at).and_then(|()| {
                let done = if remove {
                    landfall_gateway_displace_v6()
                } else {
                    match landfall_gateway_clear_v6() {
                        outcome::DONE => landfall_gateway_place_v6(),
                        other => other,
                    }
                };
                answer::<Kept<Six>>(context, at, done)
            })
        };
        if done.is_none() {
            return -1;
        }
    }
    0
}

/// Puts a binding's keys into the room.
#[inline(always)]
fn name<F: Family>(context: &TcContext, at: usize) -> Option<()> {
    let room = F::room()?;
    let named: Named<F::A> = context.load(at).ok()?;
    room.copy_in = named.inward;
    room.copy_out = Key {
        local: named.pod,
        remote: named.inward.remote,
        local_port: named.pod_port,
        remote_port: named.inward.remote_port,
        protocol: named.inward.protocol,
    };
    Some(())
}

#[inline(always)]
fn answer<F: Family>(context: &TcContext, at: usize, done: u32) -> Option<()> {
    let at = at + core::mem::offset_of!(Named<F::A>, outcome);
    context.skb.store(at, &done, 0).ok()
}

/// What this node is to an egress address.
#[inline(always)]
fn leads<A: Address>(egress: A) -> bool {
    maps::egress(&VipKey(egress.mapped())).flags & egress_flag::LED != 0
}

/// Whether an entry *in* is the copy's.
#[inline(always)]
fn is_same<A: Address>(room: &Room<A>, entry: *const Binding<A>) -> bool {
    // SAFETY: the map gave the pointer.
    let pod = unsafe { (*entry).to };
    pod == room.copy_out.local && claim_of(entry).port == room.copy_out.local_port
}

/// Makes way for the copy whose keys are in the room, if it can be placed: then it is to be.
#[inline(always)]
fn clear<F: Family>() -> u32 {
    let Some(room) = F::room() else {
        return outcome::LATER;
    };
    let Some(mut source) = maps::source(&VipKey(room.copy_out.local.mapped())) else {
        return outcome::LATER;
    };
    let egress = room.copy_in.local.mapped();
    if source.egress != egress {
        // The flow is older than what the pod leaves by now.
        source.policy = maps::egress(&VipKey(egress)).policy as u16;
    }
    let link = maps::policy(source.policy).map_or(0, |policy| policy.link);
    let hop = match maps::route(link, &room.copy_in.remote.mapped()) {
        Some(hop) if link != 0 && hop != 0 => hop,
        _ => return outcome::LATER,
    };
    room.source = source;
    room.copy_hop = u32::from(hop);
    let led = leads(room.copy_in.local);
    let mut there = false;
    // Who has the port.
    if let Some(entry) = F::inward().get_ptr_mut(&room.copy_in) {
        let live = claim_of(entry).phase == phase::LIVE;
        there = live && is_same(room, entry);
        if live && !there {
            if led {
                maps::note(Reason::Cut);
                return outcome::REFUSED;
            }
            room.inward = room.copy_in;
            cut::<F>(room);
        }
    }
    // What the pod's flow has.
    let Some(room) = F::room() else {
        return outcome::LATER;
    };
    if let Some(out) = F::out().get_ptr_mut(&room.copy_out) {
        // SAFETY: the map gave the pointer.
        let by = unsafe { (*out).to };
        let port = claim_of(out).port;
        if by != room.copy_in.local || port != room.copy_in.local_port {
            room.inward = Key {
                local: by,
                local_port: port,
                ..room.copy_in
            };
            let live = F::inward()
                .get_ptr_mut(&room.inward)
                .is_some_and(|entry| claim_of(entry).phase == phase::LIVE && is_same(room, entry));
            if live && led {
                maps::note(Reason::Cut);
                return outcome::REFUSED;
            }
            if live {
                cut::<F>(room);
            }
            there = false;
        }
        if !there && let Some(room) = F::room() {
            let _ = F::out().remove(&room.copy_out);
        }
    }
    outcome::DONE
}

/// Ends the flow whose key *in* is in the room, for another gateway's.
#[inline(always)]
fn cut<F: Family>(room: &mut Room<F::A>) {
    room.at_once = 1;
    room.quiet = 1;
    if F::end() != 0 {
        maps::note(Reason::Cut);
    }
    if let Some(room) = F::room() {
        room.quiet = 0;
    }
}

/// Puts the copy in whose keys are in the room: nobody is in its way but by chance.
#[inline(always)]
fn place<F: Family>() -> u32 {
    let Some(room) = F::room() else {
        return outcome::LATER;
    };
    (room.inward, room.out) = (room.copy_in, room.copy_out);
    room.now = now();
    // That the connection has begun is all that is known of it.
    let opened = if room.inward.protocol as u8 == TCP {
        heard::OPEN
    } else {
        0
    };
    let entry = F::inward().get_ptr_mut(&room.inward);
    let there = match entry {
        Some(entry) if claim_of(entry).phase == phase::LIVE => {
            if !is_same(room, entry) {
                return outcome::LATER;
            }
            // Its gateway has heard more of it than this node, that it is not reset at least.
            // SAFETY: the map gave the pointer; each field is written whole.
            unsafe {
                (*entry).ours = ((*entry).ours | opened) & !heard::RST;
                (*entry).theirs = ((*entry).theirs | opened) & !heard::RST;
                room.value.ours = (*entry).ours;
            }
            true
        }
        entry => {
            if let Err(reason) = count_copy::<F>(room) {
                return refusal(reason);
            }
            room.value.ours = opened;
            room.value.to = room.out.local;
            room.value.hop = room.source.node;
            room.value.node = is_vip(&room.out.remote.mapped());
            room.value.policy = room.source.policy;
            room.value.theirs = opened;
            room.value.claim = claim_in(room).word();
            let taken = match entry {
                Some(entry) => {
                    let before = claim_of(entry);
                    if before.phase == phase::CLOSED && hand::<F>(room, entry, before) {
                        Ok(())
                    } else {
                        Err(outcome::LATER)
                    }
                }
                None => F::inward()
                    .insert(&room.inward, &room.value, u64::from(BPF_NOEXIST))
                    .map_err(|error| {
                        if error == EXISTS {
                            outcome::LATER
                        } else {
                            outcome::NO_ROOM
                        }
                    }),
            };
            if let Err(outcome) = taken {
                room.other = room.out.target();
                release::<F>(room.source.policy, room.counted != 0, &room.other);
                return outcome;
            }
            false
        }
    };
    note_port::<F>(room);
    room.value.to = room.inward.local;
    room.value.claim = Claim::new(room.inward.local_port, room.now).word();
    room.value.hop = room.copy_hop as u16;
    room.value.node = room.source.node;
    room.value.policy = room.source.policy;
    room.value.theirs = opened;
    match F::out().insert(&room.out, &room.value, u64::from(BPF_NOEXIST)) {
        // Else the flow has begun by another port meanwhile, or there is no room.
        Err(error) if !(there && error == EXISTS) => {
            if !there {
                let _ = F::inward().remove(&room.inward);
                room.other = room.inward.target();
                mark::<F>(&room.other, room.inward.local_port, false);
                room.other = room.out.target();
                release::<F>(room.source.policy, room.counted != 0, &room.other);
            }
            if error == EXISTS {
                outcome::LATER
            } else {
                outcome::NO_ROOM
            }
        }
        _ => {
            if !there {
                maps::note(Reason::Copied);
            }
            outcome::DONE
        }
    }
}

#[inline(always)]
fn refusal(reason: Reason) -> u32 {
    if matches!(reason, Reason::NoRoom) {
        outcome::NO_ROOM
    } else {
        outcome::LATER
    }
}

/// Where the gateway had to look for a free port it keeps a list of those in use: so does this node.
#[inline(always)]
fn note_port<F: Family>(room: &mut Room<F::A>) {
    let port = room.inward.local_port;
    let begin = seed(
        &room.out.local.mapped(),
        room.out.local_port,
        &room.out.remote.mapped(),
        room.out.remote_port,
    );
    let mut drawn_one = port == room.out.local_port;
    for turn in 0..DRAWN {
        drawn_one |= port == drawn(begin, turn);
    }
    room.other = room.inward.target();
    if !drawn_one {
        gather::<F>(&room.other);
    }
    mark::<F>(&room.other, port, true);
}

/// Takes the binding out whose keys are in the room: its port rests as it does at its gateway.
#[inline(always)]
fn displace<F: Family>() -> u32 {
    let Some(room) = F::room() else {
        return outcome::LATER;
    };
    (room.inward, room.out) = (room.copy_in, room.copy_out);
    let Some(entry) = F::inward().get_ptr_mut(&room.inward) else {
        return outcome::DONE;
    };
    let claim = claim_of(entry);
    if claim.phase != phase::LIVE || !is_same(room, entry) {
        return outcome::DONE;
    }
    if leads(room.inward.local) {
        return outcome::REFUSED;
    }
    room.quiet = 1;
    let closed = close::<F>(entry, claim);
    let Some(room) = F::room() else {
        return outcome::LATER;
    };
    room.quiet = 0;
    if !closed {
        return outcome::LATER;
    }
    // What is late of a connection still goes its way; a datagram begins anew.
    let out = F::out()
        .get_ptr_mut(&room.out)
        .filter(|out| is_of(*out, &room.inward));
    let Some(out) = out else {
        return outcome::DONE;
    };
    if room.inward.protocol as u8 == TCP {
        // SAFETY: the maps gave the pointers; each field is written whole.
        unsafe {
            (*entry).ours |= heard::FIN;
            (*entry).theirs |= heard::FIN;
            (*out).ours |= heard::FIN;
            (*out).theirs |= heard::FIN;
        }
    } else {
        let _ = F::out().remove(&room.out);
    }
    outcome::DONE
}

macro_rules! functions {
    ($family:ty, $clear:ident, $place:ident, $displace:ident) => {
        /// A global function: verified once, with a stack of its own.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $clear() -> u32 {
            clear::<$family>()
        }

        /// As above.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $place() -> u32 {
            place::<$family>()
        }

        /// As above.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $displace() -> u32 {
            displace::<$family>()
        }
    };
}

functions!(
    Kept<Four>,
    landfall_gateway_clear_v4,
    landfall_gateway_place_v4,
    landfall_gateway_displace_v4
);
functions!(
    Kept<Six>,
    landfall_gateway_clear_v6,
    landfall_gateway_place_v6,
    landfall_gateway_displace_v6
);
