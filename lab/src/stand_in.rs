//! A stand-in for kube-proxy, in the lab only.
//!
//! It reads the Services and `EndpointSlice`s of a manifests directory and delivers what arrives for a VIP to
//! pods: for `externalTrafficPolicy: Cluster` to any pod and masqueraded, for `Local` to a pod of the same node
//! with the client's address. Only the shape is kube-proxy's (1.36, nftables mode): the tables `ip kube-proxy`
//! and `ip6 kube-proxy` with the maps `service-ips` and `no-endpoint-services`, since the speaker looks there
//! to learn whether its node delivers yet.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{IoContext, Result};
use crate::lab::Lab;
use crate::netns::Netns;

/// How often the manifests are looked at.
const INTERVAL: Duration = Duration::from_millis(200);

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: String,
    namespace: String,
    labels: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Service {
    metadata: Metadata,
    spec: ServiceSpec,
    status: ServiceStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    external_traffic_policy: String,
    ports: Vec<Port>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Port {
    name: String,
    protocol: String,
    #[serde(rename = "port")]
    number: u16,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ServiceStatus {
    load_balancer: LoadBalancer,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct LoadBalancer {
    ingress: Vec<Ingress>,
}

#[derive(Deserialize)]
struct Ingress {
    ip: Option<IpAddr>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Slice {
    metadata: Metadata,
    ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Endpoint {
    addresses: Vec<IpAddr>,
    node_name: String,
    conditions: Conditions,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl Conditions {
    /// Whether kube-proxy would send there: ready, or else draining but still serving.
    fn servable(&self) -> bool {
        let ready = self.ready.unwrap_or(true);
        ready || (self.serving.unwrap_or(ready) && self.terminating.unwrap_or(false))
    }
}

/// What the manifests say, as far as delivery goes.
#[derive(Default)]
struct Objects {
    services: Vec<Service>,
    slices: Vec<Slice>,
}

impl Objects {
    /// Reads a directory. What cannot be understood is somebody else's to report.
    fn read(directory: &Path) -> Result<Self> {
        let mut objects = Self::default();
        let entries =
            fs::read_dir(directory).context(|| format!("reading {}", directory.display()))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if !path
                .extension()
                .is_some_and(|ending| ending == "yaml" || ending == "yml")
            {
                continue;
            }
            let Ok(text) = fs::read_to_string(&path) else {
                continue;
            };
            let Ok(documents) = serde_saphyr::from_multiple::<Value>(&text) else {
                continue;
            };
            for document in documents {
                match document["kind"].as_str() {
                    Some("Service") => {
                        objects
                            .services
                            .extend(serde_json::from_value::<Service>(document).ok());
                    }
                    Some("EndpointSlice") => {
                        objects
                            .slices
                            .extend(serde_json::from_value::<Slice>(document).ok());
                    }
                    _ => {}
                }
            }
        }
        Ok(objects)
    }

    /// The pods that serve a port of a Service, with their nodes, for one family.
    fn endpoints(&self, service: &Service, port: &Port, v4: bool) -> Vec<(IpAddr, u16, &str)> {
        let mut found = Vec::new();
        for slice in &self.slices {
            let owner = slice.metadata.labels.get("kubernetes.io/service-name");
            if owner != Some(&service.metadata.name)
                || slice.metadata.namespace != service.metadata.namespace
            {
                continue;
            }
            let Some(target) = slice
                .ports
                .iter()
                .find(|target| target.name == port.name && target.protocol == port.protocol)
            else {
                continue;
            };
            for endpoint in slice
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.conditions.servable())
            {
                for address in endpoint
                    .addresses
                    .iter()
                    .filter(|address| address.is_ipv4() == v4)
                {
                    found.push((*address, target.number, endpoint.node_name.as_str()));
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// The nftables script of a node, whole.
    fn script(&self, node: &str) -> String {
        [true, false].map(|v4| self.table(node, v4)).join("")
    }

    fn table(&self, node: &str, v4: bool) -> String {
        let (family, kind) = if v4 {
            ("ip", "ipv4_addr")
        } else {
            ("ip6", "ipv6_addr")
        };
        let mut elements = Vec::new();
        let mut refused = Vec::new();
        let mut chains = String::new();
        for service in &self.services {
            let local = service.spec.external_traffic_policy == "Local";
            let vips: Vec<IpAddr> = service
                .status
                .load_balancer
                .ingress
                .iter()
                .filter_map(|ingress| ingress.ip)
                .filter(|ip| ip.is_ipv4() == v4)
                .collect();
            for port in &service.spec.ports {
                let protocol = port.protocol.to_lowercase();
                let all = self.endpoints(service, port, v4);
                let serving: Vec<_> = all
                    .iter()
                    .filter(|(_, _, at)| !local || *at == node)
                    .collect();
                let name = format!(
                    "{}/{}/{protocol}/{}",
                    service.metadata.namespace, service.metadata.name, port.name
                );
                for vip in &vips {
                    let key = format!("{vip} . {protocol} . {}", port.number);
                    if !all.is_empty() {
                        elements.push(format!("{key} : goto external-LANDFALL-{name}"));
                    }
                    if serving.is_empty() {
                        refused.push(format!("{key} : drop"));
                    }
                }
                if all.is_empty() || vips.is_empty() {
                    continue;
                }
                let _ = writeln!(chains, "chain external-LANDFALL-{name} {{");
                if !local {
                    let _ = writeln!(chains, "jump mark-for-masquerade");
                }
                if !serving.is_empty() {
                    let picks: Vec<String> = serving
                        .iter()
                        .enumerate()
                        .map(|(number, (address, target, _))| {
                            format!(
                                "{number} : goto endpoint-LANDFALL-{name}__{}/{target}",
                                plain(*address)
                            )
                        })
                        .collect();
                    let _ = writeln!(
                        chains,
                        "numgen random mod {} vmap {{ {} }}",
                        picks.len(),
                        picks.join(", ")
                    );
                }
                let _ = writeln!(chains, "}}");
                for (address, target, _) in serving {
                    let to = if v4 {
                        format!("{address}:{target}")
                    } else {
                        format!("[{address}]:{target}")
                    };
                    let endpoint = format!(
                        "chain endpoint-LANDFALL-{name}__{}/{target} {{\n\
                         meta l4proto {protocol} dnat to {to}\n}}\n",
                        plain(*address)
                    );
                    // Chains are defined before they are named.
                    chains.insert_str(0, &endpoint);
                }
            }
        }
        let map = |name: &str, elements: &[String]| {
            let list = if elements.is_empty() {
                String::new()
            } else {
                format!("elements = {{ {} }}\n", elements.join(", "))
            };
            format!("map {name} {{\ntype {kind} . inet_proto . inet_service : verdict\n{list}}}\n")
        };
        format!(
            "table {family} kube-proxy\n\
             delete table {family} kube-proxy\n\
             table {family} kube-proxy {{\n\
             comment \"Landfall's lab: a stand-in for kube-proxy\"\n\
             chain mark-for-masquerade {{\nmeta mark set meta mark or 0x4000\n}}\n\
             {chains}\
             {services}{nobody}\
             chain services {{\n{family} daddr . meta l4proto . th dport vmap @service-ips\n}}\n\
             chain service-endpoints-check {{\n{family} daddr . meta l4proto . th dport vmap @no-endpoint-services\n}}\n\
             chain filter-prerouting-pre-dnat {{\ntype filter hook prerouting priority dstnat - 10\n\
             ct state new jump service-endpoints-check\n}}\n\
             chain nat-prerouting {{\ntype nat hook prerouting priority dstnat\njump services\n}}\n\
             chain nat-output {{\ntype nat hook output priority -100\njump services\n}}\n\
             chain masquerading {{\nmeta mark and 0x4000 == 0 return\nmeta mark set meta mark xor 0x4000\nmasquerade fully-random\n}}\n\
             chain nat-postrouting {{\ntype nat hook postrouting priority srcnat\njump masquerading\n}}\n\
             }}\n",
            services = map("service-ips", &elements),
            nobody = map("no-endpoint-services", &refused),
        )
    }
}

/// An address as part of a chain's name, where no colons go.
fn plain(address: IpAddr) -> String {
    address.to_string().replace(':', ".")
}

/// The stand-in on all nodes of a lab. Dropping it ends the following of changes; the rules stay.
#[derive(Debug)]
pub struct StandIn {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl StandIn {
    /// Loads the rules, and follows changes of the manifests within 200 ms.
    pub fn start(lab: &Lab) -> Result<Self> {
        let directory = lab.manifests_dir();
        let nodes: Vec<(String, Netns)> = lab
            .nodes()
            .iter()
            .map(|node| (node.name.clone(), node.netns.share()))
            .collect();
        let mut loaded: BTreeMap<String, String> = BTreeMap::new();
        load(&directory, &nodes, &mut loaded)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("stand-in".to_owned())
            .spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    thread::sleep(INTERVAL);
                    if let Err(error) = load(&directory, &nodes, &mut loaded) {
                        tracing::warn!(%error, "the stand-in for kube-proxy could not load its rules");
                    }
                }
            })
            .context(|| "starting the stand-in for kube-proxy".to_owned())?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Loads the rules of every node whose rules have changed.
fn load(
    directory: &Path,
    nodes: &[(String, Netns)],
    loaded: &mut BTreeMap<String, String>,
) -> Result<()> {
    let objects = Objects::read(directory)?;
    for (node, netns) in nodes {
        let script = objects.script(node);
        if loaded.get(node) != Some(&script) {
            netns.nft(&script)?;
            loaded.insert(node.clone(), script);
        }
    }
    Ok(())
}
