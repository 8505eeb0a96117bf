//! Nodes and Pods as a kubelet would report them, and the Services of tests.

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client};
use landfall_lab::{Lab, Network, address};
use serde_json::{Value, json};

/// Who writes, for server-side apply.
const MANAGER: &str = "landfall-tests";

/// Creates the Node objects of all nodes of the lab: ready, with addresses and pod CIDRs.
pub async fn create_nodes(client: &Client, lab: &Lab) -> kube::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let network = if lab.topology().management {
        Network::Management
    } else {
        Network::Lan
    };
    for node in lab.nodes() {
        let cidrs = address::pod_cidrs(node.index);
        let addresses: Vec<Value> = node
            .addresses(network)
            .iter()
            .map(|address| json!({"type": "InternalIP", "address": address.to_string()}))
            .chain([json!({"type": "Hostname", "address": node.name})])
            .collect();
        apply(
            &nodes,
            &node.name,
            json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": node.name, "labels": {
                    "kubernetes.io/hostname": node.name,
                    "kubernetes.io/os": "linux",
                }},
                "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
            }),
            json!({
                "addresses": addresses,
                "conditions": [{
                    "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
                    "lastHeartbeatTime": null, "lastTransitionTime": "2026-01-01T00:00:00Z",
                }],
            }),
        )
        .await?;
    }
    Ok(())
}

/// Creates the Pod objects of all pods of the lab, labelled `app: echo`, `node: <node>` and `pod: <name>`.
pub async fn create_pods(client: &Client, lab: &Lab) -> kube::Result<()> {
    for pod in lab.pods() {
        set_pod(client, pod, true).await?;
    }
    Ok(())
}

/// Creates or updates one Pod object, running, and ready or not.
pub async fn set_pod(client: &Client, pod: &landfall_lab::Pod, ready: bool) -> kube::Result<()> {
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let ips: Vec<Value> = pod
        .addresses
        .iter()
        .map(|address| json!({"ip": address.to_string()}))
        .collect();
    apply(
        &pods,
        &pod.name,
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name, "labels": {
                "app": "echo", "node": pod.node, "pod": pod.name,
            }},
            "spec": {
                "nodeName": pod.node,
                "containers": [{"name": "echo", "image": "echo"}],
                "automountServiceAccountToken": false,
            },
        }),
        json!({
            "phase": "Running",
            "podIP": pod.addresses[0].to_string(),
            "podIPs": ips,
            "conditions": [{
                "type": "Ready", "status": if ready { "True" } else { "False" },
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }],
        }),
    )
    .await
}

/// Adds labels to a Node; a null takes one away.
pub async fn label_node(client: &Client, node: &str, labels: Value) -> kube::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let patch = json!({"metadata": {"labels": labels}});
    nodes
        .patch(node, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map(drop)
}

/// Adds labels to a Pod; a null takes one away.
pub async fn label_pod(client: &Client, pod: &str, labels: Value) -> kube::Result<()> {
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let patch = json!({"metadata": {"labels": labels}});
    pods.patch(pod, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map(drop)
}

/// Deletes a Pod as a Deployment does: it terminates until [`remove_pod`].
pub async fn terminate_pod(client: &Client, pod: &str) -> kube::Result<()> {
    delete_pod(client, pod, 3600).await
}

/// Removes a Pod as its kubelet does when the containers have ended.
pub async fn remove_pod(client: &Client, pod: &str) -> kube::Result<()> {
    delete_pod(client, pod, 0).await
}

async fn delete_pod(client: &Client, pod: &str, grace: u32) -> kube::Result<()> {
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    pods.delete(pod, &DeleteParams::default().grace_period(grace))
        .await
        .map(drop)
}

/// A Service of type `LoadBalancer` before all echo pods, dual stack; `spec` is merged into its own.
pub fn service(name: &str, spec: Value) -> Service {
    let mut whole = json!({
        "type": "LoadBalancer",
        "ipFamilyPolicy": "RequireDualStack",
        "selector": {"app": "echo"},
        "ports": [
            {"name": "udp", "protocol": "UDP", "port": 5000, "targetPort": 5000},
            {"name": "tcp", "protocol": "TCP", "port": 8080, "targetPort": 8080},
        ],
    });
    if let (Some(whole), Value::Object(spec)) = (whole.as_object_mut(), spec) {
        whole.extend(spec);
    }
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name},
        "spec": whole,
    }))
    .expect("the value has a Service's form")
}

/// The addresses in a Service's status.
pub fn ingress(service: &Service) -> Vec<std::net::IpAddr> {
    service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref())
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ip.as_ref()?.parse().ok())
        .collect()
}

/// Applies an object and its status.
async fn apply<K>(api: &Api<K>, name: &str, object: Value, status: Value) -> kube::Result<()>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let params = PatchParams::apply(MANAGER).force();
    api.patch(name, &params, &Patch::Apply(object)).await?;
    // Not by apply: two addresses of type InternalIP are one list key too many for it.
    let status = json!({"status": status});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .map(drop)
}
