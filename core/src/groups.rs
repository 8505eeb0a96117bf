//! Which addresses move together, and where they may be announced: a synchronous index.
//!
//! ```text
//!  Event ──apply──> GroupIndex ──reconcile──> ids of the groups that changed
//!                     │
//!                     ├─ groups      addresses of one holder, with what an announcing node must have
//!                     └─ placements  which nodes the L2Advertisements admit, shared between groups
//! ```
//!
//! The speaker's loop feeds it and hands it to [`crate::election`]. Nothing here knows who is alive.

mod group;
mod placement;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::ip::Family;
use crate::model::{
    Advertisement, EgressSpec, EndpointSlice, Event, Holder, Kind, Node, NodeName, Object,
    ObjectId, ObjectKey, Pool, Protocol, Service, TrafficPolicy, VirtualIp,
};
use crate::selector::LabelSelector;
use crate::steering::distribution;
pub use group::{Group, GroupService, GroupVip, PodEndpoint, Spread};
pub use placement::{Admission, EXCLUDE_LABEL, Placement, Refused};

/// A group's identity: the name of the `VirtualIP` that its holder got first.
pub type GroupId = Arc<str>;

/// What an index is to tell of Services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Endpoints that are nodes' own addresses: Landfall delivers to them (manifests source only).
    pub host_endpoints: bool,
    /// All other endpoints: Landfall delivers to them too, and no kube-proxy.
    pub pod_endpoints: bool,
}

/// The index. See the module's documentation.
#[derive(Debug, Default)]
pub struct GroupIndex {
    options: Options,
    services: BTreeMap<ObjectKey, Service>,
    slices: BTreeMap<ObjectKey, EndpointSlice>,
    slices_of: BTreeMap<ObjectKey, BTreeSet<ObjectKey>>,
    nodes: BTreeMap<NodeName, Node>,
    node_of_address: BTreeMap<IpAddr, NodeName>,
    /// The nodes of which addresses are known.
    addressed: BTreeSet<NodeName>,
    /// What the speakers themselves say of their nodes' addresses.
    told_addresses: BTreeMap<IpAddr, NodeName>,
    pools: BTreeMap<Arc<str>, Pool>,
    advertisements: BTreeMap<Arc<str>, Advertisement>,
    vips: BTreeMap<IpAddr, VirtualIp>,
    members: BTreeMap<GroupId, BTreeSet<IpAddr>>,
    groups_of: BTreeMap<Holder, BTreeSet<GroupId>>,
    groups: BTreeMap<GroupId, Arc<Group>>,
    /// Which nodes the egress policies that are there admit as gateways, where they say so.
    gateways: BTreeMap<Arc<str>, Option<LabelSelector>>,
    placements: BTreeMap<PlacedBy, Arc<Placement>>,
    dirty: BTreeSet<GroupId>,
    all_dirty: bool,
    synced: BTreeSet<Kind>,
}

/// What says where an address may be announced: advertisements by name (none, if none is for it; nothing, if none selects
/// its pool), and which gateways its egress policies select.
type PlacedBy = (Option<Vec<Arc<str>>>, Vec<LabelSelector>);

/// The kinds that must be listed before anything may be elected.
pub const KINDS: [Kind; 7] = [
    Kind::Service,
    Kind::EndpointSlice,
    Kind::Node,
    Kind::Pool,
    Kind::Advertisement,
    Kind::VirtualIp,
    Kind::EgressPolicy,
];

impl GroupIndex {
    /// An empty index.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// Takes an event in.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Apply(object) => self.apply_object(object),
            Event::Delete(id) => self.delete(&id),
            Event::Synced(kind) => {
                self.synced.insert(kind);
            }
            Event::Unwatched(_) => {}
        }
    }

    /// Takes in which addresses the speakers say their nodes have: where there are no Node objects, these tell which
    /// endpoints are processes of nodes.
    pub fn tell_addresses(&mut self, addresses: BTreeMap<IpAddr, NodeName>) {
        if self.options.host_endpoints && self.told_addresses != addresses {
            self.told_addresses = addresses;
            self.nodes_changed();
        }
    }

    /// Whether every kind was listed once.
    pub fn is_synced(&self) -> bool {
        KINDS.iter().all(|kind| self.synced.contains(kind))
    }

    fn apply_object(&mut self, object: Object) {
        match object {
            Object::Service(service) => {
                let key = service.key.clone();
                if self.services.get(&key) != Some(&service) {
                    self.services.insert(key.clone(), service);
                    self.touch_service(&key);
                }
            }
            Object::EndpointSlice(slice) => {
                let (key, service) = (slice.key.clone(), slice.service.clone());
                if let Some(old) = self.slices.insert(key.clone(), slice)
                    && old.service != service
                {
                    self.forget_slice(&old);
                }
                self.slices_of
                    .entry(service.clone())
                    .or_default()
                    .insert(key);
                self.touch_service(&service);
            }
            Object::Node(node) => {
                if self.nodes.get(&node.name) != Some(&node) {
                    self.nodes.insert(node.name.clone(), node);
                    self.nodes_changed();
                }
            }
            Object::Pool(pool) => {
                if self.pools.get(&pool.name) != Some(&pool) {
                    self.pools.insert(pool.name.clone(), pool);
                    self.policy_changed();
                }
            }
            Object::Advertisement(advertisement) => {
                self.advertisements
                    .insert(advertisement.name.clone(), advertisement);
                self.policy_changed();
            }
            Object::VirtualIp(vip) => {
                if self.vips.get(&vip.address) != Some(&vip) {
                    self.forget_vip(vip.address);
                    self.touch_vip(&vip);
                    let members = self.members.entry(vip.group.clone()).or_default();
                    members.insert(vip.address);
                    for holder in named(&vip) {
                        let groups = self.groups_of.entry(holder).or_default();
                        groups.insert(vip.group.clone());
                    }
                    self.vips.insert(vip.address, vip);
                }
            }
            Object::EgressPolicy(policy) => {
                self.set_gateways(&policy.name, Some(&policy.spec));
            }
            Object::Namespace(_) | Object::Pod(_) | Object::ServiceCidr(_) => {}
        }
    }

    fn delete(&mut self, id: &ObjectId) {
        match id {
            ObjectId::Service(key) => {
                self.services.remove(key);
                self.touch_service(key);
            }
            ObjectId::EndpointSlice(key) => {
                if let Some(old) = self.slices.remove(key) {
                    self.forget_slice(&old);
                }
            }
            ObjectId::Node(name) => {
                if self.nodes.remove(name).is_some() {
                    self.nodes_changed();
                }
            }
            ObjectId::Pool(name) => {
                self.pools.remove(name);
                self.policy_changed();
            }
            ObjectId::Advertisement(name) => {
                self.advertisements.remove(name);
                self.policy_changed();
            }
            ObjectId::VirtualIp(address) => self.forget_vip(*address),
            ObjectId::EgressPolicy(name) => self.set_gateways(name, None),
            ObjectId::Namespace(_) | ObjectId::Pod(_) | ObjectId::ServiceCidr(_) => {}
        }
    }

    fn forget_slice(&mut self, old: &EndpointSlice) {
        if let Some(slices) = self.slices_of.get_mut(&old.service) {
            slices.remove(&old.key);
            if slices.is_empty() {
                self.slices_of.remove(&old.service);
            }
        }
        self.touch_service(&old.service);
    }

    fn forget_vip(&mut self, address: IpAddr) {
        let Some(old) = self.vips.remove(&address) else {
            return;
        };
        self.touch_vip(&old);
        if let Some(members) = self.members.get_mut(&old.group) {
            members.remove(&address);
            if members.is_empty() {
                self.members.remove(&old.group);
            }
        }
        for holder in named(&old) {
            // Another address of the group may still be held by the same one.
            let held = self.members.get(&old.group).is_some_and(|members| {
                let mut holders = members.iter().flat_map(|a| named(&self.vips[a]));
                holders.any(|other| other == holder)
            });
            if !held && let Some(groups) = self.groups_of.get_mut(&holder) {
                groups.remove(&old.group);
                if groups.is_empty() {
                    self.groups_of.remove(&holder);
                }
            }
        }
    }

    /// Notes whom a policy admits; nothing, if it is gone.
    fn set_gateways(&mut self, policy: &Arc<str>, spec: Option<&EgressSpec>) {
        let admitted = spec.map(|spec| &spec.gateways);
        if self.gateways.get(policy) == admitted {
            return;
        }
        match admitted {
            Some(admitted) => self.gateways.insert(policy.clone(), admitted.clone()),
            None => self.gateways.remove(policy),
        };
        let groups = self.groups_of.get(&Holder::EgressPolicy(policy.clone()));
        self.dirty.extend(groups.into_iter().flatten().cloned());
    }

    fn touch_vip(&mut self, vip: &VirtualIp) {
        self.dirty.insert(vip.group.clone());
    }

    fn touch_service(&mut self, key: &ObjectKey) {
        if let Some(groups) = self.groups_of.get(&Holder::Service(key.clone())) {
            self.dirty.extend(groups.iter().cloned());
        }
    }

    fn nodes_changed(&mut self) {
        let of_nodes = self.nodes.values().flat_map(|node| {
            node.addresses
                .iter()
                .map(|address| (*address, node.name.clone()))
        });
        let told = self.told_addresses.clone().into_iter();
        self.node_of_address = told.chain(of_nodes).collect();
        self.addressed = self.node_of_address.values().cloned().collect();
        self.policy_changed();
    }

    fn policy_changed(&mut self) {
        self.placements.clear();
        self.all_dirty = true;
    }

    /// Brings the groups up to date and returns the ids of those that changed, appeared or vanished.
    pub fn reconcile(&mut self) -> BTreeSet<GroupId> {
        let dirty = if std::mem::take(&mut self.all_dirty) {
            self.dirty.clear();
            self.members
                .keys()
                .chain(self.groups.keys())
                .cloned()
                .collect()
        } else {
            std::mem::take(&mut self.dirty)
        };
        dirty
            .into_iter()
            .filter(|id| {
                let new = self.build(id);
                let old = self.groups.get(id);
                if old.map(AsRef::as_ref) == new.as_ref() {
                    return false;
                }
                match new {
                    Some(group) => self.groups.insert(id.clone(), Arc::new(group)),
                    None => self.groups.remove(id),
                };
                true
            })
            .collect()
    }

    /// The groups, by id.
    pub fn groups(&self) -> &BTreeMap<GroupId, Arc<Group>> {
        &self.groups
    }

    /// The nodes that the source knows.
    pub fn nodes(&self) -> &BTreeMap<NodeName, Node> {
        &self.nodes
    }

    /// The pools that the source knows.
    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.pools.values()
    }

    /// The advertisements that the source knows.
    pub fn advertisements(&self) -> impl Iterator<Item = &Advertisement> {
        self.advertisements.values()
    }

    /// A Service that the source knows.
    pub fn service(&self, key: &ObjectKey) -> Option<&Service> {
        self.services.get(key)
    }

    /// A `VirtualIP`, as last observed.
    pub fn virtual_ip(&self, address: IpAddr) -> Option<&VirtualIp> {
        self.vips.get(&address)
    }

    /// Every address that is in use.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.groups
            .values()
            .flat_map(|group| group.vips.iter().map(|vip| vip.address))
    }

    fn build(&mut self, id: &GroupId) -> Option<Group> {
        let addresses: Vec<IpAddr> = self.members.get(id)?.iter().copied().collect();
        let mut keys = BTreeSet::new();
        let mut egress = BTreeSet::new();
        let mut vips = Vec::new();
        for address in addresses {
            let vip = self.vips[&address].clone();
            if !vip.is_held() {
                continue; // It rests: nobody holds it, nobody announces it.
            }
            let placement = self.placement(&vip);
            let drains = vip.only_drains();
            keys.extend(vip.services);
            egress.extend(vip.egress_policies);
            vips.push(GroupVip {
                address,
                placement,
                reported_leader: vip.leader,
                drains,
            });
        }
        if vips.is_empty() {
            return None;
        }
        let steers = vips.iter().all(|vip| vip.placement.steering);
        let services: Vec<GroupService> = keys
            .into_iter()
            .map(|key| self.group_service(key, steers))
            .collect();
        let digest = group::digest(id, &vips, &services, &egress);
        Some(Group {
            id: id.clone(),
            vips,
            services,
            egress,
            digest,
        })
    }

    fn placement(&mut self, vip: &VirtualIp) -> Arc<Placement> {
        let pool = self.pools.get(&vip.pool);
        let selecting: Vec<&Advertisement> = self
            .advertisements
            .values()
            .filter(|advertisement| placement::selects_pool(advertisement, &vip.pool, pool))
            .collect();
        // What a policy that is gone has said is on record.
        let admitted = |name| match self.gateways.get(name) {
            Some(now) => now.clone(),
            None => vip.terms.get(name)?.gateways.clone(),
        };
        let gateways = vip.egress_policies.iter();
        let gateways: Vec<LabelSelector> = gateways.filter_map(admitted).collect();
        if selecting.is_empty() {
            let placement = || Arc::new(Placement::everywhere(&self.nodes, &gateways));
            let placed = self.placements.entry((None, gateways.clone()));
            return placed.or_insert_with(placement).clone();
        }
        let matching: Vec<&Advertisement> = selecting
            .into_iter()
            .filter(|advertisement| {
                advertisement.service_selectors.is_empty()
                    || vip.services.iter().any(|key| {
                        let labels = self.services.get(key).map(|service| &service.labels);
                        let none = BTreeMap::new();
                        let labels = labels.unwrap_or(&none);
                        advertisement
                            .service_selectors
                            .iter()
                            .any(|selector| selector.matches(labels))
                    })
            })
            .collect();
        let names: Vec<Arc<str>> = matching.iter().map(|a| a.name.clone()).collect();
        self.placements
            .entry((Some(names), gateways.clone()))
            .or_insert_with(|| Arc::new(Placement::new(&matching, &self.nodes, &gateways)))
            .clone()
    }

    fn group_service(&self, key: ObjectKey, steers: bool) -> GroupService {
        let service = self.services.get(&key);
        let mut endpoint_nodes = BTreeSet::new();
        let mut host_endpoints = BTreeMap::<_, BTreeMap<_, BTreeSet<_>>>::new();
        let mut counts = Counts::default();
        let mut only_hosts = self.options.host_endpoints;
        let mut endpoints = BTreeMap::<FamilyPort, BTreeSet<PodEndpoint>>::new();
        let mut any_host = false;
        let mut served = BTreeSet::new();
        let ports = service
            .map(|service| service.ports.clone())
            .unwrap_or_default();
        let slices = self.slices_of.get(&key).into_iter().flatten();
        for slice in slices.filter_map(|name| self.slices.get(name)) {
            for endpoint in slice
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.servable())
            {
                let of_slice = ports.iter().filter(|port| {
                    let mut targets = slice.ports.iter();
                    targets.any(|to| to.name == port.name && to.protocol == port.protocol)
                });
                served.extend(of_slice.map(|port| (slice.family, port.protocol, port.port)));
                let owner = self.node_of_address.get(&endpoint.address);
                let Some(node) = endpoint.node.as_ref().or(owner) else {
                    only_hosts = false;
                    continue;
                };
                endpoint_nodes.insert(node.clone());
                if owner == Some(node) {
                    any_host = true;
                } else if owner.is_some() || self.addressed.contains(node) {
                    only_hosts = false;
                }
                // Else its node was never heard of: a control plane's first node is up before the others.
                for port in &ports {
                    let target = slice
                        .ports
                        .iter()
                        .find(|p| p.name == port.name && p.protocol == port.protocol);
                    if let Some(target) = target {
                        let family_port = (slice.family, port.protocol, port.port);
                        counts.add(family_port, node, endpoint.ready);
                        if self.options.pod_endpoints {
                            endpoints
                                .entry(family_port)
                                .or_default()
                                .insert(PodEndpoint {
                                    address: SocketAddr::new(endpoint.address, target.port),
                                    node: node.clone(),
                                    ready: endpoint.ready,
                                });
                        }
                        host_endpoints
                            .entry((port.protocol, port.port))
                            .or_default()
                            .entry(node.clone())
                            .or_default()
                            .insert(SocketAddr::new(endpoint.address, target.port));
                    }
                }
            }
        }
        if only_hosts && any_host {
            endpoints.clear();
        } else {
            host_endpoints.clear();
        }
        // Without steering the leader delivers alone, and without kube-proxy to its own endpoints only.
        let local = service.is_some_and(|s| s.traffic_policy == TrafficPolicy::Local)
            || (self.options.pod_endpoints && !steers && host_endpoints.is_empty());
        GroupService {
            ports,
            local_nodes: local.then(|| endpoint_nodes.clone()),
            health_check_node_port: service.map_or(0, |s| s.health_check_node_port),
            endpoint_nodes,
            served,
            spreads: counts.spreads(),
            affinity: service.is_some_and(|s| s.affinity),
            udp_ports: service.is_some_and(|s| s.udp_ports),
            endpoints,
            source_ranges: service.and_then(|s| s.source_ranges.clone()),
            host_endpoints,
            key,
        }
    }
}

/// Everybody that a record names: its Services, and the policies whose pods leave by the address.
fn named(vip: &VirtualIp) -> impl Iterator<Item = Holder> {
    let services = vip.services.iter().cloned().map(Holder::Service);
    let policies = vip.egress_policies.iter().cloned();
    services.chain(policies.map(Holder::EgressPolicy))
}

/// A port of a Service, in a family.
pub type FamilyPort = (Family, Protocol, u16);

/// Servable endpoints of each node: the ready ones, and those that still serve while they terminate.
#[derive(Debug, Default)]
struct Counts(BTreeMap<FamilyPort, BTreeMap<NodeName, [u32; 2]>>);

impl Counts {
    fn add(&mut self, port: FamilyPort, node: &NodeName, ready: bool) {
        let nodes = self.0.entry(port).or_default();
        nodes.entry(node.clone()).or_default()[usize::from(!ready)] += 1;
    }

    fn spreads(self) -> BTreeMap<FamilyPort, Spread> {
        let of = |nodes: &BTreeMap<NodeName, [u32; 2]>, kind: usize| {
            let counts = nodes
                .iter()
                .map(|(node, counts)| (node.clone(), counts[kind]))
                .collect();
            distribution(&counts)
        };
        self.0
            .iter()
            .map(|(port, nodes)| {
                let spread = Spread {
                    ready: of(nodes, 0),
                    draining: of(nodes, 1),
                };
                (*port, spread)
            })
            .collect()
    }
}
