//! What `VirtualIP.status` should say, and when to say it.
//!
//! The leader reports its addresses; for a group that no node could lead, the living speaker with the smallest
//! name does. A change of leader, place or condition is written at once, of anything else now and then.

mod drops;
mod gateway;
mod served;
mod steered;
pub mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use landfall_api::conditions::{
    FLOWS_GO_ON, VIRTUAL_IP_ANNOUNCED, VIRTUAL_IP_DRAINING, VIRTUAL_IP_GATEWAY_READY,
    VIRTUAL_IP_SERVED, VIRTUAL_IP_STEERED, announced,
};
use landfall_core::election::Verdict;
use landfall_core::groups::{Group, GroupId, GroupVip};
use landfall_core::ip::virtual_ip_name;
use landfall_core::model::{Holder, NodeName};
use serde_json::{Value, json};

use crate::egress::PolicyName;
use crate::elector::Speaker;
use drops::Drops;

/// What belongs together is written together.
const COALESCE: Duration = Duration::from_millis(200);
/// A group must be without leader for so long before that is reported.
const LEADERLESS: Duration = Duration::from_secs(1);
/// Flows on addresses that nobody could announce for so long are over: who had something to say on them has given up long ago (a
/// TCP of Linux after 925 s, `tcp_retries2`).
const ABANDONED: Duration = Duration::from_mins(20);
/// Standby and endpoint nodes are written at most this often.
const MINOR_EVERY: Duration = Duration::from_secs(10);
/// What was observed is compared with what was said this often.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// What was dropped is looked at this often.
const DROPS_EVERY: Duration = Duration::from_secs(5);
/// Nodes that are named in a message.
const MAX_NODES: usize = 20;

/// Something to write.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// A `VirtualIP`'s status, as a merge patch.
    Status {
        /// The object's name.
        name: String,
        /// The patch.
        patch: Value,
    },
    /// An Event.
    Event {
        /// What it is about: a Service, or an egress policy.
        about: Holder,
        /// The UID of that, if it is known.
        uid: String,
        /// A CamelCase word.
        reason: &'static str,
        /// What happened, and what to do.
        note: String,
    },
}

/// A condition.
#[derive(Clone, Debug, PartialEq)]
struct Condition {
    holds: bool,
    reason: &'static str,
    message: String,
}

impl Condition {
    fn json(&self, kind: &str, transition: u64) -> Value {
        json!({
            "type": kind,
            "status": if self.holds { "True" } else { "False" },
            "reason": self.reason,
            "message": self.message,
            "lastTransitionTime": time(transition),
        })
    }
}

/// What one status should say.
#[derive(Clone, Debug, PartialEq)]
struct Status {
    leader: Option<NodeName>,
    since: u64,
    epoch: u64,
    interface: Option<String>,
    mac: Option<String>,
    announced: Condition,
    /// Nothing while nobody leads.
    steered: Option<Condition>,
    /// Nothing while nobody leads, or no pods leave by it.
    gateway: Option<Condition>,
    // Less urgent.
    /// Nothing while nobody leads.
    served: Option<Condition>,
    standby: Option<NodeName>,
    endpoint_nodes: Vec<String>,
    /// Ports that flows of policies' pods have on it.
    egress: BTreeMap<PolicyName, u64>,
    /// While flows of policies go on that begin none.
    draining: Option<Condition>,
    /// The policies whose flows were to go on, and have ended.
    drained: BTreeSet<PolicyName>,
}

impl Status {
    fn is_minor_change_of(&self, other: &Self) -> bool {
        let major = |status: &Self| {
            let mut status = status.clone();
            status.standby = None;
            status.endpoint_nodes.clear();
            status.served = None;
            status.egress.clear();
            status.draining = None;
            status
        };
        major(self) == major(other)
    }

    /// A number of ports that is not noticeably another stays what was said: by a twentieth, and always at nothing.
    fn keep_what_is_near(&mut self, before: &Self) {
        for (policy, ports) in &mut self.egress {
            let Some(said) = before.egress.get(policy) else {
                continue;
            };
            let is_near = said.abs_diff(*ports).saturating_mul(20) <= *said;
            if is_near && *ports > 0 {
                *ports = *said;
            }
        }
    }

    /// Flows that drained where nobody can announce the address are over.
    fn abandon(&mut self, draining: BTreeMap<PolicyName, bool>) {
        self.drained = draining.into_keys().collect();
        let none = self.drained.iter().map(|policy| (policy.clone(), 0));
        self.egress = none.collect();
    }

    fn patch(&self, since: Transitions) -> Value {
        let mut conditions = vec![self.announced.json(VIRTUAL_IP_ANNOUNCED, since.announced)];
        for (condition, kind, since) in [
            (&self.steered, VIRTUAL_IP_STEERED, since.steered),
            (&self.gateway, VIRTUAL_IP_GATEWAY_READY, since.gateway),
            (&self.served, VIRTUAL_IP_SERVED, since.served),
            (&self.draining, VIRTUAL_IP_DRAINING, since.draining),
        ] {
            conditions.extend(condition.as_ref().map(|it| it.json(kind, since)));
        }
        json!({"status": {
            "leader": self.leader,
            "standby": self.standby,
            "since": self.leader.as_ref().map(|_| time(self.since)),
            "epoch": self.leader.as_ref().map(|_| self.epoch),
            "interface": self.interface,
            "mac": self.mac,
            "endpointNodes": self.endpoint_nodes,
            "egress": self.egress.iter().map(|(policy, ports)| json!({
                "policy": policy,
                "portsInUse": i64::try_from(*ports).unwrap_or(i64::MAX),
                "drained": self.drained.contains(policy),
            })).collect::<Vec<_>>(),
            "conditions": conditions,
        }})
    }
}

/// Milliseconds since the Unix epoch, as RFC 3339 in seconds.
fn time(millis: u64) -> String {
    i64::try_from(millis / 1000)
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
        .to_string()
}

/// Since when each condition holds, or does not, in milliseconds since the Unix epoch.
#[derive(Clone, Copy)]
struct Transitions {
    announced: u64,
    steered: u64,
    gateway: u64,
    served: u64,
    draining: u64,
}

impl Transitions {
    fn new(status: &Status, before: Option<&Said>, wall: u64) -> Self {
        let mut since = Self {
            announced: wall,
            steered: wall,
            gateway: wall,
            served: wall,
            draining: wall,
        };
        if let Some(before) = before {
            if before.status.announced.holds == status.announced.holds {
                since.announced = before.since.announced;
            }
            let holds = |it: &Option<Condition>| it.as_ref().map(|it| it.holds);
            if holds(&before.status.steered) == holds(&status.steered) {
                since.steered = before.since.steered;
            }
            if holds(&before.status.gateway) == holds(&status.gateway) {
                since.gateway = before.since.gateway;
            }
            if holds(&before.status.served) == holds(&status.served) {
                since.served = before.since.served;
            }
            if holds(&before.status.draining) == holds(&status.draining) {
                since.draining = before.since.draining;
            }
        }
        since
    }
}

struct Said {
    status: Status,
    at: Duration,
    since: Transitions,
}

/// Decides what to write. It is fed with the groups that may have changed, and keeps what was said.
#[derive(Default)]
pub struct Reporter {
    said: BTreeMap<IpAddr, Said>,
    due: BTreeMap<GroupId, Duration>,
    addresses: BTreeMap<GroupId, BTreeSet<IpAddr>>,
    leaderless: BTreeMap<GroupId, Duration>,
    /// Since when this node leads the others of their group and cannot announce them.
    unannounced: BTreeMap<IpAddr, Duration>,
    sweep: Duration,
    drops: Drops,
    drops_at: Duration,
}

impl Reporter {
    /// What to write now. `wall` is in milliseconds since the Unix epoch.
    pub fn look(
        &mut self,
        speaker: &Speaker,
        touched: BTreeSet<GroupId>,
        now: Duration,
        wall: u64,
    ) -> Vec<Write> {
        for id in touched {
            self.due.entry(id).or_insert(now + COALESCE);
        }
        if now >= self.sweep {
            self.sweep = now + SWEEP_EVERY;
            self.sweep(speaker, now);
        }
        let due: Vec<GroupId> = self
            .due
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(id, _)| id.clone())
            .collect();
        let mut writes = Vec::new();
        for id in due {
            self.due.remove(&id);
            self.report(speaker, &id, now, wall, &mut writes);
        }
        if now >= self.drops_at {
            self.drops_at = now + DROPS_EVERY;
            writes.extend(self.drops.look(speaker, now));
        }
        writes
    }

    /// Looks again at what could have been missed: leaderless groups, whose reporter may be another one now, and
    /// statuses that do not show what was said.
    fn sweep(&mut self, speaker: &Speaker, now: Duration) {
        let me = speaker.election().me();
        for group in speaker.index().groups().values() {
            let leader = speaker.election().leader(&group.id);
            let lost = leader == Some(me)
                && !speaker.is_few(group)
                && group.vips.iter().any(|vip| {
                    vip.reported_leader.as_ref() != Some(me)
                        && self
                            .said
                            .get(&vip.address)
                            .is_none_or(|said| now.saturating_sub(said.at) >= SWEEP_EVERY)
                });
            if lost {
                for vip in &group.vips {
                    self.said.remove(&vip.address);
                }
            }
            if lost || leader.is_none() {
                self.due.entry(group.id.clone()).or_insert(now);
            }
        }
    }

    fn report(
        &mut self,
        speaker: &Speaker,
        id: &GroupId,
        now: Duration,
        wall: u64,
        writes: &mut Vec<Write>,
    ) {
        let group = speaker.group(id);
        let addresses: BTreeSet<IpAddr> = group
            .into_iter()
            .flat_map(|group| group.vips.iter().map(|vip| vip.address))
            .collect();
        for gone in self
            .addresses
            .remove(id)
            .unwrap_or_default()
            .difference(&addresses)
        {
            self.said.remove(gone);
            self.unannounced.remove(gone);
        }
        let Some(group) = group else {
            self.leaderless.remove(id);
            return;
        };
        self.addresses.insert(id.clone(), addresses);

        let election = speaker.election();
        let view = election.view(id).cloned().unwrap_or_default();
        let mine = view.leader.as_ref() == Some(election.me());
        let nobody = view.leader.is_none() && view.eligible == 0 && election.is_reporter();
        if !mine && !nobody {
            self.leaderless.remove(id);
            for vip in &group.vips {
                self.said.remove(&vip.address);
                self.unannounced.remove(&vip.address);
            }
            return;
        }
        let mut abandoned = false;
        if nobody {
            // It may be the moment between two leaders.
            let since = *self.leaderless.entry(id.clone()).or_insert(now);
            if now.saturating_sub(since) < LEADERLESS {
                self.due.insert(id.clone(), since + LEADERLESS);
                return;
            }
            // The nodes that are heard here may not be all: a leader puts its name back.
            let unheard = group.vips.iter().any(|vip| vip.reported_leader.is_some());
            if unheard {
                self.leaderless.insert(id.clone(), now);
            }
            abandoned = !unheard && now.saturating_sub(since) >= ABANDONED;
        } else {
            self.leaderless.remove(id);
        }
        let verdicts = if nobody {
            election.explain(group, speaker.index())
        } else {
            BTreeMap::new()
        };
        for vip in &group.vips {
            if mine && speaker.is_few(group) && speaker.is_led_by_others(vip.address) {
                continue;
            }
            let mut status = status(speaker, group, vip, &verdicts);
            if !speaker.hears_most() {
                // Another may lead where most nodes are, and have flows of them: what is said to be over is freed.
                status.drained.clear();
            } else if abandoned || self.is_left_behind(speaker, group, vip.address, now) {
                let mut draining = speaker.draining_on(vip.address);
                let record = speaker.index().virtual_ip(vip.address);
                draining.retain(|policy, _| record.is_some_and(|it| it.drains(policy)));
                status.abandon(draining);
            }
            self.say(speaker, group, vip, status, now, wall, writes);
        }
    }

    /// Whether this node leads the other addresses of a group and could not announce this one for long.
    fn is_left_behind(
        &mut self,
        speaker: &Speaker,
        group: &Group,
        address: IpAddr,
        now: Duration,
    ) -> bool {
        let led = speaker.election().leadership(&group.id);
        if led.is_none_or(|led| led.interfaces.contains_key(&address)) {
            self.unannounced.remove(&address);
            return false;
        }
        let since = *self.unannounced.entry(address).or_insert(now);
        now.saturating_sub(since) >= ABANDONED
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one step of `report`, cut out to be read alone"
    )]
    fn say(
        &mut self,
        speaker: &Speaker,
        group: &Group,
        vip: &GroupVip,
        mut status: Status,
        now: Duration,
        wall: u64,
        writes: &mut Vec<Write>,
    ) {
        let before = self.said.get(&vip.address);
        if let Some(before) = before {
            status.keep_what_is_near(&before.status);
        }
        if before.is_some_and(|before| before.status == status) {
            return;
        }
        if let Some(before) = before
            && status.is_minor_change_of(&before.status)
            && now.saturating_sub(before.at) < MINOR_EVERY
        {
            self.due
                .entry(group.id.clone())
                .or_insert(before.at + MINOR_EVERY);
            return;
        }
        let since = Transitions::new(&status, before, wall);
        if status.announced.reason == announced::ADDRESS_CONFLICT
            && before.is_none_or(|before| before.status.announced.reason != status.announced.reason)
        {
            writes.extend(group.services.iter().map(|service| Write::Event {
                about: Holder::Service(service.key.clone()),
                uid: String::new(),
                reason: announced::ADDRESS_CONFLICT,
                note: status.announced.message.clone(),
            }));
        }
        if !is_observed(speaker, vip.address, &status) {
            writes.push(Write::Status {
                name: virtual_ip_name(vip.address),
                patch: status.patch(since),
            });
        }
        self.said.insert(
            vip.address,
            Said {
                status,
                at: now,
                since,
            },
        );
    }
}

/// Whether an address is known to be leaderless already, in the same words: the next reporter need not repeat it.
fn is_observed(speaker: &Speaker, address: IpAddr, status: &Status) -> bool {
    status.leader.is_none()
        && status.drained.is_empty()
        && speaker.index().virtual_ip(address).is_some_and(|vip| {
            vip.leader.is_none()
                && vip.conditions.iter().any(|condition| {
                    condition.kind == VIRTUAL_IP_ANNOUNCED
                        && condition.reason == status.announced.reason
                        && condition.message == status.announced.message
                })
        })
}

fn status(
    speaker: &Speaker,
    group: &Group,
    vip: &GroupVip,
    verdicts: &BTreeMap<NodeName, Verdict>,
) -> Status {
    let view = speaker
        .election()
        .view(&group.id)
        .cloned()
        .unwrap_or_default();
    let place = speaker
        .election()
        .leadership(&group.id)
        .and_then(|lead| lead.interfaces.get(&vip.address));
    let endpoint_nodes: BTreeSet<String> = group
        .services
        .iter()
        .flat_map(|service| service.endpoint_nodes.iter().map(ToString::to_string))
        .collect();
    let announced = if view.leader.is_none() {
        Condition {
            holds: false,
            reason: announced::NO_ELIGIBLE_NODE,
            message: node_by_node(verdicts),
        }
    } else if speaker.is_few(group) {
        Condition {
            holds: false,
            reason: announced::NO_MAJORITY,
            message: format!(
                "gateway {} hears less than half of the nodes, and another may be where they are: it begins no flows and does not answer for the address",
                speaker.election().me(),
            ),
        }
    } else if let Some(conflict) = speaker.conflict_of(vip.address) {
        let hint = if conflict.held_back {
            "it is not announced until that one is gone"
        } else {
            "clients reach one or the other"
        };
        Condition {
            holds: false,
            reason: announced::ADDRESS_CONFLICT,
            message: format!(
                "{} answers for {} too: {hint}; remove the address there, or from the pool",
                conflict.by, vip.address
            ),
        }
    } else if place.is_none() && speaker.election().leadership(&group.id).is_some() {
        let why = speaker.election().obstacle(group, vip.address);
        Condition {
            holds: false,
            reason: announced::NO_ELIGIBLE_NODE,
            message: format!(
                "{} leads the other addresses of its group and cannot announce it{}: flows that go on there have no way back",
                speaker.election().me(),
                why.map(|why| format!(" ({why})")).unwrap_or_default(),
            ),
        }
    } else if let Some(place) = place.filter(|place| place.default_route) {
        Condition {
            holds: true,
            reason: announced::DEFAULT_ROUTE,
            message: format!(
                "{} is in no node's subnet: announced on {}, which has the default route",
                vip.address, place.name
            ),
        }
    } else {
        Condition {
            holds: true,
            reason: announced::LEADER_ELECTED,
            message: String::new(),
        }
    };
    let led = view.leader.is_some();
    let mut egress = BTreeMap::new();
    let mut draining = BTreeMap::new();
    if led && !group.egress.is_empty() {
        egress = speaker.ports_of(vip.address);
        draining = speaker.draining_on(vip.address);
        for policy in draining.keys() {
            egress.entry(policy.clone()).or_default();
        }
    }
    Status {
        draining: drains(&draining, &egress),
        drained: draining
            .into_iter()
            .filter_map(|(policy, is_over)| is_over.then_some(policy))
            .collect(),
        steered: led.then(|| steered::steered(speaker, group)),
        gateway: led.then(|| gateway::ready(speaker, group)).flatten(),
        served: led.then(|| served::served(vip.address, group)),
        leader: view.leader,
        since: view.since,
        epoch: view.epoch,
        interface: place.map(|place| place.name.to_string()),
        mac: place
            .and_then(|place| speaker.mac_of(&place.name))
            .map(|mac| mac.to_string()),
        announced,
        standby: view.standby,
        endpoint_nodes: endpoint_nodes.into_iter().collect(),
        egress,
    }
}

/// What is said of flows that go on while none begins.
fn drains(
    draining: &BTreeMap<PolicyName, bool>,
    ports: &BTreeMap<PolicyName, u64>,
) -> Option<Condition> {
    let left = draining.keys().map(|policy| {
        let flows = ports.get(policy).copied().unwrap_or_default();
        format!("{flows} flows of EgressPolicy {policy}")
    });
    bounded(left.collect()).map(|left| Condition {
        holds: true,
        reason: FLOWS_GO_ON,
        message: format!(
            "draining: {left}, which is deleted or leaves by other addresses; the address is released when they have ended"
        ),
    })
}

/// Why each node could not lead.
fn node_by_node(verdicts: &BTreeMap<NodeName, Verdict>) -> String {
    let parts = verdicts
        .iter()
        .filter_map(|(node, verdict)| Some(format!("{node}: {}", verdict.as_ref().err()?)))
        .collect();
    bounded(parts).unwrap_or_else(|| "no node is known".to_owned())
}

/// What is said of each node, of so many of them; nothing if there is none.
fn bounded(mut parts: Vec<String>) -> Option<String> {
    let more = parts.len().saturating_sub(MAX_NODES);
    parts.truncate(MAX_NODES);
    if more > 0 {
        parts.push(format!("and {more} more"));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}
