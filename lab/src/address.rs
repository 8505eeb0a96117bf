//! Who has which address in the lab. See the picture at the crate's root.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frame::Mac;

/// A network of the lab, IPv4 `prefix.0/24` and IPv6 `prefix::/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// The segment the VIPs are on: 10.88.0.0/24, `fd00:88::/64`; `eth0` of the nodes.
    Lan,
    /// A second segment: 10.89.0.0/24, `fd00:89::/64`; `eth1` of the nodes.
    SecondLan,
    /// Management: 10.99.0.0/24, `fd00:99::/64`; `mgmt0` of the nodes.
    Management,
    /// Beyond the router: 10.77.0.0/24, `fd00:77::/64`.
    Remote,
}

/// The router's host number on each of its networks.
pub(crate) const ROUTER: u8 = 1;
/// The client's host number, on its network.
pub(crate) const CLIENT: u8 = 100;
/// The observer's host number on the LAN.
pub(crate) const OBSERVER: u8 = 101;

impl Network {
    const fn number(self) -> u8 {
        match self {
            Self::Lan => 88,
            Self::SecondLan => 89,
            Self::Management => 99,
            Self::Remote => 77,
        }
    }

    /// The IPv4 address of host `host`.
    pub fn v4(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.number(), 0, host)
    }

    /// The IPv6 address of host `host`, whose last group reads like the decimal host number.
    pub fn v6(self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, decimal(self.number()), 0, 0, 0, 0, 0, decimal(host))
    }

    /// Both addresses of host `host`.
    pub fn both(self, host: u8) -> [IpAddr; 2] {
        [self.v4(host).into(), self.v6(host).into()]
    }

    /// The Ethernet address of host `host`, locally administered.
    pub fn mac(self, host: u8) -> Mac {
        Mac([2, 0, 0, 0, self.number(), host])
    }
}

/// The host number of the `index`-th node, counted from 1.
pub(crate) const fn node_host(index: u8) -> u8 {
    10 + index
}

/// The `number`-th address for VIPs, from 10.88.0.200 and `fd00:88::200` on.
pub fn vips(number: u8) -> [IpAddr; 2] {
    Network::Lan.both(200 + number)
}

/// The addresses of pod `pod` (counted from 0) of node `node` (counted from 1).
pub fn pod(node: u8, pod: u8) -> [IpAddr; 2] {
    in_pod_network(node, 10 + pod)
}

/// The addresses of a node's bridge `cni0`.
pub(crate) fn pod_gateway(node: u8) -> [IpAddr; 2] {
    in_pod_network(node, 1)
}

fn in_pod_network(node: u8, host: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 244, node, host).into(),
        Ipv6Addr::new(0xfd00, 0x244, decimal(node), 0, 0, 0, 0, decimal(host)).into(),
    ]
}

/// The pod CIDRs of a node.
pub fn pod_cidrs(node: u8) -> [String; 2] {
    [
        format!("10.244.{node}.0/24"),
        format!("fd00:244:{node}::/64"),
    ]
}

/// The number whose hexadecimal digits read like `number` in decimal.
const fn decimal(number: u8) -> u16 {
    let number = number as u16;
    number / 100 * 0x100 + number / 10 % 10 * 0x10 + number % 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_read_alike() {
        assert_eq!(
            Network::Lan.both(node_host(1)).map(|a| a.to_string()),
            ["10.88.0.11", "fd00:88::11"]
        );
        assert_eq!(
            vips(3).map(|a| a.to_string()),
            ["10.88.0.203", "fd00:88::203"]
        );
        assert_eq!(
            pod(12, 0).map(|a| a.to_string()),
            ["10.244.12.10", "fd00:244:12::10"]
        );
    }
}
