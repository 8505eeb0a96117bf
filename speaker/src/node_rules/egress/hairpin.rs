//! What pods of policies with `hairpin` send to VIPs of this cluster: it leaves by the gateway, too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use landfall_core::egress::{shadow_nets, shadows};
use landfall_core::ip::Family;

use super::super::ruleset::{Element, TABLE, replace};
use super::super::{Config, Leaving, Rules};
use super::{Source, merged, not_for, of_family, own};
use crate::egress::{Pod, Policy, PolicyName};

/// What goes to VIPs from the pods of policies that are for them goes to their shadows. The first packet of a flow says so to
/// connection tracking, which does it from then on; if that has forgotten a flow, what comes from the VIP says it. What is no
/// flow's is not to leave as it is.
pub(super) fn skeleton(text: &mut String, config: &Config) {
    let (_, egress) = config.egress_marks();
    let _ = writeln!(
        text,
        "add chain inet {TABLE} egress-hairpin {{ type filter hook prerouting priority mangle; policy accept; }}
add chain inet {TABLE} egress-shadows {{ type nat hook prerouting priority dstnat - 10; policy accept; }}
add rule inet {TABLE} egress-hairpin ct state established,related,untracked accept
add rule inet {TABLE} egress-hairpin iifname @egress-uplinks accept"
    );
    for ((family, suffix, kind), net) in [("ip", 4, "ipv4_addr"), ("ip6", 6, "ipv6_addr")]
        .into_iter()
        .zip(shadow_nets())
    {
        let _ = writeln!(
            text,
            "add map inet {TABLE} egress-hairpin{suffix} {{ type {kind} : verdict; }}
add map inet {TABLE} egress-shadows{suffix} {{ type {kind} : {kind}; }}
add map inet {TABLE} egress-vips{suffix} {{ type {kind} : {kind}; }}
add rule inet {TABLE} egress-hairpin {family} daddr @egress-shadows{suffix} \
             {family} saddr vmap @egress-hairpin{suffix}
add rule inet {TABLE} egress-shadows ct mark and {egress:#x} == {egress:#x} {family} daddr {net} \
             dnat {family} to {family} daddr
add rule inet {TABLE} egress-null meta mark and {egress:#x} == {egress:#x} {family} saddr {net} \
             snat {family} to {family} saddr map @egress-vips{suffix}"
        );
    }
}

/// The shadows of VIPs, in place of those that were there.
pub(super) fn replace_shadows(text: &mut String, old: Option<&Rules>, new: &Rules) {
    let shadows = |rules: &Rules| {
        super::inside(rules).map_or_else(BTreeMap::new, |inside| shadows(&rules.vips, inside))
    };
    let (old, new) = (old.map(shadows).unwrap_or_default(), shadows(new));
    let there = |all: &BTreeMap<IpAddr, IpAddr>| -> BTreeSet<Shade> {
        all.iter()
            .map(|(vip, shadow)| Shade(*vip, *shadow))
            .collect()
    };
    let back = |all: &BTreeMap<IpAddr, IpAddr>| -> BTreeSet<Shade> {
        all.iter()
            .map(|(vip, shadow)| Shade(*shadow, *vip))
            .collect()
    };
    replace(text, "egress-shadows", &there(&old), &there(&new));
    replace(text, "egress-vips", &back(&old), &back(&new));
}

/// What a policy's pods begin to VIPs goes to their shadows, where the policy is for that; but to its own.
pub(super) fn pin(text: &mut String, name: &PolicyName, policy: &Policy, config: &Config) {
    let (_, egress) = config.egress_marks();
    let chain = chain(name);
    let own: BTreeSet<IpNet> = policy.addresses.iter().copied().map(IpNet::from).collect();
    let own = merged(&own);
    let own = [(Family::V4, "ip"), (Family::V6, "ip6")].map(|(family, word)| {
        let list = of_family(&own, family);
        (!list.is_empty()).then(|| format!("{word} daddr {{ {} }}", list.join(", ")))
    });
    for elsewhere in own.into_iter().flatten().chain(not_for(policy)) {
        let _ = writeln!(text, "add rule inet {TABLE} {chain} {elsewhere} accept");
    }
    for (family, suffix) in [("ip", 4), ("ip6", 6)] {
        // With the mark it goes by the gateway, whatever destinations the policy is for.
        let _ = writeln!(
            text,
            "add rule inet {TABLE} {chain} meta l4proto {{ tcp, udp, icmp, ipv6-icmp }} \
             {family} daddr set {family} daddr map @egress-shadows{suffix} \
             ct mark set ct mark and {:#x} or {egress:#x}",
            !egress
        );
    }
}

/// What goes to an address that pods leave by, from inside, and is neither refused nor dropped for that: answers to what a
/// gateway has sent on.
pub(in super::super) fn from_inside(text: &mut String, rules: &Rules) {
    if rules.egress.is_some() {
        let _ = writeln!(
            text,
            "add rule inet {TABLE} forward ct direction reply accept
add rule inet {TABLE} unknown-ports ct direction reply accept"
        );
    }
}

/// The chain of what its pods send to VIPs.
pub(super) fn chain(policy: &PolicyName) -> String {
    super::chain(policy).replacen("egress-of-", "egress-pin-", 1)
}

/// An address, and what is put in its place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Shade(IpAddr, IpAddr);

impl Element for Shade {
    fn vip(&self) -> IpAddr {
        self.0
    }

    fn text(&self) -> String {
        format!("{} : {}", self.0, self.1)
    }
}

/// This node's pods whose policies are for VIPs too.
pub(super) fn sources(leaving: &Leaving) -> BTreeSet<Source> {
    let pinned = |(address, pod): (IpAddr, &Pod)| {
        let policy = pod.policy()?;
        let hairpin = leaving.egress.policies.get(policy)?.hairpin;
        hairpin.then(|| Source {
            address,
            chain: chain(policy),
        })
    };
    own(leaving).filter_map(pinned).collect()
}
