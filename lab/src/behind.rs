//! Hosts on links of their own behind others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{Lab, Netns, Result};

/// A host behind another, its gateway; the `number`-th, with [`addresses`]. Nobody else has a route to it yet.
pub fn host(lab: &Lab, gateway: &Netns, number: u8) -> Result<Netns> {
    let role = format!("behind{number}");
    let host = Netns::create_in(lab.id(), &role)?;
    gateway.veth(&role, &host, "eth0")?;
    gateway.ip_batch(&format!(
        "address add 10.66.{number}.1/24 dev {role}\n\
         address add fd00:66:{number}::1/64 dev {role} nodad\n"
    ))?;
    host.ip_batch(&format!(
        "address add 10.66.{number}.2/24 dev eth0\n\
         address add fd00:66:{number}::2/64 dev eth0 nodad\n\
         route add default via 10.66.{number}.1\n\
         route add default via fd00:66:{number}::1\n"
    ))?;
    Ok(host)
}

/// Its addresses, IPv4 first.
pub fn addresses(number: u8) -> [IpAddr; 2] {
    // The name of its link has the number in decimal.
    let group = u16::from_str_radix(&number.to_string(), 16).expect("digits");
    [
        Ipv4Addr::new(10, 66, number, 2).into(),
        Ipv6Addr::new(0xfd00, 0x66, group, 0, 0, 0, 0, 2).into(),
    ]
}

/// Its networks, IPv4 first.
pub fn networks(number: u8) -> [String; 2] {
    [
        format!("10.66.{number}.0/24"),
        format!("fd00:66:{number}::/64"),
    ]
}
