//! What the metrics say of peers, groups and keys.

use std::collections::BTreeMap;

use super::Speaker;
use crate::metrics::{KeyLabels, PeerLabels, reason_labels};

impl Speaker {
    pub(super) fn show_keys(&mut self) {
        self.metrics.keys.clear();
        for (at, key) in self.keys.all().iter().enumerate() {
            let role = if at == 0 { "primary" } else { "secondary" };
            let labels = KeyLabels {
                key: key.id(),
                role: role.into(),
            };
            self.metrics.keys.get_or_create(&labels).set(1);
        }
    }

    pub(super) fn show_groups(&self) {
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        let groups = self.index.groups();
        self.metrics.groups.set(count(groups.len()));
        self.metrics.led_groups.set(count(self.announced.len()));
        let leaderless = groups
            .keys()
            .filter(|id| self.election.leader(id).is_none())
            .count();
        self.metrics.leaderless_groups.set(count(leaderless));
    }

    pub(super) fn show_peers(&self) {
        let mut counts: BTreeMap<&str, i64> =
            BTreeMap::from([("alive", 0), ("heard", 0), ("gossip", 0), ("known", 0)]);
        for peer in self.election.peers() {
            let facts = [
                ("alive", peer.alive),
                ("heard", !peer.heard.is_empty()),
                ("gossip", peer.gossip),
                ("known", true),
            ];
            for (fact, _) in facts.into_iter().filter(|(_, holds)| *holds) {
                *counts.entry(fact).or_default() += 1;
            }
            let labels = PeerLabels {
                peer: peer.name.to_string(),
            };
            self.metrics
                .heard
                .get_or_create(&labels)
                .set(i64::try_from(peer.heard.len()).unwrap_or(i64::MAX));
        }
        for (fact, count) in counts {
            self.metrics
                .peers
                .get_or_create(&reason_labels(fact))
                .set(count);
        }
        self.metrics
            .frames_refused
            .set(i64::try_from(self.election.refused_frames()).unwrap_or(i64::MAX));
    }
}
