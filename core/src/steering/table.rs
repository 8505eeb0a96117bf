//! One table.

use std::collections::BTreeMap;

use landfall_ebpf_common::rendezvous;

use super::{Distribution, bid, seed};
use crate::model::NodeName;

/// How many buckets a table has.
pub const BUCKETS: usize = rendezvous::BUCKETS as usize;

/// No node.
const NOBODY: u16 = u16::MAX;

/// The nodes of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair<'a> {
    /// Who gets the bucket's flows; nobody in an empty table.
    pub first: Option<&'a NodeName>,
    /// Who gets them when the first is gone.
    pub second: Option<&'a NodeName>,
}

#[derive(Clone, Debug)]
struct Member {
    name: NodeName,
    seed: u64,
    weight: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    first: u16,
    second: u16,
}

const EMPTY: Slot = Slot {
    first: NOBODY,
    second: NOBODY,
};

/// From buckets to nodes. What it says depends on its members and their weights only, not on how they came.
#[derive(Clone, Debug)]
pub struct Table {
    /// By place; a place that is free again is taken by the next.
    members: Vec<Option<Member>>,
    places: BTreeMap<NodeName, u16>,
    /// With fewer than two members every bucket is alike, and one slot stands for all.
    slots: Vec<Slot>,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            members: Vec::new(),
            places: BTreeMap::new(),
            slots: vec![EMPTY],
        }
    }
}

impl Table {
    /// The table of these nodes, with how many servable endpoints each has; those with none are left out.
    pub fn of<'a>(weights: impl IntoIterator<Item = (&'a NodeName, u32)>) -> Self {
        let mut table = Self::default();
        for (node, weight) in weights {
            table.set(node, weight);
        }
        table
    }

    /// The nodes and their weights, by name.
    pub fn weights(&self) -> impl Iterator<Item = (&NodeName, u32)> {
        self.places
            .iter()
            .filter_map(|(name, place)| Some((name, self.member(*place)?.weight)))
    }

    /// The nodes of a bucket.
    pub fn pair(&self, bucket: u32) -> Pair<'_> {
        let slot = self.slot(bucket);
        let name = |place| self.member(place).map(|member| &member.name);
        Pair {
            first: name(slot.first),
            second: name(slot.second),
        }
    }

    /// Gives a node a weight, which may be its first; zero takes it out. Returns how many buckets changed.
    ///
    /// Costs three draws a bucket when a weight grows, and as many draws as there are nodes for each bucket in which
    /// the node is first or second when it shrinks.
    pub fn set(&mut self, node: &NodeName, weight: u32) -> usize {
        let known = self.places.get(node).copied();
        let before = known
            .and_then(|place| self.member(place))
            .map_or(0, |member| member.weight);
        if before == weight {
            return 0;
        }
        let changed = match known {
            None => {
                let place = self.seat(node, weight);
                self.rise(place)
            }
            Some(place) if weight > before => {
                self.weigh(place, weight);
                self.rise(place)
            }
            Some(place) if weight > 0 => {
                self.weigh(place, weight);
                self.fall(place)
            }
            Some(place) => {
                self.members[usize::from(place)] = None;
                self.places.remove(node);
                self.fall(place)
            }
        };
        if self.places.len() < 2 && self.slots.len() > 1 {
            self.slots.truncate(1);
            self.slots.shrink_to_fit();
        }
        changed
    }

    /// Becomes the table of a distribution, node by node: at the cost of the difference. First what grows, so that no
    /// bucket is without a node in between.
    pub fn become_of(&mut self, wanted: &Distribution) {
        for (node, weight) in wanted {
            self.set(node, u32::from(*weight));
        }
        let gone: Vec<NodeName> = self
            .places
            .keys()
            .filter(|node| !wanted.contains_key(*node))
            .cloned()
            .collect();
        for node in gone {
            self.set(&node, 0);
        }
    }

    fn seat(&mut self, node: &NodeName, weight: u32) -> u16 {
        let member = Some(Member {
            name: node.clone(),
            seed: seed(node),
            weight,
        });
        let free = self.members.iter().position(Option::is_none);
        let place = free.unwrap_or(self.members.len());
        if free.is_some() {
            self.members[place] = member;
        } else {
            self.members.push(member);
        }
        let place = u16::try_from(place)
            .ok()
            .filter(|place| *place != NOBODY)
            .expect("a cluster has fewer than 65535 nodes");
        self.places.insert(node.clone(), place);
        if self.places.len() == 2 {
            self.slots.resize(BUCKETS, self.slots[0]);
        }
        place
    }

    fn weigh(&mut self, place: u16, weight: u32) {
        if let Some(member) = &mut self.members[usize::from(place)] {
            member.weight = weight;
        }
    }

    /// A node bids lower than before everywhere: it may pass those that are first or second.
    fn rise(&mut self, place: u16) -> usize {
        let mut changed = 0;
        for bucket in 0..self.slots.len() {
            let slot = self.slots[bucket];
            let number = number(bucket);
            let new = if slot.first == place {
                slot
            } else if self.beats(place, slot.first, number) {
                Slot {
                    first: place,
                    second: slot.first,
                }
            } else if slot.second != place && self.beats(place, slot.second, number) {
                Slot {
                    second: place,
                    ..slot
                }
            } else {
                slot
            };
            if new != slot {
                self.slots[bucket] = new;
                changed += 1;
            }
        }
        changed
    }

    /// A node bids higher than before, or not at all: where it was first or second, all are asked again.
    fn fall(&mut self, place: u16) -> usize {
        let mut changed = 0;
        for bucket in 0..self.slots.len() {
            let slot = self.slots[bucket];
            if slot.first != place && slot.second != place {
                continue;
            }
            let new = self.choose(number(bucket));
            if new != slot {
                self.slots[bucket] = new;
                changed += 1;
            }
        }
        changed
    }

    fn choose(&self, bucket: u32) -> Slot {
        let mut slot = EMPTY;
        for place in self.places.values().copied() {
            if self.beats(place, slot.first, bucket) {
                slot = Slot {
                    first: place,
                    second: slot.first,
                };
            } else if self.beats(place, slot.second, bucket) {
                slot.second = place;
            }
        }
        slot
    }

    /// Whether the first goes before the second in a bucket. Everybody goes before nobody.
    fn beats(&self, place: u16, other: u16, bucket: u32) -> bool {
        let Some(challenger) = self.member(place) else {
            return false;
        };
        let Some(holder) = self.member(other) else {
            return true;
        };
        let bid = |member: &Member| bid(member.seed, member.weight, bucket);
        bid(challenger).beats(bid(holder))
    }

    fn member(&self, place: u16) -> Option<&Member> {
        self.members.get(usize::from(place))?.as_ref()
    }

    fn slot(&self, bucket: u32) -> Slot {
        // One slot stands for all, or there is one each.
        self.slots[bucket as usize & (self.slots.len() - 1)]
    }
}

fn number(bucket: usize) -> u32 {
    u32::try_from(bucket).expect("there are fewer buckets")
}
