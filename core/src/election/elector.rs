//! The state machine of one node's part in the election.
//!
//! Facts come in by methods that return at once; [`Elector::tick`] draws the conclusions. It looks at groups
//! whose inputs changed, and at those that wait for a time to pass; all others cost nothing.

mod claims;
mod gates;
mod gossiping;
mod liveness;
mod load;
mod pods;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::eligibility::{
    Ineligible, InterfaceChoice, Segments, Subject, Verdict, judge, judge_for,
};
use super::gossip::Registers;
use super::peer::{
    BootId, Claim, ClaimMode, GroupRegister, HELD_PAGE, HeldPage, HeldPort, InterfaceFact,
    NodeRegister, Topic, Word,
};
use crate::groups::{Group, GroupId, GroupIndex};
use crate::model::{NodeName, ObjectKey};
use liveness::Peer;
pub use liveness::{Lost, PeerView};
use table::Table;

/// The times and bounds of the election.
#[derive(Clone, Debug)]
pub struct Config {
    /// At least so long a new speaker listens before it claims.
    pub listen: Duration,
    /// At most so long it waits for the state of peers that live.
    pub listen_at_most: Duration,
    /// A node unheard for so long is not on the segment.
    pub hello_lost: Duration,
    /// When no node serves a group yet, the hash's choice leads it after so long.
    pub ready_grace: Duration,
    /// A group without history waits so long for the hash's choice before another node that is ready takes it.
    pub settle: Duration,
    /// When the one that should claim does not, the next in rank does after so long, and so on.
    pub stand_in: Duration,
    /// A leader that yields takes the group back, or drops it, after so long.
    pub yield_at_most: Duration,
    /// Inputs that differ from the majority's for so long cost a node its leaderships.
    pub odd_after: Duration,
    /// A better node must have been there for so long before a group fails back to it.
    pub failback_after: Duration,
    /// How much more than its share a node may lead, in percent.
    pub overload_percent: u32,
    /// An overload must last so long before groups are given away.
    pub overload_after: Duration,
    /// The time between two groups given away.
    pub rebalance_every: Duration,
    /// A node that died so often within [`Config::flap_window`] goes last.
    pub flaps: usize,
    /// See [`Config::flaps`].
    pub flap_window: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            listen: ms(500),
            listen_at_most: ms(3_000),
            hello_lost: ms(1_000),
            ready_grace: ms(3_000),
            settle: ms(150),
            stand_in: ms(1_000),
            yield_at_most: ms(2_000),
            odd_after: ms(2_000),
            failback_after: ms(5_000),
            overload_percent: 130,
            overload_after: ms(300_000),
            rebalance_every: ms(10_000),
            flaps: 3,
            flap_window: ms(120_000),
        }
    }
}

/// What became of a group at this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// This node leads it now, or leads it elsewhere than before: see [`Elector::leadership`].
    Lead(GroupId),
    /// This node leads it no longer.
    Quit(GroupId),
    /// Another node claimed it too, and lost: announce once more.
    Reannounce(GroupId),
    /// Another node leads it, or nobody, or nobody could: see [`Elector::leader`].
    Seen(GroupId),
}

/// A frame for the gossip to carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The receiver; every living peer when absent.
    pub to: Option<NodeName>,
    /// The frame.
    pub frame: Vec<u8>,
}

/// The conclusions of one look at things.
#[derive(Debug, Default)]
pub struct Tick {
    /// What became of groups.
    pub changes: Vec<Change>,
    /// Every group was looked at: a fact about nodes or interfaces changed.
    pub all: bool,
    /// The groups of which somebody said something new.
    pub heard: BTreeSet<GroupId>,
    /// The pages of buckets of which somebody holds other flows than before.
    pub held: BTreeSet<(HeldPort, u16)>,
    /// What to send.
    pub frames: Vec<Outgoing>,
    /// Peers that fell silent without having left.
    pub lost: Vec<Lost>,
}

/// A group this node leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leadership {
    /// The claim's epoch.
    pub epoch: u64,
    /// Milliseconds since the Unix epoch at which it began.
    pub since: u64,
    /// Where each address is announced.
    pub interfaces: BTreeMap<IpAddr, InterfaceChoice>,
    /// Nobody announced the group before, as far as is known: probe first.
    pub first: bool,
    /// Who led it before.
    pub previous: Option<NodeName>,
    /// How long it had no leader, as far as this node saw.
    pub vacant: Duration,
}

/// Who leads a group, as this node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The leader.
    pub leader: Option<NodeName>,
    /// Next in rank.
    pub standby: Option<NodeName>,
    /// The leader's epoch.
    pub epoch: u64,
    /// Milliseconds since the Unix epoch at which it began.
    pub since: u64,
    /// How many nodes could lead.
    pub eligible: usize,
}

/// What this node keeps about a group beyond its register.
#[derive(Debug, Default)]
struct Local {
    ready: bool,
    serves: BTreeSet<u64>,
    gates: BTreeSet<u64>,
    seen: u64,
    view: View,
    leadership: Option<Leadership>,
    vacant_since: Option<Duration>,
    yield_since: Option<Duration>,
    odd_since: Option<Duration>,
    better_since: Option<(NodeName, Duration)>,
    contested: bool,
    last_leader: Option<NodeName>,
}

/// One node's part in the election. See the module's documentation.
#[expect(clippy::struct_excessive_bools, reason = "independent switches")]
#[derive(Debug)]
pub struct Elector {
    me: NodeName,
    config: Config,
    own: Registers,
    interfaces: Vec<InterfaceFact>,
    source_synced: bool,
    leaving: bool,
    disarmed: bool,
    gateless: bool,
    steers: bool,
    has_gates: bool,
    hindrance: Option<Arc<str>>,
    started: Option<Duration>,
    listening: bool,
    /// When this node stopped listening; it claims a little later, so that those who did too are known.
    heard_out: Option<Duration>,
    peers: BTreeMap<NodeName, Peer>,
    local: BTreeMap<GroupId, Local>,
    segments: Segments,
    dirty: BTreeSet<GroupId>,
    held_dirty: BTreeSet<(HeldPort, u16)>,
    pods_dirty: BTreeSet<ObjectKey>,
    all_dirty: bool,
    pending: BTreeSet<GroupId>,
    sent: u64,
    last_tick: Duration,
    next_known: Duration,
    known_turn: usize,
    overloaded_since: Option<Duration>,
    next_rebalance: Duration,
    refused_frames: u64,
    lost: Vec<Lost>,
}

impl Elector {
    /// Of the node `me`, in the run `boot`.
    pub fn new(me: NodeName, boot: BootId, config: Config) -> Self {
        Self {
            me,
            config,
            own: Registers::new(boot),
            interfaces: Vec::new(),
            source_synced: false,
            leaving: false,
            disarmed: false,
            gateless: false,
            steers: false,
            has_gates: false,
            hindrance: None,
            started: None,
            listening: true,
            heard_out: None,
            peers: BTreeMap::new(),
            local: BTreeMap::new(),
            segments: Segments::default(),
            dirty: BTreeSet::new(),
            held_dirty: BTreeSet::new(),
            pods_dirty: BTreeSet::new(),
            all_dirty: true,
            pending: BTreeSet::new(),
            sent: 0,
            last_tick: Duration::ZERO,
            next_known: Duration::ZERO,
            known_turn: 0,
            overloaded_since: None,
            next_rebalance: Duration::ZERO,
            refused_frames: 0,
            lost: Vec::new(),
        }
    }

    /// This node's name.
    pub fn me(&self) -> &NodeName {
        &self.me
    }

    /// This run of it.
    pub fn boot(&self) -> BootId {
        self.own.boot
    }

    /// Whether another node's own word has arrived here.
    pub fn knows(&self, node: &NodeName) -> bool {
        self.registers(node)
            .is_some_and(|registers| registers.node.is_some())
    }

    /// This node's interfaces changed; what is heard on them is known here.
    pub fn set_interfaces(&mut self, interfaces: Vec<InterfaceFact>) {
        self.interfaces = interfaces;
    }

    /// The sources were listed: from now on this node may lead.
    pub fn set_synced(&mut self) {
        self.source_synced = true;
    }

    /// This node is about to stop: it hands over, and leads nothing new.
    pub fn leave(&mut self) {
        self.leaving = true;
        self.all_dirty = true;
    }

    /// Whether a group's traffic would be served here.
    pub fn set_ready(&mut self, group: &GroupId, ready: bool) {
        let local = self.local.entry(group.clone()).or_default();
        if local.ready != ready {
            local.ready = ready;
            self.dirty.insert(group.clone());
        }
    }

    /// Says which Services of a group, by [`super::service_id`], this node serves.
    pub fn set_serves(&mut self, group: &GroupId, services: BTreeSet<u64>) {
        let local = self.local.entry(group.clone()).or_default();
        if local.serves != services {
            local.serves = services;
            self.dirty.insert(group.clone());
        }
    }

    /// Whether a node says that it serves a Service of a group, or its run before said so; of a node that is not heard,
    /// what it said last.
    pub fn serves(&self, node: &NodeName, group: &GroupId, service: u64) -> bool {
        if *node == self.me {
            return self
                .local
                .get(group)
                .is_some_and(|local| local.serves.contains(&service));
        }
        self.said(node)
            .filter_map(|registers| registers.group(group))
            .any(|register| register.serves.contains(&service))
    }

    /// Says of which buckets of a port this node holds flows though they are another's.
    pub fn set_held(&mut self, port: HeldPort, buckets: &BTreeSet<u32>) {
        let page = |bucket: u32| u16::try_from(bucket / HELD_PAGE).expect("there are fewer pages");
        let before: BTreeSet<u16> = self.own.held(port).map(|(page, _)| page).collect();
        let now: BTreeSet<u16> = buckets.iter().map(|bucket| page(*bucket)).collect();
        for number in before.union(&now) {
            let first = u32::from(*number) * HELD_PAGE;
            let held = HeldPage::of(buckets.range(first..first + HELD_PAGE).copied());
            let word = (held != HeldPage::default()).then_some(Word::Held(held));
            if self.own.set(&Topic::Held(port, *number), word) {
                self.held_dirty.insert((port, *number));
            }
        }
    }

    /// Who holds flows of the buckets of a page, this node and the dead among them.
    pub fn holders(&self, port: HeldPort, page: u16) -> BTreeMap<u32, BTreeSet<NodeName>> {
        let mut holders = BTreeMap::<u32, BTreeSet<NodeName>>::new();
        for node in self.known() {
            let held = self
                .said(node)
                .filter_map(|words| words.held_page(port, page));
            for place in held.flat_map(HeldPage::places) {
                let bucket = u32::from(page) * HELD_PAGE + place;
                holders.entry(bucket).or_default().insert(node.clone());
            }
        }
        holders
    }

    /// What a node says of itself; of one that is not heard, what it said last; of one that began anew and does not say
    /// yet that it steers, what it said before.
    pub fn register(&self, node: &NodeName) -> Option<&NodeRegister> {
        let mut said = self.said(node).filter_map(Registers::register);
        let latest = said.next()?;
        if latest.capabilities.steers {
            return Some(latest);
        }
        Some(said.next().unwrap_or(latest))
    }

    /// Says whether this node's data path hands packets to the nodes that should serve them.
    pub fn set_steers(&mut self, steers: bool) {
        self.all_dirty |= self.steers != steers;
        self.steers = steers;
    }

    /// Says whether this node leads no address that pods leave by: it hands such over to whoever can lead them.
    pub fn set_disarmed(&mut self, disarmed: bool) {
        self.all_dirty |= self.disarmed != disarmed;
        self.disarmed = disarmed;
    }

    /// Says whether this node cannot be a gateway of egress policies: it leads addresses that pods leave by only if nobody
    /// can.
    pub fn set_gateless(&mut self, gateless: bool) {
        self.all_dirty |= self.gateless != gateless;
        self.gateless = gateless;
    }

    /// Says why this node's data path cannot steer; at most [`super::MAX_HINDRANCE`] bytes.
    pub fn set_hindrance(&mut self, hindrance: Option<Arc<str>>) {
        self.hindrance = hindrance;
    }

    /// The living nodes that say they cannot steer, and why.
    pub fn hindered(&self) -> BTreeMap<NodeName, Arc<str>> {
        let said = self.alive().filter_map(|node| {
            let register = self.registers(node)?.register()?;
            Some((node.clone(), register.hindrance.clone()?))
        });
        said.collect()
    }

    /// Whether a group's traffic would be served here, as last set.
    pub fn is_ready(&self, group: &str) -> bool {
        self.local.get(group).is_some_and(|local| local.ready)
    }

    /// The groups this node leads.
    pub fn leaderships(&self) -> impl Iterator<Item = (&GroupId, &Leadership)> {
        self.local
            .iter()
            .filter_map(|(id, local)| Some((id, local.leadership.as_ref()?)))
    }

    /// What this node leads of a group.
    pub fn leadership(&self, group: &str) -> Option<&Leadership> {
        self.local.get(group)?.leadership.as_ref()
    }

    /// Who leads a group.
    pub fn view(&self, group: &str) -> Option<&View> {
        self.local.get(group).map(|local| &local.view)
    }

    /// Who leads a group.
    pub fn leader(&self, group: &str) -> Option<&NodeName> {
        self.view(group)?.leader.as_ref()
    }

    /// Frames that were refused: unknown versions and malformed ones.
    pub fn refused_frames(&self) -> u64 {
        self.refused_frames
    }

    /// Whether this node still listens before its first claim.
    pub fn is_listening(&self) -> bool {
        self.listening
    }

    /// Whether this node speaks for groups that nobody leads: it has the smallest name of those alive.
    pub fn is_reporter(&self) -> bool {
        !self.listening && self.alive().next() == Some(&self.me)
    }

    /// The interface each address of a group has at this node, whoever leads it; without those that have none.
    pub fn places(&self, group: &Group) -> BTreeMap<IpAddr, InterfaceChoice> {
        let names: Vec<NodeName> = self.alive().cloned().collect();
        super::eligibility::places(group, &self.subjects(&group.id, &names), &self.me)
    }

    /// The nodes on the segment of each address of a group, whether they may lead it or not: those where it has an
    /// interface, by what they said last. Who is there is another question: a speaker may be absent, its node's data
    /// path is not.
    pub fn on_segment(&self, group: &Group) -> BTreeMap<IpAddr, BTreeSet<NodeName>> {
        self.on_segment_of(group, |_| true)
    }

    fn on_segment_of(
        &self,
        group: &Group,
        asked: impl Fn(&NodeName) -> bool,
    ) -> BTreeMap<IpAddr, BTreeSet<NodeName>> {
        let subjects: Vec<Subject<'_>> = self
            .known()
            .map(|node| Subject {
                node,
                register: self.register(node),
                odd: false,
            })
            .collect();
        super::eligibility::on_segment(group, &subjects, asked)
    }

    /// Whether one of these nodes is known to be on no segment of some address of a group.
    pub fn any_off_segment(&self, group: &Group, nodes: &BTreeSet<NodeName>) -> bool {
        // What a run before has said tells nothing of where the node is now.
        let synced = |node: &&NodeName| {
            let register = self.registers(node).and_then(Registers::register);
            register.is_some_and(|register| register.synced)
        };
        let asked: BTreeSet<&NodeName> = nodes.iter().filter(synced).collect();
        !asked.is_empty()
            && self
                .on_segment_of(group, |name| asked.contains(name))
                .values()
                .any(|near| near.len() < asked.len())
    }

    /// Judges every node that is known, alive or not: why each could or could not lead.
    pub fn explain(&self, group: &Group, index: &GroupIndex) -> BTreeMap<NodeName, Verdict> {
        let mut verdicts: BTreeMap<NodeName, Verdict> = index
            .nodes()
            .keys()
            .chain(self.peers.keys())
            .map(|node| (node.clone(), Err(Ineligible::NotAlive)))
            .collect();
        let names: Vec<NodeName> = self.alive().cloned().collect();
        let subjects = self.subjects(&group.id, &names);
        let leader = self.leader(&group.id);
        let judged = judge(group, &subjects, leader, &mut Segments::default());
        verdicts.extend(names.iter().cloned().zip(judged));
        verdicts
    }

    /// Why this node cannot announce one of the group's addresses, if so.
    pub fn obstacle(&self, group: &Group, address: IpAddr) -> Option<Ineligible> {
        let vip = group.vips.iter().find(|vip| vip.address == address)?;
        let names: Vec<NodeName> = self.alive().cloned().collect();
        let me = names.iter().position(|name| *name == self.me)?;
        let subjects = self.subjects(&group.id, &names);
        let leader = self.leader(&group.id);
        judge_for(&[vip], group, &subjects, leader, &mut Segments::default())
            .swap_remove(me)
            .err()
    }

    /// Draws the conclusions. `now` is monotonic; `wall` is the wall clock in milliseconds since the Unix epoch,
    /// for display. `changed` are the groups that changed since the last call.
    pub fn tick(
        &mut self,
        now: Duration,
        wall: u64,
        index: &GroupIndex,
        changed: &BTreeSet<GroupId>,
    ) -> Tick {
        let mut tick = Tick::default();
        self.dirty.extend(changed.iter().cloned());
        self.refresh(now);
        tick.lost = std::mem::take(&mut self.lost);
        tick.held = std::mem::take(&mut self.held_dirty);
        self.rebalance(now, index);
        self.last_tick = now;

        let names: Vec<NodeName> = self.alive().cloned().collect();
        tick.all = std::mem::take(&mut self.all_dirty);
        let due: BTreeSet<GroupId> = if tick.all {
            self.segments.forget();
            self.dirty.clear();
            self.pending.clear();
            index
                .groups()
                .keys()
                .chain(self.local.keys())
                .cloned()
                .collect()
        } else {
            let mut due = std::mem::take(&mut self.dirty);
            tick.heard.clone_from(&due);
            due.append(&mut self.pending);
            due
        };
        for id in due {
            match index.groups().get(&id) {
                Some(group) => self.evaluate(&id, group, &names, now, wall, &mut tick.changes),
                None => self.drop_group(&id, &mut tick.changes),
            }
        }
        self.speak(now, &mut tick.frames);
        tick
    }

    fn drop_group(&mut self, id: &GroupId, changes: &mut Vec<Change>) {
        let Some(local) = self.local.get_mut(id) else {
            return;
        };
        if local.leadership.take().is_some() {
            changes.push(Change::Quit(id.clone()));
        }
        self.own.set_group(id, None);
        // The highest epoch is remembered: the group may come back.
        let seen = local.seen;
        *local = Local {
            seen,
            ..Local::default()
        };
        if seen == 0 {
            self.local.remove(id);
        }
    }

    fn registers(&self, node: &NodeName) -> Option<&Registers> {
        if *node == self.me {
            return Some(&self.own);
        }
        self.peers
            .get(node)
            .and_then(|peer| peer.registers.as_ref())
    }

    /// What a node says, and what the run before said while that stands.
    fn said(&self, node: &NodeName) -> impl Iterator<Item = &Registers> {
        let former = self.peers.get(node).and_then(|peer| peer.former.as_ref());
        self.registers(node)
            .into_iter()
            .chain(former.map(|former| &former.registers))
    }

    fn subjects<'a>(&'a self, id: &GroupId, names: &'a [NodeName]) -> Vec<Subject<'a>> {
        names
            .iter()
            .map(|node| {
                let registers = self.registers(node);
                Subject {
                    node,
                    register: registers.and_then(Registers::register),
                    odd: registers
                        .and_then(|registers| registers.group(id))
                        .is_some_and(|group| group.odd),
                }
            })
            .collect()
    }

    fn evaluate(
        &mut self,
        id: &GroupId,
        group: &Group,
        names: &[NodeName],
        now: Duration,
        wall: u64,
        changes: &mut Vec<Change>,
    ) {
        let mut local = self.local.remove(id).unwrap_or_default();
        let mut segments = std::mem::take(&mut self.segments);
        let subjects = self.subjects(id, names);
        let previous = local.view.leader.as_ref();
        let verdicts = judge(group, &subjects, previous, &mut segments);
        self.segments = segments;

        let table = Table::new(self, group, names, &verdicts, local.ready, now);
        let odd = self.is_odd(id, group, names, now, &mut local);
        let mut claim = self.own.group(id).and_then(|own| own.claim.clone());
        let was_leading = local.leadership.is_some();
        local.seen = local.seen.max(self.highest_epoch(id));

        if let Some(mine) = claim.as_mut() {
            if self.keep(id, group, &table, mine, now, &mut local, changes) {
                local.vacant_since = None;
            } else {
                claim = None;
                local.yield_since = None;
                local.better_since = None;
                local.contested = false;
            }
        } else if self.take(group, &table, now, &mut local) {
            local.seen += 1;
            let vacant = local
                .vacant_since
                .take()
                .map_or(Duration::ZERO, |since| now.saturating_sub(since));
            claim = Some(Claim {
                epoch: local.seen,
                since: wall,
                mode: ClaimMode::Held,
            });
            local.leadership = Some(Leadership {
                epoch: local.seen,
                since: wall,
                interfaces: BTreeMap::new(),
                first: local.seen == 1
                    && group.vips.iter().all(|vip| vip.reported_leader.is_none()),
                previous: local.last_leader.clone(),
                vacant,
            });
        }

        // What this node leads, and where.
        match (&claim, table.me) {
            (Some(_), Some(at)) => {
                let places = table.entries[at].places;
                if let Some(leadership) = local.leadership.as_mut()
                    && (!was_leading
                        || places.is_some_and(|places| leadership.interfaces != *places))
                {
                    if let Some(places) = places {
                        leadership.interfaces.clone_from(places);
                    }
                    changes.push(Change::Lead(id.clone()));
                }
            }
            _ => {
                if local.leadership.take().is_some() {
                    changes.push(Change::Quit(id.clone()));
                }
            }
        }

        let view = table.view(self, id, claim.as_ref());
        if view != local.view {
            if view.leader.is_some() {
                local.last_leader.clone_from(&view.leader);
            }
            local.view = view;
            changes.push(Change::Seen(id.clone()));
        }
        if table.waiting || local.is_waiting() {
            self.pending.insert(id.clone());
        }
        let before = self.own.group(id);
        let mut register = GroupRegister {
            claim,
            ready: local.ready,
            serves: local.serves.clone(),
            gates: local.gates.clone(),
            odd,
            digest: group.digest,
            // A higher epoch seen elsewhere is no news by itself: it travels with what is.
            seen: before.map_or(local.seen, |before| before.seen),
        };
        if before != Some(&register) {
            register.seen = local.seen;
        }
        self.own.set_group(id, Some(register));
        self.local.insert(id.clone(), local);
    }
}

impl Local {
    /// Whether something may change by the mere passing of time.
    fn is_waiting(&self) -> bool {
        self.vacant_since.is_some()
            || self.yield_since.is_some()
            || self.odd_since.is_some()
            || self.better_since.is_some()
    }
}

impl Elector {
    /// The highest epoch that anybody, dead or alive, claimed or has seen.
    fn highest_epoch(&self, id: &GroupId) -> u64 {
        self.peers
            .values()
            .filter_map(|peer| peer.registers.as_ref()?.group(id))
            .map(|group| {
                group
                    .claim
                    .as_ref()
                    .map_or(0, |claim| claim.epoch)
                    .max(group.seen)
            })
            .max()
            .unwrap_or(0)
    }

    fn own_register(&self) -> NodeRegister {
        NodeRegister {
            interfaces: self.interfaces.clone(),
            capabilities: super::peer::Capabilities {
                steers: self.steers,
                gates: self.has_gates,
                ..super::peer::Capabilities::default()
            },
            hindrance: self.hindrance.clone(),
            synced: self.source_synced && !self.listening,
            leaving: self.leaving,
            disarmed: self.disarmed,
            gateless: self.gateless,
        }
    }

    fn arc_heard(&self, interface: &Arc<str>) -> BTreeSet<NodeName> {
        self.peers
            .iter()
            .filter(|(_, peer)| peer.hellos.contains_key(interface))
            .map(|(name, _)| name.clone())
            .collect()
    }
}
