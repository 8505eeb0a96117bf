//! The conditions of an egress policy: what is the case, and what to do.

use landfall_api::conditions::{
    EGRESS_HOST_NETWORK_PODS, EGRESS_NAMESPACES_NOT_ADMITTED, EGRESS_OVERLAPPING, EGRESS_READY,
    VIRTUAL_IP_ANNOUNCED, VIRTUAL_IP_GATEWAY_READY, announced, egress,
};
use landfall_core::egress::Report;
use landfall_core::ipam::Allocation;
use landfall_core::model::{Condition, EgressPolicy, EgressSource, VirtualIp};

/// The reason while addresses are being written down, as of a Service that has none.
const ADDRESS_PENDING: &str = "AddressPending";
/// How many names a message carries.
const MAX_NAMES: usize = 8;

/// What is known of a policy.
pub(super) struct Facts<'a> {
    pub(super) policy: &'a EgressPolicy,
    pub(super) allocation: &'a Allocation,
    pub(super) report: &'a Report,
    /// The records of its addresses.
    pub(super) vips: &'a [&'a VirtualIp],
}

fn condition(kind: &str, holds: bool, reason: &str, message: String) -> Condition {
    Condition {
        kind: kind.into(),
        status: if holds { "True" } else { "False" }.into(),
        reason: reason.into(),
        message,
    }
}

/// `3 pods`, `1 pod`.
fn pods(number: usize) -> String {
    format!("{number} pod{}", if number == 1 { "" } else { "s" })
}

/// The names with their numbers, of so many of them.
fn named<'a>(counts: impl ExactSizeIterator<Item = (&'a str, usize)>) -> String {
    let more = counts.len().saturating_sub(MAX_NAMES);
    let mut parts: Vec<String> = counts
        .take(MAX_NAMES)
        .map(|(name, number)| format!("{name} ({})", pods(number)))
        .collect();
    if more > 0 {
        parts.push(format!("{more} more"));
    }
    parts.join(", ")
}

impl Facts<'_> {
    /// Whether its pods have an address and a gateway; and whether that is more than a moment between two writes.
    pub(super) fn ready(&self) -> (Condition, bool) {
        let not = |reason: &str, message: String| condition(EGRESS_READY, false, reason, message);
        let refusal = self.allocation.refusal.as_ref();
        if self.allocation.addresses.is_empty() {
            if let Some(refusal) = refusal {
                return (not(refusal.reason(), refusal.to_string()), true);
            }
            let message = "its addresses are being written down".to_owned();
            return (not(ADDRESS_PENDING, message), false);
        }
        let refused = self.vips.iter().find_map(|vip| {
            let said = vip.condition(VIRTUAL_IP_ANNOUNCED)?;
            (said.status == "False").then_some((vip.address, said))
        });
        if let Some((address, said)) = refused {
            let reason = if said.reason == announced::ADDRESS_CONFLICT {
                announced::ADDRESS_CONFLICT
            } else {
                egress::NO_GATEWAY
            };
            let message = format!("{address}: {}", said.message);
            return (not(reason, message), true);
        }
        let Some(gateway) = self.gateway() else {
            let message = "no node has said that it leads its addresses".to_owned();
            return (not(egress::NO_GATEWAY, message), false);
        };
        if let Some(said) = self.vips.iter().find_map(|vip| {
            let said = vip.condition(VIRTUAL_IP_GATEWAY_READY)?;
            (said.status == "False").then_some(said)
        }) {
            // As a rule it is ready a moment later: that is no Event.
            return (not(egress::GATEWAY_NOT_READY, said.message.clone()), false);
        }
        let addresses = self.allocation.addresses.iter();
        let addresses: Vec<String> = addresses.map(ToString::to_string).collect();
        let mut parts = vec![format!("{} at node {gateway}", addresses.join(", "))];
        let lacking = self.report.lacking.iter();
        parts
            .extend(lacking.map(|family| format!("it has no {family} address, and its pods have")));
        parts.extend(refusal.map(ToString::to_string));
        let reason = refusal.map_or(egress::GATEWAY_ELECTED, |refusal| refusal.reason());
        let ready = condition(EGRESS_READY, true, reason, parts.join("; "));
        (ready, true)
    }

    /// That pods are others' tenants.
    pub(super) fn overlapping(&self) -> Option<Condition> {
        let (pod, winner) = self.report.taken_pod.as_ref()?;
        let taken = &self.report.taken;
        let total = taken.values().sum();
        let of = named(taken.iter().map(|(name, number)| (&**name, *number)));
        let message = format!(
            "{} that it selects {} of policies that go first, the more specific or, of equals, the first by name: {of}; {pod} \
             for one is selected by {} and by {winner}, which has it: make the selectors tell them apart, or leave it so",
            pods(total),
            if total == 1 {
                "is a tenant"
            } else {
                "are tenants"
            },
            self.policy.name,
        );
        let reason = egress::MORE_SPECIFIC_POLICY;
        Some(condition(EGRESS_OVERLAPPING, true, reason, message))
    }

    /// That pods are on the host's network.
    pub(super) fn host_network_pods(&self) -> Option<Condition> {
        let number = self.report.host_network;
        let message = format!(
            "{} that it selects {} on the host's network and not matched: their packets are the node's",
            pods(number),
            if number == 1 { "is" } else { "are" },
        );
        let reason = egress::NOT_MATCHED;
        (number > 0).then(|| condition(EGRESS_HOST_NETWORK_PODS, true, reason, message))
    }

    /// That pods are of namespaces that its addresses are not for.
    pub(super) fn namespaces_not_admitted(&self) -> Option<Condition> {
        let refused = &self.report.not_admitted;
        if refused.is_empty() {
            return None;
        }
        let names = named(refused.iter().map(|(name, number)| (&**name, *number)));
        let (reason, message) = match &self.policy.spec.source {
            EgressSource::Service(service) => (
                egress::OTHER_NAMESPACE,
                format!(
                    "the addresses of Service {service} are for pods of its own namespace, not of {names}: these have \
                     no address; select none of them, or give them a policy of their own"
                ),
            ),
            EgressSource::Pool { .. } | EgressSource::Addresses(_) => (
                egress::POOL_DOES_NOT_ADMIT,
                format!(
                    "the IPAddressPool does not admit {names}: these have no address; admit them in the pool's \
                     serviceAllocation, or select none of them"
                ),
            ),
        };
        let kind = EGRESS_NAMESPACES_NOT_ADMITTED;
        Some(condition(kind, true, reason, message))
    }
}
