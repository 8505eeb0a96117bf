//! The maps, and reading them.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use landfall_ebpf_common::{
    Answer, Driver, Endpoint, Flow, FlowKey, Fragment, FragmentKey, History, Holders, HoldersKey,
    MAX_DATAGRAMS, MAX_DRIVERS, MAX_FLOWS, MAX_FRAGMENTS, MAX_HALF_OPEN, MAX_HELD, MAX_NODES,
    MAX_PORTS, MAX_RANGES, MAX_ROUTED, MAX_SLOTS, MAX_VIPS, MAX_WIDE, Node, Peer, PeerKey, Port,
    PortKey, Range, Routed, Settings, SlotKey, Verdict, Vip, VipCount, VipKey, WideKey, WidePage,
};

use crate::packet::Packet;

#[map]
static VIPS: HashMap<VipKey, Vip> = HashMap::with_max_entries(MAX_VIPS, BPF_F_NO_PREALLOC);
#[map]
static SHADOWS: HashMap<VipKey, VipKey> = HashMap::with_max_entries(MAX_VIPS, BPF_F_NO_PREALLOC);
#[map]
static COUNTS: PerCpuArray<VipCount> = PerCpuArray::with_max_entries(MAX_VIPS, 0);
#[map]
static PORTS: HashMap<PortKey, Port> = HashMap::with_max_entries(MAX_PORTS, BPF_F_NO_PREALLOC);
#[map]
static HISTORY: HashMap<u32, History> = HashMap::with_max_entries(MAX_PORTS, BPF_F_NO_PREALLOC);
#[map]
static WIDE: HashMap<WideKey, WidePage> = HashMap::with_max_entries(MAX_WIDE, BPF_F_NO_PREALLOC);
#[map]
static NODES: Array<Node> = Array::with_max_entries(MAX_NODES, 0);
#[map]
static PEERS: HashMap<PeerKey, Peer> = HashMap::with_max_entries(MAX_NODES, BPF_F_NO_PREALLOC);
#[map]
static ROUTED: LpmTrie<Routed, u32> = LpmTrie::with_max_entries(MAX_ROUTED, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static FLOWS: HashMap<FlowKey, Flow> =
    HashMap::with_max_entries(MAX_FLOWS, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static HALF_OPEN: LruHashMap<FlowKey, Flow> =
    LruHashMap::with_max_entries(MAX_HALF_OPEN, 0);
#[map]
pub(crate) static ANSWERS: HashMap<FlowKey, Answer> =
    HashMap::with_max_entries(MAX_FLOWS, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static HALF_ANSWERS: LruHashMap<FlowKey, Answer> =
    LruHashMap::with_max_entries(MAX_HALF_OPEN, 0);
#[map]
pub(crate) static DATAGRAMS: LruHashMap<FlowKey, Flow> =
    LruHashMap::with_max_entries(MAX_DATAGRAMS, 0);
#[map]
pub(crate) static DATAGRAM_ANSWERS: LruHashMap<FlowKey, Answer> =
    LruHashMap::with_max_entries(MAX_DATAGRAMS, 0);
#[map]
static SLOTS: HashMap<SlotKey, Endpoint> = HashMap::with_max_entries(MAX_SLOTS, BPF_F_NO_PREALLOC);
#[map]
static RANGES: LpmTrie<Range, u32> = LpmTrie::with_max_entries(MAX_RANGES, BPF_F_NO_PREALLOC);
#[map]
static HOLDERS: HashMap<HoldersKey, Holders> =
    HashMap::with_max_entries(MAX_HELD, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, Fragment> =
    LruHashMap::with_max_entries(MAX_FRAGMENTS, 0);
#[map]
static VERDICTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Verdict::COUNT, 0);
#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// The interfaces at whose driver a program is; made anew with it.
#[map]
static DRIVERS: HashMap<u32, Driver> = HashMap::with_max_entries(MAX_DRIVERS, BPF_F_NO_PREALLOC);

/// The packet at hand, one for each CPU.
#[map]
static PACKET: PerCpuArray<Packet> = PerCpuArray::with_max_entries(1, 0);

/// The place of the packet at hand.
#[inline(always)]
pub(crate) fn packet() -> Option<&'static mut Packet> {
    // SAFETY: programs do not interrupt each other on the same CPU, and no two of a program's functions use it at once.
    PACKET.get_ptr_mut(0).map(|packet| unsafe { &mut *packet })
}

/// What is known of an address; nothing, if it is no VIP.
#[inline(always)]
pub(crate) fn vip(key: &VipKey) -> Option<Vip> {
    // SAFETY: entries are replaced whole; a reader may at worst see the one before.
    unsafe { VIPS.get(key) }.copied()
}

/// The VIP whose shadow an address is.
#[inline(always)]
pub(crate) fn shadowed(shadow: &VipKey) -> Option<&'static VipKey> {
    // SAFETY: as above.
    unsafe { SHADOWS.get(shadow) }
}

/// Counts a frame to a VIP: as so many packets as it was put together from, if it was.
#[inline(always)]
pub(crate) fn count(number: u32, segments: u32, length: u32) {
    let Some(count) = COUNTS.get_ptr_mut(number) else {
        return;
    };
    // SAFETY: the map gave the pointer, to this CPU's value, and nothing else runs on it meanwhile.
    unsafe {
        (*count).packets += if segments == 0 {
            1
        } else {
            u64::from(segments)
        };
        (*count).bytes += u64::from(length);
    }
}

/// An interface's Ethernet address, if a program is at its driver.
#[inline(always)]
pub(crate) fn address_of(interface: u32) -> Option<[u8; 6]> {
    // SAFETY: as above.
    unsafe { DRIVERS.get(interface) }.map(|driver| driver.mac)
}

#[inline(always)]
pub(crate) fn port(key: &PortKey) -> Option<&'static Port> {
    // SAFETY: as above.
    unsafe { PORTS.get(key) }
}

#[inline(always)]
pub(crate) fn history(port: u32) -> Option<&'static History> {
    // SAFETY: as above.
    unsafe { HISTORY.get(port) }
}

#[inline(always)]
pub(crate) fn wide(key: &WideKey) -> Option<&'static WidePage> {
    // SAFETY: as above.
    unsafe { WIDE.get(key) }
}

#[inline(always)]
pub(crate) fn node(number: u16) -> Option<&'static Node> {
    NODES.get(u32::from(number))
}

/// The number of the node that has this Ethernet address at the interface and has steered what it sent; 0 if there
/// is none, or the source is its own or routed through it: then it is a client's.
#[inline(always)]
pub(crate) fn sender(key: &PeerKey, source: &[u8; 16]) -> u32 {
    // SAFETY: as above.
    let Some(Peer { node: peer }) = unsafe { PEERS.get(key) }.copied() else {
        return 0;
    };
    let routed = Routed {
        node: peer.to_be_bytes(),
        address: *source,
    };
    if ROUTED.get(Key::new(160, routed)).is_some() {
        return 0;
    }
    peer
}

/// Whether a node has this Ethernet address at the interface.
#[inline(always)]
pub(crate) fn is_peer(key: &PeerKey) -> bool {
    PEERS.get_ptr(key).is_some()
}

#[inline(always)]
pub(crate) fn holders(key: &HoldersKey) -> Option<&'static Holders> {
    // SAFETY: as above.
    unsafe { HOLDERS.get(key) }
}

/// The endpoint that a slot of a port belongs to.
#[inline(always)]
pub(crate) fn endpoint(key: &SlotKey) -> Option<Endpoint> {
    // SAFETY: as above.
    unsafe { SLOTS.get(key) }.copied()
}

/// Whether a client is in one of a port's source ranges.
#[inline(always)]
pub(crate) fn in_ranges(port: u32, client: &[u8; 16]) -> bool {
    let range = Range {
        port: port.to_be_bytes(),
        address: *client,
    };
    RANGES.get(Key::new(160, range)).is_some()
}

#[inline(always)]
pub(crate) fn settings() -> Settings {
    SETTINGS.get(0).copied().unwrap_or_default()
}

#[inline(always)]
pub(crate) fn note(verdict: Verdict) {
    if let Some(count) = VERDICTS.get_ptr_mut(verdict as u32) {
        // SAFETY: as in `count`.
        unsafe { *count += 1 };
    }
}
