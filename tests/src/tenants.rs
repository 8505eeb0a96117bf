//! A cluster whose pods leave by addresses of their own: one policy for all of them, of a pool of its own.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use landfall_api::EgressPolicy;
use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::server::TCP_PORT;
use landfall_lab::{Lab, Netns, Network, Pod};

use crate::flows::Flow;
use crate::{Cluster, chart, until};

/// How long a try to connect may take.
const TRY: Duration = Duration::from_secs(3);

/// A pool for this purpose, and the policy whose pods leave by these addresses of it.
fn objects(purpose: &str, egress_ips: &str) -> String {
    format!(
        "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {{name: out}}
spec:
  purpose: {purpose}
  addresses: [10.88.0.230-10.88.0.239, 'fd00:88::230-fd00:88::239']
---
apiVersion: landfall.dev/v1alpha1
kind: EgressPolicy
metadata: {{name: mail}}
spec:
  podSelector: {{matchLabels: {{app: echo}}}}
  egressIPs: {egress_ips}
"
    )
}

/// The policy's addresses.
pub fn egress() -> [IpAddr; 2] {
    Network::Lan.both(230)
}

/// Starts Landfall with egress policies in effect, on nodes whose CNI masquerades what pods send outside.
pub fn start(cluster: &Cluster) -> anyhow::Result<()> {
    start_with_room(cluster, None)
}

/// The same with gateways that have room for so many flows of each family.
pub fn start_with_room(cluster: &Cluster, bindings: Option<usize>) -> anyhow::Result<()> {
    let objects = objects("Egress", "{pool: out, ipFamilies: [IPv4, IPv6]}");
    start_with(cluster, &objects, bindings)
}

/// The same with a Service `mail`, by whose addresses its pods leave.
pub fn start_with_service(cluster: &Cluster, service: &Service) -> anyhow::Result<()> {
    cluster.block_on(async {
        let services: Api<Service> = Api::default_namespaced(cluster.client().await?);
        services.create(&PostParams::default(), service).await?;
        anyhow::Ok(())
    })?;
    let ips = "{fromService: {namespace: default, name: mail}}";
    start_with(cluster, &objects("Both", ips), None)
}

fn start_with(cluster: &Cluster, objects: &str, bindings: Option<usize>) -> anyhow::Result<()> {
    for node in cluster.lab().nodes() {
        masquerade(&node.netns)?;
    }
    chart::apply(cluster.plane(), objects)?;
    cluster.start_controller("controller", &[])?;
    let room = bindings.map(|bindings| format!("--egress-bindings={bindings}"));
    let flags: Vec<&str> = room.as_deref().into_iter().chain(["--egress"]).collect();
    for node in cluster.lab().nodes() {
        cluster.start_speaker(&node.name, &flags)?;
    }
    Ok(())
}

/// Servers on the segment, of both families: the lab's client has to serve there.
pub fn near() -> [SocketAddr; 2] {
    servers(Network::Lan)
}

/// Servers behind the router, likewise.
pub fn far() -> [SocketAddr; 2] {
    servers(Network::Remote)
}

/// All of them.
pub fn outside() -> impl Iterator<Item = SocketAddr> {
    near().into_iter().chain(far())
}

fn servers(network: Network) -> [SocketAddr; 2] {
    network
        .both(100)
        .map(|address| SocketAddr::new(address, TCP_PORT))
}

/// The node that answers for an address, once it is one.
///
/// # Panics
/// If nobody does for long, or several do.
pub fn gateway(lab: &Lab, address: IpAddr) -> String {
    until(&format!("one to answer for {address}"), || {
        let answers = who_answers(lab, address, Duration::from_secs(1));
        let answers = answers.expect("the lab asks who has an address");
        match answers.keys().collect::<Vec<_>>()[..] {
            [gateway] => Ok(gateway.clone()),
            _ => Err(answers),
        }
    })
}

/// From where a server sees a pod, if it reaches it.
pub fn seen_from(pod: &Pod, server: SocketAddr) -> io::Result<IpAddr> {
    Flow::open_within(&pod.netns, server, TRY).map(|flow| flow.seen_from)
}

/// Waits until a server sees a pod come from an address as it should be.
///
/// # Panics
/// If it does not for long.
pub fn await_seen(pod: &Pod, server: SocketAddr, right: impl Fn(IpAddr) -> bool) {
    let what = format!("{} to be seen as it should be by {server}", pod.name);
    until(&what, || match seen_from(pod, server) {
        Ok(seen) if right(seen) => Ok(()),
        seen => Err(seen),
    });
}

/// Waits until these servers see a pod come from the policy's addresses; it may leave by its node's before the policy is
/// known there.
///
/// # Panics
/// If they do not for long.
pub fn await_egress(pod: &Pod, servers: impl IntoIterator<Item = SocketAddr>) {
    for server in servers {
        await_seen(pod, server, |seen| egress().contains(&seen));
    }
}

/// Deletes a policy.
pub fn delete(cluster: &Cluster, policy: &str) -> anyhow::Result<()> {
    cluster.block_on(async {
        let policies: Api<EgressPolicy> = Api::all(cluster.client().await?);
        policies.delete(policy, &DeleteParams::default()).await?;
        Ok(())
    })
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
