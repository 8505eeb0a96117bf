//! Whether what reaches this node would be served: its rules come later than the slice that asks for them.
//!
//! In this order: the health-check port of a Service with `externalTrafficPolicy: Local`, kube-proxy's own map,
//! and where neither can be asked, two seconds. A process of this node is asked by connecting to it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use landfall_core::election::service_id;
use landfall_core::groups::{Group, GroupId, GroupService};
use landfall_core::model::Protocol;

use super::Speaker;

/// A group that is not served yet is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Where nobody can be asked, a slice is believed after this long.
const BLIND: Duration = Duration::from_secs(2);

/// What is known about a group that is not served here yet.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    since: Duration,
    next: Duration,
}

/// What a health-check port says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Packets reach an endpoint of this node.
    Serving,
    /// They do not.
    NotServing,
    /// Nobody answers.
    Silent,
}

/// What clients send to, and kube-proxy has rules for.
pub(super) type Frontend = (IpAddr, Protocol, u16);

fn frontends(group: &Group, service: &GroupService) -> impl Iterator<Item = Frontend> {
    group.vips.iter().flat_map(|vip| {
        let ports = service.ports.iter();
        ports.map(|port| (vip.address, port.protocol, port.port))
    })
}

impl Speaker {
    /// Looks at the groups that changed, and again at those that were not served yet.
    pub(super) fn check_ready(&mut self, changed: &BTreeSet<GroupId>, now: Duration) {
        for id in changed {
            if self.index.groups().contains_key(id) {
                let check = self.checks.entry(id.clone()).or_insert(Check {
                    since: now,
                    next: now,
                });
                check.next = now;
            } else {
                self.checks.remove(id);
                self.believed.remove(id);
                self.serving.remove(id);
                self.untold.remove(id);
                self.asking.retain(|(asked, _), _| asked != id);
            }
        }
        let due: Vec<(GroupId, Duration)> = self
            .checks
            .iter()
            .filter(|(_, check)| check.next <= now)
            .map(|(id, check)| (id.clone(), check.since))
            .collect();
        for (id, since) in due {
            let Some(group) = self.index.groups().get(&id).cloned() else {
                self.checks.remove(&id);
                continue;
            };
            let ready = self.is_served(&group, now.saturating_sub(since));
            self.note_ready(&group, ready);
            self.note_serves(&group, ready, now);
            self.believe(&group, ready);
            if ready {
                self.checks.remove(&id);
            } else if let Some(check) = self.checks.get_mut(&id) {
                check.next = now + LOOK_EVERY;
            }
        }
    }

    /// Who cannot steer yet leaves the leadership of what is steered to those who can, if there are any.
    fn note_ready(&mut self, group: &Group, ready: bool) {
        let steers = self.steers || !group.steers();
        self.election.set_ready(&group.id, ready && steers);
    }

    /// Looks at all groups again.
    pub(super) fn check_all(&mut self, now: Duration) {
        let all = self.index.groups().keys().cloned().collect();
        self.check_ready(&all, now);
    }

    /// Which Services of a group reach an endpoint from here. Where a health-check port says so, it is asked, and what
    /// it said stands until this node has no endpoint any more.
    fn note_serves(&mut self, group: &Group, ready: bool, now: Duration) {
        let me = &self.identity.node;
        let mut serves = BTreeSet::new();
        for service in &group.services {
            let id = service_id(&service.key);
            let served = self.serves_here(&group.id, id);
            let asked = self.health_port(service);
            let question = (group.id.clone(), asked.unwrap_or_default());
            if !service.endpoint_nodes.contains(me) {
                self.asking.remove(&question);
            } else if served || (ready && asked.is_none() && self.data_path_known) {
                serves.insert(id);
            } else if asked.is_some() && self.data_path_known {
                self.asking.entry(question).or_insert(now);
            }
        }
        self.set_serving(&group.id, serves, now);
    }

    /// Whether this node serves a Service of a group; others may not know it yet.
    pub(super) fn serves_here(&self, group: &GroupId, service: u64) -> bool {
        let services = self.serving.get(group);
        services.is_some_and(|services| services.contains(&service))
    }

    /// Says which Services of a group this node serves. What is served no more others are told at once; what is served
    /// now, when the tables of this node have it: it would drop what they send here sooner.
    fn set_serving(&mut self, id: &GroupId, services: BTreeSet<u64>, now: Duration) {
        let before = self.serving.insert(id.clone(), services.clone());
        if before.unwrap_or_default() == services {
            return;
        }
        let known = |service: &u64| self.election.serves(&self.identity.node, id, *service);
        let (known, new): (BTreeSet<u64>, BTreeSet<u64>) = services.into_iter().partition(known);
        self.election.set_serves(id, known);
        if new.is_empty() {
            self.untold.remove(id);
        } else {
            self.untold.insert(id.clone(), None);
        }
        self.desired.touch(&BTreeSet::from([id.clone()]));
        self.apply_soon(now);
    }

    /// Tells the others what this node serves and its tables have.
    pub(super) fn tell_serving(&mut self) {
        if self.untold.is_empty() {
            return;
        }
        let written = *self.written.borrow();
        let ready = |_: &GroupId, number: &mut Option<u64>| number.is_some_and(|it| it <= written);
        for (id, _) in self.untold.extract_if(.., ready) {
            let services = self.serving.get(&id).cloned().unwrap_or_default();
            self.election.set_serves(&id, services);
        }
    }

    /// The port by which kube-proxy tells whether it delivers a Service's packets to endpoints of this node.
    fn health_port(&self, service: &GroupService) -> Option<u16> {
        let asks = !self.identity.manifests
            && !self.is_native()
            && service.local_nodes.is_some()
            && service.health_check_node_port != 0;
        asks.then_some(service.health_check_node_port)
    }

    fn is_served(&self, group: &Group, waited: Duration) -> bool {
        group
            .services
            .iter()
            .all(|service| self.serves(group, service, waited))
    }

    fn serves(&self, group: &Group, service: &GroupService, waited: Duration) -> bool {
        if service.endpoint_nodes.is_empty() {
            return true; // Nothing is to be served anywhere.
        }
        if !service.host_endpoints.is_empty() {
            return service.host_endpoints.values().all(|nodes| {
                nodes
                    .get(&self.identity.node)
                    .is_some_and(|endpoints| !endpoints.is_disjoint(&self.hosts_alive))
            });
        }
        if self.is_native() {
            return self.steers;
        }
        let believed = self.believed.get(&group.id);
        let mut blind = false;
        for frontend in frontends(group, service) {
            let (vip, protocol, port) = frontend;
            match self.parts.rules.kube_proxy_serves(vip, protocol, port) {
                Some(false) => return false,
                Some(true) => {}
                None => blind |= !believed.is_some_and(|known| known.contains(&frontend)),
            }
        }
        !blind || self.identity.manifests || waited >= BLIND
    }

    /// Where nobody can be asked, rules that were waited for once are there until the last endpoint goes, whatever
    /// else changes.
    fn believe(&mut self, group: &Group, ready: bool) {
        let blind = |(vip, protocol, port): &Frontend| {
            let known = self.parts.rules.kube_proxy_serves(*vip, *protocol, *port);
            known.is_none()
        };
        let with_endpoints = group
            .services
            .iter()
            .filter(|service| !service.endpoint_nodes.is_empty());
        let mut known: BTreeSet<Frontend> = with_endpoints
            .flat_map(|service| frontends(group, service))
            .filter(blind)
            .collect();
        if !ready {
            let before = self.believed.get(&group.id);
            known.retain(|frontend| before.is_some_and(|before| before.contains(frontend)));
        }
        if known.is_empty() {
            self.believed.remove(&group.id);
        } else {
            self.believed.insert(group.id.clone(), known);
        }
    }

    /// What a health-check port of this node said.
    pub fn health(&mut self, id: &GroupId, port: u16, answer: Health, now: Duration) {
        let Some(since) = self.asking.get(&(id.clone(), port)).copied() else {
            return;
        };
        let Some(group) = self.index.groups().get(id).cloned() else {
            self.asking.remove(&(id.clone(), port));
            return;
        };
        let serves = match answer {
            Health::Serving => true,
            Health::NotServing => false,
            // Nobody listens there: kube-proxy's stand-in has no such port.
            Health::Silent => {
                self.is_served(&group, now.saturating_sub(since))
                    && now.saturating_sub(since) >= BLIND
            }
        };
        if !serves {
            return;
        }
        self.asking.remove(&(id.clone(), port));
        let of_port = group
            .services
            .iter()
            .filter(|service| service.health_check_node_port == port)
            .map(|service| service_id(&service.key));
        let before = group
            .services
            .iter()
            .map(|service| service_id(&service.key))
            .filter(|service| self.serves_here(id, *service));
        let serves: BTreeSet<u64> = of_port.chain(before).collect();
        if serves.len() == group.services.len() {
            self.checks.remove(id);
            self.note_ready(&group, true);
            self.believe(&group, true);
        }
        self.set_serving(id, serves, now);
    }

    /// Whether a process of this node takes connections.
    pub fn host_endpoint(&mut self, endpoint: SocketAddr, alive: bool, now: Duration) {
        let changed = if alive {
            self.hosts_alive.insert(endpoint)
        } else {
            self.hosts_alive.remove(&endpoint)
        };
        if !changed {
            return;
        }
        self.apply_at.get_or_insert(now);
        for (id, group) in self.index.groups() {
            let concerns = group.services.iter().any(|service| {
                service
                    .host_endpoints
                    .values()
                    .any(|nodes| nodes.values().any(|known| known.contains(&endpoint)))
            });
            if concerns {
                self.desired.touch(&BTreeSet::from([id.clone()]));
                self.checks.insert(
                    id.clone(),
                    Check {
                        since: now,
                        next: now,
                    },
                );
            }
        }
    }

    /// The health-check ports of this node that are to be asked now, by group.
    pub fn health_questions(&self) -> impl ExactSizeIterator<Item = &(GroupId, u16)> {
        self.asking.keys()
    }

    /// The processes of this node that are to be asked now.
    pub fn host_questions(&self) -> BTreeSet<SocketAddr> {
        if !self.identity.manifests {
            return BTreeSet::new();
        }
        self.index
            .groups()
            .values()
            .flat_map(|group| &group.services)
            .flat_map(|service| service.host_endpoints.values())
            .filter_map(|nodes| nodes.get(&self.identity.node))
            .flatten()
            .copied()
            .collect()
    }
}
