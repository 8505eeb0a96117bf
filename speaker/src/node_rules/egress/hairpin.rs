//! What pods of policies with `hairpin` send to VIPs of this cluster: it leaves by the gateway, too.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use landfall_core::egress::{shadow_nets, shadows};
use landfall_core::ip::Family;

use super::super::ruleset::{Element, TABLE};
use super::super::{Config, Leaving, Rules};
use super::{Source, merged, not_for, of_family, own};
use crate::egress::{Pod, Policy, PolicyName};

/// What goes to VIPs from the pods of policies that are for them goes to their shadows. The first packet of a flow says so to
/// connection tracking, which does it from then on. What is none's, or comes too late to be one's, is not to leave as it is.
pub(super) fn skeleton(text: &mut String) {
    let _ = writeln!(
        text,
        "add chain inet {TABLE} egress-hairpin {{ type filter hook prerouting priority mangle; policy accept; }}
add chain inet {TABLE} egress-shadows {{ type nat hook prerouting priority dstnat - 10; policy accept; }}
add rule inet {TABLE} egress-hairpin iifname @egress-uplinks accept
add rule inet {TABLE} egress-hairpin ct state established,related accept"
    );
    for ((family, suffix, kind), net) in [("ip", 4, "ipv4_addr"), ("ip6", 6, "ipv6_addr")]
        .into_iter()
        .zip(shadow_nets())
    {
        let _ = writeln!(
            text,
            "add map inet {TABLE} egress-hairpin{suffix} {{ type {kind} : verdict; }}
add map inet {TABLE} egress-shadows{suffix} {{ type {kind} : {kind}; }}
add rule inet {TABLE} egress-hairpin {family} daddr @egress-shadows{suffix} \
             {family} saddr vmap @egress-hairpin{suffix}
add rule inet {TABLE} egress-shadows iifname != @egress-uplinks {family} daddr {net} dnat {family} to {family} daddr"
        );
    }
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
            "add rule inet {TABLE} {chain} {family} daddr set {family} daddr map @egress-shadows{suffix} \
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

/// A VIP, and what stands for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shade(IpAddr, IpAddr);

impl Element for Shade {
    fn vip(&self) -> IpAddr {
        self.0
    }

    fn text(&self) -> String {
        format!("{} : {}", self.0, self.1)
    }
}

pub(super) fn shades(rules: &Rules, leaving: &Leaving) -> BTreeSet<Shade> {
    let shadows = shadows(&rules.vips, &leaving.egress.inside).into_iter();
    shadows.map(|(vip, shadow)| Shade(vip, shadow)).collect()
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
