//! Of which policies this node can be the gateway: nobody, this node itself included, leads packets to it before it says so.
//!
//! It says so of a policy when rules, guard and gateway's programs go by it. The word stands as long as the policy is known
//! here, whoever leads its addresses: what a take-over changes is written where packets are dropped until then.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use landfall_core::election::policy_id;
use landfall_core::groups::{Group, GroupId};
use tokio::sync::watch;

use super::super::{Parts, Speaker};
use crate::datapath::egress::State;
use crate::egress::{InForce, PolicyName};

/// What was said, and what it goes by.
#[derive(Debug)]
pub(in super::super) struct Gates {
    rules: watch::Receiver<InForce>,
    guard: watch::Receiver<InForce>,
    programs: watch::Receiver<InForce>,
    /// It is to be looked at again.
    stale: bool,
    said: BTreeMap<GroupId, BTreeSet<PolicyName>>,
    failed_since: Option<Duration>,
    /// It was said in the log that policies are ignored.
    warned: bool,
}

impl Gates {
    pub(in super::super) fn of(parts: &Parts) -> Self {
        Self {
            rules: parts.rules.in_force(),
            guard: parts.datapath.in_force(),
            programs: parts.datapath.gateway_in_force(),
            stale: true,
            said: BTreeMap::new(),
            failed_since: None,
            warned: false,
        }
    }

    /// Policies or groups may be others now.
    pub(in super::super) fn look_again(&mut self) {
        self.stale = true;
    }

    fn is_due(&mut self) -> bool {
        let parts = [&mut self.rules, &mut self.guard, &mut self.programs];
        let changed = parts.map(|part| {
            // Who would say more may have gone: then nothing changes.
            let has_changed = part.has_changed().unwrap_or(false);
            part.mark_unchanged();
            has_changed
        });
        std::mem::take(&mut self.stale) || changed.contains(&true)
    }

    /// Whether all parts go by a policy, with a gateway, be it this node or another.
    fn are_in_force(&self, policy: &PolicyName) -> bool {
        let knows = |part: &watch::Receiver<InForce>| match &*part.borrow() {
            InForce::Whole(egress) => egress.policies.contains_key(policy),
            InForce::Unknown | InForce::Nothing => false,
        };
        let leads = match &*self.programs.borrow() {
            InForce::Whole(egress) => {
                let policy = egress.policies.get(policy);
                policy.is_some_and(|policy| policy.gateway.is_some())
            }
            InForce::Unknown | InForce::Nothing => false,
        };
        leads && knows(&self.rules) && knows(&self.guard)
    }
}

/// How long programs may not be in force before another node is to be the gateway.
const FAILED: Duration = Duration::from_secs(10);

impl Speaker {
    /// Says whether this node cannot be a gateway, if it cannot for a while.
    pub(in super::super) fn look_at_gateway(&mut self, now: Duration) {
        let failed = matches!(self.parts.datapath.gateway(), State::Failed(_));
        let since = &mut self.gates.failed_since;
        *since = failed.then(|| since.unwrap_or(now));
        let for_long = since.is_some_and(|since| now.saturating_sub(since) >= FAILED);
        let is_none = for_long || !self.treats_egress() || self.hands_egress_over();
        self.election.set_gateless(is_none);
    }

    /// Says of which policies this node can be the gateway, if there may be news.
    pub(in super::super) fn say_gates(&mut self) {
        if !self.gates.is_due() {
            return;
        }
        let has = self.treats_egress() && !self.is_disarmed();
        self.election.set_has_gates(has);
        let before = std::mem::take(&mut self.gates.said);
        let ignored = !self.treats_egress() && self.plan.policies().next().is_some();
        if ignored && !std::mem::replace(&mut self.gates.warned, true) {
            tracing::warn!(
                "there are egress policies, and this speaker runs without --egress: this node's pods leave as if there were none"
            );
        }
        if !has {
            for group in before.keys() {
                self.election.set_gates(group, BTreeSet::new());
                self.stale.insert(group.clone());
            }
            self.metrics.egress_policies_settled.set(0);
            return;
        }
        let none = BTreeSet::new();
        for (id, group) in self.index.groups() {
            let known = before.get(id).unwrap_or(&none);
            let policies = group.egress.iter().filter(|policy| {
                self.plan.wanted.policies.contains_key(*policy)
                    && (known.contains(*policy) || self.is_settled(policy))
            });
            let said: BTreeSet<PolicyName> = policies.cloned().collect();
            if said != *known {
                let ids = said.iter().map(|policy| policy_id(policy)).collect();
                self.election.set_gates(id, ids);
                self.stale.insert(id.clone());
            }
            if !said.is_empty() {
                self.gates.said.insert(id.clone(), said);
            }
        }
        let count = i64::try_from(self.settled().len()).unwrap_or(i64::MAX);
        self.metrics.egress_policies_settled.set(count);
    }

    /// Whether this node's kernel goes by a policy. Before this process has put anything into it, by what an earlier one has
    /// left.
    fn is_settled(&self, policy: &PolicyName) -> bool {
        let is_unknown = *self.gates.programs.borrow() == InForce::Unknown;
        if is_unknown {
            self.parts.datapath.was_gateway_of(policy)
        } else {
            self.gates.are_in_force(policy)
        }
    }

    /// The policies of which this node says that it can be the gateway.
    pub(in super::super) fn settled(&self) -> BTreeSet<&PolicyName> {
        self.gates.said.values().flatten().collect()
    }

    /// Those of a group's of which it does not say so.
    pub fn unsettled<'a>(&'a self, group: &'a Group) -> impl Iterator<Item = &'a PolicyName> {
        let said = self.gates.said.get(&group.id);
        let is_said = move |policy: &PolicyName| said.is_some_and(|said| said.contains(policy));
        group.egress.iter().filter(move |policy| !is_said(policy))
    }

    /// Why it does not, and what to do.
    pub fn why_unsettled(&self) -> String {
        if !self.treats_egress() {
            return "its speaker runs without --egress: give it that, or select other gateways"
                .to_owned();
        }
        if self.is_disarmed() {
            return "egress is disarmed there (`landfall egress arm` ends that)".to_owned();
        }
        match self.parts.datapath.gateway() {
            State::Failed(reason) => {
                format!("its programs are not in force, and are tried again: {reason}")
            }
            State::Idle | State::Armed(_) => {
                "its rules and programs are not all in force for them".to_owned()
            }
        }
    }
}
