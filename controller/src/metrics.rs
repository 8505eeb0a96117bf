//! What the controller counts.

use landfall_core::ip::Family;
use landfall_core::ipam::{Changes, PoolStatus};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::writer::{Write, WriteError};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PoolLabels {
    pool: String,
    family: &'static str,
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabels {
    reason: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WriteLabels {
    kind: &'static str,
    result: &'static str,
}

/// The controller's metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pool_addresses: Labelled<PoolLabels, Gauge>,
    allocations: Counter,
    refusals: Labelled<ReasonLabels, Counter>,
    writes: Labelled<WriteLabels, Counter>,
    queue: Gauge,
    leader: Gauge,
    services: Gauge,
}

impl Metrics {
    /// Registers all of them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "pool_addresses",
            "Addresses of an IPAddressPool by family and state (total, assigned, quarantined, available)",
            self.pool_addresses.clone(),
        );
        registry.register(
            "allocations",
            "Times a Service got its addresses, or others",
            self.allocations.clone(),
        );
        registry.register(
            "refusals",
            "Times a Service was refused an address, by the reason of its condition",
            self.refusals.clone(),
        );
        registry.register(
            "writes",
            "Writes to the API server by kind of object and result (ok, gone, failed)",
            self.writes.clone(),
        );
        registry.register(
            "write_queue_depth",
            "Objects with a write that waits, is in flight or backs off",
            self.queue.clone(),
        );
        registry.register(
            "controller_leader",
            "Whether this controller leads (1) or stands by (0)",
            self.leader.clone(),
        );
        registry.register(
            "services",
            "Services of type LoadBalancer that the controller knows",
            self.services.clone(),
        );
    }

    /// Whether this process leads.
    pub fn lead(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// Whether this process was last said to lead.
    pub fn leads(&self) -> bool {
        self.leader.get() == 1
    }

    pub(crate) fn queued(&self, depth: usize) {
        self.queue.set(i64::try_from(depth).unwrap_or(i64::MAX));
    }

    pub(crate) fn known_services(&self, count: usize) {
        self.services.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub(crate) fn written(&self, write: &Write, result: &Result<(), WriteError>) {
        let result = match result {
            Ok(()) => "ok",
            Err(WriteError::Gone) => "gone",
            Err(WriteError::Failed(_)) => "failed",
        };
        let kind = write.kind();
        self.writes
            .get_or_create(&WriteLabels { kind, result })
            .inc();
    }

    pub(crate) fn decided(&self, changes: &Changes) {
        for notice in changes
            .services
            .iter()
            .filter_map(|status| status.notice.as_ref())
        {
            if matches!(
                notice.reason.as_str(),
                "AddressAssigned" | "AddressReplaced"
            ) {
                self.allocations.inc();
            } else {
                let reason = notice.reason.clone();
                self.refusals.get_or_create(&ReasonLabels { reason }).inc();
            }
        }
        for status in &changes.pools {
            self.pool(status);
        }
    }

    fn pool(&self, status: &PoolStatus) {
        for (family, name) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
            let counts = status.counts(family);
            for (state, count) in [
                ("total", counts.total),
                ("assigned", counts.assigned),
                ("quarantined", counts.quarantined),
                ("available", counts.available),
            ] {
                let labels = PoolLabels {
                    pool: status.name.to_string(),
                    family: name,
                    state,
                };
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                self.pool_addresses.get_or_create(&labels).set(count);
            }
        }
    }

    /// Forgets what only a leader knows.
    pub(crate) fn clear(&self) {
        self.pool_addresses.clear();
        self.services.set(0);
    }
}
