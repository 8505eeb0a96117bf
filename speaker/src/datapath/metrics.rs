//! What the data path tells Prometheus.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use landfall_ebpf_common::Verdict;
use landfall_ebpf_common::egress::guard::Guarded;

use super::Attachment;
use super::tables::Tables;
use super::worker::{SharedTables, interface_name, lock};

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
    pub(super) refused: Counter,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry, tables: SharedTables) -> Self {
        let metrics = Self::default();
        registry.register(
            "datapath_attached",
            "Whether the eBPF program is attached to the uplink: 1 or 0, by hook (tcx, clsact or none; xdp besides, where it is wanted)",
            metrics.attached.clone(),
        );
        registry.register(
            "datapath_restored",
            "How often the eBPF program was attached anew after it had been removed or another had gone in front, in times",
            metrics.restored.clone(),
        );
        registry.register(
            "datapath_changes_refused",
            "Changes of the data path's maps that the kernel refused or that had no room, in changes",
            metrics.refused.clone(),
        );
        registry.register_collector(Box::new(Counters(tables)));
        metrics
    }

    /// Shows how the programs are attached to uplinks and to their drivers.
    pub(super) fn show(
        &self,
        uplinks: &BTreeMap<u32, Attachment>,
        drivers: &BTreeMap<u32, Attachment>,
    ) {
        self.attached.clear();
        let rows = uplinks
            .iter()
            .map(|(interface, it)| (interface, it, "none"));
        let of_drivers = drivers.iter().map(|(interface, it)| (interface, it, "xdp"));
        for (interface, attachment, absent) in rows.chain(of_drivers) {
            let (hook, value) = match attachment {
                Attachment::Tcx => ("tcx", 1),
                Attachment::Clsact => ("clsact", 1),
                Attachment::Xdp => ("xdp", 1),
                Attachment::Absent { .. } => (absent, 0),
            };
            self.attached
                .get_or_create(&AttachedLabels {
                    interface: interface_name(*interface),
                    hook,
                })
                .set(value);
        }
    }
}

/// The counts, read from the kernel at each scrape.
#[derive(Debug)]
struct Counters(SharedTables);

impl Collector for Counters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let tables = lock(&self.0);
        let counts = tables.as_ref().map(Tables::counts).unwrap_or_default();
        let verdicts = tables.as_ref().map(Tables::verdicts).unwrap_or_default();
        let guarded = tables.as_ref().map(Tables::guarded).unwrap_or_default();
        drop(tables);
        let mut family = encoder.encode_descriptor(
            "datapath_packets",
            "Packets to VIPs that are steered, by what was done with them, in packets",
            None,
            MetricType::Counter,
        )?;
        for (verdict, count) in Verdict::ALL.iter().zip(verdicts) {
            let labels = [("verdict", verdict.word())];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        let mut family = encoder.encode_descriptor(
            "egress_guarded_packets",
            "Packets of pods on their way outside, by what the guard at the uplinks did with them, in packets",
            None,
            MetricType::Counter,
        )?;
        for (what, count) in Guarded::ALL.iter().zip(guarded) {
            let labels = [("verdict", what.word())];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
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
