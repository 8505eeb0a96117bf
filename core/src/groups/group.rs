//! What is told of a group: its addresses, its Services, the policies whose pods leave by it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use xxhash_rust::xxh64::Xxh64;

use super::{FamilyPort, GroupId, Placement};
use crate::model::{NodeName, ObjectKey, Protocol, ServicePort};
use crate::steering::Distribution;

/// An address of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupVip {
    /// The address.
    pub address: IpAddr,
    /// Where it may be announced.
    pub placement: Arc<Placement>,
    /// The leader that its `VirtualIP` reports; somebody announced it before.
    pub reported_leader: Option<NodeName>,
    /// Nothing begins there any more: flows of egress policies go on to their end, and nothing else needs it.
    pub drains: bool,
}

/// A Service of a group, as far as announcing goes.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupService {
    /// Its name.
    pub key: ObjectKey,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// With `externalTrafficPolicy: Local`: the nodes with a servable endpoint.
    pub local_nodes: Option<BTreeSet<NodeName>>,
    /// `spec.healthCheckNodePort`, 0 when there is none.
    pub health_check_node_port: u16,
    /// Nodes with servable endpoints, whatever the policy.
    pub endpoint_nodes: BTreeSet<NodeName>,
    /// The ports that have a servable endpoint, wherever it is, by family. Others are refused.
    pub served: BTreeSet<FamilyPort>,
    /// How each port's new flows are to be spread, by family.
    pub spreads: BTreeMap<FamilyPort, Spread>,
    /// All flows of a client go to one node.
    pub affinity: bool,
    /// UDP flows are told apart by their ports too.
    pub udp_ports: bool,
    /// The servable endpoints of each port, by family; empty where kube-proxy delivers to them.
    pub endpoints: BTreeMap<FamilyPort, BTreeSet<PodEndpoint>>,
    /// The networks whose clients are served; nothing, if all are.
    pub source_ranges: Option<BTreeSet<IpNet>>,
    /// Endpoints that are processes of nodes, by port; empty when any endpoint is a pod.
    pub host_endpoints: BTreeMap<(Protocol, u16), BTreeMap<NodeName, BTreeSet<SocketAddr>>>,
}

/// An endpoint that can be sent flows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodEndpoint {
    /// Its address and port.
    pub address: SocketAddr,
    /// Its node.
    pub node: NodeName,
    /// It takes new flows; else it still serves while it terminates.
    pub ready: bool,
}

impl GroupService {
    /// The endpoints of a port to send new flows to, of those on a node or of all: the ready ones, or, where nobody is,
    /// those that still serve while they terminate.
    pub fn targets(&self, port: FamilyPort, node: Option<&NodeName>) -> BTreeSet<SocketAddr> {
        let endpoints = self.endpoints.get(&port).into_iter().flatten();
        let (ready, draining): (Vec<&PodEndpoint>, Vec<&PodEndpoint>) = endpoints
            .filter(|endpoint| node.is_none_or(|node| endpoint.node == *node))
            .partition(|endpoint| endpoint.ready);
        let chosen = if ready.is_empty() { draining } else { ready };
        chosen.iter().map(|endpoint| endpoint.address).collect()
    }
}

/// The nodes that new flows of a port are to be spread over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// Those with ready endpoints.
    pub ready: Distribution,
    /// Those whose endpoints still serve while they terminate. They are for as long as no node with a ready one can be
    /// sent anything: its rules come later than the slice that names it.
    pub draining: Distribution,
}

impl Spread {
    /// Whether a node has endpoints, ready or draining.
    pub fn names(&self, node: &NodeName) -> bool {
        self.ready.contains_key(node) || self.draining.contains_key(node)
    }

    /// The spread over those of the nodes that can be sent something: over those that are near, if any of them can.
    pub fn over(
        &self,
        serves: impl Fn(&NodeName) -> bool,
        near: impl Fn(&NodeName) -> bool,
    ) -> Distribution {
        let of = |nodes: &Distribution| -> Distribution {
            let serving = nodes.iter().filter(|(node, _)| serves(node));
            let (here, there): (Distribution, Distribution) = serving
                .map(|(node, weight)| (node.clone(), *weight))
                .partition(|(node, _)| near(node));
            if here.is_empty() { there } else { here }
        };
        let ready = of(&self.ready);
        if ready.is_empty() {
            of(&self.draining)
        } else {
            ready
        }
    }
}

/// Addresses that move together.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Its identity.
    pub id: GroupId,
    /// Its addresses, sorted.
    pub vips: Vec<GroupVip>,
    /// The Services that hold them, sorted.
    pub services: Vec<GroupService>,
    /// The egress policies whose pods leave by them.
    pub egress: BTreeSet<Arc<str>>,
    /// A digest of every input of the election that comes from the sources: nodes with equal inputs have equal digests.
    pub digest: u64,
}

impl Group {
    /// Whether a better node takes the group back when it returns. Never where pods leave by it: each move of a gateway
    /// puts their flows at risk.
    pub fn failback(&self) -> bool {
        self.egress.is_empty() && self.vips.iter().any(|vip| vip.placement.failback)
    }

    /// Whether an overloaded leader may give the group away; never where pods leave by it.
    pub fn rebalance(&self) -> bool {
        self.egress.is_empty() && self.vips.iter().all(|vip| vip.placement.rebalance)
    }

    /// Whether packets to its addresses may be steered.
    pub fn steers(&self) -> bool {
        self.vips.iter().all(|vip| vip.placement.steering)
    }

    /// The weight of a node that is admitted: 1 and its preferences.
    pub fn weight(&self, node: &NodeName) -> u32 {
        self.vips
            .iter()
            .filter_map(|vip| vip.placement.admission(node).ok())
            .map(|admission| admission.weight)
            .max()
            .unwrap_or(1)
    }
}

/// Digest of a group's inputs, by xxh64 with seed 0. What is fed to it, and in which order, is part of the protocol.
pub(super) fn digest(
    id: &GroupId,
    vips: &[GroupVip],
    services: &[GroupService],
    egress: &BTreeSet<Arc<str>>,
) -> u64 {
    let mut hash = Xxh64::new(0);
    let mut text = |value: &str| {
        hash.update(value.as_bytes());
        hash.update(&[0]);
    };
    text(id);
    for vip in vips {
        text(&vip.address.to_string());
        text(&format!("{:x}", vip.placement.digest));
        if vip.drains {
            text("drains");
        }
    }
    for service in services {
        text(&service.key.to_string());
        for node in service.local_nodes.iter().flatten() {
            text(&node.0);
        }
        for ((family, protocol, port), spread) in &service.spreads {
            text(&format!("{family}/{protocol}/{port}"));
            for (node, weight) in &spread.ready {
                text(&format!("{node}={weight}"));
            }
            for (node, weight) in &spread.draining {
                text(&format!("{node}~{weight}"));
            }
        }
        text(if service.affinity { "a" } else { "" });
        text(if service.udp_ports { "p" } else { "" });
        text("/");
    }
    for policy in egress {
        text(&format!("egress {policy}"));
    }
    hash.digest()
}
