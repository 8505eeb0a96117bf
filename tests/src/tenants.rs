//! A cluster whose pods leave by addresses of their own: one policy for all of them, of a pool of its own.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::PostParams;
use landfall_lab::{Netns, Network};

use crate::{Cluster, chart};

const OBJECTS: &str = "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: out}
spec:
  purpose: Egress
  addresses: [10.88.0.230-10.88.0.239, 'fd00:88::230-fd00:88::239']
---
apiVersion: landfall.dev/v1alpha1
kind: EgressPolicy
metadata: {name: mail}
spec:
  podSelector: {matchLabels: {app: echo}}
  egressIPs: {pool: out, ipFamilies: [IPv4, IPv6]}
";

/// The policy's addresses.
pub fn egress() -> [IpAddr; 2] {
    Network::Lan.both(230)
}

/// Starts Landfall with egress policies in effect, on nodes whose CNI masquerades what pods send outside.
pub fn start(cluster: &Cluster) -> anyhow::Result<()> {
    start_with(cluster, OBJECTS)
}

const OF_SERVICE: &str = "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: both}
spec:
  purpose: Both
  addresses: [10.88.0.230-10.88.0.239, 'fd00:88::230-fd00:88::239']
---
apiVersion: landfall.dev/v1alpha1
kind: EgressPolicy
metadata: {name: mail}
spec:
  podSelector: {matchLabels: {app: echo}}
  egressIPs: {fromService: {namespace: default, name: mail}}
";

/// The same with a Service `mail`, by whose addresses its pods leave.
pub fn start_with_service(cluster: &Cluster, service: &Service) -> anyhow::Result<()> {
    cluster.block_on(async {
        let services: Api<Service> = Api::default_namespaced(cluster.client().await?);
        services.create(&PostParams::default(), service).await?;
        anyhow::Ok(())
    })?;
    start_with(cluster, OF_SERVICE)
}

fn start_with(cluster: &Cluster, objects: &str) -> anyhow::Result<()> {
    for node in cluster.lab().nodes() {
        masquerade(&node.netns)?;
    }
    chart::apply(cluster.plane(), objects)?;
    cluster.start_controller("controller", &[])?;
    for node in cluster.lab().nodes() {
        cluster.start_speaker(&node.name, &["--egress"])?;
    }
    Ok(())
}

/// As a CNI does it: what its pods send outside leaves with the node's address.
fn masquerade(node: &Netns) -> landfall_lab::Result<()> {
    for (family, pods) in [("ip", "10.244.0.0/16"), ("ip6", "fd00:244::/32")] {
        for rule in [
            format!("add table {family} cni"),
            format!(
                "add chain {family} cni post {{ type nat hook postrouting priority srcnat ; }}"
            ),
            format!(
                "add rule {family} cni post {family} saddr {pods} {family} daddr != {pods} masquerade"
            ),
        ] {
            node.exec(&format!("nft {rule}"))?;
        }
    }
    Ok(())
}
