//! Objects to create, things to wait for, and the controller's process.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use landfall_api::{EgressPolicy, IPAddressPool, VirtualIP};
use landfall_tests::PATIENCE;
use landfall_tests::chart::NAMESPACE;
use serde_json::{Value, json};

pub(crate) use crate::plane::Env;

/// Waits until `look` gives something that `enough` accepts, and returns it.
pub(crate) async fn eventually<T: Debug, F: Future<Output = T>>(
    what: &str,
    mut look: impl FnMut() -> F,
    enough: impl Fn(&T) -> bool,
) -> T {
    let begun = std::time::Instant::now();
    loop {
        let seen = look().await;
        if enough(&seen) {
            return seen;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: still {seen:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Env {
    pub(crate) fn services(&self, namespace: &str) -> Api<Service> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub(crate) fn pools(&self) -> Api<IPAddressPool> {
        Api::all(self.client.clone())
    }

    pub(crate) fn virtual_ips(&self) -> Api<VirtualIP> {
        Api::all(self.client.clone())
    }

    /// Removes what scenarios make.
    pub(crate) async fn clear(&self) {
        let all = ListParams::default();
        let services: Api<Service> = Api::all(self.client.clone());
        for service in services.list(&all).await.unwrap() {
            let (namespace, name) = (
                service.metadata.namespace.unwrap(),
                service.metadata.name.unwrap(),
            );
            if name != "kubernetes" {
                let _ = self
                    .services(&namespace)
                    .delete(&name, &DeleteParams::default())
                    .await;
            }
        }
        let gone = DeleteParams::default();
        let policies: Api<EgressPolicy> = Api::all(self.client.clone());
        policies.delete_collection(&gone, &all).await.unwrap();
        self.pools().delete_collection(&gone, &all).await.unwrap();
        self.virtual_ips()
            .delete_collection(&gone, &all)
            .await
            .unwrap();
        // The next controller need not wait for the Lease of one that was killed.
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), NAMESPACE);
        leases.delete_collection(&gone, &all).await.unwrap();
        let events: Api<Event> = Api::namespaced(self.client.clone(), "default");
        events.delete_collection(&gone, &all).await.unwrap();
        for namespace in ["red", "blue"] {
            self.namespace(namespace, &json!({})).await;
        }
    }

    /// Creates or relabels a namespace.
    pub(crate) async fn namespace(&self, name: &str, labels: &Value) {
        let api: Api<Namespace> = Api::all(self.client.clone());
        let body = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } });
        api.patch(
            name,
            &PatchParams::apply("test").force(),
            &Patch::Apply(body),
        )
        .await
        .unwrap();
    }

    /// Creates or replaces a pool.
    pub(crate) async fn pool(&self, name: &str, mut spec: Value) {
        if spec.get("quarantine").is_none() {
            spec["quarantine"] = "1s".into();
        }
        let body = json!({
            "apiVersion": "landfall.dev/v1alpha1", "kind": "IPAddressPool",
            "metadata": { "name": name }, "spec": spec,
        });
        self.pools()
            .patch(
                name,
                &PatchParams::apply("test").force(),
                &Patch::Apply(body),
            )
            .await
            .unwrap();
    }

    pub(crate) async fn delete_pool(&self, name: &str) {
        self.pools()
            .delete(name, &DeleteParams::default())
            .await
            .unwrap();
    }

    /// Creates a Service `namespace/name` (or `name` in `default`) with port 80; `spec` and `annotations` are added.
    pub(crate) async fn service(&self, name: &str, spec: Value, annotations: Value) {
        let (namespace, name) = split(name);
        let mut whole = json!({
            "type": "LoadBalancer",
            "allocateLoadBalancerNodePorts": false,
            "ports": [{ "name": "web", "port": 80 }],
            "selector": { "app": "x" },
        });
        for (key, value) in spec.as_object().into_iter().flatten() {
            whole[key] = value.clone();
        }
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": name, "namespace": namespace, "annotations": annotations },
            "spec": whole,
        });
        let service: Service = serde_json::from_value(service).unwrap();
        self.services(namespace)
            .create(&PostParams::default(), &service)
            .await
            .unwrap();
    }

    /// Merges `patch` into a Service.
    pub(crate) async fn edit(&self, name: &str, patch: Value) {
        let (namespace, name) = split(name);
        self.services(namespace)
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap();
    }

    /// Merges `status` into a Service's status, as another controller would.
    pub(crate) async fn edit_status(&self, name: &str, status: Value) {
        let (namespace, name) = split(name);
        self.services(namespace)
            .patch_status(
                name,
                &PatchParams::default(),
                &Patch::Merge(json!({ "status": status })),
            )
            .await
            .unwrap();
    }

    pub(crate) async fn delete(&self, name: &str) {
        let (namespace, name) = split(name);
        self.services(namespace)
            .delete(name, &DeleteParams::default())
            .await
            .unwrap();
    }

    /// The addresses in its status.
    pub(crate) async fn shown(&self, name: &str) -> Vec<String> {
        let (namespace, name) = split(name);
        addresses_of(&self.services(namespace).get_status(name).await.unwrap())
    }

    /// `True Assigned: message`, or nothing.
    pub(crate) async fn condition(&self, name: &str) -> String {
        self.condition_of(name, "landfall.dev/AddressAssigned")
            .await
    }

    pub(crate) async fn condition_of(&self, name: &str, kind: &str) -> String {
        let (namespace, name) = split(name);
        let service = self.services(namespace).get_status(name).await.unwrap();
        let conditions = service
            .status
            .unwrap_or_default()
            .conditions
            .unwrap_or_default();
        conditions
            .into_iter()
            .find(|condition| condition.type_ == kind)
            .map(|c| format!("{} {}: {}", c.status, c.reason, c.message))
            .unwrap_or_default()
    }

    /// Waits until the Service's status shows these addresses.
    pub(crate) async fn expect(&self, name: &str, addresses: &[&str]) {
        eventually(name, || self.shown(name), |shown| shown == addresses).await;
    }

    /// Waits until its condition begins so, and returns it whole.
    pub(crate) async fn expect_condition(&self, name: &str, start: &str) -> String {
        eventually(
            name,
            || self.condition(name),
            |condition| condition.starts_with(start),
        )
        .await
    }

    /// The addresses of every Service of type `LoadBalancer`.
    pub(crate) async fn assignments(&self) -> BTreeMap<String, Vec<String>> {
        let services: Api<Service> = Api::all(self.client.clone());
        let lb = ListParams::default().fields("spec.type=LoadBalancer");
        let list = services.list(&lb).await.unwrap();
        list.iter()
            .map(|service| {
                (
                    service.metadata.name.clone().unwrap(),
                    addresses_of(service),
                )
            })
            .collect()
    }

    /// The reasons of our Events about a Service of namespace `default`, sorted.
    pub(crate) async fn events(&self, name: &str) -> Vec<String> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), "default");
        let events = api.list(&ListParams::default()).await.unwrap();
        let is_about_it = |event: &Event| {
            event.regarding.as_ref().and_then(|it| it.name.as_deref()) == Some(name)
                && event.reporting_controller.as_deref() == Some("landfall.dev/controller")
        };
        let mut reasons: Vec<String> = events
            .into_iter()
            .filter(is_about_it)
            .filter_map(|event| event.reason)
            .collect();
        reasons.sort();
        reasons
    }
}

pub(crate) fn addresses_of(service: &Service) -> Vec<String> {
    let ingress = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_ref());
    let mut addresses = Vec::new();
    for entry in ingress.into_iter().flatten() {
        assert_eq!(entry.ip_mode.as_deref(), Some("VIP"));
        addresses.push(entry.ip.clone().unwrap());
    }
    addresses
}

fn split(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or(("default", name))
}
