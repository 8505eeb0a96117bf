//! `EgressPolicy`: pods that leave the cluster by addresses of their own.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::virtual_ip::ServiceReference;

/// The most ports of an address: 1024 to 65535.
const MAX_PORTS: u32 = 64_512;

/// Pods that leave the cluster by addresses of their own, through a gateway node.
///
/// A pod is the tenant of one policy: of several that select it, of the most specific. One that names a podSelector and a
/// namespaceSelector goes before one that names one of them, then more requirements before fewer, then the name.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "landfall.dev",
    version = "v1alpha1",
    kind = "EgressPolicy",
    plural = "egresspolicies",
    singular = "egresspolicy",
    shortname = "lfegress",
    category = "landfall",
    status = "EgressPolicyStatus",
    doc = "Pods that leave the cluster by addresses of their own, through a gateway node.",
    printcolumn(name = "Addresses", type_ = "string", json_path = ".status.addresses"),
    printcolumn(name = "Gateway", type_ = "string", json_path = ".status.gateway"),
    printcolumn(name = "Standby", type_ = "string", json_path = ".status.standby"),
    printcolumn(name = "Pods", type_ = "integer", json_path = ".status.matchedPods"),
    printcolumn(name = "Ports", type_ = "integer", json_path = ".status.portsInUse"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.namespaceSelector) || has(self.podSelector)")
        .message("spec selects no pods: write a podSelector, a namespaceSelector, or both"),
)]
pub struct EgressPolicySpec {
    /// Namespaces of the pods that this is for; without it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new(crate::selector::NOT_EMPTY_ONE)
            .message("spec.namespaceSelector: an empty selector matches everything; give it matchLabels or matchExpressions, or leave it out"),
        validation = Rule::new(crate::selector::READABLE_ONE)
            .message("spec.namespaceSelector.matchExpressions: write operator In or NotIn with values, or Exists or DoesNotExist without"),
    )]
    pub namespace_selector: Option<LabelSelector>,

    /// The pods that this is for; without it all of the namespaces. Pods on the host's network are never matched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new(crate::selector::NOT_EMPTY_ONE)
            .message("spec.podSelector: an empty selector matches everything; give it matchLabels or matchExpressions, or leave it out"),
        validation = Rule::new(crate::selector::READABLE_ONE)
            .message("spec.podSelector.matchExpressions: write operator In or NotIn with values, or Exists or DoesNotExist without"),
    )]
    pub pod_selector: Option<LabelSelector>,

    /// The addresses that the pods leave by. A pod with several of its family to choose from keeps one.
    #[serde(rename = "egressIPs")]
    pub egress_ips: EgressIPs,

    /// Destinations that this is for; without it all outside the cluster. Destinations in the cluster never are.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        rename = "destinationCIDRs"
    )]
    #[schemars(length(max = 256), inner(length(max = 49)))]
    #[x_kube(
        validation = Rule::new("self.size() > 0")
            .message("spec.destinationCIDRs is an empty list and would match nothing: name a CIDR or leave the field out"),
        validation = Rule::new("self.all(c, isCIDR(c) && cidr(c) == cidr(c).masked())")
            .message("spec.destinationCIDRs: every entry must be a CIDR without host bits, such as 198.51.100.0/24 or 2001:db8::/32; write a single address as 198.51.100.7/32"),
    )]
    pub destination_cidrs: Vec<String>,

    /// Destinations, of those, that this is not for: packets to them leave as without a policy.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        rename = "excludedCIDRs"
    )]
    #[schemars(length(max = 256), inner(length(max = 49)))]
    #[x_kube(
        validation = Rule::new("self.all(c, isCIDR(c) && cidr(c) == cidr(c).masked())")
            .message("spec.excludedCIDRs: every entry must be a CIDR without host bits, such as 198.51.100.0/24 or 2001:db8::/32; write a single address as 198.51.100.7/32"),
    )]
    pub excluded_cidrs: Vec<String>,

    /// The nodes that may be the gateway, of those that may announce the addresses; without it all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateways: Option<Gateways>,

    /// How many ports pods may have; without it as many as there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quota>,

    /// How fast all pods together may send, and likewise receive; without it as fast as the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,

    /// What becomes of flows that were there before the policy: they keep the source they have (`Keep`), or are cut
    /// (`Cut`).
    #[serde(default)]
    pub on_appear: OnAppear,

    /// What becomes of the pods' flows when the policy goes: they keep their source until they end (`Drain`), or are cut
    /// (`Cut`).
    #[serde(default)]
    pub on_delete: OnDelete,

    /// Packets to VIPs of this cluster leave by the gateway too, so that the receiver sees the egress address.
    #[serde(default)]
    pub hairpin: bool,
}

/// Where a policy's addresses come from: one of a pool, addresses by number, a Service.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("[has(self.pool), has(self.addresses), has(self.fromService)].filter(said, said).size() == 1")
        .message("spec.egressIPs: say where the addresses come from by exactly one of pool, addresses and fromService"),
    validation = Rule::new("has(self.pool) || (!has(self.count) && !has(self.ipFamilies))")
        .message("spec.egressIPs: count and ipFamilies say how many addresses a pool gives; remove them, or name a pool"),
)]
pub struct EgressIPs {
    /// An `IPAddressPool` to take addresses from. Its purpose must be `Egress` or `Both`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub pool: Option<String>,
    /// How many addresses of each family the pool gives, 1 to 16; 1 if nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    #[x_kube(
        validation = Rule::new("self >= 1 && self <= 16")
            .message("spec.egressIPs.count must be 1 to 16; a pod keeps one address of a family, so that more are for more ports"),
    )]
    pub count: Option<u32>,
    /// The families that the pool gives addresses of; without it all that it has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2))]
    #[x_kube(
        validation = Rule::new("self.size() > 0 && self.all(f, self.exists_one(g, g == f))")
            .message("spec.egressIPs.ipFamilies: name IPv4, IPv6 or both, each once, or leave the field out"),
    )]
    pub ip_families: Vec<IPFamily>,
    /// Addresses by number. Each must lie in an `IPAddressPool` whose purpose is `Egress` or `Both`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 2, max = 45)))]
    #[x_kube(
        validation = Rule::new("self.size() > 0")
            .message("spec.egressIPs.addresses is an empty list: name an address, or leave the field out and name a pool"),
        validation = Rule::new("self.all(a, isIP(a) && ip.isCanonical(a))")
            .message("spec.egressIPs.addresses: every entry must be an address in canonical form, such as 192.0.2.7 or fd00:88::200; for a range name a pool"),
        validation = Rule::new("self.all(a, self.exists_one(b, b == a))")
            .message("spec.egressIPs.addresses: an address stands twice; remove one"),
    )]
    pub addresses: Vec<String>,
    /// The VIPs of this Service, which go on being its own: pods leave by the address that they receive on. Only pods of
    /// the Service's namespace may. They must come from a pool whose purpose is `Both`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_service: Option<ServiceReference>,
}

/// An address family, as Services name it.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IPFamily {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

/// Which nodes may be the gateway.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gateways {
    /// Nodes by label.
    #[x_kube(
        validation = Rule::new(crate::selector::NOT_EMPTY_ONE)
            .message("spec.gateways.nodeSelector: an empty selector matches everything; give it matchLabels or matchExpressions, or leave gateways out"),
        validation = Rule::new(crate::selector::READABLE_ONE)
            .message("spec.gateways.nodeSelector.matchExpressions: write operator In or NotIn with values, or Exists or DoesNotExist without"),
    )]
    pub node_selector: LabelSelector,
}

/// How many ports pods may have at once.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.portsPerPod) || has(self.ports)")
        .message("spec.quota limits nothing: set portsPerPod, ports or both, or leave quota out"),
    validation = Rule::new("!has(self.portsPerPod) || !has(self.ports) || self.portsPerPod <= self.ports")
        .message("spec.quota: a pod may have more ports than all pods together; lower portsPerPod or raise ports"),
)]
pub struct Quota {
    /// Most ports of one pod to one remote address, port and protocol, 1 to 64512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    #[x_kube(
        validation = Rule::new(format!("self >= 1 && self <= {MAX_PORTS}"))
            .message("spec.quota.portsPerPod must be 1 to 64512, the ports from 1024 on; leave it out for no limit"),
    )]
    pub ports_per_pod: Option<u32>,
    /// Most ports of all pods together, to all destinations, 1 to 16777216.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    #[x_kube(
        validation = Rule::new("self >= 1 && self <= 16777216")
            .message("spec.quota.ports must be 1 to 16777216; leave it out for no limit"),
    )]
    pub ports: Option<u32>,
}

/// How fast the pods may be, in bits, as Kubernetes writes quantities: `100M` is 100 000 000.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// Bits a second in each direction, such as `100M`; from `8k` to `10T`.
    #[schemars(length(max = 20))]
    #[x_kube(
        validation = Rule::new(format!("self.matches('{}')", crate::quantity::PATTERN))
            .message("spec.bandwidth.rate must be bits a second as a whole number with one of k, M, G, T, Ki, Mi, Gi, Ti or none, such as 100M"),
        validation = Rule::new(format!("!self.matches('{}') || (quantity(self).compareTo(quantity('8k')) >= 0 && quantity(self).compareTo(quantity('10T')) <= 0)", crate::quantity::PATTERN))
            .message("spec.bandwidth.rate must be 8k to 10T bits a second; leave bandwidth out for no limit"),
    )]
    pub rate: String,
    /// Bits that may go at once after a pause, such as `10M`; at least `12k`, a full frame. Without it what the rate
    /// passes in 250 ms, and no less than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    #[x_kube(
        validation = Rule::new(format!("self.matches('{}')", crate::quantity::PATTERN))
            .message("spec.bandwidth.burst must be bits as a whole number with one of k, M, G, T, Ki, Mi, Gi, Ti or none, such as 10M"),
        validation = Rule::new(format!("!self.matches('{}') || (quantity(self).compareTo(quantity('12k')) >= 0 && quantity(self).compareTo(quantity('10T')) <= 0)", crate::quantity::PATTERN))
            .message("spec.bandwidth.burst must be 12k bits, one full frame, to 10T; leave it out for what the rate passes in 250 ms"),
    )]
    pub burst: Option<String>,
}

/// What becomes of flows that were there before the policy.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnAppear {
    /// They keep the source they have until they end.
    #[default]
    Keep,
    /// They are cut.
    Cut,
}

/// What becomes of the pods' flows when the policy goes.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnDelete {
    /// They keep their source until they end.
    #[default]
    Drain,
    /// They are cut.
    Cut,
}

/// What became of a policy.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressPolicyStatus {
    /// The addresses that its pods leave by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// The node that they leave at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The node that would take over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<String>,
    /// Pods that are its tenants.
    #[serde(default)]
    pub matched_pods: i64,
    /// Pods that it selects and that are on the host's network: they are not matched.
    #[serde(default)]
    pub host_network_pods: i64,
    /// Ports that its pods' flows use, as the gateway last said.
    #[serde(default)]
    pub ports_in_use: i64,
    /// `Ready`; and `Overlapping`, `HostNetworkPods` and `NamespacesNotAdmitted` where they hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
