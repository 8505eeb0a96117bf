//! What replication tells Prometheus.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Why something was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabel {
    pub(super) reason: &'static str,
}

#[derive(Clone, Debug)]
pub(super) struct Metrics {
    pub(super) standbys: Gauge,
    pub(super) behind: Gauge,
    pub(super) lag: Histogram,
    pub(super) bytes: Counter,
    pub(super) changes: Counter,
    pub(super) copies: Counter,
    pub(super) refused: Family<ReasonLabel, Counter>,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            standbys: Gauge::default(),
            behind: Gauge::default(),
            // 1 ms to 8 s.
            lag: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            bytes: Counter::default(),
            changes: Counter::default(),
            copies: Counter::default(),
            refused: Family::default(),
        };
        registry.register(
            "replication_standbys",
            "Standbys that follow the groups this node is the gateway of, each group's counted",
            metrics.standbys.clone(),
        );
        registry.register(
            "replication_behind",
            "Changes of bindings that the standby furthest behind has not said to have applied",
            metrics.behind.clone(),
        );
        registry.register(
            "replication_lag_seconds",
            "Time from a change of a binding until its standby said to have applied it, the oldest of each message",
            metrics.lag.clone(),
        );
        registry.register(
            "replication_sent_bytes",
            "Bytes sent to standbys and gateways, less what TCP adds",
            metrics.bytes.clone(),
        );
        registry.register(
            "replication_changes",
            "Changes of bindings that were applied here, as a standby",
            metrics.changes.clone(),
        );
        registry.register(
            "replication_copies",
            "Full copies of a group's bindings that were begun here, as a standby",
            metrics.copies.clone(),
        );
        registry.register(
            "replication_refused",
            "What was refused from other nodes, by reason: key, message, stale, gap",
            metrics.refused.clone(),
        );
        metrics
    }

    pub(super) fn refuse(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }
}
