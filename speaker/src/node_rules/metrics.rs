//! What the node rules count.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct ByFamily {
    pub(super) family: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct ByReason {
    pub(super) reason: &'static str,
}

/// The metrics of the node rules.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    /// Packets the guard dropped; a gauge since the kernel counts them, and starts anew with the table.
    pub(super) guard_drops: Family<ByFamily, Gauge>,
    /// Packets of pods that were dropped on their way outside; a gauge for the same reason.
    pub(super) egress_drops: Family<ByReason, Gauge>,
    /// Times the table was put back after somebody else took it away.
    pub(super) restored: Counter,
    /// Attempts to write rules or routes that failed.
    pub(super) failures: Counter,
}

impl Metrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "guard_dropped_packets",
            "Packets in the forward hook that still carried a VIP as destination, since the table was made",
            self.guard_drops.clone(),
        );
        registry.register(
            "egress_judged_dropped_packets",
            "Packets of pods that were dropped on their way outside, by reason (unknown source, forged, invalid, no-gateway, translated by somebody else), since the table was made",
            self.egress_drops.clone(),
        );
        registry.register(
            "node_rules_restored",
            "Times the nftables table was put back after somebody else removed it",
            self.restored.clone(),
        );
        registry.register(
            "node_rules_failures",
            "Attempts to write nftables rules or routes that failed and are retried",
            self.failures.clone(),
        );
    }
}
