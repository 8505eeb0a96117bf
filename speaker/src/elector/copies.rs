//! What this node is to those who copy bindings, and what it may do as a gateway.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use landfall_core::groups::{Group, GroupId};
use landfall_core::model::NodeName;

use super::Speaker;
use crate::datapath::egress::{Licence, Standing};
use crate::egress::PolicyName;
use crate::replication::{Copied, Role, Roles};

/// How long a gateway that sees less than half of the nodes goes on with the flows that it has. By then another has taken
/// over, if there is another.
const LEASE: Duration = Duration::from_secs(30);

/// A node whose speaker was stopped counts among the others for so long after that: as a rule it is restarted. Shorter than
/// [`LEASE`], so that stopping most of the speakers ends no flow.
const RESTART: Duration = Duration::from_secs(20);

/// What was found last.
#[derive(Debug)]
pub(super) struct Copies {
    roles: Roles,
    /// Since when this node leads a group of egress addresses.
    led_since: BTreeMap<GroupId, Instant>,
    /// The nodes whose speakers were heard in this run, or who have led by an address's record, as long as they are nodes.
    voters: BTreeSet<NodeName>,
    /// Of these, those whose speakers were stopped, and since when.
    stopped: BTreeMap<NodeName, Duration>,
    /// Since when less than half of them are.
    lonely_since: Option<Duration>,
    /// What this node may do as a gateway.
    licence: Licence,
}

impl Default for Copies {
    fn default() -> Self {
        Self {
            roles: Roles::new(),
            led_since: BTreeMap::new(),
            voters: BTreeSet::new(),
            stopped: BTreeMap::new(),
            lonely_since: None,
            licence: Licence::Full,
        }
    }
}

impl Speaker {
    /// Tells those who copy bindings which groups of egress addresses this node leads, and which it would take over.
    ///
    /// While nobody is known to lead a group it stays as it was: what is copied is what the next one goes on with.
    pub(super) fn tell_roles(&mut self) {
        let Some(copying) = self.parts.copying.clone() else {
            return;
        };
        let mut leaves: BTreeMap<GroupId, Leaves> = BTreeMap::new();
        for policy in self.plan.policies() {
            for address in self.egress.addresses_of(policy) {
                if let Some(vip) = self.index.virtual_ip(address) {
                    let (addresses, policies) = leaves.entry(vip.group.clone()).or_default();
                    addresses.insert(address);
                    policies.insert(policy.clone());
                }
            }
        }
        let mut roles = Roles::new();
        for (group, (addresses, policies)) in leaves {
            let role = match self.role_in(&group) {
                Part::Unknown => self.copies.roles.remove(&group),
                Part::None => None,
                Part::Is { epoch, gateway } => Some(Role {
                    epoch,
                    addresses,
                    policies,
                    gateway,
                }),
            };
            roles.extend(role.map(|role| (group, role)));
        }
        if roles == self.copies.roles {
            return;
        }
        let leads = |group: &GroupId| roles.get(group).is_some_and(|role| role.gateway.is_none());
        let led_since = &mut self.copies.led_since;
        led_since.retain(|group, _| leads(group));
        for group in roles.keys().filter(|group| leads(group)) {
            led_since.entry(group.clone()).or_insert_with(Instant::now);
        }
        self.copies.roles = roles;
        self.stand();
        copying.take_roles(self.copies.roles.clone());
    }

    /// How well the flows of the policies whose gateway this node is are copied, as it was a moment ago.
    pub fn copied(&self) -> Copied {
        let copying = self.parts.copying.as_ref();
        copying.map(|it| it.copied()).unwrap_or_default()
    }

    /// Tells the programs what this node is to egress addresses.
    fn stand(&self) {
        let copies = &self.copies;
        let standings = copies.roles.iter().flat_map(|(group, role)| {
            let standing = match copies.led_since.get(group) {
                Some(since) => Standing::Leads {
                    since: *since,
                    licence: copies.licence,
                },
                None => Standing::StandsBy,
            };
            role.addresses
                .iter()
                .map(move |address| (*address, standing))
        });
        self.parts.datapath.stand(standings.collect());
    }

    fn role_in(&self, group: &GroupId) -> Part {
        let Some(view) = self.election.view(group) else {
            return Part::Unknown;
        };
        // Also if no node can be: what made it so may be over in a moment, as a switch that restarts is.
        let Some(leader) = &view.leader else {
            return Part::Unknown;
        };
        let me = &self.identity.node;
        if leader == me {
            return Part::Is {
                epoch: view.epoch,
                gateway: None,
            };
        }
        if view.standby.as_ref() != Some(me) {
            return Part::None;
        }
        let own = self.identity.gossip;
        let addresses = self.addresses_of(leader);
        let near = addresses
            .iter()
            .find(|address| address.is_ipv4() == own.is_ipv4());
        let Some(address) = near.or(addresses.first()) else {
            return Part::Unknown;
        };
        let at = SocketAddr::new(*address, self.identity.replication_port);
        Part::Is {
            epoch: view.epoch,
            gateway: Some((leader.clone(), at)),
        }
    }

    /// Who leads these groups' egress addresses and stands by, as it was said on record.
    fn on_record(&self, groups: &BTreeSet<GroupId>) -> BTreeSet<NodeName> {
        let groups = groups.iter().filter_map(|id| self.index.groups().get(id));
        let vips = groups
            .filter(|group| !group.egress.is_empty())
            .flat_map(|group| &group.vips)
            .filter_map(|vip| self.index.virtual_ip(vip.address));
        vips.flat_map(|vip| vip.leader.iter().chain(&vip.standby))
            .cloned()
            .collect()
    }

    /// Whether no other node can be a gateway of the same addresses without this one hearing of it.
    pub fn hears_most(&self) -> bool {
        self.copies.licence == Licence::Full
    }

    /// Whether this node is one of a few that hear less than half of the others, and pods leave by the group's addresses: as
    /// its leader it does not announce them, since another may be the gateway where most nodes are.
    pub fn is_few(&self, group: &Group) -> bool {
        !group.egress.is_empty() && !self.hears_most()
    }

    /// Looks what this node may do as a gateway, if nodes came or went or it may do less by now.
    pub(super) fn check_licence(
        &mut self,
        changed: &BTreeSet<GroupId>,
        nodes_changed: bool,
        now: Duration,
    ) {
        if self.identity.egress_mark.is_none() {
            return;
        }
        // A process that begins where it hears nobody may know from the API server who there is.
        let recorded = self.on_record(changed);
        let copies = &mut self.copies;
        let still_counts = |node: &NodeName| copies.voters.contains(node);
        let waits = copies.lonely_since.is_some() || copies.stopped.keys().any(still_counts);
        if !nodes_changed && recorded.is_empty() && !waits {
            return;
        }
        copies.voters.extend(recorded);
        for node in self.election.known() {
            if self.election.is_alive(node) && !copies.voters.contains(node) {
                copies.voters.insert(node.clone());
            }
        }
        if !self.identity.manifests {
            let nodes = self.index.nodes();
            copies.voters.retain(|node| nodes.contains_key(node));
        }
        let known: BTreeSet<&NodeName> = self.election.known().collect();
        // Who is forgotten has not come back.
        copies
            .stopped
            .retain(|node, _| self.election.has_left(node) || !known.contains(node));
        for node in &copies.voters {
            if self.election.has_left(node) && !copies.stopped.contains_key(node) {
                copies.stopped.insert(node.clone(), now);
            }
        }
        let there = |node: &&NodeName| self.election.is_alive(node);
        let stopped = &copies.stopped;
        let is_missed = |node: &NodeName| !there(&node) && !stopped.contains_key(node);
        // Where another has gone without a word, one that was stopped may be back where that one is.
        if !copies.voters.iter().any(is_missed) {
            let is_gone = |at: &Duration| now.saturating_sub(*at) >= RESTART;
            copies
                .voters
                .retain(|node| !stopped.get(node).is_some_and(is_gone));
        }
        let alive = copies.voters.iter().filter(there).count();
        // Half is enough: of two nodes the one that is left goes on.
        let licence = if 2 * alive >= copies.voters.len() {
            copies.lonely_since = None;
            Licence::Full
        } else if now.saturating_sub(*copies.lonely_since.get_or_insert(now)) < LEASE {
            Licence::Frozen
        } else {
            Licence::Silent
        };
        if licence == copies.licence {
            return;
        }
        copies.licence = licence;
        let led = self.election.leaderships();
        self.stale.extend(led.map(|(id, _)| id.clone()));
        let voters = copies.voters.len();
        match licence {
            Licence::Full => tracing::info!(
                alive,
                voters,
                "half of the nodes are there: pods' flows begin again"
            ),
            Licence::Frozen => tracing::warn!(
                alive,
                voters,
                "less than half of the nodes are there: as a gateway this one begins no flows of pods, and does not answer for their addresses, since another may"
            ),
            Licence::Silent => tracing::warn!(
                alive,
                voters,
                "less than half of the nodes have been there for {} s: as a gateway this one ends all flows of pods",
                LEASE.as_secs()
            ),
        }
        self.stand();
    }
}

/// Addresses of a group, and the policies whose pods leave by them.
type Leaves = (BTreeSet<IpAddr>, BTreeSet<PolicyName>);

/// What this node is to a group.
enum Part {
    /// Its gateway, or the next (the gateway and where it is called).
    Is {
        epoch: u64,
        gateway: Option<(NodeName, SocketAddr)>,
    },
    /// Neither.
    None,
    /// That is not known just now.
    Unknown,
}
