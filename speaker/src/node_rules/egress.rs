//! Pods that leave by an address of their own, as nftables sees them: who is judged, and what is then done.
//!
//! ```text
//!  prerouting ─> egress-replies  frames of a gateway get the mark of their way: the reverse path is that
//!             └> egress-hairpin  (in front of whoever knows VIPs) pods of policies that are for VIPs: what begins to one
//!                                goes to its shadow, by a chain for each policy, egress-pin-…
//!             └> egress-shadows  that is translated so, for connection tracking
//!             └> egress-judge    (behind every translation of destinations) from inside to outside:
//!                  of flows that began by a gateway, egress-bound: forged ─> drop
//!                    from before the pod was whose it is ─> that policy's egress-led-…, as egress, way
//!                  of others: forged ─> drop          answers ─> judged
//!                  both: unknown, and other nodes' ─> drop
//!                  └─> a chain for each policy: invalid ─> drop, not for it ─> judged,
//!                                               no gateway ─> drop, else: judged, egress, way
//!                      one for other pods: judged
//! postrouting ─> egress-null     what leaves with the mark keeps its address, whoever would translate it later
//! ```
//!
//! Inside and outside are told by interface: what would not leave by an uplink stays. Of what would, the networks of
//! the cluster stay too, and its VIPs. Where a policy is for these the pod's packets go to their shadows
//! ([`shadows`](landfall_core::egress::shadows)), which are outside.

mod entry;
pub(super) mod flows;
pub(super) mod hairpin;
pub(super) mod keeper;
pub(super) mod passed_by;
pub(super) mod ports;
pub(super) mod routes;
mod ways;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use landfall_core::ip::Family;

use super::ruleset::{Element, TABLE, elements, replace};
use super::{Config, Leaving, Rules};
use crate::egress::{Pod, Policy, PolicyName, Tenant};
use ways::Way;
pub(super) use ways::Ways;

/// Why packets are dropped: a counter for each.
pub(super) const REASONS: [&str; 5] = ["unknown", "forged", "invalid", "no-gateway", "translated"];

/// The name of a reason's counter.
pub(super) fn counter(reason: &str) -> String {
    format!("egress-{reason}")
}

/// Chains, sets and rules, after a skeleton.
pub(super) fn whole(text: &mut String, rules: &Rules, ways: &Ways, config: &Config) {
    if let Some(leaving) = &rules.passed_by {
        passed_by::whole(text, leaving);
    }
    let Some(leaving) = &rules.egress else {
        return;
    };
    skeleton(text, leaving);
    for (way, value) in ways {
        replies(text, way, *value, config);
    }
    hairpin::skeleton(text, config);
    judge(text, leaving, config);
    for (name, policy) in &leaving.egress.policies {
        add_chain(text, name);
        verdict(text, name, policy, leaving, ways, config);
    }
    elements(text, "add", "egress-sources", &sources(leaving));
    elements(text, "add", "egress-closed", &closed(leaving));
    elements(text, "add", "egress-former", &formers(leaving));
    elements(text, "add", "egress-hairpin", &hairpin::sources(leaving));
    hairpin::replace_shadows(text, None, rules);
    for (way, value) in ways {
        macs(text, "add", *value, &gateways(leaving, way));
    }
}

/// Whether the one follows from the other by elements and policies alone.
pub(super) fn is_alike(old: &Rules, new: &Rules) -> bool {
    let alike = |old: &Option<Arc<Leaving>>, new: &Option<Arc<Leaving>>| match (old, new) {
        (None, None) => true,
        (Some(old), Some(new)) => old.node == new.node && old.uplinks == new.uplinks,
        _ => false,
    };
    alike(&old.egress, &new.egress) && alike(&old.passed_by, &new.passed_by)
}

/// From `old` to `new`, which are alike, with the same ways.
pub(super) fn change(text: &mut String, old: &Rules, new: &Rules, ways: &Ways, config: &Config) {
    if old.vips != new.vips || inside(old) != inside(new) {
        hairpin::replace_shadows(text, Some(old), new);
    }
    if let (Some(old), Some(new)) = (&old.passed_by, &new.passed_by) {
        passed_by::change(text, old, new);
    }
    let (Some(old), Some(new)) = (&old.egress, &new.egress) else {
        return;
    };
    if old == new {
        return;
    }
    change_networks(text, old, new);
    let (before, after) = (&old.egress.policies, &new.egress.policies);
    for (name, policy) in after {
        match before.get(name) {
            Some(known) if known == policy => continue,
            Some(_) => {
                for chain in [chain(name), former_chain(name), hairpin::chain(name)] {
                    let _ = writeln!(text, "flush chain inet {TABLE} {chain}");
                }
            }
            None => add_chain(text, name),
        }
        verdict(text, name, policy, new, ways, config);
    }
    replace(text, "egress-closed", &closed(old), &closed(new));
    replace(text, "egress-sources", &sources(old), &sources(new));
    replace(text, "egress-former", &formers(old), &formers(new));
    replace(
        text,
        "egress-hairpin",
        &hairpin::sources(old),
        &hairpin::sources(new),
    );
    for (way, value) in ways {
        let (old, new) = (gateways(old, way), gateways(new, way));
        macs(text, "delete", *value, &(&old - &new));
        macs(text, "add", *value, &(&new - &old));
    }
    for name in before.keys().filter(|name| !after.contains_key(*name)) {
        let _ = writeln!(
            text,
            "delete chain inet {TABLE} {0}\ndelete counter inet {TABLE} {0}\ndelete chain inet {TABLE} {1}\n\
             delete chain inet {TABLE} {2}",
            chain(name),
            former_chain(name),
            hairpin::chain(name)
        );
    }
}

/// A policy's chains, and the counter of its packets that are dropped for want of a gateway or an address.
fn add_chain(text: &mut String, policy: &PolicyName) {
    let _ = writeln!(
        text,
        "add chain inet {TABLE} {0}\nadd counter inet {TABLE} {0}\nadd chain inet {TABLE} {1}\nadd chain inet {TABLE} {2}",
        chain(policy),
        former_chain(policy),
        hairpin::chain(policy)
    );
}

/// The counter of a policy.
pub(super) fn counter_of(policy: &PolicyName) -> String {
    chain(policy)
}

fn skeleton(text: &mut String, leaving: &Leaving) {
    for reason in REASONS {
        let _ = writeln!(text, "add counter inet {TABLE} {}", counter(reason));
    }
    for (suffix, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        let _ = writeln!(
            text,
            "add map inet {TABLE} egress-sources{suffix} {{ type {kind} : verdict; }}
add map inet {TABLE} egress-former{suffix} {{ type {kind} : verdict; }}
add set inet {TABLE} egress-closed{suffix} {{ type {kind}; }}
add set inet {TABLE} egress-inside{suffix} {{ type {kind}; flags interval; }}
add set inet {TABLE} egress-pods{suffix} {{ type {kind}; flags interval; }}
add chain inet {TABLE} egress-judge{suffix}
add chain inet {TABLE} egress-bound{suffix}"
        );
    }
    let _ = writeln!(
        text,
        "add set inet {TABLE} egress-uplinks {{ type ifname; }}
add chain inet {TABLE} egress-replies {{ type filter hook prerouting priority mangle - 10; policy accept; }}
add chain inet {TABLE} egress-judge {{ type filter hook prerouting priority dstnat + 10; policy accept; }}
add chain inet {TABLE} egress-null {{ type nat hook postrouting priority srcnat - 10; policy accept; }}
add chain inet {TABLE} egress-judged
add chain inet {TABLE} egress-arrives
add chain inet {TABLE} egress-within
add chain inet {TABLE} egress-plain
add chain inet {TABLE} egress-nowhere
add rule inet {TABLE} egress-nowhere counter name egress-no-gateway drop"
    );
    if !leaving.uplinks.is_empty() {
        let _ = writeln!(
            text,
            "add element inet {TABLE} egress-uplinks {{ {} }}",
            names(&leaving.uplinks)
        );
    }
    networks(text, leaving);
}

/// The cluster's own networks.
fn inside(rules: &Rules) -> Option<&BTreeSet<IpNet>> {
    rules.egress.as_ref().map(|leaving| &leaving.egress.inside)
}

/// The elements of the sets of networks.
fn networks(text: &mut String, leaving: &Leaving) {
    let inside = merged(&leaving.egress.inside);
    let pods = merged(&pod_networks(leaving));
    for (family, suffix) in [(Family::V4, 4), (Family::V6, 6)] {
        for (set, nets) in [("inside", &inside), ("pods", &pods)] {
            let nets = of_family(nets, family);
            if !nets.is_empty() {
                let _ = writeln!(
                    text,
                    "add element inet {TABLE} egress-{set}{suffix} {{ {} }}",
                    nets.join(", ")
                );
            }
        }
    }
}

/// The same, if they are others than before.
fn change_networks(text: &mut String, old: &Leaving, new: &Leaving) {
    if old.egress.inside != new.egress.inside {
        // Networks that touch are one element: which are new is not to be told apart.
        for set in ["inside4", "inside6", "pods4", "pods6"] {
            let _ = writeln!(text, "flush set inet {TABLE} egress-{set}");
        }
        networks(text, new);
    }
}

/// The networks that pods have their addresses of, and Services, as which nobody sends: nodes, and pods that lie elsewhere,
/// are named one by one.
fn pod_networks(leaving: &Leaving) -> BTreeSet<IpNet> {
    let networks = leaving.egress.inside.iter();
    networks
        .filter(|net| net.prefix_len() < net.max_prefix_len())
        .filter(|net| match net.network() {
            IpAddr::V4(first) => {
                !(first.is_link_local() || first.is_loopback() || first.is_multicast())
            }
            IpAddr::V6(first) => !(first.is_unicast_link_local() || first.is_multicast()),
        })
        .copied()
        .collect()
}

fn judge(text: &mut String, leaving: &Leaving, config: &Config) {
    let (judged, egress) = config.egress_marks();
    let rest = !(judged | egress);
    let mut rule = |rule: &str| {
        let _ = writeln!(text, "add rule inet {TABLE} {rule}");
    };
    rule("egress-judge iifname @egress-uplinks goto egress-arrives");
    // Nobody's word but this chain's.
    rule(&format!(
        "egress-judge meta mark set meta mark and {rest:#x}"
    ));
    rule("egress-judge meta nfproto vmap { ipv4 : goto egress-judge4, ipv6 : goto egress-judge6 }");
    // What has become the cluster's own ends, if it began by a gateway.
    rule(&format!(
        "egress-within ct mark and {egress:#x} == {egress:#x} counter name egress-translated drop"
    ));
    // A flow from before its pod was whose it is goes on by the gateway that it began with, or not at all.
    let former = judged | egress;
    let is_former = format!("ct mark and {former:#x} == {former:#x}");
    for (family, suffix) in [("ip", 4), ("ip6", 6)] {
        // Another node's pod, which that node takes for a tenant of a gateway here: what the programs have not taken is not
        // known to them yet, or not any more. It is not to leave by this node's address.
        rule(&format!(
            "egress-arrives {family} saddr @egress-pods{suffix} \
             {family} daddr != @egress-inside{suffix} {family} daddr != @vips{suffix} \
             fib daddr type != {{ local, broadcast, anycast, multicast }} ct direction original \
             counter name egress-unknown drop"
        ));
        let chain = format!("egress-judge{suffix}");
        rule(&format!(
            "{chain} {family} daddr @egress-inside{suffix} goto egress-within"
        ));
        rule(&format!("{chain} {family} daddr @vips{suffix} accept"));
        // Most packets are of flows that are known: what began by a gateway goes on by it, wherever the routes lead by now.
        rule(&format!(
            "{chain} ct mark and {egress:#x} == {egress:#x} goto egress-bound{suffix}"
        ));
        rule(&format!(
            "{chain} fib daddr type {{ local, broadcast, anycast, multicast }} accept"
        ));
        if !leaving.uplinks.is_empty() {
            // What has no route may have one by its policy's uplink.
            rule(&format!(
                "{chain} fib daddr . mark oifname != {{ {} }} fib daddr . mark oif exists accept",
                names(&leaving.uplinks)
            ));
        }
        // Answers to who came from outside, also those of other nodes' pods. A flow of a tenant's that is known only since
        // its gateway's frame came is none: its connection bears the mark.
        let answers = "ct direction reply goto egress-judged".to_owned();
        let before = [
            format!("{is_former} {family} saddr vmap @egress-former{suffix}"),
            format!("{is_former} counter name egress-translated drop"),
        ];
        let bound = format!("egress-bound{suffix}");
        for (chain, rules) in [(&chain, &[answers][..]), (&bound, &before[..])] {
            rule(&format!(
                "{chain} fib saddr . iif oif missing counter name egress-forged drop"
            ));
            for known in rules {
                rule(&format!("{chain} {known}"));
            }
            rule(&format!(
                "{chain} {family} saddr vmap @egress-sources{suffix}"
            ));
            rule(&format!("{chain} counter name egress-unknown drop"));
        }
    }
    rule("egress-arrives accept");
    rule("egress-within accept");
    // It was a tenant's: without its way it would leave with the pod's address.
    rule(&format!(
        "egress-plain ct mark and {egress:#x} == {egress:#x} counter name egress-translated drop"
    ));
    rule("egress-plain goto egress-judged");
    rule(&format!(
        "egress-judged meta mark set meta mark or {judged:#x} accept"
    ));
    for family in ["ip", "ip6"] {
        rule(&format!(
            "egress-null meta mark and {egress:#x} == {egress:#x} snat {family} to {family} saddr"
        ));
    }
}

/// What comes back by a way: from another node that is a gateway; here, what a program has marked. It is nobody's answer,
/// whatever connection tracking takes it for: so the connection is marked, whoever's the pod is by now.
///
/// A gateway may also lead a VIP. What it sends on as that carries the VIP, or the mark of the programs that have
/// translated it.
fn replies(text: &mut String, way: &Way, value: u32, config: &Config) {
    let (judged, egress) = config.egress_marks();
    let rest = !(judged | egress | config.mark_mask);
    let mark = egress | value;
    let from = if way.here {
        format!("meta mark and {egress:#x} == {egress:#x}")
    } else {
        let _ = writeln!(
            text,
            "add set inet {TABLE} {} {{ type ether_addr; }}",
            of_way(value)
        );
        format!("ether saddr @{}", of_way(value))
    };
    let arrived = if config.translated {
        format!(
            "meta mark and {:#x} != {:#x} ",
            config.mark_mask,
            config.arrival()
        )
    } else {
        String::new()
    };
    for (family, suffix) in [("ip", 4), ("ip6", 6)] {
        let _ = writeln!(
            text,
            "add rule inet {TABLE} egress-replies iifname \"{}\" {from} {arrived}\
             {family} saddr != @egress-inside{suffix} {family} daddr != @vips{suffix} fib daddr type != local \
             meta mark set meta mark and {rest:#x} or {mark:#x} \
             ct direction original ct mark set ct mark and {:#x} or {egress:#x} accept",
            way.uplink, !egress
        );
    }
}

/// What tells packets to where a policy is not for.
fn not_for(policy: &Policy) -> Vec<String> {
    let mut told = Vec::new();
    for (nets, matches) in [(&policy.excluded, true), (&policy.destinations, false)] {
        if nets.is_empty() {
            continue; // None is excluded; the policy is for all.
        }
        let nets = merged(nets);
        for (family, word, name) in [(Family::V4, "ip", "ipv4"), (Family::V6, "ip6", "ipv6")] {
            let all = nets
                .iter()
                .any(|net| Family::of(net.addr()) == family && net.prefix_len() == 0);
            let list = of_family(&nets, family);
            match (list.is_empty() || all, matches) {
                (true, _) if all == matches => told.push(format!("meta nfproto {name}")),
                (true, _) => {}
                (false, _) => told.push(format!(
                    "{word} daddr {}{{ {} }}",
                    if matches { "" } else { "!= " },
                    list.join(", ")
                )),
            }
        }
    }
    told
}

/// The rules of a policy's chains.
fn verdict(
    text: &mut String,
    name: &PolicyName,
    policy: &Policy,
    leaving: &Leaving,
    ways: &Ways,
    config: &Config,
) {
    let (judged, egress) = config.egress_marks();
    let chain = chain(name);
    let mut rule = |rule: &str| {
        let _ = writeln!(text, "add rule inet {TABLE} {chain} {rule}");
    };
    // It has no direction and is not translated: it would leave with the pod's address.
    rule("ct state invalid counter name egress-invalid drop");
    // What left by the policy goes on so, whatever it is for by now: it would leave with the pod's address. And what did
    // not is marked to be known for that, should it be for it later.
    for elsewhere in not_for(policy) {
        rule(&format!(
            "ct mark and {egress:#x} == 0 {elsewhere} ct mark set ct mark or {judged:#x} goto egress-judged"
        ));
    }
    // Flows that began before the policy, or while it was not for them, stay what they are; others that got another source
    // while this table was not there have no right to it.
    rule(&format!(
        "ct status snat ct direction original ct mark and {judged:#x} == {judged:#x} goto egress-judged"
    ));
    rule("ct status snat ct direction original counter name egress-translated drop");
    for (family, suffix) in [("ip", 4), ("ip6", 6)] {
        rule(&format!(
            "{family} saddr @egress-closed{suffix} counter name {chain} counter name egress-no-gateway drop"
        ));
    }
    let way = policy
        .led_to()
        .and_then(|gateway| Way::to(gateway, &leaving.node))
        .and_then(|way| ways.get(&way));
    let rest = !(judged | egress | config.mark_mask);
    let led = if let Some(value) = way {
        let mark = judged | egress | value;
        rule(&format!(
            "meta mark set meta mark and {rest:#x} or {mark:#x} \
             ct mark set ct mark and {:#x} or {egress:#x} accept",
            !egress
        ));
        // Without the mark of what is judged the guard leads it where flows from before go.
        let mark = egress | value;
        format!("meta mark set meta mark and {rest:#x} or {mark:#x} accept")
    } else {
        let dropped = format!("counter name {chain} counter name egress-no-gateway drop");
        rule(&dropped);
        dropped
    };
    let _ = writeln!(text, "add rule inet {TABLE} {} {led}", former_chain(name));
    if policy.hairpin {
        hairpin::pin(text, name, policy, config);
    }
}

/// The chain of flows that began when their pods were a policy's tenants.
fn former_chain(policy: &PolicyName) -> String {
    chain(policy).replacen("egress-of-", "egress-led-", 1)
}

/// The chain of a policy. A long name is told by what it begins with and by its hash.
fn chain(policy: &PolicyName) -> String {
    const LONGEST: usize = 100;
    if policy.len() <= LONGEST {
        return format!("egress-of-{policy}");
    }
    let hash = xxhash_rust::xxh64::xxh64(policy.as_bytes(), 0);
    let start: String = policy.chars().take(LONGEST - 20).collect();
    format!("egress-of-{start}/{hash:016x}")
}

/// The set of the Ethernet addresses of a way's gateways.
fn of_way(value: u32) -> String {
    format!("egress-gateways-{value:x}")
}

fn names(names: &BTreeSet<Arc<str>>) -> String {
    let list: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    list.join(", ")
}

/// Networks as intervals that do not overlap.
fn merged(nets: &BTreeSet<IpNet>) -> Vec<IpNet> {
    let nets: Vec<IpNet> = nets.iter().map(IpNet::trunc).collect();
    IpNet::aggregate(&nets)
}

fn of_family(nets: &[IpNet], family: Family) -> Vec<String> {
    nets.iter()
        .filter(|net| Family::of(net.addr()) == family)
        .map(ToString::to_string)
        .collect()
}

/// The Ethernet addresses of the gateways that a way leads to.
fn gateways(leaving: &Leaving, way: &Way) -> BTreeSet<[u8; 6]> {
    let policies = leaving.egress.policies.values();
    policies
        .filter_map(|policy| policy.gateway.as_ref())
        .filter(|gateway| Way::to(gateway, &leaving.node).as_ref() == Some(way))
        .filter_map(|gateway| gateway.mac)
        .collect()
}

fn macs(text: &mut String, verb: &str, value: u32, macs: &BTreeSet<[u8; 6]>) {
    if macs.is_empty() {
        return;
    }
    let list: Vec<String> = macs
        .iter()
        .map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"))
        .collect();
    let _ = writeln!(
        text,
        "{verb} element inet {TABLE} {} {{ {} }}",
        of_way(value),
        list.join(", ")
    );
}

/// A pod's address, and the chain that judges it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Source {
    address: IpAddr,
    chain: String,
}

impl Element for Source {
    fn vip(&self) -> IpAddr {
        self.address
    }

    fn text(&self) -> String {
        format!("{} : goto {}", self.address, self.chain)
    }
}

/// This node's pods.
fn sources(leaving: &Leaving) -> BTreeSet<Source> {
    own(leaving)
        .map(|(address, pod)| Source {
            address,
            chain: match pod.policy() {
                None => "egress-plain".to_owned(),
                Some(policy) if leaving.egress.policies.contains_key(policy) => chain(policy),
                Some(_) => "egress-nowhere".to_owned(),
            },
        })
        .collect()
}

/// Those of them that have flows from before they were whose they are.
fn formers(leaving: &Leaving) -> BTreeSet<Source> {
    let former = |(address, pod): (IpAddr, &Pod)| {
        let policy = pod.former.as_ref()?;
        let known = leaving.egress.policies.contains_key(policy);
        known.then(|| Source {
            address,
            chain: former_chain(policy),
        })
    };
    own(leaving).filter_map(former).collect()
}

/// Those of them that are tenants.
pub(super) fn tenants(leaving: &Leaving) -> BTreeSet<IpAddr> {
    own(leaving)
        .filter(|(_, pod)| pod.tenant.is_some())
        .map(|(address, _)| address)
        .collect()
}

/// Those of these that have no address to leave by.
fn closed(leaving: &Leaving) -> BTreeSet<IpAddr> {
    let is_closed = |tenant: &Tenant| tenant.egress_ip.is_none();
    own(leaving)
        .filter(|(_, pod)| pod.tenant.as_ref().is_some_and(is_closed))
        .map(|(address, _)| address)
        .collect()
}

/// This node's pods, by their addresses.
pub(super) fn own(leaving: &Leaving) -> impl Iterator<Item = (IpAddr, &Pod)> {
    let pods = leaving.egress.pods.iter();
    pods.filter(|(_, pod)| pod.node == leaving.node)
        .map(|(address, pod)| (*address, pod))
}
