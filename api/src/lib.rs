//! Landfall's Kubernetes API, `landfall.dev/v1alpha1`: no I/O, only types, their validation and their words.
//!
//! The CRD YAML of the chart is generated from here (`cargo run -p landfall-api --example crds`).
#![forbid(unsafe_code)]
#![allow(
    clippy::duplicated_attributes,
    reason = "printer columns repeat their types"
)]
#![allow(
    unreachable_pub,
    reason = "the derived schemas define their helpers under the types' own visibility"
)]

pub mod advertisement;
pub mod annotations;
pub mod conditions;
pub mod duration;
pub mod egress;
pub mod pool;
pub mod quantity;
mod selector;
pub mod virtual_ip;

pub use advertisement::{L2Advertisement, L2AdvertisementSpec};
pub use egress::{EgressPolicy, EgressPolicySpec, EgressPolicyStatus};
pub use pool::{IPAddressPool, IPAddressPoolSpec, IPAddressPoolStatus};
pub use virtual_ip::{VirtualIP, VirtualIPSpec, VirtualIPStatus};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

/// The API group of all kinds, and the domain of annotations and conditions.
pub const GROUP: &str = "landfall.dev";

/// Every CRD, in the order of the names.
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![
        EgressPolicy::crd(),
        IPAddressPool::crd(),
        L2Advertisement::crd(),
        VirtualIP::crd(),
    ]
}

/// The name of the chart's file for a CRD.
pub fn file_name(crd: &CustomResourceDefinition) -> String {
    format!("{}.yaml", crd.spec.names.plural)
}

/// A CRD as the chart's file carries it.
pub fn to_yaml(crd: &CustomResourceDefinition) -> Result<String, serde_saphyr::ser::Error> {
    let yaml = serde_saphyr::to_string(crd)?;
    Ok(format!(
        "# Generated from the API types: `make crds`.\n{yaml}"
    ))
}
