//! What the records of addresses said as this node took them over: by that it tells its successor's word, where it has not
//! heard of one, from an earlier leader's.

use std::collections::BTreeMap;
use std::net::IpAddr;

use landfall_core::groups::GroupId;
use landfall_core::model::{NodeName, VirtualIp};

use super::Speaker;

/// A leader, and the epoch of its claim.
type Claim = (NodeName, u64);

/// What was found, by the groups that this node leads.
#[derive(Debug, Default)]
pub(super) struct Records(BTreeMap<GroupId, Found>);

/// In which epoch a group was taken over, and whom its addresses' records named then: until they name this node.
#[derive(Debug, Default)]
struct Found {
    epoch: u64,
    named: BTreeMap<IpAddr, Option<Claim>>,
}

impl Records {
    /// A record names this node.
    pub(super) fn confirm(&mut self, record: &VirtualIp) {
        let found = self.0.get_mut(&record.group);
        if let Some(named) = found.and_then(|found| found.named.get_mut(&record.address)) {
            *named = None;
        }
    }

    /// A group is led no more.
    pub(super) fn forget(&mut self, id: &GroupId) {
        self.0.remove(id);
    }

    fn of(&self, record: &VirtualIp) -> Option<&Claim> {
        let found = self.0.get(&record.group)?;
        found.named.get(&record.address)?.as_ref()
    }
}

/// Whom a record names.
fn claim(record: &VirtualIp) -> Option<Claim> {
    Some((record.leader.clone()?, record.epoch))
}

impl Speaker {
    /// Keeps in mind what the records of a group's addresses say as this node takes them over. If it announces them elsewhere
    /// only, they may name this node by now.
    pub(super) fn note_found(&mut self, id: &GroupId) {
        let lead = self.election.leadership(id);
        let (Some(group), Some(lead)) = (self.index.groups().get(id), lead) else {
            return;
        };
        let found = self.records.0.entry(id.clone()).or_default();
        if found.epoch != lead.epoch {
            *found = Found {
                epoch: lead.epoch,
                ..Found::default()
            };
        }
        for vip in &group.vips {
            let named = || self.index.virtual_ip(vip.address).and_then(claim);
            found.named.entry(vip.address).or_insert_with(named);
        }
    }

    /// Whether an address's record names another leader, who took it over as late as this node or later: where most nodes
    /// are, if they are not here. Not so of what was found there, which may be of before the end of all speakers.
    pub fn is_led_by_others(&self, address: IpAddr) -> bool {
        let Some(record) = self.index.virtual_ip(address) else {
            return false;
        };
        let view = self.election.view(&record.group);
        let epoch = view.map_or(0, |view| view.epoch);
        claim(record)
            .filter(|(leader, _)| leader != self.election.me())
            .is_some_and(|named| named.1 >= epoch && self.records.of(record) != Some(&named))
    }
}
