//! The map types that Landfall's eBPF programs and the speaker share.
//!
//! Every type here is `#[repr(C)]` without padding: the two sides are compiled for different targets, and maps
//! outlive the process that made them. Whoever changes the size or the meaning of a type, or the shape of a
//! map, raises [`LAYOUT`]: what is pinned under another number is never read.
#![no_std]

#[cfg(feature = "user")]
pub mod tcx;

/// The number of the map layout; part of the path under which maps are pinned.
pub const LAYOUT: u32 = 1;

/// The name of the map from [`VipKey`] to [`VipCount`].
pub const VIP_COUNTS: &str = "VIP_COUNTS";

/// How many VIPs the maps hold.
pub const MAX_VIPS: u32 = 65_536;

/// The name of the program for the uplinks' ingress.
pub const UPLINK_INGRESS: &str = "landfall_uplink";

/// A virtual IP as a map key: an IPv6 address in network order; IPv4 as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VipKey(pub [u8; 16]);

impl VipKey {
    /// The key of an IPv4 address, given in network order.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// Whether it stands for an IPv4 address.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub fn is_mapped(&self) -> bool {
        let mapped = Self::v4([0; 4]).0;
        let mut index = 0;
        while index < 12 {
            if self.0[index] != mapped[index] {
                return false;
            }
            index += 1;
        }
        true
    }

    /// The key of an address.
    pub const fn from_address(address: core::net::IpAddr) -> Self {
        match address {
            core::net::IpAddr::V4(v4) => Self::v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Self(v6.octets()),
        }
    }

    /// The address it stands for.
    pub const fn address(self) -> core::net::IpAddr {
        core::net::Ipv6Addr::from_octets(self.0).to_canonical()
    }
}

/// What one CPU has seen of the packets to one VIP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipCount {
    /// Packets; a packet that the NIC or the kernel merged counts as the segments it was merged from.
    pub packets: u64,
    /// Bytes, link-layer header included; of merged packets the header counts once.
    pub bytes: u64,
}

// SAFETY: both are `repr(C)`, hold integers only and have no padding.
#[cfg(feature = "user")]
unsafe impl aya::Pod for VipKey {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for VipCount {}

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

    #[test]
    fn the_layout_is_what_its_number_says() {
        assert_eq!(LAYOUT, 1);
        assert_eq!(size_of::<VipKey>(), 16);
        assert_eq!(size_of::<VipCount>(), 16);
    }
}
