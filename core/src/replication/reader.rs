//! The standby's side of one group.

use std::collections::HashSet;

use super::{Binding, Change, Position};

/// What a message asks the standby to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// In this order, the same binding at most once: what is to be there, and what is not. Then say how far.
    Apply {
        /// To be inserted.
        insert: Vec<Binding>,
        /// To be removed.
        remove: Vec<Binding>,
        /// How far all is known, if it is.
        position: Option<Position>,
    },
    /// All bindings of the group but these are to be removed: they have ended while nobody said so.
    Keep {
        /// Those that are there.
        bindings: HashSet<Binding>,
        /// How far all is known.
        position: Position,
    },
    /// Nothing.
    Wait,
}

/// Why a message is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Who writes has been succeeded.
    #[error("epoch {told}, though {known} is known: the writer is no longer the gateway")]
    Stale {
        /// The writer's.
        told: u64,
        /// The highest that is known.
        known: u64,
    },
    /// Changes are missing, or came without a beginning: all bindings are to be asked for.
    #[error("changes are missing")]
    Gap,
}

/// Follows a group's gateway.
#[derive(Debug, Default)]
pub struct Reader {
    /// The highest epoch that was heard of, from whomever.
    epoch: u64,
    position: Option<Position>,
    /// While all bindings are copied: those that were named.
    copying: Option<HashSet<Binding>>,
}

impl Reader {
    /// Someone claims the group in this epoch: who writes in an earlier one is not believed.
    pub fn claimed(&mut self, epoch: u64) {
        self.epoch = self.epoch.max(epoch);
    }

    /// How far all is known: from here on changes are asked for.
    pub fn known(&self) -> Option<Position> {
        self.position.filter(|_| self.copying.is_none())
    }

    /// The connection is gone: a copy that was not finished is worth nothing.
    pub fn interrupted(&mut self) {
        if self.copying.take().is_some() {
            self.position = None;
        }
    }

    fn admit(&mut self, told: u64) -> Result<(), Refusal> {
        if told < self.epoch {
            let known = self.epoch;
            return Err(Refusal::Stale { told, known });
        }
        self.epoch = told;
        Ok(())
    }

    /// All bindings follow.
    pub fn begin(&mut self, position: Position) -> Result<Step, Refusal> {
        self.admit(position.epoch)?;
        self.position = Some(position);
        self.copying = Some(HashSet::new());
        Ok(Step::Wait)
    }

    /// Some of them.
    pub fn held(&mut self, bindings: Vec<Binding>) -> Result<Step, Refusal> {
        self.still()?;
        let named = self.copying.as_mut().ok_or(Refusal::Gap)?;
        named.extend(&bindings);
        Ok(Step::Apply {
            insert: bindings,
            remove: Vec::new(),
            position: None,
        })
    }

    /// That were all.
    pub fn end(&mut self) -> Result<Step, Refusal> {
        let position = self.still()?;
        let bindings = self.copying.take().ok_or(Refusal::Gap)?;
        Ok(Step::Keep { bindings, position })
    }

    /// Changes.
    pub fn changes(&mut self, first: Position, changes: Vec<Change>) -> Result<Step, Refusal> {
        self.admit(first.epoch)?;
        if self.position != Some(first) {
            self.position = None;
            self.copying = None;
            return Err(Refusal::Gap);
        }
        let position = Position {
            epoch: first.epoch,
            next: first.next + changes.len() as u64,
        };
        self.position = Some(position);
        // The last word on each binding counts.
        let (mut insert, mut remove) = (Vec::new(), Vec::new());
        let mut said = HashSet::new();
        for change in changes.into_iter().rev() {
            let (Change::New(binding) | Change::Closed(binding)) = change;
            if !said.insert(binding) {
                continue;
            }
            match change {
                Change::New(_) => insert.push(binding),
                Change::Closed(_) => remove.push(binding),
            }
        }
        if let Some(named) = &mut self.copying {
            for binding in &remove {
                named.remove(binding);
            }
            named.extend(&insert);
        }
        Ok(Step::Apply {
            insert,
            remove,
            position: self.known(),
        })
    }

    /// Whether who copies is still believed.
    fn still(&self) -> Result<Position, Refusal> {
        let position = self.position.ok_or(Refusal::Gap)?;
        if position.epoch < self.epoch {
            return Err(Refusal::Stale {
                told: position.epoch,
                known: self.epoch,
            });
        }
        Ok(position)
    }
}
