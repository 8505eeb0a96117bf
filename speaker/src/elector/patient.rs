//! What a doctor is told of this node.

use landfall_core::model::NodeName;

use super::Speaker;
use crate::doctor::{Patient, Uplink};

impl Speaker {
    /// What is known of this node, for who looks why something does not work there.
    pub(crate) fn patient(&self) -> Patient {
        let attachments = self.parts.datapath.attachments();
        let interfaces = self.interfaces().iter();
        let uplinks = interfaces.filter(|interface| self.uplinks.contains(&interface.index));
        let nodes: Vec<&NodeName> = if self.identity.manifests {
            self.election.known().collect()
        } else {
            self.index.nodes().keys().collect()
        };
        let named = |(index, reason): (u32, String)| {
            let mut all = self.interfaces().iter();
            let name = all.find(|interface| interface.index == index);
            let name = name.map_or_else(|| index.to_string(), |it| it.name.to_string());
            (name, reason)
        };
        let unheard = nodes.iter().filter(|node| !self.election.is_alive(node));
        Patient {
            node: self.identity.node.to_string(),
            uplinks: uplinks
                .map(|interface| Uplink {
                    name: interface.name.to_string(),
                    filters: !interface.default_route.0
                        && interface.addresses.iter().any(|net| net.addr().is_ipv4()),
                    attachment: attachments.get(&interface.index).cloned(),
                })
                .collect(),
            delivery: self.identity.delivery,
            egress_mark: self.identity.egress_mark,
            disarmed: self.is_disarmed(),
            unguarded: self
                .parts
                .datapath
                .unguarded()
                .into_iter()
                .map(named)
                .collect(),
            cilium: self.identity.cilium.clone(),
            gateway: self.parts.datapath.gateway(),
            unheard: unheard.map(ToString::to_string).collect(),
            nodes: nodes.len(),
            hears_most: self.hears_most(),
            is_far: self.is_far(),
        }
    }
}
