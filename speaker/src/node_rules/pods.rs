//! VIPs for the node's own processes and pods, where no kube-proxy delivers: their packets never come in by an uplink.
//!
//! ```text
//!  prerouting, not from an uplink ─┐
//!  output ─────────────────────────┴─> map own4, own6 ──> a chain for each port: translation to an endpoint
//!  postrouting: an endpoint that has reached itself gets the node's address for source
//! ```

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use super::ruleset::{Element, TABLE, elements, protocol, replace, to_any};
use super::{PodTargets, Rules, VipPort};

/// Maps, rules and chains, after a skeleton.
pub(super) fn whole(text: &mut String, rules: &Rules) {
    if rules.pod_services.is_empty() {
        // Without a rule that translates, connections are not tracked for our sake.
        return;
    }
    let _ = writeln!(text, "add set inet {TABLE} uplinks {{ type ifname; }}");
    for (suffix, kind, family) in [(4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6")] {
        let _ = writeln!(
            text,
            "add set inet {TABLE} selves{suffix} {{ type {kind} . {kind}; }}
add map inet {TABLE} own{suffix} {{ type {kind} . inet_proto . inet_service : verdict; }}
add rule inet {TABLE} deliver iifname != @uplinks {family} daddr . meta l4proto . th dport vmap @own{suffix}
add rule inet {TABLE} deliver-own {family} daddr . meta l4proto . th dport vmap @own{suffix}
add rule inet {TABLE} hide-client ct original {family} daddr @vips{suffix} {family} saddr . {family} daddr @selves{suffix} masquerade"
        );
    }
    names(text, "add", &uplinks(rules));
    elements(text, "add", "selves", &selves(rules));
    for (port, targets) in &rules.pod_services {
        add(text, port, targets);
    }
}

/// From `old` to `new`, both with such Services.
pub(super) fn change(text: &mut String, old: &Rules, new: &Rules) {
    if new.pod_services.is_empty() {
        return;
    }
    names(text, "delete", &(&uplinks(old) - &uplinks(new)));
    names(text, "add", &(&uplinks(new) - &uplinks(old)));
    replace(text, "selves", &selves(old), &selves(new));
    for (port, targets) in &old.pod_services {
        match new.pod_services.get(port) {
            None => {
                let chain = chain(port);
                let _ = writeln!(text, "delete element inet {TABLE} {}", element(port));
                let _ = writeln!(text, "delete chain inet {TABLE} {chain}");
            }
            Some(after) if after != targets => {
                let _ = writeln!(text, "flush chain inet {TABLE} {}", chain(port));
                rule(text, port, after);
            }
            Some(_) => {}
        }
    }
    for (port, targets) in &new.pod_services {
        if !old.pod_services.contains_key(port) {
            add(text, port, targets);
        }
    }
}

fn add(text: &mut String, port: &VipPort, targets: &PodTargets) {
    let _ = writeln!(text, "add chain inet {TABLE} {}", chain(port));
    rule(text, port, targets);
    let _ = writeln!(text, "add element inet {TABLE} {}", element(port));
}

fn rule(text: &mut String, port: &VipPort, targets: &PodTargets) {
    let chain = chain(port);
    let family = protocol(port.vip);
    if let Some(ranges) = &targets.ranges {
        let ranges: Vec<String> = ranges
            .iter()
            .filter(|range| range.addr().is_ipv4() == port.vip.is_ipv4())
            .map(ToString::to_string)
            .collect();
        let others = if ranges.is_empty() {
            String::new()
        } else {
            format!("{family} saddr != {{ {} }} ", ranges.join(", "))
        };
        let _ = writeln!(
            text,
            "add rule inet {TABLE} {chain} fib saddr type != local {others}drop"
        );
    }
    let choice = if targets.affinity {
        format!("jhash {family} saddr")
    } else {
        "numgen random".to_owned()
    };
    let endpoints: Vec<_> = targets.endpoints.iter().copied().collect();
    if let Some(translation) = to_any(&endpoints, &choice) {
        let transport = transport(port);
        let _ = writeln!(
            text,
            "add rule inet {TABLE} {chain} meta l4proto {transport} {translation}"
        );
    }
}

fn transport(port: &VipPort) -> String {
    port.protocol.to_string().to_lowercase()
}

/// A chain's name has no colons.
fn chain(port: &VipPort) -> String {
    let vip = port.vip.to_string().replace(':', ".");
    format!("own-{vip}/{}/{}", transport(port), port.port)
}

fn element(port: &VipPort) -> String {
    let suffix = if port.vip.is_ipv4() { 4 } else { 6 };
    format!(
        "own{suffix} {{ {} . {} . {} : goto {} }}",
        port.vip,
        transport(port),
        port.port,
        chain(port)
    )
}

/// The interfaces by which clients' packets come in.
fn uplinks(rules: &Rules) -> BTreeSet<Arc<str>> {
    rules.uplinks.values().cloned().collect()
}

fn names(text: &mut String, verb: &str, names: &BTreeSet<Arc<str>>) {
    if !names.is_empty() {
        let list: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
        let _ = writeln!(
            text,
            "{verb} element inet {TABLE} uplinks {{ {} }}",
            list.join(", ")
        );
    }
}

/// An address that may be on both ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Itself(IpAddr);

impl Element for Itself {
    fn vip(&self) -> IpAddr {
        self.0
    }

    fn text(&self) -> String {
        format!("{0} . {0}", self.0)
    }
}

fn selves(rules: &Rules) -> BTreeSet<Itself> {
    let targets = rules.pod_services.values();
    targets
        .flat_map(|targets| &targets.endpoints)
        .map(|endpoint| Itself(endpoint.ip()))
        .collect()
}
