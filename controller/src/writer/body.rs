//! The JSON of each write: only the fields that are ours, for server-side apply.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use landfall_api::conditions::POOL_READY;
use landfall_core::ip::virtual_ip_name;
use landfall_core::ipam::{Counts, Overlap, PoolStatus, Record, ServiceStatus};
use landfall_core::model::{Condition, Holder, ObjectKey, OldFlows, Terms};
use landfall_core::selector::{Operator, Requirement};
use serde_json::{Value, json};

use super::{EventNote, PolicyStatus};

/// The field manager of everything the controller writes.
pub const FIELD_MANAGER: &str = "landfall-controller";
/// `apiVersion` of Landfall's kinds.
pub const API_VERSION: &str = "landfall.dev/v1alpha1";
/// The longest note that an Event may carry, in bytes.
const MAX_NOTE: usize = 1024;
/// The largest number in a status.
const MAX_NUMBER: u64 = 1 << 53;
/// How many overlaps a pool's condition names.
const MAX_OVERLAPS: usize = 8;

fn seconds(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn reference(key: &ObjectKey) -> Value {
    json!({ "namespace": &*key.namespace, "name": &*key.name })
}

fn names(names: &[Arc<str>]) -> Value {
    names.iter().map(|name| Value::from(&**name)).collect()
}

/// What outlives a policy.
fn terms((policy, terms): (&Arc<str>, &Terms)) -> Value {
    let mut said = json!({
        "policy": &**policy,
        "onDelete": match terms.on_delete {
            OldFlows::Keep => "Drain",
            OldFlows::Cut => "Cut",
        },
    });
    if let Some(selector) = &terms.gateways {
        let requirements = selector.requirements.iter().map(requirement);
        said["gateways"] = json!({ "matchExpressions": requirements.collect::<Vec<_>>() });
    }
    if terms.drains {
        said["drains"] = true.into();
    }
    said
}

fn requirement(requirement: &Requirement) -> Value {
    let (operator, values) = match &requirement.operator {
        Operator::In(values) => ("In", Some(values)),
        Operator::NotIn(values) => ("NotIn", Some(values)),
        Operator::Exists => ("Exists", None),
        Operator::DoesNotExist => ("DoesNotExist", None),
    };
    let mut said = json!({ "key": requirement.key, "operator": operator });
    if let Some(values) = values {
        said["values"] = values.iter().map(String::as_str).collect();
    }
    said
}

/// A `VirtualIP` with the spec of `record`.
pub fn virtual_ip(record: &Record) -> Value {
    let mut spec = json!({
        "address": record.address.to_string(),
        "pool": &*record.pool,
        "group": &*record.group,
        "services": record.services.iter().map(reference).collect::<Vec<_>>(),
    });
    if record.retain {
        spec["retain"] = true.into();
    }
    if !record.egress_policies.is_empty() {
        spec["egressPolicies"] = names(&record.egress_policies);
    }
    if !record.terms.is_empty() {
        spec["egressTerms"] = record.terms.iter().map(terms).collect();
    }
    if !record.former_policies.is_empty() {
        spec["formerEgressPolicies"] = names(&record.former_policies);
    }
    if !record.former.is_empty() {
        spec["former"] = record.former.iter().map(reference).collect();
    }
    json!({
        "apiVersion": API_VERSION,
        "kind": "VirtualIP",
        "metadata": { "name": virtual_ip_name(record.address) },
        "spec": spec,
    })
}

fn condition(condition: &Condition, now: Timestamp) -> Value {
    json!({
        "type": condition.kind,
        "status": condition.status,
        "reason": condition.reason,
        "message": condition.message,
        "lastTransitionTime": seconds(now),
    })
}

fn ingress(addresses: &[IpAddr]) -> Value {
    addresses
        .iter()
        .map(|address| json!({ "ip": address.to_string(), "ipMode": "VIP" }))
        .collect()
}

/// A Service with our part of its status. What it leaves out is removed if it was ours.
pub fn service_status(status: &ServiceStatus, now: Timestamp) -> Value {
    let mut wanted = json!({});
    if let Some(addresses) = &status.ingress {
        wanted["loadBalancer"] = json!({ "ingress": ingress(addresses) });
    }
    if !status.conditions.is_empty() {
        wanted["conditions"] = status
            .conditions
            .iter()
            .map(|c| condition(c, now))
            .collect();
    }
    let mut metadata = json!({ "name": &*status.key.name, "namespace": &*status.key.namespace });
    if !status.uid.is_empty() {
        // Of another Service with the same name the API server then says that it is not the one meant.
        metadata["uid"] = status.uid.as_str().into();
    }
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "status": wanted })
}

fn counts(counts: Counts) -> Value {
    // What a JSON number carries exactly.
    let number =
        |count: u128| u64::try_from(count).map_or(MAX_NUMBER, |count| count.min(MAX_NUMBER));
    json!({
        "total": number(counts.total),
        "assigned": number(counts.assigned),
        "quarantined": number(counts.quarantined),
        "available": number(counts.available),
    })
}

/// A pool with its status.
pub fn pool_status(status: &PoolStatus, now: Timestamp) -> Value {
    let mut ready = condition(&ready_condition(status), now);
    ready["observedGeneration"] = status.generation.into();
    json!({
        "apiVersion": API_VERSION,
        "kind": "IPAddressPool",
        "metadata": { "name": &*status.name },
        "status": {
            "ipv4": counts(status.v4),
            "ipv6": counts(status.v6),
            "conditions": [ready],
        },
    })
}

/// An egress policy with its status.
pub fn policy_status(policy: &PolicyStatus, now: Timestamp) -> Value {
    let status = &policy.status;
    let conditions = status.conditions.iter().map(|wanted| {
        let since = policy.since.get(&wanted.kind);
        let since = since.and_then(|since| Timestamp::from_second(*since).ok());
        let mut condition = condition(wanted, since.unwrap_or(now));
        condition["observedGeneration"] = status.generation.into();
        condition
    });
    let mut said = json!({
        "addresses": status.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "matchedPods": status.matched_pods.min(MAX_NUMBER),
        "hostNetworkPods": status.host_network_pods.min(MAX_NUMBER),
        "portsInUse": status.ports_in_use.min(MAX_NUMBER),
        "conditions": conditions.collect::<Vec<_>>(),
    });
    if let Some(gateway) = &status.gateway {
        said["gateway"] = gateway.to_string().into();
    }
    if let Some(standby) = &status.standby {
        said["standby"] = standby.to_string().into();
    }
    let mut metadata = json!({ "name": &*policy.name });
    if !policy.uid.is_empty() {
        metadata["uid"] = policy.uid.as_str().into();
    }
    json!({ "apiVersion": API_VERSION, "kind": "EgressPolicy", "metadata": metadata, "status": said })
}

/// The condition that says whether a pool can be read, and whether anything else claims its addresses.
pub fn ready_condition(status: &PoolStatus) -> Condition {
    if let Some(flaw) = &status.flaw {
        return Condition {
            kind: POOL_READY.into(),
            status: "False".into(),
            reason: "MalformedAddresses".into(),
            message: format!("{flaw}; until then the pool's last good addresses stay in force"),
        };
    }
    let Some(first) = status.overlaps.first() else {
        return Condition {
            kind: POOL_READY.into(),
            status: "True".into(),
            reason: "NoOverlap".into(),
            message: "no other pool, node address, pod or Service CIDR lies in this pool".into(),
        };
    };
    let reason = match first {
        Overlap::Pool(_) => "OverlapsPool",
        Overlap::Node(..) => "OverlapsNode",
        Overlap::PodCidr(..) => "OverlapsPodCIDR",
        Overlap::ServiceCidr(_) => "OverlapsServiceCIDR",
    };
    let mut named: Vec<String> = status
        .overlaps
        .iter()
        .take(MAX_OVERLAPS)
        .map(|overlap| match overlap {
            Overlap::Pool(pool) => format!("IPAddressPool {pool}"),
            Overlap::Node(node, address) => format!("node {node}'s address {address}"),
            Overlap::PodCidr(node, cidr) => format!("node {node}'s pod CIDR {cidr}"),
            Overlap::ServiceCidr(cidr) => format!("the Service CIDR {cidr}"),
        })
        .collect();
    let more = status.overlaps.len().saturating_sub(MAX_OVERLAPS);
    if more > 0 {
        named.push(format!("{more} more"));
    }
    Condition {
        kind: POOL_READY.into(),
        status: "False".into(),
        reason: reason.into(),
        message: format!(
            "addresses of this pool also belong to {}: take them out of one of them; no address is handed \
             out twice, and a node's own never",
            named.join(", ")
        ),
    }
}

/// An Event of `events.k8s.io/v1`.
pub fn event(note: &EventNote, instance: &str) -> Value {
    let mut text = note.notice.message.as_str();
    if text.len() > MAX_NOTE {
        let end = (0..=MAX_NOTE)
            .rev()
            .find(|&end| text.is_char_boundary(end))
            .unwrap_or(0);
        text = &text[..end];
    }
    let regarding = match &note.about {
        Holder::Service(key) => json!({
            "apiVersion": "v1",
            "kind": "Service",
            "namespace": &*key.namespace,
            "name": &*key.name,
            "uid": note.uid,
        }),
        Holder::EgressPolicy(name) => json!({
            "apiVersion": API_VERSION,
            "kind": "EgressPolicy",
            "name": &**name,
            "uid": note.uid,
        }),
    };
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": { "name": note.name, "namespace": note.namespace() },
        "eventTime": note.at.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string(),
        "reportingController": "landfall.dev/controller",
        "reportingInstance": instance,
        "action": note.notice.action,
        "reason": note.notice.reason,
        "note": text,
        "type": if note.notice.warning { "Warning" } else { "Normal" },
        "regarding": regarding,
    })
}
