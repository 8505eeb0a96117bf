//! Which nodes cannot steer, and why: each says it of itself, and the leaders write it to the objects.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use landfall_core::election::MAX_HINDRANCE;
use landfall_core::model::NodeName;

use super::Speaker;
use crate::datapath::Attachment;

/// What the nodes say is shown once it has stood for so long: one that begins anew says nothing for a moment.
const STANDS: Duration = Duration::from_secs(5);

/// The nodes that cannot steer, with what hinders each.
type Hindrances = BTreeMap<NodeName, Arc<str>>;

/// What the nodes say, and what of it is shown.
#[derive(Debug, Default)]
pub(super) struct Hindered {
    said: Hindrances,
    since: Duration,
    shown: Hindrances,
}

impl Speaker {
    /// Tells the others what keeps the programs from an uplink of this node.
    pub(super) fn say_hindrance(&mut self, attachments: &BTreeMap<u32, Attachment>) {
        let hindrance = self.uplinks.iter().find_map(|uplink| {
            let Some(Attachment::Absent { reason }) = attachments.get(uplink) else {
                return None;
            };
            Some(shortened(reason))
        });
        self.election.set_hindrance(hindrance);
    }

    /// Takes in what the nodes say, if somebody spoke, and has it shown on what this node leads.
    pub(super) fn look_who_is_hindered(&mut self, spoke: bool, now: Duration) {
        if spoke {
            let said = self.election.hindered();
            if said != self.hindered.said {
                self.hindered.said = said;
                self.hindered.since = now;
            }
        }
        let stands = now.saturating_sub(self.hindered.since) >= STANDS;
        if self.hindered.shown != self.hindered.said && (stands || !self.is_ready()) {
            self.hindered.shown.clone_from(&self.hindered.said);
            self.stale.extend(self.announced.keys().cloned());
        }
    }

    /// The living nodes that cannot steer, for those who write statuses.
    pub fn hindered(&self) -> &Hindrances {
        &self.hindered.shown
    }
}

/// No longer than may be said.
fn shortened(reason: &str) -> Arc<str> {
    const MORE: &str = "…";
    if reason.len() <= MAX_HINDRANCE {
        return reason.into();
    }
    let end = reason.floor_char_boundary(MAX_HINDRANCE - MORE.len());
    format!("{}{MORE}", &reason[..end]).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_cut_between_characters_where_it_is_too_long() {
        assert_eq!(&*shortened("no bpf file system"), "no bpf file system");
        let long = "ä".repeat(MAX_HINDRANCE);
        let short = shortened(&long);
        assert!(short.len() <= MAX_HINDRANCE && short.len() > MAX_HINDRANCE - 4);
        assert!(short.ends_with("ä…"), "{short}");
    }
}
