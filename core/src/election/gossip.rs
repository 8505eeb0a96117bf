//! Registers of every node, replicated by deltas.
//!
//! Each node numbers its changes. An update covers a span of versions, so a receiver knows when it missed one
//! and asks for the rest, of the owner or of anybody else who has it: nodes that cannot talk to each other
//! directly still learn each other's state.

use std::collections::{BTreeMap, VecDeque};

use super::peer::{BootId, GroupRegister, NodeRegister};
use super::wire::{Frame, Mark};
use crate::groups::GroupId;
use crate::model::NodeName;

/// Registers that go into one update, so that it fits a datagram.
const GROUPS_PER_FRAME: usize = 12;
/// Marks that go into one frame.
const MARKS_PER_FRAME: usize = 24;
/// Earlier runs of a peer that are remembered, so that a late frame of one is not taken for a restart.
const RETIRED_BOOTS: usize = 8;
/// Registers of groups that are gone are kept this many deep.
const MAX_TOMBSTONES: usize = 4096;

/// The registers of one run of a node.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    pub(super) boot: BootId,
    /// Every change up to this version is here.
    pub(super) version: u64,
    pub(super) node: Option<(u64, NodeRegister)>,
    pub(super) groups: BTreeMap<GroupId, (u64, Option<GroupRegister>)>,
    retired: VecDeque<BootId>,
}

impl Registers {
    pub(super) fn new(boot: BootId) -> Self {
        Self {
            boot,
            version: 0,
            node: None,
            groups: BTreeMap::new(),
            retired: VecDeque::new(),
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

    pub(super) fn group(&self, id: &str) -> Option<&GroupRegister> {
        self.groups
            .get(id)
            .and_then(|(_, register)| register.as_ref())
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

    /// Changes a group's register; says whether that changed anything.
    pub(super) fn set_group(&mut self, id: &GroupId, register: Option<GroupRegister>) -> bool {
        match self.groups.get(id) {
            Some((_, old)) if *old == register => return false,
            None if register.is_none() => return false,
            _ => {}
        }
        self.version += 1;
        self.groups.insert(id.clone(), (self.version, register));
        self.prune();
        true
    }

    fn prune(&mut self) {
        if self.groups.len() <= MAX_TOMBSTONES {
            return;
        }
        let mut gone: Vec<(u64, GroupId)> = self
            .groups
            .iter()
            .filter(|(_, (_, register))| register.is_none())
            .map(|(id, (version, _))| (*version, id.clone()))
            .collect();
        gone.sort_unstable();
        let excess = gone.len().saturating_sub(MAX_TOMBSTONES / 2);
        for (_, id) in gone.into_iter().take(excess) {
            self.groups.remove(&id);
        }
    }

    /// What changed after `from`, in frames that each cover a span of versions.
    pub(super) fn since(&self, node: &NodeName, from: u64) -> Vec<Frame> {
        if from >= self.version {
            return Vec::new();
        }
        let mut groups: Vec<_> = self
            .groups
            .iter()
            .filter(|(_, (version, _))| *version > from)
            .map(|(id, (version, register))| (id.clone(), *version, register.clone()))
            .collect();
        groups.sort_unstable_by_key(|(_, version, _)| *version);
        let mut own = self.node.clone().filter(|(version, _)| *version > from);
        let mut frames = Vec::new();
        let mut start = from;
        loop {
            let rest = groups.split_off(groups.len().min(GROUPS_PER_FRAME));
            let last = rest.is_empty();
            let end = if last {
                self.version
            } else {
                groups.last().map_or(start, |(_, version, _)| *version)
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
                groups,
            });
            if last {
                return frames;
            }
            start = end;
            groups = rest;
        }
    }

    /// Takes an update in. Returns what changed, and whether something before it is missing.
    pub(super) fn merge(
        &mut self,
        from: u64,
        to: u64,
        node: Option<(u64, NodeRegister)>,
        groups: Vec<(GroupId, u64, Option<GroupRegister>)>,
    ) -> Merged {
        let mut merged = Merged::default();
        if let Some((version, register)) = node
            && self.node.as_ref().is_none_or(|(known, _)| *known < version)
        {
            merged.node = self.register() != Some(&register);
            self.node = Some((version, register));
        }
        for (id, version, register) in groups {
            let known = self.groups.get(&id);
            if known.is_none_or(|(known, _)| *known < version) {
                if known.and_then(|(_, register)| register.as_ref()) != register.as_ref() {
                    merged.groups.push(id.clone());
                }
                self.groups.insert(id, (version, register));
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
    pub(super) gap: bool,
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
