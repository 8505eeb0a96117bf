//! What stands for a VIP on the way from a pod to its gateway ([`landfall_ebpf_common::egress::shadow`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use landfall_ebpf_common::VipKey;

/// The address that stands for a VIP.
pub fn shadow(vip: IpAddr) -> IpAddr {
    VipKey::from_address(vip).shadow(vip.is_ipv6()).address()
}

/// The blocks that such addresses lie in.
pub fn shadow_nets() -> [IpNet; 2] {
    let of = |address: IpAddr| IpNet::new_assert(shadow(address), 4);
    [
        of(Ipv4Addr::UNSPECIFIED.into()),
        of(std::net::Ipv6Addr::UNSPECIFIED.into()),
    ]
}

/// Of these VIPs those that have one, which none of the others has and which is none of the cluster's own networks.
pub fn shadows<'a>(
    vips: impl IntoIterator<Item = &'a IpAddr>,
    inside: &BTreeSet<IpNet>,
) -> BTreeMap<IpAddr, IpAddr> {
    let mut by_shadow = BTreeMap::<IpAddr, Option<IpAddr>>::new();
    for vip in vips {
        by_shadow
            .entry(shadow(*vip))
            .and_modify(|of| *of = None)
            .or_insert(Some(*vip));
    }
    let [v4, v6] = shadow_nets();
    let used: Vec<&IpNet> = inside
        .iter()
        .filter(|net| v4.contains(&net.addr()) || v6.contains(&net.addr()))
        .collect();
    by_shadow
        .into_iter()
        .filter(|(shadow, _)| *shadow != IpAddr::V4(Ipv4Addr::BROADCAST))
        .filter(|(shadow, _)| !used.iter().any(|net| net.contains(shadow)))
        .filter_map(|(shadow, vip)| Some((vip?, shadow)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vips: &[&str], inside: &[&str]) -> Vec<(String, String)> {
        let vips: Vec<IpAddr> = vips.iter().map(|vip| vip.parse().unwrap()).collect();
        let inside = inside.iter().map(|net| net.parse().unwrap()).collect();
        shadows(&vips, &inside)
            .into_iter()
            .map(|(vip, shadow)| (vip.to_string(), shadow.to_string()))
            .collect()
    }

    fn pair(vip: &str, shadow: &str) -> (String, String) {
        (vip.to_owned(), shadow.to_owned())
    }

    #[test]
    fn each_vip_has_its_own_outside_of_what_is_routed() {
        assert_eq!(
            of(
                &["10.88.0.200", "192.0.2.1", "2001:db8::1", "fd00:88::c8"],
                &["10.0.0.0/8"]
            ),
            [
                pair("10.88.0.200", "250.88.0.200"),
                pair("192.0.2.1", "240.0.2.1"),
                pair("2001:db8::1", "4001:db8::1"),
                pair("fd00:88::c8", "4d00:88::c8"),
            ]
        );
        assert_eq!(
            shadow_nets().map(|net| net.to_string()),
            ["240.0.0.0/4", "4000::/4"]
        );
    }

    #[test]
    fn what_two_vips_would_share_neither_has() {
        assert_eq!(
            of(&["10.0.2.1", "26.0.2.1", "10.0.2.2"], &[]),
            [pair("10.0.2.2", "250.0.2.2")]
        );
    }

    #[test]
    fn what_pods_have_no_vip_has() {
        assert_eq!(of(&["10.0.2.1", "15.255.255.255"], &["250.0.0.0/8"]), []);
        assert_eq!(
            of(&["15.255.255.255"], &[]),
            [],
            "it is the broadcast address"
        );
    }
}
