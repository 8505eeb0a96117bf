//! The elector's side of the replication of registers.

use std::time::Duration;

use super::{Elector, Outgoing};
use crate::election::gossip::known_frames;
use crate::election::peer::{BootId, Topic, Word};
use crate::election::wire::{Frame, Mark};
use crate::model::NodeName;

/// One peer is told what this node knows, each time.
const TELL_EVERY: Duration = Duration::from_millis(250);
/// A missing span is asked for at most this often.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// Frames sent to one peer in answer to one message; the rest follows when it asks again.
const MAX_ANSWER: usize = 64;

impl Elector {
    /// Takes in a frame that the gossip delivered. Returns what to answer.
    pub fn receive(&mut self, bytes: &[u8], now: Duration) -> Vec<Outgoing> {
        match Frame::decode(bytes) {
            Ok(Frame::Update {
                mark,
                from,
                node,
                words,
            }) => self.merge(&mark, from, node, words, now),
            Ok(Frame::Want { from, marks }) => {
                let mut answer = Vec::new();
                for mark in &marks {
                    self.answer(&from, mark, &mut answer);
                }
                answer
            }
            Ok(Frame::Known { from, marks }) => self.compare(&from, &marks),
            Err(_) => {
                self.refused_frames += 1;
                Vec::new()
            }
        }
    }

    fn merge(
        &mut self,
        mark: &Mark,
        from: u64,
        node: Option<(u64, super::NodeRegister)>,
        words: Vec<(Topic, u64, Option<Word>)>,
        now: Duration,
    ) -> Vec<Outgoing> {
        if mark.node == self.me || !self.is_current(mark) {
            return Vec::new();
        }
        let known = self.registers(&mark.node);
        if known.is_none_or(|r| r.boot != mark.boot) && !self.enter(&mark.node, mark.boot) {
            return Vec::new();
        }
        let peer = self.peers.entry(mark.node.clone()).or_default();
        let Some(registers) = peer.registers.as_mut() else {
            return Vec::new();
        };
        let merged = registers.merge(from, mark.version, node, words);
        let ask = merged.gap && now.saturating_sub(peer.wanted) >= ASK_EVERY;
        let known = registers.version;
        if ask {
            peer.wanted = now;
        }
        self.all_dirty |= merged.node;
        self.dirty.extend(merged.groups);
        self.held_dirty.extend(merged.held);
        self.pods_dirty.extend(merged.pods);
        if !ask {
            return Vec::new();
        }
        let want = Frame::Want {
            from: self.me.clone(),
            marks: vec![Mark {
                node: mark.node.clone(),
                boot: mark.boot,
                version: known,
            }],
        };
        vec![Outgoing {
            to: Some(mark.node.clone()),
            frame: want.encode(),
        }]
    }

    /// Whether a mark is of the run that the peer is in, as far as its own word is known.
    fn is_current(&self, mark: &Mark) -> bool {
        self.peers
            .get(&mark.node)
            .and_then(|peer| peer.boot)
            .is_none_or(|boot| boot == mark.boot)
    }

    fn answer(&self, to: &NodeName, mark: &Mark, answer: &mut Vec<Outgoing>) {
        let Some(registers) = self.registers(&mark.node) else {
            return;
        };
        let from = if registers.boot == mark.boot {
            mark.version
        } else {
            0
        };
        let room = MAX_ANSWER.saturating_sub(answer.len());
        answer.extend(
            registers
                .since(&mark.node, from)
                .into_iter()
                .take(room)
                .map(|frame| Outgoing {
                    to: Some(to.clone()),
                    frame: frame.encode(),
                }),
        );
    }

    /// Asks for what the other knows better, sends what it lacks.
    fn compare(&self, other: &NodeName, theirs: &[Mark]) -> Vec<Outgoing> {
        let mut wanted = Vec::new();
        let mut answer = Vec::new();
        for mark in theirs {
            if mark.node != self.me && !self.is_current(mark) {
                continue;
            }
            let known = self
                .registers(&mark.node)
                .map(|registers| (registers.boot, registers.version));
            let behind = match known {
                Some((boot, version)) => boot == mark.boot && version < mark.version,
                None => mark.version > 0,
            };
            if behind && mark.node != self.me {
                wanted.push(Mark {
                    version: known.map_or(0, |(_, version)| version),
                    ..mark.clone()
                });
            } else if known
                .is_some_and(|(boot, version)| boot != mark.boot || version > mark.version)
            {
                self.answer(other, mark, &mut answer);
            }
        }
        if !wanted.is_empty() {
            let want = Frame::Want {
                from: self.me.clone(),
                marks: wanted,
            };
            answer.push(Outgoing {
                to: Some(other.clone()),
                frame: want.encode(),
            });
        }
        answer
    }

    /// What to tell a peer that has just appeared: where everybody stands, so that both ask for the rest.
    pub fn greet(&self, peer: &NodeName) -> Vec<Outgoing> {
        known_frames(&self.me, &self.marks(Some(peer)))
            .into_iter()
            .map(|frame| Outgoing {
                to: Some(peer.clone()),
                frame: frame.encode(),
            })
            .collect()
    }

    fn marks(&self, about: Option<&NodeName>) -> Vec<Mark> {
        let own = Mark {
            node: self.me.clone(),
            boot: self.own.boot,
            version: self.own.version,
        };
        let mut marks = vec![own];
        for (name, peer) in &self.peers {
            if let Some(registers) = &peer.registers {
                marks.push(Mark {
                    node: name.clone(),
                    boot: registers.boot,
                    version: registers.version,
                });
            } else if about == Some(name) {
                marks.push(Mark {
                    node: name.clone(),
                    boot: BootId(0),
                    version: 0,
                });
            }
        }
        marks
    }

    /// Sends what changed here, and now and then tells one peer where everybody stands.
    pub(super) fn speak(&mut self, now: Duration, frames: &mut Vec<Outgoing>) {
        for frame in self.own.since(&self.me, self.sent) {
            frames.push(Outgoing {
                to: None,
                frame: frame.encode(),
            });
        }
        self.sent = self.own.version;
        if now < self.next_known {
            return;
        }
        self.next_known = now + TELL_EVERY;
        let reachable: Vec<NodeName> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.swim)
            .map(|(name, _)| name.clone())
            .collect();
        if reachable.is_empty() {
            return;
        }
        self.known_turn = self.known_turn.wrapping_add(1);
        let peer = &reachable[self.known_turn % reachable.len()];
        frames.extend(self.greet(peer));
    }
}
