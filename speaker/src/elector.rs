//! The loop's single owner of what this node knows and wants.
//!
//! ```text
//!  source, membership, announcer, readiness ──> Speaker ──settle──> announcer, node rules, data path,
//!                                                 │                 membership, statuses to write
//!                                                 ├─ groups    (core)
//!                                                 └─ election  (core)
//! ```
//!
//! It is synchronous: every call returns at once, time is an argument, and all I/O is behind the four seams.

mod attached;
mod calls;
mod copies;
mod debug;
mod desired;
mod early;
mod echo;
pub mod egress;
mod hindered;
mod patient;
pub mod ready;
mod records;
mod shown;
mod steering;
#[cfg(test)]
mod tests;
mod tunnel;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use landfall_core::egress::{self as egress_index, EgressIndex};
use landfall_core::election::{
    BootId, Change, Config as ElectionConfig, Elector, HeldPort, InterfaceFact, Outgoing,
};
use landfall_core::groups::{self, Group, GroupId, GroupIndex, Options};
use landfall_core::model::{Event, Kind, NodeName, Object, ObjectId};
use tokio::sync::watch;

use crate::announcer::{Announcement, Announcer, AnnouncerEvent, Interface, MacAddr, ProbeOutcome};
use crate::datapath::{DataPath, Delivery, Held, NodeId};
use crate::hello::{Hello, HelloError, Opener, seal};
use crate::keys::Keys;
use crate::membership::{Expected, Membership, MembershipEvent};
use crate::metrics::{Metrics, VipLabels, reason_labels};
use crate::node_rules::NodeRules;
use crate::replication::Copying;
use copies::Copies;
use desired::Desired;
use echo::Echo;
use hindered::Hindered;
use ready::{Check, Frontend};
use records::Records;
use steering::Told;

/// Time between two hellos.
pub const HELLO_EVERY: Duration = Duration::from_millis(300);
/// At least so long between two hellos that answer strangers.
const ANSWER_EVERY: Duration = Duration::from_millis(20);
/// Rules and data path follow a change at once, and further ones at most this often.
const APPLY_EVERY: Duration = Duration::from_millis(50);
/// Speakers with another key are logged at most this often.
const STRANGER_EVERY: Duration = Duration::from_mins(1);
/// A conflict that is not seen again is over after this long.
const CONFLICT_LASTS: Duration = Duration::from_secs(30);

/// The kinds of objects that the loop is told of: what elections need, and what tells whose tenants pods are.
pub fn kinds() -> BTreeSet<Kind> {
    groups::KINDS
        .into_iter()
        .chain(egress_index::KINDS)
        .chain([Kind::ServiceCidr])
        .collect()
}

/// What the loop drives.
#[derive(Clone)]
pub struct Parts {
    /// Answers for addresses.
    pub announcer: Arc<dyn Announcer>,
    /// The packet filter and the routes.
    pub rules: Arc<dyn NodeRules>,
    /// The eBPF programs.
    pub datapath: Arc<dyn DataPath>,
    /// The other speakers.
    pub membership: Arc<dyn Membership>,
    /// Copies of bindings, where packets are treated by egress policies.
    pub copying: Option<Arc<dyn Copying>>,
}

/// Who this is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// This node.
    pub node: NodeName,
    /// This run.
    pub boot: BootId,
    /// Objects come from files: there may be no kube-proxy, and host endpoints are delivered here.
    pub manifests: bool,
    /// Who delivers to endpoints that are pods.
    pub delivery: Delivery,
    /// The bits of the packet mark by which egress is judged; nothing, if packets are not treated by it.
    pub egress_mark: Option<u32>,
    /// Where Cilium's maps are, if a program judges it beside that, and no packet filter.
    pub cilium: Option<PathBuf>,
    /// Routers of interfaces that the user has named.
    pub routers: Vec<(String, IpAddr)>,
    /// Where to gossip.
    pub gossip: SocketAddr,
    /// The port at which gateways are called by those who copy their bindings, of all nodes.
    pub replication_port: u16,
    /// Other speakers that were named.
    pub peers: Vec<SocketAddr>,
}

/// Another station that answers for an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Its MAC address.
    pub by: MacAddr,
    /// Found by the probe before the first announcement, which is held back.
    pub held_back: bool,
    seen: Duration,
}

/// What this node knows and wants. See the module's documentation.
#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
pub struct Speaker {
    identity: Identity,
    parts: Parts,
    metrics: Metrics,
    index: GroupIndex,
    /// Whose tenants pods are.
    egress: EgressIndex,
    election: Elector,
    keys: Keys,
    opener: Opener,
    sequence: u64,
    /// Nothing before the announcer has said it.
    interfaces: Option<Arc<[Interface]>>,
    announced: BTreeMap<GroupId, BTreeMap<IpAddr, Announcement>>,
    conflicts: BTreeMap<IpAddr, Conflict>,
    checks: BTreeMap<GroupId, Check>,
    /// What is taken for served where nobody can be asked.
    believed: BTreeMap<GroupId, BTreeSet<Frontend>>,
    /// The health-check ports that are asked, and since when.
    asking: BTreeMap<(GroupId, u16), Duration>,
    /// Which Services of a group this node serves.
    serving: BTreeMap<GroupId, BTreeSet<u64>>,
    /// The groups of which others do not know yet all that this node serves: they are told when the data path has
    /// written this, as soon as it was said to it.
    untold: BTreeMap<GroupId, Option<u64>>,
    written: watch::Receiver<u64>,
    hosts_alive: BTreeSet<SocketAddr>,
    stale: BTreeSet<GroupId>,
    records: Records,
    uplinks: BTreeSet<u32>,
    /// Where addresses could be announced may be elsewhere now.
    places_stale: bool,
    desired: Desired,
    told: Told,
    /// Whether there is a data path or not is known.
    data_path_known: bool,
    /// The programs are at every uplink and know what they need.
    steers: bool,
    /// In its own tables this node serves what it has endpoints of; until when.
    assumes_to_serve: bool,
    assumes_until: Option<Duration>,
    /// The nodes that cannot steer.
    hindered: Hindered,
    /// Where other nodes were heard, by their hellos.
    macs: BTreeMap<NodeId, MacAddr>,
    nodes_stale: bool,
    echoes: BTreeMap<NodeId, Echo>,
    /// Of which buckets this node holds flows that are another's, as it has said.
    held: Arc<Held>,
    /// Who holds flows of these pages is to be told to the data path, once it knows the ports.
    held_pages: BTreeSet<(HeldPort, u16)>,
    apply_at: Option<Duration>,
    applied_at: Duration,
    groups_changed: bool,
    hello_at: Duration,
    /// When a speaker with another key was last logged.
    stranger_at: Option<Duration>,
    answer_at: Duration,
    expected: Expected,
    quiet: bool,
    /// Some living node with endpoints is not on a VIP's segment.
    needs_tunnel: bool,
    /// Pods that leave by addresses of their own.
    plan: egress::Plan,
    copies: Copies,
    /// What the CNI plugin says of this node's pods.
    attached: attached::Attached,
    /// Other nodes' pods, as these know them.
    early: early::Early,
    calls: calls::Calls,
    uses: egress::usage::Uses,
    gates: egress::gates::Gates,
}

impl Speaker {
    /// One that knows nothing yet.
    pub fn new(identity: Identity, parts: Parts, keys: Keys, metrics: Metrics) -> Self {
        let election = Elector::new(
            identity.node.clone(),
            identity.boot,
            ElectionConfig::default(),
        );
        let written = parts.datapath.written();
        let mut speaker = Self {
            index: GroupIndex::new(Options {
                host_endpoints: identity.manifests,
                pod_endpoints: identity.delivery == Delivery::Native,
            }),
            egress: EgressIndex::new(egress_index::Options {
                namespaces_listed: !identity.manifests,
            }),
            attached: attached::Attached::to(identity.node.clone()),
            early: early::Early::default(),
            gates: egress::gates::Gates::of(&parts),
            identity,
            parts,
            metrics,
            election,
            keys,
            opener: Opener::default(),
            sequence: 0,
            interfaces: None,
            announced: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            checks: BTreeMap::new(),
            believed: BTreeMap::new(),
            asking: BTreeMap::new(),
            serving: BTreeMap::new(),
            untold: BTreeMap::new(),
            written,
            hosts_alive: BTreeSet::new(),
            stale: BTreeSet::new(),
            records: Records::default(),
            uplinks: BTreeSet::new(),
            places_stale: false,
            desired: Desired::default(),
            told: Told::default(),
            data_path_known: false,
            steers: false,
            hindered: Hindered::default(),
            macs: BTreeMap::new(),
            nodes_stale: false,
            echoes: BTreeMap::new(),
            held: Arc::default(),
            held_pages: BTreeSet::new(),
            apply_at: None,
            applied_at: Duration::ZERO,
            groups_changed: true,
            hello_at: Duration::ZERO,
            stranger_at: None,
            answer_at: Duration::ZERO,
            expected: Expected::new(),
            quiet: false,
            needs_tunnel: false,
            plan: egress::Plan::default(),
            copies: Copies::default(),
            calls: calls::Calls::default(),
            uses: egress::usage::Uses::default(),
            assumes_to_serve: true,
            assumes_until: None,
        };
        speaker.show_keys();
        speaker
    }

    /// Whether the sources were listed and the listening is over.
    pub fn is_ready(&self) -> bool {
        self.index.is_synced() && !self.election.is_listening()
    }

    /// Takes in what the source says.
    pub fn source(&mut self, event: Event) {
        self.places_stale |= match &event {
            Event::Apply(object) => {
                matches!(object, Object::Pool(_) | Object::Advertisement(_))
            }
            Event::Delete(id) => matches!(id, ObjectId::Pool(_) | ObjectId::Advertisement(_)),
            Event::Synced(_) | Event::Unwatched(_) => false,
        };
        self.plan.look_at(&event);
        let adapted = self.attached.adapt(&event);
        if let Some(Event::Apply(Object::Pod(own))) = &adapted {
            self.early.forget(&own.key);
        }
        match adapted.or_else(|| self.early.adapt(&event, &self.egress)) {
            Some(adapted) => self.egress.apply(adapted),
            None => self.egress.apply_shared(&event),
        }
        self.say_pod_of(&event);
        if let Event::Apply(Object::VirtualIp(record)) = &event
            && record.leader.as_ref() == Some(self.election.me())
        {
            self.records.confirm(record);
        }
        self.index.apply(event);
        if self.index.is_synced() {
            self.election.set_synced();
        }
    }

    /// Takes in what membership says.
    pub fn membership(&mut self, event: MembershipEvent, now: Duration) {
        match event {
            MembershipEvent::Alive { node, boot } => {
                self.election.peer_alive(&node, boot);
                let greeting = self.election.greet(&node);
                self.send(greeting);
            }
            MembershipEvent::Dead { node } => self.election.peer_dead(&node),
            MembershipEvent::Frame(frame) => {
                let answers = self.election.receive(&frame, now);
                self.send(answers);
            }
        }
    }

    /// Takes in what the announcer says.
    pub fn announcer(&mut self, event: AnnouncerEvent, now: Duration) {
        match event {
            AnnouncerEvent::Interfaces(interfaces) => {
                self.interfaces = Some(interfaces);
                self.election.set_interfaces(self.facts());
                self.stale.extend(self.announced.keys().cloned());
                self.apply_at.get_or_insert(now);
            }
            AnnouncerEvent::Probed { vip, outcome } => match outcome {
                ProbeOutcome::Free => {
                    if self.conflicts.remove(&vip).is_some() {
                        self.look_again(vip);
                    }
                }
                ProbeOutcome::Taken { by } => self.conflict(vip, by, true, now),
            },
            AnnouncerEvent::Conflict { vip, by, interface } => {
                tracing::warn!(%vip, %by, interface = &*interface, "another station answers for a VIP");
                self.conflict(vip, by, false, now);
            }
            AnnouncerEvent::Hello {
                interface,
                from,
                payload,
            } => {
                if !self.echo(interface, from, &payload, now) {
                    self.hello(interface, from, &payload, now);
                }
            }
        }
    }

    fn conflict(&mut self, vip: IpAddr, by: MacAddr, held_back: bool, now: Duration) {
        self.metrics.conflicts.inc();
        let conflict = Conflict {
            by,
            held_back,
            seen: now,
        };
        self.conflicts.insert(vip, conflict);
        self.look_again(vip);
    }

    /// What is said of an announced address may be another thing now.
    fn look_again(&mut self, vip: IpAddr) {
        let mut groups = self.announced.iter();
        if let Some((id, _)) = groups.find(|(_, vips)| vips.contains_key(&vip)) {
            self.stale.insert(id.clone());
        }
    }

    fn hello(&mut self, interface: u32, from: MacAddr, payload: &[u8], now: Duration) {
        let Some(name) = self.name_of(interface) else {
            return;
        };
        let outcome = match self.opener.open(payload, interface, &self.keys) {
            Ok(hello) => {
                self.heard_from(&hello.node, interface, from);
                let stranger = self.election.hello(&hello.node, hello.boot, &name, now);
                if stranger && now >= self.answer_at {
                    self.answer_at = now + ANSWER_EVERY;
                    self.say_hello(&[interface]);
                }
                "accepted"
            }
            Err(HelloError::Malformed) => "malformed",
            Err(HelloError::Key) => {
                if self
                    .stranger_at
                    .is_none_or(|at| now.saturating_sub(at) >= STRANGER_EVERY)
                {
                    self.stranger_at = Some(now);
                    tracing::warn!(interface = &*name, %from, "a speaker with another gossip key is on the segment: it elects leaders of its own");
                }
                "other-key"
            }
            Err(HelloError::Replayed) => "replayed",
        };
        self.metrics
            .hellos_received
            .get_or_create(&reason_labels(outcome))
            .inc();
    }

    fn say_hello(&mut self, interfaces: &[u32]) {
        if self.quiet {
            return;
        }
        for interface in interfaces {
            self.sequence += 1;
            let hello = Hello {
                node: self.identity.node.clone(),
                boot: self.identity.boot,
                sequence: self.sequence,
            };
            self.parts
                .announcer
                .hello(*interface, None, &seal(&hello, &self.keys));
            self.metrics.hellos_sent.inc();
        }
    }

    /// Takes over new keys.
    pub fn rekey(&mut self, keys: Keys) {
        if keys == self.keys {
            return;
        }
        tracing::info!(
            primary = keys.primary().id(),
            keys = keys.all().len(),
            "new gossip keys"
        );
        self.parts.membership.rekey(&keys);
        if let Some(copying) = &self.parts.copying {
            copying.rekey(keys.clone());
        }
        self.keys = keys;
        self.show_keys();
    }

    /// Begins to stop: hands over what others can take.
    pub fn leave(&mut self) {
        self.election.leave();
    }

    /// Whether anything is left that another node could take over.
    pub fn is_drained(&self) -> bool {
        self.election
            .leaderships()
            .all(|(id, _)| self.election.view(id).is_none_or(|view| view.eligible == 0))
    }

    /// Falls silent for good.
    pub fn silence(&mut self) {
        self.quiet = true;
        for (_, vips) in std::mem::take(&mut self.announced) {
            for vip in vips.into_keys() {
                self.parts.announcer.withdraw(vip);
            }
        }
        self.parts.announcer.listen(&[]);
    }

    /// Draws conclusions and makes them so. Returns the groups whose status may have changed.
    pub fn settle(&mut self, now: Duration, wall: u64) -> BTreeSet<GroupId> {
        let changed = self.index.reconcile();
        if !changed.is_empty() {
            self.gates.look_again();
            self.apply_soon(now);
            self.update_expected();
        }
        self.hear_pods(now);
        if self.reconcile_egress() | std::mem::take(&mut self.places_stale) {
            self.gates.look_again();
            self.apply_soon(now);
        }
        let over = |conflict: &Conflict| {
            !conflict.held_back && now.saturating_sub(conflict.seen) >= CONFLICT_LASTS
        };
        let past: Vec<IpAddr> = self
            .conflicts
            .extract_if(.., |_, conflict| over(conflict))
            .map(|(vip, _)| vip)
            .collect();
        for vip in past {
            self.look_again(vip);
        }
        self.check_ready(&changed, now);
        self.check_steers(now);
        self.ask_echoes(now);
        self.tell_serving();
        self.say_held();
        self.say_gates();
        self.look_at_gateway(now);
        self.answer_nodes();
        let tick = self.election.tick(now, wall, &self.index, &changed);
        self.send(tick.frames);
        if !self.election.is_listening() {
            self.plan.know_networks();
        }
        if tick.all {
            let addresses = self.election.addresses();
            if self.identity.manifests {
                self.index.tell_addresses(addresses.clone());
            }
            self.plan.tell_networks(addresses);
            self.desired.forget();
            self.apply_soon(now);
        }
        if tick.all || std::mem::take(&mut self.nodes_stale) {
            self.tell_nodes();
        }
        self.check_licence(&changed, tick.all, now);
        self.look_who_is_hindered(tick.all, now);
        self.held_pages.extend(tick.held);
        if self.told.is_complete() && !self.held_pages.is_empty() {
            let pages = std::mem::take(&mut self.held_pages);
            self.tell_holders(pages);
        }
        if !tick.heard.is_empty() {
            self.desired.touch(&tick.heard);
            self.apply_soon(now);
        }
        self.desired.touch(&changed);
        for lost in tick.lost {
            self.metrics.detection.observe(lost.unheard.as_secs_f64());
            tracing::warn!(peer = %lost.node, unheard = ?lost.unheard, "a speaker is heard on no interface any more");
        }
        let mut touched = changed;
        touched.append(&mut self.stale);
        let used = self.look_at_usage(now);
        for change in tick.changes {
            touched.insert(self.conclude(change));
        }
        for id in &touched {
            self.announce(id);
        }
        self.groups_changed |= !touched.is_empty();
        if self.apply_due().is_some_and(|at| now >= at) {
            self.apply_at = None;
            self.applied_at = now;
            self.apply();
        }
        self.tell_mark();
        self.answer_calls();
        touched.extend(used);
        if now >= self.hello_at {
            self.hello_at = now + HELLO_EVERY;
            let uplinks: Vec<u32> = self.uplinks.iter().copied().collect();
            self.say_hello(&uplinks);
            self.show_peers();
            if std::mem::take(&mut self.groups_changed) {
                self.show_groups();
            }
        }
        touched
    }

    /// When [`Speaker::settle`] should be called next, for what it gathers. Before the sources were listed and the
    /// interfaces are known, what an earlier run left in the kernel is right, and nothing here is.
    pub fn apply_due(&self) -> Option<Duration> {
        let tenants_known = self.identity.egress_mark.is_none() || self.plan.has_begun();
        let known = self.index.is_synced() && self.interfaces.is_some() && tenants_known;
        self.apply_at.filter(|_| known)
    }

    /// The interfaces, as far as they are known.
    fn interfaces(&self) -> &[Interface] {
        self.interfaces.as_deref().unwrap_or_default()
    }

    fn apply_soon(&mut self, now: Duration) {
        let every = if self.is_waited_for() {
            calls::CALLS_EVERY
        } else {
            APPLY_EVERY
        };
        let soonest = now.max(self.applied_at + every);
        let at = self.apply_at.get_or_insert(soonest);
        *at = soonest.min(*at);
    }

    fn conclude(&mut self, change: Change) -> GroupId {
        match &change {
            Change::Lead(id) => self.note_found(id),
            Change::Quit(id) => self.records.forget(id),
            _ => {}
        }
        let count = |word: &str| {
            self.metrics
                .transitions
                .get_or_create(&reason_labels(word))
                .inc();
        };
        match change {
            Change::Lead(id) => {
                if let Some(lead) = self.election.leadership(&id)
                    && !self.announced.contains_key(&id)
                {
                    count("taken");
                    self.metrics.takeover.observe(lead.vacant.as_secs_f64());
                    let previous = lead.previous.as_ref().map_or("nobody", |node| &node.0);
                    tracing::info!(group = &*id, epoch = lead.epoch, previous, "leads now");
                }
                id
            }
            Change::Quit(id) => {
                count("given-up");
                tracing::info!(group = &*id, "leads no longer");
                id
            }
            Change::Reannounce(id) => {
                count("contested");
                for vip in self.announced.get(&id).into_iter().flat_map(BTreeMap::keys) {
                    self.parts.announcer.reannounce(*vip);
                }
                id
            }
            Change::Seen(id) => id,
        }
    }

    /// Makes what is announced of a group what this node leads of it.
    fn announce(&mut self, id: &GroupId) {
        let wanted = self.announcements(id);
        let current = self.announced.remove(id).unwrap_or_default();
        for (vip, announcement) in &wanted {
            if current.get(vip) != Some(announcement) {
                self.parts.announcer.announce(announcement.clone());
            }
        }
        for (vip, announcement) in &current {
            if !wanted.contains_key(vip) {
                self.parts.announcer.withdraw(*vip);
                self.conflicts.remove(vip);
            }
            if wanted.get(vip).map(|wanted| wanted.interface) != Some(announcement.interface)
                && let Some(labels) = self.vip_labels(*vip, announcement.interface)
            {
                self.metrics.leads.remove(&labels);
            }
        }
        for (vip, announcement) in &wanted {
            if let Some(labels) = self.vip_labels(*vip, announcement.interface) {
                self.metrics.leads.get_or_create(&labels).set(1);
            }
        }
        if !wanted.is_empty() {
            self.announced.insert(id.clone(), wanted);
        }
    }

    fn vip_labels(&self, vip: IpAddr, interface: u32) -> Option<VipLabels> {
        Some(VipLabels {
            vip: vip.to_string(),
            interface: self.name_of(interface)?.to_string(),
        })
    }

    fn name_of(&self, interface: u32) -> Option<Arc<str>> {
        self.interfaces()
            .iter()
            .find(|known| known.index == interface)
            .map(|known| known.name.clone())
    }

    fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces().iter().find(|known| &*known.name == name)
    }

    /// What the election should know of the interfaces: no ports of bonds and bridges.
    fn facts(&self) -> Vec<InterfaceFact> {
        self.interfaces()
            .iter()
            .filter(|interface| !interface.enslaved)
            .map(|interface| InterfaceFact {
                name: interface.name.clone(),
                mac: interface.mac.0,
                addresses: interface.addresses.iter().map(ipnet::IpNet::addr).collect(),
                subnets: interface
                    .addresses
                    .iter()
                    .map(ipnet::IpNet::trunc)
                    .collect(),
                up: interface.up,
                default_route: interface.default_route,
                heard: BTreeSet::new(),
            })
            .collect()
    }

    fn send(&mut self, frames: Vec<Outgoing>) {
        for out in frames {
            self.metrics.frames_sent.inc();
            self.parts
                .membership
                .send(out.to.as_ref(), out.frame.into());
        }
    }

    /// Whom to call: the speakers of all nodes, and those that were named.
    fn update_expected(&mut self) {
        let port = self.identity.gossip.port();
        let mut expected: Expected = self
            .identity
            .peers
            .iter()
            .map(|address| (*address, None))
            .collect();
        for node in self.index.nodes().values() {
            if node.name != self.identity.node
                && let Some(address) = node
                    .addresses
                    .iter()
                    .find(|address| address.is_ipv4() == self.identity.gossip.is_ipv4())
            {
                let address = SocketAddr::new(*address, port);
                expected.insert(address, Some(node.name.clone()));
            }
        }
        expected.remove(&self.identity.gossip);
        if expected != self.expected {
            self.parts.membership.expect(expected.clone());
            self.expected = expected;
        }
    }

    /// Calls the speakers that are known at the start.
    pub fn call(&mut self) {
        self.update_expected();
    }

    /// The groups, for those who write statuses.
    pub fn group(&self, id: &str) -> Option<&Arc<Group>> {
        self.index.groups().get(id)
    }

    /// The election, for those who write statuses.
    pub fn election(&self) -> &Elector {
        &self.election
    }

    /// The index, for those who write statuses.
    pub fn index(&self) -> &GroupIndex {
        &self.index
    }

    /// Whose tenants pods are, and which addresses they leave by.
    pub fn egress(&self) -> &EgressIndex {
        &self.egress
    }

    /// Who else answers for an address.
    pub fn conflict_of(&self, vip: IpAddr) -> Option<&Conflict> {
        self.conflicts.get(&vip)
    }

    /// The Ethernet address of an interface.
    pub fn mac_of(&self, interface: &str) -> Option<MacAddr> {
        self.interface(interface).map(|known| known.mac)
    }
}
