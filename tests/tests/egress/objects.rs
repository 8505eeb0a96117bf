//! Policies and pods to create, and what is said of policies.

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use landfall_api::{EgressPolicy, EgressPolicyStatus};
use serde_json::{Value, json};

use crate::env::{Env, eventually};

/// A pod that is seen by no kubelet: nobody ends it but the test.
const GRACE: u32 = 0;

impl Env {
    pub(crate) fn policies(&self) -> Api<EgressPolicy> {
        Api::all(self.client.clone())
    }

    /// Creates or replaces a policy for pods labelled `app: mail`; `spec` is merged into its own.
    pub(crate) async fn policy(&self, name: &str, egress_ips: Value, spec: Value) {
        apply_policy(&self.policies(), name, egress_ips, spec).await;
    }

    pub(crate) async fn delete_policy(&self, name: &str) {
        let gone = DeleteParams::default();
        self.policies().delete(name, &gone).await.unwrap();
    }

    pub(crate) async fn status(&self, name: &str) -> EgressPolicyStatus {
        let policy = self.policies().get_status(name).await.unwrap();
        policy.status.unwrap_or_default()
    }

    /// Waits until the policy shows these addresses.
    pub(crate) async fn expect_egress(&self, name: &str, addresses: &[&str]) {
        let shown = || async { self.status(name).await.addresses };
        eventually(name, shown, |shown| shown == addresses).await;
    }

    /// Waits until a condition of the policy begins so (`True Reason: message`; nothing if it has none), and returns it.
    pub(crate) async fn expect_policy(&self, name: &str, kind: &str, start: &str) -> String {
        let look = || async { condition(&self.status(name).await, kind) };
        let enough = |said: &String| said.starts_with(start) && said.is_empty() == start.is_empty();
        eventually(&format!("{kind} of {name}: {start}"), look, enough).await
    }

    /// Waits until so many pods are matched, and so many on the host's network are not.
    pub(crate) async fn expect_pods(&self, name: &str, counts: (i64, i64)) {
        let look = || async {
            let status = self.status(name).await;
            (status.matched_pods, status.host_network_pods)
        };
        eventually(&format!("pods of {name}"), look, |seen| *seen == counts).await;
    }

    /// The Services, policies, former Services and former policies on the record of an address.
    pub(crate) async fn record(&self, address: &str) -> Option<[Vec<String>; 4]> {
        let vip = self.virtual_ips().get_opt(address).await.unwrap()?;
        let names = |services: Vec<landfall_api::virtual_ip::ServiceReference>| {
            services.into_iter().map(|service| service.name).collect()
        };
        Some([
            names(vip.spec.services),
            vip.spec.egress_policies,
            names(vip.spec.former),
            vip.spec.former_egress_policies,
        ])
    }

    /// Creates a running pod `namespace/name` with these labels.
    pub(crate) async fn pod(&self, name: &str, labels: Value, address: &str) {
        self.any_pod(name, labels, address, false).await;
    }

    pub(crate) async fn host_pod(&self, name: &str, labels: Value) {
        self.any_pod(name, labels, "10.88.0.11", true).await;
    }

    async fn any_pod(&self, name: &str, labels: Value, address: &str, host: bool) {
        let (namespace, name) = name.split_once('/').unwrap();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let pod: Pod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "nodeName": "node1",
                "hostNetwork": host,
                "containers": [{"name": "c", "image": "c"}],
                "automountServiceAccountToken": false,
            },
        }))
        .unwrap();
        // A new namespace has no ServiceAccount for a moment.
        let create = || async {
            let created = pods.create(&PostParams::default(), &pod).await;
            created.map(drop).map_err(|error| error.to_string())
        };
        eventually(name, create, Result::is_ok).await.unwrap();
        let status =
            json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}});
        pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap();
    }

    pub(crate) async fn end_pod(&self, name: &str) {
        let (namespace, name) = name.split_once('/').unwrap();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let gone = DeleteParams::default().grace_period(GRACE);
        pods.delete(name, &gone).await.unwrap();
    }

    pub(crate) async fn clear_pods(&self) {
        let all: Api<Pod> = Api::all(self.client.clone());
        for pod in all.list(&ListParams::default()).await.unwrap() {
            let meta = pod.metadata;
            self.end_pod(&format!(
                "{}/{}",
                meta.namespace.unwrap(),
                meta.name.unwrap()
            ))
            .await;
        }
    }
}

pub(crate) async fn apply_policy(
    api: &Api<EgressPolicy>,
    name: &str,
    egress_ips: Value,
    spec: Value,
) {
    let mut whole = json!({
        "podSelector": {"matchLabels": {"app": "mail"}},
        "egressIPs": egress_ips,
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        whole[key] = value.clone();
    }
    let body = json!({
        "apiVersion": "landfall.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"name": name}, "spec": whole,
    });
    let params = PatchParams::apply("test").force();
    api.patch(name, &params, &Patch::Apply(body)).await.unwrap();
}

/// `True Reason: message`, or nothing.
pub(crate) fn condition(status: &EgressPolicyStatus, kind: &str) -> String {
    let mut conditions = status.conditions.iter();
    let found = conditions.find(|condition| condition.type_ == kind);
    found.map_or_else(String::new, |c| {
        format!("{} {}: {}", c.status, c.reason, c.message)
    })
}
