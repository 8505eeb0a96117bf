//! What the pinned maps of a gateway look like.

use aya::maps::MapType;
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::{Binding, Key, V4, V6};
use landfall_ebpf_common::egress::gateway::{self as common, map};
use landfall_ebpf_common::egress::ports::{Crowd, Returned};

use super::super::layout::{Prefix, Shape, shape};

/// Every map of a gateway that outlives the process. The first six have room for as many as the user says.
pub(in super::super) const SHAPES: [Shape; 23] = [
    shape::<Key<V4>, Binding<V4>>(map::OUT_V4, MapType::Hash, common::MAX_BINDINGS),
    shape::<Key<V4>, Binding<V4>>(map::IN_V4, MapType::Hash, common::MAX_BINDINGS),
    shape::<Key<V6>, Binding<V6>>(map::OUT_V6, MapType::Hash, common::MAX_BINDINGS),
    shape::<Key<V6>, Binding<V6>>(map::IN_V6, MapType::Hash, common::MAX_BINDINGS),
    shape::<Key<V4>, u64>(map::PODS_V4, MapType::Hash, common::MAX_BINDINGS),
    shape::<Key<V6>, u64>(map::PODS_V6, MapType::Hash, common::MAX_BINDINGS),
    shape::<Key<V4>, Crowd>(map::CROWDS_V4, MapType::Hash, common::MAX_CROWDS),
    shape::<Key<V6>, Crowd>(map::CROWDS_V6, MapType::Hash, common::MAX_CROWDS),
    shape::<Key<V4>, Returned>(map::LAST_V4, MapType::LruHash, common::MAX_RETURNED),
    shape::<Key<V6>, Returned>(map::LAST_V6, MapType::LruHash, common::MAX_RETURNED),
    shape::<VipKey, common::Source>(map::SOURCES, MapType::Hash, common::MAX_SOURCES),
    shape::<VipKey, common::EgressState>(map::EGRESS, MapType::Hash, common::MAX_EGRESS),
    shape::<Prefix<common::GateRoute>, u32>(map::ROUTES, MapType::LpmTrie, common::MAX_GATE_ROUTES),
    shape::<u32, common::Hop>(map::HOPS, MapType::Array, common::MAX_HOPS),
    shape::<u32, common::GateNode>(map::NODES, MapType::Array, common::MAX_GATE_NODES),
    shape::<u32, common::Policy>(map::POLICIES, MapType::Array, common::MAX_POLICIES),
    shape::<u32, u64>(map::USED, MapType::Array, common::MAX_POLICIES),
    shape::<u32, u64>(map::PACED, MapType::Array, 2 * common::MAX_POLICIES),
    shape::<u32, common::Filter>(map::FILTER, MapType::Array, 1),
    shape::<u32, common::GateSettings>(map::SETTINGS, MapType::Array, 1),
    shape::<u32, u64>(map::REASONS, MapType::PerCpuArray, common::Reason::COUNT),
    shape::<u32, common::PolicyCount>(map::COUNTS, MapType::PerCpuArray, common::MAX_POLICIES),
    shape::<[u8; 16], common::PolicyCount>(
        map::POD_COUNTS,
        MapType::PerCpuHash,
        common::MAX_SOURCES,
    ),
];

/// How many of them have room for as many as the user says.
pub(super) const SIZED: usize = 6;
