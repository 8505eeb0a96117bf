//! What the data path tells Prometheus.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::counts::Counts;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct AttachedLabels {
    pub(super) interface: String,
    pub(super) hook: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RestoredLabels {
    pub(super) interface: String,
    pub(super) cause: &'static str,
}

/// The worker's metrics.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    pub(super) attached: Family<AttachedLabels, Gauge>,
    pub(super) restored: Family<RestoredLabels, Counter>,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry, counts: Counts) -> Self {
        let metrics = Self::default();
        registry.register(
            "datapath_attached",
            "Whether the eBPF program is attached to the uplink: 1 or 0, by hook (tcx, clsact or none)",
            metrics.attached.clone(),
        );
        registry.register(
            "datapath_restored",
            "How often the eBPF program was attached anew after it had been removed or another had gone in front, in times",
            metrics.restored.clone(),
        );
        registry.register_collector(Box::new(VipCounters(counts)));
        metrics
    }
}

/// The counts, read from the kernel at each scrape.
#[derive(Debug)]
struct VipCounters(Counts);

impl Collector for VipCounters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.0.read();
        let mut packets = encoder.encode_descriptor(
            "vip_received_packets",
            "Packets to the VIP that came in by this node's uplinks, in packets",
            None,
            MetricType::Counter,
        )?;
        for (vip, count) in &counts {
            let labels = [("vip", vip.to_string())];
            ConstCounter::new(count.packets).encode(packets.encode_family(&labels)?)?;
        }
        let mut bytes = encoder.encode_descriptor(
            "vip_received_bytes",
            "Bytes of the packets to the VIP that came in by this node's uplinks, link-layer header included, in bytes",
            None,
            MetricType::Counter,
        )?;
        for (vip, count) in &counts {
            let labels = [("vip", vip.to_string())];
            ConstCounter::new(count.bytes).encode(bytes.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
