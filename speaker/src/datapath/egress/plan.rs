//! What a gateway's maps are to hold, by name: a function of what is wanted and of where this node is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use landfall_core::model::NodeName;
use landfall_ebpf_common::egress::pace::Pace;

use crate::egress::{Egress, Pod, Policy, PolicyName};

/// Where this node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surroundings {
    /// Its name.
    pub node: NodeName,
    /// Its interfaces to segments and to the tunnel, by index.
    pub uplinks: BTreeMap<u32, Uplink>,
    /// The one of them that is the tunnel to nodes that are on none of the segments.
    pub tunnel: Option<u32>,
    /// The other nodes, as they are seen there.
    pub peers: BTreeMap<PeerId, Peer>,
}

impl Surroundings {
    /// Of a node of which nothing is known.
    pub fn nowhere() -> Self {
        Self {
            node: "".into(),
            uplinks: BTreeMap::new(),
            tunnel: None,
            peers: BTreeMap::new(),
        }
    }

    /// By which interface a node is reached of which a policy's packets leave by this one: that, or, if it is not heard
    /// there, the tunnel.
    fn nearest(&self, node: &NodeName, interface: u32) -> PeerId {
        let at = |interface| PeerId {
            node: node.clone(),
            interface,
        };
        let near = at(interface);
        let far = self.tunnel.map(at);
        match far.filter(|far| self.peers.contains_key(far)) {
            Some(far) if !self.peers.contains_key(&near) => far,
            _ => near,
        }
    }
}

/// An interface of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// The longest IP packet it takes, in bytes.
    pub mtu: u32,
    /// Its own addresses: the first of a family signs what is said to pods.
    pub addresses: BTreeSet<IpAddr>,
    /// The networks that are on its segment.
    pub connected: BTreeSet<IpNet>,
    /// The router for IPv4.
    pub router_v4: Option<Ipv4Addr>,
    /// The router for IPv6.
    pub router_v6: Option<Ipv6Addr>,
}

/// Names another node at one of this node's interfaces. In a plan that is the one that policies' packets leave by: however
/// the node is reached just now, flows that have begun otherwise go on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerId {
    /// Its name.
    pub node: NodeName,
    /// The index of this node's interface.
    pub interface: u32,
}

/// Another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Where it is reached by the tunnel, if the interface is that.
    pub address: Option<IpAddr>,
}

/// What the maps are to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Plan {
    pub(super) policies: BTreeMap<PolicyName, PolicyPlan>,
    /// The policies whose gateway is another node, or that have none: what of their flows is known here is not
    /// translated.
    pub(super) elsewhere: BTreeSet<PolicyName>,
    pub(super) sources: BTreeMap<IpAddr, SourcePlan>,
    /// Which pods the addresses are of, tenants' or not: flows of another pod that had one are not its own.
    pub(super) owners: BTreeMap<IpAddr, u64>,
    pub(super) egress: BTreeSet<IpAddr>,
    /// The policies that this node is gateway or standby of, by their addresses.
    pub(super) of: BTreeMap<IpAddr, PolicyName>,
    pub(super) nodes: BTreeMap<PeerId, NodePlan>,
    pub(super) hops: BTreeMap<HopId, HopPlan>,
    /// By uplink and network; nothing for what is the cluster's own.
    pub(super) routes: BTreeMap<(u32, IpNet), Option<HopId>>,
    /// The interfaces that carry the programs.
    pub(super) interfaces: BTreeSet<u32>,
}

/// A policy whose gateway is here, or would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PolicyPlan {
    /// 0, if this node would only take over.
    pub(super) uplink: u32,
    pub(super) ports: u32,
    pub(super) ports_per_pod: u32,
    pub(super) pace: Pace,
    /// The uplink, also of one that would take over.
    pub(super) link: u32,
    /// It is for VIPs of this cluster too.
    pub(super) hairpin: bool,
}

impl PolicyPlan {
    fn of(policy: &Policy, uplink: u32, link: u32) -> Self {
        Self {
            uplink,
            ports: policy.ports.unwrap_or(0),
            ports_per_pod: policy.ports_per_pod.unwrap_or(0),
            pace: policy.bandwidth.map_or(Pace::default(), |bandwidth| {
                Pace::new(bandwidth.rate, bandwidth.burst())
            }),
            link,
            hairpin: policy.hairpin,
        }
    }
}

/// A pod's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SourcePlan {
    /// The policy and the address that it leaves by, if this node is its gateway.
    pub(super) here: Option<(PolicyName, IpAddr)>,
    /// The same, if this node would take over.
    pub(super) standby: Option<(PolicyName, IpAddr)>,
    /// Its node, if that is another.
    pub(super) node: Option<PeerId>,
    /// Its gateway, if that is another.
    pub(super) gateway: Option<PeerId>,
    /// No flow of it can have begun by another address.
    pub(super) resumes: bool,
}

/// Another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodePlan {
    /// The interface by which it is reached.
    pub(super) interface: u32,
    /// Nothing, if it is not heard there: nothing that claims to come from it is taken.
    pub(super) mac: Option<[u8; 6]>,
    pub(super) address: Option<IpAddr>,
    pub(super) own: [u8; 6],
    pub(super) mtu: u32,
    /// It is a gateway of pods here.
    pub(super) is_gateway: bool,
}

/// Names a next hop: by this interface, to remotes on its segment or to its router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct HopId {
    pub(super) interface: u32,
    pub(super) routed: bool,
}

/// A next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HopPlan {
    pub(super) mtu: u32,
    pub(super) own_v4: Option<Ipv4Addr>,
    pub(super) own_v6: Option<Ipv6Addr>,
    pub(super) via_v4: Option<Ipv4Addr>,
    pub(super) via_v6: Option<Ipv6Addr>,
    pub(super) mac: [u8; 6],
}

/// What the maps of this node are to hold. Of the pods that leave by these addresses all is known here, so that copies of
/// their bindings can be kept.
pub(in super::super) fn plan(
    egress: &Egress,
    around: &Surroundings,
    addresses: &BTreeSet<IpAddr>,
) -> Plan {
    let mut plan = Plan::default();
    if egress.policies.is_empty() {
        return plan;
    }
    plan.interfaces = around.uplinks.keys().copied().collect();
    for (name, policy) in &egress.policies {
        let gateway = policy.gateway.as_ref();
        let is_here = gateway.is_some_and(|gateway| gateway.node == around.node);
        if !is_here {
            plan.elsewhere.insert(name.clone());
        }
        let is_ours = is_here || !policy.addresses.is_disjoint(addresses);
        let Some(gateway) = gateway.filter(|_| is_ours) else {
            continue;
        };
        let link = gateway.interface;
        let uplink = if is_here { link } else { 0 };
        let planned = PolicyPlan::of(policy, uplink, link);
        plan.policies.insert(name.clone(), planned);
        plan.network(link, egress, around);
        let of = policy.addresses.iter();
        plan.of.extend(of.map(|address| (*address, name.clone())));
    }
    for (address, pod) in &egress.pods {
        plan.owners.insert(*address, pod.identity);
        plan.pod(*address, pod, egress, around, addresses);
    }
    plan
}

impl Plan {
    /// Whether it says whose addresses are: without a policy nothing is known of pods.
    pub(super) fn knows_pods(&self) -> bool {
        !(self.policies.is_empty() && self.elsewhere.is_empty())
    }

    /// The ways out by an uplink.
    fn network(&mut self, interface: u32, egress: &Egress, around: &Surroundings) {
        let Some(uplink) = around.uplinks.get(&interface) else {
            return;
        };
        let of = |routed| HopId { interface, routed };
        let hop = HopPlan {
            mtu: uplink.mtu,
            own_v4: uplink.addresses.iter().find_map(|address| match address {
                IpAddr::V4(address) => Some(*address),
                IpAddr::V6(_) => None,
            }),
            // One that routers on the way know, if there is one.
            own_v6: {
                let mut own: Vec<Ipv6Addr> = uplink
                    .addresses
                    .iter()
                    .filter_map(|address| match address {
                        IpAddr::V4(_) => None,
                        IpAddr::V6(address) => Some(*address),
                    })
                    .collect();
                own.sort_by_key(Ipv6Addr::is_unicast_link_local);
                own.first().copied()
            },
            via_v4: None,
            via_v6: None,
            mac: uplink.mac,
        };
        self.hops.insert(of(false), hop);
        for network in &uplink.connected {
            self.routes
                .insert((interface, network.trunc()), Some(of(false)));
        }
        let routers = [
            uplink.router_v4.map(IpAddr::V4),
            uplink.router_v6.map(IpAddr::V6),
        ];
        for router in routers.into_iter().flatten() {
            let all = if router.is_ipv4() {
                IpNet::new(Ipv4Addr::UNSPECIFIED.into(), 0)
            } else {
                IpNet::new(Ipv6Addr::UNSPECIFIED.into(), 0)
            };
            let all = all.expect("a prefix of no length");
            self.routes.insert((interface, all), Some(of(true)));
            let routed = HopPlan {
                via_v4: uplink.router_v4,
                via_v6: uplink.router_v6,
                ..hop
            };
            self.hops.insert(of(true), routed);
        }
        for network in &egress.inside {
            self.routes.insert((interface, network.trunc()), None);
        }
    }

    fn pod(
        &mut self,
        address: IpAddr,
        pod: &Pod,
        egress: &Egress,
        around: &Surroundings,
        addresses: &BTreeSet<IpAddr>,
    ) {
        let gateway_of = |policy: &PolicyName| egress.policies.get(policy)?.gateway.as_ref();
        let drains = |policy| {
            let policy: Option<&Policy> = egress.policies.get(policy);
            policy.is_some_and(|policy| policy.drains)
        };
        let is_local = pod.node == around.node;
        let found = pod.tenant.as_ref();
        let found = found.and_then(|tenant| Some((tenant, gateway_of(&tenant.policy)?)));
        let Some((tenant, gateway)) = found else {
            // Of its flows from before there may be some here, or copies.
            let ours = self.policies.values().map(|policy| policy.link).min();
            let former = pod.former.as_ref().and_then(gateway_of);
            let former = former.map(|gateway| gateway.interface);
            if let Some(interface) = former.or(ours).filter(|_| !self.of.is_empty()) {
                self.plain(address, pod, interface, around);
            }
            return;
        };
        if gateway.node == around.node {
            let Some(egress_ip) = tenant.egress_ip else {
                return;
            };
            let node = (!is_local).then(|| self.way_to(&pod.node, gateway.interface, around));
            self.egress.insert(egress_ip);
            self.sources.insert(
                address,
                SourcePlan {
                    here: Some((tenant.policy.clone(), egress_ip)),
                    standby: None,
                    node,
                    gateway: None,
                    resumes: pod.former.is_none() && !drains(&tenant.policy),
                },
            );
            return;
        }
        let standby = tenant.egress_ip.filter(|egress| addresses.contains(egress));
        if !is_local && standby.is_none() {
            if !self.of.is_empty() {
                self.plain(address, pod, gateway.interface, around);
            }
            return;
        }
        let leads = is_local.then(|| {
            let id = self.way_to(&gateway.node, gateway.interface, around);
            if let Some(node) = self.nodes.get_mut(&id) {
                // Of the tunnel's packets their way back is not asked.
                node.is_gateway = node.interface == gateway.interface;
            }
            id
        });
        let node = (!is_local).then(|| self.way_to(&pod.node, gateway.interface, around));
        self.sources.insert(
            address,
            SourcePlan {
                here: None,
                standby: standby.map(|egress| (tenant.policy.clone(), egress)),
                node,
                gateway: leads,
                resumes: false,
            },
        );
    }

    /// A pod of which nothing is to be known here but where it is.
    fn plain(&mut self, address: IpAddr, pod: &Pod, interface: u32, around: &Surroundings) {
        let is_local = pod.node == around.node;
        let node = (!is_local).then(|| self.way_to(&pod.node, interface, around));
        let source = SourcePlan {
            here: None,
            standby: None,
            node,
            gateway: None,
            resumes: false,
        };
        self.sources.insert(address, source);
    }

    /// Another node, of which policies' packets leave by this interface.
    fn way_to(&mut self, node: &NodeName, interface: u32, around: &Surroundings) -> PeerId {
        let id = PeerId {
            node: node.clone(),
            interface,
        };
        let at = around.nearest(node, interface);
        if let Some(uplink) = around.uplinks.get(&at.interface) {
            let peer = around.peers.get(&at);
            self.nodes.entry(id.clone()).or_insert(NodePlan {
                interface: at.interface,
                mac: peer.map(|peer| peer.mac),
                address: peer.and_then(|peer| peer.address),
                own: uplink.mac,
                mtu: uplink.mtu,
                is_gateway: false,
            });
        }
        id
    }
}

#[cfg(test)]
mod tests;
