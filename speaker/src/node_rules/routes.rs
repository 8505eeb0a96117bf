//! Policy routes: an answer of a VIP leaves by the VIP's uplink, though the node's default route is another one.
//!
//! Marked answers are looked up in the main table first, default routes left out, so that pods and nodes stay
//! where they are; what is left goes to the uplink's own router, by a table of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use landfall_core::ip::Family;
use serde::Deserialize;

use super::ruleset::Marks;
use super::tool::{ToolError, run};
use super::{Config, Rules};

/// A default route, as `ip -j route` prints it.
#[derive(Debug, Deserialize)]
pub(super) struct Route {
    dst: String,
    gateway: Option<IpAddr>,
    dev: Option<String>,
    #[serde(default)]
    metric: u32,
    /// Left out for the main table.
    table: Option<String>,
}

impl Route {
    pub(super) fn is_by(&self, interface: &str) -> bool {
        self.dev.as_deref() == Some(interface)
    }

    pub(super) fn is_main(&self) -> bool {
        self.table.is_none()
    }

    /// The number of its table, if it has no name.
    fn number(&self) -> Option<u32> {
        self.table.as_ref()?.parse().ok()
    }
}

/// A routing rule, as `ip -j rule` prints it.
#[derive(Debug, Deserialize)]
struct Rule {
    priority: u32,
    fwmark: Option<String>,
    table: Option<String>,
}

/// What should be there for one uplink and family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PolicyRoute {
    uplink: Arc<str>,
    family: Family,
    gateway: IpAddr,
    mark: u32,
    table: u32,
}

/// The uplinks of VIPs, by family.
pub(super) fn uplinks(rules: &Rules) -> BTreeSet<(Arc<str>, Family)> {
    let mut uplinks = BTreeSet::new();
    for (vip, uplink) in &rules.uplinks {
        let uplink = (uplink.clone(), Family::of(*vip));
        if !uplinks.contains(&uplink) {
            uplinks.insert(uplink);
        }
    }
    uplinks
}

/// Why uplinks have no policy route that they should have, for people.
pub(super) type Complaints = BTreeMap<(Arc<str>, Family), String>;

/// The policy routes that these uplinks want on this node, and a word on each that cannot be made.
pub(super) async fn plan(
    uplinks: &BTreeSet<(Arc<str>, Family)>,
    config: &Config,
) -> Result<(BTreeSet<PolicyRoute>, Complaints), ToolError> {
    let mut wanted = BTreeSet::new();
    let mut missing = Complaints::new();
    if !config.policy_routes {
        return Ok((wanted, missing));
    }
    let names: BTreeSet<&str> = uplinks.iter().map(|(name, _)| &**name).collect();
    let mut defaults = BTreeMap::new();
    for family in [Family::V4, Family::V6] {
        if uplinks.iter().any(|(_, of)| *of == family) {
            defaults.insert(family, default_routes(family).await?);
        }
    }
    for (uplink, family) in uplinks {
        let routes = &defaults[family];
        let preferred = routes
            .iter()
            .filter(|route| route.is_main())
            .min_by_key(|route| route.metric);
        if preferred.is_some_and(|route| route.is_by(uplink)) {
            continue;
        }
        let Some(gateway) = router(uplink, *family, routes, config) else {
            let complaint = format!(
                "{uplink} has no {family} router: answers to clients beyond it leave by {}; \
                 add a default route with a higher metric on {uplink}, or --uplink-gateway {uplink}=ADDRESS",
                preferred
                    .and_then(|route| route.dev.as_deref())
                    .unwrap_or("another interface")
            );
            missing.insert((uplink.clone(), *family), complaint);
            continue;
        };
        let index = names
            .iter()
            .position(|name| *name == &**uplink)
            .unwrap_or_default();
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let Some(mark) = config.mark(index) else {
            let complaint = format!(
                "{uplink}: no mark is left for it: widen the mark's mask {:#x}",
                config.mark_mask
            );
            missing.insert((uplink.clone(), *family), complaint);
            continue;
        };
        wanted.insert(PolicyRoute {
            uplink: uplink.clone(),
            family: *family,
            gateway,
            mark,
            table: config.table + index,
        });
    }
    Ok((wanted, missing))
}

/// An uplink's own router: the configured one, else that of some default route by it.
pub(super) fn router(
    uplink: &str,
    family: Family,
    defaults: &[Route],
    config: &Config,
) -> Option<IpAddr> {
    let configured = config
        .gateways
        .iter()
        .find(|(name, gateway)| name == uplink && Family::of(*gateway) == family)
        .map(|(_, gateway)| *gateway);
    let routed = || {
        defaults
            .iter()
            .filter(|route| route.number().is_none_or(|table| !config.owns(table)))
            .find(|route| route.is_by(uplink) && route.gateway.is_some())
            .and_then(|route| route.gateway)
    };
    configured.or_else(routed)
}

/// The marks by which packets find these routes.
pub(super) fn marks(routes: &BTreeSet<PolicyRoute>) -> Marks {
    routes
        .iter()
        .map(|route| (route.uplink.clone(), route.mark))
        .collect()
}

/// Makes `wanted` so; takes away what was there of ours and is not wanted. Runs only when something changed.
pub(super) async fn install(
    wanted: &BTreeSet<PolicyRoute>,
    config: &Config,
) -> Result<(), ToolError> {
    remove(config).await?;
    for (flag, family) in [("-4", Family::V4), ("-6", Family::V6)] {
        let mut batch = String::new();
        for route in wanted.iter().filter(|route| route.family == family) {
            let PolicyRoute {
                uplink,
                gateway,
                mark,
                table,
                ..
            } = route;
            let mask = config.mark_mask;
            let (first, second) = (config.priority, config.priority + 1);
            let _ = write!(
                batch,
                "route replace default via {gateway} dev {uplink} onlink table {table}\n\
                 rule add fwmark {mark:#x}/{mask:#x} lookup main suppress_prefixlength 0 priority {first}\n\
                 rule add fwmark {mark:#x}/{mask:#x} lookup {table} priority {second}\n"
            );
        }
        if !batch.is_empty() {
            run("ip", &[flag, "-batch", "-"], &batch).await?;
        }
    }
    Ok(())
}

/// Takes every policy route of ours away.
pub(super) async fn remove(config: &Config) -> Result<(), ToolError> {
    for flag in ["-4", "-6"] {
        for priority in [config.priority, config.priority + 1] {
            // One at a time, until none is left; the bound is the number of marks there can be.
            for _ in 0..256 {
                let priority = priority.to_string();
                if run("ip", &[flag, "rule", "del", "priority", &priority], "")
                    .await
                    .is_err()
                {
                    break;
                }
            }
        }
        let mut table = config.table;
        while config.mark(table - config.table).is_some() {
            // An absent table cannot be flushed, which is as good.
            let _ = run(
                "ip",
                &[flag, "route", "flush", "table", &table.to_string()],
                "",
            )
            .await;
            table += 1;
        }
    }
    Ok(())
}

/// Whether `wanted` is there still: the kernel takes routes away with their link, and others flush rules.
pub(super) async fn are_there(
    wanted: &BTreeSet<PolicyRoute>,
    config: &Config,
) -> Result<bool, ToolError> {
    for (flag, family) in [("-4", Family::V4), ("-6", Family::V6)] {
        if wanted.iter().all(|route| route.family != family) {
            continue;
        }
        let routes = default_routes(family).await?;
        let printed = run("ip", &[flag, "-j", "rule", "show"], "").await?;
        let rules: Vec<Rule> = serde_json::from_str(&printed).unwrap_or_default();
        let is_there = |wanted: &PolicyRoute| {
            let mark = format!("{:#x}", wanted.mark);
            let table = wanted.table.to_string();
            routes.iter().any(|route| {
                route.number() == Some(wanted.table)
                    && route.is_by(&wanted.uplink)
                    && route.gateway == Some(wanted.gateway)
            }) && [
                (config.priority, "main"),
                (config.priority + 1, table.as_str()),
            ]
            .iter()
            .all(|(priority, table)| {
                rules.iter().any(|rule| {
                    rule.priority == *priority
                        && rule.fwmark.as_ref() == Some(&mark)
                        && rule.table.as_deref() == Some(*table)
                })
            })
        };
        if !wanted
            .iter()
            .all(|route| route.family != family || is_there(route))
        {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(super) async fn default_routes(family: Family) -> Result<Vec<Route>, ToolError> {
    let flag = match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    };
    let printed = run(
        "ip",
        &[flag, "-j", "route", "show", "table", "all", "default"],
        "",
    )
    .await?;
    let mut routes: Vec<Route> = serde_json::from_str(&printed).unwrap_or_default();
    routes.retain(|route| route.dst == "default" && route.dev.is_some());
    Ok(routes)
}
