//! What the programs go by that judge where packets of pods pass no packet filter: beside Cilium, which sends them from the
//! pod's interface to the uplink.

use crate::VipKey;

/// The name of the program that judges, in front of the guard.
pub const PROGRAM: &str = "landfall_egress_judge";
/// The name of the one behind all of ours, which gives the next one its packet mark back.
pub const RESTORE: &str = "landfall_egress_restore";

/// How many addresses of this node's pods that are nobody's tenants the maps hold.
pub const MAX_PLAIN: u32 = 65_536;
/// How many networks of all policies together.
pub const MAX_DESTINATIONS: u32 = 65_536;
/// How many flows are remembered; the least recently used goes first.
pub const MAX_JUDGED: u32 = 131_072;

/// How a flow of a tenant's was judged.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// The policy that it left by ([`Gateway::seed`](super::guard::Gateway::seed)); 0 for none: it left as it would without.
    pub seed: u64,
    /// Whose it was ([`Tenant::life`](super::guard::Tenant::life)).
    pub life: u32,
    /// When it was last heard, to [`COARSE`] s: seconds since the system's start.
    pub seen: u32,
}

/// How exactly it is known when a flow was last heard, in seconds.
pub const COARSE: u32 = 16;
/// How long a flow that is not TCP may be idle and is the same still, in seconds: as at a gateway.
pub const IDLE: u32 = 300;

/// An address among a policy's networks; the key's prefix has 32 bits more than the network's, as in a [`VipKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Destination {
    /// Which networks: see [`Destination::set`]. In network order.
    pub set: [u8; 4],
    /// The address.
    pub address: [u8; 16],
}

impl Destination {
    /// The networks of a family of the policy with this number that it is for, or those that it is not for. `::/0` is for no
    /// IPv4 address.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    #[must_use]
    pub const fn set(policy: u32, excluded: bool, is_v4: bool) -> [u8; 4] {
        (policy << 2 | (excluded as u32) << 1 | is_v4 as u32).to_be_bytes()
    }
}

/// What Cilium knows of flows, in maps that it pins (its `bpf/lib/conntrack.h` and `bpf/lib/nat.h`).
///
/// Only whether there is an entry is of interest, so the values may be any.
pub mod cilium {
    /// What Cilium sets in the packet mark of what has got its source already: it does not masquerade it (its
    /// `bpf/lib/common.h`, from 1.16 on).
    pub const SNAT_DONE: u32 = 0x0300;
    /// The bits of the packet mark that say that.
    pub const MAGIC: u32 = 0x0f00;

    /// Of a flow that began outside, as its answers have it.
    pub const FROM_OUTSIDE: u8 = 1;
    /// Of a flow that is masqueraded.
    pub const MASQUERADED: u8 = 0;

    /// The bytes of an IPv4 flow's key: destination, source, two ports, protocol, flags; ports in network order.
    pub type FlowV4 = [u8; 14];
    /// The same of IPv6.
    pub type FlowV6 = [u8; 38];

    /// A map that is borrowed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Borrowed {
        /// What it is called here.
        pub name: &'static str,
        /// What Cilium's pin is called.
        pub pin: &'static str,
        /// The size of its keys in bytes.
        pub key: usize,
    }

    const fn borrowed(name: &'static str, pin: &'static str, key: usize) -> Borrowed {
        Borrowed { name, pin, key }
    }

    /// All of them: TCP flows, other flows, and what is masqueraded.
    pub const BORROWED: [Borrowed; 6] = [
        borrowed("CILIUM_TCP_V4", "cilium_ct4_global", size_of::<FlowV4>()),
        borrowed(
            "CILIUM_ANY_V4",
            "cilium_ct_any4_global",
            size_of::<FlowV4>(),
        ),
        borrowed(
            "CILIUM_SNAT_V4",
            "cilium_snat_v4_external",
            size_of::<FlowV4>(),
        ),
        borrowed("CILIUM_TCP_V6", "cilium_ct6_global", size_of::<FlowV6>()),
        borrowed(
            "CILIUM_ANY_V6",
            "cilium_ct_any6_global",
            size_of::<FlowV6>(),
        ),
        borrowed(
            "CILIUM_SNAT_V6",
            "cilium_snat_v6_external",
            size_of::<FlowV6>(),
        ),
    ];

    macro_rules! key {
        ($name:ident, $address:literal) => {
            #[doc = "The key of a flow by its addresses and ports as a packet from the pod has them. Cilium keeps the ports"]
            #[doc = "of [`FROM_OUTSIDE`] in the order of the packet, and those of [`MASQUERADED`] turned round. For echo the"]
            #[doc = "identifier stands for the port of who asks, and 0 for the other."]
            #[inline(always)]
            #[allow(clippy::inline_always)] // The verifier sees straight code.
            #[must_use]
            pub fn $name(
                source: &[u8; $address],
                destination: &[u8; $address],
                ports: [u16; 2],
                protocol: u8,
                flags: u8,
            ) -> [u8; 2 * $address + 6] {
                let mut key = [0; 2 * $address + 6];
                key[..$address].copy_from_slice(destination);
                key[$address..2 * $address].copy_from_slice(source);
                let [source, destination] = ports;
                let (first, second) = if flags == FROM_OUTSIDE {
                    (source, destination)
                } else {
                    (destination, source)
                };
                key[2 * $address..2 * $address + 2].copy_from_slice(&first.to_be_bytes());
                key[2 * $address + 2..2 * $address + 4].copy_from_slice(&second.to_be_bytes());
                key[2 * $address + 4] = protocol;
                key[2 * $address + 5] = flags;
                key
            }
        };
    }

    key!(key_v4, 4);
    key!(key_v6, 16);
}

/// The names of the maps.
pub mod map {
    /// From the [`VipKey`](crate::VipKey) of a pod of this node that is nobody's tenant to its
    /// [`life`](crate::egress::guard::Tenant::life).
    pub const PLAIN: &str = "PLAIN";
    /// The longest prefixes of policies' networks ([`Destination`](super::Destination)).
    pub const DESTINATIONS: &str = "DESTINATIONS";
    /// From [`FlowKey`](crate::FlowKey) to [`Judgement`](super::Judgement).
    pub const JUDGED: &str = "JUDGED";
}

/// A number that tells a pod from another by its identity.
#[allow(clippy::cast_possible_truncation)] // Both halves are in it.
pub const fn life_of(identity: u64) -> u32 {
    (identity ^ identity >> 32) as u32
}

/// The key of a network of a policy's: its prefix's length in bits, and its address.
pub const fn destination(
    policy: u32,
    excluded: bool,
    is_v4: bool,
    prefix: u32,
    address: VipKey,
) -> (u32, Destination) {
    let set = Destination::set(policy, excluded, is_v4);
    (
        32 + prefix,
        Destination {
            set,
            address: address.0,
        },
    )
}

// SAFETY: both are `repr(C)`, hold integers only and have no padding: the test holds them to it.
#[cfg(feature = "user")]
mod pod {
    unsafe impl aya::Pod for super::Judgement {}
    unsafe impl aya::Pod for super::Destination {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change here is a change of the layout's number. The sizes are the sums of the fields'.
    #[test]
    fn the_layout_is_what_its_number_says() {
        assert_eq!(crate::LAYOUT, 11);
        let sizes = [size_of::<Judgement>(), size_of::<Destination>()];
        assert_eq!(sizes, [8 + 4 + 4, 4 + 16]);
    }

    /// As `cilium bpf ct list` and `cilium bpf nat list` have them: addresses of answers are turned round, and so are the
    /// ports of what began outside.
    #[test]
    fn flows_are_known_as_cilium_knows_them() {
        let (pod, remote) = ([10, 244, 1, 2], [192, 0, 2, 9]);
        let answer = cilium::key_v4(&pod, &remote, [80, 4000], 6, cilium::FROM_OUTSIDE);
        let expected = [192, 0, 2, 9, 10, 244, 1, 2, 0, 80, 0x0f, 0xa0, 6, 1];
        assert_eq!(answer, expected);
        let out = cilium::key_v4(&pod, &remote, [4000, 80], 17, cilium::MASQUERADED);
        assert_eq!(out, [192, 0, 2, 9, 10, 244, 1, 2, 0, 80, 0x0f, 0xa0, 17, 0]);
        let out = cilium::key_v6(&[1; 16], &[2; 16], [4000, 80], 17, cilium::MASQUERADED);
        assert_eq!(
            (out[15], out[16], &out[32..]),
            (2, 1, &[0, 80, 0x0f, 0xa0, 17, 0][..])
        );
    }
}
