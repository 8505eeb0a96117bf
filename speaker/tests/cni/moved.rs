//! The bridge's Ethernet address changes under pods that run, as it does when the first ones are made at once.

use serde_json::Value;

use super::cluster::{Cluster, PATIENCE, PLAIN};
use super::pods::Pod;
use super::soon::bridge;

/// Of nobody (locally administered).
const OTHER: &str = "02:00:00:00:00:99";

/// The Ethernet addresses of the bridge's ports.
fn ports(cluster: &Cluster) -> Vec<String> {
    let shown = cluster.node().exec("ip -j link show master cni0").unwrap();
    let ports: Value = serde_json::from_str(&shown).unwrap();
    let ports = ports.as_array().unwrap().iter();
    ports
        .map(|port| port["address"].as_str().unwrap().to_owned())
        .collect()
}

/// What the pod takes for its routers' Ethernet addresses.
fn routers(pod: &Pod<'_>) -> Vec<String> {
    ["10.244.1.1", "fd00:244:1::1"]
        .into_iter()
        .filter_map(|router| {
            let shown = pod.netns.exec(&format!("ip -j neigh show {router}"));
            let known: Value = serde_json::from_str(&shown.unwrap()).unwrap();
            known[0]["lladdr"].as_str().map(str::to_owned)
        })
        .collect()
}

#[test]
fn pods_are_told_when_their_bridges_address_changes() {
    let cluster = Cluster::armed(&bridge(), [20, 60]);
    let mut pods = ["red", PLAIN, "blue"].map(|tenant| {
        cluster.tell(tenant, tenant, &[]);
        Pod::new(&cluster, tenant.into(), tenant)
    });
    for pod in &mut pods {
        pod.add();
    }
    let served = |pod: &Pod<'_>| {
        let seen = pod.connect(PATIENCE).into_iter();
        let seen: Vec<_> = seen.map(|seen| seen.unwrap().by).collect();
        assert_eq!(seen, cluster.leaves_by(pod.tenant), "{}", pod.tenant);
    };
    // As CNI's plugin leaves it at first: the address of a port. What is still sent to that comes to the node, which drops it.
    let first = ports(&cluster).pop().unwrap();
    for address in [first.as_str(), OTHER] {
        let change = format!("ip link set dev cni0 address {address}");
        cluster.node().exec(&change).unwrap();
        for pod in &pods {
            // It sends nothing meanwhile, by which its own kernel could find out.
            cluster.until("the pod has heard of it", || {
                routers(pod).iter().all(|known| known == address)
            });
            served(pod);
            assert_eq!(routers(pod), [address; 2], "{}", pod.tenant);
        }
    }
    let owners: Vec<_> = pods
        .iter()
        .map(|pod| (pod.tenant, pod.addresses.as_slice()))
        .collect();
    cluster.assert_clean(&owners);
}
