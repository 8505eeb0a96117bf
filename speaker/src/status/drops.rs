//! Events about packets of egress policies' pods that this node does not let through: at once, then now and then for as
//! long as it goes on, with how many there were.

use std::collections::BTreeMap;
use std::time::Duration;

use landfall_core::model::Holder;
use landfall_ebpf_common::egress::gateway::PolicyCount;

use super::Write;
use crate::datapath::egress::Usage;
use crate::egress::PolicyName;
use crate::elector::Speaker;

/// Of one policy and reason an Event is written at most this often.
const EVERY: Duration = Duration::from_secs(300);

/// Why packets are dropped that users must know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Why {
    NoGateway,
    Quota,
    NoPort,
    NoRoom,
}

impl Why {
    /// The Event's reason.
    const fn word(self) -> &'static str {
        match self {
            Self::NoGateway => "PacketsDroppedNoGateway",
            Self::Quota => "QuotaExhausted",
            Self::NoPort => "PortsExhausted",
            Self::NoRoom => "BindingsExhausted",
        }
    }
}

/// What was counted of one policy for one reason.
#[derive(Clone, Copy, Debug)]
struct Counted {
    /// All in all, at the last look.
    total: u64,
    /// Since the last Event.
    untold: u64,
    /// When that was.
    told: Option<Duration>,
}

/// Decides when to say so.
#[derive(Debug, Default)]
pub(super) struct Drops {
    counted: BTreeMap<(PolicyName, Why), Counted>,
}

impl Drops {
    /// What to say now.
    pub(super) fn look(&mut self, speaker: &Speaker, now: Duration) -> Vec<Write> {
        let mut writes = Vec::new();
        let known = |policy: &PolicyName| speaker.egress().policy(policy);
        for (policy, total) in speaker.dropped_for_no_gateway() {
            if let Some(object) = known(policy)
                && let Some(count) = self.note(policy, Why::NoGateway, *total, 0, now)
            {
                let note = format!(
                    "node {} dropped {} of its pods: the policy has no gateway, or one that is not ready yet, or no \
                     address for them; its conditions say why",
                    speaker.election().me(),
                    packets(count),
                );
                writes.push(event(policy, &object.uid, Why::NoGateway, note));
            }
        }
        for (policy, usage) in speaker.usage() {
            let Some(object) = known(policy) else {
                continue;
            };
            let refused = |count: &PolicyCount| [count.quota, count.no_port, count.no_room];
            let reasons = [Why::Quota, Why::NoPort, Why::NoRoom].into_iter();
            let counts = refused(&usage.count)
                .into_iter()
                .zip(refused(&usage.earlier));
            for (why, (total, earlier)) in reasons.zip(counts) {
                if let Some(count) = self.note(policy, why, total, earlier, now) {
                    let note = format!(
                        "node {}, its gateway, refused {} that would have begun flows: {}",
                        speaker.election().me(),
                        packets(count),
                        cure(why, usage)
                    );
                    writes.push(event(policy, &object.uid, why, note));
                }
            }
        }
        // Of one that is gone and may come again the counts go on, as long as there are flows.
        let (dropped, usage) = (speaker.dropped_for_no_gateway(), speaker.usage());
        self.counted.retain(|(policy, _), _| {
            known(policy).is_some() || dropped.contains_key(policy) || usage.contains_key(policy)
        });
        writes
    }

    /// Takes a count in; how many there were since the last Event, if it is time for one.
    /// `earlier`: how many of them were there when this process began, which are no news.
    fn note(
        &mut self,
        policy: &PolicyName,
        why: Why,
        total: u64,
        earlier: u64,
        now: Duration,
    ) -> Option<u64> {
        let counted = self
            .counted
            .entry((policy.clone(), why))
            .or_insert(Counted {
                total: earlier,
                untold: 0,
                told: None,
            });
        // It has begun anew, with new maps or a new table.
        let more = total.checked_sub(counted.total).unwrap_or(total);
        counted.total = total;
        counted.untold += more;
        let due = counted
            .told
            .is_none_or(|told| now.saturating_sub(told) >= EVERY);
        if counted.untold == 0 || !due {
            return None;
        }
        counted.told = Some(now);
        Some(std::mem::take(&mut counted.untold))
    }
}

fn packets(count: u64) -> String {
    format!("{count} packet{}", if count == 1 { "" } else { "s" })
}

fn cure(why: Why, usage: &Usage) -> String {
    match why {
        Why::NoGateway => String::new(), // not refused by a gateway
        Why::Quota if usage.quota > 0 && usage.ports >= u64::from(usage.quota) => format!(
            "all {} ports of spec.quota.ports are in use; raise it, or have the pods close what they do not need",
            usage.quota
        ),
        Why::Quota => format!(
            "pods have as many ports to one remote address and port as they may ({}), or all together had ({}); raise \
             spec.quota, or have the pods close what they do not need",
            limit(usage.quota_per_pod),
            limit(usage.quota)
        ),
        Why::NoPort => {
            "all ports of the egress address to that remote address and port are in use or rest; give the policy more \
             addresses"
                .to_owned()
        }
        Why::NoRoom => {
            "the gateway's maps are full; give speakers a higher --egress-bindings (egress.bindings of the chart)"
                .to_owned()
        }
    }
}

fn limit(quota: u32) -> String {
    if quota == 0 {
        "no limit".to_owned()
    } else {
        quota.to_string()
    }
}

fn event(policy: &PolicyName, uid: &str, why: Why, note: String) -> Write {
    Write::Event {
        about: Holder::EgressPolicy(policy.clone()),
        uid: uid.to_owned(),
        reason: why.word(),
        note,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_is_told_at_once_and_others_are_gathered() {
        let mut drops = Drops::default();
        let policy: PolicyName = "mail".into();
        let mut at =
            |second: u32, total| drops.note(&policy, Why::NoGateway, total, 0, SECOND * second);
        assert_eq!(at(0, 0), None);
        assert_eq!(at(5, 3), Some(3));
        assert_eq!(at(10, 10), None);
        assert_eq!(at(304, 20), None);
        assert_eq!(at(305, 20), Some(17));
        // Nothing new: nothing to say.
        assert_eq!(at(700, 20), None);
        // Another table counts from nothing.
        assert_eq!(at(701, 2), Some(2));
    }

    #[test]
    fn what_an_earlier_process_has_seen_is_no_news() {
        let mut drops = Drops::default();
        let policy: PolicyName = "mail".into();
        let mut at = |second: u32, why, total, earlier| {
            drops.note(&policy, why, total, earlier, SECOND * second)
        };
        assert_eq!(at(1, Why::Quota, 500, 500), None);
        assert_eq!(at(2, Why::Quota, 501, 500), Some(1));
        assert_eq!(at(3, Why::NoPort, 7, 7), None);
        // What was refused before the first look is news.
        assert_eq!(at(3, Why::NoRoom, 7, 2), Some(5));
    }

    #[test]
    fn the_cure_fits_the_quota() {
        let mut usage = Usage {
            ports: 10,
            quota: 10,
            quota_per_pod: 5,
            ..Usage::default()
        };
        assert!(cure(Why::Quota, &usage).contains("all 10 ports of spec.quota.ports"));
        usage.ports = 9;
        assert!(cure(Why::Quota, &usage).contains("as they may (5)"));
        usage.quota = 0;
        assert!(cure(Why::Quota, &usage).contains("(no limit)"));
    }
}
