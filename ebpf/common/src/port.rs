//! Ports of virtual IPs, the nodes that serve them, and which node's frames are whose.

use crate::VipKey;
use crate::rendezvous::{Bid, cost};

/// How many nodes a [`Port`] lists itself. What is spread over more is looked up, page by page.
pub const NARROW: usize = 8;
/// How many earlier spreads of a port are remembered.
pub const MAX_HISTORY: usize = 4;
/// How many ports the maps hold.
pub const MAX_PORTS: u32 = 65_536;
/// How many nodes the maps hold, times interfaces; number 0 is nobody.
pub const MAX_NODES: u32 = 4_096;
/// How many networks behind nodes the maps hold.
pub const MAX_ROUTED: u32 = 16_384;
/// How many slots the maps hold.
pub const MAX_SLOTS: u32 = 262_144;
/// How many source ranges the maps hold.
pub const MAX_RANGES: u32 = 65_536;
/// How many pages of wide spreads the maps hold: 64 tables.
pub const MAX_WIDE: u32 = 131_072;

/// A port of a virtual IP.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    /// The address.
    pub vip: VipKey,
    /// The port, in the host's order.
    pub port: u16,
    /// The protocol's number (6, 17 or 132).
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
}

/// A node that serves a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Its number, 0 for none.
    pub node: u16,
    /// How many servable endpoints it has, in lowest terms; not 0.
    pub weight: u16,
}

/// How a port's flows are spread.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// How many members there are; [`Spread::WIDE`] when they are in the pages of `table`.
    pub count: u16,
    /// [`port_flag`]s.
    pub flags: u16,
    /// Which pages, if they are.
    pub table: u32,
    /// The members, the first `count` of them.
    pub members: [Member; NARROW],
}

impl Spread {
    /// In place of a count: the members are in the pages.
    pub const WIDE: u16 = u16::MAX;
}

/// What the programs know of a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Port {
    /// By what its flows are known in the maps of earlier holders, of slots and of source ranges.
    pub number: u32,
    /// How many slots this node's endpoints have; where it does not translate itself, one if there are any.
    pub slots: u32,
    /// How its flows are spread.
    pub spread: Spread,
}

/// Flags of a [`Port`]'s spread.
pub mod port_flag {
    /// All of a client's flows go to one node: `sessionAffinity: ClientIP`.
    pub const AFFINITY: u16 = 1;
    /// UDP flows are told apart by their ports too: such a Service never fragments.
    pub const UDP_PORTS: u16 = 2;
    /// The endpoints are processes of nodes, which this node's packet filter delivers to.
    pub const HOST: u16 = 4;
    /// Some node holds flows of buckets that are another's now: ask the maps of earlier holders.
    pub const HELD: u16 = 8;
    /// This node's program translates to the endpoint, not kube-proxy.
    pub const NATIVE: u16 = 16;
    /// Only clients of the source ranges are served.
    pub const RANGES: u16 = 32;
}

/// Names a slot: new flows fall into a port's slots evenly, and each belongs to one of this node's endpoints.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotKey {
    /// The port's number.
    pub port: u32,
    /// The slot.
    pub slot: u32,
}

/// A network whose clients a port serves, as the data of a longest-prefix match: the port's number in network order,
/// then the address as in a [`VipKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Range {
    /// The port's number, in network order.
    pub port: [u8; 4],
    /// The address.
    pub address: [u8; 16],
}

/// Earlier spreads of a port, the latest first: whom to ask before the holders have spoken.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The spreads; a count of 0 ends them.
    pub spreads: [Spread; MAX_HISTORY],
}

/// Names a page of a wide spread.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WideKey {
    /// The table.
    pub table: u32,
    /// The bucket divided by [`WIDE_PAGE`].
    pub page: u32,
}

/// How many buckets a page has.
pub const WIDE_PAGE: usize = 64;

/// A page of a wide spread: the first and second node of each bucket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WidePage(pub [[u16; 2]; WIDE_PAGE]);

/// What the programs know of a node at one of this node's interfaces, at the place of its number. A node that is
/// heard at two interfaces has two numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// What its draws begin with.
    pub seed: u64,
    /// Where it is reached when it is not on the segment, as in a [`VipKey`].
    pub address: [u8; 16],
    /// The interface by which it is reached.
    pub interface: u32,
    /// Its Ethernet address there.
    pub mac: [u8; 6],
    /// [`node_flag`]s.
    pub flags: u16,
    /// Zero.
    pub zero: u32,
}

/// Flags of a [`Node`].
pub mod node_flag {
    /// Its data path answers.
    pub const ALIVE: u16 = 1;
    /// It may be gone: new flows avoid it.
    pub const SUSPECTED: u16 = 2;
    /// It is this node.
    pub const HERE: u16 = 4;
    /// It is heard on the interface: frames reach it by its MAC.
    pub const ON_SEGMENT: u16 = 8;
    /// It takes what is handed on: it keeps flows itself.
    pub const STEERS: u16 = 16;
    /// It is reached by the tunnel, which the interface is, at its address.
    pub const TUNNEL: u16 = 32;
}

impl Node {
    /// Its bid for a bucket.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    pub const fn bid(&self, bucket: u32, weight: u16) -> Bid {
        Bid {
            cost: cost(self.seed, bucket),
            weight: weight as u32,
            seed: self.seed,
        }
    }
}

/// The Ethernet address, at the tunnel, of the node with this seed: a locally administered one.
#[inline(always)]
#[allow(clippy::inline_always)] // The verifier sees straight code.
pub const fn tunnel_mac(seed: u64) -> [u8; 6] {
    let bytes = seed.to_be_bytes();
    [2, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]]
}

/// An Ethernet address at an interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerKey {
    /// The interface.
    pub interface: u32,
    /// The address.
    pub mac: [u8; 6],
    /// Zero.
    pub zero: [u8; 2],
}

/// The node behind an Ethernet address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number.
    pub node: u32,
}

/// How long the prefix of a [`Routed`] or a [`Range`] is, in bits, for a network of an address as in a [`VipKey`].
pub const fn routed_prefix(network: u32) -> u32 {
    32 + network
}

/// A source behind a node, as the data of a longest-prefix match: the node's number in network order, then the
/// address as in a [`VipKey`]. What a node sends from such an address is a client's, not steered.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Routed {
    /// The node's number, in network order.
    pub node: [u8; 4],
    /// The address.
    pub address: [u8; 16],
}

/// How many interfaces can have a program at their driver.
pub const MAX_DRIVERS: u32 = 64;

/// An interface at whose driver a program is: the driver does not say which frames are for this host.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Driver {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Zero.
    pub zero: [u8; 2],
}
