//! The seam to this node's packet filter and routing rules.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use landfall_core::model::Protocol;

/// What this node's nftables table `landfall` and routing rules should say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// All VIPs of the cluster: what still carries one as destination in the forward hook is dropped.
    pub vips: BTreeSet<IpAddr>,
    /// The uplink (by name) of each VIP on this node: answers leave by it even when the route to the client does not.
    pub uplinks: BTreeMap<IpAddr, String>,
    /// Services whose endpoints are processes of nodes, delivered by Landfall itself.
    pub host_services: BTreeMap<HostService, HostTargets>,
}

/// A port of a VIP that is delivered to processes of nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostService {
    /// The VIP.
    pub vip: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The port on the VIP.
    pub port: u16,
}

/// Where a [`HostService`] is delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostTargets {
    /// This node's own endpoint, preferred while there is one.
    pub local: Option<SocketAddr>,
    /// Endpoints of other nodes, used when there is no local one (masqueraded for forwarded clients).
    pub remote: Vec<SocketAddr>,
}

/// Makes [`Rules`] so.
pub trait NodeRules: Send + Sync {
    /// Replaces what this node's rules should say. Returns at once; failures are retried and shown in metrics.
    fn apply(&self, rules: Rules);
    /// Whether kube-proxy on this node has rules for this Service port already (the element of its nftables map);
    /// `None` when no kube-proxy table in nftables mode can be read here.
    fn kube_proxy_serves(&self, vip: IpAddr, protocol: Protocol, port: u16) -> Option<bool>;
}
