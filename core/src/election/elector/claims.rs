//! When a claim is made, kept, yielded and dropped.

use std::collections::BTreeMap;
use std::time::Duration;

use super::table::Table;
use super::{Change, Elector, Local};
use crate::election::decide::{Candidate, beats, score};
use crate::election::eligibility::Ineligible;
use crate::election::peer::{Claim, ClaimMode};
use crate::groups::{Group, GroupId};
use crate::model::NodeName;

impl Elector {
    /// Whether a claim of this node stays; it may begin or end to yield.
    #[expect(
        clippy::too_many_arguments,
        reason = "one step of `evaluate`, cut out to be read alone"
    )]
    pub(super) fn keep(
        &self,
        id: &GroupId,
        group: &Group,
        table: &Table<'_>,
        mine: &mut Claim,
        now: Duration,
        local: &mut Local,
        changes: &mut Vec<Change>,
    ) -> bool {
        let Some(me) = table.me.map(|at| &table.entries[at]) else {
            return false;
        };
        let rival = table.best_held(id, Some(&self.me));
        if let Some((node, epoch)) = rival {
            if !mine.held() || beats(id, (node, epoch), (&self.me, mine.epoch)) {
                return false;
            }
            if !local.contested {
                changes.push(Change::Reannounce(id.clone()));
            }
            local.contested = true;
        } else if std::mem::take(&mut local.contested) {
            changes.push(Change::Reannounce(id.clone()));
        }
        let ranked = table.ranked(id, Some(&self.me));
        match me.refusal {
            Some(reason) if !reason.is_soft() => return false,
            Some(reason) => {
                let stays = matches!(
                    reason,
                    Ineligible::Leaving | Ineligible::Odd | Ineligible::Gateless
                );
                if ranked.is_empty() {
                    // Nobody could take it: stopping or differing, this node is better than none.
                    mine.mode = ClaimMode::Held;
                    local.yield_since = None;
                    return stays;
                }
                mine.mode = ClaimMode::Yielding { to: None };
                let since = *local.yield_since.get_or_insert(now);
                return stays || now.saturating_sub(since) < self.config.yield_at_most;
            }
            None => {}
        }
        if let ClaimMode::Yielding { to } = &mine.mode {
            let since = *local.yield_since.get_or_insert(now);
            if to.is_none() || now.saturating_sub(since) >= self.config.yield_at_most {
                mine.mode = ClaimMode::Held;
                local.yield_since = None;
            }
            return true;
        }
        if group.failback() && !self.leaving {
            let all = table.ranked(id, None);
            let best = all
                .first()
                .filter(|best| *best.node != self.me && best.ready);
            match best {
                Some(best) => {
                    let since = match &local.better_since {
                        Some((node, since)) if node == best.node => *since,
                        _ => now,
                    };
                    local.better_since = Some((best.node.clone(), since));
                    if now.saturating_sub(since) >= self.config.failback_after {
                        mine.mode = ClaimMode::Yielding {
                            to: Some(best.node.clone()),
                        };
                        local.yield_since = Some(now);
                        local.better_since = None;
                    }
                }
                None => local.better_since = None,
            }
        }
        true
    }

    /// Whether this node should claim now.
    pub(super) fn take(
        &self,
        group: &Group,
        table: &Table<'_>,
        now: Duration,
        local: &mut Local,
    ) -> bool {
        let id = &group.id;
        let held = table.best_held(id, None);
        let in_peace = held.is_some_and(|(node, _)| table.refusal(node).is_none());
        if in_peace {
            local.vacant_since = None;
            return false;
        }
        let since = *local.vacant_since.get_or_insert(now);
        let settled = self
            .heard_out
            .is_some_and(|at| now.saturating_sub(at) >= self.config.settle);
        if !settled || self.leaving {
            return false;
        }
        let ranked = table.ranked(id, None);
        let named = table.named_successor();
        let mut order: Vec<&Candidate<'_>> = ranked;
        if let Some(named) = named {
            order.sort_by_key(|candidate| candidate.node != named);
        }
        let recorded = recorded(group).filter(|_| local.seen == 0);
        // It is there, and about to be ready.
        let comes = recorded.is_some_and(|node| {
            match order.iter().find(|candidate| candidate.node == node) {
                Some(candidate) => !candidate.ready,
                None => matches!(
                    table.refusal(node),
                    Some(Ineligible::NotSynced | Ineligible::NotHeard(_))
                ),
            }
        });
        if let Some(recorded) = recorded.filter(|_| !comes) {
            order.sort_by_key(|candidate| candidate.node != recorded);
        }
        let Some(at) = order
            .iter()
            .position(|candidate| *candidate.node == self.me)
        else {
            local.vacant_since = None;
            return false;
        };
        let config = &self.config;
        let steps = u32::try_from(at).unwrap_or(u32::MAX);
        let mut delay = config.stand_in.saturating_mul(steps);
        if held.is_some() {
            delay += config.stand_in; // Its leader should yield by itself.
        }
        let hash_first = order
            .iter()
            .max_by_key(|candidate| score(id, candidate.node, candidate.weight))
            .is_some_and(|candidate| *candidate.node == self.me);
        if !order[at].ready || comes {
            delay += config.ready_grace;
        } else if local.seen == 0 && !hash_first && at == 0 && recorded != Some(&self.me) {
            delay += config.settle;
        }
        now.saturating_sub(since) >= delay
    }

    /// Whether this node's inputs have differed from the majority's for too long.
    pub(super) fn is_odd(
        &self,
        id: &GroupId,
        group: &Group,
        names: &[NodeName],
        now: Duration,
        local: &mut Local,
    ) -> bool {
        let mut votes: BTreeMap<u64, usize> = BTreeMap::from([(group.digest, 1)]);
        for node in names.iter().filter(|node| **node != self.me) {
            if let Some(theirs) = self.registers(node).and_then(|r| r.group(id)) {
                *votes.entry(theirs.digest).or_default() += 1;
            }
        }
        let all: usize = votes.values().sum();
        let differs = votes
            .iter()
            .any(|(digest, count)| *digest != group.digest && count * 2 > all);
        if !differs {
            local.odd_since = None;
            return false;
        }
        now.saturating_sub(*local.odd_since.get_or_insert(now)) >= self.config.odd_after
    }
}

/// Who led a group by its record, where that one's kernel holds what its pods' flows live by: it goes on if nobody has
/// claimed the group yet, as after the end of all speakers.
fn recorded(group: &Group) -> Option<&NodeName> {
    let mut vips = group.vips.iter();
    let leader = vips.find_map(|vip| vip.reported_leader.as_ref());
    leader.filter(|_| !group.egress.is_empty())
}
