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
    /// A node's.
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
    told: BTreeMap<IpAddr, NodeName>,
    /// None of these is a node's, wherever it is found.
    vips: BTreeSet<IpAddr>,
    services: BTreeMap<Arc<str>, BTreeSet<IpNet>>,
    /// The endpoints of Service `default/kubernetes`, as the API server writes them itself.
    api_server: BTreeSet<IpAddr>,
    /// What an earlier process knew.
    earlier: BTreeSet<IpNet>,
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

/// Whether the API server writes a slice itself, for its own addresses. Another of the same Service may be anybody's.
fn is_api_server(slice: &ObjectKey) -> bool {
    (&*slice.namespace, &*slice.name) == ("default", "kubernetes")
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
            Event::Apply(Object::EndpointSlice(slice)) if is_api_server(&slice.key) => {
                let addresses = slice.endpoints.iter().map(|endpoint| endpoint.address);
                self.tell_api_server(addresses.collect())
            }
            Event::Apply(Object::VirtualIp(vip)) => {
                self.vips.insert(vip.address) && self.told.contains_key(&vip.address)
            }
            Event::Delete(ObjectId::Node(name)) => put(&mut self.nodes, name.clone(), None),
            Event::Delete(ObjectId::ServiceCidr(name)) => {
                put(&mut self.services, name.clone(), None)
            }
            Event::Delete(ObjectId::EndpointSlice(key)) if is_api_server(key) => {
                self.tell_api_server(BTreeSet::new())
            }
            Event::Delete(ObjectId::VirtualIp(address)) => {
                self.vips.remove(address) && self.told.contains_key(address)
            }
            _ => false,
        }
    }

    fn tell_api_server(&mut self, addresses: BTreeSet<IpAddr>) -> bool {
        let before = std::mem::replace(&mut self.api_server, addresses);
        before != self.api_server
    }

    /// Takes in which addresses the nodes say they have; whether that changes anything.
    pub fn tell(&mut self, addresses: BTreeMap<IpAddr, NodeName>) -> bool {
        let before = std::mem::replace(&mut self.told, addresses);
        before != self.told
    }

    /// Takes in what an earlier process knew: it counts until [`Networks::forget`].
    pub fn recall(&mut self, earlier: BTreeSet<IpNet>) {
        self.earlier = earlier;
    }

    /// Who is there has spoken by now; whether that changes anything.
    pub fn forget(&mut self) -> bool {
        !std::mem::take(&mut self.earlier).is_empty()
    }

    /// Whose an address is, by the word of the nodes.
    fn told(&self) -> impl Iterator<Item = (&IpAddr, &NodeName)> {
        let told = self.told.iter();
        told.filter(|(address, _)| !self.vips.contains(*address))
    }

    fn all(&self) -> BTreeSet<IpNet> {
        let told = self.told().map(|(address, _)| address);
        let single = told.chain(&self.api_server).copied().map(IpNet::from);
        let nodes = self.nodes.values().flatten();
        let nets = nodes.chain(self.services.values().flatten());
        let nets = nets.chain(&self.earlier).copied();
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
        if let Some((_, node)) = self.told().find(|(told, _)| **told == address) {
            return Some(Place::Node(node.clone()));
        }
        if self.api_server.contains(&address) {
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
    use crate::egress::tests::{mk_slice, mk_vip};

    #[test]
    fn what_a_node_says_it_has_is_its_own_unless_it_is_a_vip() {
        let mut networks = Networks::default();
        let node = NodeName::from("n1");
        let address: IpAddr = "192.0.2.7".parse().unwrap();
        let told = BTreeMap::from([(address, node.clone())]);
        assert!(networks.tell(told.clone()));
        assert!(!networks.tell(told));
        assert_eq!(networks.place(address), Some(Place::Node(node)));
        assert!(networks.with([]).contains(&address.into()));
        let vip = Event::Apply(Object::VirtualIp(mk_vip("192.0.2.7", "out", &[])));
        assert!(networks.apply(&vip) && !networks.apply(&vip));
        assert_eq!(networks.place(address), None);
        assert!(!networks.with([]).contains(&address.into()));
        assert!(networks.apply(&Event::Delete(ObjectId::VirtualIp(address))));
        assert!(networks.with([]).contains(&address.into()));
        assert!(networks.tell(BTreeMap::new()));
        assert!(!networks.with([]).contains(&address.into()));
    }

    #[test]
    fn what_an_earlier_process_knew_counts_until_it_is_forgotten() {
        let mut networks = Networks::default();
        let net: IpNet = "192.0.2.7/32".parse().unwrap();
        networks.recall([net].into());
        assert!(networks.with([]).contains(&net));
        assert!(networks.forget() && !networks.forget());
        assert!(!networks.with([]).contains(&net));
    }

    #[test]
    fn the_api_server_is_where_it_says_itself() {
        let mut networks = Networks::default();
        let slice = |name: &str, address: &str| {
            Event::Apply(Object::EndpointSlice(mk_slice(name, address)))
        };
        assert!(networks.apply(&slice("kubernetes", "203.0.113.6")));
        assert!(!networks.apply(&slice("mine", "203.0.113.7")));
        let place = |networks: &Networks, address: &str| networks.place(address.parse().unwrap());
        assert_eq!(place(&networks, "203.0.113.6"), Some(Place::ApiServer));
        assert_eq!(place(&networks, "203.0.113.7"), None);
        assert!(networks.apply(&slice("kubernetes", "203.0.113.8")));
        assert_eq!(place(&networks, "203.0.113.6"), None);
    }

    #[test]
    fn pods_that_lie_in_none_of_them_are_told_one_by_one() {
        let networks = Networks::default();
        let [inside, stray] = ["169.254.0.9", "172.16.0.9"].map(|address| address.parse().unwrap());
        let all = networks.with([inside, stray]);
        assert!(!all.contains(&inside.into()) && all.contains(&stray.into()));
    }
}
