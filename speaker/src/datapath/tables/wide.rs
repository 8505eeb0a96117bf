//! Spreads over many nodes: tables in pages, shared between all that are spread alike.
//!
//! A table is never changed in the map: a new one is written and then pointed to, so that no packet sees half of each,
//! and the one before stays for those who look for earlier holders.

use std::collections::{BTreeMap, BTreeSet};

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use landfall_core::steering::{Distribution, Table};
use landfall_ebpf_common::rendezvous::BUCKETS;
use landfall_ebpf_common::{MAX_WIDE, Spread, WIDE_PAGE, WideKey, WidePage, map};

use super::super::Reach;
use super::nodes::Nodes;
use super::numbers::Numbers;
use super::{TablesError, taken};

#[allow(clippy::cast_possible_truncation)] // It is 64.
const PAGE: u32 = WIDE_PAGE as u32;
const PAGES: u32 = BUCKETS / PAGE;
const MAX_TABLES: u32 = MAX_WIDE / PAGES;

/// A distribution, and by which interfaces the nodes are reached.
type Wanted = (Distribution, Reach);

#[derive(Debug, Default)]
struct Entry {
    users: usize,
    /// What it was made from; nothing for an earlier process's.
    made: Option<(Wanted, Table)>,
}

pub(super) struct Wide {
    map: HashMap<MapData, WideKey, WidePage>,
    entries: BTreeMap<u32, Entry>,
    by_wanted: BTreeMap<Wanted, u32>,
    numbers: Numbers,
}

impl Wide {
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let map: HashMap<_, WideKey, WidePage> = taken(ebpf, map::WIDE)?;
        let used: BTreeSet<u32> = map
            .keys()
            .map(|key| key.map(|key| key.table))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            map,
            numbers: Numbers::new(0, MAX_TABLES, &used),
            entries: used.iter().map(|id| (*id, Entry::default())).collect(),
            by_wanted: BTreeMap::new(),
        })
    }

    /// The table of a distribution, with one user more.
    pub(super) fn take(
        &mut self,
        wanted: &Distribution,
        reach: &Reach,
        nodes: &mut Nodes,
    ) -> Result<u32, TablesError> {
        let key = (wanted.clone(), reach.clone());
        if let Some(id) = self.by_wanted.get(&key) {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.users += 1;
            }
            return Ok(*id);
        }
        let table = self.nearest(wanted);
        let id = self.numbers.take().ok_or(TablesError::Full(
            MAX_TABLES,
            "ways to spread flows over more than eight nodes",
        ))?;
        // An entry without users: whatever fails below, the next sweep removes it.
        self.entries.insert(id, Entry::default());
        self.write(id, &table, reach, nodes)?;
        self.by_wanted.insert(key.clone(), id);
        let entry = Entry {
            users: 1,
            made: Some((key, table)),
        };
        self.entries.insert(id, entry);
        Ok(id)
    }

    /// The table of a distribution, made from the one that differs in the fewest nodes.
    fn nearest(&self, wanted: &Distribution) -> Table {
        let differences = |other: &Distribution| {
            let gone = other
                .keys()
                .filter(|node| !wanted.contains_key(*node))
                .count();
            let new = wanted
                .iter()
                .filter(|(node, weight)| other.get(*node) != Some(weight))
                .count();
            gone + new
        };
        let nearest = self
            .entries
            .values()
            .filter_map(|entry| entry.made.as_ref())
            .min_by_key(|((distribution, _), _)| differences(distribution))
            .filter(|((distribution, _), _)| differences(distribution) < wanted.len());
        let mut table = nearest.map(|(_, table)| table.clone()).unwrap_or_default();
        table.become_of(wanted);
        table
    }

    fn write(
        &mut self,
        id: u32,
        table: &Table,
        reach: &Reach,
        nodes: &mut Nodes,
    ) -> Result<(), TablesError> {
        let numbers = table
            .weights()
            .map(|(name, _)| Ok((name.clone(), nodes.place(name, reach.of(name))?)))
            .collect::<Result<BTreeMap<_, _>, TablesError>>()?;
        let number = |name: Option<&_>| {
            name.and_then(|name| numbers.get(name))
                .copied()
                .unwrap_or(0)
        };
        for page in 0..PAGES {
            let mut content = WidePage([[0; 2]; WIDE_PAGE]);
            for (bucket, slot) in (page * PAGE..).zip(&mut content.0) {
                let pair = table.pair(bucket);
                *slot = [number(pair.first), number(pair.second)];
            }
            self.map.insert(WideKey { table: id, page }, content, 0)?;
        }
        Ok(())
    }

    /// A spread that an earlier process has left is in use.
    pub(super) fn join(&mut self, spread: &Spread) {
        if spread.count == Spread::WIDE
            && let Some(entry) = self.entries.get_mut(&spread.table)
        {
            entry.users += 1;
        }
    }

    /// A spread is used no more; if it was the last, the next sweep removes its table.
    pub(super) fn leave(&mut self, spread: &Spread) {
        if spread.count == Spread::WIDE
            && let Some(entry) = self.entries.get_mut(&spread.table)
        {
            entry.users = entry.users.saturating_sub(1);
        }
    }

    /// Removes the tables that nobody uses.
    pub(super) fn sweep(&mut self) {
        let unused: Vec<u32> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.users == 0)
            .map(|(id, _)| *id)
            .collect();
        for id in unused {
            if let Some(Entry {
                made: Some((wanted, _)),
                ..
            }) = self.entries.remove(&id)
            {
                self.by_wanted.remove(&wanted);
            }
            for page in 0..PAGES {
                // A table that was not written to its end lacks some.
                let _ = self.map.remove(&WideKey { table: id, page });
            }
            self.numbers.give(id);
        }
    }
}
