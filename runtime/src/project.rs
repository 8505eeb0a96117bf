//! From what the API or a manifest says to [`landfall_core::model`]: only the fields that decide anything.

mod egress;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as corev1;
use k8s_openapi::api::discovery::v1 as discoveryv1;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as metav1;
use landfall_api::virtual_ip::ServiceReference;
use landfall_api::{IPAddressPool, L2Advertisement, VirtualIP, annotations, duration};
use landfall_core::ip::{Family, IpRange};
use landfall_core::model;
use landfall_core::selector::{LabelSelector, Operator, Requirement};

/// Why an object cannot be used. The source reports it and goes on without the object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {problem}")]
pub struct ProjectError {
    /// Which object.
    pub what: String,
    /// What is wrong with it, and what to do.
    pub problem: String,
}

/// An object that can be projected.
pub trait Project {
    /// What it says.
    fn project(self) -> Result<model::Object, ProjectError>;
}

fn error(kind: &str, meta: &metav1::ObjectMeta, problem: impl Into<String>) -> ProjectError {
    let name = meta.name.as_deref().unwrap_or("(without a name)");
    let what = match &meta.namespace {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    };
    ProjectError {
        what,
        problem: problem.into(),
    }
}

fn name_of(kind: &str, meta: &metav1::ObjectMeta) -> Result<String, ProjectError> {
    meta.name
        .clone()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| error(kind, meta, "metadata.name is missing: give it one"))
}

fn key_of(kind: &str, meta: &metav1::ObjectMeta) -> Result<model::ObjectKey, ProjectError> {
    let namespace = meta.namespace.clone().unwrap_or_else(|| "default".into());
    Ok(model::ObjectKey::new(namespace, name_of(kind, meta)?))
}

fn families(names: Option<Vec<String>>) -> Vec<Family> {
    names
        .into_iter()
        .flatten()
        .map(|name| {
            if name == "IPv6" {
                Family::V6
            } else {
                Family::V4
            }
        })
        .collect()
}

fn protocol(name: Option<&str>) -> Option<model::Protocol> {
    match name {
        None | Some("TCP") => Some(model::Protocol::Tcp),
        Some("UDP") => Some(model::Protocol::Udp),
        Some("SCTP") => Some(model::Protocol::Sctp),
        Some(_) => None,
    }
}

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}

fn conditions(from: Option<Vec<metav1::Condition>>) -> Vec<model::Condition> {
    from.into_iter()
        .flatten()
        .map(|condition| model::Condition {
            kind: condition.type_,
            status: condition.status,
            reason: condition.reason,
            message: condition.message,
        })
        .collect()
}

impl Project for corev1::Service {
    fn project(self) -> Result<model::Object, ProjectError> {
        const KIND: &str = "Service";
        let meta = self.metadata;
        let key = key_of(KIND, &meta)?;
        let spec = self.spec.unwrap_or_default();
        let status = self.status.unwrap_or_default();
        let mut ports = Vec::new();
        for entry in spec.ports.into_iter().flatten() {
            let (Some(protocol), Some(number)) =
                (protocol(entry.protocol.as_deref()), port(entry.port))
            else {
                return Err(error(
                    KIND,
                    &meta,
                    format!(
                        "spec.ports: port {} protocol {:?}: a port is 1 to 65535, its protocol TCP, UDP or SCTP",
                        entry.port, entry.protocol
                    ),
                ));
            };
            ports.push(model::ServicePort {
                name: entry.name.unwrap_or_default(),
                protocol,
                port: number,
                node_port: entry.node_port.and_then(port),
            });
        }
        let annotations = meta.annotations.unwrap_or_default();
        let request = annotations::address_request(&annotations, spec.load_balancer_ip.as_deref());
        let ingress = status
            .load_balancer
            .and_then(|balancer| balancer.ingress)
            .into_iter()
            .flatten()
            .map(|entry| model::Ingress {
                address: entry.ip.as_deref().and_then(|ip| ip.parse().ok()),
                ip_mode: entry.ip_mode,
            })
            .collect();
        let load_balancer =
            spec.type_.as_deref() == Some("LoadBalancer") && meta.deletion_timestamp.is_none();
        Ok(model::Object::Service(model::Service {
            key,
            uid: meta.uid.unwrap_or_default(),
            labels: meta.labels.unwrap_or_default(),
            created: meta.creation_timestamp.map_or(0, |time| time.0.as_second()),
            load_balancer,
            class: spec.load_balancer_class,
            ports,
            selector: spec.selector.unwrap_or_default(),
            traffic_policy: match spec.external_traffic_policy.as_deref() {
                Some("Local") => model::TrafficPolicy::Local,
                _ => model::TrafficPolicy::Cluster,
            },
            health_check_node_port: spec
                .health_check_node_port
                .and_then(port)
                .unwrap_or_default(),
            affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
            udp_ports: annotations.get(annotations::UDP_HASH).map(String::as_str) == Some("ports"),
            source_ranges: source_ranges(spec.load_balancer_source_ranges),
            families: families(spec.ip_families),
            family_policy: match spec.ip_family_policy.as_deref() {
                Some("PreferDualStack") => model::FamilyPolicy::PreferDualStack,
                Some("RequireDualStack") => model::FamilyPolicy::RequireDualStack,
                _ => model::FamilyPolicy::SingleStack,
            },
            request,
            ingress,
            conditions: conditions(status.conditions),
            assigned_pool: annotations.get(annotations::POOL).cloned(),
        }))
    }
}

/// What cannot be read admits nobody.
fn source_ranges(ranges: Option<Vec<String>>) -> Option<BTreeSet<IpNet>> {
    let ranges = ranges.filter(|ranges| !ranges.is_empty())?;
    Some(
        ranges
            .iter()
            .filter_map(|range| range.trim().parse::<IpNet>().ok())
            .collect(),
    )
}

impl Project for discoveryv1::EndpointSlice {
    fn project(self) -> Result<model::Object, ProjectError> {
        const KIND: &str = "EndpointSlice";
        let meta = self.metadata;
        let key = key_of(KIND, &meta)?;
        let Some(service) = meta
            .labels
            .as_ref()
            .and_then(|labels| labels.get("kubernetes.io/service-name"))
        else {
            return Err(error(
                KIND,
                &meta,
                "label kubernetes.io/service-name is missing: name the Service it belongs to",
            ));
        };
        let service = model::ObjectKey::new(key.namespace.clone(), service.as_str());
        let family = match self.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => {
                return Err(error(
                    KIND,
                    &meta,
                    format!("addressType {other:?} is not served: use IPv4 or IPv6"),
                ));
            }
        };
        let ports = self
            .ports
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                Some(model::EndpointPort {
                    name: entry.name.unwrap_or_default(),
                    protocol: protocol(entry.protocol.as_deref())?,
                    port: entry.port.and_then(port)?,
                })
            })
            .collect();
        let mut endpoints = Vec::new();
        for endpoint in self.endpoints.into_iter().flatten() {
            let state = endpoint.conditions.unwrap_or_default();
            let ready = state.ready.unwrap_or(true);
            // The first address stands for the endpoint, as with kube-proxy.
            let Some(address) = endpoint.addresses.first() else {
                continue;
            };
            let address: IpAddr = address.parse().map_err(|_| {
                error(
                    KIND,
                    &meta,
                    format!("endpoint address {address:?} is no IP address"),
                )
            })?;
            endpoints.push(model::Endpoint {
                address,
                node: endpoint.node_name.as_deref().map(model::NodeName::from),
                ready,
                serving: state.serving.unwrap_or(ready),
                terminating: state.terminating.unwrap_or(false),
            });
        }
        Ok(model::Object::EndpointSlice(model::EndpointSlice {
            key,
            service,
            family,
            ports,
            endpoints,
        }))
    }
}

impl Project for corev1::Node {
    fn project(self) -> Result<model::Object, ProjectError> {
        const KIND: &str = "Node";
        let meta = self.metadata;
        let name = name_of(KIND, &meta)?;
        let spec = self.spec.unwrap_or_default();
        let status = self.status.unwrap_or_default();
        let pod_cidrs: Vec<IpNet> = spec
            .pod_cidrs
            .or_else(|| spec.pod_cidr.map(|cidr| vec![cidr]))
            .into_iter()
            .flatten()
            .filter_map(|cidr| cidr.parse().ok())
            .collect();
        Ok(model::Object::Node(model::Node {
            name: name.as_str().into(),
            labels: meta.labels.unwrap_or_default(),
            addresses: status
                .addresses
                .into_iter()
                .flatten()
                .filter(|address| address.type_ == "InternalIP")
                .filter_map(|address| address.address.parse().ok())
                .collect(),
            pod_cidrs,
            network_unavailable: status.conditions.into_iter().flatten().any(|condition| {
                condition.type_ == "NetworkUnavailable" && condition.status == "True"
            }),
        }))
    }
}

impl Project for ServiceCIDR {
    fn project(self) -> Result<model::Object, ProjectError> {
        const KIND: &str = "ServiceCIDR";
        let meta = self.metadata;
        let name = name_of(KIND, &meta)?;
        let cidrs = self.spec.unwrap_or_default().cidrs.unwrap_or_default();
        let read = |cidr: String| {
            let wrong = |_| error(KIND, &meta, format!("spec.cidrs: {cidr} is no network"));
            cidr.parse().map_err(wrong)
        };
        let cidrs = cidrs.into_iter().map(read).collect::<Result<_, _>>()?;
        Ok(model::Object::ServiceCidr(model::ServiceCidr {
            name: name.into(),
            cidrs,
        }))
    }
}

impl Project for corev1::Namespace {
    fn project(self) -> Result<model::Object, ProjectError> {
        let name = name_of("Namespace", &self.metadata)?;
        Ok(model::Object::Namespace(model::Namespace {
            name: name.into(),
            labels: self.metadata.labels.unwrap_or_default(),
        }))
    }
}

impl Project for IPAddressPool {
    fn project(self) -> Result<model::Object, ProjectError> {
        const KIND: &str = "IPAddressPool";
        let name = name_of(KIND, &self.metadata)?;
        let mut ranges = Vec::new();
        let mut flaw = None;
        for text in &self.spec.addresses {
            match text.parse::<IpRange>() {
                Ok(range) => ranges.push(range),
                Err(problem) => {
                    flaw.get_or_insert_with(|| format!("spec.addresses: {problem}"));
                }
            }
        }
        let quarantine = duration::parse(&self.spec.quarantine).ok_or_else(|| {
            error(
                KIND,
                &self.metadata,
                format!(
                    "spec.quarantine: {:?} is no duration: write one such as 60s",
                    self.spec.quarantine
                ),
            )
        })?;
        let allocation = match self.spec.service_allocation {
            None => None,
            Some(rules) => Some(model::ServiceAllocation {
                priority: rules.priority,
                namespaces: rules.namespaces,
                namespace_selectors: selectors(
                    KIND,
                    &self.metadata,
                    "spec.serviceAllocation.namespaceSelectors",
                    rules.namespace_selectors,
                )?,
                service_selectors: selectors(
                    KIND,
                    &self.metadata,
                    "spec.serviceAllocation.serviceSelectors",
                    rules.service_selectors,
                )?,
            }),
        };
        Ok(model::Object::Pool(model::Pool {
            name: name.into(),
            generation: self.metadata.generation.unwrap_or_default(),
            labels: self.metadata.labels.unwrap_or_default(),
            ranges,
            purpose: match self.spec.purpose {
                landfall_api::pool::Purpose::Ingress => model::Purpose::Ingress,
                landfall_api::pool::Purpose::Egress => model::Purpose::Egress,
                landfall_api::pool::Purpose::Both => model::Purpose::Both,
            },
            auto_assign: self.spec.auto_assign,
            avoid_buggy_ips: self.spec.avoid_buggy_ips,
            allocation,
            quarantine,
            retain_assigned: self.spec.retain_assigned,
            flaw,
        }))
    }
}

impl Project for L2Advertisement {
    fn project(self) -> Result<model::Object, ProjectError> {
        const KIND: &str = "L2Advertisement";
        let meta = self.metadata;
        let name = name_of(KIND, &meta)?;
        let spec = self.spec;
        let mut preferred_nodes = Vec::new();
        for preferred in spec.preferred_node_selectors {
            preferred_nodes.push(model::PreferredNodes {
                weight: preferred.weight,
                selector: selector(
                    KIND,
                    &meta,
                    "spec.preferredNodeSelectors",
                    preferred.preference,
                )?,
            });
        }
        Ok(model::Object::Advertisement(model::Advertisement {
            name: name.into(),
            pools: spec.ip_address_pools,
            pool_selectors: selectors(
                KIND,
                &meta,
                "spec.ipAddressPoolSelectors",
                spec.ip_address_pool_selectors,
            )?,
            service_selectors: selectors(
                KIND,
                &meta,
                "spec.serviceSelectors",
                spec.service_selectors,
            )?,
            node_selectors: selectors(KIND, &meta, "spec.nodeSelectors", spec.node_selectors)?,
            interfaces: spec.interfaces,
            preferred_nodes,
            failback: spec.failback,
            rebalance: spec.rebalance,
            ignore_exclude_lb: spec.ignore_exclude_lb,
            steering: match spec.steering {
                landfall_api::advertisement::Steering::Auto => model::Steering::Auto,
                landfall_api::advertisement::Steering::Off => model::Steering::Off,
            },
            cross_segment: match spec.cross_segment {
                landfall_api::advertisement::CrossSegment::Auto => model::CrossSegment::Auto,
                landfall_api::advertisement::CrossSegment::Always => model::CrossSegment::Always,
            },
            unknown_port: match spec.unknown_port {
                landfall_api::advertisement::UnknownPort::Reject => model::UnknownPort::Reject,
                landfall_api::advertisement::UnknownPort::Drop => model::UnknownPort::Drop,
            },
        }))
    }
}

impl Project for VirtualIP {
    fn project(self) -> Result<model::Object, ProjectError> {
        const KIND: &str = "VirtualIP";
        let address: IpAddr = self.spec.address.parse().map_err(|_| {
            error(
                KIND,
                &self.metadata,
                format!("spec.address: {:?} is no IP address", self.spec.address),
            )
        })?;
        let status = self.status.unwrap_or_default();
        let mut terms = BTreeMap::new();
        for one in self.spec.egress_terms {
            let gateways = one.gateways.map(|from| {
                let field = "spec.egressTerms.gateways";
                selector(KIND, &self.metadata, field, from)
            });
            let read = model::Terms {
                on_delete: egress::old_flows(one.on_delete),
                gateways: gateways.transpose()?,
                drains: one.drains,
            };
            terms.insert(one.policy.into(), read);
        }
        let drained = status.egress.iter().filter(|used| used.drained);
        let drained = drained.map(|used| used.policy.as_str().into()).collect();
        Ok(model::Object::VirtualIp(model::VirtualIp {
            address,
            pool: self.spec.pool.into(),
            group: self.spec.group.into(),
            services: keys(self.spec.services),
            egress_policies: names(self.spec.egress_policies),
            terms,
            former: keys(self.spec.former),
            former_policies: names(self.spec.former_egress_policies),
            retain: self.spec.retain,
            leader: status.leader.as_deref().map(model::NodeName::from),
            epoch: status.epoch.map_or(0, i64::unsigned_abs),
            standby: status.standby.as_deref().map(model::NodeName::from),
            ports_in_use: status
                .egress
                .into_iter()
                .map(|used| {
                    let ports = u64::try_from(used.ports_in_use).unwrap_or_default();
                    (used.policy.into(), ports)
                })
                .collect(),
            drained,
            conditions: conditions(Some(status.conditions)),
        }))
    }
}

fn keys(references: Vec<ServiceReference>) -> Vec<model::ObjectKey> {
    references
        .into_iter()
        .map(|service| model::ObjectKey::new(service.namespace, service.name))
        .collect()
}

fn names(from: Vec<String>) -> Vec<std::sync::Arc<str>> {
    from.into_iter().map(Into::into).collect()
}

fn selectors(
    kind: &str,
    meta: &metav1::ObjectMeta,
    field: &str,
    from: Vec<metav1::LabelSelector>,
) -> Result<Vec<LabelSelector>, ProjectError> {
    from.into_iter()
        .map(|one| selector(kind, meta, field, one))
        .collect()
}

fn selector(
    kind: &str,
    meta: &metav1::ObjectMeta,
    field: &str,
    from: metav1::LabelSelector,
) -> Result<LabelSelector, ProjectError> {
    let labels: BTreeMap<String, String> = from.match_labels.unwrap_or_default();
    let mut selector = LabelSelector::of_labels(labels);
    for expression in from.match_expressions.into_iter().flatten() {
        let values = expression.values.unwrap_or_default().into_iter().collect();
        let operator = match expression.operator.as_str() {
            "In" => Operator::In(values),
            "NotIn" => Operator::NotIn(values),
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => {
                return Err(error(
                    kind,
                    meta,
                    format!("{field}: operator {other:?}: use In, NotIn, Exists or DoesNotExist"),
                ));
            }
        };
        selector.requirements.push(Requirement {
            key: expression.key,
            operator,
        });
    }
    Ok(selector)
}
