//! Who is alive, who hears whom: facts from the failure detector and from hellos.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Elector;
use crate::election::gossip::Registers;
use crate::election::peer::BootId;
use crate::model::NodeName;

/// A tick later than this after the one before means that this process stood still, and with it its ears.
const STOOD_STILL: Duration = Duration::from_millis(400);
/// A dead peer's registers are forgotten after this long.
const FORGET: Duration = Duration::from_mins(10);

/// What an earlier run said of the node's data path stands until the next one has said that it steers, and so long
/// after that: the rest of its word follows. One that never says so is believed in the end.
const FORMER_LASTS: Duration = Duration::from_secs(3);
const FORMER_AT_MOST: Duration = Duration::from_secs(30);

/// What the run before said. Programs outlive speakers: what was steered to the node still arrives.
#[derive(Debug)]
pub(super) struct Former {
    pub(super) registers: Registers,
    /// The run after it says that it steers.
    spoken: bool,
    /// When that began, or when the run after it did.
    since: Option<Duration>,
}

/// What is known of another node.
#[derive(Debug, Default)]
pub(super) struct Peer {
    /// The failure detector says that it lives.
    pub(super) swim: bool,
    /// The run that left; its last hellos are not taken for life.
    left: Option<BootId>,
    /// When it was last heard, by interface.
    pub(super) hellos: BTreeMap<Arc<str>, Duration>,
    /// The run that it is in, as told by the failure detector or a hello.
    pub(super) boot: Option<BootId>,
    pub(super) registers: Option<Registers>,
    pub(super) former: Option<Former>,
    /// What is steered to it does not arrive.
    gone: bool,
    pub(super) wanted: Duration,
    alive: bool,
    died: Option<Duration>,
    deaths: VecDeque<Duration>,
}

impl Peer {
    /// Notes the run it is in. One that is known to be over is not taken.
    pub(super) fn set_boot(&mut self, boot: BootId) -> bool {
        if self.boot == Some(boot) {
            return false;
        }
        let fresh = if let Some(registers) = &mut self.registers {
            let before = registers.clone();
            let fresh = registers.restart(boot);
            if fresh {
                self.retire(before);
            }
            fresh
        } else {
            self.registers = Some(Registers::new(boot));
            true
        };
        if fresh {
            self.boot = Some(boot);
            self.left = None;
        }
        fresh
    }

    fn retire(&mut self, before: Registers) {
        if std::mem::take(&mut self.gone) {
            self.former = None;
        } else if steers(&before) {
            self.former = Some(Former {
                registers: before,
                spoken: false,
                since: None,
            });
        }
    }

    /// What an earlier run said, if its time is over.
    fn outdated(&mut self, now: Duration) -> Option<Former> {
        let former = self.former.as_mut()?;
        if !former.spoken && self.registers.as_ref().is_some_and(steers) {
            former.spoken = true;
            former.since = None;
        }
        let waited = now.saturating_sub(*former.since.get_or_insert(now));
        let patience = if former.spoken {
            FORMER_LASTS
        } else {
            FORMER_AT_MOST
        };
        self.former.take_if(|_| waited >= patience)
    }
}

fn steers(registers: &Registers) -> bool {
    let register = registers.register();
    register.is_some_and(|register| register.capabilities.steers)
}

/// A peer that is heard no more, on no interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Its name.
    pub node: NodeName,
    /// How long ago its last hello was.
    pub unheard: Duration,
}

/// A peer, for display.
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts, shown side by side"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerView {
    /// Its name.
    pub name: NodeName,
    /// It counts as alive.
    pub alive: bool,
    /// The failure detector says that it lives.
    pub gossip: bool,
    /// The interfaces of this node on which it is heard.
    pub heard: Vec<Arc<str>>,
    /// It has listed its sources and may lead.
    pub synced: bool,
    /// It is stopping.
    pub leaving: bool,
}

impl Elector {
    /// The failure detector says that a peer lives, in this run.
    pub fn peer_alive(&mut self, name: &NodeName, boot: BootId) {
        if *name == self.me {
            return;
        }
        let is_fresh = self.enter(name, boot);
        let peer = self.peers.entry(name.clone()).or_default();
        peer.swim = true;
        if is_fresh || !peer.alive {
            peer.left = None;
            self.all_dirty = true;
        }
    }

    /// The failure detector says that a peer is dead, or that it has left.
    pub fn peer_dead(&mut self, name: &NodeName) {
        let Some(peer) = self.peers.get_mut(name) else {
            return;
        };
        peer.swim = false;
        let register = peer.registers.as_ref().and_then(Registers::register);
        if register.is_some_and(|register| register.leaving) {
            peer.left = peer.boot;
            peer.hellos.clear();
        }
        self.all_dirty = true;
    }

    /// A hello of a peer was heard on an interface. Says whether the peer was not heard there before.
    pub fn hello(
        &mut self,
        name: &NodeName,
        boot: BootId,
        interface: &Arc<str>,
        now: Duration,
    ) -> bool {
        if *name == self.me {
            return false;
        }
        let peer = self.peers.entry(name.clone()).or_default();
        if peer.left == Some(boot) {
            return false;
        }
        let is_fresh = self.enter(name, boot);
        let peer = self.peers.entry(name.clone()).or_default();
        if is_fresh {
            self.all_dirty = true;
        } else if peer.boot != Some(boot) {
            return false; // A late frame of a run that is over.
        }
        let new = peer.hellos.insert(interface.clone(), now).is_none();
        self.all_dirty |= new;
        new
    }

    /// Whether a node counts as alive; this one does.
    pub fn is_alive(&self, node: &NodeName) -> bool {
        *node == self.me || self.peers.get(node).is_some_and(|peer| peer.alive)
    }

    /// Whether a peer is not there since it has said that it goes, and not come back.
    pub fn has_left(&self, node: &NodeName) -> bool {
        let peer = self.peers.get(node);
        peer.is_some_and(|peer| !peer.alive && peer.left.is_some())
    }

    /// When a peer's last hello was heard on an interface; nothing if that was too long ago to count.
    pub fn last_hello(&self, node: &NodeName, interface: &Arc<str>) -> Option<Duration> {
        self.peers.get(node)?.hellos.get(interface).copied()
    }

    /// A peer's data path is there: if the peer is dead, it is not to be forgotten yet.
    pub fn remember(&mut self, node: &NodeName, now: Duration) {
        if let Some(peer) = self.peers.get_mut(node) {
            peer.gone = false;
            peer.died = peer.died.map(|_| now);
        }
    }

    /// A peer's data path is gone: what it said of it is nothing to its next run.
    pub fn gone(&mut self, node: &NodeName) {
        if let Some(peer) = self.peers.get_mut(node) {
            peer.gone = true;
        }
    }

    /// The addresses of all nodes that are known, as they say themselves.
    pub fn addresses(&self) -> BTreeMap<IpAddr, NodeName> {
        self.known()
            .filter_map(|name| Some((name, self.register(name)?)))
            .flat_map(|(name, register)| {
                let interfaces = register.interfaces.iter();
                let addresses = interfaces.flat_map(|interface| &interface.addresses);
                addresses.map(|address| (*address, name.clone()))
            })
            .collect()
    }

    /// Every node that is known, alive or not; this one too.
    pub fn known(&self) -> impl Iterator<Item = &NodeName> {
        std::iter::once(&self.me).chain(self.peers.keys())
    }

    /// Every peer that is known, for display.
    pub fn peers(&self) -> impl Iterator<Item = PeerView> {
        self.peers.iter().map(|(name, peer)| {
            let register = peer.registers.as_ref().and_then(Registers::register);
            PeerView {
                name: name.clone(),
                alive: peer.alive,
                gossip: peer.swim,
                heard: peer.hellos.keys().cloned().collect(),
                synced: register.is_some_and(|register| register.synced),
                leaving: register.is_some_and(|register| register.leaving),
            }
        })
    }

    /// The living nodes, this one among them, by name.
    pub(super) fn alive(&self) -> impl Iterator<Item = &NodeName> {
        let mut names: BTreeSet<&NodeName> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.alive)
            .map(|(name, _)| name)
            .collect();
        names.insert(&self.me);
        names.into_iter()
    }

    /// Whether a node came and went too often lately.
    pub(super) fn is_damped(&self, node: &NodeName, now: Duration) -> bool {
        self.peers.get(node).is_some_and(|peer| {
            let recent = peer
                .deaths
                .iter()
                .filter(|at| now.saturating_sub(**at) < self.config.flap_window)
                .count();
            recent >= self.config.flaps
        })
    }

    /// Brings liveness, hearing, listening and this node's own register up to date.
    pub(super) fn refresh(&mut self, now: Duration) {
        let started = *self.started.get_or_insert(now);
        let stood_still = now.saturating_sub(self.last_tick);
        if self.last_tick > Duration::ZERO && stood_still > STOOD_STILL {
            // What was said meanwhile waits in sockets: nobody is lost before it is read.
            for peer in self.peers.values_mut() {
                for heard in peer.hellos.values_mut() {
                    *heard = (*heard + stood_still).min(now);
                }
            }
        }
        let lost = self.config.hello_lost;
        let mut changed = false;
        for (name, peer) in &mut self.peers {
            let before = peer.hellos.len();
            let last = peer.hellos.values().max().copied();
            peer.hellos
                .retain(|_, heard| now.saturating_sub(*heard) < lost);
            changed |= peer.hellos.len() != before;
            if let Some(last) = last.filter(|_| peer.hellos.is_empty()) {
                self.lost.push(Lost {
                    node: name.clone(),
                    unheard: now.saturating_sub(last),
                });
            }
            let alive = peer.swim || !peer.hellos.is_empty();
            if alive != peer.alive {
                peer.alive = alive;
                changed = true;
                peer.died = (!alive).then_some(now);
                if !alive && peer.left.is_none() {
                    peer.deaths.push_back(now);
                    if peer.deaths.len() > 16 {
                        peer.deaths.pop_front();
                    }
                }
            }
        }
        for peer in self.peers.values_mut() {
            if let Some(former) = peer.outdated(now) {
                self.held_dirty.extend(former.registers.held_pages());
                changed = true;
            }
        }
        let pods = &mut self.pods_dirty;
        self.peers.retain(|_, peer| {
            let stays = peer.died.is_none_or(|at| now.saturating_sub(at) < FORGET);
            let forgotten = peer.registers.iter().filter(|_| !stays);
            pods.extend(forgotten.flat_map(Registers::own_pods).cloned());
            stays
        });
        if self.listening {
            let waited = now.saturating_sub(started);
            let known = self
                .peers
                .values()
                .filter(|peer| peer.alive)
                .all(|peer| peer.registers.as_ref().is_some_and(|r| r.node.is_some()));
            if self.source_synced
                && waited >= self.config.listen
                && (known || waited >= self.config.listen_at_most)
            {
                self.listening = false;
                self.heard_out = Some(now);
                changed = true;
            }
        }
        for at in 0..self.interfaces.len() {
            let heard = self.arc_heard(&self.interfaces[at].name);
            self.interfaces[at].heard = heard;
        }
        let register = self.own_register();
        changed |= self.own.set_node(register);
        self.all_dirty |= changed;
    }
}
