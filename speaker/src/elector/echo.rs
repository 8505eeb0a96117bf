//! The witness of another node's data path: an echo that its kernel answers, with or without a living speaker.
//!
//! Who says hello needs no witness. Once a node that steers has not been heard for a while on an interface, it is asked
//! there, ten times a second. While it answers, its speaker is absent and no more: it stays in the tables. Once a
//! question is left unanswered it is suspected: what it has it keeps, new flows go elsewhere. After three it is gone.
//!
//! ```text
//!  2 (a request) or 3 (an answer) 1 B | token 8 B
//! ```
//! The token is random, so that nobody can answer who was not asked; who is on the way could, and could as well take
//! the packets themselves.

use std::time::Duration;

use landfall_core::model::NodeName;
use landfall_ebpf_common::echo;

use super::Speaker;
use crate::announcer::MacAddr;
use crate::datapath::NodeId;

/// Who was not heard for so long is asked: two hellos did not come.
const SILENT: Duration = Duration::from_millis(600);
/// Time between two questions, and between two to a node that is gone.
const EVERY: Duration = Duration::from_millis(100);
const EVERY_GONE: Duration = Duration::from_secs(1);
/// So many questions without an answer, and it is gone.
const PATIENCE: u32 = 3;

/// What is known of a node that is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Echo {
    token: u64,
    asked: Duration,
    /// The last question has no answer yet, which it may still get.
    open: bool,
    /// Questions in a row that got none before the next was due.
    unanswered: u32,
}

impl Speaker {
    /// Asks those who are not heard, and draws the conclusions.
    pub(super) fn ask_echoes(&mut self, now: Duration) {
        let mut questions = Vec::new();
        let mut changed = false;
        for (id, mac) in &self.macs {
            let heard = self
                .name_of(id.interface)
                .and_then(|interface| self.election.last_hello(&id.name, &interface));
            let steers = self
                .election
                .register(&id.name)
                .is_some_and(|register| register.capabilities.steers);
            if !steers || heard.is_some_and(|heard| now.saturating_sub(heard) < SILENT) {
                let echo = self.echoes.remove(id);
                changed |= echo.is_some_and(|echo| echo.is_over());
                self.nodes_stale |= echo.is_some_and(|echo| echo.is_suspected());
                continue;
            }
            let echo = self.echoes.entry(id.clone()).or_insert(Echo {
                token: 0,
                asked: Duration::ZERO,
                open: false,
                unanswered: 0,
            });
            let before = echo.is_over();
            let every = if before { EVERY_GONE } else { EVERY };
            if now.saturating_sub(echo.asked) < every {
                continue;
            }
            let suspected = echo.is_suspected();
            if echo.open {
                echo.unanswered = echo.unanswered.saturating_add(1);
            }
            // The data path is told who is suspected and no more: no table changes.
            self.nodes_stale |= echo.is_suspected() != suspected;
            if echo.is_over() && !before {
                tracing::warn!(
                    node = %id.name,
                    interface = id.interface,
                    "a node's kernel answers no more: the node is out of the tables"
                );
                changed = true;
            }
            // A late answer to an earlier question of the series is an answer.
            if echo.unanswered == 0 {
                echo.token = rand::random();
            }
            echo.asked = now;
            echo.open = true;
            questions.push((id.interface, *mac, echo.token));
        }
        for (interface, mac, token) in questions {
            let payload = echo::message(echo::REQUEST, token);
            self.parts.announcer.hello(interface, Some(mac), &payload);
        }
        if changed {
            for id in self.echoes.keys() {
                let mut elsewhere = self
                    .echoes
                    .iter()
                    .filter(|(other, _)| other.name == id.name);
                if elsewhere.all(|(_, echo)| echo.is_over()) {
                    self.election.gone(&id.name);
                }
            }
            self.nodes_stale = true;
            self.desired.forget();
            self.apply_at.get_or_insert(now);
        }
    }

    /// A frame that is no hello; says whether it was an answer.
    pub(super) fn echo(
        &mut self,
        interface: u32,
        from: MacAddr,
        payload: &[u8],
        now: Duration,
    ) -> bool {
        let Some((kind, token)) = echo::read(payload) else {
            return false;
        };
        let asked = self.echoes.iter_mut().find(|(id, echo)| {
            id.interface == interface && echo.token == token && self.macs.get(id) == Some(&from)
        });
        if kind == echo::ANSWER
            && let Some((id, echo)) = asked
        {
            let was_over = echo.is_over();
            self.nodes_stale |= echo.is_suspected();
            echo.open = false;
            echo.unanswered = 0;
            let name = id.name.clone();
            self.election.remember(&name, now);
            if was_over {
                tracing::info!(node = %name, interface, "a node's kernel answers again");
                self.nodes_stale = true;
                self.desired.forget();
                self.apply_at.get_or_insert(now);
            }
        }
        true
    }

    /// Whether a node may be gone: it has left a question unanswered, and has the time of two more.
    pub(super) fn is_suspected(&self, id: &NodeId) -> bool {
        self.echoes.get(id).is_some_and(Echo::is_suspected)
    }

    /// Whether packets that are sent to a node by an interface arrive, as far as is known.
    pub(super) fn is_there(&self, node: &NodeName, interface: u32) -> bool {
        if *node == self.identity.node {
            return true;
        }
        let id = NodeId {
            name: node.clone(),
            interface,
        };
        if self.says_down(&id) {
            return false;
        }
        if self.tunnel() == Some(interface) {
            return self.election.is_alive(node);
        }
        match self.echoes.get(&id) {
            Some(echo) => !echo.is_over(),
            // Without a program it is as alive as its speaker.
            None => self.name_of(interface).is_some_and(|name| {
                self.election.is_alive(node) && self.election.last_hello(node, &name).is_some()
            }),
        }
    }
}

impl Speaker {
    /// Whether a node itself says, by another way, that the interface at which it was heard is down.
    pub(super) fn says_down(&self, id: &NodeId) -> bool {
        let (Some(mac), Some(register)) = (self.macs.get(id), self.election.register(&id.name))
        else {
            return false;
        };
        self.election.is_alive(&id.name)
            && register
                .interfaces
                .iter()
                .any(|interface| interface.mac == mac.0 && !interface.up)
    }
}

impl Echo {
    fn is_over(&self) -> bool {
        self.unanswered >= PATIENCE
    }

    fn is_suspected(&self) -> bool {
        self.unanswered > 0 && !self.is_over()
    }
}
