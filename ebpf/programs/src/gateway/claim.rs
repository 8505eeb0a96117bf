//! Taking ports and giving them back. Whoever changes the claim of an entry *in* from one word to another has it: that is
//! one step, on whatever CPU.

use core::marker::PhantomData;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use landfall_ebpf_common::egress::binding::{Address, Binding, Claim, Key, phase};
use landfall_ebpf_common::egress::gateway::Reason;
use landfall_ebpf_common::egress::ports::{Book, Crowd, FIRST, Returned, choose, seed};
use landfall_ebpf_common::{PortKey, VipKey};

use super::maps::{self, Family, Four, Room, Six};
use super::word;
use crate::packet::{TCP, UDP};

/// More than any quota: the count is being removed.
const REMOVED: u64 = 1 << 30;
/// One less.
const LESS: u64 = u64::MAX;
/// How often a count is looked for that is being removed.
const LOOKS: u32 = 16;
/// How often a claim is turned that others touch.
const TRIES: u32 = 3;
/// `E2BIG` (`asm-generic/errno-base.h`), as a helper returns it.
const NO_ROOM: i32 = -7;
/// `EEXIST`, likewise.
pub(super) const EXISTS: i32 = -17;

/// A crowd that knows nobody.
static NOBODY: Crowd = Crowd::new();
/// A pod that had no ports.
static NONE: Returned = Returned::NONE;

/// The claim of an entry.
#[inline(always)]
pub(super) fn claim_of<A: Address>(entry: *const Binding<A>) -> Claim {
    // SAFETY: the map gave the pointer. Read once: others may change it.
    Claim::read(unsafe { (&raw const (*entry).claim).read_volatile() })
}

/// Changes a claim. False, if somebody else has.
#[inline(always)]
pub(super) fn turn<A: Address>(entry: *mut Binding<A>, from: Claim, to: Claim) -> bool {
    // SAFETY: as above.
    let claim = unsafe { &raw mut (*entry).claim };
    word::exchange(claim, from.word(), to.word())
}

/// Whether an entry *out* is that of the binding with this key *in*: the pod may have begun another since, by another
/// address.
#[inline(always)]
pub(super) fn is_of<A: Address>(out: *const Binding<A>, inward: &Key<A>) -> bool {
    // SAFETY: the map gave the pointer.
    let by = unsafe { (*out).to };
    by == inward.local && claim_of(out).port == inward.local_port
}

/// Counts one port more for the pod and the policy of the flow at hand, if their quotas allow it.
#[inline(always)]
pub(super) fn reserve<F: Family>(room: &mut Room<F::A>) -> Result<(), Reason> {
    let policy = room.source.policy;
    let (Some(quota), Some(used)) = (maps::policy(policy), maps::used(policy)) else {
        return Err(Reason::NoWay);
    };
    if quota.ports == 0 {
        word::add(used, 1);
    } else if word::add_below(used, u64::from(quota.ports)).is_err() {
        return Err(Reason::Quota);
    }
    (room.value.ours, room.counted) = (0, 0);
    if quota.ports_per_pod == 0 {
        return Ok(());
    }
    room.other = room.out.target();
    let outcome = count_pod::<F>(&room.other, u64::from(quota.ports_per_pod));
    if outcome.is_ok() {
        room.counted = 1;
    } else {
        word::add(used, LESS);
    }
    outcome
}

/// Counts one port more for a copy's pod and policy, whatever their quotas are.
#[inline(always)]
pub(super) fn count_copy<F: Family>(room: &mut Room<F::A>) -> Result<(), Reason> {
    let policy = room.source.policy;
    let (Some(quota), Some(used)) = (maps::policy(policy), maps::used(policy)) else {
        return Err(Reason::NoWay);
    };
    (room.value.ours, room.counted) = (0, 0);
    if quota.ports_per_pod != 0 {
        room.other = room.out.target();
        count_pod::<F>(&room.other, REMOVED)?;
        room.counted = 1;
    }
    word::add(used, 1);
    Ok(())
}

/// Counts a flow for its pod's quota that began before there was one, whatever the quota is; its key *in* is in the room.
/// Not 0, if it is counted now.
#[inline(always)]
pub(super) fn count_late<F: Family>() -> u32 {
    let Some(room) = F::room() else {
        return 0;
    };
    let Some(entry) = F::inward().get_ptr_mut(&room.inward) else {
        return 0;
    };
    let claim = claim_of(entry);
    // SAFETY: the map gave the pointer; if its owner changes meanwhile the claim does.
    let (pod, policy) = unsafe { ((*entry).to, (*entry).policy) };
    let limited = maps::policy(policy).is_some_and(|policy| policy.ports_per_pod != 0);
    if claim.phase != phase::LIVE || claim.counted || !limited {
        return 0;
    }
    room.other = Key {
        local: pod,
        local_port: 0,
        ..room.inward
    };
    if count_pod::<F>(&room.other, REMOVED).is_err() {
        return 0;
    }
    let mut before = claim;
    for _ in 0..TRIES {
        if turn(entry, before, before.with_count(true)) {
            return 1;
        }
        // It may have been heard in between, which is no other flow.
        let seen = claim_of(entry).seen;
        before = Claim { seen, ..claim };
    }
    uncount_pod::<F>(&room.other);
    0
}

#[inline(always)]
fn count_pod<F: Family>(target: &Key<F::A>, most: u64) -> Result<(), Reason> {
    for _ in 0..LOOKS {
        let Some(count) = F::pods().get_ptr_mut(target) else {
            if F::pods().insert(target, 0, u64::from(BPF_NOEXIST)) == Err(NO_ROOM) {
                return Err(Reason::NoRoom);
            }
            continue;
        };
        match word::add_below(count, most) {
            Ok(()) => return Ok(()),
            // It is being removed.
            Err(REMOVED..) => {}
            Err(_) => return Err(Reason::Quota),
        }
    }
    // Who says it again finds another.
    Err(Reason::Unknown)
}

/// Gives back what was counted for a flow: by the policy's number, and for the pod if it was `counted` there; `other` is
/// the target of its key *out*.
#[inline(always)]
pub(super) fn release<F: Family>(policy: u16, counted: bool, other: &Key<F::A>) {
    if let Some(used) = maps::used(policy) {
        word::add(used, LESS);
    }
    if counted {
        uncount_pod::<F>(other);
    }
}

#[inline(always)]
fn uncount_pod<F: Family>(other: &Key<F::A>) {
    let Some(count) = F::pods().get_ptr_mut(other) else {
        return;
    };
    word::add(count, LESS);
    if word::read(count) == 0 && word::exchange(count, 0, REMOVED) {
        let _ = F::pods().remove(other);
    }
}

/// Takes a port for the flow at hand, whose quotas are reserved. What the entry *out* is to be is where that *in* was.
#[inline(always)]
pub(super) fn bind<F: Family>() -> Result<(), Reason> {
    let Some(room) = F::room() else {
        return Err(Reason::NoRoom);
    };
    room.full = 0;
    let own = room.out.local_port;
    room.seed = seed(
        &room.out.local.mapped(),
        own,
        &room.out.remote.mapped(),
        room.out.remote_port,
    );
    let own_only = room.own_only != 0;
    let chosen = if own_only {
        Some(own).filter(|own| *own >= FIRST && F::take(*own))
    } else {
        choose(&mut Ports::<F>(PhantomData), own, room.seed)
    };
    // Anew: other functions have written there.
    let Some(room) = F::room() else {
        return Err(Reason::NoRoom);
    };
    let Some(port) = chosen else {
        return Err(if room.full != 0 {
            Reason::NoRoom
        } else if own_only {
            Reason::Unknown
        } else {
            Reason::NoPort
        });
    };
    room.inward.local_port = port;
    room.other = room.inward.target();
    mark::<F>(&room.other, port, true);
    room.value.to = room.inward.local;
    room.value.claim = Claim::new(port, room.now).word();
    Ok(())
}

/// Sees to it that a target has a crowd. False, if there is no room for one.
#[inline(always)]
pub(super) fn gather<F: Family>(target: &Key<F::A>) -> bool {
    F::crowds().get_ptr(target).is_some()
        || F::crowds()
            .insert(target, &NOBODY, u64::from(BPF_NOEXIST))
            .is_ok()
}

/// Says to the crowd of a target, if it has one, whether a port is in use.
#[inline(always)]
pub(super) fn mark<F: Family>(target: &Key<F::A>, port: u16, used: bool) {
    let Some(crowd) = F::crowds().get_ptr_mut(target) else {
        return;
    };
    // SAFETY: the map gave the pointer, and the place is below the number of words.
    let word = unsafe { &raw mut (*crowd).used[Crowd::place(port)] };
    if used {
        word::set(word, Crowd::bit(port));
    } else {
        word::keep(word, !Crowd::bit(port));
    }
}

/// A port has come back to its pod: it may be wanted soon, if many are. `inward` is its key *in*, `out` that *out*.
#[inline(always)]
pub(super) fn came_back<F: Family>(inward: &Key<F::A>, out: &Key<F::A>, other: &mut Key<F::A>) {
    *other = inward.target();
    if F::crowds().get_ptr(&*other).is_none() {
        return;
    }
    *other = out.target();
    if let Some(returned) = F::last().get_ptr_mut(&*other) {
        // SAFETY: the map gave the pointer; what two CPUs do to it at once makes a wrong hint at worst.
        unsafe { (*returned).put(inward.local_port) };
    } else {
        let _ = F::last().insert(&*other, &NONE, u64::from(BPF_ANY));
        if let Some(returned) = F::last().get_ptr_mut(&*other) {
            // SAFETY: as above.
            unsafe { (*returned).put(inward.local_port) };
        }
    }
}

/// The ports of the flow at hand's target. It keeps no reference to the room: its functions write there too.
struct Ports<F>(PhantomData<F>);

impl<F: Family> Book for Ports<F> {
    #[inline(always)]
    fn take(&mut self, port: u16) -> bool {
        F::take(port)
    }

    #[inline(always)]
    fn gather(&mut self) -> bool {
        let Some(room) = F::room() else {
            return false;
        };
        room.other = room.inward.target();
        gather::<F>(&room.other)
    }

    #[inline(always)]
    fn free(&mut self, from: u16) -> Option<u16> {
        Some(F::free(from)).filter(|port| *port != 0)
    }

    #[inline(always)]
    fn is_in_use(&mut self, port: u16) {
        let Some(room) = F::room() else {
            return;
        };
        room.other = room.inward.target();
        mark::<F>(&room.other, port, true);
        // It may have been given back between the look and the mark. What is a Service's stays marked.
        room.inward.local_port = port;
        if F::inward().get_ptr(&room.inward).is_none() && !is_served(room, port) {
            mark::<F>(&room.other, port, false);
        }
    }

    #[inline(always)]
    fn returned(&mut self) -> Option<u16> {
        let room = F::room()?;
        room.other = room.out.target();
        let returned = F::last().get_ptr_mut(&room.other)?;
        // SAFETY: as in `came_back`.
        unsafe { (*returned).take() }
    }
}

/// Whether a port of the egress address of the flow at hand is a Service's.
#[inline(always)]
fn is_served<A: Address>(room: &Room<A>, port: u16) -> bool {
    let protocol = room.inward.protocol as u8;
    if protocol != TCP && protocol != UDP {
        return false;
    }
    let key = PortKey {
        vip: VipKey(room.source.egress),
        port,
        protocol,
        zero: 0,
    };
    crate::maps::port(&key).is_some()
}

/// Tries a port.
#[inline(always)]
fn take<F: Family>(port: u16) -> bool {
    let Some(room) = F::room() else {
        return false;
    };
    room.inward.local_port = port;
    if is_served(room, port) {
        return false;
    }
    room.value.claim = claim_in(room).word();
    let Some(entry) = F::inward().get_ptr_mut(&room.inward) else {
        return match F::inward().insert(&room.inward, &room.value, u64::from(BPF_NOEXIST)) {
            Ok(()) => true,
            Err(error) => {
                room.full |= u32::from(error == NO_ROOM);
                false
            }
        };
    };
    take_over::<F>(room, entry)
}

/// What the entry *in* of the flow at hand begins with.
#[inline(always)]
pub(super) fn claim_in<A: Address>(room: &Room<A>) -> Claim {
    Claim::new(room.out.local_port, room.now).with_count(room.counted != 0)
}

/// Takes a port that rests: the pod's own, or one that has rested.
#[inline(always)]
fn take_over<F: Family>(room: &mut Room<F::A>, entry: *mut Binding<F::A>) -> bool {
    let before = claim_of(entry);
    // SAFETY: the map gave the pointer; nobody writes these while the phase is what it is, or the claim fails.
    let pod = unsafe { (*entry).to };
    // Another CPU may have ended it since this one has looked at the clock.
    let rested = room.now.wrapping_sub(before.seen) as i32;
    let rested = rested >= maps::settings().times.rest as i32;
    if before.phase != phase::CLOSED || !(pod == room.value.to || rested) {
        return false;
    }
    hand::<F>(room, entry, before)
}

/// Gives a port that rests to the flow at hand. False, if somebody else was first.
#[inline(always)]
pub(super) fn hand<F: Family>(
    room: &mut Room<F::A>,
    entry: *mut Binding<F::A>,
    before: Claim,
) -> bool {
    // SAFETY: as in `take_over`.
    let pod = unsafe { (*entry).to };
    let busy = before.turned(phase::BUSY);
    if !turn(entry, before, busy) {
        return false;
    }
    // What is late of the flow before has no port any more.
    room.other = Key {
        local: pod,
        remote: room.inward.remote,
        local_port: before.port,
        remote_port: room.inward.remote_port,
        protocol: room.inward.protocol,
    };
    if let Some(out) = F::out().get_ptr_mut(&room.other) {
        if is_of(out, &room.inward) {
            let _ = F::out().remove(&room.other);
        }
    }
    // SAFETY: as above, and the port is changing hands to us.
    unsafe {
        (*entry).to = room.value.to;
        (*entry).hop = room.value.hop;
        (*entry).node = room.value.node;
        (*entry).policy = room.value.policy;
        (*entry).ours = room.value.ours;
        (*entry).theirs = room.value.theirs;
    }
    let after = before
        .handed(room.out.local_port, room.now)
        .with_count(room.counted != 0);
    // Its sender may be noted as heard meanwhile: nobody else writes there.
    // SAFETY: as above.
    unsafe { (&raw mut (*entry).claim).write_volatile(after.word()) };
    true
}

/// A free port as the crowd of the flow at hand has it.
#[inline(always)]
fn free<F: Family>(from: u16) -> u16 {
    let Some(room) = F::room() else {
        return 0;
    };
    room.other = room.inward.target();
    let Some(crowd) = F::crowds().get_ptr(&room.other) else {
        return 0;
    };
    // SAFETY: the map gave the pointer; a word that changes meanwhile is found out when the port is tried.
    unsafe { (*crowd).free(from).unwrap_or(0) }
}

/// Tries a port for the IPv4 flow at hand: not 0, if it has it.
///
/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_take_v4(port: u32) -> u32 {
    u32::from(take::<Four>(port as u16))
}

/// The same for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_take_v6(port: u32) -> u32 {
    u32::from(take::<Six>(port as u16))
}

/// A port that may be free for the IPv4 flow at hand, the first from this one on; 0 for none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_free_v4(from: u32) -> u32 {
    u32::from(free::<Four>(from as u16))
}

/// The same for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_free_v6(from: u32) -> u32 {
    u32::from(free::<Six>(from as u16))
}
