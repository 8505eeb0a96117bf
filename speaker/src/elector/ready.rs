//! Whether what reaches this node would be served: its rules come later than the slice that asks for them.
//!
//! In this order: the health-check port of a Service with `externalTrafficPolicy: Local`, kube-proxy's own map,
//! and where neither can be asked, two seconds. A process of this node is asked by connecting to it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use landfall_core::groups::{Group, GroupId, GroupService};

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

/// Whom the loop should ask by the network: health-check ports, and processes of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Questions {
    /// Health-check ports of this node, by group.
    pub health: BTreeSet<(GroupId, u16)>,
    /// Processes of this node.
    pub hosts: BTreeSet<SocketAddr>,
}

impl Speaker {
    /// Looks at the groups that changed, and again at those that were not served yet.
    pub(super) fn check_ready(&mut self, changed: &BTreeSet<GroupId>, now: Duration) {
        for id in changed {
            match self.index.groups().get(id) {
                Some(_) => {
                    let check = self.checks.entry(id.clone()).or_insert(Check {
                        since: now,
                        next: now,
                    });
                    check.next = now;
                }
                None => {
                    self.checks.remove(id);
                }
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
            self.election.set_ready(&id, ready);
            if ready {
                self.checks.remove(&id);
            } else if let Some(check) = self.checks.get_mut(&id) {
                check.next = now + LOOK_EVERY;
            }
        }
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
        let mut blind = false;
        for vip in &group.vips {
            for port in &service.ports {
                let known =
                    self.parts
                        .rules
                        .kube_proxy_serves(vip.address, port.protocol, port.port);
                match known {
                    Some(false) => return false,
                    Some(true) => {}
                    None => blind = true,
                }
            }
        }
        !blind || self.identity.manifests || waited >= BLIND
    }

    /// A health-check port answered that its Service has endpoints here.
    pub fn served(&mut self, id: &GroupId) {
        self.checks.remove(id);
        self.election.set_ready(id, true);
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

    /// Whom to ask now; `hosts` says whether processes of this node are among them.
    pub fn questions(&self, hosts: bool) -> Questions {
        let mut questions = Questions::default();
        for id in self.checks.keys() {
            let Some(group) = self.index.groups().get(id) else {
                continue;
            };
            // One Service alone on its addresses: its word is the group's.
            if let [service] = group.services.as_slice()
                && service.health_check_node_port != 0
                && service
                    .local_nodes
                    .as_ref()
                    .is_some_and(|nodes| nodes.contains(&self.identity.node))
            {
                questions
                    .health
                    .insert((id.clone(), service.health_check_node_port));
            }
        }
        if hosts && self.identity.manifests {
            questions.hosts = self
                .index
                .groups()
                .values()
                .flat_map(|group| &group.services)
                .flat_map(|service| service.host_endpoints.values())
                .filter_map(|nodes| nodes.get(&self.identity.node))
                .flatten()
                .copied()
                .collect();
        }
        questions
    }
}
