//! The harness itself: the control plane starts, the chart is accepted, kube-proxy delivers, the API comes back.

use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use landfall_api::VirtualIP;
use landfall_lab::Topology;
use landfall_tests::{Cluster, PATIENCE, client, objects};
use serde_json::json;

#[test]
fn the_control_plane_delivers_and_comes_back() {
    let topology = Topology {
        nodes: 2,
        ..Topology::default()
    };
    Cluster::run(topology, delivers_and_comes_back);
}

fn delivers_and_comes_back(cluster: &Cluster) -> anyhow::Result<()> {
    let vips = landfall_lab::address::vips(0);
    cluster.block_on(async {
        let api: Api<Service> = Api::default_namespaced(cluster.client().await?);
        let service = objects::service("echo", json!({}));
        api.create(&PostParams::default(), &service).await?;
        let ingress: Vec<_> = vips
            .iter()
            .map(|vip| json!({"ip": vip.to_string()}))
            .collect();
        let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
        api.patch_status("echo", &PatchParams::default(), &Patch::Merge(status))
            .await?;
        anyhow::Ok(())
    })?;
    // Nobody announces here: the client is told where the VIP is.
    let node = cluster.lab().node("node2")?;
    for (vip, next) in vips.iter().zip(node.addresses(landfall_lab::Network::Lan)) {
        cluster
            .lab()
            .client()
            .ip(&format!("route add {vip} via {next}"))?;
        let (pod, took) = client::first_answer(cluster.lab().client(), *vip, PATIENCE)
            .ok_or_else(|| anyhow::anyhow!("kube-proxy does not deliver {vip}"))?;
        println!("{vip}: {pod} answered {took:?} after the Service had its address");
    }

    cluster.plane().stop_api();
    assert!(
        client::first_answer(cluster.lab().client(), vips[0], PATIENCE).is_some(),
        "kube-proxy needs no API server"
    );
    cluster.plane().start_api()?;
    cluster.block_on(async {
        let api: Api<VirtualIP> = Api::all(cluster.client().await?);
        let all = ListParams::default();
        let list = tokio::time::timeout(Duration::from_secs(10), api.list(&all));
        assert_eq!(list.await??.items.len(), 0, "the chart's CRDs are there");
        anyhow::Ok(())
    })
}
