//! `landfall egress list`.

use std::collections::BTreeSet;

use landfall_api::conditions::VIRTUAL_IP_DRAINING;
use landfall_core::model::{Condition, EgressPolicy, NodeName};
use serde::Serialize;

use super::cluster::{Read, read};
use crate::ask::{ApiArgs, Format};
use crate::print;
use crate::table::{aligned, or_none};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How to print it.
    #[arg(short, long, default_value = "table")]
    output: Format,
    #[command(flatten)]
    api: ApiArgs,
}

/// A policy.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    addresses: Vec<String>,
    gateway: Option<String>,
    standby: Option<String>,
    pods: usize,
    host_network_pods: usize,
    ports_in_use: u64,
    ports_quota: Option<u32>,
    ports_per_pod: Option<u32>,
    /// It is in force, for all of its pods.
    ready: bool,
    reason: String,
    message: String,
}

impl Row {
    fn of(policy: &EgressPolicy, read: &Read) -> Self {
        let drains = read.index.draining(&policy.name);
        let mut vips = read.addresses_of(&policy.name);
        vips.retain(|vip| !drains.contains(&vip.address));
        let report = read.index.report(&policy.name).unwrap_or_default();
        let ready = policy.status.conditions.iter();
        let ready = ready.into_iter().find(|it| it.kind == "Ready");
        let is_true = |condition: &Condition| condition.status == "True";
        // What was said is about what the policy was before.
        let is_old = ready.is_some() && policy.status.generation < policy.generation;
        let (reason, message) = match ready {
            Some(_) if is_old => (
                "Unknown",
                "no controller has looked at its last change: does one run?",
            ),
            Some(ready) => (&*ready.reason, &*ready.message),
            None => (
                "Unknown",
                "no controller has said anything about it: does one run?",
            ),
        };
        let node = |name: Option<&NodeName>| name.map(ToString::to_string);
        Self {
            name: policy.name.to_string(),
            addresses: vips.iter().map(|vip| vip.address.to_string()).collect(),
            gateway: node(vips.iter().find_map(|vip| vip.leader.as_ref())),
            standby: node(vips.iter().find_map(|vip| vip.standby.as_ref())),
            pods: report.matched,
            host_network_pods: report.host_network,
            ports_in_use: policy.status.ports_in_use,
            ports_quota: policy.spec.ports,
            ports_per_pod: policy.spec.ports_per_pod,
            ready: !is_old && ready.is_some_and(is_true),
            reason: reason.to_owned(),
            message: message.to_owned(),
        }
    }

    /// Of addresses where flows go on that begin under no policy any more: of one that is deleted, or that leaves by others
    /// now.
    fn draining(policy: &str, read: &Read) -> Option<Self> {
        let drains = read.index.draining(policy);
        let vips = read.addresses_of(policy).into_iter();
        let vips: Vec<_> = vips.filter(|vip| drains.contains(&vip.address)).collect();
        let node = |name: Option<&NodeName>| name.map(ToString::to_string);
        let ports = vips.iter().filter_map(|vip| vip.ports_in_use.get(policy));
        let said = vips.iter().find_map(|vip| {
            let mut conditions = vip.conditions.iter();
            conditions.find(|it| it.kind == VIRTUAL_IP_DRAINING)
        });
        (!vips.is_empty()).then(|| Self {
            name: policy.to_owned(),
            addresses: vips.iter().map(|vip| vip.address.to_string()).collect(),
            gateway: node(vips.iter().find_map(|vip| vip.leader.as_ref())),
            standby: node(vips.iter().find_map(|vip| vip.standby.as_ref())),
            pods: 0,
            host_network_pods: 0,
            ports_in_use: ports.sum(),
            ports_quota: None,
            ports_per_pod: None,
            ready: true,
            reason: VIRTUAL_IP_DRAINING.to_owned(),
            message: said.map_or(String::new(), |it| it.message.clone()),
        })
    }

    fn cells(&self) -> Vec<String> {
        let addresses = self.addresses.join(",");
        let quota = self.ports_quota.map(|quota| format!("/{quota}"));
        vec![
            self.name.clone(),
            or_none((!addresses.is_empty()).then_some(addresses)),
            or_none(self.gateway.as_ref()),
            or_none(self.standby.as_ref()),
            self.pods.to_string(),
            format!("{}{}", self.ports_in_use, quota.unwrap_or_default()),
            if self.ready { "True" } else { "False" }.to_owned(),
            self.reason.clone(),
        ]
    }
}

const HEADER: [&str; 8] = [
    "NAME",
    "ADDRESSES",
    "GATEWAY",
    "STANDBY",
    "PODS",
    "PORTS",
    "READY",
    "REASON",
];

/// Prints the policies; whether all are in force.
pub(super) async fn run(args: Args) -> anyhow::Result<bool> {
    let read = read(&args.api.client().await?).await?;
    let policies = read.index.policies();
    let mut rows: Vec<Row> = policies.map(|policy| Row::of(policy, &read)).collect();
    let named = read
        .cluster
        .vips
        .values()
        .flat_map(|vip| &vip.egress_policies);
    let named: BTreeSet<_> = named.collect();
    rows.extend(
        named
            .into_iter()
            .filter_map(|name| Row::draining(name, &read)),
    );
    match args.output {
        Format::Json => {
            let json = serde_json::json!({ "policies": rows });
            print::result(serde_json::to_string_pretty(&json)?)?;
        }
        Format::Table if rows.is_empty() => print::result("There are no egress policies.")?,
        Format::Table => {
            let cells: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
            print::result(aligned(&HEADER, &cells))?;
            for row in rows.iter().filter(|row| !row.ready) {
                print::note(format_args!("{}: {}", row.name, row.message));
            }
        }
    }
    Ok(rows.iter().all(|row| row.ready))
}
