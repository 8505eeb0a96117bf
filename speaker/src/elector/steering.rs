//! What the data path should know: the nodes, how they are reached, and over which of them each port is spread.
//!
//! A node is in a port's table when its own speaker says that it serves the Service, and no earlier; it leaves at once:
//! by the slice, by its own word, by its death. All nodes say the same of the same inputs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use landfall_core::election::{HeldPort, NodeRegister, service_id};
use landfall_core::groups::{FamilyPort, Group, GroupService, GroupVip};
use landfall_core::ip::Family;
use landfall_core::model::{NodeName, Protocol};
use landfall_core::steering::{self, Distribution};
use serde_json::{Value, json};

use super::Speaker;
use crate::announcer::MacAddr;
use crate::datapath::{
    Attachment, Change, Delivery, Native, NodeId, NodeState, PortId, PortState, Reach, VipState,
};

/// A speaker that begins, perhaps in the place of another, takes it in its own tables that its node serves what it has
/// endpoints of, until it has had the time to ask: the others' tables still say so.
const ASSUMES: Duration = Duration::from_secs(1);

/// What one group adds to what the data path should know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Steered {
    pub(super) vips: BTreeMap<IpAddr, VipState>,
    pub(super) ports: BTreeMap<PortId, PortState>,
}

/// What the data path was told, and what is new since.
#[derive(Debug, Default)]
pub(super) struct Told {
    vips: Ledger<IpAddr, VipState>,
    ports: Ledger<PortId, PortState>,
    nodes: BTreeMap<NodeId, NodeState>,
    mark: Option<u32>,
    complete: bool,
    tables: Generations,
}

/// How often the tables changed, on this node.
#[derive(Debug, Default)]
struct Generations {
    /// All of them together: a port that comes back does not begin anew.
    changes: u64,
    /// Of each port, which of the changes was its last.
    of: BTreeMap<PortId, u64>,
}

impl Generations {
    /// Takes note of a port that was so and is so now.
    fn note(&mut self, change: &Changed<PortId, PortState>) {
        let (id, before, now) = change;
        if before.as_ref().map(|it| &it.nodes) == now.as_ref().map(|it| &it.nodes) {
            return;
        }
        self.changes += 1;
        if now.is_some() {
            self.of.insert(*id, self.changes);
        } else {
            self.of.remove(id);
        }
    }
}

/// A key, what it stood for before, and what now.
type Changed<K, V> = (K, Option<V>, Option<V>);

/// A map, and what its entries were before they were touched.
#[derive(Debug)]
struct Ledger<K, V> {
    now: BTreeMap<K, V>,
    before: BTreeMap<K, Option<V>>,
}

impl<K, V> Default for Ledger<K, V> {
    fn default() -> Self {
        Self {
            now: BTreeMap::new(),
            before: BTreeMap::new(),
        }
    }
}

impl<K: Ord + Clone, V: Clone + PartialEq> Ledger<K, V> {
    fn set(&mut self, key: &K, value: Option<&V>) {
        let old = match value {
            Some(value) => self.now.insert(key.clone(), value.clone()),
            None => self.now.remove(key),
        };
        self.before.entry(key.clone()).or_insert(old);
    }

    /// What is other than when it was asked last.
    fn changes(&mut self) -> Vec<Changed<K, V>> {
        std::mem::take(&mut self.before)
            .into_iter()
            .filter_map(|(key, old)| {
                let new = self.now.get(&key).cloned();
                (new != old).then_some((key, old, new))
            })
            .collect()
    }
}

impl Told {
    pub(super) fn remove(&mut self, part: &Steered) {
        part.vips.keys().for_each(|vip| self.vips.set(vip, None));
        part.ports.keys().for_each(|id| self.ports.set(id, None));
    }

    pub(super) fn insert(&mut self, part: &Steered) {
        for (vip, state) in &part.vips {
            self.vips.set(vip, Some(state));
        }
        for (id, state) in &part.ports {
            self.ports.set(id, Some(state));
        }
    }

    /// What changed of VIPs and ports. A port goes before its VIP: what is matched is known.
    fn changes(&mut self) -> impl Iterator<Item = Change> + use<> {
        let ports = self.ports.changes();
        for change in &ports {
            self.tables.note(change);
        }
        let vips = self.vips.changes().into_iter();
        ports
            .into_iter()
            .map(|(id, _, state)| Change::Port(id, state))
            .chain(vips.map(|(vip, _, state)| Change::Vip(vip, state)))
    }

    /// What the data path was told, for people.
    pub(super) fn debug(&self) -> Value {
        let nodes: Vec<Value> = self
            .nodes
            .iter()
            .map(|(id, state)| {
                json!({
                    "name": id.name, "interface": id.interface, "alive": state.alive, "suspected": state.suspected,
                    "steers": state.steers, "mac": state.mac.map(|mac| MacAddr(mac).to_string()),
                })
            })
            .collect();
        let name = |id: &PortId| format!("{}/{}", SocketAddr::new(id.vip, id.port), id.protocol);
        let ports: BTreeMap<String, BTreeMap<&str, u16>> = self
            .ports
            .now
            .iter()
            .map(|(id, state)| {
                let nodes = state.nodes.iter().map(|(node, weight)| (&*node.0, *weight));
                (name(id), nodes.collect())
            })
            .collect();
        let tables: BTreeMap<String, Value> = self
            .ports
            .now
            .iter()
            .map(|(id, state)| {
                let digest = format!("{:016x}", steering::digest(&state.nodes));
                let generation = self.tables.of.get(id);
                (
                    name(id),
                    json!({"generation": generation, "digest": digest}),
                )
            })
            .collect();
        json!({"nodes": nodes, "ports": ports, "tables": tables})
    }

    /// Whether the data path was told all there is.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    fn nodes(&mut self, wanted: BTreeMap<NodeId, NodeState>) -> Vec<Change> {
        let gone = self.nodes.keys().filter(|id| !wanted.contains_key(*id));
        let mut changes: Vec<Change> = gone.map(|id| Change::Node(id.clone(), None)).collect();
        for (id, state) in &wanted {
            if self.nodes.get(id) != Some(state) {
                changes.push(Change::Node(id.clone(), Some(state.clone())));
            }
        }
        self.nodes = wanted;
        changes
    }
}

impl Speaker {
    /// Tells the data path what is new. A death is told at once; the tables follow.
    ///
    /// Before this node knows what the others say, an earlier process's tables are right, and it says nothing.
    pub(super) fn tell(&mut self) {
        if !self.is_ready() {
            return;
        }
        let mut changes = self.told_nodes();
        changes.extend(self.told.changes());
        if !std::mem::replace(&mut self.told.complete, true) {
            // Whom to ask for a flow is known before the tables are in force.
            let pages = std::mem::take(&mut self.held_pages);
            changes.extend(self.holder_changes(pages));
            changes.push(Change::Complete);
        }
        let number = self.parts.datapath.change(changes);
        for written in self.untold.values_mut() {
            written.get_or_insert(number);
        }
    }

    /// Tells the data path how the node's rules want to know what it has translated.
    pub(super) fn tell_mark(&mut self) {
        let mark = self.parts.rules.arrival_mark();
        if self.told.complete && mark.is_some() && self.told.mark != mark {
            self.told.mark = mark;
            let change = mark.map(Change::Mark);
            self.parts.datapath.change(change.into_iter().collect());
        }
    }

    /// Tells the others of which buckets this node holds flows that are another's.
    pub(super) fn say_held(&mut self) {
        let held = self.parts.datapath.held();
        if Arc::ptr_eq(&held, &self.held) {
            return;
        }
        let before = std::mem::replace(&mut self.held, held);
        for id in before.keys().chain(self.held.keys()) {
            let none = BTreeSet::new();
            let buckets = self.held.get(id).unwrap_or(&none);
            self.election.set_held(held_port(id), buckets);
        }
    }

    /// Tells the data path who holds flows of buckets that are another's.
    pub(super) fn tell_holders(&mut self, pages: BTreeSet<(HeldPort, u16)>) {
        self.parts.datapath.change(self.holder_changes(pages));
    }

    fn holder_changes(&self, pages: BTreeSet<(HeldPort, u16)>) -> Vec<Change> {
        let changes = pages.into_iter().map(|(port, page)| {
            let id = PortId {
                vip: port.vip,
                protocol: Protocol::Tcp,
                port: port.port,
            };
            Change::Holders(id, page, self.election.holders(port, page))
        });
        changes.collect()
    }

    fn told_nodes(&mut self) -> Vec<Change> {
        let wanted = self.node_states();
        self.told.nodes(wanted)
    }

    /// Tells the data path at once who is alive and who is not.
    pub(super) fn tell_nodes(&mut self) {
        if self.told.complete {
            let changes = self.told_nodes();
            self.parts.datapath.change(changes);
        }
    }

    /// Whether the programs are at every uplink and know what they need.
    ///
    /// Until it is known whether they can be, this node does not say that it serves anything: flows that others hold
    /// would come here, and it could not hand them on.
    pub(super) fn check_steers(&mut self, now: Duration) {
        if self.assumes_to_serve && self.told.complete {
            let until = *self.assumes_until.get_or_insert(now + ASSUMES);
            if now >= until {
                self.assumes_to_serve = false;
                self.desired.forget();
                self.apply_at.get_or_insert(now);
            }
        }
        let attachments = self.parts.datapath.attachments();
        if !self.data_path_known
            && self.told.complete
            && self
                .uplinks
                .iter()
                .all(|uplink| attachments.contains_key(uplink))
        {
            self.data_path_known = true;
            self.check_all(now);
        }
        let steers = self.told.complete
            && !self.uplinks.is_empty()
            && self.uplinks.iter().all(|uplink| {
                matches!(
                    attachments.get(uplink),
                    Some(Attachment::Tcx | Attachment::Clsact)
                )
            });
        self.say_hindrance(&attachments);
        if self.steers != steers {
            self.steers = steers;
            self.election.set_steers(steers);
            self.check_all(now);
        }
    }

    /// Another node was heard at an interface: that is where frames reach it.
    pub(super) fn heard_from(&mut self, node: &NodeName, interface: u32, from: MacAddr) {
        let id = NodeId {
            name: node.clone(),
            interface,
        };
        if self.macs.insert(id, from) != Some(from) {
            self.nodes_stale = true;
        }
    }

    fn node_states(&self) -> BTreeMap<NodeId, NodeState> {
        let me = &self.identity.node;
        let mut states = BTreeMap::new();
        for uplink in &self.uplinks {
            for name in self.election.known() {
                let Some(register) = self.election.register(name) else {
                    continue;
                };
                let id = NodeId {
                    name: name.clone(),
                    interface: *uplink,
                };
                // A hello is signed, the Ethernet header around it is not: it has to be an address of the node's.
                let mac = self.macs.get(&id).map(|mac| mac.0).filter(|mac| {
                    register
                        .interfaces
                        .iter()
                        .any(|interface| interface.mac == *mac)
                });
                let state = NodeState {
                    here: name == me,
                    alive: self.is_there(name, *uplink),
                    suspected: self.is_suspected(&id),
                    steers: register.capabilities.steers,
                    mac,
                    address: None,
                    routed: self.behind(name, register),
                };
                states.insert(id, state);
            }
        }
        self.tunnel_states(&mut states);
        states
    }

    /// What a node sends as itself or for those behind it.
    fn behind(&self, name: &NodeName, register: &NodeRegister) -> BTreeSet<IpNet> {
        let own = register
            .interfaces
            .iter()
            .flat_map(|interface| &interface.addresses)
            .map(|address| IpNet::from(*address));
        let node = self.index.nodes().get(name);
        let known = node.into_iter().flat_map(|node| {
            let addresses = node.addresses.iter().map(|address| IpNet::from(*address));
            addresses.chain(node.pod_cidrs.iter().map(IpNet::trunc))
        });
        own.chain(known).collect()
    }

    /// What one group adds.
    pub(super) fn steered(&self, group: &Group) -> Steered {
        let mut steered = Steered::default();
        let places = self.election.places(group);
        let tunnel = self.tunnel();
        let on_segment = tunnel.map(|_| self.election.on_segment(group));
        for vip in &group.vips {
            let uplink = places
                .get(&vip.address)
                .and_then(|place| self.interface(&place.name))
                .map(|interface| interface.index)
                .or(tunnel);
            let state = VipState {
                // Where the programs deliver they see all packets, and the leader's stay with it if it is not to steer.
                steer: (group.steers() || self.is_native()) && uplink.is_some(),
                udp_port: None,
            };
            steered.vips.insert(vip.address, state);
            let Some(uplink) = uplink.filter(|_| state.steer) else {
                continue;
            };
            let near = on_segment.as_ref().and_then(|all| all.get(&vip.address));
            let reach = self.reach(uplink, near);
            for service in &group.services {
                self.steered_ports(group, service, vip, &reach, &mut steered.ports);
            }
            if let Some(state) = steered.vips.get_mut(&vip.address) {
                state.udp_port = lone_udp_port(vip.address, &steered.ports);
            }
        }
        steered
    }

    fn steered_ports(
        &self,
        group: &Group,
        service: &GroupService,
        vip: &GroupVip,
        reach: &Reach,
        into: &mut BTreeMap<PortId, PortState>,
    ) {
        let me = &self.identity.node;
        let id = service_id(&service.key);
        let serves = |node: &NodeName| {
            (group.steers() || node == me)
                && self.is_there(node, reach.of(node))
                && if node == me {
                    self.assumes_to_serve || self.serves_here(&group.id, id)
                } else {
                    self.election.serves(node, &group.id, id)
                }
        };
        for port in &service.ports {
            let family_port = (Family::of(vip.address), port.protocol, port.port);
            let spread = service.spreads.get(&family_port);
            let nodes = spread.map_or_else(Distribution::default, |spread| {
                spread.over(serves, |node| {
                    !reach.far.contains(node)
                        || (vip.placement.cross_segment
                            && self.has_way_out(node, Family::of(vip.address)))
                })
            });
            let port_id = PortId {
                vip: vip.address,
                protocol: port.protocol,
                port: port.port,
            };
            let state = PortState {
                here: serves(me) && spread.is_some_and(|spread| spread.names(me)),
                nodes,
                reach: reach.clone(),
                affinity: service.affinity,
                udp_ports: service.udp_ports,
                host: !service.host_endpoints.is_empty(),
                native: self.native(service, family_port),
            };
            into.insert(port_id, state);
        }
    }
}

impl Speaker {
    /// Whether this node's programs deliver to pods, and no kube-proxy.
    pub(super) fn is_native(&self) -> bool {
        self.identity.delivery == Delivery::Native
    }

    fn native(&self, service: &GroupService, port: FamilyPort) -> Option<Native> {
        let delivers = self.is_native() && service.host_endpoints.is_empty();
        delivers.then(|| Native {
            endpoints: service.targets(port, Some(&self.identity.node)),
            ranges: service.source_ranges.clone(),
        })
    }
}

fn held_port(id: &PortId) -> HeldPort {
    HeldPort {
        vip: id.vip,
        port: id.port,
    }
}

/// A UDP port of the address, if all of them are spread alike and by the client's address.
fn lone_udp_port(vip: IpAddr, ports: &BTreeMap<PortId, PortState>) -> Option<u16> {
    let mut of_vip = ports
        .iter()
        .filter(|(id, _)| id.vip == vip && id.protocol == Protocol::Udp)
        .map(|(id, state)| (id, anonymous(state)));
    let (id, state) = of_vip.next()?;
    let alike = !state.udp_ports && of_vip.all(|(_, other)| other == state);
    alike.then_some(id.port)
}

/// A port's state without what tells it from another that the same endpoints serve.
fn anonymous(state: &PortState) -> PortState {
    let mut state = state.clone();
    if let Some(native) = &mut state.native {
        native.endpoints = std::mem::take(&mut native.endpoints)
            .into_iter()
            .map(|endpoint| SocketAddr::new(endpoint.ip(), 0))
            .collect();
    }
    state
}
