//! What the pinned maps look like: by that a map is known for one of this layout.

use aya::maps::MapType;
use landfall_ebpf_common::egress::guard;
use landfall_ebpf_common::{self as common, map};

/// The shape of a map.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) kind: MapType,
    pub(super) key: usize,
    pub(super) value: usize,
    pub(super) entries: u32,
}

pub(super) const fn shape<K, V>(name: &'static str, kind: MapType, entries: u32) -> Shape {
    Shape {
        name,
        kind,
        key: size_of::<K>(),
        value: size_of::<V>(),
        entries,
    }
}

/// Length of a prefix and data, as the kernel wants a key for the longest prefix.
pub(super) type Prefix<D> = (u32, D);

/// Every map that outlives the process.
pub(super) const SHAPES: [Shape; 29] = [
    shape::<common::VipKey, common::Vip>(map::VIPS, MapType::Hash, common::MAX_VIPS),
    shape::<common::VipKey, common::VipKey>(map::SHADOWS, MapType::Hash, common::MAX_VIPS),
    shape::<u32, common::VipCount>(map::COUNTS, MapType::PerCpuArray, common::MAX_VIPS),
    shape::<common::PortKey, common::Port>(map::PORTS, MapType::Hash, common::MAX_PORTS),
    shape::<u32, common::History>(map::HISTORY, MapType::Hash, common::MAX_PORTS),
    shape::<common::WideKey, common::WidePage>(map::WIDE, MapType::Hash, common::MAX_WIDE),
    shape::<u32, common::Node>(map::NODES, MapType::Array, common::MAX_NODES),
    shape::<common::PeerKey, common::Peer>(map::PEERS, MapType::Hash, common::MAX_NODES),
    shape::<Prefix<common::Routed>, u32>(map::ROUTED, MapType::LpmTrie, common::MAX_ROUTED),
    shape::<common::FlowKey, common::Flow>(map::FLOWS, MapType::Hash, common::MAX_FLOWS),
    shape::<common::FlowKey, common::Flow>(map::HALF_OPEN, MapType::LruHash, common::MAX_HALF_OPEN),
    shape::<common::FlowKey, common::Answer>(map::ANSWERS, MapType::Hash, common::MAX_FLOWS),
    shape::<common::FlowKey, common::Answer>(
        map::HALF_ANSWERS,
        MapType::LruHash,
        common::MAX_HALF_OPEN,
    ),
    shape::<common::FlowKey, common::Flow>(map::DATAGRAMS, MapType::LruHash, common::MAX_DATAGRAMS),
    shape::<common::FlowKey, common::Answer>(
        map::DATAGRAM_ANSWERS,
        MapType::LruHash,
        common::MAX_DATAGRAMS,
    ),
    shape::<common::SlotKey, common::Endpoint>(map::SLOTS, MapType::Hash, common::MAX_SLOTS),
    shape::<Prefix<common::Range>, u32>(map::RANGES, MapType::LpmTrie, common::MAX_RANGES),
    shape::<common::HoldersKey, common::Holders>(map::HOLDERS, MapType::Hash, common::MAX_HELD),
    shape::<common::FragmentKey, common::Fragment>(
        map::FRAGMENTS,
        MapType::LruHash,
        common::MAX_FRAGMENTS,
    ),
    shape::<u32, u64>(map::VERDICTS, MapType::PerCpuArray, common::Verdict::COUNT),
    shape::<u32, common::Settings>(map::SETTINGS, MapType::Array, 1),
    shape::<common::VipKey, guard::Tenant>(guard::map::TENANTS, MapType::Hash, guard::MAX_TENANTS),
    shape::<u32, guard::Gateway>(guard::map::GATEWAYS, MapType::Array, guard::MAX_GATEWAYS),
    shape::<Prefix<[u8; 16]>, u32>(guard::map::INSIDE, MapType::LpmTrie, guard::MAX_INSIDE),
    shape::<u32, u32>(guard::map::OUTSIDE, MapType::Hash, guard::MAX_OUTSIDE),
    shape::<u32, guard::Marks>(guard::map::MARKS, MapType::Array, 1),
    shape::<guard::Pair, u64>(guard::map::LED, MapType::LruHash, guard::MAX_LED),
    shape::<u32, u64>(
        guard::map::GUARDED,
        MapType::PerCpuArray,
        guard::Guarded::COUNT,
    ),
    shape::<u32, u64>(guard::map::UNLED, MapType::PerCpuArray, guard::MAX_GATEWAYS),
];
