//! The gateway's side of one group.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::{Binding, Change, Message, Position};
use crate::groups::GroupId;
use crate::model::NodeName;

/// Most changes, or bindings, of one message: 53 bytes each at most, so that it fits.
const MAX_BATCH: usize = 1_000;

/// Numbers a group's changes, keeps the latest, and says what is next for each that follows.
#[derive(Debug)]
pub struct Writer {
    group: GroupId,
    epoch: u64,
    /// The latest changes, and when they happened.
    log: VecDeque<(Duration, Change)>,
    /// The number of the first of them.
    first: u64,
    /// How many are kept.
    capacity: usize,
    followers: BTreeMap<NodeName, Follower>,
}

/// Somebody who follows.
#[derive(Debug)]
struct Follower {
    /// The number of the change that it is sent next.
    next: u64,
    /// What is missing of all bindings.
    copy: Copy,
    /// The number of the first change that it has not said to have applied.
    applied: u64,
}

/// How far a full copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    /// It is to begin.
    Due,
    /// It goes on.
    Running,
    /// All of it was sent.
    Sent,
    /// None is needed: it has been applied.
    Done,
}

impl Writer {
    /// Of a group that this node leads in this epoch; keeps so many changes for those who lag behind. Numbers begin at
    /// `first`, a random one: who followed a writer before, of the same epoch, is not to take this one's for those.
    pub fn new(group: GroupId, epoch: u64, capacity: usize, first: u64) -> Self {
        Self {
            group,
            epoch,
            log: VecDeque::new(),
            first,
            capacity: capacity.max(1),
            followers: BTreeMap::new(),
        }
    }

    /// The epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    fn next(&self) -> u64 {
        self.first + self.log.len() as u64
    }

    /// Something happened to a binding. Nothing is kept while nobody follows.
    pub fn record(&mut self, change: Change, now: Duration) {
        if self.followers.is_empty() {
            self.lost();
            return;
        }
        if self.log.len() == self.capacity {
            self.log.pop_front();
            self.first += 1;
        }
        self.log.push_back((now, change));
    }

    /// Changes were missed: the gateway itself does not know all that happened. What anybody knew up to here is worth
    /// nothing, and all bindings are copied anew.
    pub fn lost(&mut self) {
        self.first = self.next() + 1;
        self.log.clear();
    }

    /// Somebody follows, from where it knows if that is still kept.
    pub fn follow(&mut self, node: NodeName, known: Option<Position>) {
        let next = known.filter(|known| {
            known.epoch == self.epoch && (self.first..=self.next()).contains(&known.next)
        });
        let copy = if next.is_some() {
            Copy::Done
        } else {
            Copy::Due
        };
        let next = next.map_or(self.next(), |known| known.next);
        let follower = Follower {
            next,
            applied: next,
            copy,
        };
        self.followers.insert(node, follower);
    }

    /// It follows no longer.
    pub fn unfollow(&mut self, node: &NodeName) {
        self.followers.remove(node);
    }

    /// Those who follow.
    pub fn followers(&self) -> impl Iterator<Item = &NodeName> {
        self.followers.keys()
    }

    /// Whether a follower is to be given some of all bindings: then [`Self::held`] is next.
    pub fn copies_to(&self, node: &NodeName) -> bool {
        self.followers
            .get(node)
            .is_some_and(|follower| follower.copy == Copy::Running)
    }

    /// What is next for a follower: the beginning of a copy, or changes; nothing, when it has been told all. A copy's
    /// bindings come from [`Self::held`].
    pub fn poll(&mut self, node: &NodeName) -> Option<Message> {
        let (first, next, group) = (self.first, self.next(), self.group.clone());
        let epoch = self.epoch;
        let follower = self.followers.get_mut(node)?;
        if follower.next < first {
            follower.copy = Copy::Due;
        }
        if follower.copy == Copy::Due {
            follower.copy = Copy::Running;
            follower.next = next;
            follower.applied = next;
            let position = Position { epoch, next };
            return Some(Message::Begin { group, position });
        }
        if follower.next == next {
            return None;
        }
        let position = Position {
            epoch,
            next: follower.next,
        };
        let skipped = usize::try_from(follower.next - first).unwrap_or(usize::MAX);
        let changes: Vec<Change> = self
            .log
            .iter()
            .skip(skipped)
            .take(MAX_BATCH)
            .map(|(_, change)| *change)
            .collect();
        follower.next += changes.len() as u64;
        Some(Message::Changes {
            group,
            position,
            changes,
        })
    }

    /// Bindings that are there now, for a follower that is copied to: the messages to send at once, before anything
    /// that is recorded later. `last`: there are no more.
    pub fn held(&mut self, node: &NodeName, bindings: &[Binding], last: bool) -> Vec<Message> {
        let Some(follower) = self.followers.get_mut(node) else {
            return Vec::new();
        };
        if follower.copy != Copy::Running {
            return Vec::new();
        }
        let group = &self.group;
        let mut messages: Vec<Message> = bindings
            .chunks(MAX_BATCH)
            .map(|bindings| Message::Held {
                group: group.clone(),
                bindings: bindings.to_vec(),
            })
            .collect();
        if last {
            follower.copy = Copy::Sent;
            messages.push(Message::End {
                group: group.clone(),
            });
        }
        messages
    }

    /// A follower has applied all before a position: how long ago the oldest change happened that it had not before.
    pub fn applied(
        &mut self,
        node: &NodeName,
        position: Position,
        now: Duration,
    ) -> Option<Duration> {
        let first = self.first;
        let follower = self.followers.get_mut(node)?;
        let known = follower.applied..=follower.next;
        if position.epoch != self.epoch || !known.contains(&position.next) {
            return None;
        }
        if follower.copy == Copy::Sent {
            follower.copy = Copy::Done;
        }
        let oldest = follower.applied;
        follower.applied = position.next;
        if oldest == position.next {
            return None;
        }
        let at = usize::try_from(oldest.checked_sub(first)?).ok()?;
        let (happened, _) = self.log.get(at)?;
        Some(now.saturating_sub(*happened))
    }

    /// How long ago the oldest change happened that a follower has not said to have applied, zero if it has applied all;
    /// nothing while it is copied to, or is to be.
    pub fn lag(&self, node: &NodeName, now: Duration) -> Option<Duration> {
        let follower = self.followers.get(node)?;
        if follower.copy != Copy::Done || follower.next < self.first {
            return None;
        }
        let Ok(at) = usize::try_from(follower.applied.saturating_sub(self.first)) else {
            return None;
        };
        let oldest = self.log.get(at);
        Some(oldest.map_or(Duration::ZERO, |(happened, _)| {
            now.saturating_sub(*happened)
        }))
    }

    /// How many changes a follower has not said to have applied; nothing while it is copied to.
    pub fn behind(&self, node: &NodeName) -> Option<u64> {
        let follower = self.followers.get(node)?;
        (follower.copy == Copy::Done).then(|| self.next() - follower.applied)
    }
}
