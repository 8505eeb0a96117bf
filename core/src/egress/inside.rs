//! The networks that are the cluster's own: what pods send there is nobody's egress.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::model::{Event, NodeName, Object, ObjectId, ObjectKey};

/// Networks that are never outside: link-local, multicast, this host, broadcast (RFC 6890).
fn reserved() -> impl Iterator<Item = IpNet> {
    let v4 = |address: [u8; 4], prefix| {
        let network = Ipv4Net::new(Ipv4Addr::from(address), prefix);
        IpNet::V4(network.expect("the prefixes are short enough"))
    };
    let v6 = |first: u16, prefix| {
        let network = Ipv6Net::new(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), prefix);
        IpNet::V6(network.expect("the prefixes are short enough"))
    };
    [
        v4([127, 0, 0, 0], 8),
        v4([169, 254, 0, 0], 16),
        v4([224, 0, 0, 0], 4),
        v4([255, 255, 255, 255], 32),
        v6(0xfe80, 10),
        v6(0xff00, 8),
    ]
    .into_iter()
}

/// What an address of the cluster's own is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A node's, as the node says itself.
    Node(NodeName),
    /// Where the API server is reached.
    ApiServer,
    /// Of a network of Services' cluster addresses.
    Service(IpNet),
    /// Of another network.
    Network(IpNet),
}

/// The networks that are the cluster's own, but for VIPs and pods, by who tells of them.
#[derive(Clone, Debug, Default)]
pub struct Networks {
    /// Of nodes by the API: their addresses and pod CIDRs.
    nodes: BTreeMap<NodeName, BTreeSet<IpNet>>,
    /// The addresses of nodes' interfaces, as their speakers say.
    told: BTreeMap<NodeName, BTreeSet<IpAddr>>,
    services: BTreeMap<Arc<str>, BTreeSet<IpNet>>,
    /// The endpoints of Service `default/kubernetes`, by slice.
    api_server: BTreeMap<ObjectKey, BTreeSet<IpAddr>>,
}

/// Puts a value in its place; whether that changes anything.
fn put<K: Ord, T: PartialEq>(of: &mut BTreeMap<K, T>, key: K, value: Option<T>) -> bool {
    match value {
        Some(value) if of.get(&key) == Some(&value) => false,
        Some(value) => {
            of.insert(key, value);
            true
        }
        None => of.remove(&key).is_some(),
    }
}

impl Networks {
    /// Takes an event in; whether it changes them.
    pub fn apply(&mut self, event: &Event) -> bool {
        match event {
            Event::Apply(Object::Node(node)) => {
                let addresses = node.addresses.iter().copied().map(IpNet::from);
                let all = node.pod_cidrs.iter().map(IpNet::trunc).chain(addresses);
                put(&mut self.nodes, node.name.clone(), Some(all.collect()))
            }
            Event::Apply(Object::ServiceCidr(cidr)) => {
                let all = cidr.cidrs.iter().map(IpNet::trunc).collect();
                put(&mut self.services, cidr.name.clone(), Some(all))
            }
            Event::Apply(Object::EndpointSlice(slice)) => {
                let its = &slice.service;
                let is = &*its.namespace == "default" && &*its.name == "kubernetes";
                let addresses = || slice.endpoints.iter().map(|endpoint| endpoint.address);
                let all = is.then(|| addresses().collect());
                put(&mut self.api_server, slice.key.clone(), all)
            }
            Event::Delete(ObjectId::Node(name)) => put(&mut self.nodes, name.clone(), None),
            Event::Delete(ObjectId::ServiceCidr(name)) => {
                put(&mut self.services, name.clone(), None)
            }
            Event::Delete(ObjectId::EndpointSlice(key)) => {
                put(&mut self.api_server, key.clone(), None)
            }
            _ => false,
        }
    }

    /// Takes in what addresses the nodes say they have; whether that changes anything. An address stays its node's for as long
    /// as the node is `known`: one that is lost with its link is soon back.
    pub fn tell(
        &mut self,
        addresses: impl IntoIterator<Item = (IpAddr, NodeName)>,
        known: &BTreeSet<&NodeName>,
    ) -> bool {
        let before = self.told.len();
        self.told.retain(|node, _| known.contains(node));
        let mut changed = self.told.len() != before;
        for (address, node) in addresses {
            changed |= self.told.entry(node).or_default().insert(address);
        }
        changed
    }

    fn all(&self) -> BTreeSet<IpNet> {
        let told = self.told.values().flatten();
        let single = told.chain(self.api_server.values().flatten());
        let nodes = self.nodes.values().flatten();
        let nets = nodes.chain(self.services.values().flatten()).copied();
        let single = single.copied().map(IpNet::from);
        reserved().chain(nets).chain(single).collect()
    }

    /// All of them, and of these pods' addresses those that lie in none of them, one by one.
    pub fn with(&self, pods: impl IntoIterator<Item = IpAddr>) -> BTreeSet<IpNet> {
        let mut inside = self.all();
        let lengths: BTreeSet<u8> = inside.iter().map(IpNet::prefix_len).collect();
        let is_inside = |address: IpAddr| {
            lengths.iter().any(|length| {
                let around = IpNet::new(address, *length);
                around.is_ok_and(|around| inside.contains(&around.trunc()))
            })
        };
        let strays: Vec<IpAddr> = pods.into_iter().filter(|pod| !is_inside(*pod)).collect();
        inside.extend(strays.into_iter().map(IpNet::from));
        inside
    }

    /// What an address of theirs is.
    pub fn place(&self, address: IpAddr) -> Option<Place> {
        let own = IpNet::from(address);
        let mut of = self.nodes.iter();
        if let Some((node, _)) = of.find(|(_, nets)| nets.contains(&own)) {
            return Some(Place::Node(node.clone()));
        }
        let mut told = self.told.iter();
        if let Some((node, _)) = told.find(|(_, addresses)| addresses.contains(&address)) {
            return Some(Place::Node(node.clone()));
        }
        let mut of_api = self.api_server.values();
        if of_api.any(|addresses| addresses.contains(&address)) {
            return Some(Place::ApiServer);
        }
        let services: BTreeSet<IpNet> = self.services.values().flatten().copied().collect();
        let service = holding(&services, address).map(|net| Place::Service(*net));
        service.or_else(|| holding(&self.all(), address).map(|net| Place::Network(*net)))
    }
}

/// The narrowest of the networks that an address lies in.
pub(super) fn holding(nets: &BTreeSet<IpNet>, address: IpAddr) -> Option<&IpNet> {
    nets.iter()
        .filter(|net| net.contains(&address))
        .max_by_key(|net| net.prefix_len())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn node(name: &str, addresses: &[&str]) -> Vec<(IpAddr, NodeName)> {
        let addresses = addresses.iter().map(|address| address.parse().unwrap());
        addresses.map(|address| (address, name.into())).collect()
    }

    #[test]
    fn what_a_node_says_it_has_is_its_own_until_it_is_forgotten() {
        let mut networks = Networks::default();
        let (one, two) = (NodeName::from("n1"), NodeName::from("n2"));
        let both: BTreeSet<&NodeName> = [&one, &two].into();
        let address: IpAddr = "192.0.2.7".parse().unwrap();
        assert!(networks.tell(node("n1", &["192.0.2.7", "2001:db8::7"]), &both));
        assert_eq!(networks.place(address), Some(Place::Node(one.clone())));
        assert!(networks.with([]).contains(&address.into()));
        // Its link has gone, and its addresses with it: nothing changes.
        assert!(!networks.tell(node("n1", &["192.0.2.7"]), &both));
        assert!(!networks.tell([], &both));
        assert!(networks.with([]).contains(&address.into()));
        assert!(networks.tell([], &[&two].into()));
        assert_eq!(networks.place(address), None);
        assert!(!networks.with([]).contains(&address.into()));
    }

    #[test]
    fn pods_that_lie_in_none_of_them_are_told_one_by_one() {
        let networks = Networks::default();
        let [inside, stray] = ["169.254.0.9", "172.16.0.9"].map(|address| address.parse().unwrap());
        let all = networks.with([inside, stray]);
        assert!(!all.contains(&inside.into()) && all.contains(&stray.into()));
    }
}
