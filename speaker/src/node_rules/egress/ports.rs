//! Pods that share a bridge: each sends from its own port, or not as itself.
//!
//! Prerouting sees the bridge and not its ports, so one pod could send with the address of another. A table of family
//! `bridge` drops that: it knows at which port a pod's address is, from the kernel, which tells the addresses of the other
//! end of a veth (`IFA_TARGET_NETNSID`). An address that several ports have is at none of them, unless it was known before.
//! Ports whose other end is in no other namespace lead elsewhere (an uplink, another bridge), and are not judged.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use rtnetlink::sys::protocols::NETLINK_ROUTE;
use tokio::task::spawn_blocking;

use super::super::ruleset::{Element, TABLE, replace_in};
use super::super::tool::{self, ToolError};
use super::super::{Leaving, Rules};
use super::counter;
use crate::netlink::{DUMP, Requests, find, put, split, text};

/// Why such packets are dropped.
pub(in super::super) const FORGED: &str = "forged";
/// In front of everything that bridges filter, and of what they translate.
const PRIORITY: i32 = -300;
/// How often the kernel is asked again while what it lists changes.
const TRIES: u32 = 5;

/// A pod's address, and which pod of several that have had it.
type Pods = BTreeMap<IpAddr, u64>;

/// A port of a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Port {
    name: Arc<str>,
    /// The namespace of its other end, as this one numbers it, and its index there.
    end: Option<(i32, u32)>,
    /// The addresses of the other end.
    addresses: BTreeSet<IpAddr>,
}

/// Where addresses are: the interfaces' indexes. More than one: nobody knows.
type Places = BTreeMap<IpAddr, BTreeSet<u32>>;

/// What the table says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    pods: BTreeSet<IpAddr>,
    at: BTreeSet<At>,
    trunks: BTreeSet<Arc<str>>,
}

/// An address, and the port that it is at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct At {
    address: IpAddr,
    port: Arc<str>,
}

impl Element for At {
    fn vip(&self) -> IpAddr {
        self.address
    }

    fn text(&self) -> String {
        format!("{:?} . {}", self.port, self.address)
    }
}

/// Keeps the table.
#[derive(Debug, Default)]
pub(in super::super) struct Ports {
    /// What was looked for last.
    pods: Pods,
    /// The ports that there are.
    seen: BTreeMap<u32, Port>,
    places: Places,
    /// Nothing while it is not known what there is.
    said: Option<Said>,
    /// Addresses that several ports have, as it was said.
    disputed: BTreeSet<IpAddr>,
    /// Why the table cannot be written, as it was said.
    problem: Option<String>,
}

impl Ports {
    /// Makes the table say where this node's pods are; the process that did, if it took one. Where it cannot be written, that
    /// is said: pods that share a bridge are then told apart by their word.
    pub(in super::super) async fn make(&mut self, rules: &Rules) -> Option<u32> {
        let pods = rules.egress.as_deref().map(pods).unwrap_or_default();
        if pods != self.pods {
            self.look(pods).await;
        }
        let (process, problem) = match self.write().await {
            Ok(process) => (process, None),
            Err(_) if self.places.is_empty() => {
                // There is nothing to say, and a kernel without this family holds nothing.
                self.said = Some(Said::default());
                (None, None)
            }
            Err(problem) => (None, Some(problem.to_string())),
        };
        if problem != self.problem
            && let Some(problem) = &problem
        {
            tracing::warn!(
                %problem,
                "pods that share a bridge could send with each other's addresses: nftables has no table bridge {TABLE}"
            );
        }
        self.problem = problem;
        process
    }

    /// Looks again, now that some link or address changed; whether the table still is right.
    pub(in super::super) async fn are_right(&mut self) -> bool {
        let Some(said) = self.said.clone() else {
            return self.problem.is_some();
        };
        self.look(self.pods.clone()).await;
        self.saying() == said
    }

    /// Whether several pods have the same address.
    pub(in super::super) fn are_disputed(&self) -> bool {
        !self.disputed.is_empty()
    }

    /// It is not known any more what the table says.
    pub(in super::super) fn doubt(&mut self) {
        self.said = None;
    }

    async fn look(&mut self, pods: Pods) {
        if pods.is_empty() {
            *self = Self {
                said: self.said.take(),
                problem: self.problem.take(),
                ..Self::default()
            };
            return;
        }
        let mut known = self.seen.clone();
        // What may be over is looked at again.
        known.retain(|_, port| port.addresses.is_disjoint(&self.disputed));
        let wanted: BTreeSet<IpAddr> = pods.keys().copied().collect();
        let seen = spawn_blocking(move || look(known, &wanted)).await;
        match seen.map_err(io::Error::other).flatten() {
            Ok(ports) => {
                self.places = places(&self.places, &self.pods, &pods, &ports);
                self.seen = ports;
                self.complain();
            }
            Err(error) => tracing::warn!(
                %error,
                "the ports of bridges cannot be read: a new pod of this node could send with the address of another"
            ),
        }
        self.pods = pods;
    }

    fn complain(&mut self) {
        let disputed = self.places.iter().filter(|(_, ports)| ports.len() > 1);
        let disputed: BTreeSet<IpAddr> = disputed.map(|(address, _)| *address).collect();
        for address in disputed.difference(&self.disputed) {
            let names = self.places[address]
                .iter()
                .filter_map(|port| Some(&*self.seen.get(port)?.name));
            let names: Vec<&str> = names.collect();
            tracing::warn!(
                %address,
                ports = names.join(", "),
                "a pod's address is at several ports of bridges: it sends from none of them until all but one are gone"
            );
        }
        self.disputed = disputed;
    }

    fn saying(&self) -> Said {
        let name = |port: &u32| self.seen.get(port).map(|port| Arc::clone(&port.name));
        let only = |(address, ports): (&IpAddr, &BTreeSet<u32>)| {
            let mut ports = ports.iter();
            let (Some(port), None) = (ports.next(), ports.next()) else {
                return None;
            };
            Some(At {
                address: *address,
                port: name(port)?,
            })
        };
        let ports = self.seen.values();
        Said {
            pods: self.places.keys().copied().collect(),
            at: self.places.iter().filter_map(only).collect(),
            trunks: ports
                .filter(|port| port.end.is_none())
                .map(|port| Arc::clone(&port.name))
                .collect(),
        }
    }

    async fn write(&mut self) -> Result<Option<u32>, ToolError> {
        let new = self.saying();
        let is_wanted = |said: &Said| !said.pods.is_empty();
        let script = match &self.said {
            Some(old) if *old == new => return Ok(None),
            Some(old) if is_wanted(old) && is_wanted(&new) => change(old, &new),
            _ if is_wanted(&new) => whole(&new),
            _ => gone(),
        };
        self.said = None;
        let process = tool::load(&script).await?;
        self.said = Some(new);
        Ok(Some(process))
    }
}

/// The table's end, whether it is there or not.
pub(in super::super) fn gone() -> String {
    format!("add table bridge {TABLE}\ndelete table bridge {TABLE}\n")
}

fn whole(said: &Said) -> String {
    let mut script = gone();
    let counter = counter(FORGED);
    let _ = writeln!(
        script,
        "add table bridge {TABLE}
add counter bridge {TABLE} {counter}
add set bridge {TABLE} trunks {{ type ifname; }}
add chain bridge {TABLE} ports {{ type filter hook prerouting priority {PRIORITY}; policy accept; }}"
    );
    for (family, kind, suffix) in [("ip", "ipv4_addr", 4), ("ip6", "ipv6_addr", 6)] {
        let _ = writeln!(
            script,
            "add set bridge {TABLE} pods{suffix} {{ type {kind}; }}
add set bridge {TABLE} at{suffix} {{ type ifname . {kind}; }}
add rule bridge {TABLE} ports iifname != @trunks {family} saddr @pods{suffix} \
             iifname . {family} saddr != @at{suffix} counter name {counter} drop"
        );
    }
    script + &change(&Said::default(), said)
}

/// An address is at its port before nobody else may have it.
fn change(old: &Said, new: &Said) -> String {
    let mut script = String::new();
    for (verb, names) in [
        ("add", &new.trunks - &old.trunks),
        ("delete", &old.trunks - &new.trunks),
    ] {
        if !names.is_empty() {
            let names = super::names(&names);
            let _ = writeln!(script, "{verb} element bridge {TABLE} trunks {{ {names} }}");
        }
    }
    replace_in(&mut script, "bridge", "at", &old.at, &new.at);
    replace_in(&mut script, "bridge", "pods", &old.pods, &new.pods);
    script
}

/// This node's pods.
fn pods(leaving: &Leaving) -> Pods {
    let pods = leaving.egress.pods.iter();
    pods.filter(|(_, pod)| pod.node == leaving.node)
        .map(|(address, pod)| (*address, pod.identity))
        .collect()
}

/// Where pods' addresses are. One that is where it was is nowhere else, whoever has taken it since.
fn places(before: &Places, then: &Pods, pods: &Pods, ports: &BTreeMap<u32, Port>) -> Places {
    let mut places = Places::new();
    for (index, port) in ports {
        for address in &port.addresses {
            if pods.contains_key(address) {
                places.entry(*address).or_default().insert(*index);
            }
        }
    }
    for (address, now) in &mut places {
        let same = then.get(address) == pods.get(address);
        let known = before.get(address).filter(|ports| same && ports.len() == 1);
        if let Some(known) = known.filter(|known| known.is_subset(now)) {
            now.clone_from(known);
        }
    }
    places
}

/// The ports of all bridges of this namespace. What is known of one that has a pod's address is not asked again.
fn look(
    mut known: BTreeMap<u32, Port>,
    pods: &BTreeSet<IpAddr>,
) -> io::Result<BTreeMap<u32, Port>> {
    let requests = Requests::open(NETLINK_ROUTE)?.strict()?;
    let mut ports = again(|| links(&requests))?;
    for (index, port) in &mut ports {
        let Some((namespace, link)) = port.end else {
            continue;
        };
        let same = known
            .remove(index)
            .filter(|it| it.end == port.end && it.name == port.name);
        port.addresses = match same {
            Some(same) if !same.addresses.is_disjoint(pods) => same.addresses,
            // It may be gone by now, and its namespace with it.
            _ => again(|| addresses(&requests, namespace, link)).unwrap_or_default(),
        };
    }
    Ok(ports)
}

/// What changes while it is listed is listed again.
fn again<T>(list: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let mut outcome = list();
    for _ in 1..TRIES {
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => outcome = list(),
            outcome => return outcome,
        }
    }
    outcome
}

fn links(requests: &Requests) -> io::Result<BTreeMap<u32, Port>> {
    const SLAVE_KIND: u16 = 4; // IFLA_INFO_SLAVE_KIND
    let mut ports = BTreeMap::new();
    // `struct ifinfomsg`, all zero: every link.
    requests.ask(libc::RTM_GETLINK, DUMP, &[0; 16], |link| {
        let (Some(header), Some(attributes)) = (link.first_chunk::<16>(), link.get(16..)) else {
            return;
        };
        let index = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
        let kind = find(attributes, libc::IFLA_LINKINFO).and_then(|info| find(info, SLAVE_KIND));
        if kind.map(text).as_deref() != Some("bridge") {
            return;
        }
        let number = |kind| {
            let bytes = find(attributes, kind)?;
            bytes.try_into().ok().map(u32::from_ne_bytes)
        };
        let namespace = number(libc::IFLA_LINK_NETNSID).map(u32::cast_signed);
        ports.insert(
            index,
            Port {
                name: find(attributes, libc::IFLA_IFNAME)
                    .map(text)
                    .unwrap_or_default()
                    .into(),
                end: namespace.zip(number(libc::IFLA_LINK)),
                addresses: BTreeSet::new(),
            },
        );
    })?;
    Ok(ports)
}

/// The addresses of an interface in another namespace.
fn addresses(requests: &Requests, namespace: i32, link: u32) -> io::Result<BTreeSet<IpAddr>> {
    const TARGET_NAMESPACE: u16 = 10; // IFA_TARGET_NETNSID
    // `struct ifaddrmsg`: of all families, of this interface.
    let mut body = [[0; 4], link.to_ne_bytes()].concat();
    put(&mut body, TARGET_NAMESPACE, &namespace.to_ne_bytes());
    let mut addresses = BTreeSet::new();
    requests.ask(libc::RTM_GETADDR, DUMP, &body, |message| {
        let (Some(header), Some(attributes)) = (message.first_chunk::<8>(), message.get(8..))
        else {
            return;
        };
        if u32::from_ne_bytes([header[4], header[5], header[6], header[7]]) != link {
            return;
        }
        // Of a link between two ends the local one is the interface's.
        let mut all = split(attributes).filter(|(kind, _)| *kind == libc::IFA_LOCAL);
        let own = all.next().map(|(_, value)| value);
        addresses.extend(
            own.or_else(|| find(attributes, libc::IFA_ADDRESS))
                .and_then(address),
        );
    })?;
    Ok(addresses)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(bytes).into());
    }
    <[u8; 16]>::try_from(bytes)
        .ok()
        .map(|bytes| Ipv6Addr::from(bytes).into())
}

#[cfg(test)]
mod tests;
