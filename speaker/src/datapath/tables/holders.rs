//! Who holds flows of buckets that are another's by now.

use std::collections::{BTreeMap, BTreeSet};

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use landfall_core::model::NodeName;
use landfall_core::steering::seed;
use landfall_ebpf_common::{Holders as Entry, HoldersKey, map};

use super::super::Reach;
use super::nodes::Nodes;
use super::{TablesError, taken};

pub(super) struct Holders {
    map: HashMap<MapData, HoldersKey, Entry>,
    /// What is in the map, by port and page of buckets.
    known: BTreeMap<(u32, u16), BTreeMap<u32, Entry>>,
    /// Left by an earlier process, and not spoken of yet.
    stale: BTreeSet<HoldersKey>,
}

impl Holders {
    /// What an earlier process has left stands until the holders have said it again.
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let map: HashMap<_, HoldersKey, Entry> = taken(ebpf, map::HOLDERS)?;
        Ok(Self {
            stale: map.keys().collect::<Result<_, _>>()?,
            map,
            known: BTreeMap::new(),
        })
    }

    /// Enters the holders of a page's buckets. Says whether the port has any now.
    pub(super) fn set(
        &mut self,
        port: u32,
        page: u16,
        holders: &BTreeMap<u32, BTreeSet<NodeName>>,
        reach: &Reach,
        nodes: &mut Nodes,
    ) -> Result<(), TablesError> {
        let mut wanted = BTreeMap::new();
        for (bucket, names) in holders {
            let mut numbers = Vec::with_capacity(names.len());
            for name in names {
                let number = nodes.place(name, reach.of(name))?;
                numbers.push((!nodes.is_other_and_alive(number), seed(name), number));
            }
            // Where there is not room for all, for those that can be asked.
            numbers.sort_unstable();
            let mut entry = Entry::default();
            for (place, (.., number)) in entry.nodes.iter_mut().zip(numbers) {
                *place = number;
            }
            wanted.insert(*bucket, entry);
        }
        let known = self.known.remove(&(port, page)).unwrap_or_default();
        for bucket in known.keys().filter(|bucket| !wanted.contains_key(*bucket)) {
            let _ = self.map.remove(&key(port, *bucket));
        }
        for (bucket, entry) in &wanted {
            self.stale.remove(&key(port, *bucket));
            if known.get(bucket) != Some(entry) {
                self.map.insert(key(port, *bucket), entry, 0)?;
            }
        }
        if !wanted.is_empty() {
            self.known.insert((port, page), wanted);
        }
        Ok(())
    }

    /// Whether somebody holds flows of a port's buckets.
    pub(super) fn any(&self, port: u32) -> bool {
        self.known
            .range((port, 0)..=(port, u16::MAX))
            .next()
            .is_some()
            || self.stale_of(port).next().is_some()
    }

    fn stale_of(&self, port: u32) -> impl Iterator<Item = &HoldersKey> {
        self.stale.range(key(port, 0)..=key(port, u32::MAX))
    }

    /// Forgets what an earlier process has left and nobody has said again; the ports of which that was something.
    pub(super) fn sweep(&mut self) -> BTreeSet<u32> {
        let stale = std::mem::take(&mut self.stale);
        for key in &stale {
            let _ = self.map.remove(key);
        }
        stale.into_iter().map(|key| key.port).collect()
    }

    /// Forgets a port.
    pub(super) fn remove(&mut self, port: u32) {
        let stale: Vec<HoldersKey> = self.stale_of(port).copied().collect();
        for key in stale {
            self.stale.remove(&key);
            let _ = self.map.remove(&key);
        }
        let pages: Vec<(u32, u16)> = self
            .known
            .range((port, 0)..=(port, u16::MAX))
            .map(|(page, _)| *page)
            .collect();
        for page in pages {
            for bucket in self.known.remove(&page).unwrap_or_default().into_keys() {
                let _ = self.map.remove(&key(port, bucket));
            }
        }
    }
}

fn key(port: u32, bucket: u32) -> HoldersKey {
    HoldersKey { port, bucket }
}
