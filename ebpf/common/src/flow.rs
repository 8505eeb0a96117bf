//! Flows that a node delivers, flows that are held elsewhere, and fragments.

use crate::VipKey;

/// A flow to a virtual IP, by the addresses and ports of what its client sends. In the maps of answers: by those of
/// what the endpoint sends, the endpoint in the client's place and the client in that of the virtual IP.
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
    /// The protocol's number (6, 17 or 132).
    pub protocol: u32,
}

impl FlowKey {
    /// By what the answers of this endpoint to the flow are known.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    #[must_use]
    pub const fn answer(&self, endpoint: &Endpoint) -> Self {
        Self {
            client: endpoint.address,
            vip: VipKey(self.client),
            client_port: endpoint.port,
            port: self.client_port,
            protocol: self.protocol,
        }
    }
}

/// An address and a port: what a flow is translated to, or back to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// The address, as in a [`VipKey`].
    pub address: [u8; 16],
    /// The port, in the host's order; 0 for no endpoint.
    pub port: u16,
    /// Zero.
    pub zero: u16,
}

/// What is known of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// When its client was last heard: nanoseconds of the monotonic clock.
    pub seen: u64,
    /// A [`flow_state`].
    pub state: u32,
    /// To whom it is translated; nobody, if that is kube-proxy's to do.
    pub endpoint: Endpoint,
    /// The highest sequence number that its client was heard with; if it is closing, what would come after the end.
    pub sequence: u32,
    /// Whether there is one: 0, if its client was not heard since somebody else entered it.
    pub heard: u32,
}

impl Flow {
    /// How far apart what is of the flow is at most: what was lost is sent again, and a window is in flight.
    const NEAR: u32 = 1 << 22;
    /// How far ahead of an end: what goes on is heard packet by packet, none longer than this. Linux opens the next connection
    /// from the same port 65 537 after the end of the last.
    const BEYOND: u32 = 65_536;

    /// Whether a client that is heard with this sequence number has gone on.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    #[must_use]
    pub const fn is_ahead(&self, sequence: u32) -> bool {
        let on = sequence.wrapping_sub(self.sequence);
        self.heard == 0 || (0 < on && on <= Self::NEAR)
    }

    /// Whether what comes with this sequence number is near to what was heard: what is not was sent for another flow with
    /// the same addresses and ports, or by somebody who guesses.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub const fn is_near(&self, sequence: u32) -> bool {
        self.is_within(sequence, Self::NEAR)
    }

    /// Whether a packet of the client's with this sequence number may be of this flow, which is closing, and not of a later
    /// one with the same addresses and ports.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub const fn may_end_with(&self, sequence: u32) -> bool {
        self.is_within(sequence, Self::BEYOND)
    }

    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    const fn is_within(&self, sequence: u32, ahead: u32) -> bool {
        let on = sequence.wrapping_sub(self.sequence);
        self.heard == 0 || on.wrapping_add(Self::NEAR) <= Self::NEAR + ahead
    }
}

/// What is known of the answers to a flow that is translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// When the endpoint was last heard: nanoseconds of the monotonic clock.
    pub seen: u64,
    /// A [`flow_state`].
    pub state: u32,
    /// The virtual IP and its port, which the answers carry as their source.
    pub vip: Endpoint,
}

/// The states of a [`Flow`] and of its [`Answer`]s, as far as its life here goes.
pub mod flow_state {
    /// In use.
    pub const ESTABLISHED: u32 = 1;
    /// Its sender has sent FIN or RST.
    pub const CLOSING: u32 = 2;
    /// In use before this table was; one of several flows that the endpoint's answers may belong to. The client's
    /// next packet tells.
    pub const GUESSED: u32 = 3;
}

/// How many flows a node keeps.
pub const MAX_FLOWS: u32 = 262_144;
/// How many flows whose SYN was delivered and that have not been heard since a node keeps.
pub const MAX_HALF_OPEN: u32 = 16_384;
/// How many flows of protocols without connections a node keeps, where it translates them.
pub const MAX_DATAGRAMS: u32 = 65_536;
/// For how long such a flow stays with its endpoint when it is not heard, in nanoseconds: `nf_conntrack`'s for UDP
/// streams.
pub const DATAGRAM_LIFE: u64 = 120_000_000_000;

/// A bucket of a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HoldersKey {
    /// The port's number.
    pub port: u32,
    /// The bucket.
    pub bucket: u32,
}

/// How many holders of a bucket are named.
pub const MAX_HOLDERS: usize = 4;
/// How many nodes are asked for a flow at most.
pub const MAX_ASKED: u8 = 6;
/// How many buckets with holders the map has room for.
pub const MAX_HELD: u32 = 131_072;

/// The nodes that hold flows of a bucket which is another's now, those that could be asked before the others; 0 for none.
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
