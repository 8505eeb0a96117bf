//! The objects of a lab as Kubernetes YAML, for `--manifests`: what a cluster's API server would say.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::address::{self, pod_cidrs};
use crate::error::{IoContext, Result};
use crate::lab::{Lab, Pod};
use crate::server::{NEWS_PORT, TCP_PORT, UDP_PORT};

/// `spec.externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Any pod of the cluster may answer.
    Cluster,
    /// Only pods of the node that the packet reached answer.
    Local,
}

impl Policy {
    fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}

/// The port of a lab's Service for lines over TCP.
pub const LINES: u16 = 80;
/// The port of a lab's Service where the server speaks first.
pub const NEWS: u16 = 81;
/// The port of a lab's Service for echoed datagrams.
pub const ECHO: u16 = UDP_PORT;

/// A Service's ports: name, protocol, port, and the port of its pods.
const PORTS: [(&str, &str, u16, u16); 3] = [
    ("lines", "TCP", LINES, TCP_PORT),
    ("news", "TCP", NEWS, NEWS_PORT),
    ("echo", "UDP", ECHO, UDP_PORT),
];

/// What an `EndpointSlice` says of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It takes connections.
    Ready,
    /// It is to go, and finishes what it has begun.
    Draining,
}

impl Condition {
    fn conditions(self) -> Value {
        let ready = self == Self::Ready;
        json!({"ready": ready, "serving": true, "terminating": !ready})
    }
}

/// A directory of manifests. Files appear and change whole, as a watcher likes it.
#[derive(Clone, Debug)]
pub struct Manifests {
    directory: PathBuf,
}

impl Manifests {
    /// The manifests in a directory.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes one object to `name.yaml`.
    pub fn write(&self, name: &str, object: &Value) -> Result<()> {
        let text = serde_saphyr::to_string(object).expect("plain JSON is YAML");
        let path = self.directory.join(format!("{name}.yaml"));
        let draft = self.directory.join(format!(".{name}.draft"));
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &path))
            .context(|| format!("writing {}", path.display()))
    }

    /// Removes `name.yaml`.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.directory.join(format!("{name}.yaml"));
        fs::remove_file(&path).context(|| format!("removing {}", path.display()))
    }

    /// A `Node` for each node of the lab.
    pub fn write_nodes(&self, lab: &Lab) -> Result<()> {
        let network = lab.topology().internal_nic().network();
        for node in lab.nodes() {
            let addresses: Vec<Value> = node
                .addresses(network)
                .iter()
                .map(|address| json!({"type": "InternalIP", "address": address.to_string()}))
                .collect();
            let cidrs = pod_cidrs(node.index);
            let object = json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node.name, "labels": {"kubernetes.io/hostname": node.name}},
                "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
                "status": {"addresses": addresses},
            });
            self.write(&format!("node-{}", node.name), &object)?;
        }
        Ok(())
    }

    /// A pool `lab` with all addresses the lab has for VIPs, and an `L2Advertisement` for it.
    pub fn write_pool(&self) -> Result<()> {
        let ranges: Vec<String> = address::vips(0)
            .iter()
            .zip(address::vips(49))
            .map(|(first, last)| format!("{first}-{last}"))
            .collect();
        let metadata = json!({"name": "lab"});
        self.write(
            "pool-lab",
            &json!({
                "apiVersion": "landfall.dev/v1alpha1",
                "kind": "IPAddressPool",
                "metadata": metadata,
                "spec": {"addresses": ranges},
            }),
        )?;
        self.write(
            "advertisement-lab",
            &json!({
                "apiVersion": "landfall.dev/v1alpha1",
                "kind": "L2Advertisement",
                "metadata": metadata,
                "spec": {"ipAddressPools": ["lab"]},
            }),
        )
    }

    /// A dual-stack Service of the pods' servers: TCP [`LINES`] and [`NEWS`], UDP [`ECHO`], at these VIPs.
    pub fn write_service(&self, name: &str, vips: [IpAddr; 2], policy: Policy) -> Result<()> {
        self.write_service_with(name, vips, policy, &json!({}))
    }

    /// The same, with further fields of its `spec`.
    pub fn write_service_with(
        &self,
        name: &str,
        vips: [IpAddr; 2],
        policy: Policy,
        fields: &Value,
    ) -> Result<()> {
        let addresses = vips.map(|vip| vip.to_string());
        let ingress = addresses
            .clone()
            .map(|address| json!({"ip": address, "ipMode": "VIP"}));
        let ports = PORTS.map(|(name, protocol, port, target)| {
            json!({"name": name, "protocol": protocol, "port": port, "targetPort": target})
        });
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": name,
                "namespace": "default",
                "annotations": {"landfall.dev/ips": addresses.join(",")},
            },
            "spec": {
                "type": "LoadBalancer",
                "externalTrafficPolicy": policy.name(),
                "ipFamilyPolicy": "RequireDualStack",
                "ipFamilies": ["IPv4", "IPv6"],
                "selector": {"app": name},
                "ports": ports,
            },
            "status": {"loadBalancer": {"ingress": ingress}},
        });
        for (field, value) in fields.as_object().into_iter().flatten() {
            object["spec"][field] = value.clone();
        }
        self.write(&format!("service-{name}"), &object)
    }

    /// The `EndpointSlice`s of a Service, one a family: these pods, all ready.
    pub fn write_endpoints<'a>(
        &self,
        service: &str,
        pods: impl IntoIterator<Item = &'a Pod>,
    ) -> Result<()> {
        let pods: Vec<_> = pods
            .into_iter()
            .map(|pod| (pod, Condition::Ready))
            .collect();
        self.write_endpoints_as(service, &pods)
    }

    /// The same, of pods of which not all are ready.
    pub fn write_endpoints_as(&self, service: &str, pods: &[(&Pod, Condition)]) -> Result<()> {
        let ports = PORTS.map(|(name, protocol, _, target)| {
            json!({"name": name, "protocol": protocol, "port": target})
        });
        for (family, of_family) in [("IPv4", 0), ("IPv6", 1)] {
            let endpoints: Vec<Value> = pods
                .iter()
                .map(|(pod, condition)| {
                    json!({
                        "addresses": [pod.addresses[of_family].to_string()],
                        "nodeName": pod.node,
                        "conditions": condition.conditions(),
                        "targetRef": {"kind": "Pod", "namespace": "default", "name": pod.name},
                    })
                })
                .collect();
            let name = format!("{service}-{}", family.to_lowercase());
            let object = json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": name,
                    "namespace": "default",
                    "labels": {"kubernetes.io/service-name": service},
                },
                "addressType": family,
                "ports": ports,
                "endpoints": endpoints,
            });
            self.write(&format!("endpointslice-{name}"), &object)?;
        }
        Ok(())
    }
}
