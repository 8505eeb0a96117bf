//! Who is a policy's gateway, with real speakers.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use landfall_api::{EgressPolicy, EgressPolicyStatus, IPAddressPool};
use landfall_lab::{Network, Topology, measure::neighbours::who_answers};
use landfall_tests::Cluster;
use serde_json::json;

use crate::env::eventually;
use crate::objects::{apply_policy, condition};

#[test]
fn gateways() {
    let cluster = Cluster::build_without_kube_proxy(Topology::default()).unwrap();
    cluster.start_landfall().unwrap();
    let (address, moved) = cluster.block_on(follow_the_labels(&cluster));
    let answers = who_answers(cluster.lab(), address, Duration::from_secs(1)).unwrap();
    println!("who answers for {address}: {answers:?}");
    let who: Vec<&String> = answers.keys().collect();
    assert_eq!(who, [&moved], "its gateway announces it");
    // Every node knows whose tenants the pods are, of its own and of others.
    let mut pods: Vec<String> = cluster
        .lab()
        .pods()
        .flat_map(|pod| pod.addresses.iter().filter(|address| address.is_ipv4()))
        .map(ToString::to_string)
        .collect();
    pods.sort();
    for node in cluster.lab().nodes() {
        let state = cluster.lab().speaker_state(&node.name).unwrap();
        let tenants = state["egress"]["policies"]["mail"].as_object().unwrap();
        let mut leaving: Vec<String> = tenants
            .iter()
            .filter(|(_, egress)| **egress == json!(address))
            .map(|(pod, _)| pod.clone())
            .collect();
        leaving.sort();
        assert_eq!(leaving, pods, "{}: {tenants:?}", node.name);
    }
}

/// Returns the policy's address and its last gateway.
async fn follow_the_labels(cluster: &Cluster) -> (std::net::IpAddr, String) {
    let client = cluster.client().await.unwrap();
    let nodes: Api<Node> = Api::all(client.clone());
    let label = async |node: &str, on: bool| {
        let patch = json!({"metadata": {"labels": {"gateway": on.then_some("yes")}}});
        let params = PatchParams::default();
        nodes
            .patch(node, &params, &Patch::Merge(patch))
            .await
            .unwrap();
    };
    let pools: Api<IPAddressPool> = Api::all(client.clone());
    let address = Network::Lan.v4(230);
    let pool = json!({
        "apiVersion": "landfall.dev/v1alpha1", "kind": "IPAddressPool", "metadata": {"name": "out"},
        "spec": {"addresses": [format!("{address}-{}", Network::Lan.v4(231))], "purpose": "Egress"},
    });
    let params = PatchParams::apply("test").force();
    pools
        .patch("out", &params, &Patch::Apply(pool))
        .await
        .unwrap();

    let policies: Api<EgressPolicy> = Api::all(client);
    let status = async |name: &str| -> EgressPolicyStatus {
        let policy = policies.get_status(name).await.unwrap();
        policy.status.unwrap_or_default()
    };
    let gateways = json!({
        "podSelector": {"matchLabels": {"app": "echo"}},
        "gateways": {"nodeSelector": {"matchLabels": {"gateway": "yes"}}},
    });
    apply_policy(&policies, "mail", json!({"pool": "out"}), gateways.clone()).await;
    // Nobody is selected, and each node says so.
    let said = eventually(
        "no gateway",
        || async { condition(&status("mail").await, "Ready") },
        |said| said.starts_with("False NoGateway") && said.contains("node1"),
    )
    .await;
    for node in ["node1", "node2", "node3"] {
        let why = format!("{node}: not selected by the EgressPolicy's gateways.nodeSelector");
        assert!(said.contains(&why), "{said}");
    }
    // Two are.
    label("node2", true).await;
    label("node3", true).await;
    // They treat no packets by policies, and whoever leads says so. Then they do.
    let said = eventually(
        "a gateway that is not ready",
        || async { condition(&status("mail").await, "Ready") },
        |said| said.starts_with("False GatewayNotReady"),
    )
    .await;
    assert!(said.contains("its speaker runs without --egress"), "{said}");
    for node in cluster.lab().nodes() {
        cluster.start_speaker(&node.name, &["--egress"]).unwrap();
    }
    let pair = |status: &EgressPolicyStatus| {
        let (gateway, standby) = (status.gateway.clone(), status.standby.clone());
        let ready = condition(status, "Ready");
        (
            gateway.unwrap_or_default(),
            standby.unwrap_or_default(),
            ready,
        )
    };
    let (first, second, _) = eventually(
        "a gateway and a standby",
        || async { pair(&status("mail").await) },
        |(gateway, standby, ready)| {
            let two = ["node2", "node3"];
            two.contains(&gateway.as_str())
                && two.contains(&standby.as_str())
                && ready.starts_with("True GatewayElected")
        },
    )
    .await;
    assert_ne!(first, second);
    let pods = || async { status("mail").await.matched_pods };
    eventually("all pods", pods, |pods| *pods == 3).await;
    // One is selected no more, and the other takes over; selected again, it takes nothing back.
    label(&first, false).await;
    eventually(
        "the standby takes over",
        || async { pair(&status("mail").await) },
        |(gateway, standby, _)| *gateway == second && standby.is_empty(),
    )
    .await;
    label(&first, true).await;
    eventually(
        "it stands by",
        || async { pair(&status("mail").await) },
        |(gateway, standby, _)| *gateway == second && *standby == first,
    )
    .await;
    (address.into(), second)
}
