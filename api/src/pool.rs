//! `IPAddressPool`: addresses to hand out, and to whom.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Addresses that Landfall hands out as virtual IPs.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "landfall.dev",
    version = "v1alpha1",
    kind = "IPAddressPool",
    plural = "ipaddresspools",
    singular = "ipaddresspool",
    shortname = "lfpool",
    category = "landfall",
    status = "IPAddressPoolStatus",
    doc = "Addresses that Landfall hands out as virtual IPs, and who may have them.",
    printcolumn(
        name = "Auto-Assign",
        type_ = "boolean",
        json_path = ".spec.autoAssign"
    ),
    printcolumn(name = "Purpose", type_ = "string", json_path = ".spec.purpose"),
    printcolumn(name = "Addresses", type_ = "string", json_path = ".spec.addresses"),
    printcolumn(
        name = "V4 Available",
        type_ = "integer",
        json_path = ".status.ipv4.available"
    ),
    printcolumn(
        name = "V6 Available",
        type_ = "integer",
        json_path = ".status.ipv6.available"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct IPAddressPoolSpec {
    // CEL has no order of IPv6 addresses, and finding one by prefixes exceeds the API server's cost limit: a
    // reversed IPv6 range is found by who reads the pool.
    /// The addresses: CIDRs (`192.0.2.0/28`) or inclusive ranges (`192.0.2.10-192.0.2.20`), IPv4 and IPv6.
    #[schemars(length(max = 64), inner(length(max = 90)))]
    #[x_kube(
        validation = Rule::new("self.size() > 0")
            .message("spec.addresses is empty: name at least one CIDR such as 192.0.2.0/28 or range such as 192.0.2.10-192.0.2.20"),
        validation = Rule::new("self.all(a, a.contains('-') ? (a.split('-').size() == 2 && a.split('-').all(p, isIP(p.trim()))) : isCIDR(a))")
            .message("spec.addresses: every entry must be a CIDR such as 192.0.2.0/28 or a range such as 192.0.2.10-192.0.2.20; write a single address as 192.0.2.10/32 or fd00::10/128"),
        validation = Rule::new("self.all(a, !a.contains('-') || a.split('-').size() != 2 || !a.split('-').all(p, isIP(p.trim())) || ip(a.split('-')[0].trim()).family() == ip(a.split('-')[1].trim()).family())")
            .message("spec.addresses: a range must not mix IPv4 and IPv6; write one range per family"),
        validation = Rule::new("self.all(a, !a.matches('^ *[0-9.]+ *- *[0-9.]+ *$') || !a.split('-').all(p, isIP(p.trim())) || (int(a.split('-')[0].trim().split('.')[0]) * 16777216 + int(a.split('-')[0].trim().split('.')[1]) * 65536 + int(a.split('-')[0].trim().split('.')[2]) * 256 + int(a.split('-')[0].trim().split('.')[3])) <= (int(a.split('-')[1].trim().split('.')[0]) * 16777216 + int(a.split('-')[1].trim().split('.')[1]) * 65536 + int(a.split('-')[1].trim().split('.')[2]) * 256 + int(a.split('-')[1].trim().split('.')[3])))")
            .message("spec.addresses: a range ends before it begins; swap its two addresses"),
        validation = Rule::new("self.all(a, self.exists_one(b, b == a))")
            .message("spec.addresses: an entry stands twice; remove one"),
        validation = Rule::new("self.all(a, !isCIDR(a) || self.all(b, a == b || !isCIDR(b) || !cidr(a).containsCIDR(cidr(b))))")
            .message("spec.addresses: one entry contains another; remove the smaller one"),
        validation = Rule::new("self.all(a, !a.contains('-') || [a.split('-')].all(r, r.size() != 2 || !isIP(r[0].trim()) || !isIP(r[1].trim()) || self.all(c, !isCIDR(c) || (!cidr(c).containsIP(r[0].trim()) && !cidr(c).containsIP(r[1].trim())))))")
            .message("spec.addresses: a range overlaps a CIDR; remove or shorten one of them"),
    )]
    pub addresses: Vec<String>,

    /// What the addresses are for: Services (`Ingress`), `EgressPolicies` (`Egress`), or either (`Both`). Only `Both` lets pods
    /// leave by the address of a Service.
    #[serde(default)]
    pub purpose: Purpose,

    /// Whether a Service that names neither an address nor a pool may be served from here.
    #[serde(default = "yes")]
    pub auto_assign: bool,

    /// Keep off IPv4 addresses that end in .0 and .255, which some old devices drop.
    #[serde(default)]
    #[schemars(rename = "avoidBuggyIPs")]
    #[serde(rename = "avoidBuggyIPs")]
    pub avoid_buggy_ips: bool,

    /// Who may have addresses of this pool. Without it everybody may. With it nobody else may, not even by
    /// asking for an address by name. For an `EgressPolicy` the namespaces are those of its pods, and a pool with
    /// serviceSelectors has no addresses but by `fromService`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_allocation: Option<ServiceAllocation>,

    /// How long a freed address rests before another owner gets it; its former owner has it back at once.
    #[serde(default = "default_quarantine")]
    #[schemars(length(max = 48))]
    #[x_kube(
        validation = Rule::new(format!("self.matches('{}')", crate::duration::PATTERN))
            .message("spec.quarantine must be a duration such as 60s, 1m30s or 0s"),
    )]
    pub quarantine: String,

    /// Keep addresses in use that are no longer in any pool, instead of replacing them.
    #[serde(default)]
    pub retain_assigned: bool,
}

/// What a pool's addresses are for.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Services of type `LoadBalancer`.
    #[default]
    Ingress,
    /// `EgressPolicies`.
    Egress,
    /// Either.
    Both,
}

/// Who may have addresses of a pool.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.namespaces) || has(self.namespaceSelectors) || has(self.serviceSelectors) || self.priority != 0")
        .message("spec.serviceAllocation admits nobody in particular: name namespaces, namespaceSelectors or serviceSelectors, or set a priority, or leave serviceAllocation out"),
)]
pub struct ServiceAllocation {
    /// Pools with a lower number are tried first; pools with 0 and pools without allocation rules come last.
    #[serde(default)]
    #[schemars(with = "i64")]
    #[x_kube(
        validation = Rule::new("self >= 0 && self <= 1000000")
            .message("spec.serviceAllocation.priority must be 0 to 1000000; write a number in that range, lower is tried first"),
    )]
    pub priority: u32,
    /// Namespaces by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 63)))]
    #[x_kube(
        validation = Rule::new("self.size() > 0")
            .message("spec.serviceAllocation.namespaces is an empty list and would admit nobody: name a namespace or leave the field out"),
    )]
    pub namespaces: Vec<String>,
    /// Namespaces by label.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(
        validation = Rule::new("self.size() > 0")
            .message("spec.serviceAllocation.namespaceSelectors is an empty list and would admit nobody: write a selector or leave the field out"),
        validation = Rule::new(crate::selector::NOT_EMPTY)
            .message("spec.serviceAllocation.namespaceSelectors: an empty selector matches everything; give it matchLabels or matchExpressions, or leave it out"),
    )]
    pub namespace_selectors: Vec<LabelSelector>,
    /// Services by label.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(
        validation = Rule::new("self.size() > 0")
            .message("spec.serviceAllocation.serviceSelectors is an empty list and would admit nobody: write a selector or leave the field out"),
        validation = Rule::new(crate::selector::NOT_EMPTY)
            .message("spec.serviceAllocation.serviceSelectors: an empty selector matches everything; give it matchLabels or matchExpressions, or leave it out"),
    )]
    pub service_selectors: Vec<LabelSelector>,
}

/// What became of a pool.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IPAddressPoolStatus {
    /// IPv4 addresses.
    #[serde(default)]
    pub ipv4: Usage,
    /// IPv6 addresses.
    #[serde(default)]
    pub ipv6: Usage,
    /// `Ready`: whether the pool overlaps nothing and can be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Addresses of one family, in numbers; capped at 2^53.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// All that the pool contains and may hand out.
    pub total: i64,
    /// Held by Services and `EgressPolicies`.
    pub assigned: i64,
    /// Resting after they were freed.
    pub quarantined: i64,
    /// Free.
    pub available: i64,
}

fn yes() -> bool {
    true
}

fn default_quarantine() -> String {
    "60s".into()
}
