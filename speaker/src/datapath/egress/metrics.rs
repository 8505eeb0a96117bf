//! What the gateway tells Prometheus.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use landfall_ebpf_common::egress::gateway::Reason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::super::worker::lock;
use super::tables::Tables;
use super::usage::Usage;
use crate::egress::PolicyName;

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
        let usage = tables.as_ref().map(Tables::usage).unwrap_or_default();
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
        of_policies(&mut encoder, &usage)
    }
}

/// By policy and never by pod: pods come and go, and each would leave its series behind.
fn of_policies(
    encoder: &mut DescriptorEncoder<'_>,
    usage: &BTreeMap<PolicyName, Usage>,
) -> fmt::Result {
    let family = encoder.encode_descriptor(
        "egress_policy_ports",
        "Ports that the flows of a policy's pods have in use at this node, their gateway",
        None,
        MetricType::Gauge,
    )?;
    gauges(family, usage, |usage| usage.ports)?;
    let family = encoder.encode_descriptor(
        "egress_policy_ports_quota",
        "Most ports of all pods of a policy together; 0 for no limit",
        None,
        MetricType::Gauge,
    )?;
    gauges(family, usage, |usage| u64::from(usage.quota))?;
    let family = encoder.encode_descriptor(
        "egress_policy_bindings",
        "Bindings of a policy's pods that live, as they were counted a moment ago",
        None,
        MetricType::Gauge,
    )?;
    gauges(family, usage, |usage| usage.total().live)?;
    let family = encoder.encode_descriptor(
        "egress_policy_resting",
        "Bindings of a policy's pods that have ended and whose ports rest",
        None,
        MetricType::Gauge,
    )?;
    gauges(family, usage, |usage| usage.total().resting)?;
    let family = encoder.encode_descriptor(
        "egress_policy_packets",
        "Packets of a policy's pods that this node has translated as their gateway, by direction (out, in)",
        None,
        MetricType::Counter,
    )?;
    counters(family, usage, "direction", |usage| {
        let count = &usage.count;
        vec![("out", count.out_packets), ("in", count.in_packets)]
    })?;
    let family = encoder.encode_descriptor(
        "egress_policy_bytes",
        "Bytes of them, link-layer header included, by direction (out, in)",
        None,
        MetricType::Counter,
    )?;
    counters(family, usage, "direction", |usage| {
        vec![("out", usage.count.out_bytes), ("in", usage.count.in_bytes)]
    })?;
    let family = encoder.encode_descriptor(
        "egress_policy_dropped_packets",
        "Packets of a policy's pods that this node, their gateway, has not let through, by reason: quota (of the policy or of a pod), no-port, no-room, bandwidth, others (egress_packets tells those apart, for all policies together)",
        None,
        MetricType::Counter,
    )?;
    counters(family, usage, "reason", |usage| usage.drops().to_vec())
}

fn gauges(
    mut family: MetricEncoder<'_>,
    usage: &BTreeMap<PolicyName, Usage>,
    value: impl Fn(&Usage) -> u64,
) -> fmt::Result {
    for (policy, usage) in usage {
        let labels = [("policy", &**policy)];
        let value = i64::try_from(value(usage)).unwrap_or(i64::MAX);
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn counters(
    mut family: MetricEncoder<'_>,
    usage: &BTreeMap<PolicyName, Usage>,
    label: &'static str,
    values: impl Fn(&Usage) -> Vec<(&'static str, u64)>,
) -> fmt::Result {
    for (policy, usage) in usage {
        for (word, value) in values(usage) {
            let labels = [("policy", &**policy), (label, word)];
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}
