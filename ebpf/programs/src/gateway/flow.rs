//! From a packet to its binding, in either direction, and what the packet does to it.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::{
    Address, Binding, Claim, Key, Sides, is_control, phase, tick, ticks,
};
use landfall_ebpf_common::egress::gateway::Reason;

use super::claim::{EXISTS, bind, came_back, claim_of, is_of, mark, release, reserve, turn};
use super::maps::{self, Family, Four, Six};
use super::tell;
use super::{set_words, words};
use crate::packet::{Kind, Packet, SYN, TCP};

/// The time of a binding is written once a second at most: a cache line that all CPUs write is slow.
const TOUCH: u32 = ticks(1);
/// How much of [`landfall_gateway_turn_v4`]'s answer says what becomes of the packet.
pub(super) const GOES_ON: u32 = 0;
/// Its entry has gone: as if it were the first.
const ANEW: u32 = 1;

#[inline(always)]
pub(super) fn now() -> u32 {
    // SAFETY: it has no arguments and reads a clock.
    tick(unsafe { bpf_ktime_get_ns() })
}

/// What is known of the flow of a packet.
pub(super) struct Found {
    /// The number of the hop, or of the pod's node.
    pub(super) hop: u16,
    /// Of a pod's packet the number of the node that it comes from; of a remote's not 0, if that is a VIP of this cluster.
    pub(super) node: u16,
    /// The number of its policy.
    pub(super) policy: u16,
}

/// By what a pod's packet is known.
#[inline(always)]
fn key_out<A: Address>(packet: &Packet) -> Key<A> {
    Key {
        local: A::from_words(words(&packet.flow.client)),
        remote: A::from_words(words(&packet.flow.vip.0)),
        local_port: packet.flow.client_port,
        remote_port: packet.flow.port,
        protocol: packet.flow.protocol,
    }
}

/// By what a remote's packet is known.
#[inline(always)]
fn key_in<A: Address>(packet: &Packet) -> Key<A> {
    Key {
        local: A::from_words(words(&packet.flow.vip.0)),
        remote: A::from_words(words(&packet.flow.client)),
        local_port: packet.flow.port,
        remote_port: packet.flow.client_port,
        protocol: packet.flow.protocol,
    }
}

/// The binding of a pod's packet, which is to be translated to what it says.
#[inline(always)]
pub(super) fn find_out<F: Family>(packet: &mut Packet) -> Option<Found> {
    let room = F::room()?;
    room.out = key_out(packet);
    let entry = F::out().get_ptr_mut(&room.out)?;
    // SAFETY: the map gave the pointer; each field is written whole, and which of two writers is last is of no matter.
    let binding = unsafe { &mut *entry };
    let sides = Sides {
        ours: binding.ours,
        theirs: binding.theirs,
    };
    if packet.kind == Kind::Whole
        && packet.protocol == TCP
        && (is_control(packet.tcp) || !sides.is_settled())
    {
        room.tcp = u32::from(packet.tcp);
        if F::turn_out() != GOES_ON {
            return None;
        }
    }
    if packet.kind != Kind::Error {
        touch(entry, packet.protocol == TCP && is_control(packet.tcp));
    }
    set_words(&mut packet.to.address, binding.to.words());
    packet.to.port = Claim::read(binding.claim).port;
    Some(Found {
        hop: binding.hop,
        node: binding.node,
        policy: binding.policy,
    })
}

/// The binding of a remote's packet.
#[inline(always)]
pub(super) fn find_in<F: Family>(packet: &mut Packet) -> Option<Found> {
    let room = F::room()?;
    room.inward = key_in(packet);
    let entry = F::inward().get_ptr_mut(&room.inward)?;
    // SAFETY: as above.
    let binding = unsafe { &mut *entry };
    let claim = claim_of(entry);
    let is_nobodys = claim.phase == phase::CLOSED && binding.to == F::A::default();
    if claim.phase == phase::BUSY || is_nobodys {
        return None;
    }
    let sides = Sides {
        ours: binding.ours,
        theirs: binding.theirs,
    };
    if packet.kind == Kind::Whole
        && packet.protocol == TCP
        && (is_control(packet.tcp) || !sides.is_settled())
    {
        room.tcp = u32::from(packet.tcp);
        F::turn_in();
    }
    if packet.kind != Kind::Error {
        touch(entry, packet.protocol == TCP && is_control(packet.tcp));
    }
    set_words(&mut packet.to.address, binding.to.words());
    packet.to.port = claim.port;
    Some(Found {
        hop: binding.hop,
        node: binding.node,
        policy: binding.policy,
    })
}

/// Notes that a flow was heard, in the upper half of its claim: exactly, if that begins a time that is short.
#[inline(always)]
fn touch<A: Address>(entry: *mut Binding<A>, exactly: bool) {
    let (claim, now) = (claim_of(entry), now());
    let late = now.wrapping_sub(claim.seen) >= TOUCH || (exactly && now != claim.seen);
    if claim.phase == phase::LIVE && late {
        // SAFETY: the map gave the pointer; the target is a little-endian one.
        unsafe {
            (&raw mut (*entry).claim)
                .cast::<u32>()
                .add(1)
                .write_volatile(now);
        }
    }
}

/// A segment of the pod's that may change the state of the flow in the room.
#[inline(always)]
fn turn_out<F: Family>() -> u32 {
    let Some(room) = F::room() else {
        return GOES_ON;
    };
    let Some(out) = F::out().get_ptr_mut(&room.out) else {
        return ANEW;
    };
    // SAFETY: as above.
    let out = unsafe { &mut *out };
    room.inward = Key {
        local: out.to,
        remote: room.out.remote,
        local_port: Claim::read(out.claim).port,
        remote_port: room.out.remote_port,
        protocol: room.out.protocol,
    };
    let tcp = room.tcp as u8;
    let Some(entry) = F::inward().get_ptr_mut(&room.inward) else {
        let _ = F::out().remove(&room.out);
        return ANEW;
    };
    let claim = claim_of(entry);
    // SAFETY: as above.
    let of_another = unsafe { (*entry).to } != room.out.local || claim.port != room.out.local_port;
    // A SYN after the end: the same addresses and ports for a connection of its own.
    let anew = claim.phase != phase::LIVE && tcp & SYN != 0;
    if of_another || anew {
        let _ = F::out().remove(&room.out);
        return ANEW;
    }
    // SAFETY: as above.
    let inward = unsafe { &mut *entry };
    let before = Sides {
        ours: out.ours,
        theirs: inward.theirs,
    };
    let sides = before.after_ours(tcp);
    (out.ours, out.theirs) = (sides.ours, sides.theirs);
    (inward.ours, inward.theirs) = (sides.ours, sides.theirs);
    after::<F>(entry, claim, before, sides);
    GOES_ON
}

/// The same for one of the remote's.
#[inline(always)]
fn turn_in<F: Family>() -> u32 {
    let Some(room) = F::room() else {
        return GOES_ON;
    };
    let Some(entry) = F::inward().get_ptr_mut(&room.inward) else {
        return ANEW;
    };
    let claim = claim_of(entry);
    // SAFETY: as above.
    let inward = unsafe { &mut *entry };
    let before = Sides {
        ours: inward.ours,
        theirs: inward.theirs,
    };
    let sides = before.after_theirs(room.tcp as u8);
    inward.theirs = sides.theirs;
    room.out = Key {
        local: inward.to,
        remote: room.inward.remote,
        local_port: claim.port,
        remote_port: room.inward.remote_port,
        protocol: room.inward.protocol,
    };
    let out = F::out().get_ptr_mut(&room.out);
    if let Some(out) = out.filter(|out| is_of(*out, &room.inward)) {
        // SAFETY: as above.
        unsafe { (*out).theirs = sides.theirs };
    }
    after::<F>(entry, claim, before, sides);
    GOES_ON
}

/// What a segment was the last of ends. What was reset has ended for who has copies: whoever takes over hears nothing of it
/// any more, unless it goes on.
#[inline(always)]
fn after<F: Family>(entry: *mut Binding<F::A>, claim: Claim, before: Sides, sides: Sides) {
    if claim.phase != phase::LIVE {
        return;
    }
    if sides.is_closed() {
        close::<F>(entry, claim);
    } else if sides.is_reset() && !before.is_reset() {
        tell::ended::<F>();
    } else if before.is_reset() && !sides.is_reset() {
        tell::made::<F>();
    }
}

/// Both sides have ended: the port rests. The keys are in the room.
#[inline(always)]
pub(super) fn close<F: Family>(entry: *mut Binding<F::A>, claim: Claim) -> bool {
    let Some(room) = F::room() else {
        return false;
    };
    // SAFETY: as above.
    let policy = unsafe { (*entry).policy };
    let closed = Claim {
        phase: phase::CLOSED,
        counted: false,
        seen: now(),
        ..claim
    };
    if !turn(entry, claim, closed) {
        return false;
    }
    room.other = room.out.target();
    release::<F>(policy, claim.counted, &room.other);
    came_back::<F>(&room.inward, &room.out, &mut room.other);
    maps::note(Reason::Ended);
    tell::ended::<F>();
    true
}

/// What the entry *in* of a binding says of its remote.
#[inline(always)]
pub(super) fn is_vip(remote: &[u8; 16]) -> u16 {
    u16::from(crate::maps::vip(&VipKey(*remote)).is_some())
}

/// Makes a binding for the flow whose key *out* and whose pod are in the room: [`BOUND`], or a [`Reason`] and why not.
#[inline(always)]
fn make<F: Family>() -> u32 {
    let Some(room) = F::room() else {
        return Reason::NoRoom as u32;
    };
    let remote = room.out.remote.mapped();
    let uplink = maps::policy(room.source.policy).map_or(0, |policy| policy.uplink);
    let hop = match maps::route(uplink, &remote) {
        Some(hop) if hop != 0 => hop,
        _ => return Reason::NoWay as u32,
    };
    if let Err(reason) = reserve::<F>(room) {
        return reason as u32;
    }
    room.inward = Key {
        local: F::A::of(&room.source.egress),
        remote: room.out.remote,
        local_port: 0,
        remote_port: room.out.remote_port,
        protocol: room.out.protocol,
    };
    room.value.to = room.out.local;
    room.now = now();
    room.value.hop = room.source.node;
    room.value.node = is_vip(&remote);
    room.value.policy = room.source.policy;
    room.value.theirs = 0;
    let bound = bind::<F>();
    // Anew: other functions have written there.
    let Some(room) = F::room() else {
        return Reason::NoRoom as u32;
    };
    if let Err(reason) = bound {
        room.other = room.out.target();
        release::<F>(room.source.policy, room.counted != 0, &room.other);
        return reason as u32;
    }
    room.value.hop = hop;
    room.value.node = room.source.node;
    if let Err(error) = F::out().insert(&room.out, &room.value, u64::from(BPF_NOEXIST)) {
        // Another CPU was first with the same flow, or there is no room: the port goes back.
        let _ = F::inward().remove(&room.inward);
        room.other = room.inward.target();
        mark::<F>(&room.other, room.inward.local_port, false);
        room.other = room.out.target();
        release::<F>(room.source.policy, room.counted != 0, &room.other);
        // Who has copied all meanwhile may have seen it.
        tell::ended::<F>();
        return if error == EXISTS {
            BOUND
        } else {
            Reason::NoRoom as u32
        };
    }
    maps::note(Reason::Bound);
    tell::made::<F>();
    BOUND
}

/// What making a binding returns if it is there.
pub(super) const BOUND: u32 = u32::MAX;

macro_rules! functions {
    ($family:ty, $make:ident, $out:ident, $inward:ident) => {
        /// A global function: verified once, whoever calls it.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $make() -> u32 {
            make::<$family>()
        }

        /// As above.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $out() -> u32 {
            turn_out::<$family>()
        }

        /// As above.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $inward() -> u32 {
            turn_in::<$family>()
        }
    };
}

functions!(
    Four,
    landfall_gateway_make_v4,
    landfall_gateway_turn_out_v4,
    landfall_gateway_turn_in_v4
);
functions!(
    Six,
    landfall_gateway_make_v6,
    landfall_gateway_turn_out_v6,
    landfall_gateway_turn_in_v6
);
