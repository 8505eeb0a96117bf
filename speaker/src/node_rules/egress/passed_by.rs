//! Tenants whose packets pass by the packet filter, and are judged by a program: beside Cilium.
//!
//! That goes by their addresses at the uplink. If what they send comes this way all the same, and gets another address on it
//! (Cilium masquerades by iptables, or there is none), nobody would know it there: it is dropped.

use std::fmt::Write as _;

use super::super::Leaving;
use super::super::ruleset::{TABLE, elements, replace};
use super::{change_networks, counter, names, networks, tenants};

const TENANTS: &str = "egress-tenants";

/// Chain, sets and rules, after a skeleton.
pub(in super::super) fn whole(text: &mut String, leaving: &Leaving) {
    let counter = counter("translated");
    let _ = writeln!(text, "add counter inet {TABLE} {counter}");
    for (suffix, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        let _ = writeln!(
            text,
            "add set inet {TABLE} {TENANTS}{suffix} {{ type {kind}; }}
add set inet {TABLE} egress-inside{suffix} {{ type {kind}; flags interval; }}
add set inet {TABLE} egress-pods{suffix} {{ type {kind}; flags interval; }}"
        );
    }
    let _ = writeln!(
        text,
        "add chain inet {TABLE} egress-masqueraded {{ type filter hook postrouting priority srcnat + 10; policy accept; }}"
    );
    networks(text, leaving);
    elements(text, "add", TENANTS, &tenants(leaving));
    if leaving.uplinks.is_empty() {
        return;
    }
    for (family, suffix) in [("ip", 4), ("ip6", 6)] {
        let _ = writeln!(
            text,
            "add rule inet {TABLE} egress-masqueraded oifname {{ {} }} ct status snat ct direction original \
             ct original {family} saddr @{TENANTS}{suffix} {family} daddr != @egress-inside{suffix} \
             {family} daddr != @vips{suffix} counter name {counter} drop",
            names(&leaving.uplinks)
        );
    }
}

/// From `old` to `new`, which have the same uplinks.
pub(in super::super) fn change(text: &mut String, old: &Leaving, new: &Leaving) {
    change_networks(text, old, new);
    replace(text, TENANTS, &tenants(old), &tenants(new));
}
