//! Egress policies, and the pods that they are about.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as corev1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as metav1;
use landfall_api::egress::{EgressIPs, IPFamily, OnAppear, OnDelete};
use landfall_api::{EgressPolicy, quantity};
use landfall_core::ip::Family;
use landfall_core::model;

use super::{Project, ProjectError, conditions, error, key_of, name_of, selector};

const KIND: &str = "EgressPolicy";

impl Project for EgressPolicy {
    fn project(self) -> Result<model::Object, ProjectError> {
        let meta = self.metadata;
        let name = name_of(KIND, &meta)?;
        let spec = self.spec;
        if spec.namespace_selector.is_none() && spec.pod_selector.is_none() {
            let problem = "spec selects no pods: write a podSelector, a namespaceSelector, or both";
            return Err(error(KIND, &meta, problem));
        }
        let one = |field: &str, from: Option<metav1::LabelSelector>| {
            let Some(from) = from else { return Ok(None) };
            let read = selector(KIND, &meta, field, from)?;
            // The API server refuses it; a manifest has no API server.
            if read.requirements.is_empty() {
                let problem = format!(
                    "{field}: an empty selector matches everything; give it matchLabels or matchExpressions, or \
                     leave it out"
                );
                return Err(error(KIND, &meta, problem));
            }
            Ok(Some(read))
        };
        let quota = spec.quota.unwrap_or_default();
        let bandwidth = match spec.bandwidth {
            None => None,
            Some(wanted) => Some(model::Bandwidth {
                rate: bits(&meta, "spec.bandwidth.rate", &wanted.rate)?,
                burst: wanted
                    .burst
                    .map(|burst| bits(&meta, "spec.bandwidth.burst", &burst))
                    .transpose()?,
            }),
        };
        let mut destinations = networks(&meta, "spec.destinationCIDRs", &spec.destination_cidrs)?;
        if destinations.is_empty() {
            destinations = everywhere();
        }
        let status = self.status.unwrap_or_default();
        let since = status.conditions.iter().map(|condition| {
            let at = condition.last_transition_time.0.as_second();
            (condition.type_.clone(), at)
        });
        let since = since.collect();
        Ok(model::Object::EgressPolicy(Box::new(model::EgressPolicy {
            name: name.into(),
            uid: meta.uid.clone().unwrap_or_default(),
            generation: meta.generation.unwrap_or_default(),
            created: meta
                .creation_timestamp
                .as_ref()
                .map_or(0, |time| time.0.as_second()),
            spec: model::EgressSpec {
                namespaces: one("spec.namespaceSelector", spec.namespace_selector)?,
                pods: one("spec.podSelector", spec.pod_selector)?,
                source: source(&meta, spec.egress_ips)?,
                destinations,
                excluded: networks(&meta, "spec.excludedCIDRs", &spec.excluded_cidrs)?,
                gateways: one(
                    "spec.gateways.nodeSelector",
                    spec.gateways.map(|gateways| gateways.node_selector),
                )?,
                ports_per_pod: quota.ports_per_pod,
                ports: quota.ports,
                bandwidth,
                on_appear: match spec.on_appear {
                    OnAppear::Keep => model::OldFlows::Keep,
                    OnAppear::Cut => model::OldFlows::Cut,
                },
                on_delete: old_flows(spec.on_delete),
                hairpin: spec.hairpin,
            },
            status: model::EgressStatus {
                generation: status
                    .conditions
                    .iter()
                    .filter_map(|condition| condition.observed_generation)
                    .min()
                    .unwrap_or_default(),
                addresses: status
                    .addresses
                    .iter()
                    .filter_map(|address| address.parse().ok())
                    .collect(),
                gateway: status.gateway.as_deref().map(model::NodeName::from),
                standby: status.standby.as_deref().map(model::NodeName::from),
                matched_pods: count(status.matched_pods),
                host_network_pods: count(status.host_network_pods),
                ports_in_use: count(status.ports_in_use),
                conditions: conditions(Some(status.conditions)),
            },
            since,
        })))
    }
}

/// What becomes of flows of a policy that goes.
pub(super) fn old_flows(on_delete: OnDelete) -> model::OldFlows {
    match on_delete {
        OnDelete::Drain => model::OldFlows::Keep,
        OnDelete::Cut => model::OldFlows::Cut,
    }
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

fn everywhere() -> BTreeSet<IpNet> {
    let (v4, v6) = (ipnet::Ipv4Net::default(), ipnet::Ipv6Net::default());
    BTreeSet::from([v4.into(), v6.into()])
}

fn source(meta: &metav1::ObjectMeta, from: EgressIPs) -> Result<model::EgressSource, ProjectError> {
    match (from.pool, from.addresses, from.from_service) {
        (Some(pool), addresses, None) if addresses.is_empty() => Ok(model::EgressSource::Pool {
            name: pool.into(),
            count: usize::try_from(from.count.unwrap_or(1)).unwrap_or(1).max(1),
            families: from
                .ip_families
                .iter()
                .map(|family| match family {
                    IPFamily::IPv4 => Family::V4,
                    IPFamily::IPv6 => Family::V6,
                })
                .collect(),
        }),
        (None, addresses, None) if !addresses.is_empty() => {
            let mut read: Vec<IpAddr> = Vec::new();
            for text in addresses {
                let address = text.parse().map_err(|_| {
                    let problem =
                        format!("spec.egressIPs.addresses: {text:?} is no address: write one such as 192.0.2.7");
                    error(KIND, meta, problem)
                })?;
                read.push(address);
            }
            read.sort_unstable();
            read.dedup();
            Ok(model::EgressSource::Addresses(read))
        }
        (None, addresses, Some(service)) if addresses.is_empty() => Ok(
            model::EgressSource::Service(model::ObjectKey::new(service.namespace, service.name)),
        ),
        _ => Err(error(
            KIND,
            meta,
            "spec.egressIPs: say where the addresses come from by exactly one of pool, addresses and fromService",
        )),
    }
}

fn networks(
    meta: &metav1::ObjectMeta,
    field: &str,
    from: &[String],
) -> Result<BTreeSet<IpNet>, ProjectError> {
    from.iter()
        .map(|text| {
            text.parse::<IpNet>().map(|net| net.trunc()).map_err(|_| {
                let problem =
                    format!("{field}: {text:?} is no CIDR: write one such as 198.51.100.0/24");
                error(KIND, meta, problem)
            })
        })
        .collect()
}

fn bits(meta: &metav1::ObjectMeta, field: &str, text: &str) -> Result<u64, ProjectError> {
    quantity::parse(text).ok_or_else(|| {
        let problem =
            format!("{field}: {text:?} is no whole number of bits: write one such as 100M");
        error(KIND, meta, problem)
    })
}

impl Project for corev1::Pod {
    fn project(self) -> Result<model::Object, ProjectError> {
        let meta = self.metadata;
        let key = key_of("Pod", &meta)?;
        let spec = self.spec.unwrap_or_default();
        let status = self.status.unwrap_or_default();
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let mut addresses: Vec<IpAddr> = Vec::new();
        if !ended {
            let listed = status.pod_ips.into_iter().flatten().map(|entry| entry.ip);
            for text in listed.chain(status.pod_ip) {
                let address = text.parse().map_err(|_| {
                    error(
                        "Pod",
                        &meta,
                        format!("status.podIPs: {text:?} is no address"),
                    )
                })?;
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
        }
        Ok(model::Object::Pod(model::Pod {
            key,
            uid: meta.uid.unwrap_or_default(),
            labels: meta.labels.unwrap_or_default(),
            addresses,
            node: spec.node_name.as_deref().map(model::NodeName::from),
            host_network: spec.host_network.unwrap_or_default(),
            created: meta.creation_timestamp.map_or(0, |time| time.0.as_second()),
            terminating: meta.deletion_timestamp.is_some(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn mk_policy(spec: &Value) -> Result<model::EgressPolicy, String> {
        let policy: EgressPolicy = serde_json::from_value(json!({
            "apiVersion": "landfall.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": "mail"}, "spec": spec,
        }))
        .map_err(|error| error.to_string())?;
        match policy.project() {
            Ok(model::Object::EgressPolicy(policy)) => Ok(*policy),
            Ok(other) => panic!("a policy is a policy: {other:?}"),
            Err(problem) => Err(problem.to_string()),
        }
    }

    fn mk_spec(part: &Value) -> Value {
        let mut spec =
            json!({"podSelector": {"matchLabels": {"app": "mail"}}, "egressIPs": {"pool": "lan"}});
        spec.as_object_mut()
            .unwrap()
            .extend(part.as_object().unwrap().clone());
        spec
    }

    #[test]
    fn a_policy_says_what_it_leaves_out() {
        let policy = mk_policy(&mk_spec(&json!({"bandwidth": {"rate": "100M"}}))).unwrap();
        assert_eq!(
            policy.spec.source,
            model::EgressSource::Pool {
                name: "lan".into(),
                count: 1,
                families: Vec::new()
            }
        );
        assert_eq!(policy.spec.destinations, everywhere());
        assert_eq!(policy.spec.on_delete, model::OldFlows::Keep);
        let bandwidth = policy.spec.bandwidth.unwrap();
        assert_eq!((bandwidth.rate, bandwidth.burst), (100_000_000, None));
    }

    #[test]
    fn what_an_api_server_would_refuse_is_refused() {
        for (part, expected) in [
            (json!({"podSelector": {}}), "empty selector"),
            (json!({"podSelector": null}), "selects no pods"),
            (json!({"egressIPs": {}}), "exactly one of"),
            (
                json!({"egressIPs": {"pool": "a", "addresses": ["192.0.2.1"]}}),
                "exactly one of",
            ),
            (
                json!({"egressIPs": {"addresses": ["192.0.2.300"]}}),
                "no address",
            ),
            (
                json!({"destinationCIDRs": ["10.0.0.0/33"]}),
                "spec.destinationCIDRs",
            ),
            (
                json!({"bandwidth": {"rate": "fast"}}),
                "spec.bandwidth.rate",
            ),
            (
                json!({"gateways": {"nodeSelector": {}}}),
                "spec.gateways.nodeSelector",
            ),
        ] {
            let problem = mk_policy(&mk_spec(&part)).unwrap_err();
            assert!(
                problem.contains("EgressPolicy mail") && problem.contains(expected),
                "{part}: {problem}"
            );
        }
    }

    #[test]
    fn a_pod_that_ended_has_no_address() {
        for (phase, expected) in [
            ("Running", 2),
            ("Pending", 2),
            ("Succeeded", 0),
            ("Failed", 0),
        ] {
            let pod: corev1::Pod = serde_json::from_value(json!({
                "metadata": {"name": "p", "namespace": "a"},
                "spec": {"containers": [], "nodeName": "n1"},
                "status": {"phase": phase, "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
            }))
            .unwrap();
            let Ok(model::Object::Pod(pod)) = pod.project() else {
                panic!("a pod is a pod");
            };
            assert_eq!(pod.addresses.len(), expected, "{phase}");
        }
    }
}
