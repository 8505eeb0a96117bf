//! Bounded load: a node that leads much more than its share for long gives groups away, one at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Elector, Registers};
use crate::election::eligibility::{Segments, judge};
use crate::election::peer::ClaimMode;
use crate::groups::{GroupId, GroupIndex};
use crate::model::NodeName;

/// Loads are counted this often.
const LOOK_EVERY: Duration = Duration::from_secs(10);

impl Elector {
    pub(super) fn rebalance(&mut self, now: Duration, index: &GroupIndex) {
        if now < self.next_rebalance {
            return;
        }
        self.next_rebalance = now + LOOK_EVERY.min(self.config.rebalance_every);
        let loads = self.loads();
        let mine = loads.get(&self.me).copied().unwrap_or(0);
        if self.leaving || !self.is_over(mine, &loads) {
            self.overloaded_since = None;
            return;
        }
        let since = *self.overloaded_since.get_or_insert(now);
        if now.saturating_sub(since) < self.config.overload_after {
            return;
        }
        if let Some((id, to)) = self.surplus(mine, &loads, index) {
            self.next_rebalance = now + self.config.rebalance_every;
            if let Some(mut register) = self.own.group(&id).cloned()
                && let Some(claim) = register.claim.as_mut()
            {
                claim.mode = ClaimMode::Yielding { to: Some(to) };
                self.own.set_group(&id, Some(register));
                if let Some(local) = self.local.get_mut(&id) {
                    local.yield_since = Some(now);
                }
                self.dirty.insert(id);
            }
        }
    }

    /// How many groups each living node leads.
    fn loads(&self) -> BTreeMap<NodeName, usize> {
        self.alive()
            .filter_map(|node| Some((node, self.registers(node)?)))
            .filter(|(_, registers)| {
                Registers::register(registers).is_some_and(|register| register.synced)
            })
            .map(|(node, registers)| {
                let led = registers
                    .groups()
                    .filter_map(|(_, register)| register.claim.as_ref())
                    .filter(|claim| claim.held())
                    .count();
                (node.clone(), led)
            })
            .collect()
    }

    fn is_over(&self, mine: usize, loads: &BTreeMap<NodeName, usize>) -> bool {
        let all: usize = loads.values().sum();
        // mine > percent/100 * all / nodes, in whole numbers; and by more than one group.
        let percent = self.config.overload_percent as usize;
        let least = loads.values().min().copied().unwrap_or(0);
        mine * 100 * loads.len() > percent * all && mine > least + 1
    }

    /// A group to give away, and to whom: the least loaded node that could lead it as well as this one.
    fn surplus(
        &self,
        mine: usize,
        loads: &BTreeMap<NodeName, usize>,
        index: &GroupIndex,
    ) -> Option<(GroupId, NodeName)> {
        let names: Vec<NodeName> = self.alive().cloned().collect();
        let mut segments = Segments::default();
        self.leaderships().find_map(|(id, _)| {
            let group = index.groups().get(id)?;
            if !group.rebalance() {
                return None;
            }
            let subjects = self.subjects(id, &names);
            let verdicts = judge(group, &subjects, Some(&self.me), &mut segments);
            let weight = group.weight(&self.me);
            names
                .iter()
                .zip(&verdicts)
                .filter(|(node, verdict)| {
                    **node != self.me && verdict.is_ok() && group.weight(node) >= weight
                })
                .filter(|(node, _)| {
                    let register = self.registers(node).and_then(|r| r.group(id));
                    register.is_some_and(|register| register.ready)
                })
                .filter_map(|(node, _)| Some((*loads.get(node)?, node)))
                .filter(|(load, _)| load + 1 < mine)
                .min()
                .map(|(_, node)| (id.clone(), node.clone()))
        })
    }
}
