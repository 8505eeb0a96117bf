//! Routes of what leaves with the egress mark: a table for each way.
//!
//! ```text
//!  rule  mark of the way ─> table
//!          throw      the cluster's own networks: as if there were no mark
//!          [via]      shadows of VIPs, where this node is the gateway: nobody
//!          [link]     the networks at the uplink, where this node is the gateway
//!          default    by the uplink: its router where this node is the gateway, else nobody
//!          blackhole  when the uplink is gone
//! ```
//!
//! Where another node is the gateway, the guard at the uplink writes its Ethernet address on each frame. Without the
//! guard a frame goes to an address that no bridge forwards. So it is with frames to addresses that this node itself has, as
//! far as others know: VIPs, and those that pods leave by here. Nobody answers this node when it asks who has them; at the
//! uplink the gateway's program lets such frames come in.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use landfall_core::egress::shadows;
use landfall_core::ip::Family;
use landfall_ebpf_common::egress::gateway::NOWHERE;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use serde::Deserialize;

use super::super::routes::{Route, default_routes, router};
use super::super::tool::{ToolError, run};
use super::super::{Config, Leaving, Rules, TUNNEL};
use super::entry::{Entry, Shown};
use super::ways::{self, Way, Ways};
use super::{merged, own};
use crate::announcer::MacAddr;

/// The next hop of what goes to another node: of this link alone (RFC 3927, RFC 4291), and nobody's.
const NOBODY: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 76, 70)),
    IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x4c46)),
];
/// The most that the tunnel puts in front of a packet: Ethernet, VXLAN, UDP, and IPv4 or IPv6.
const TUNNEL_HEADERS: [u32; 2] = [50, 70];

/// What tables are made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Asked {
    ways: BTreeSet<Way>,
    /// What is not to be routed by them.
    thrown: BTreeSet<IpNet>,
    /// A node at the other end of the tunnel.
    peer: Option<IpAddr>,
    /// The addresses that pods leave by here, by uplink.
    led: BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
    /// What stands for VIPs, where this node is a gateway.
    shadows: BTreeSet<IpAddr>,
}

/// What tables these rules want.
pub(in super::super) fn asked(rules: &Rules) -> Asked {
    let Some(leaving) = &rules.egress else {
        return Asked::default();
    };
    let ways = ways::wanted(leaving);
    let shadows = if ways.iter().any(|way| way.here) {
        shadows(&rules.vips, &leaving.egress.inside)
    } else {
        BTreeMap::new()
    };
    Asked {
        ways,
        thrown: thrown(leaving),
        peer: rules
            .tunnel
            .as_ref()
            .and_then(|tunnel| tunnel.peers.first().copied()),
        led: led(leaving),
        shadows: shadows.into_values().collect(),
    }
}

fn led(leaving: &Leaving) -> BTreeMap<Arc<str>, BTreeSet<IpAddr>> {
    let mut led = BTreeMap::<_, BTreeSet<IpAddr>>::new();
    for policy in leaving.egress.policies.values() {
        let gateway = policy.gateway.as_ref();
        if let Some(gateway) = gateway.filter(|gateway| gateway.node == leaving.node) {
            let led = led.entry(gateway.uplink.clone()).or_default();
            led.extend(&policy.addresses);
        }
    }
    led
}

impl Asked {
    pub(in super::super) fn ways(&self) -> &BTreeSet<Way> {
        &self.ways
    }
}

/// The cluster's networks, and those of this node's pods that are in none of them.
fn thrown(leaving: &Leaving) -> BTreeSet<IpNet> {
    let inside = merged(&leaving.egress.inside);
    let strays = own(leaving)
        .map(|(address, _)| IpNet::from(address))
        .filter(|pod| !inside.iter().any(|net| net.contains(pod)));
    inside.iter().copied().chain(strays).collect()
}

/// The routes of a way, by family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Table {
    way: Way,
    family: Family,
    mark: u32,
    mask: u32,
    number: u32,
    routes: BTreeSet<Entry>,
    /// The neighbours at its uplink that are nowhere.
    nowhere: BTreeSet<IpAddr>,
}

/// The tables for these ways, and a word on each that lacks something.
pub(in super::super) async fn plan(
    asked: &Asked,
    ways: &Ways,
    config: &Config,
) -> Result<(Vec<Table>, Vec<String>), ToolError> {
    let (_, egress) = config.egress_marks();
    let mut tables = Vec::new();
    let mut missing = Vec::new();
    let up = up();
    for family in families() {
        let defaults = if ways.keys().any(|way| way.here) {
            default_routes(family).await?
        } else {
            Vec::new()
        };
        for (way, value) in ways {
            let thrown = asked.thrown.iter();
            let mut routes: BTreeSet<Entry> = thrown
                .filter(|net| Family::of(net.addr()) == family)
                .map(|net| Entry::Throw(*net))
                .collect();
            routes.insert(Entry::Blackhole);
            let mut nowhere = BTreeSet::new();
            let default = |via| Entry::Default {
                via,
                dev: way.uplink.clone(),
                mtu: None,
            };
            if !takes(&way.uplink, family, &up) {
                // Nothing leaves until it is back, which is heard of.
            } else if way.here {
                routes.extend(connected(&way.uplink, family).await?);
                let led = asked.led.get(&way.uplink).into_iter().flatten();
                nowhere.extend(led.filter(|address| Family::of(**address) == family));
                nowhere.insert(nobody(family));
                let shadows = asked.shadows.iter().copied();
                let shadows = shadows.filter(|shadow| Family::of(*shadow) == family);
                routes.extend(
                    shadows.map(|shadow| {
                        Entry::Via(shadow.into(), nobody(family), way.uplink.clone())
                    }),
                );
                let router = router(&way.uplink, family, &defaults, config);
                if router.is_some() || is_default(&way.uplink, &defaults) {
                    routes.insert(default(router));
                } else {
                    missing.push(format!(
                        "{0} has no {family} router: what leaves by this node goes no further than that segment; add \
                         a default route with a higher metric on {0}, or --uplink-gateway {0}=ADDRESS",
                        way.uplink
                    ));
                }
            } else {
                routes.insert(Entry::Default {
                    via: Some(nobody(family)),
                    dev: way.uplink.clone(),
                    mtu: mtu(way, asked).await?,
                });
                nowhere.insert(nobody(family));
            }
            tables.push(Table {
                way: way.clone(),
                family,
                mark: egress | value,
                mask: egress | config.mark_mask,
                number: config.egress_table(*value),
                routes,
                nowhere,
            });
        }
    }
    Ok((tables, missing))
}

/// The families that the kernel has.
fn families() -> impl Iterator<Item = Family> {
    let has_v6 = fs::exists("/proc/sys/net/ipv6").unwrap_or(true);
    [Some(Family::V4), has_v6.then_some(Family::V6)]
        .into_iter()
        .flatten()
}

/// The interfaces that are up.
fn up() -> BTreeSet<String> {
    let all = getifaddrs().into_iter().flatten();
    all.filter(|it| it.flags.contains(InterfaceFlags::IFF_UP))
        .map(|it| it.interface_name)
        .collect()
}

/// Whether an uplink takes packets of a family.
fn takes(uplink: &str, family: Family, up: &BTreeSet<String>) -> bool {
    let disabled = || {
        let path = format!("/proc/sys/net/ipv6/conf/{uplink}/disable_ipv6");
        fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
    };
    up.contains(uplink) && (family == Family::V4 || !disabled())
}

fn nobody(family: Family) -> IpAddr {
    match family {
        Family::V4 => NOBODY[0],
        Family::V6 => NOBODY[1],
    }
}

fn is_default(uplink: &str, defaults: &[Route]) -> bool {
    defaults
        .iter()
        .any(|route| route.is_main() && route.is_by(uplink))
}

/// What the tunnel takes in one piece: a pod is told by ICMP to send no more.
async fn mtu(way: &Way, asked: &Asked) -> Result<Option<u32>, ToolError> {
    #[derive(Deserialize)]
    struct Link {
        mtu: u32,
    }
    let Some(peer) = asked.peer.filter(|_| *way.uplink == *TUNNEL) else {
        return Ok(None);
    };
    // Without a route to it there may be one later, which is heard of.
    let asked = ["-j", "route", "get", &peer.to_string()];
    let printed = run("ip", &asked, "").await.unwrap_or_default();
    let to: Vec<Shown> = serde_json::from_str(&printed).unwrap_or_default();
    let Some(outer) = to.first().and_then(|route| route.dev.as_deref()) else {
        return Ok(None);
    };
    let printed = run("ip", &["-j", "link", "show", "dev", outer], "").await?;
    let links: Vec<Link> = serde_json::from_str(&printed).unwrap_or_default();
    let headers = TUNNEL_HEADERS[usize::from(peer.is_ipv6())];
    Ok(links.first().map(|link| link.mtu.saturating_sub(headers)))
}

/// The networks that are at an uplink.
async fn connected(uplink: &Arc<str>, family: Family) -> Result<Vec<Entry>, ToolError> {
    let shown = ["-j", "route", "show", "table", "main", "dev", uplink];
    let printed = run("ip", &[&[flag(family)], &shown[..]].concat(), "").await?;
    let routes: Vec<Shown> = serde_json::from_str(&printed).unwrap_or_default();
    Ok(routes
        .into_iter()
        .filter(|route| route.gateway.is_none() && route.dst != "default")
        .filter_map(|route| Some(Entry::Link(route.dst.parse().ok()?, uplink.clone())))
        .collect())
}

/// Makes these tables so, beside what is there: a packet with the mark finds the old way or the new one.
pub(in super::super) async fn install(tables: &[Table], config: &Config) -> Result<(), ToolError> {
    for family in families() {
        let mut batch = String::new();
        let rules = rules(family, config).await?;
        let there = nowhere(family).await?;
        for table in tables.iter().filter(|table| table.family == family) {
            let Table { way, number, .. } = table;
            for address in &table.nowhere {
                if !there.contains(&(way.uplink.clone(), *address)) {
                    let _ = writeln!(
                        batch,
                        "neigh replace {address} lladdr {} dev {} nud permanent",
                        MacAddr(NOWHERE),
                        way.uplink
                    );
                }
            }
            let shown = shown(table).await;
            for route in table.routes.difference(&shown) {
                let _ = writeln!(batch, "route replace {route} table {number}");
            }
            let places: BTreeSet<_> = table.routes.iter().map(Entry::place).collect();
            let stale = shown.difference(&table.routes);
            for stale in stale.filter(|stale| !places.contains(&stale.place())) {
                let _ = writeln!(batch, "route del {stale} table {number}");
            }
            if !rules.iter().any(|rule| table.is_found_by(rule)) {
                let _ = writeln!(
                    batch,
                    "rule add fwmark {:#x}/{:#x} lookup {number} priority {}",
                    table.mark,
                    table.mask,
                    config.egress_priority()
                );
            }
        }
        if !batch.is_empty() {
            run("ip", &[flag(family), "-batch", "-"], &batch).await?;
        }
    }
    Ok(())
}

/// The uplinks by which answers come back.
pub(in super::super) fn answering(tables: &[Table]) -> BTreeSet<Arc<str>> {
    let uplinks = tables.iter().map(|table| table.way.uplink.clone());
    uplinks.collect()
}

/// Takes away all rules and tables of ours but these: once no packet gets their marks any more.
pub(in super::super) async fn prune(tables: &[Table], config: &Config) -> Result<(), ToolError> {
    for family in families() {
        let mut batch = String::new();
        for rule in rules(family, config).await? {
            let wanted = |table: &Table| table.family == family && table.is_found_by(&rule);
            if !tables.iter().any(wanted) {
                let _ = writeln!(
                    batch,
                    "rule del fwmark {}/{} priority {}",
                    rule.fwmark.as_deref().unwrap_or("0"),
                    rule.fwmask.as_deref().unwrap_or("0xffffffff"),
                    rule.priority
                );
            }
        }
        if !batch.is_empty() {
            run("ip", &[flag(family), "-batch", "-"], &batch).await?;
        }
        for value in config.ways() {
            let number = config.egress_table(value);
            if !tables.iter().any(|table| table.number == number) {
                // An absent table cannot be flushed, which is as good.
                let number = number.to_string();
                let _ = run(
                    "ip",
                    &[flag(family), "route", "flush", "table", &number],
                    "",
                )
                .await;
            }
        }
        forget_nowhere(family, tables).await?;
    }
    Ok(())
}

/// Takes the neighbours away that are nowhere and need not be.
async fn forget_nowhere(family: Family, tables: &[Table]) -> Result<(), ToolError> {
    for (dev, address) in nowhere(family).await? {
        let used = |table: &Table| table.way.uplink == dev && table.nowhere.contains(&address);
        if !tables.iter().any(used) {
            let address = address.to_string();
            let del = [flag(family), "neigh", "del", &address, "dev", &dev];
            run("ip", &del, "").await?;
        }
    }
    Ok(())
}

/// The neighbours that are nowhere, with their interfaces.
async fn nowhere(family: Family) -> Result<BTreeSet<(Arc<str>, IpAddr)>, ToolError> {
    #[derive(Deserialize)]
    struct Neighbour {
        dst: IpAddr,
        dev: Arc<str>,
        lladdr: Option<String>,
    }
    let shown = [flag(family), "-j", "neigh", "show", "nud", "permanent"];
    let printed = run("ip", &shown, "").await?;
    let known: Vec<Neighbour> = serde_json::from_str(&printed).unwrap_or_default();
    let lladdr = MacAddr(NOWHERE).to_string();
    Ok(known
        .into_iter()
        .filter(|it| it.lladdr.as_deref() == Some(&*lladdr))
        .map(|it| (it.dev, it.dst))
        .collect())
}

/// Whether these are there still.
pub(in super::super) async fn are_there(
    tables: &[Table],
    config: &Config,
) -> Result<bool, ToolError> {
    for family in families() {
        let rules = rules(family, config).await?;
        for table in tables.iter().filter(|table| table.family == family) {
            if !rules.iter().any(|rule| table.is_found_by(rule)) {
                return Ok(false);
            }
            if shown(table).await != table.routes {
                return Ok(false);
            }
        }
        let there = nowhere(family).await?;
        let of_family = tables.iter().filter(|table| table.family == family);
        for table in of_family {
            let place = |address: &IpAddr| (table.way.uplink.clone(), *address);
            if !table
                .nowhere
                .iter()
                .map(place)
                .all(|it| there.contains(&it))
            {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// A routing rule, as `ip -j rule` prints it.
#[derive(Debug, Deserialize)]
struct Rule {
    priority: u32,
    fwmark: Option<String>,
    fwmask: Option<String>,
    table: Option<String>,
}

impl Table {
    fn is_found_by(&self, rule: &Rule) -> bool {
        let hex = |text: &Option<String>| {
            let digits = text.as_deref()?.strip_prefix("0x")?;
            u32::from_str_radix(digits, 16).ok()
        };
        hex(&rule.fwmark) == Some(self.mark)
            && hex(&rule.fwmask).unwrap_or(u32::MAX) == self.mask
            && rule.table.as_deref() == Some(self.number.to_string().as_str())
    }
}

/// The rules of ours.
async fn rules(family: Family, config: &Config) -> Result<Vec<Rule>, ToolError> {
    let printed = run("ip", &[flag(family), "-j", "rule", "show"], "").await?;
    let mut rules: Vec<Rule> = serde_json::from_str(&printed).unwrap_or_default();
    rules.retain(|rule| rule.priority == config.egress_priority() && rule.fwmark.is_some());
    Ok(rules)
}

/// What is in a table.
async fn shown(table: &Table) -> BTreeSet<Entry> {
    let number = table.number.to_string();
    let asked = [flag(table.family), "-j", "route", "show", "table", &number];
    // A table in which nothing ever was is an error.
    let printed = run("ip", &asked, "").await.unwrap_or_default();
    let routes: Vec<Shown> = serde_json::from_str(&printed).unwrap_or_default();
    routes.into_iter().filter_map(Shown::entry).collect()
}

/// Lets the reverse path of what comes back by an uplink be looked up with its mark: its source is reached by that
/// uplink only with it, and a strict filter (RFC 3704) would drop it. Whether that was not so before.
pub(in super::super) fn ask_marks(uplink: &str) -> bool {
    let read = |key: &str| {
        let of = |name: &str| {
            fs::read_to_string(setting(name, key))
                .ok()
                .and_then(|text| text.trim().parse::<u8>().ok())
                .unwrap_or(0)
        };
        of("all").max(of(uplink))
    };
    if read("rp_filter") != 1 || read(VALID_MARK) != 0 {
        return false;
    }
    let written = fs::write(setting(uplink, VALID_MARK), "1");
    if let Err(error) = &written {
        tracing::warn!(
            %error,
            "the reverse-path filter may drop answers to pods that leave by other nodes: run \
             `sysctl -w net.ipv4.conf.{uplink}.{VALID_MARK}=1` on this node"
        );
    }
    written.is_ok()
}

/// As it was.
pub(in super::super) fn ask_no_marks(uplink: &str) {
    // The interface may be gone.
    let _ = fs::write(setting(uplink, VALID_MARK), "0");
}

const VALID_MARK: &str = "src_valid_mark";

fn setting(interface: &str, key: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{interface}/{key}")
}

fn flag(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}
