//! The networks that are the cluster's own: what pods send there is nobody's egress.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::model::Node;

/// Networks that are never outside: link-local, multicast, this host, broadcast (RFC 6890).
fn reserved() -> impl Iterator<Item = IpNet> {
    let v4 = |address: [u8; 4], prefix| {
        let network = Ipv4Net::new(Ipv4Addr::from(address), prefix);
        IpNet::V4(network.expect("the prefixes are short enough"))
    };
    let v6 = |first: u16, prefix| {
        let network = Ipv6Net::new(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), prefix);
        IpNet::V6(network.expect("the prefixes are short enough"))
    };
    [
        v4([127, 0, 0, 0], 8),
        v4([169, 254, 0, 0], 16),
        v4([224, 0, 0, 0], 4),
        v4([255, 255, 255, 255], 32),
        v6(0xfe80, 10),
        v6(0xff00, 8),
    ]
    .into_iter()
}

/// The cluster's own networks besides all VIPs: reserved ones, nodes' addresses and pod CIDRs, and `pods` that lie in none
/// of them, one by one.
pub fn inside<'a>(
    nodes: impl IntoIterator<Item = &'a Node>,
    pods: impl IntoIterator<Item = IpAddr>,
) -> BTreeSet<IpNet> {
    let mut inside: BTreeSet<IpNet> = reserved().collect();
    for node in nodes {
        inside.extend(node.pod_cidrs.iter().map(IpNet::trunc));
        inside.extend(node.addresses.iter().copied().map(IpNet::from));
    }
    let lengths: BTreeSet<u8> = inside.iter().map(IpNet::prefix_len).collect();
    let is_inside = |address: IpAddr| {
        lengths.iter().any(|length| {
            let around = IpNet::new(address, *length);
            around.is_ok_and(|around| inside.contains(&around.trunc()))
        })
    };
    let strays: Vec<IpAddr> = pods.into_iter().filter(|pod| !is_inside(*pod)).collect();
    inside.extend(strays.into_iter().map(IpNet::from));
    inside
}
