//! What replication tells Prometheus.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::Copied;

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
    pub(super) copied: Arc<Mutex<Copied>>,
}

pub(super) fn lock(copied: &Mutex<Copied>) -> MutexGuard<'_, Copied> {
    copied.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of each policy whose gateway this node is.
#[derive(Debug)]
struct ByPolicy(Arc<Mutex<Copied>>);

impl Collector for ByPolicy {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let copied = lock(&self.0).clone();
        let mut family = encoder.encode_descriptor(
            "egress_policy_standbys",
            "Other nodes that have a copy of all bindings of a policy whose gateway this node is, and follow: with 0 its flows end with this node",
            None,
            MetricType::Gauge,
        )?;
        for (policy, coverage) in &copied {
            let standbys = i64::try_from(coverage.standbys).unwrap_or(i64::MAX);
            let labels = [("policy", &**policy)];
            ConstGauge::new(standbys).encode(family.encode_family(&labels)?)?;
        }
        let mut family = encoder.encode_descriptor(
            "egress_policy_replication_lag_seconds",
            "Time since the oldest change of a policy's bindings that a standby has not said to have applied; 0 if it has applied all",
            None,
            MetricType::Gauge,
        )?;
        for (policy, coverage) in &copied {
            let labels = [("policy", &**policy)];
            ConstGauge::new(coverage.lag.as_secs_f64()).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
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
            copied: Arc::default(),
        };
        registry.register_collector(Box::new(ByPolicy(Arc::clone(&metrics.copied))));
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
