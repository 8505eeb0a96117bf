//! Flows that a node delivers, flows that are held elsewhere, and fragments.

use crate::VipKey;

/// A TCP flow to a virtual IP.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// The client, as in a [`VipKey`].
    pub client: [u8; 16],
    /// The virtual IP.
    pub vip: VipKey,
    /// The client's port, in the host's order.
    pub client_port: u16,
    /// The port on the virtual IP, in the host's order.
    pub port: u16,
}

/// What is known of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// When its client was last heard: nanoseconds of the monotonic clock.
    pub seen: u64,
    /// A [`flow_state`].
    pub state: u32,
    /// Zero.
    pub zero: u32,
}

/// The states of a [`Flow`], as far as its life here goes.
pub mod flow_state {
    /// In use.
    pub const ESTABLISHED: u32 = 1;
    /// Its client has sent FIN or RST.
    pub const CLOSING: u32 = 2;
}

/// How many flows a node keeps.
pub const MAX_FLOWS: u32 = 262_144;
/// How many flows whose SYN was delivered and that have not been heard since a node keeps.
pub const MAX_HALF_OPEN: u32 = 16_384;

/// A bucket of a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HoldersKey {
    /// The port's number.
    pub port: u32,
    /// The bucket.
    pub bucket: u32,
}

/// How many holders of a bucket are named; also how often a frame is handed on at most.
pub const MAX_HOLDERS: usize = 4;
/// How many buckets with holders the map has room for.
pub const MAX_HELD: u32 = 131_072;

/// The nodes that hold flows of a bucket which is another's now, in the order of their seeds; 0 for none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// Their numbers.
    pub nodes: [u16; MAX_HOLDERS],
}

/// A datagram in fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FragmentKey {
    /// The client.
    pub client: [u8; 16],
    /// The virtual IP.
    pub vip: VipKey,
    /// Its identification.
    pub id: u32,
    /// The protocol's number.
    pub protocol: u32,
}

/// What its first fragment said.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// When it came: nanoseconds of the monotonic clock.
    pub seen: u64,
    /// The client's port, in the host's order.
    pub client_port: u16,
    /// The port on the virtual IP, in the host's order.
    pub port: u16,
    /// Zero.
    pub zero: u32,
}

/// For how long an identification stands for the same datagram, in nanoseconds: as long as Linux waits for its
/// fragments (30 s).
pub const FRAGMENT_LIFE: u64 = 30_000_000_000;
/// How many datagrams in fragments are remembered.
pub const MAX_FRAGMENTS: u32 = 4_096;
