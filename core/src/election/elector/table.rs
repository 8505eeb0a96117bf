//! Those who could lead one group, with what they claim and what is held against them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use super::{Elector, View};
use crate::election::decide::{Candidate, beats, rank, score};
use crate::election::eligibility::{Ineligible, InterfaceChoice, Verdict};
use crate::election::peer::{Claim, ClaimMode};
use crate::groups::Group;
use crate::model::NodeName;

/// A living node in the election of one group.
pub(super) struct Entry<'a> {
    pub(super) node: &'a NodeName,
    pub(super) claim: Option<&'a Claim>,
    pub(super) refusal: Option<&'a Ineligible>,
    pub(super) places: Option<&'a BTreeMap<IpAddr, InterfaceChoice>>,
}

/// All of them.
pub(super) struct Table<'a> {
    pub(super) entries: Vec<Entry<'a>>,
    pub(super) candidates: Vec<Candidate<'a>>,
    pub(super) me: Option<usize>,
    /// Damping ends by itself, so the group is looked at again.
    pub(super) waiting: bool,
}

impl<'a> Table<'a> {
    pub(super) fn new(
        elector: &'a Elector,
        group: &Group,
        names: &'a [NodeName],
        verdicts: &'a [Verdict],
        ready: bool,
        now: Duration,
    ) -> Self {
        let mut table = Self {
            entries: Vec::with_capacity(names.len()),
            candidates: Vec::new(),
            me: None,
            waiting: false,
        };
        for (node, verdict) in names.iter().zip(verdicts) {
            let register = elector.registers(node).and_then(|r| r.group(&group.id));
            let claim = register.and_then(|register| register.claim.as_ref());
            if *node == elector.me {
                table.me = Some(table.entries.len());
            }
            table.entries.push(Entry {
                node,
                claim,
                refusal: verdict.as_ref().err(),
                places: verdict.as_ref().ok(),
            });
            if verdict.is_ok() {
                let ready = if *node == elector.me {
                    ready
                } else {
                    register.is_some_and(|register| register.ready)
                };
                let damped = elector.is_damped(node, now);
                table.candidates.push(Candidate {
                    node,
                    weight: group.weight(node),
                    ready,
                    damped,
                    claim,
                    unwilling: claim.is_some_and(|claim| !claim.held()),
                });
            }
        }
        table
    }

    pub(super) fn refusal(&self, node: &NodeName) -> Option<&Ineligible> {
        self.entries
            .iter()
            .find(|entry| entry.node == node)
            .and_then(|entry| entry.refusal)
    }

    /// The claim that stands, of nodes other than `except`.
    pub(super) fn best_held(
        &self,
        id: &str,
        except: Option<&NodeName>,
    ) -> Option<(&'a NodeName, u64)> {
        let mut best: Option<(&NodeName, u64)> = None;
        for entry in &self.entries {
            if Some(entry.node) == except || entry.refusal.is_some_and(|reason| !reason.is_soft()) {
                continue;
            }
            if let Some(claim) = entry.claim.filter(|claim| claim.held())
                && best.is_none_or(|best| beats(id, (entry.node, claim.epoch), best))
            {
                best = Some((entry.node, claim.epoch));
            }
        }
        best
    }

    pub(super) fn ranked(&self, id: &str, except: Option<&NodeName>) -> Vec<&Candidate<'a>> {
        let mut ranked = rank(id, &self.candidates);
        ranked.retain(|candidate| Some(candidate.node) != except);
        ranked
    }

    /// Next in rank once all serve the group: by the hash alone, so that it does not change while they come to.
    pub(super) fn standby(&self, id: &str, leader: Option<&NodeName>) -> Option<NodeName> {
        self.candidates
            .iter()
            .filter(|candidate| Some(candidate.node) != leader && !candidate.unwilling)
            .max_by_key(|candidate| {
                (
                    !candidate.damped,
                    score(id, candidate.node, candidate.weight),
                )
            })
            .map(|candidate| candidate.node.clone())
    }

    pub(super) fn named_successor(&self) -> Option<&'a NodeName> {
        self.entries.iter().find_map(|entry| match entry.claim {
            Some(Claim {
                mode: ClaimMode::Yielding { to },
                ..
            }) => to.as_ref(),
            _ => None,
        })
    }

    pub(super) fn view(&self, elector: &Elector, id: &str, own: Option<&Claim>) -> View {
        let mut leading: Option<(&NodeName, &Claim)> = None;
        for entry in &self.entries {
            if entry.refusal.is_some_and(|reason| !reason.is_soft()) {
                continue;
            }
            let claim = if *entry.node == elector.me {
                own
            } else {
                entry.claim
            };
            let Some(claim) = claim else { continue };
            // A claim that stays goes before one that yields, whatever their epochs.
            let better = leading.is_none_or(|(node, best)| {
                (claim.held(), true) > (best.held(), true)
                    || (claim.held() == best.held()
                        && beats(id, (entry.node, claim.epoch), (node, best.epoch)))
            });
            if better {
                leading = Some((entry.node, claim));
            }
        }
        let leader = leading.map(|(node, _)| node);
        View {
            leader: leader.cloned(),
            standby: self.standby(id, leader),
            epoch: leading.map_or(0, |(_, claim)| claim.epoch),
            since: leading.map_or(0, |(_, claim)| claim.since),
            eligible: self.candidates.len(),
        }
    }
}
