//! `EndpointSlice`s that a test writes itself, for Services without a selector: it knows when.

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use landfall_lab::Pod;
use landfall_lab::server::{TCP_PORT, UDP_PORT};
use serde_json::{Value, json};

/// What a slice says of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It takes connections.
    Ready,
    /// It does not, and is not asked to.
    NotReady,
}

/// Creates or replaces the one slice of a Service, IPv4.
pub async fn write<'a>(
    client: &Client,
    service: &str,
    endpoints: impl IntoIterator<Item = (&'a Pod, State)>,
) -> kube::Result<()> {
    let endpoints: Vec<Value> = endpoints
        .into_iter()
        .map(|(pod, state)| {
            let ready = state == State::Ready;
            json!({
                "addresses": [pod.addresses[0]], "nodeName": pod.node,
                "conditions": {"ready": ready, "serving": ready, "terminating": false},
            })
        })
        .collect();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [
            {"name": "udp", "protocol": "UDP", "port": UDP_PORT},
            {"name": "tcp", "protocol": "TCP", "port": TCP_PORT},
        ],
        "endpoints": endpoints,
    });
    let slices: Api<EndpointSlice> = Api::default_namespaced(client.clone());
    let params = PatchParams::apply("landfall-tests").force();
    slices
        .patch(service, &params, &Patch::Apply(slice))
        .await
        .map(drop)
}
