//! The metrics of the speaker's upper half: membership, election and status.

use std::sync::atomic::Ordering;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::membership::gossip::Counters;

/// Labels of an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct VipLabels {
    /// The address.
    pub vip: String,
    /// Where it is announced.
    pub interface: String,
}

/// Labels of a cause.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    /// A word.
    pub reason: String,
}

/// Labels of a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KeyLabels {
    /// The first 32 bits of the key's SHA-256.
    pub key: String,
    /// `primary` or `secondary`.
    pub role: String,
}

/// Labels of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PeerLabels {
    /// Its node.
    pub peer: String,
}

/// What the upper half counts.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// 1 for each address that this node leads.
    pub leads: Family<VipLabels, Gauge>,
    /// Groups that this node leads.
    pub led_groups: Gauge,
    /// Groups in all.
    pub groups: Gauge,
    /// Groups that no node could lead.
    pub leaderless_groups: Gauge,
    /// 1 while somebody has disarmed egress on this node.
    pub egress_disarmed: Gauge,
    /// Egress policies of which this node says that it can be the gateway.
    pub egress_policies_settled: Gauge,
    /// Those whose gateway, of whichever node, has not said so yet.
    pub egress_policies_waiting: Gauge,
    /// Leaderships taken and given up.
    pub transitions: Family<ReasonLabels, Counter>,
    /// From a peer's last hello to the verdict.
    pub detection: Histogram,
    /// From the verdict to this node's claim.
    pub takeover: Histogram,
    /// Peers by state.
    pub peers: Family<ReasonLabels, Gauge>,
    /// Interfaces on which each peer is heard.
    pub heard: Family<PeerLabels, Gauge>,
    /// Keys in force.
    pub keys: Family<KeyLabels, Gauge>,
    /// Key files that could not be read.
    pub key_errors: Counter,
    /// Hellos sent.
    pub hellos_sent: Counter,
    /// Hellos taken and refused.
    pub hellos_received: Family<ReasonLabels, Counter>,
    /// Frames of the election sent.
    pub frames_sent: Counter,
    /// Frames of the election refused, in all.
    pub frames_refused: Gauge,
    /// What gossip dropped, in all.
    pub gossip_dropped: Family<ReasonLabels, Gauge>,
    /// Address conflicts seen.
    pub conflicts: Counter,
    /// Status writes by outcome.
    pub status_writes: Family<ReasonLabels, Counter>,
    /// Status writes that wait.
    pub status_pending: Gauge,
}

fn seconds() -> Histogram {
    Histogram::new([
        0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0,
    ])
}

impl Metrics {
    /// Registers all of them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            leads: Family::default(),
            led_groups: Gauge::default(),
            groups: Gauge::default(),
            leaderless_groups: Gauge::default(),
            egress_disarmed: Gauge::default(),
            egress_policies_settled: Gauge::default(),
            egress_policies_waiting: Gauge::default(),
            transitions: Family::default(),
            detection: seconds(),
            takeover: seconds(),
            peers: Family::default(),
            heard: Family::default(),
            keys: Family::default(),
            key_errors: Counter::default(),
            hellos_sent: Counter::default(),
            hellos_received: Family::default(),
            frames_sent: Counter::default(),
            frames_refused: Gauge::default(),
            gossip_dropped: Family::default(),
            conflicts: Counter::default(),
            status_writes: Family::default(),
            status_pending: Gauge::default(),
        };
        macro_rules! register {
            ($($name:literal, $field:ident, $help:literal;)+) => {
                $(registry.register($name, $help, metrics.$field.clone());)+
            };
        }
        register! {
            "leader", leads, "1 for each VIP that this node leads, by the interface it is announced on";
            "led_groups", led_groups, "Groups of VIPs that this node leads";
            "groups", groups, "Groups of VIPs that exist";
            "leaderless_groups", leaderless_groups, "Groups of VIPs that nobody leads, as this node sees it";
            "egress_disarmed", egress_disarmed, "Whether somebody has disarmed egress policies on this node (1): its pods leave as if there were none";
            "egress_policies_settled", egress_policies_settled, "Egress policies of which this node says that it can be the gateway: its rules and programs go by them";
            "egress_policies_waiting", egress_policies_waiting, "Egress policies whose gateway has not said so yet, as this node sees it: it drops their pods' packets";
            "transitions", transitions, "Leaderships that this node took, gave up, or announced anew after a contest";
            "detection_seconds", detection, "Seconds from a peer's last hello to the verdict that it is heard no more, of peers that did not leave";
            "takeover_seconds", takeover, "Seconds that a group had no leader before this node took it";
            "peers", peers, "Other speakers: alive, heard on the LAN, known to the gossip, all that are known";
            "peer_heard", heard, "Interfaces of this node on which the peer's hellos are heard";
            "gossip_key", keys, "1 for each gossip key in force, by a digest of it";
            "gossip_key_errors", key_errors, "Times the key file could not be read; the old keys stay in force";
            "hellos_sent", hellos_sent, "Hello frames sent";
            "hellos_received", hellos_received, "Hello frames received: accepted, or why not";
            "election_frames_sent", frames_sent, "Frames of the election handed to the gossip";
            "election_frames_refused", frames_refused, "Frames of the election refused as malformed or of another version, since the start";
            "gossip_dropped", gossip_dropped, "What the gossip lost since the start: events, frames, calls to absent speakers";
            "address_conflicts", conflicts, "Times another station was seen to answer for a VIP";
            "status_writes", status_writes, "Writes of VirtualIP statuses and Events, by outcome";
            "status_pending", status_pending, "VirtualIP statuses and Events that wait to be written";
        }
        metrics
    }

    /// Copies the gossip's counters.
    pub fn take_gossip(&self, counters: &Counters) {
        for (reason, value) in [
            ("event", &counters.dropped_events),
            ("frame", &counters.dropped_frames),
            ("join", &counters.failed_joins),
        ] {
            let value = value.load(Ordering::Relaxed);
            self.gossip_dropped
                .get_or_create(&reason_labels(reason))
                .set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }
}

/// A label set of one word.
pub fn reason_labels(reason: &str) -> ReasonLabels {
    ReasonLabels {
        reason: reason.into(),
    }
}
