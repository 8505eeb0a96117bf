//! Virtual IPs and what is counted for them.

/// A virtual IP as a map key: an IPv6 address in network order; IPv4 as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
///
/// Aligned, so that the programs copy and hash it by words: the BPF target goes through what is not byte by byte.
#[repr(C, align(4))]
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

/// What the programs know of a virtual IP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vip {
    /// Its place among the counts, below [`MAX_VIPS`].
    pub number: u32,
    /// [`vip_flag`]s.
    pub flags: u16,
    /// The UDP port by which to judge a fragment that comes before its first: set where all UDP ports of the
    /// address are spread alike, else 0.
    pub udp_port: u16,
}

/// Flags of a [`Vip`].
pub mod vip_flag {
    /// Packets to it are steered; without it they are counted and passed up.
    pub const STEER: u16 = 1;
}

/// How many VIPs the maps hold.
pub const MAX_VIPS: u32 = 16_384;

/// What one CPU has seen of the packets to one VIP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipCount {
    /// Packets; a packet that the NIC or the kernel merged counts as the segments it was merged from.
    pub packets: u64,
    /// Bytes, link-layer header included; of merged packets the header counts once.
    pub bytes: u64,
}
