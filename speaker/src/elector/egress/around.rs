//! Where this node is, as a gateway sees it: its ways out, and how the other nodes are reached.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use landfall_core::model::NodeName;
use landfall_core::steering::seed;
use landfall_ebpf_common::tunnel_mac;

use super::super::Speaker;
use crate::announcer::Interface;
use crate::datapath::egress::{Peer, PeerId, Surroundings, Uplink};

/// The longest packet that the tunnel takes: what is longer than the way is fragmented outside.
const TUNNEL_MTU: u32 = 65_000;

impl Speaker {
    /// The surroundings of a node that has these interfaces (by index) to segments with VIPs.
    pub(super) fn surroundings(&self, uplinks: &BTreeSet<u32>) -> Surroundings {
        let tunnel = self.tunnel();
        let known = self.interfaces().iter();
        let mut ways: BTreeMap<u32, Uplink> = known
            .filter(|interface| uplinks.contains(&interface.index))
            .map(|interface| (interface.index, self.way(interface)))
            .collect();
        // Who has lost its place on the segment is reached by the tunnel.
        let near = self.macs.iter().filter(|(id, _)| !self.says_down(id));
        let peers = near.map(|(id, mac)| {
            let peer = Peer {
                mac: mac.0,
                address: None,
            };
            (at(&id.name, id.interface), peer)
        });
        let mut peers: BTreeMap<PeerId, Peer> = peers.collect();
        if let Some(index) = tunnel {
            let mac = tunnel_mac(seed(&self.identity.node));
            let way = Uplink {
                mac,
                mtu: TUNNEL_MTU,
                addresses: BTreeSet::new(),
                connected: BTreeSet::new(),
                router_v4: None,
                router_v6: None,
            };
            ways.insert(index, way);
            let others = self.election.known();
            peers.extend(others.filter_map(|name| {
                let peer = Peer {
                    mac: tunnel_mac(seed(name)),
                    address: Some(*self.addresses_of(name).first()?),
                };
                Some((at(name, index), peer))
            }));
        }
        Surroundings {
            node: self.identity.node.clone(),
            uplinks: ways,
            tunnel,
            peers,
        }
    }

    /// An uplink as the kernel has it, but for routers that the user has named.
    fn way(&self, interface: &Interface) -> Uplink {
        let (mut router_v4, mut router_v6) = interface.routers;
        for (name, router) in &self.identity.routers {
            if *name == *interface.name {
                match router {
                    IpAddr::V4(router) => router_v4 = Some(*router),
                    IpAddr::V6(router) => router_v6 = Some(*router),
                }
            }
        }
        Uplink {
            mac: interface.mac.0,
            mtu: interface.mtu,
            addresses: interface.addresses.iter().map(IpNet::addr).collect(),
            connected: interface.addresses.iter().map(IpNet::trunc).collect(),
            router_v4,
            router_v6,
        }
    }
}

fn at(node: &NodeName, interface: u32) -> PeerId {
    PeerId {
        node: node.clone(),
        interface,
    }
}
