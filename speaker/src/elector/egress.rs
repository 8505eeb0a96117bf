//! Pods that leave by addresses of their own: what this node is to do for them, from whose tenants they are and who leads
//! the addresses.
//!
//! A change costs what it changes. A gateway stays known after its death until the next one is: rules and routes of the
//! pods' nodes do not change in a fail-over, only where their packets go.

mod around;
pub(super) mod gates;
pub mod usage;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use landfall_core::egress::{EgressIndex, Judged, Networks};
use landfall_core::election::policy_id;
use landfall_core::groups::Group;
use landfall_core::model::{Event, NodeName, OldFlows};
use landfall_core::steering::seed;
use landfall_ebpf_common::tunnel_mac;

use super::Speaker;
use crate::datapath::egress::{Earlier, Was, seed_of};
use crate::datapath::{self, Change as Told, NodeId};
use crate::egress::{Egress, Gateway, Pod, Policy, PolicyName, Tenant};
use crate::node_rules::{self, TUNNEL};

/// Whether the cluster's own networks, as they are wanted, are those that are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Inside {
    #[default]
    Same,
    /// They, or pods' addresses, may be others.
    Stale,
    /// The same, since conclusions were drawn last.
    Moved,
}

/// What follows from what is known of tenants and policies.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// All was listed once: what is known is acted upon.
    begun: bool,
    wanted: Egress,
    /// The cluster's own networks.
    networks: Networks,
    inside: Inside,
    /// How many tenants a policy has on each node.
    hosts: BTreeMap<PolicyName, BTreeMap<NodeName, usize>>,
    /// As it was last given out.
    given: Option<Arc<Egress>>,
    /// What the programs were told last.
    told: Option<Arc<datapath::Leaving>>,
    /// They were told anything.
    has_told: bool,
    /// The policies with addresses where flows go on and none begins.
    draining: BTreeSet<PolicyName>,
    /// Whose tenants pods were by an earlier process's word.
    earlier: BTreeMap<IpAddr, Was>,
}

impl Plan {
    /// Whether what is known is all there is, or was once.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// The policies that are acted upon.
    pub(super) fn policies(&self) -> impl Iterator<Item = &PolicyName> {
        self.wanted.policies.keys()
    }

    /// As far as it is known by now, but for the gateways.
    pub(super) fn wanted(&self) -> &Egress {
        &self.wanted
    }

    /// Draws conclusions; whether anything came of it.
    fn reconcile(&mut self, index: &mut EgressIndex, me: &NodeName) -> bool {
        self.begun |= index.is_synced();
        let knew_all = !self.draining.is_empty();
        let changed = index.reconcile();
        for policy in &changed.policies {
            let before = self.wanted.policies.remove(policy);
            let gateway = before.and_then(|before| before.gateway);
            let drains = index.draining(policy);
            let addresses = index.addresses_of(policy).collect();
            if drains.is_empty() {
                self.draining.remove(policy);
            } else {
                self.draining.insert(policy.clone());
            }
            let wanted = match index.policy(policy).map(|policy| &policy.spec) {
                Some(spec) => Policy {
                    destinations: spec.destinations.clone(),
                    excluded: spec.excluded.clone(),
                    gateway,
                    ports_per_pod: spec.ports_per_pod,
                    ports: spec.ports,
                    bandwidth: spec.bandwidth,
                    hairpin: spec.hairpin,
                    cuts: spec.on_appear == OldFlows::Cut,
                    addresses,
                    drains: !drains.is_empty(),
                },
                None if drains.is_empty() => {
                    self.forget_former(policy);
                    continue;
                }
                None => Policy::gone(drains, gateway),
            };
            self.wanted.policies.insert(policy.clone(), wanted);
        }
        let drains = !self.draining.is_empty();
        let mut addresses = changed.addresses;
        if drains && !knew_all {
            // Of all pods it matters where they are: whose flows go on is known at their node.
            addresses.extend(index.judged().keys());
        }
        self.networks_moved(!addresses.is_empty());
        let touched = !changed.policies.is_empty();
        for address in &addresses {
            let before = self.wanted.pods.remove(address);
            self.count(before.as_ref(), false);
            let judged = index.judged().get(address);
            let all = before.is_some() || drains || self.earlier.contains_key(address);
            let mut after = judged.and_then(|judged| pod(judged, me, all));
            if let Some(after) = &mut after {
                after.former = self.former(before.as_ref(), after);
            }
            self.count(after.as_ref(), true);
            if let Some(after) = after {
                self.wanted.pods.insert(*address, after);
            }
        }
        if self.begun {
            self.recall();
        }
        let moved = self.inside == Inside::Moved;
        if moved {
            self.inside = Inside::Stale;
        }
        touched || moved && !self.wanted.policies.is_empty()
    }

    /// The policy by whose gateway a pod's flows from before go on, if it is not its tenant any more and that one's flows
    /// go on.
    fn former(&self, before: Option<&Pod>, now: &Pod) -> Option<PolicyName> {
        let before = before.filter(|before| before.identity == now.identity)?;
        let left = before.policy().filter(|was| now.policy() != Some(*was));
        let former = left.or(before.former.as_ref())?;
        self.wanted
            .policies
            .contains_key(former)
            .then(|| former.clone())
    }

    /// The same of pods as they were by an earlier process's word.
    fn recall(&mut self) {
        let named = |hash: u64| {
            let mut names = self.wanted.policies.keys();
            names.find(|name| seed_of(name) == hash).cloned()
        };
        for (address, was) in std::mem::take(&mut self.earlier) {
            let Some(pod) = self.wanted.pods.get_mut(&address) else {
                continue;
            };
            let left = named(was.policy).filter(|left| pod.policy() != Some(left));
            let former = named(was.former);
            if let Some(policy) = &left {
                let earlier = Pod {
                    tenant: Some(Tenant {
                        policy: policy.clone(),
                        egress_ip: None,
                    }),
                    former: former.clone(),
                    ..pod.clone()
                };
                self.wanted.earlier.insert(address, earlier);
            }
            pod.former = left.or(former);
        }
    }

    /// Flows of a policy go on no more.
    fn forget_former(&mut self, policy: &PolicyName) {
        for pod in self.wanted.pods.values_mut() {
            pod.former.take_if(|former| former == policy);
        }
    }

    /// Takes in what an event says of the cluster's own networks.
    pub(super) fn look_at(&mut self, event: &Event) {
        let moved = self.networks.apply(event);
        self.networks_moved(moved);
    }

    /// Takes in which addresses the nodes say they have.
    pub(super) fn tell_networks(&mut self, addresses: BTreeMap<IpAddr, NodeName>) {
        let moved = self.networks.tell(addresses);
        self.networks_moved(moved);
    }

    /// All nodes that are there have spoken.
    pub(super) fn know_networks(&mut self) {
        let moved = self.networks.forget();
        self.networks_moved(moved);
    }

    fn networks_moved(&mut self, moved: bool) {
        if moved {
            self.inside = Inside::Moved;
        }
    }

    fn count(&mut self, pod: Option<&Pod>, more: bool) {
        let Some((pod, tenant)) = pod.and_then(|pod| Some((pod, pod.tenant.as_ref()?))) else {
            return;
        };
        let hosts = self.hosts.entry(tenant.policy.clone()).or_default();
        let count = hosts.entry(pod.node.clone()).or_default();
        if more {
            *count += 1;
            return;
        }
        *count -= 1;
        if *count == 0 {
            hosts.remove(&pod.node);
            if hosts.is_empty() {
                self.hosts.remove(&tenant.policy);
            }
        }
    }
}

/// A judged pod, if this node has anything to do with it, or had: of one that is a tenant no more there may be flows.
fn pod(judged: &Judged, me: &NodeName, had: bool) -> Option<Pod> {
    let node = judged.node.clone()?;
    let tenant = judged.tenant.as_ref().map(|tenant| Tenant {
        policy: tenant.policy.clone(),
        egress_ip: tenant.egress_ip,
    });
    (node == *me || tenant.is_some() || had).then_some(Pod {
        node,
        tenant,
        identity: judged.identity,
        former: None,
    })
}

/// What follows for the packet filter and for the programs.
pub(super) struct Leaving {
    pub(super) rules: Arc<node_rules::Leaving>,
    pub(super) programs: Arc<datapath::Leaving>,
}

impl Speaker {
    /// What follows from it for this node, that has uplinks (by index) to segments with VIPs.
    pub(super) fn leaving(&mut self, uplinks: &BTreeSet<u32>) -> Option<Leaving> {
        let mark = self.identity.egress_mark.filter(|_| !self.is_disarmed())?;
        let egress = self.wanted_egress()?;
        let outside = self.interfaces().iter().filter(|interface| {
            uplinks.contains(&interface.index)
                || interface.default_route.0
                || interface.default_route.1
                || &*interface.name == TUNNEL
        });
        let (names, outside) = outside
            .map(|interface| (interface.name.clone(), interface.index))
            .unzip();
        let around = Arc::new(self.surroundings(uplinks));
        let node = self.identity.node.clone();
        Some(Leaving {
            rules: Arc::new(node_rules::Leaving {
                node: node.clone(),
                egress: egress.clone(),
                uplinks: names,
            }),
            programs: Arc::new(datapath::Leaving {
                node,
                egress,
                outside,
                mark,
                around,
            }),
        })
    }

    /// What an earlier process has left of whose tenants pods were; before anything is listed.
    pub fn recall(&mut self, earlier: Earlier) {
        self.plan.earlier = earlier.tenants;
        self.plan.networks.recall(earlier.inside);
    }

    /// Tells the programs, if it is another thing than before.
    pub(super) fn tell_leaving(&mut self, leaving: Option<Arc<datapath::Leaving>>) {
        if !self.plan.has_told || self.plan.told != leaving {
            self.plan.has_told = true;
            self.plan.told.clone_from(&leaving);
            self.parts.datapath.change(vec![Told::Egress(leaving)]);
        }
    }

    /// Draws conclusions about tenants; whether anything came of it.
    pub(super) fn reconcile_egress(&mut self) -> bool {
        self.plan.reconcile(&mut self.egress, &self.identity.node)
    }

    /// What this node is to do for tenants; nothing while there is no policy.
    fn wanted_egress(&mut self) -> Option<Arc<Egress>> {
        let names: Vec<PolicyName> = self.plan.wanted.policies.keys().cloned().collect();
        if names.is_empty() {
            self.plan.given = None;
            self.metrics.egress_policies_waiting.set(0);
            return None;
        }
        for name in names {
            let found = self.gateway(&name);
            if let Some(policy) = self.plan.wanted.policies.get_mut(&name) {
                match found {
                    Found::Is(gateway) => policy.gateway = Some(gateway),
                    Found::Unknown => {}
                    Found::None => policy.gateway = None,
                }
            }
        }
        let inside = std::mem::take(&mut self.plan.inside);
        if inside != Inside::Same || self.plan.wanted.inside.is_empty() {
            let pods = self.egress.judged().keys().copied();
            self.plan.wanted.inside = self.plan.networks.with(pods);
        }
        let wanted = &self.plan.wanted;
        let waits = |policy: &&Policy| policy.gateway.is_some() && policy.led_to().is_none();
        let waiting = wanted.policies.values().filter(waits).count();
        self.metrics
            .egress_policies_waiting
            .set(i64::try_from(waiting).unwrap_or(i64::MAX));
        if self.plan.given.as_deref() != Some(wanted) {
            self.plan.given = Some(Arc::new(wanted.clone()));
        }
        self.plan.given.clone()
    }

    /// The group of a policy's addresses.
    fn group_of(&self, policy: &PolicyName) -> Option<(IpAddr, Arc<Group>)> {
        // One that pods leave by goes before those that flows are left on.
        let drains = self.egress.draining(policy);
        let addresses = self.egress.addresses_of(policy);
        let address = addresses.min_by_key(|address| drains.contains(address))?;
        let group = &self.index.virtual_ip(address)?.group;
        Some((address, self.index.groups().get(group)?.clone()))
    }

    /// Where a policy's packets leave.
    fn gateway(&mut self, policy: &PolicyName) -> Found {
        let Some((vip, group)) = self.group_of(policy) else {
            return Found::None;
        };
        let Some(view) = self.election.view(&group.id) else {
            return Found::Unknown;
        };
        let Some(leader) = view.leader.clone() else {
            return if view.eligible == 0 {
                Found::None
            } else {
                Found::Unknown
            };
        };
        let epoch = view.epoch;
        let settled = self.election.gates(&leader, &group.id, policy_id(policy));
        let me = self.identity.node.clone();
        self.needs_tunnel_to(policy, &group, &leader);
        let places = self.election.places(&group);
        let place = places
            .get(&vip)
            .and_then(|place| self.interface(&place.name));
        if leader == me {
            return place.map_or(Found::Unknown, |place| {
                Found::Is(Gateway {
                    node: leader,
                    uplink: place.name.clone(),
                    interface: place.index,
                    mac: None,
                    epoch,
                    settled,
                })
            });
        }
        let near = place.and_then(|place| {
            let id = NodeId {
                name: leader.clone(),
                interface: place.index,
            };
            Some((place, self.macs.get(&id)?.0))
        });
        if let Some((place, mac)) = near {
            return Found::Is(Gateway {
                node: leader,
                uplink: place.name.clone(),
                interface: place.index,
                mac: Some(mac),
                epoch,
                settled,
            });
        }
        let Some(interface) = self.tunnel() else {
            return Found::Unknown;
        };
        let mac = tunnel_mac(seed(&leader));
        Found::Is(Gateway {
            node: leader,
            uplink: TUNNEL.into(),
            interface,
            mac: Some(mac),
            epoch,
            settled,
        })
    }

    /// Sees whether a policy needs the tunnel: its gateway, or a node of its tenants, is not on the segment.
    fn needs_tunnel_to(&mut self, policy: &PolicyName, group: &Group, leader: &NodeName) {
        if self.needs_tunnel || !self.is_ready() {
            return;
        }
        let hosts = self.plan.hosts.get(policy).into_iter().flatten();
        let mut nodes: BTreeSet<NodeName> = hosts
            .map(|(node, _)| node)
            .filter(|node| self.election.is_alive(node))
            .cloned()
            .collect();
        nodes.insert(leader.clone());
        if self.election.any_off_segment(group, &nodes) {
            tracing::info!(%policy, "a node of its pods is not on the segment: it is reached by the tunnel {TUNNEL}");
            self.needs_tunnel = true;
        }
    }
}

/// What is known of a gateway.
enum Found {
    /// It.
    Is(Gateway),
    /// There will be one: the last one known goes on.
    Unknown,
    /// There is none, and nobody who could be.
    None,
}
