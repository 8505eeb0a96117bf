//! The text of the nftables table `landfall`: what to say at first, and what to say when something changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use landfall_core::ip::Family;

use super::{HostService, HostTargets, Rules};

/// The table's name, in family `inet`.
pub(super) const TABLE: &str = "landfall";

/// An uplink whose answers are marked, and with what.
pub(super) type Marks = BTreeMap<Arc<str>, u32>;

/// The chains, empty, and the sets. Idempotent; takes nothing away.
fn skeleton() -> String {
    format!(
        "add table inet {TABLE}
add set inet {TABLE} vips4 {{ type ipv4_addr; }}
add set inet {TABLE} vips6 {{ type ipv6_addr; }}
add counter inet {TABLE} guard4
add counter inet {TABLE} guard6
add chain inet {TABLE} forward {{ type filter hook forward priority filter + 5; policy accept; }}
add chain inet {TABLE} mark-answers {{ type filter hook prerouting priority mangle; policy accept; }}
add chain inet {TABLE} mark-own-answers {{ type route hook output priority mangle; policy accept; }}
add chain inet {TABLE} deliver {{ type nat hook prerouting priority dstnat - 5; policy accept; }}
add chain inet {TABLE} deliver-own {{ type nat hook output priority -105; policy accept; }}
add chain inet {TABLE} hide-client {{ type nat hook postrouting priority srcnat - 5; policy accept; }}
"
    )
}

/// The whole table anew, in one transaction.
pub(super) fn whole(rules: &Rules, marks: &Marks, mask: u32) -> String {
    let mut text = skeleton();
    let _ = writeln!(text, "flush table inet {TABLE}");
    let _ = writeln!(text, "flush set inet {TABLE} vips4");
    let _ = writeln!(text, "flush set inet {TABLE} vips6");
    elements(&mut text, "add", "vips", &rules.vips);
    for (protocol, counter, set) in [("ip", "guard4", "vips4"), ("ip6", "guard6", "vips6")] {
        let _ = writeln!(
            text,
            "add rule inet {TABLE} forward {protocol} daddr @{set} counter name {counter} drop"
        );
    }
    answers(&mut text, rules, marks, mask);
    deliveries(&mut text, rules);
    text
}

/// From `old` to `new`, when only VIPs came or went; `None` when the chains change too.
pub(super) fn change(old: &Rules, new: &Rules, marks: &Marks) -> Option<String> {
    if old.host_services != new.host_services {
        return None;
    }
    let mut text = String::new();
    replace(&mut text, "vips", &old.vips, &new.vips);
    for (uplink, mark) in marks {
        let (old, new) = (old.vips_of(uplink), new.vips_of(uplink));
        replace(&mut text, &answered(*mark), &old, &new);
    }
    Some(text)
}

fn replace(text: &mut String, set: &str, old: &BTreeSet<IpAddr>, new: &BTreeSet<IpAddr>) {
    elements(text, "delete", set, &(old - new));
    elements(text, "add", set, &(new - old));
}

/// `set` is named without its family.
fn elements(text: &mut String, verb: &str, set: &str, vips: &BTreeSet<IpAddr>) {
    for (family, suffix) in [(Family::V4, 4), (Family::V6, 6)] {
        let mut list = String::new();
        for vip in vips.iter().filter(|vip| Family::of(**vip) == family) {
            let comma = if list.is_empty() { "" } else { ", " };
            let _ = write!(list, "{comma}{vip}");
        }
        if !list.is_empty() {
            let _ = writeln!(
                text,
                "{verb} element inet {TABLE} {set}{suffix} {{ {list} }}"
            );
        }
    }
}

/// The set, without its family, of the VIPs whose answers get this mark.
fn answered(mark: u32) -> String {
    format!("answered-{mark:x}-")
}

/// Marks what answers a connection that was made to a VIP of an uplink. The connection is asked, since the packet
/// of a pod still carries the pod's address when it is routed.
fn answers(text: &mut String, rules: &Rules, marks: &Marks, mask: u32) {
    for (uplink, mark) in marks {
        let set = answered(*mark);
        for (suffix, protocol, kind) in [(4, "ip", "ipv4_addr"), (6, "ip6", "ipv6_addr")] {
            let _ = writeln!(
                text,
                "add set inet {TABLE} {set}{suffix} {{ type {kind}; }}"
            );
            let _ = writeln!(text, "flush set inet {TABLE} {set}{suffix}");
            for chain in ["mark-answers", "mark-own-answers"] {
                let _ = writeln!(
                    text,
                    "add rule inet {TABLE} {chain} ct direction reply ct original {protocol} daddr @{set}{suffix} \
                     meta mark set meta mark and {:#x} or {mark:#x}",
                    !mask
                );
            }
        }
        elements(text, "add", &set, &rules.vips_of(uplink));
    }
}

fn deliveries(text: &mut String, rules: &Rules) {
    for (service, targets) in &rules.host_services {
        let Some(target) = target(targets) else {
            continue;
        };
        let protocol = protocol(service.vip);
        let transport = service.protocol.to_string().to_lowercase();
        let HostService { vip, port, .. } = service;
        for chain in ["deliver", "deliver-own"] {
            let _ = writeln!(
                text,
                "add rule inet {TABLE} {chain} {protocol} daddr {vip} {transport} dport {port} {target}"
            );
        }
        if targets.local.is_none() {
            // The answer has to come back here; a process of this node has its own address already.
            let _ = writeln!(
                text,
                "add rule inet {TABLE} hide-client ct direction original ct original {protocol} daddr {vip} \
                 meta l4proto {transport} ct original proto-dst {port} fib saddr type != local masquerade"
            );
        }
    }
}

/// Where a connection goes: this node's own endpoint, else the others in turn.
fn target(targets: &HostTargets) -> Option<String> {
    let to = |address: &SocketAddr| format!("{} to {address}", protocol(address.ip()));
    if let Some(local) = &targets.local {
        return Some(format!("dnat {}", to(local)));
    }
    match targets.remote.as_slice() {
        [] => None,
        [one] => Some(format!("dnat {}", to(one))),
        [first, ..] => {
            let choices: Vec<_> = targets
                .remote
                .iter()
                .enumerate()
                .map(|(index, address)| format!("{index} : {} . {}", address.ip(), address.port()))
                .collect();
            Some(format!(
                "dnat {} addr . port to numgen inc mod {} map {{ {} }}",
                protocol(first.ip()),
                choices.len(),
                choices.join(", ")
            ))
        }
    }
}

/// What nftables calls the family of an address.
fn protocol(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "ip",
        IpAddr::V6(_) => "ip6",
    }
}

impl Rules {
    /// The VIPs whose uplink this is.
    fn vips_of(&self, uplink: &str) -> BTreeSet<IpAddr> {
        self.uplinks
            .iter()
            .filter(|(_, name)| ***name == *uplink)
            .map(|(vip, _)| *vip)
            .collect()
    }
}
