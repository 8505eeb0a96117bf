//! `VirtualIP`: one address in use. The controller writes the spec, the speaker that leads writes the status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::egress::OnDelete;

/// One address in use: what holds it, and who announces it.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "landfall.dev",
    version = "v1alpha1",
    kind = "VirtualIP",
    plural = "virtualips",
    singular = "virtualip",
    shortname = "vip",
    category = "landfall",
    status = "VirtualIPStatus",
    doc = "One address in use: what holds it, and who announces it since when and where. Made by Landfall.",
    validation = Rule::new("self.spec.address.contains(':') ? (self.metadata.name.matches('^([0-9a-f]{4}-){7}[0-9a-f]{4}$') && isIP(self.metadata.name.replace('-', ':')) && isIP(self.spec.address) && ip(self.metadata.name.replace('-', ':')) == ip(self.spec.address)) : self.metadata.name == self.spec.address")
        .message("metadata.name must be spec.address; for IPv6 its eight groups of four digits joined by dashes, as in fd00-0088-0000-0000-0000-0000-0000-0200"),
    printcolumn(name = "Address", type_ = "string", json_path = ".spec.address"),
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.pool"),
    printcolumn(name = "Egress", type_ = "string", json_path = ".spec.egressPolicies"),
    printcolumn(name = "Leader", type_ = "string", json_path = ".status.leader"),
    printcolumn(name = "Interface", type_ = "string", json_path = ".status.interface"),
    printcolumn(name = "Since", type_ = "date", json_path = ".status.since"),
    printcolumn(name = "Announced", type_ = "string", json_path = ".status.conditions[?(@.type=='Announced')].status")
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualIPSpec {
    /// The address, in its canonical form.
    #[schemars(length(min = 2, max = 45))]
    #[x_kube(
        validation = Rule::new("isIP(self) && ip.isCanonical(self)")
            .message("spec.address must be an address in canonical form, such as 192.0.2.7 or fd00:88::200"),
        validation = Rule::new("self == oldSelf").message("spec.address cannot be changed; make another VirtualIP"),
    )]
    pub address: String,
    /// The pool it came from.
    #[schemars(length(min = 1, max = 253))]
    pub pool: String,
    /// What it moves with: all addresses of one group have one leader.
    #[schemars(length(min = 1, max = 253))]
    pub group: String,
    /// The Services that hold it; none while a freed address rests, or an `EgressPolicy` alone holds it.
    #[schemars(length(max = 1024))]
    pub services: Vec<ServiceReference>,
    /// The `EgressPolicies` whose pods leave by it: one that holds it alone, or those that use the Services' address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024), inner(length(min = 1, max = 253)))]
    pub egress_policies: Vec<String>,
    /// What outlives these `EgressPolicies`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["policy".into()]))]
    pub egress_terms: Vec<EgressTerms>,
    /// While it rests, or flows of policies that are gone drain there: the Services that held it and have it back at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub former: Vec<ServiceReference>,
    /// While it rests: the `EgressPolicies` that held it and have it back at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024), inner(length(min = 1, max = 253)))]
    pub former_egress_policies: Vec<String>,
    /// Whether its pool wants it kept should the pool no longer contain it, or be deleted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub retain: bool,
}

/// What outlives an `EgressPolicy`.
#[derive(JsonSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressTerms {
    /// The policy.
    #[schemars(length(min = 1, max = 253))]
    pub policy: String,
    /// What becomes of its pods' flows when it goes.
    #[serde(default)]
    pub on_delete: OnDelete,
    /// The nodes that may be the gateway; without it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateways: Option<LabelSelector>,
    /// It is gone, or leaves by other addresses: its flows that are there go on to their end, and none begins.
    #[serde(default, skip_serializing_if = "is_false")]
    pub drains: bool,
}

/// A Service by name.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceReference {
    /// Its namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Its name.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
}

/// Who announces an address, as its leader reported.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VirtualIPStatus {
    /// The node that announces it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// The node that would take over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<String>,
    /// Since when the leader leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// The claim's epoch: one more at each take-over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<i64>,
    /// The leader's interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// That interface's MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Nodes with a servable endpoint of the Services that hold it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoint_nodes: Vec<String>,
    /// What the pods that leave by it use, by `EgressPolicy`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["policy".into()]))]
    pub egress: Vec<EgressUse>,
    /// `Announced`, `Steered`, `Served` and `GatewayReady`, and why not; `Draining`, while flows of policies that are gone go on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// What an `EgressPolicy`'s pods use of an address, as its leader reported.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressUse {
    /// The policy.
    pub policy: String,
    /// Ports that their flows have now.
    #[serde(default)]
    pub ports_in_use: i64,
    /// Its flows were to go on to their end, and all have ended.
    #[serde(default, skip_serializing_if = "is_false")]
    pub drained: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !value
}
