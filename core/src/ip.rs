//! Address families, inclusive ranges, and the canonical name of an address.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    #[serde(rename = "IPv4")]
    V4,
    /// IPv6.
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    /// The family of `address`.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// An inclusive range of addresses of one family, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpRange {
    first: IpAddr,
    last: IpAddr,
}

/// Why a text is no address range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Neither `address/prefix` nor `first-last`.
    #[error("{text:?} is neither a CIDR (192.0.2.0/24) nor a range (192.0.2.10-192.0.2.20)")]
    Malformed {
        /// What was read.
        text: String,
    },
    /// The ends belong to different families.
    #[error("{text:?} mixes IPv4 and IPv6: write one range per family")]
    MixedFamilies {
        /// What was read.
        text: String,
    },
    /// The first address is above the last.
    #[error("{text:?} ends before it begins: swap its two addresses")]
    Reversed {
        /// What was read.
        text: String,
    },
}

impl IpRange {
    /// The range from `first` to `last`, both included; `None` when the families differ or `first` is above `last`.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        (Family::of(first) == Family::of(last) && first <= last).then_some(Self { first, last })
    }

    /// The range that holds `address` alone.
    pub fn single(address: IpAddr) -> Self {
        Self {
            first: address,
            last: address,
        }
    }

    /// The lowest address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// The highest address.
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// The family of all addresses in the range.
    pub fn family(&self) -> Family {
        Family::of(self.first)
    }

    /// Whether `address` lies within.
    pub fn contains(&self, address: IpAddr) -> bool {
        Family::of(address) == self.family() && self.first <= address && address <= self.last
    }

    /// Whether the two ranges share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.family() == other.family() && self.first <= other.last && other.first <= self.last
    }

    /// How many addresses lie within; saturates for `::/0`.
    pub fn size(&self) -> u128 {
        (to_bits(self.last) - to_bits(self.first)).saturating_add(1)
    }

    /// The address `offset` places above the first, if it is within.
    pub fn nth(&self, offset: u128) -> Option<IpAddr> {
        let bits = to_bits(self.first).checked_add(offset)?;
        (bits <= to_bits(self.last)).then(|| from_bits(self.family(), bits))
    }
}

impl From<IpNet> for IpRange {
    /// All addresses of the prefix, its network and broadcast address included.
    fn from(net: IpNet) -> Self {
        Self {
            first: net.network(),
            last: net.broadcast(),
        }
    }
}

impl FromStr for IpRange {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let malformed = || RangeError::Malformed { text: text.into() };
        if let Some((first, last)) = text.split_once('-') {
            let first: IpAddr = first.trim().parse().map_err(|_| malformed())?;
            let last: IpAddr = last.trim().parse().map_err(|_| malformed())?;
            if Family::of(first) != Family::of(last) {
                return Err(RangeError::MixedFamilies { text: text.into() });
            }
            return Self::new(first, last).ok_or(RangeError::Reversed { text: text.into() });
        }
        text.trim()
            .parse::<IpNet>()
            .map(Self::from)
            .map_err(|_| malformed())
    }
}

impl fmt::Display for IpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// The address as a number, for arithmetic within a family.
pub fn to_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// The address of `family` with the given number.
///
/// # Panics
/// When an IPv4 number does not fit 32 bits.
pub fn from_bits(family: Family, bits: u128) -> IpAddr {
    match family {
        Family::V4 => {
            Ipv4Addr::from_bits(u32::try_from(bits).expect("an IPv4 address's number fits 32 bits"))
                .into()
        }
        Family::V6 => Ipv6Addr::from_bits(bits).into(),
    }
}

/// The name of the `VirtualIP` object of `address`: the address itself for IPv4; for IPv6 the eight
/// groups written out and joined by dashes, since object names admit no colons.
pub fn virtual_ip_name(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => v6
            .segments()
            .map(|segment| format!("{segment:04x}"))
            .join("-"),
    }
}

/// The address that a `VirtualIP` object of this name stands for.
pub fn parse_virtual_ip_name(name: &str) -> Option<IpAddr> {
    if let Ok(v4) = name.parse::<Ipv4Addr>() {
        return Some(v4.into());
    }
    let address = IpAddr::V6(name.replace('-', ":").parse().ok()?);
    (virtual_ip_name(address) == name).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_parse_both_notations() {
        let cidr: IpRange = "192.0.2.0/30".parse().unwrap();
        let dash: IpRange = "192.0.2.0-192.0.2.3".parse().unwrap();
        assert_eq!(cidr, dash);
        assert_eq!(cidr.size(), 4);
        assert_eq!(cidr.nth(3), Some("192.0.2.3".parse().unwrap()));
        assert_eq!(cidr.nth(4), None);
    }

    #[test]
    fn bad_ranges_say_what_is_wrong() {
        for (text, expected) in [
            ("192.0.2.1", "neither a CIDR"),
            ("192.0.2.9-192.0.2.1", "ends before it begins"),
            ("192.0.2.9-fd00::1", "mixes IPv4 and IPv6"),
            ("192.0.2.0/33", "neither a CIDR"),
        ] {
            let error = text.parse::<IpRange>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn names_round_trip() {
        for address in ["192.0.2.7", "fd00:88::200", "::"] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(
                parse_virtual_ip_name(&virtual_ip_name(address)),
                Some(address)
            );
        }
        assert_eq!(
            virtual_ip_name("fd00:88::200".parse().unwrap()),
            "fd00-0088-0000-0000-0000-0000-0000-0200"
        );
        assert_eq!(parse_virtual_ip_name("fd00-88--200"), None);
    }
}
