//! The tunnel to nodes that are not on a VIP's segment: who is behind it, and how they are reached.
//!
//! It is there once a living node with endpoints is not on the segment of a VIP, and then stays. Such a node is taken for
//! there as long as the gossip says so: no echo is asked through a tunnel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use landfall_core::groups::Group;
use landfall_core::ip::Family;
use landfall_core::model::NodeName;
use landfall_core::steering::seed;
use landfall_ebpf_common::tunnel_mac;

use super::Speaker;
use crate::announcer::MacAddr;
use crate::datapath::{NodeId, NodeState, Reach};
use crate::node_rules::{TUNNEL, Tunnel};

impl Speaker {
    /// The index of the tunnel's interface.
    pub(super) fn tunnel(&self) -> Option<u32> {
        let interface = self.interface(TUNNEL)?;
        interface.up.then_some(interface.index)
    }

    /// Sees whether a group needs a tunnel: a living node that has endpoints, or this one, is not on the segment.
    pub(super) fn check_tunnel(&mut self, group: &Group) {
        if self.needs_tunnel || !self.is_ready() {
            return;
        }
        let me = &self.identity.node;
        let mut nodes: BTreeSet<NodeName> = group
            .services
            .iter()
            .flat_map(|service| &service.endpoint_nodes)
            .filter(|name| self.election.is_alive(name))
            .cloned()
            .collect();
        if !nodes.is_empty() {
            nodes.insert(me.clone());
        }
        if self.election.any_off_segment(group, &nodes) {
            tracing::info!(group = %group.id, "a node is not on the segment: it is reached by the tunnel {TUNNEL}");
            self.needs_tunnel = true;
        }
    }

    /// What the node's rules should make of it.
    pub(super) fn tunnel_rules(&self) -> Option<Arc<Tunnel>> {
        self.needs_tunnel.then(|| {
            let me = &self.identity.node;
            let others = self.election.known().filter(|name| *name != me);
            Arc::new(Tunnel {
                mac: MacAddr(tunnel_mac(seed(me))),
                peers: others.flat_map(|name| self.addresses_of(name)).collect(),
            })
        })
    }

    pub(super) fn addresses_of(&self, name: &NodeName) -> Vec<IpAddr> {
        let node = self.index.nodes().get(name);
        let of_object = node.into_iter().flat_map(|node| &node.addresses);
        let register = self.election.register(name);
        let of_register = register
            .into_iter()
            .flat_map(|register| &register.interfaces)
            .filter(|interface| interface.up)
            .flat_map(|interface| &interface.addresses);
        of_object.chain(of_register).copied().collect()
    }

    /// By which interfaces a VIP's nodes are reached, with those on its segment.
    pub(super) fn reach(&self, uplink: u32, near: Option<&BTreeSet<NodeName>>) -> Reach {
        let far = near.map(|near| {
            let known = self.election.known();
            known
                .filter(|name| !near.contains(*name))
                .cloned()
                .collect()
        });
        Reach {
            uplink,
            tunnel: self.tunnel().unwrap_or_default(),
            far: Arc::new(far.unwrap_or_default()),
        }
    }

    /// Whether a node that is not on the segment has a way for answers to any client, as far as can be known: a default
    /// route. Where that leads to is not told, nor which other routes there are.
    pub(super) fn has_way_out(&self, name: &NodeName, family: Family) -> bool {
        let register = self.election.register(name);
        register.is_some_and(|register| {
            register.interfaces.iter().any(|interface| {
                let (v4, v6) = interface.default_route;
                interface.up
                    && match family {
                        Family::V4 => v4,
                        Family::V6 => v6,
                    }
            })
        })
    }

    /// The nodes as they are reached by the tunnel.
    pub(super) fn tunnel_states(&self, states: &mut BTreeMap<NodeId, NodeState>) {
        let Some(interface) = self.tunnel() else {
            return;
        };
        for name in self.election.known() {
            let Some(register) = self.election.register(name) else {
                continue;
            };
            let id = NodeId {
                name: name.clone(),
                interface,
            };
            let state = NodeState {
                here: *name == self.identity.node,
                alive: self.is_there(name, interface),
                suspected: false,
                steers: register.capabilities.steers,
                mac: Some(tunnel_mac(seed(name))),
                address: self.addresses_of(name).first().copied(),
                routed: BTreeSet::new(),
            };
            states.insert(id, state);
        }
    }
}
