//! What speakers report of a policy's addresses; and a server that does not know policies.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::CustomResourceExt as _;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use landfall_api::EgressPolicy;
use serde_json::{Value, json};

use crate::env::{Env, eventually};

/// The leader's report comes through: gateway, standby, ports, conflicts. Here the test is the leader.
pub(crate) async fn of_the_leader(env: &Env) {
    env.pool(
        "out",
        json!({"addresses": ["192.0.2.0/29"], "purpose": "Egress"}),
    )
    .await;
    let _controller = env.controller(&[]);
    env.policy("mail", json!({"pool": "out", "count": 2}), json!({}))
        .await;
    env.expect_egress("mail", &["192.0.2.0", "192.0.2.1"]).await;
    let report = async |address: &str, ports: i64, reason: &str, holds: &str| {
        let condition = json!({
            "type": "Announced", "status": holds, "reason": reason, "message": "said so",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        });
        let status = json!({"status": {
            "leader": "node1", "standby": "node2", "conditions": [condition],
            "egress": [{"policy": "mail", "portsInUse": ports}, {"policy": "other", "portsInUse": 5000}],
        }});
        let params = PatchParams::default();
        let patch: Patch<Value> = Patch::Merge(status);
        let vips = env.virtual_ips();
        vips.patch_status(address, &params, &patch).await.unwrap();
    };
    report("192.0.2.0", 700, "LeaderElected", "True").await;
    report("192.0.2.1", 42, "LeaderElected", "True").await;
    env.expect_policy(
        "mail",
        "Ready",
        "True GatewayElected: 192.0.2.0, 192.0.2.1 at node node1",
    )
    .await;
    let look = || async {
        let status = env.status("mail").await;
        (status.gateway, status.standby, status.ports_in_use)
    };
    let wanted = (Some("node1".to_owned()), Some("node2".to_owned()), 742);
    eventually("the report", look, |seen| *seen == wanted).await;
    let ready = async || {
        let status = env.status("mail").await;
        let mut conditions = status.conditions.into_iter();
        conditions.find(|it| it.type_ == "Ready").unwrap()
    };
    let before = ready().await;
    assert_eq!(before.observed_generation, Some(1));
    report("192.0.2.1", 43, "LeaderElected", "True").await;
    eventually("more ports", look, |(_, _, ports)| *ports == 743).await;
    assert_eq!(
        ready().await,
        before,
        "a number that changes is no transition"
    );
    report("192.0.2.1", 43, "AddressConflict", "False").await;
    env.expect_policy("mail", "Ready", "False AddressConflict: 192.0.2.1: said so")
        .await;
    eventually(
        "its Events",
        || env.events("mail"),
        |events| *events == ["AddressConflict", "GatewayElected"],
    )
    .await;
}

/// Who upgrades may bring the CRD later: Services are served all the same, and policies once there are any.
pub(crate) async fn without_the_kind(env: &Env) {
    let crds: Api<CustomResourceDefinition> = Api::all(env.client.clone());
    let crd = EgressPolicy::crd();
    let name = crd.metadata.name.clone().unwrap();
    crds.delete(&name, &DeleteParams::default()).await.unwrap();
    let gone = || async { crds.get_opt(&name).await.unwrap().is_none() };
    eventually("the CRD is gone", gone, |gone| *gone).await;
    env.pool(
        "both",
        json!({"addresses": ["192.0.2.0/29"], "purpose": "Both"}),
    )
    .await;
    let _controller = env.controller(&[]);
    env.service("web", json!({}), json!({})).await;
    env.expect("web", &["192.0.2.0"]).await;
    crds.create(&PostParams::default(), &crd).await.unwrap();
    let served = || async { env.policies().list(&ListParams::default()).await.is_ok() };
    eventually("the CRD is served", served, |served| *served).await;
    env.policy("mail", json!({"pool": "both"}), json!({})).await;
    env.expect_egress("mail", &["192.0.2.1"]).await;
}
