//! The gateway's maps, and reading them.

use core::marker::PhantomData;

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key as Prefix, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap};
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::{Address, Binding, Key, V4, V6};
use landfall_ebpf_common::egress::gateway::{
    EgressState, Filter, GateNode, GateRoute, GateSettings, Hop, MAX_BINDINGS, MAX_CROWDS,
    MAX_EGRESS, MAX_GATE_NODES, MAX_GATE_ROUTES, MAX_HOPS, MAX_POLICIES, MAX_RETURNED, MAX_SOURCES,
    Policy, PolicyCount, Reason, Source, egress_flag, settings_flag,
};
use landfall_ebpf_common::egress::ports::{Crowd, Returned};

#[map]
static GATE_OUT_V4: HashMap<Key<V4>, Binding<V4>> =
    HashMap::with_max_entries(MAX_BINDINGS, BPF_F_NO_PREALLOC);
#[map]
static GATE_IN_V4: HashMap<Key<V4>, Binding<V4>> =
    HashMap::with_max_entries(MAX_BINDINGS, BPF_F_NO_PREALLOC);
#[map]
static GATE_OUT_V6: HashMap<Key<V6>, Binding<V6>> =
    HashMap::with_max_entries(MAX_BINDINGS, BPF_F_NO_PREALLOC);
#[map]
static GATE_IN_V6: HashMap<Key<V6>, Binding<V6>> =
    HashMap::with_max_entries(MAX_BINDINGS, BPF_F_NO_PREALLOC);
#[map]
static GATE_PODS_V4: HashMap<Key<V4>, u64> =
    HashMap::with_max_entries(MAX_BINDINGS, BPF_F_NO_PREALLOC);
#[map]
static GATE_PODS_V6: HashMap<Key<V6>, u64> =
    HashMap::with_max_entries(MAX_BINDINGS, BPF_F_NO_PREALLOC);
#[map]
static GATE_CROWDS_V4: HashMap<Key<V4>, Crowd> =
    HashMap::with_max_entries(MAX_CROWDS, BPF_F_NO_PREALLOC);
#[map]
static GATE_CROWDS_V6: HashMap<Key<V6>, Crowd> =
    HashMap::with_max_entries(MAX_CROWDS, BPF_F_NO_PREALLOC);
#[map]
static GATE_LAST_V4: LruHashMap<Key<V4>, Returned> = LruHashMap::with_max_entries(MAX_RETURNED, 0);
#[map]
static GATE_LAST_V6: LruHashMap<Key<V6>, Returned> = LruHashMap::with_max_entries(MAX_RETURNED, 0);
#[map]
static GATE_SOURCES: HashMap<VipKey, Source> =
    HashMap::with_max_entries(MAX_SOURCES, BPF_F_NO_PREALLOC);
#[map]
static GATE_EGRESS: HashMap<VipKey, EgressState> =
    HashMap::with_max_entries(MAX_EGRESS, BPF_F_NO_PREALLOC);
#[map]
static GATE_ROUTES: LpmTrie<GateRoute, u32> =
    LpmTrie::with_max_entries(MAX_GATE_ROUTES, BPF_F_NO_PREALLOC);
#[map]
static GATE_HOPS: Array<Hop> = Array::with_max_entries(MAX_HOPS, 0);
#[map]
static GATE_NODES: Array<GateNode> = Array::with_max_entries(MAX_GATE_NODES, 0);
#[map]
static GATE_POLICIES: Array<Policy> = Array::with_max_entries(MAX_POLICIES, 0);
#[map]
static GATE_USED: Array<u64> = Array::with_max_entries(MAX_POLICIES, 0);
#[map]
static GATE_PACED: Array<u64> = Array::with_max_entries(2 * MAX_POLICIES, 0);
#[map]
static GATE_FILTER: Array<Filter> = Array::with_max_entries(1, 0);
#[map]
static GATE_SETTINGS: Array<GateSettings> = Array::with_max_entries(1, 0);
#[map]
static GATE_REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::COUNT, 0);
#[map]
static GATE_COUNTS: PerCpuArray<PolicyCount> = PerCpuArray::with_max_entries(MAX_POLICIES, 0);
#[map]
static GATE_POD_COUNTS: PerCpuHashMap<[u8; 16], PolicyCount> =
    PerCpuHashMap::with_max_entries(MAX_SOURCES, BPF_F_NO_PREALLOC);
#[map]
static GATE_ROOM_V4: PerCpuArray<Room<V4>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static GATE_ROOM_V6: PerCpuArray<Room<V6>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static GATE_KEPT_V4: PerCpuArray<Room<V4>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static GATE_KEPT_V6: PerCpuArray<Room<V6>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static GATE_FRAME: PerCpuArray<[u8; 128]> = PerCpuArray::with_max_entries(1, 0);
#[map]
static GATE_RATE: PerCpuArray<Rate> = PerCpuArray::with_max_entries(1, 0);

/// Where an answer is put together.
#[inline(always)]
pub(super) fn frame() -> Option<&'static mut [u8; 128]> {
    // SAFETY: packets do not interrupt each other on the same CPU, and one function uses it.
    GATE_FRAME
        .get_ptr_mut(0)
        .map(|frame| unsafe { &mut *frame })
}

/// Whether one more error of our own may be sent, in this second of so many.
#[inline(always)]
pub(super) fn may_answer(second: u32, most: u32) -> bool {
    let Some(rate) = GATE_RATE.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: as above.
    let rate = unsafe { &mut *rate };
    if rate.second != second {
        *rate = Rate { second, count: 0 };
    }
    rate.count += 1;
    rate.count <= most
}

/// Keys and values of the flow at hand, one for each CPU: the kernel's stack is too small for them.
#[repr(C)]
pub(super) struct Room<A: Address> {
    /// By what its pod's packets are known.
    pub(super) out: Key<A>,
    /// By what its remote's are.
    pub(super) inward: Key<A>,
    /// One of another flow, or a target.
    pub(super) other: Key<A>,
    /// What goes into the map *in*, and then into that *out*.
    pub(super) value: Binding<A>,
    /// What the draws begin with.
    pub(super) seed: u64,
    /// The pod.
    pub(super) source: Source,
    /// A map had no room.
    pub(super) full: u32,
    /// The packet's own TCP flags, or what stands for them.
    pub(super) tcp: u32,
    /// The time, in ticks.
    pub(super) now: u32,
    /// Not 0: a binding ends though it is in use.
    pub(super) at_once: u32,
    /// Not 0: the binding has its pod's own port, or is not made.
    pub(super) own_only: u32,
    /// Not 0: nobody is told.
    pub(super) quiet: u32,
    /// Of a copy, its key *in*.
    pub(super) copy_in: Key<A>,
    /// Its key *out*.
    pub(super) copy_out: Key<A>,
    /// The number of the hop that its packets take.
    pub(super) copy_hop: u32,
    /// Not 0: the binding is counted for its pod's quota.
    pub(super) counted: u32,
}

/// How many errors of our own there were in a second.
#[repr(C)]
pub(super) struct Rate {
    pub(super) second: u32,
    pub(super) count: u32,
}

/// A family of addresses: its maps.
pub(super) trait Family {
    type A: Address + 'static;

    fn out() -> &'static HashMap<Key<Self::A>, Binding<Self::A>>;
    fn inward() -> &'static HashMap<Key<Self::A>, Binding<Self::A>>;
    fn pods() -> &'static HashMap<Key<Self::A>, u64>;
    fn crowds() -> &'static HashMap<Key<Self::A>, Crowd>;
    fn last() -> &'static LruHashMap<Key<Self::A>, Returned>;
    fn room() -> Option<&'static mut Room<Self::A>>;
    /// The room of [`Kept`].
    fn kept() -> Option<&'static mut Room<Self::A>>;
    /// Tries a port for the flow at hand: a global function of each family.
    fn take(port: u16) -> bool;
    /// A port that the crowd takes for free, 0 for none: the same.
    fn free(from: u16) -> u16;
    /// Makes a binding for the flow in the room: the same.
    fn make() -> u32;
    /// A segment of the pod's that may change the flow's state: the same.
    fn turn_out() -> u32;
    /// One of the remote's.
    fn turn_in() -> u32;
    /// Ends the binding whose key *in* is in the room: the same.
    fn end() -> u32;
    /// Tells of the binding in the room: the same.
    fn tell(what: u32) -> u32;
    /// Of that in the room of [`Kept`].
    fn tell_kept(what: u32) -> u32;
}

pub(super) struct Four;
pub(super) struct Six;

/// A family for programs that user space runs, with a room of their own: before kernel 6.3 packets interrupt them. User
/// space runs one at a time.
pub(super) struct Kept<F>(PhantomData<F>);

impl<F: Family> Family for Kept<F> {
    type A = F::A;

    #[inline(always)]
    fn out() -> &'static HashMap<Key<Self::A>, Binding<Self::A>> {
        F::out()
    }

    #[inline(always)]
    fn inward() -> &'static HashMap<Key<Self::A>, Binding<Self::A>> {
        F::inward()
    }

    #[inline(always)]
    fn pods() -> &'static HashMap<Key<Self::A>, u64> {
        F::pods()
    }

    #[inline(always)]
    fn crowds() -> &'static HashMap<Key<Self::A>, Crowd> {
        F::crowds()
    }

    #[inline(always)]
    fn last() -> &'static LruHashMap<Key<Self::A>, Returned> {
        F::last()
    }

    #[inline(always)]
    fn room() -> Option<&'static mut Room<Self::A>> {
        F::kept()
    }

    #[inline(always)]
    fn kept() -> Option<&'static mut Room<Self::A>> {
        F::kept()
    }

    #[inline(always)]
    fn take(port: u16) -> bool {
        F::take(port)
    }

    #[inline(always)]
    fn free(from: u16) -> u16 {
        F::free(from)
    }

    #[inline(always)]
    fn make() -> u32 {
        F::make()
    }

    #[inline(always)]
    fn turn_out() -> u32 {
        F::turn_out()
    }

    #[inline(always)]
    fn turn_in() -> u32 {
        F::turn_in()
    }

    #[inline(always)]
    fn end() -> u32 {
        F::end()
    }

    #[inline(always)]
    fn tell(what: u32) -> u32 {
        F::tell_kept(what)
    }

    #[inline(always)]
    fn tell_kept(what: u32) -> u32 {
        F::tell_kept(what)
    }
}

macro_rules! family {
    ($family:ident, $address:ty, $out:ident, $inward:ident, $pods:ident, $crowds:ident, $last:ident, $room:ident, $kept:ident, $take:path, $free:path, $make:path, $turn_out:path, $turn_in:path, $end:path, $tell:path, $tell_kept:path) => {
        impl Family for $family {
            type A = $address;

            #[inline(always)]
            fn out() -> &'static HashMap<Key<Self::A>, Binding<Self::A>> {
                &$out
            }

            #[inline(always)]
            fn inward() -> &'static HashMap<Key<Self::A>, Binding<Self::A>> {
                &$inward
            }

            #[inline(always)]
            fn pods() -> &'static HashMap<Key<Self::A>, u64> {
                &$pods
            }

            #[inline(always)]
            fn crowds() -> &'static HashMap<Key<Self::A>, Crowd> {
                &$crowds
            }

            #[inline(always)]
            fn last() -> &'static LruHashMap<Key<Self::A>, Returned> {
                &$last
            }

            #[inline(always)]
            fn room() -> Option<&'static mut Room<Self::A>> {
                // SAFETY: packets do not interrupt each other on the same CPU, and its parts are used by one function
                // at a time.
                $room.get_ptr_mut(0).map(|room| unsafe { &mut *room })
            }

            #[inline(always)]
            fn kept() -> Option<&'static mut Room<Self::A>> {
                // SAFETY: user space runs one program at a time that uses it, and its parts as above.
                $kept.get_ptr_mut(0).map(|room| unsafe { &mut *room })
            }

            #[inline(always)]
            fn take(port: u16) -> bool {
                $take(u32::from(port)) != 0
            }

            #[inline(always)]
            fn free(from: u16) -> u16 {
                $free(u32::from(from)) as u16
            }

            #[inline(always)]
            fn make() -> u32 {
                $make()
            }

            #[inline(always)]
            fn turn_out() -> u32 {
                $turn_out()
            }

            #[inline(always)]
            fn turn_in() -> u32 {
                $turn_in()
            }

            #[inline(always)]
            fn end() -> u32 {
                $end()
            }

            #[inline(always)]
            fn tell(what: u32) -> u32 {
                $tell(what)
            }

            #[inline(always)]
            fn tell_kept(what: u32) -> u32 {
                $tell_kept(what)
            }
        }
    };
}

family!(
    Four,
    V4,
    GATE_OUT_V4,
    GATE_IN_V4,
    GATE_PODS_V4,
    GATE_CROWDS_V4,
    GATE_LAST_V4,
    GATE_ROOM_V4,
    GATE_KEPT_V4,
    super::claim::landfall_gateway_take_v4,
    super::claim::landfall_gateway_free_v4,
    super::flow::landfall_gateway_make_v4,
    super::flow::landfall_gateway_turn_out_v4,
    super::flow::landfall_gateway_turn_in_v4,
    super::keep::landfall_gateway_end_v4,
    super::tell::landfall_gateway_tell_v4,
    super::tell::landfall_gateway_tell_kept_v4
);
family!(
    Six,
    V6,
    GATE_OUT_V6,
    GATE_IN_V6,
    GATE_PODS_V6,
    GATE_CROWDS_V6,
    GATE_LAST_V6,
    GATE_ROOM_V6,
    GATE_KEPT_V6,
    super::claim::landfall_gateway_take_v6,
    super::claim::landfall_gateway_free_v6,
    super::flow::landfall_gateway_make_v6,
    super::flow::landfall_gateway_turn_out_v6,
    super::flow::landfall_gateway_turn_in_v6,
    super::keep::landfall_gateway_end_v6,
    super::tell::landfall_gateway_tell_v6,
    super::tell::landfall_gateway_tell_kept_v6
);

#[inline(always)]
pub(super) fn settings() -> GateSettings {
    GATE_SETTINGS.get(0).copied().unwrap_or_default()
}

/// The bits that say that a packet is to leave by another address.
#[inline(always)]
pub(super) fn mark() -> u32 {
    GATE_SETTINGS.get(0).map_or(0, |settings| settings.mark)
}

#[inline(always)]
pub(super) fn filter() -> Option<&'static Filter> {
    GATE_FILTER.get(0)
}

/// What is known of a pod's address.
#[inline(always)]
pub(super) fn source(address: &VipKey) -> Option<Source> {
    // SAFETY: entries are replaced whole; a reader may at worst see the one before.
    unsafe { GATE_SOURCES.get(address) }.copied()
}

/// What is told of the gateway as a whole.
#[inline(always)]
pub(super) fn flags() -> u32 {
    GATE_SETTINGS.get(0).map_or(0, |settings| settings.flags)
}

/// What this node is to an egress address: nothing, to one that is none.
#[inline(always)]
pub(super) fn egress(address: &VipKey) -> EgressState {
    // SAFETY: entries are replaced whole; a reader may at worst see the one before.
    unsafe { GATE_EGRESS.get(address) }
        .copied()
        .unwrap_or_default()
}

/// Whether pods leave by an address here.
#[inline(always)]
pub(super) fn is_egress(address: &VipKey) -> bool {
    egress(address).flags & egress_flag::HERE != 0
}

/// Whether what leaves or comes by an address is not to be translated.
#[inline(always)]
pub(super) fn is_silent(address: &[u8; 16]) -> bool {
    flags() & settings_flag::SILENT != 0
        && egress(&VipKey(*address)).flags & egress_flag::SILENT != 0
}

#[inline(always)]
pub(super) fn policy(number: u16) -> Option<&'static Policy> {
    GATE_POLICIES.get(u32::from(number))
}

/// How many ports a policy's pods have in use.
#[inline(always)]
pub(super) fn used(policy: u16) -> Option<*mut u64> {
    GATE_USED.get_ptr_mut(u32::from(policy))
}

/// A direction: from pods to remotes.
pub(super) const OUT: u32 = 0;
/// The other.
pub(super) const IN: u32 = 1;

/// How far ahead a policy is in a direction.
#[inline(always)]
pub(super) fn until(policy: u16, direction: u32) -> Option<*mut u64> {
    GATE_PACED.get_ptr_mut(u32::from(policy) * 2 + direction)
}

#[inline(always)]
pub(super) fn node(number: u16) -> Option<&'static GateNode> {
    GATE_NODES.get(u32::from(number))
}

#[inline(always)]
pub(super) fn hop(number: u16) -> Option<&'static Hop> {
    GATE_HOPS.get(u32::from(number))
}

/// The number of the hop to a remote, 0 if it is the cluster's own; nothing if there is no way.
#[inline(always)]
pub(super) fn route(uplink: u32, remote: &[u8; 16]) -> Option<u16> {
    let route = GateRoute {
        uplink: uplink.to_be_bytes(),
        address: *remote,
    };
    GATE_ROUTES
        .get(Prefix::new(160, route))
        .map(|hop| *hop as u16)
}

#[inline(always)]
pub(super) fn note(reason: Reason) {
    note_number(reason as u32);
}

/// The same of a [`Reason`]'s number.
#[inline(always)]
pub(super) fn note_number(reason: u32) {
    if let Some(count) = GATE_REASONS.get_ptr_mut(reason) {
        // SAFETY: the map gave the pointer, to this CPU's value, and nothing else runs on it meanwhile.
        unsafe { *count += 1 };
    }
}

/// The same, of a packet of a policy's and a pod's.
#[inline(always)]
pub(super) fn note_of(policy: u16, pod: &[u8; 16], reason: u32, bytes: u32) {
    note_number(reason);
    if let Some(count) = GATE_COUNTS.get_ptr_mut(u32::from(policy)) {
        // SAFETY: as above.
        unsafe { (*count).note(reason, bytes) };
    }
    if let Some(count) = GATE_POD_COUNTS.get_ptr_mut(pod) {
        // SAFETY: as above.
        unsafe { (*count).note(reason, bytes) };
    }
}
