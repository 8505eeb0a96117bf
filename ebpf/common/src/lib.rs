//! What Landfall's eBPF programs and the speaker share: map types, and how a flow's node is chosen.
//!
//! Every map type is `#[repr(C)]` without padding: the two sides are compiled for different targets, and maps
//! outlive the process that made them. Whoever changes the size or the meaning of a type, or the shape of a
//! map, raises [`LAYOUT`]: what is pinned under another number is never read.
#![no_std]

mod address;
#[cfg(feature = "user")]
pub mod batch;
#[cfg(feature = "user")]
pub mod constant;
pub mod echo;
pub mod egress;
mod flow;
pub mod handing_on;
#[cfg(feature = "user")]
pub mod link;
#[cfg(feature = "user")]
pub mod offload;
mod port;
pub mod rendezvous;
pub mod sctp;
#[cfg(feature = "user")]
mod sys;
#[cfg(feature = "user")]
pub mod tcx;

pub use address::{MAX_VIPS, Vip, VipCount, VipKey, vip_flag};
pub use flow::{
    Answer, DATAGRAM_LIFE, Endpoint, FRAGMENT_LIFE, Flow, FlowKey, Fragment, FragmentKey, Holders,
    HoldersKey, MAX_ASKED, MAX_DATAGRAMS, MAX_FLOWS, MAX_FRAGMENTS, MAX_HALF_OPEN, MAX_HELD,
    MAX_HOLDERS, flow_state,
};
pub use port::{
    Driver, History, MAX_DRIVERS, MAX_HISTORY, MAX_NODES, MAX_PORTS, MAX_RANGES, MAX_ROUTED,
    MAX_SLOTS, MAX_WIDE, Member, NARROW, Node, Peer, PeerKey, Port, PortKey, Range, Routed,
    SlotKey, Spread, WIDE_PAGE, WideKey, WidePage, node_flag, port_flag, routed_prefix, tunnel_mac,
};

/// The number of the map layout; part of the path under which maps are pinned.
pub const LAYOUT: u32 = 11;

/// The name of the program for the uplinks' ingress.
pub const UPLINK_INGRESS: &str = "landfall_uplink";
/// The name of the program for the uplinks' egress.
pub const UPLINK_EGRESS: &str = "landfall_answers";
/// The name of the program for the tunnel's ingress.
pub const TUNNEL_INGRESS: &str = "landfall_tunnel";
/// The network identifier of the tunnel (VXLAN, RFC 7348): "LF".
pub const TUNNEL_ID: u32 = 0x4c46;
/// The name of the program for the uplinks' drivers.
pub const UPLINK_DRIVER: &str = "landfall_uplink_xdp";

/// The name of a gateway's program for the ingress of uplinks.
pub const GATEWAY_INGRESS: &str = "landfall_gateway_in";
/// The name of the program for the egress of uplinks of nodes that have pods with addresses of their own.
pub const GATEWAY_EGRESS: &str = "landfall_gateway_out";
/// The name of the program that ends bindings. It is at no interface.
pub const GATEWAY_KEEP: &str = "landfall_gateway_keep";
/// The name of the program that puts copies of bindings in and takes them out. It is at no interface.
pub const GATEWAY_COPY: &str = "landfall_gateway_copy";

/// What holds for the node as a whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What this node's draws begin with; 0 until it is known.
    pub seed: u64,
    /// What is known of the flows that were there before, one of [`seeded`].
    pub seeded: u32,
    /// Bits of the packet mark that are set on what is given to an endpoint, so that the packet filter knows it; 0 for
    /// none.
    pub mark: u32,
}

/// What a node knows of the flows that were there before.
pub mod seeded {
    /// Nothing: it looks for no flow at other nodes, and delivers what comes; but what another asks about it sends back.
    pub const NOT: u32 = 0;
    /// They have been entered; but not all others have said yet which flows they hold. For a flow that it does not
    /// find it does not answer.
    pub const ENTERED: u32 = 1;
    /// The others have had the time to say it: what is not found is gone.
    pub const SETTLED: u32 = 2;
}

/// What was done with packets to VIPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Verdict {
    /// Passed up: this node serves it.
    Delivered,
    /// Sent to the node that serves it.
    Steered,
    /// Sent to a node that held its flow before.
    HandedOn,
    /// An echo request that was answered.
    Echoed,
    /// Passed up: no port, no endpoint, or a kind of packet that is not steered.
    Unserved,
    /// Passed up: a fragment whose first was not seen.
    StrayFragment,
    /// Dropped: it could not be sent to the node that serves it.
    Unreachable,
    /// Dropped: its flow is unknown here, and this node does not yet know that it is to look for it.
    Waiting,
    /// A flow that was delivered and not entered: the table is full.
    FlowsFull,
    /// An answer that was given the VIP's address for source.
    Answered,
    /// Dropped: its client is in none of the Service's source ranges, it came by the tunnel from nobody known, or it
    /// resets, at the endpoint's own address, a flow that its client has with a VIP.
    Refused,
    /// Dropped: its endpoint could not tell it from another flow of the same client.
    Collided,
}

impl Verdict {
    /// All, each at the place of its number.
    pub const ALL: [Self; 12] = [
        Self::Delivered,
        Self::Steered,
        Self::HandedOn,
        Self::Echoed,
        Self::Unserved,
        Self::StrayFragment,
        Self::Unreachable,
        Self::Waiting,
        Self::FlowsFull,
        Self::Answered,
        Self::Refused,
        Self::Collided,
    ];

    /// How many there are.
    #[allow(clippy::cast_possible_truncation)] // A few.
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// A word for it, for metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Steered => "steered",
            Self::HandedOn => "handed-on",
            Self::Echoed => "echoed",
            Self::Unserved => "unserved",
            Self::StrayFragment => "stray-fragment",
            Self::Unreachable => "unreachable",
            Self::Waiting => "waiting",
            Self::FlowsFull => "flows-full",
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Collided => "collided",
        }
    }
}

/// The names of the maps.
pub mod map {
    /// From [`VipKey`](crate::VipKey) to [`Vip`](crate::Vip).
    pub const VIPS: &str = "VIPS";
    /// From the shadow of a VIP to the VIP, both as [`VipKey`](crate::VipKey)s.
    pub const SHADOWS: &str = "SHADOWS";
    /// [`VipCount`](crate::VipCount) by CPU, at the place of a VIP's number.
    pub const COUNTS: &str = "COUNTS";
    /// From [`PortKey`](crate::PortKey) to [`Port`](crate::Port).
    pub const PORTS: &str = "PORTS";
    /// From a port's number to its [`History`](crate::History).
    pub const HISTORY: &str = "HISTORY";
    /// From [`WideKey`](crate::WideKey) to [`WidePage`](crate::WidePage).
    pub const WIDE: &str = "WIDE";
    /// [`Node`](crate::Node) at the place of its number.
    pub const NODES: &str = "NODES";
    /// From [`PeerKey`](crate::PeerKey) to [`Peer`](crate::Peer).
    pub const PEERS: &str = "PEERS";
    /// The longest prefixes of [`Routed`](crate::Routed).
    pub const ROUTED: &str = "ROUTED";
    /// From [`FlowKey`](crate::FlowKey) to [`Flow`](crate::Flow).
    pub const FLOWS: &str = "FLOWS";
    /// The same, for flows whose SYN was delivered and no more.
    pub const HALF_OPEN: &str = "HALF_OPEN";
    /// From the [`FlowKey`](crate::FlowKey) of answers to [`Answer`](crate::Answer), for what is in `FLOWS` and is
    /// translated here.
    pub const ANSWERS: &str = "ANSWERS";
    /// The same for what is in `HALF_OPEN`.
    pub const HALF_ANSWERS: &str = "HALF_ANSWERS";
    /// From [`FlowKey`](crate::FlowKey) to [`Flow`](crate::Flow), for what has no connections and is translated here.
    pub const DATAGRAMS: &str = "DATAGRAMS";
    /// The answers to those.
    pub const DATAGRAM_ANSWERS: &str = "DATAGRAM_ANSWERS";
    /// From [`SlotKey`](crate::SlotKey) to [`Endpoint`](crate::Endpoint).
    pub const SLOTS: &str = "SLOTS";
    /// The longest prefixes of [`Range`](crate::Range).
    pub const RANGES: &str = "RANGES";
    /// From [`HoldersKey`](crate::HoldersKey) to [`Holders`](crate::Holders).
    pub const HOLDERS: &str = "HOLDERS";
    /// From [`FragmentKey`](crate::FragmentKey) to [`Fragment`](crate::Fragment).
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// How many packets met each fate, by CPU, at the place of a [`Verdict`](crate::Verdict).
    pub const VERDICTS: &str = "VERDICTS";
    /// One [`Settings`](crate::Settings).
    pub const SETTINGS: &str = "SETTINGS";
    /// From an interface's index to its [`Driver`](crate::Driver). It is not pinned: it goes with its program.
    pub const DRIVERS: &str = "DRIVERS";
}

// SAFETY: all are `repr(C)`, hold integers only and have no padding.
#[cfg(feature = "user")]
mod pod {
    macro_rules! pod {
        ($($name:ident),*) => {$(
            // SAFETY: as the module says; the test below holds them to it.
            unsafe impl aya::Pod for crate::$name {}
        )*};
    }
    pod!(
        VipKey,
        Vip,
        VipCount,
        PortKey,
        Port,
        History,
        WideKey,
        WidePage,
        Node,
        PeerKey,
        Peer,
        Routed,
        FlowKey,
        Flow,
        Answer,
        Endpoint,
        SlotKey,
        Range,
        HoldersKey,
        Holders,
        FragmentKey,
        Fragment,
        Settings,
        Driver
    );

    use crate::egress::{binding, gateway, ports};

    macro_rules! pod_of {
        ($($name:ty),*) => {$(
            // SAFETY: as the module says; the tests of their modules hold them to it.
            unsafe impl aya::Pod for $name {}
        )*};
    }
    pod_of!(
        binding::Key<binding::V4>,
        binding::Key<binding::V6>,
        binding::Binding<binding::V4>,
        binding::Binding<binding::V6>,
        ports::Crowd,
        ports::Returned,
        gateway::Source,
        gateway::Policy,
        gateway::GateNode,
        gateway::Hop,
        gateway::GateRoute,
        gateway::GateSettings,
        gateway::EgressState,
        gateway::PolicyCount,
        gateway::Filter
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    #[test]
    fn keys_stand_for_their_addresses() {
        for text in ["192.0.2.7", "2001:db8::7"] {
            let address: IpAddr = text.parse().expect("a literal address");
            let key = VipKey::from_address(address);
            assert_eq!(key.address(), address);
            assert_eq!(key.is_mapped(), address.is_ipv4());
        }
    }

    /// A change here is a change of the number. The sizes are the sums of the fields': there is no padding.
    #[test]
    fn the_layout_is_what_its_number_says() {
        assert_eq!(LAYOUT, 11);
        let sizes = [
            size_of::<VipKey>(),
            size_of::<Vip>(),
            size_of::<VipCount>(),
            size_of::<PortKey>(),
            size_of::<Port>(),
            size_of::<History>(),
            size_of::<WideKey>(),
            size_of::<WidePage>(),
            size_of::<Node>(),
            size_of::<PeerKey>(),
            size_of::<Peer>(),
            size_of::<Routed>(),
            size_of::<FlowKey>(),
            size_of::<Flow>(),
            size_of::<Answer>(),
            size_of::<Endpoint>(),
            size_of::<SlotKey>(),
            size_of::<Range>(),
            size_of::<HoldersKey>(),
            size_of::<Holders>(),
            size_of::<FragmentKey>(),
            size_of::<Fragment>(),
            size_of::<Settings>(),
            size_of::<Driver>(),
        ];
        let expected = [
            16,
            4 + 2 + 2,
            8 + 8,
            16 + 2 + 1 + 1,
            4 + 4 + (2 + 2 + 4 + 8 * 4),
            4 * 40,
            4 + 4,
            64 * 4,
            8 + 16 + 4 + 6 + 2 + 4,
            4 + 6 + 2,
            4,
            4 + 16,
            16 + 16 + 2 + 2 + 4,
            8 + 4 + (16 + 2 + 2) + 4 + 4,
            8 + 4 + (16 + 2 + 2),
            16 + 2 + 2,
            4 + 4,
            4 + 16,
            4 + 4,
            4 * 2,
            16 + 16 + 4 + 4,
            8 + 2 + 2 + 4,
            8 + 4 + 4,
            6 + 2,
        ];
        assert_eq!(sizes, expected);
    }
}
