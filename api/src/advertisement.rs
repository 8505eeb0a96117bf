//! `L2Advertisement`: which nodes announce the addresses of which pools, and where.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How addresses of pools are announced. Optional: a pool that none selects is announced by every eligible
/// node on its uplink.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "landfall.dev",
    version = "v1alpha1",
    kind = "L2Advertisement",
    plural = "l2advertisements",
    singular = "l2advertisement",
    shortname = "lfadv",
    category = "landfall",
    doc = "Which nodes announce the addresses of which pools, and on which interfaces.",
    printcolumn(name = "Pools", type_ = "string", json_path = ".spec.ipAddressPools"),
    printcolumn(name = "Interfaces", type_ = "string", json_path = ".spec.interfaces"),
    printcolumn(name = "Steering", type_ = "string", json_path = ".spec.steering")
)]
#[serde(rename_all = "camelCase")]
pub struct L2AdvertisementSpec {
    /// Pools by name. With neither names nor selectors every pool is selected.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        rename = "ipAddressPools"
    )]
    #[schemars(length(max = 128), inner(length(min = 1, max = 253)))]
    #[x_kube(
        validation = Rule::new("self.all(p, self.exists_one(q, q == p))")
            .message("spec.ipAddressPools: a pool is named twice; remove one"),
    )]
    pub ip_address_pools: Vec<String>,

    /// Pools by label.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        rename = "ipAddressPoolSelectors"
    )]
    #[schemars(length(max = 32))]
    #[x_kube(
        validation = Rule::new(crate::selector::NOT_EMPTY)
            .message("spec.ipAddressPoolSelectors: an empty selector matches everything; give it matchLabels or matchExpressions, or leave it out"),
    )]
    pub ip_address_pool_selectors: Vec<LabelSelector>,

    /// Services that this is for; none means all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(
        validation = Rule::new(crate::selector::NOT_EMPTY)
            .message("spec.serviceSelectors: an empty selector matches everything; give it matchLabels or matchExpressions, or leave it out"),
    )]
    pub service_selectors: Vec<LabelSelector>,

    /// Nodes that may announce; none means all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(
        validation = Rule::new(crate::selector::NOT_EMPTY)
            .message("spec.nodeSelectors: an empty selector matches everything; give it matchLabels or matchExpressions, or leave it out"),
    )]
    pub node_selectors: Vec<LabelSelector>,

    /// Interfaces to announce on, by name or glob (`bond0`, `eth*`); none means the one with the address's subnet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 15)))]
    #[x_kube(
        validation = Rule::new("self.all(i, i.matches('^[^/ :]+$'))")
            .message("spec.interfaces: an interface name has at most 15 characters and no slash, colon or space"),
    )]
    pub interfaces: Vec<String>,

    /// Preferences among the nodes that may announce.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(
        validation = Rule::new("self.all(p, p.weight >= 1 && p.weight <= 100)")
            .message("spec.preferredNodeSelectors: weight must be 1 to 100; to express no preference leave the entry out"),
        validation = Rule::new("self.all(p, (has(p.preference.matchLabels) && p.preference.matchLabels.size() > 0) || (has(p.preference.matchExpressions) && p.preference.matchExpressions.size() > 0))")
            .message("spec.preferredNodeSelectors: an empty preference prefers every node; give it matchLabels or matchExpressions, or leave the entry out"),
    )]
    pub preferred_node_selectors: Vec<PreferredNodeSelector>,

    /// A better node takes an address back when it returns. By default whoever leads goes on.
    #[serde(default)]
    pub failback: bool,

    /// A node that leads more than 1.3 times its share for 5 minutes gives addresses away, one group at a time.
    #[serde(default = "yes")]
    pub rebalance: bool,

    /// Nodes labelled `node.kubernetes.io/exclude-from-external-load-balancers` may announce.
    #[serde(default, rename = "ignoreExcludeLB")]
    pub ignore_exclude_lb: bool,

    /// Whether packets are steered to the nodes with endpoints (`Auto`) or served by the leader alone (`Off`).
    #[serde(default)]
    pub steering: Steering,

    /// Whether nodes off the segment, which are reached through a tunnel (VXLAN), serve only when no node on it has an
    /// endpoint (`Auto`), or always (`Always`). `Always` by any advertisement of an address wins.
    #[serde(default)]
    pub cross_segment: CrossSegment,

    /// What packets to a port that no Service has on the address meet: an answer that says so (`Reject`), or silence
    /// (`Drop`). `Drop` by any advertisement of an address wins.
    #[serde(default)]
    pub unknown_port: UnknownPort,
}

/// A weighted preference.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PreferredNodeSelector {
    /// Added to the weight of the nodes that match, 1 to 100.
    #[schemars(with = "i64")]
    pub weight: u32,
    /// Which nodes.
    pub preference: LabelSelector,
}

/// Whether to steer.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Steering {
    /// Where the data path can.
    #[default]
    Auto,
    /// Announce only.
    Off,
}

/// When nodes off the segment serve.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CrossSegment {
    /// When no node on the segment has an endpoint.
    #[default]
    Auto,
    /// Like those on the segment.
    Always,
}

/// What packets to unknown ports meet.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnknownPort {
    /// A TCP reset or an ICMP error, at most ten a second to each client.
    #[default]
    Reject,
    /// Silence.
    Drop,
}

fn yes() -> bool {
    true
}
