//! What a gateway knows besides its bindings: whose packets it takes, where they go, and what it counts.

use super::binding::{Times, V6};
use super::pace::Pace;

/// How many addresses of pods a gateway's maps hold.
pub const MAX_SOURCES: u32 = 65_536;
/// How many egress addresses.
pub const MAX_EGRESS: u32 = 16_384;
/// How many policies; number 0 is nobody's.
pub const MAX_POLICIES: u32 = 4_096;
/// How many pods' nodes, times interfaces; number 0 is this node.
pub const MAX_GATE_NODES: u32 = 4_096;
/// How many next hops; number 0 is none.
pub const MAX_HOPS: u32 = 256;
/// How many networks.
pub const MAX_GATE_ROUTES: u32 = 16_384;
/// How many bindings, of each family, unless the user says otherwise.
pub const MAX_BINDINGS: u32 = 262_144;
/// How many remote addresses and ports may have a crowd.
pub const MAX_CROWDS: u32 = 64;
/// Of how many pods and remotes the last ports are remembered.
pub const MAX_RETURNED: u32 = 4_096;

/// A pod's address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The address that it leaves by, as in a [`VipKey`](crate::VipKey).
    pub egress: [u8; 16],
    /// The number of its policy.
    pub policy: u16,
    /// The number of its node, 0 if that is this one.
    pub node: u16,
    /// [`source_flag`]s.
    pub flags: u16,
    /// The number of its gateway, as a node, if that is another.
    pub gateway: u16,
    /// Tells it from another pod that had the address before.
    pub identity: u64,
}

/// Flags of a [`Source`].
pub mod source_flag {
    /// This node is its gateway.
    pub const HERE: u16 = 1;
    /// It runs on this node.
    pub const LOCAL: u16 = 2;
    /// What it goes on with unknown to this node it began by the address that it has.
    pub const RESUMES: u16 = 4;
}

/// A policy.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What its name hashes to: by that a later process knows the number.
    pub name: u64,
    /// The interface by which its packets leave; 0 while this node is not its gateway.
    pub uplink: u32,
    /// Most ports of its pods together, 0 for no limit.
    pub ports: u32,
    /// Most ports of a pod to one remote address, port and protocol, 0 for no limit.
    pub ports_per_pod: u32,
    /// The interface by which its packets leave or, if this node would take over, would: copies go by that. 0 for none.
    pub link: u32,
    /// How fast its pods may be together, in each direction.
    pub pace: Pace,
    /// [`policy_flag`]s.
    pub flags: u32,
    /// Nothing.
    pub zero: u32,
}

/// Flags of a [`Policy`].
pub mod policy_flag {
    /// It is for VIPs of this cluster too, but its own.
    pub const HAIRPIN: u32 = 1;
}

/// What this node is to an egress address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EgressState {
    /// [`egress_flag`]s.
    pub flags: u32,
    /// Since when it leads it, in [`ticks`](super::binding::ticks), if it does.
    pub since: u32,
    /// The policy that copies of bindings there are of, if their pods leave by another address by now; 0 if none is known.
    pub policy: u32,
}

/// Flags of an [`EgressState`].
pub mod egress_flag {
    /// Pods leave by it here.
    pub const HERE: u32 = 1;
    /// This node leads it: what nobody hears of counts from then on, and nobody else's word on its bindings does.
    pub const LED: u32 = 2;
    /// This node would take it over: what is bound there are copies, and stay.
    pub const STANDBY: u32 = 4;
    /// No bindings are made.
    pub const FROZEN: u32 = 8;
    /// Nothing is translated.
    pub const SILENT: u32 = 16;
}

/// For how many seconds after a take-over a pod's packet in the middle of a connection may make its binding anew.
pub const RESUME: u32 = 60;

/// Another node, at one of this node's interfaces.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateNode {
    /// What its name hashes to, with the interface.
    pub name: u64,
    /// The interface by which it is reached.
    pub interface: u32,
    /// The longest IP packet that it is sent there, in bytes.
    pub mtu: u32,
    /// Bits that are set in the mark of what it sends to a pod here as its gateway; 0 for none.
    pub mark: u32,
    /// Its Ethernet address there.
    pub mac: [u8; 6],
    /// This node's.
    pub own: [u8; 6],
    /// Where it is reached if the interface is the tunnel, as in a [`VipKey`](crate::VipKey); zeroes if it is not.
    pub address: [u8; 16],
}

/// Where packets to remotes go.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// The interface.
    pub interface: u32,
    /// The longest IP packet that goes there, in bytes.
    pub mtu: u32,
    /// The router, in network order; 0 if the remotes are on the segment.
    pub via_v4: u32,
    /// This node's address there, in network order: it signs what is said to pods.
    pub own_v4: u32,
    /// The IPv6 router; zeroes if the remotes are on the segment.
    pub via_v6: [u8; 16],
    /// This node's IPv6 address there.
    pub own_v6: [u8; 16],
    /// This node's Ethernet address there.
    pub mac: [u8; 6],
    /// Nothing.
    pub zero: [u8; 2],
}

/// Where frames go to whose address this node itself has, as far as others know: the nearest bridge's address, which no bridge
/// forwards (IEEE 802.1Q, table 8-1).
pub const NOWHERE: [u8; 6] = [0x01, 0x80, 0xc2, 0, 0, 0x0e];

/// A network as seen from an uplink, as the data of a longest-prefix match. Its value is the number of a hop, 0 for what
/// is the cluster's own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GateRoute {
    /// The interface, in network order.
    pub uplink: [u8; 4],
    /// The address, as in a [`VipKey`](crate::VipKey).
    pub address: [u8; 16],
}

/// What holds for the gateway as a whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateSettings {
    /// Idle times.
    pub times: Times,
    /// The bits of the mark that this node's pods' packets carry that are to leave by an address of their own; 0, if all
    /// of tenants are.
    pub mark: u32,
    /// Most ICMP errors of our own in a second, on each CPU.
    pub errors: u32,
    /// [`settings_flag`]s.
    pub flags: u32,
}

/// Flags of [`GateSettings`].
pub mod settings_flag {
    /// User space is told what happens to bindings.
    pub const TELL: u32 = 1;
    /// Some egress address is [`SILENT`](super::egress_flag::SILENT).
    pub const SILENT: u32 = 2;
}

/// How many words each side of a [`Filter`] has.
pub const FILTER_WORDS: usize = 1024;

/// Which addresses may be of interest, by their hash: most frames are not, and that is told without a look into a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Sources: pods.
    pub pods: [u64; FILTER_WORDS],
    /// Destinations: egress addresses, and pods of this node.
    pub destinations: [u64; FILTER_WORDS],
}

impl Filter {
    /// Nobody.
    pub const EMPTY: Self = Self {
        pods: [0; FILTER_WORDS],
        destinations: [0; FILTER_WORDS],
    };

    /// The word and the bit of an address: as in a [`VipKey`](crate::VipKey), in words as they lie in memory.
    #[inline(always)]
    #[allow(clippy::inline_always, clippy::cast_possible_truncation)] // The verifier sees straight code; below 1024.
    pub const fn place(address: V6) -> (usize, u64) {
        let [a, b, c, d] = address;
        let high = (a as u64) << 32 | b as u64;
        let low = (c as u64) << 32 | d as u64;
        let mixed = (high.rotate_left(17) ^ low).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let place = (mixed >> 48) as u32;
        (
            (place / 64) as usize & (FILTER_WORDS - 1),
            1 << (place & 63),
        )
    }
}

/// What was done with packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Reason {
    /// Translated, on its way to a remote.
    Out,
    /// Translated back, on its way to a pod.
    In,
    /// It made a binding.
    Bound,
    /// A binding has ended.
    Ended,
    /// Dropped: to an egress address, of no flow that is known.
    Unbound,
    /// Dropped: of a pod, in the middle of a TCP connection that is not known, or an error about one.
    Unknown,
    /// Refused: the policy's or the pod's ports are in use.
    Quota,
    /// Refused: all ports of the egress address for that remote are in use or rest.
    NoPort,
    /// Refused: the maps have no room.
    NoRoom,
    /// Dropped: a pod's address that did not come from the pod's node.
    Forged,
    /// Dropped: a fragment whose first was not seen.
    StrayFragment,
    /// Dropped: a protocol that is not translated, or a packet that cannot be read.
    Unreadable,
    /// Dropped: there is no way to the remote or to the pod's node.
    NoWay,
    /// Dropped: of a flow that is known, but this node is not its gateway any more, or not yet.
    NotGateway,
    /// Its TTL is over.
    Expired,
    /// It is too big for its way.
    TooBig,
    /// An answer of our own to one of the above.
    Answered,
    /// Not answered: too many answers.
    Limited,
    /// Dropped: it would have made a binding, while this node may make none.
    Frozen,
    /// Dropped: this node may not translate, since it may not be the gateway any more.
    Silent,
    /// It made its binding anew, in the middle of a connection, after a take-over.
    Resumed,
    /// A copy of another gateway's binding was put in.
    Copied,
    /// A flow was cut, since another gateway has given its port, or it another one; or a copy was not put in for that.
    Cut,
    /// Something that happened to a binding could not be told: user space was too far behind.
    Untold,
    /// Dropped: its policy's pods have sent, or were sent, as much as they may.
    Bandwidth,
}

impl Reason {
    /// All, each at the place of its number.
    pub const ALL: [Self; 25] = [
        Self::Out,
        Self::In,
        Self::Bound,
        Self::Ended,
        Self::Unbound,
        Self::Unknown,
        Self::Quota,
        Self::NoPort,
        Self::NoRoom,
        Self::Forged,
        Self::StrayFragment,
        Self::Unreadable,
        Self::NoWay,
        Self::NotGateway,
        Self::Expired,
        Self::TooBig,
        Self::Answered,
        Self::Limited,
        Self::Frozen,
        Self::Silent,
        Self::Resumed,
        Self::Copied,
        Self::Cut,
        Self::Untold,
        Self::Bandwidth,
    ];

    /// How many there are.
    #[allow(clippy::cast_possible_truncation)] // A few.
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// A word for it, for metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
            Self::Bound => "bound",
            Self::Ended => "ended",
            Self::Unbound => "unbound",
            Self::Unknown => "unknown",
            Self::Quota => "quota",
            Self::NoPort => "no-port",
            Self::NoRoom => "no-room",
            Self::Forged => "forged",
            Self::StrayFragment => "stray-fragment",
            Self::Unreadable => "unreadable",
            Self::NoWay => "no-way",
            Self::NotGateway => "not-gateway",
            Self::Expired => "expired",
            Self::TooBig => "too-big",
            Self::Answered => "answered",
            Self::Limited => "limited",
            Self::Frozen => "frozen",
            Self::Silent => "silent",
            Self::Resumed => "resumed",
            Self::Copied => "copied",
            Self::Cut => "cut",
            Self::Untold => "untold",
            Self::Bandwidth => "bandwidth",
        }
    }
}

/// What a CPU has counted of a policy's packets, at the place of the policy's number.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyCount {
    /// Translated, on their way to remotes. What the kernel handles as one counts as one.
    pub out_packets: u64,
    /// Bytes of them, link-layer header included.
    pub out_bytes: u64,
    /// Translated back, on their way to pods.
    pub in_packets: u64,
    /// Bytes of them, likewise.
    pub in_bytes: u64,
    /// Refused: [`Reason::Quota`].
    pub quota: u64,
    /// Refused: [`Reason::NoPort`].
    pub no_port: u64,
    /// Refused: [`Reason::NoRoom`].
    pub no_room: u64,
    /// Dropped: [`Reason::Bandwidth`].
    pub bandwidth: u64,
    /// Dropped or answered for any other reason.
    pub others: u64,
}

impl PolicyCount {
    /// One packet of so many bytes more.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    pub const fn note(&mut self, reason: u32, bytes: u32) {
        const OUT: u32 = Reason::Out as u32;
        const IN: u32 = Reason::In as u32;
        const QUOTA: u32 = Reason::Quota as u32;
        const NO_PORT: u32 = Reason::NoPort as u32;
        const NO_ROOM: u32 = Reason::NoRoom as u32;
        const BANDWIDTH: u32 = Reason::Bandwidth as u32;
        match reason {
            OUT => {
                self.out_packets += 1;
                self.out_bytes += bytes as u64;
            }
            IN => {
                self.in_packets += 1;
                self.in_bytes += bytes as u64;
            }
            QUOTA => self.quota += 1,
            NO_PORT => self.no_port += 1,
            NO_ROOM => self.no_room += 1,
            BANDWIDTH => self.bandwidth += 1,
            _ => self.others += 1,
        }
    }
}

impl core::ops::AddAssign for PolicyCount {
    fn add_assign(&mut self, other: Self) {
        self.out_packets += other.out_packets;
        self.out_bytes += other.out_bytes;
        self.in_packets += other.in_packets;
        self.in_bytes += other.in_bytes;
        self.quota += other.quota;
        self.no_port += other.no_port;
        self.no_room += other.no_room;
        self.bandwidth += other.bandwidth;
        self.others += other.others;
    }
}

/// What the program that ends bindings is told: keys of the map *in*, behind an Ethernet header that means nothing.
pub mod keep {
    /// Where it says how many keys there are (one byte), and of which family (one byte: 4 or 6, and
    /// [`AT_ONCE`] or [`COUNT`]).
    pub const HEAD: usize = 14;
    /// Where the keys begin.
    pub const KEYS: usize = 16;
    /// How many there are at most.
    pub const MOST: usize = 64;
    /// In the byte of the family: they end though they are in use.
    pub const AT_ONCE: u8 = 0x80;
    /// Likewise: they do not end, and are counted for their pods' quotas.
    pub const COUNT: u8 = 0x40;
    /// What is besides in that byte.
    pub const FLAGS: u8 = AT_ONCE | COUNT;
}

/// The names of a gateway's maps.
pub mod map {
    /// From an IPv4 [`Key`](super::super::binding::Key) of what pods send to its
    /// [`Binding`](super::super::binding::Binding).
    pub const OUT_V4: &str = "GATE_OUT_V4";
    /// The same of what remotes send.
    pub const IN_V4: &str = "GATE_IN_V4";
    /// The same for IPv6.
    pub const OUT_V6: &str = "GATE_OUT_V6";
    /// The same of what remotes send.
    pub const IN_V6: &str = "GATE_IN_V6";
    /// How many ports a pod has in use, by the target of its keys, where its policy limits that.
    pub const PODS_V4: &str = "GATE_PODS_V4";
    /// The same for IPv6.
    pub const PODS_V6: &str = "GATE_PODS_V6";
    /// From the target of the keys of what remotes send to a [`Crowd`](super::super::ports::Crowd).
    pub const CROWDS_V4: &str = "GATE_CROWDS_V4";
    /// The same for IPv6.
    pub const CROWDS_V6: &str = "GATE_CROWDS_V6";
    /// From the target of the keys of what pods send to [`Returned`](super::super::ports::Returned).
    pub const LAST_V4: &str = "GATE_LAST_V4";
    /// The same for IPv6.
    pub const LAST_V6: &str = "GATE_LAST_V6";
    /// From a [`VipKey`](crate::VipKey) to [`Source`](super::Source).
    pub const SOURCES: &str = "GATE_SOURCES";
    /// From an egress address, as a [`VipKey`](crate::VipKey), to its [`EgressState`](super::EgressState).
    pub const EGRESS: &str = "GATE_EGRESS";
    /// The longest prefixes of [`GateRoute`](super::GateRoute).
    pub const ROUTES: &str = "GATE_ROUTES";
    /// [`Hop`](super::Hop) at the place of its number.
    pub const HOPS: &str = "GATE_HOPS";
    /// [`GateNode`](super::GateNode) at the place of its number.
    pub const NODES: &str = "GATE_NODES";
    /// [`Policy`](super::Policy) at the place of its number.
    pub const POLICIES: &str = "GATE_POLICIES";
    /// How many ports a policy's pods have in use, at the place of its number.
    pub const USED: &str = "GATE_USED";
    /// How far ahead a policy is, out and in, by [`Pace`](super::Pace), at twice the place of its number and the one
    /// after.
    pub const PACED: &str = "GATE_PACED";
    /// One [`Filter`](super::Filter).
    pub const FILTER: &str = "GATE_FILTER";
    /// One [`GateSettings`](super::GateSettings).
    pub const SETTINGS: &str = "GATE_SETTINGS";
    /// How many packets met each fate, by CPU, at the place of a [`Reason`](super::Reason).
    pub const REASONS: &str = "GATE_REASONS";
    /// [`Event`](super::super::copies::Event)s on their way to user space. Not pinned: a process that begins has missed some.
    pub const CHANGES: &str = "GATE_CHANGES";
    /// [`PolicyCount`](super::PolicyCount)s, by CPU, at the place of a policy's number.
    pub const COUNTS: &str = "GATE_COUNTS";
    /// The same of each pod whose gateway this node is or would be, by its address, as in a [`VipKey`](crate::VipKey).
    pub const POD_COUNTS: &str = "GATE_POD_COUNTS";
}

#[cfg(test)]
mod tests {
    use super::super::binding::Address as _;
    use super::*;

    /// The sums of the fields': there is no padding.
    #[test]
    fn types_have_no_padding() {
        let sizes = [
            size_of::<Source>(),
            size_of::<Policy>(),
            size_of::<GateNode>(),
            size_of::<Hop>(),
            size_of::<GateRoute>(),
            size_of::<GateSettings>(),
            size_of::<EgressState>(),
            size_of::<PolicyCount>(),
        ];
        let expected = [
            16 + 4 * 2 + 8,
            8 + 4 * 4 + (8 + 8) + 4 + 4,
            8 + 4 + 4 + 4 + 6 + 6 + 16,
            4 * 4 + 16 + 16 + 6 + 2,
            4 + 16,
            7 * 4 + 4 + 4 + 4,
            4 + 4 + 4,
            9 * 8,
        ];
        assert_eq!(sizes, expected);
    }

    #[test]
    fn reasons_are_at_their_places() {
        for (place, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
        }
    }

    /// Ten thousand pods leave most of a filter empty.
    #[test]
    fn the_filter_tells_apart() {
        let mut filter = Filter::EMPTY;
        for pod in 0..10_000_u32 {
            let [a, b, c, d] = (0x0af4_0000 + pod * 3).to_be_bytes();
            let (word, bit) = Filter::place(V6::of(&crate::VipKey::v4([a, b, c, d]).0));
            filter.pods[word] |= bit;
        }
        let set: u32 = filter.pods.iter().map(|word| word.count_ones()).sum();
        // A random one would be 9 276.
        assert!((9_000..=10_000).contains(&set), "{set}");
    }
}
