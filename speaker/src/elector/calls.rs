//! Calls of the CNI plugin: each waits until its pod is judged, and the kernel goes by that, here and at the pod's gateway.

use std::net::IpAddr;
use std::time::Duration;

use landfall_cni::call::{Attachment, Reply, Request};
use landfall_core::egress::Judged;
use tokio::sync::oneshot;

use super::{Speaker, attached};
use crate::cni::Call;
use crate::egress::{Egress, InForce};

/// Rules and data path follow a call sooner than other changes, and further ones at most this often.
pub(super) const CALLS_EVERY: Duration = Duration::from_millis(10);

/// Those who wait for an answer.
#[derive(Debug, Default)]
pub(super) struct Calls {
    waiting: Vec<(Attachment, oneshot::Sender<Reply>)>,
}

impl Speaker {
    /// Whether somebody waits for what is about to be in force: a pod that is being made, here or at another node.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.calls.waiting.is_empty() || self.owed().next().is_some()
    }

    /// Takes in what the CNI plugin says.
    pub fn cni(&mut self, call: Call, now: Duration) {
        let (Request::Add(of) | Request::Del(of)) = &call.request;
        let pod = attached::pod(of);
        let events = match call.request {
            Request::Add(attachment) => {
                let events = self.attached.add(attachment.clone());
                self.calls.waiting.push((attachment, call.answer));
                events
            }
            Request::Del(attachment) => {
                let events = self.attached.del(&attachment);
                // It may have gone.
                let _ = call.answer.send(Reply {
                    judged: true,
                    reason: None,
                });
                events
            }
        };
        if !events.is_empty() {
            self.apply_soon(now);
        }
        for event in events {
            self.say_pod_of(&event);
            self.egress.apply(event);
        }
        if let Some(pod) = pod {
            self.say_pod(&pod);
        }
    }

    /// Answers the calls that can be answered, and forgets those that nobody waits for.
    pub(super) fn answer_calls(&mut self) {
        let waiting = std::mem::take(&mut self.calls.waiting);
        if waiting.is_empty() {
            return;
        }
        let rules = self.parts.rules.in_force().borrow().clone();
        let datapath = self.parts.datapath.in_force().borrow().clone();
        let in_force = [rules, datapath];
        for (attachment, answer) in waiting {
            if answer.is_closed() {
                continue;
            }
            match self.outcome(&attachment, &in_force) {
                Outcome::Wait => self.calls.waiting.push((attachment, answer)),
                Outcome::Judged => reply(answer, None),
                Outcome::Never(reason) => reply(answer, Some(reason)),
            }
        }
    }

    fn outcome(&self, attachment: &Attachment, in_force: &[InForce; 2]) -> Outcome {
        if !self.plan.has_begun() {
            return Outcome::Wait;
        }
        let wanted = self.plan.wanted();
        if wanted.policies.is_empty() {
            let none = in_force.iter().all(|it| *it == InForce::Nothing);
            return if none { Outcome::Judged } else { Outcome::Wait };
        }
        let Some(key) = attached::pod(attachment) else {
            return Outcome::Never("the container runtime has not said which pod it is");
        };
        if attachment.addresses.is_empty() {
            return Outcome::Never("the plugins before have given it no address");
        }
        let judged = |address: &IpAddr| {
            let of_it = |judged: &Judged| judged.pod == key;
            self.egress.judged().get(address).is_some_and(of_it)
                && in_force.iter().all(|it| is_so(*address, wanted, it))
        };
        let is_known = self.attached.knows(attachment) && attachment.addresses.iter().all(judged);
        if is_known && self.is_known_at_gateways(&key) {
            Outcome::Judged
        } else {
            Outcome::Wait
        }
    }
}

/// Whether the kernel goes by what is wanted of an address.
pub(super) fn is_so(address: IpAddr, wanted: &Egress, in_force: &InForce) -> bool {
    let (InForce::Whole(there), Some(pod)) = (in_force, wanted.pods.get(&address)) else {
        return false;
    };
    let known = |policy| there.policies.contains_key(policy);
    let policy = pod.tenant.as_ref().map(|tenant| &tenant.policy);
    there.pods.get(&address) == Some(pod) && policy.is_none_or(known)
}

enum Outcome {
    Wait,
    Judged,
    /// Waiting is of no use.
    Never(&'static str),
}

/// A caller that has gone is no error.
fn reply(answer: oneshot::Sender<Reply>, problem: Option<&str>) {
    let _ = answer.send(Reply {
        judged: problem.is_none(),
        reason: problem.map(str::to_owned),
    });
}
