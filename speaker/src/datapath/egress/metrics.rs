//! What the gateway tells Prometheus.

use std::fmt;
use std::sync::{Arc, Mutex};

use landfall_ebpf_common::egress::gateway::Reason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

use super::super::worker::lock;
use super::tables::Tables;

/// The maps, once they are there.
pub(super) type SharedTables = Arc<Mutex<Option<Tables>>>;

/// Counts that the programs keep.
pub(super) struct Counters(pub(super) SharedTables);

impl fmt::Debug for Counters {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Counters").finish_non_exhaustive()
    }
}

impl Collector for Counters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let tables = lock(&self.0);
        let counts = tables.as_ref().map(Tables::reasons).unwrap_or_default();
        drop(tables);
        let mut family = encoder.encode_descriptor(
            "egress_packets",
            "Packets of pods that leave by an address of their own, and answers to them, by what was done with them; bindings that began and ended, in packets",
            None,
            MetricType::Counter,
        )?;
        for (reason, count) in Reason::ALL.iter().zip(counts) {
            let labels = [("reason", reason.word())];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
