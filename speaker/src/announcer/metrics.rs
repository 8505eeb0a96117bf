//! What the announcer tells Prometheus.

use std::net::IpAddr;

use landfall_core::ip::Family as IpFamily;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// `IPv4` counts ARP, `IPv6` counts ND.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct FamilyLabel {
    pub(super) family: &'static str,
}

impl FamilyLabel {
    pub(super) fn of(address: IpAddr) -> Self {
        Self {
            family: match IpFamily::of(address) {
                IpFamily::V4 => "IPv4",
                IpFamily::V6 => "IPv6",
            },
        }
    }
}

/// What a call to the system was about when it failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OperationLabel {
    pub(super) operation: &'static str,
}

/// The announcer's metrics.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    pub(super) announced: Gauge,
    pub(super) announcements: Family<FamilyLabel, Counter>,
    pub(super) delayed: Counter,
    pub(super) asked: Family<FamilyLabel, Counter>,
    pub(super) answered: Family<FamilyLabel, Counter>,
    pub(super) probes: Family<FamilyLabel, Counter>,
    pub(super) conflicts: Family<FamilyLabel, Counter>,
    pub(super) resyncs: Counter,
    pub(super) socket_errors: Family<OperationLabel, Counter>,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "announcer_vips",
            "VIPs this node answers for on ARP or ND, in addresses",
            metrics.announced.clone(),
        );
        registry.register(
            "announcer_gratuitous",
            "Gratuitous ARP frames and unsolicited neighbour advertisements sent, by address family, in frames",
            metrics.announcements.clone(),
        );
        registry.register(
            "announcer_delayed",
            "Announcements that waited for the frame rate limit, in announcements",
            metrics.delayed.clone(),
        );
        registry.register(
            "announcer_asked",
            "ARP requests and neighbour solicitations received for announced VIPs, by address family, in frames",
            metrics.asked.clone(),
        );
        registry.register(
            "announcer_answered",
            "ARP replies and solicited neighbour advertisements sent, by address family, in frames",
            metrics.answered.clone(),
        );
        registry.register(
            "announcer_probes",
            "Probes sent before a VIP's first announcement, by address family, in frames",
            metrics.probes.clone(),
        );
        registry.register(
            "announcer_conflicts",
            "Frames in which another station claimed an announced VIP, by address family, in frames",
            metrics.conflicts.clone(),
        );
        registry.register(
            "announcer_netlink_resyncs",
            "Times the interfaces were read anew since netlink lost events, in times",
            metrics.resyncs.clone(),
        );
        registry.register(
            "announcer_socket_errors",
            "Failed calls on packet, multicast and netlink sockets, by operation, in calls",
            metrics.socket_errors.clone(),
        );
        metrics
    }

    pub(super) fn failed(&self, operation: &'static str) {
        self.socket_errors
            .get_or_create(&OperationLabel { operation })
            .inc();
    }
}
