//! The text of the nftables table `landfall`: what to say at first, and what to say when something changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use landfall_core::ip::Family;
use landfall_core::model::Protocol;

use super::egress::{self, Ways};
use super::{Config, HostTargets, Rules, VipPort, pods};

/// The table's name, in family `inet`; and in family `bridge`, where pods share one.
pub(super) const TABLE: &str = "landfall";

/// An uplink whose answers are marked, and with what.
pub(super) type Marks = BTreeMap<Arc<str>, u32>;

/// The table anew, with its chains and sets, empty. What an earlier one held is gone in the same step, the counts too.
fn skeleton() -> String {
    format!(
        "add table inet {TABLE}
delete table inet {TABLE}
add table inet {TABLE}
add set inet {TABLE} vips4 {{ type ipv4_addr; }}
add set inet {TABLE} vips6 {{ type ipv6_addr; }}
add set inet {TABLE} refusing4 {{ type ipv4_addr; }}
add set inet {TABLE} refusing6 {{ type ipv6_addr; }}
add set inet {TABLE} silent4 {{ type ipv4_addr; }}
add set inet {TABLE} silent6 {{ type ipv6_addr; }}
add set inet {TABLE} ports4 {{ type ipv4_addr . inet_proto . inet_service; }}
add set inet {TABLE} ports6 {{ type ipv6_addr . inet_proto . inet_service; }}
add set inet {TABLE} refused4 {{ type ipv4_addr; flags dynamic, timeout; timeout 10s; size 65535; }}
add set inet {TABLE} refused6 {{ type ipv6_addr; flags dynamic, timeout; timeout 10s; size 65535; }}
add counter inet {TABLE} guard4
add counter inet {TABLE} guard6
add chain inet {TABLE} refuse
add chain inet {TABLE} unknown-ports {{ type filter hook prerouting priority dstnat + 5; policy accept; }}
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
pub(super) fn whole(rules: &Rules, marks: &Marks, ways: &Ways, config: &Config) -> String {
    let mut text = skeleton();
    elements(&mut text, "add", "vips", &rules.vips);
    elements(&mut text, "add", "silent", &rules.silent);
    elements(&mut text, "add", "refusing", &rules.refusing());
    elements(&mut text, "add", "ports", &rules.ports());
    egress::hairpin::from_inside(&mut text, rules);
    refusals(&mut text);
    for (protocol, counter, set) in [("ip", "guard4", "vips4"), ("ip6", "guard6", "vips6")] {
        let _ = writeln!(
            text,
            "add rule inet {TABLE} forward {protocol} daddr @{set} counter name {counter} drop"
        );
    }
    if config.translated {
        translated(&mut text, rules, marks, config);
    }
    answers(&mut text, rules, marks, config);
    deliveries(&mut text, rules);
    pods::whole(&mut text, rules);
    tunnel(&mut text, rules, config.tunnel_port);
    egress::whole(&mut text, rules, ways, config);
    text
}

/// From `old` to `new`, when only VIPs, pods or policies came or went; `None` when other chains change too.
pub(super) fn change(
    old: &Rules,
    new: &Rules,
    marks: &Marks,
    ways: &Ways,
    config: &Config,
) -> Option<String> {
    if old.host_services != new.host_services
        || old.tunnel.is_some() != new.tunnel.is_some()
        || old.pod_services.is_empty() != new.pod_services.is_empty()
        || !egress::is_alike(old, new)
    {
        return None;
    }
    let mut text = String::new();
    replace(&mut text, "vips", &old.vips, &new.vips);
    // A port is known before packets to others are refused.
    elements(&mut text, "add", "ports", &(&new.ports() - &old.ports()));
    replace(&mut text, "silent", &old.silent, &new.silent);
    replace(&mut text, "refusing", &old.refusing(), &new.refusing());
    elements(&mut text, "delete", "ports", &(&old.ports() - &new.ports()));
    for (uplink, mark) in marks {
        let (old, new) = (old.vips_of(uplink), new.vips_of(uplink));
        replace(&mut text, &answered(*mark), &old, &new);
    }
    pods::change(&mut text, old, new);
    replace(&mut text, "peers", &old.peers(), &new.peers());
    egress::change(&mut text, old, new, ways, config);
    Some(text)
}

pub(super) fn replace<E: Element + Ord + Clone>(
    text: &mut String,
    set: &str,
    old: &BTreeSet<E>,
    new: &BTreeSet<E>,
) {
    replace_in(text, "inet", set, old, new);
}

/// The same in the table of another family.
pub(super) fn replace_in<E: Element + Ord + Clone>(
    text: &mut String,
    table: &str,
    set: &str,
    old: &BTreeSet<E>,
    new: &BTreeSet<E>,
) {
    elements_in(text, table, "delete", set, &(old - new));
    elements_in(text, table, "add", set, &(new - old));
}

/// `set` is named without its family.
pub(super) fn elements<E: Element>(text: &mut String, verb: &str, set: &str, all: &BTreeSet<E>) {
    elements_in(text, "inet", verb, set, all);
}

fn elements_in<E: Element>(
    text: &mut String,
    table: &str,
    verb: &str,
    set: &str,
    all: &BTreeSet<E>,
) {
    for (family, suffix) in [(Family::V4, 4), (Family::V6, 6)] {
        let mut list = String::new();
        for element in all.iter().filter(|it| Family::of(it.vip()) == family) {
            let comma = if list.is_empty() { "" } else { ", " };
            let _ = write!(list, "{comma}{}", element.text());
        }
        if !list.is_empty() {
            let _ = writeln!(
                text,
                "{verb} element {table} {TABLE} {set}{suffix} {{ {list} }}"
            );
        }
    }
}

/// What is in a set: by its VIP it belongs to a family.
pub(super) trait Element {
    fn vip(&self) -> IpAddr;
    fn text(&self) -> String;
}

impl Element for IpAddr {
    fn vip(&self) -> IpAddr {
        *self
    }

    fn text(&self) -> String {
        self.to_string()
    }
}

impl Element for (IpAddr, Protocol, u16) {
    fn vip(&self) -> IpAddr {
        self.0
    }

    fn text(&self) -> String {
        let (vip, protocol, port) = self;
        format!("{vip} . {} . {port}", protocol.to_string().to_lowercase())
    }
}

/// Ports that no Service has are refused, ten times a second to each client; more is dropped by the guard. Of an address
/// that pods leave by, a SYN is refused and all else is dropped.
///
/// Before routing, and after every translation: a packet that is routed back to its segment is counted by the kernel as
/// a redirect, also when it is dropped then, and after each redirect its ICMP to that client has to wait anew.
fn refusals(text: &mut String) {
    for (protocol, suffix) in [("ip", 4), ("ip6", 6)] {
        for quiet in [
            "meta l4proto udp",
            "tcp flags & (fin | syn | rst | ack) != syn",
        ] {
            let _ = writeln!(
                text,
                "add rule inet {TABLE} unknown-ports {protocol} daddr @silent{suffix} {quiet} \
                 {protocol} daddr . meta l4proto . th dport != @ports{suffix} fib daddr type != local drop"
            );
        }
        let _ = writeln!(
            text,
            "add rule inet {TABLE} unknown-ports {protocol} daddr @refusing{suffix} meta l4proto {{ tcp, udp }} \
             {protocol} daddr . meta l4proto . th dport != @ports{suffix} fib daddr type != local \
             update @refused{suffix} {{ {protocol} saddr limit rate 10/second burst 10 packets }} goto refuse"
        );
    }
    let _ = writeln!(
        text,
        "add rule inet {TABLE} refuse meta l4proto tcp reject with tcp reset"
    );
    let _ = writeln!(
        text,
        "add rule inet {TABLE} refuse reject with icmpx port-unreachable"
    );
}

/// The set, without its family, of the VIPs whose answers get this mark.
fn answered(mark: u32) -> String {
    format!("answered-{mark:x}-")
}

/// Marks what answers a connection that was made to a VIP of an uplink. The connection is asked, since the packet
/// of a pod still carries the pod's address when it is routed.
///
/// What answers a pod by its gateway goes to the pod.
fn answers(text: &mut String, rules: &Rules, marks: &Marks, config: &Config) {
    let mask = config.mark_mask;
    let (_, egress) = config.egress_marks();
    let of_client = rules
        .egress
        .as_ref()
        .map_or(String::new(), |_| format!("ct mark and {egress:#x} == 0 "));
    for (uplink, mark) in marks {
        let set = answered(*mark);
        for (suffix, protocol, kind) in [(4, "ip", "ipv4_addr"), (6, "ip6", "ipv6_addr")] {
            let _ = writeln!(
                text,
                "add set inet {TABLE} {set}{suffix} {{ type {kind}; }}"
            );
            for chain in ["mark-answers", "mark-own-answers"] {
                let _ = writeln!(
                    text,
                    "add rule inet {TABLE} {chain} ct direction reply {of_client}ct original {protocol} daddr @{set}{suffix} \
                     meta mark set meta mark and {:#x} or {mark:#x}",
                    !mask
                );
            }
        }
        elements(text, "add", &set, &rules.vips_of(uplink));
    }
}

/// The same for what the eBPF programs translate: connection tracking sees the pod's address only. What comes in by the
/// uplink bears a mark of theirs, and by it the connection gets the uplink's.
fn translated(text: &mut String, rules: &Rules, marks: &Marks, config: &Config) {
    let (mask, arrival) = (config.mark_mask, config.arrival());
    let rest = !mask;
    for (uplink, mark) in marks {
        let _ = writeln!(
            text,
            "add rule inet {TABLE} mark-answers iifname \"{uplink}\" meta mark and {mask:#x} == {arrival:#x} \
             ct mark set ct mark and {rest:#x} or {mark:#x}"
        );
    }
    if is_arrival_asked(rules, marks) {
        // It is no route's mark.
        let _ = writeln!(
            text,
            "add rule inet {TABLE} mark-answers meta mark and {mask:#x} == {arrival:#x} \
             meta mark set meta mark and {rest:#x}"
        );
    }
    for (uplink, mark) in marks {
        for (chain, answer) in [
            ("mark-answers", format!("iifname != \"{uplink}\" ")),
            ("mark-own-answers", String::new()),
        ] {
            let _ = writeln!(
                text,
                "add rule inet {TABLE} {chain} {answer}ct mark and {mask:#x} == {mark:#x} \
                 meta mark set meta mark and {rest:#x} or {mark:#x}"
            );
        }
    }
}

/// Whether the rules have to know what the programs have translated.
pub(super) fn is_arrival_asked(rules: &Rules, marks: &Marks) -> bool {
    !marks.is_empty() || rules.egress.is_some()
}

fn deliveries(text: &mut String, rules: &Rules) {
    for (service, targets) in &rules.host_services {
        let Some(target) = target(targets) else {
            continue;
        };
        let protocol = protocol(service.vip);
        let transport = service.protocol.to_string().to_lowercase();
        let VipPort { vip, port, .. } = service;
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

/// Nobody but the other nodes sends into the tunnel.
fn tunnel(text: &mut String, rules: &Rules, port: u16) {
    if rules.tunnel.is_none() {
        return;
    }
    for (suffix, kind, family) in [(4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6")] {
        let _ = writeln!(
            text,
            "add set inet {TABLE} peers{suffix} {{ type {kind}; }}
add chain inet {TABLE} tunnel {{ type filter hook input priority filter - 5; policy accept; }}
add rule inet {TABLE} tunnel {family} saddr != @peers{suffix} udp dport {port} counter drop"
        );
    }
    elements(text, "add", "peers", &rules.peers());
}

/// Where a connection goes: this node's own endpoint, else the others in turn.
fn target(targets: &HostTargets) -> Option<String> {
    if let Some(local) = &targets.local {
        return to_any(&[*local], "");
    }
    to_any(&targets.remote, "numgen inc")
}

/// A translation to one of these, in turn or as `choice` says.
pub(super) fn to_any(targets: &[SocketAddr], choice: &str) -> Option<String> {
    match targets {
        [] => None,
        [one] => Some(format!("dnat {} to {one}", protocol(one.ip()))),
        [first, ..] => {
            let choices: Vec<_> = targets
                .iter()
                .enumerate()
                .map(|(index, address)| format!("{index} : {} . {}", address.ip(), address.port()))
                .collect();
            Some(format!(
                "dnat {} addr . port to {choice} mod {} map {{ {} }}",
                protocol(first.ip()),
                choices.len(),
                choices.join(", ")
            ))
        }
    }
}

/// What nftables calls the family of an address.
pub(super) fn protocol(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "ip",
        IpAddr::V6(_) => "ip6",
    }
}

impl Rules {
    fn peers(&self) -> BTreeSet<IpAddr> {
        let tunnel = self.tunnel.iter();
        tunnel.flat_map(|tunnel| &tunnel.peers).copied().collect()
    }

    fn refusing(&self) -> BTreeSet<IpAddr> {
        self.refusing.keys().copied().collect()
    }

    fn ports(&self) -> BTreeSet<(IpAddr, Protocol, u16)> {
        let each = self.refusing.iter();
        each.flat_map(|(vip, ports)| {
            ports
                .iter()
                .map(|(protocol, port)| (*vip, *protocol, *port))
        })
        .collect()
    }

    /// The VIPs whose uplink this is.
    fn vips_of(&self, uplink: &str) -> BTreeSet<IpAddr> {
        self.uplinks
            .iter()
            .filter(|(_, name)| ***name == *uplink)
            .map(|(vip, _)| *vip)
            .collect()
    }
}
