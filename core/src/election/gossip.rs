//! Registers of every node, replicated by deltas.
//!
//! Each node numbers its changes. An update covers a span of versions, so a receiver knows when it missed one
//! and asks for the rest, of the owner or of anybody else who has it: nodes that cannot talk to each other
//! directly still learn each other's state.

use std::collections::{BTreeMap, VecDeque};

use super::peer::{BootId, GroupRegister, HeldPage, HeldPort, NodeRegister, Topic, Word};
use super::wire::{Frame, Mark};
use crate::groups::GroupId;
use crate::model::{NodeName, ObjectKey};

/// About how many bytes of registers go into one update, so that it fits a datagram.
const FRAME: usize = 1000;
/// Marks that go into one frame.
const MARKS_PER_FRAME: usize = 24;
/// Earlier runs of a peer that are remembered, so that a late frame of one is not taken for a restart.
const RETIRED_BOOTS: usize = 8;
/// Registers that are gone are kept this many deep.
const MAX_TOMBSTONES: usize = 4096;
/// Those of pods, to twice that many.
const MAX_GONE_PODS: usize = 128;

/// The registers of one run of a node.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    pub(super) boot: BootId,
    /// Every change up to this version is here.
    pub(super) version: u64,
    pub(super) node: Option<(u64, NodeRegister)>,
    pub(super) words: BTreeMap<Topic, (u64, Option<Word>)>,
    retired: VecDeque<BootId>,
    /// About how many pods' registers are gone and remembered.
    gone_pods: usize,
}

impl Registers {
    pub(super) fn new(boot: BootId) -> Self {
        Self {
            boot,
            version: 0,
            node: None,
            words: BTreeMap::new(),
            retired: VecDeque::new(),
            gone_pods: 0,
        }
    }

    /// Begins anew for another run, unless that run is known to be over.
    pub(super) fn restart(&mut self, boot: BootId) -> bool {
        if boot == self.boot {
            return true;
        }
        if self.retired.contains(&boot) {
            return false;
        }
        let mut retired = std::mem::take(&mut self.retired);
        retired.push_back(self.boot);
        if retired.len() > RETIRED_BOOTS {
            retired.pop_front();
        }
        *self = Self::new(boot);
        self.retired = retired;
        true
    }

    pub(super) fn register(&self) -> Option<&NodeRegister> {
        self.node.as_ref().map(|(_, register)| register)
    }

    pub(super) fn group(&self, id: &GroupId) -> Option<&GroupRegister> {
        match self.words.get(&Topic::Group(id.clone()))? {
            (_, Some(Word::Group(register))) => Some(register),
            _ => None,
        }
    }

    /// The groups' registers.
    pub(super) fn groups(&self) -> impl Iterator<Item = (&GroupId, &GroupRegister)> {
        self.words
            .iter()
            .filter_map(|(topic, (_, word))| match (topic, word) {
                (Topic::Group(id), Some(Word::Group(register))) => Some((id, register)),
                _ => None,
            })
    }

    /// The pages of buckets that it holds of a port.
    pub(super) fn held(&self, port: HeldPort) -> impl Iterator<Item = (u16, &HeldPage)> {
        self.words
            .range(Topic::Held(port, 0)..=Topic::Held(port, u16::MAX))
            .filter_map(|(topic, (_, word))| match (topic, word) {
                (Topic::Held(_, page), Some(Word::Held(held))) => Some((*page, held)),
                _ => None,
            })
    }

    /// All pages of buckets that it has spoken of.
    pub(super) fn held_pages(&self) -> impl Iterator<Item = (HeldPort, u16)> {
        self.words.keys().filter_map(|topic| match topic {
            Topic::Held(port, page) => Some((*port, *page)),
            Topic::Group(_) | Topic::Pod(_) => None,
        })
    }

    /// What it says of a pod.
    pub(super) fn pod(&self, pod: &ObjectKey) -> Option<&Word> {
        let (_, word) = self.words.get(&Topic::Pod(pod.clone()))?;
        word.as_ref()
    }

    /// Changes the node's register; says whether that changed anything.
    pub(super) fn set_node(&mut self, register: NodeRegister) -> bool {
        if self.register() == Some(&register) {
            return false;
        }
        self.version += 1;
        self.node = Some((self.version, register));
        true
    }

    /// A page of the buckets that it holds of a port.
    pub(super) fn held_page(&self, port: HeldPort, page: u16) -> Option<&HeldPage> {
        match self.words.get(&Topic::Held(port, page))? {
            (_, Some(Word::Held(held))) => Some(held),
            _ => None,
        }
    }

    /// Changes a group's register; says whether that changed anything.
    pub(super) fn set_group(&mut self, id: &GroupId, register: Option<GroupRegister>) -> bool {
        self.set(&Topic::Group(id.clone()), register.map(Word::Group))
    }

    /// Changes a register; says whether that changed anything.
    pub(super) fn set(&mut self, topic: &Topic, word: Option<Word>) -> bool {
        match self.words.get(topic) {
            Some((_, old)) if *old == word => return false,
            None if word.is_none() => return false,
            _ => {}
        }
        self.version += 1;
        self.put(topic.clone(), self.version, word);
        self.prune();
        true
    }

    fn prune(&mut self) {
        if self.words.len() > MAX_TOMBSTONES {
            self.bury(MAX_TOMBSTONES / 2, |_| true);
        }
    }

    /// Pods come and go, each with a topic of its own.
    fn prune_pods(&mut self) {
        if self.gone_pods > 2 * MAX_GONE_PODS {
            self.bury(MAX_GONE_PODS, |topic| matches!(topic, Topic::Pod(_)));
            self.gone_pods = MAX_GONE_PODS;
        }
    }

    /// Removes registers that are gone, but for the last ones.
    fn bury(&mut self, keep: usize, of: impl Fn(&Topic) -> bool) {
        let mut gone: Vec<(u64, Topic)> = self
            .words
            .iter()
            .filter(|(topic, (_, word))| word.is_none() && of(topic))
            .map(|(topic, (version, _))| (*version, topic.clone()))
            .collect();
        gone.sort_unstable();
        let excess = gone.len().saturating_sub(keep);
        for (_, topic) in gone.into_iter().take(excess) {
            self.words.remove(&topic);
        }
    }

    /// Puts a register in its place.
    fn put(&mut self, topic: Topic, version: u64, word: Option<Word>) {
        let is_gone_pod = word.is_none() && matches!(topic, Topic::Pod(_));
        let before = self.words.insert(topic, (version, word));
        if is_gone_pod && !matches!(before, Some((_, None))) {
            self.gone_pods += 1;
            self.prune_pods();
        }
    }

    /// The pods of its own that it speaks of.
    pub(super) fn own_pods(&self) -> impl Iterator<Item = &ObjectKey> {
        self.words
            .iter()
            .filter_map(|(topic, (_, word))| match topic {
                Topic::Pod(key) if word.as_ref().is_some_and(Word::is_of_own_pod) => Some(key),
                _ => None,
            })
    }

    /// What changed after `from`, in frames that each cover a span of versions.
    pub(super) fn since(&self, node: &NodeName, from: u64) -> Vec<Frame> {
        if from >= self.version {
            return Vec::new();
        }
        let mut words: Vec<_> = self
            .words
            .iter()
            .filter(|(_, (version, _))| *version > from)
            .map(|(topic, (version, word))| (topic.clone(), *version, word.clone()))
            .collect();
        words.sort_unstable_by_key(|(_, version, _)| *version);
        let mut own = self.node.clone().filter(|(version, _)| *version > from);
        let mut frames = Vec::new();
        let mut start = from;
        loop {
            let rest = words.split_off(fitting(&words));
            let last = rest.is_empty();
            let end = if last {
                self.version
            } else {
                words.last().map_or(start, |(_, version, _)| *version)
            };
            // The node's register goes first, and again in no other frame: spans stay correct, since a frame
            // may carry more than its span.
            frames.push(Frame::Update {
                mark: Mark {
                    node: node.clone(),
                    boot: self.boot,
                    version: end,
                },
                from: start,
                node: own.take(),
                words,
            });
            if last {
                return frames;
            }
            start = end;
            words = rest;
        }
    }

    /// Takes an update in. Returns what changed, and whether something before it is missing.
    pub(super) fn merge(
        &mut self,
        from: u64,
        to: u64,
        node: Option<(u64, NodeRegister)>,
        words: Vec<(Topic, u64, Option<Word>)>,
    ) -> Merged {
        let mut merged = Merged::default();
        if let Some((version, register)) = node
            && self.node.as_ref().is_none_or(|(known, _)| *known < version)
        {
            merged.node = self.register() != Some(&register);
            self.node = Some((version, register));
        }
        for (topic, version, word) in words {
            let known = self.words.get(&topic);
            if known.is_none_or(|(known, _)| *known < version) {
                if known.and_then(|(_, word)| word.as_ref()) != word.as_ref() {
                    match &topic {
                        Topic::Group(id) => merged.groups.push(id.clone()),
                        Topic::Held(port, page) => merged.held.push((*port, *page)),
                        Topic::Pod(key) => {
                            let words = [known.and_then(|(_, word)| word.as_ref()), word.as_ref()];
                            if words.into_iter().flatten().any(Word::is_of_own_pod) {
                                merged.pods.push(key.clone());
                            }
                        }
                    }
                }
                self.put(topic, version, word);
            }
        }
        if from <= self.version {
            self.version = self.version.max(to);
        } else {
            merged.gap = true;
        }
        self.prune();
        merged
    }
}

/// What an update changed.
#[derive(Debug, Default)]
pub(super) struct Merged {
    pub(super) node: bool,
    pub(super) groups: Vec<GroupId>,
    pub(super) held: Vec<(HeldPort, u16)>,
    pub(super) pods: Vec<ObjectKey>,
    pub(super) gap: bool,
}

/// How many of these fit one frame; at least one.
fn fitting(words: &[(Topic, u64, Option<Word>)]) -> usize {
    let mut room = FRAME;
    let fit = words.iter().take_while(|(topic, _, word)| {
        let name = match topic {
            Topic::Group(id) => id.len(),
            Topic::Held(..) => 24,
            Topic::Pod(key) => key.namespace.len() + key.name.len() + 3,
        };
        let size = name + 12 + word.as_ref().map_or(0, Word::size);
        let fits = size <= room;
        room = room.saturating_sub(size);
        fits
    });
    fit.count().max(1).min(words.len())
}

/// The marks, in frames that fit a datagram.
pub(super) fn known_frames(from: &NodeName, marks: &[Mark]) -> Vec<Frame> {
    marks
        .chunks(MARKS_PER_FRAME)
        .map(|chunk| Frame::Known {
            from: from.clone(),
            marks: chunk.to_vec(),
        })
        .collect()
}
