//! What the guard at the uplinks decides by.

use crate::VipKey;

/// The name of its program, at the uplinks' egress.
pub const PROGRAM: &str = "landfall_egress_out";

/// How many addresses of tenants the maps hold.
pub const MAX_TENANTS: u32 = 65_536;
/// How many policies.
pub const MAX_GATEWAYS: u32 = 8_192;
/// How many networks of the cluster.
pub const MAX_INSIDE: u32 = 16_384;
/// How many uplinks.
pub const MAX_OUTSIDE: u32 = 256;

/// How many pairs that were led unjudged are remembered.
pub const MAX_LED: u32 = 16_384;
/// How long, in nanoseconds: when connection tracking has seen a gateway's frame, nftables knows by itself.
pub const LED_FOR: u64 = 300_000_000_000;

/// A tenant, and whom it sent something to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The pod.
    pub tenant: VipKey,
    /// The other.
    pub peer: VipKey,
}

/// A pod that is a policy's tenant, by its address ([`VipKey`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// The place of its policy's [`Gateway`].
    pub policy: u32,
    /// The place of that of the policy whose tenant it was: its flows from then go there. [`NOBODY`] for none.
    pub former: u32,
    /// [`tenant_flag`]s.
    pub flags: u32,
    /// Tells the pod from another that had the address before.
    pub life: u32,
    /// The address it leaves by; all zero for none.
    pub address: VipKey,
}

/// No policy.
pub const NOBODY: u32 = u32::MAX;

/// Flags of a [`Tenant`].
pub mod tenant_flag {
    /// It runs on this node.
    pub const HERE: u32 = 1;
    /// It has an address to leave by.
    pub const OPEN: u32 = 2;
    /// It may have flows from before it was any policy's tenant. Only where a program judges.
    pub const BEFORE: u32 = 4;
}

/// Where a policy's packets leave. One write of it moves all the policy's tenants.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gateway {
    /// A hash of the policy's name; 0 where the place is free.
    pub seed: u64,
    /// The index of this node's interface to it.
    pub interface: u32,
    /// [`gateway_flag`]s.
    pub flags: u32,
    /// Its place among the nodes, for the tunnel.
    pub node: u32,
    /// Its Ethernet address there.
    pub mac: [u8; 6],
    /// This node's.
    pub source: [u8; 6],
}

/// Flags of a [`Gateway`].
pub mod gateway_flag {
    /// There is one.
    pub const KNOWN: u32 = 1;
    /// It is this node.
    pub const HERE: u32 = 2;
    /// The interface is the tunnel.
    pub const TUNNEL: u32 = 4;
    /// The policy names the destinations that it is for.
    pub const NAMES: u32 = 8;
    /// It names destinations that it is not for.
    pub const EXCLUDES: u32 = 16;
    /// It cuts flows from before it.
    pub const CUTS: u32 = 32;
}

/// The bits of the packet mark that nftables says its judgement by. Both are 0 until they are known: then nothing is
/// guarded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// The packet was judged.
    pub judged: u32,
    /// It leaves by its policy's gateway.
    pub egress: u32,
    /// Not 0 if this node is a policy's gateway.
    pub is_gateway: u32,
}

/// What the guard did with packets of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Guarded {
    /// Sent to the gateway, another node.
    Led,
    /// The same, of a packet that nobody has judged; or left to the program behind, if the gateway is this node.
    LedUnjudged,
    /// Dropped: no tenant's, and nobody has judged it.
    Unjudged,
    /// Dropped: its policy has no gateway, or no address for it, or it is not known to be a tenant yet.
    NoGateway,
    /// Dropped: a tenant's address that came in from outside.
    Forged,
    /// Dropped: it could not be sent to the gateway.
    Unsendable,
    /// Dropped: its flow left by a gateway before its destination was the cluster's own.
    Joined,
}

impl Guarded {
    /// All, each at the place of its number.
    pub const ALL: [Self; 7] = [
        Self::Led,
        Self::LedUnjudged,
        Self::Unjudged,
        Self::NoGateway,
        Self::Forged,
        Self::Unsendable,
        Self::Joined,
    ];

    /// How many there are.
    #[allow(clippy::cast_possible_truncation)] // A few.
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// A word for it, for metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Led => "led",
            Self::LedUnjudged => "led-unjudged",
            Self::Unjudged => "unjudged",
            Self::NoGateway => "no-gateway",
            Self::Forged => "forged",
            Self::Unsendable => "unsendable",
            Self::Joined => "joined",
        }
    }
}

/// The names of the maps.
pub mod map {
    /// From [`VipKey`](crate::VipKey) to [`Tenant`](super::Tenant).
    pub const TENANTS: &str = "TENANTS";
    /// [`Gateway`](super::Gateway) at the place of a policy's number.
    pub const GATEWAYS: &str = "GATEWAYS";
    /// The longest prefixes of the cluster's networks, as the 16 bytes of a [`VipKey`](crate::VipKey).
    pub const INSIDE: &str = "INSIDE";
    /// The indexes of the interfaces to the outside.
    pub const OUTSIDE: &str = "OUTSIDE";
    /// One [`Marks`](super::Marks).
    pub const MARKS: &str = "MARKS";
    /// From [`Pair`](super::Pair) to when a packet was led that nobody had judged, in nanoseconds since the start of the
    /// system.
    pub const LED: &str = "LED";
    /// How many packets met each fate, by CPU, at the place of a [`Guarded`](super::Guarded).
    pub const GUARDED: &str = "GUARDED";
    /// How many packets were dropped for want of a gateway, or of an address, by CPU, at the place of a policy's number.
    pub const UNLED: &str = "UNLED";
}

// SAFETY: all are `repr(C)`, hold integers only and have no padding: the test holds them to it.
#[cfg(feature = "user")]
mod pod {
    unsafe impl aya::Pod for super::Tenant {}
    unsafe impl aya::Pod for super::Gateway {}
    unsafe impl aya::Pod for super::Marks {}
    unsafe impl aya::Pod for super::Pair {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change here is a change of the layout's number. The sizes are the sums of the fields'.
    #[test]
    fn the_layout_is_what_its_number_says() {
        assert_eq!(crate::LAYOUT, 11);
        let sizes = [
            size_of::<Tenant>(),
            size_of::<Gateway>(),
            size_of::<Marks>(),
            size_of::<Pair>(),
        ];
        assert_eq!(
            sizes,
            [
                4 + 4 + 4 + 4 + 16,
                8 + 4 + 4 + 4 + 6 + 6,
                4 + 4 + 4,
                16 + 16
            ]
        );
    }
}
