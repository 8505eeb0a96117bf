//! What the programs go by that judge in place of the packet filter: beside Cilium.
//!
//! Of flows that began outside, and of those that are masqueraded, they know from Cilium's own maps. These are borrowed by a
//! second pin, among ours: nothing is ever made where Cilium has its own, and what Cilium makes anew is borrowed anew.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, MapError, MapType};
use aya::{Ebpf, EbpfLoader};
use ipnet::IpNet;
use landfall_ebpf_common::egress::judge::cilium::{BORROWED, Borrowed};
use landfall_ebpf_common::egress::judge::{
    Destination, Judgement, MAX_DESTINATIONS, MAX_JUDGED, MAX_PLAIN, destination, life_of, map,
};
use landfall_ebpf_common::{FlowKey, VipKey};

use super::super::layout::{Prefix, Shape, shape};
use super::super::pins::Pins;
use super::super::tables::{TablesError, forget, taken};
use super::Leaving;
use super::guard::network;
use crate::egress::PolicyName;

/// Its maps that outlive the process.
pub(in super::super) const SHAPES: [Shape; 3] = [
    shape::<VipKey, u32>(map::PLAIN, MapType::Hash, MAX_PLAIN),
    shape::<Prefix<Destination>, u32>(map::DESTINATIONS, MapType::LpmTrie, MAX_DESTINATIONS),
    shape::<FlowKey, Judgement>(map::JUDGED, MapType::LruHash, MAX_JUDGED),
];

/// Why a map of Cilium's is of no use.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum BorrowError {
    #[error(
        "{0} has keys of {1} bytes and not of {2}: this version of Cilium is not known, and nothing may be told about its flows"
    )]
    Misfit(PathBuf, u32, usize),
    #[error("{0}: {1}")]
    Map(PathBuf, #[source] MapError),
    #[error("{0}: {1}")]
    Pin(PathBuf, #[source] io::Error),
}

/// The maps that Cilium had when they were borrowed, by the names of their pins; nothing, if it had none.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Lent(BTreeMap<&'static str, u32>);

impl Lent {
    /// Whether it has any.
    pub(in super::super) fn is_any(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether Cilium has the same maps still. What cannot be read is taken for the same.
    pub(in super::super) fn is_current(&self, of: &Path) -> bool {
        BORROWED.iter().all(|borrowed| match found(of, borrowed) {
            Ok(found) => found.map(|(_, id)| id) == self.0.get(borrowed.pin).copied(),
            Err(_) => true,
        })
    }
}

/// Where the programs' maps are to be, if they judge, beside Cilium's of a directory.
pub(in super::super) fn place(
    loader: &mut EbpfLoader<'_>,
    pins: &Pins,
    of: &Path,
) -> Result<Lent, BorrowError> {
    for shape in SHAPES {
        loader.map_pin_path(shape.name, pins.map(shape.name));
    }
    let mut lent = BTreeMap::new();
    for borrowed in BORROWED {
        let ours = pins.map(borrowed.name);
        match std::fs::remove_file(&ours) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(BorrowError::Pin(ours, error));
            }
            _ => {}
        }
        // Without it nothing is told about such flows, and they end: the programs are there all the same.
        let found = found(of, &borrowed).unwrap_or_else(|error| {
            tracing::warn!(%error, "a map of Cilium's cannot be read");
            None
        });
        let Some((theirs, id)) = found else {
            continue;
        };
        theirs
            .pin(&ours)
            .map_err(|error| BorrowError::Pin(ours.clone(), io::Error::other(error.to_string())))?;
        loader.map_pin_path(borrowed.name, ours);
        lent.insert(borrowed.pin, id);
    }
    Ok(Lent(lent))
}

/// The same where they do not: as little as there may be.
pub(in super::super) fn displace(loader: &mut EbpfLoader<'_>) {
    for shape in SHAPES {
        loader.map_max_entries(shape.name, 1);
    }
}

/// Forgets what an earlier process has left whose programs did.
pub(in super::super) fn abandon(pins: &Pins) {
    let own = SHAPES.iter().map(|shape| shape.name);
    for name in own.chain(BORROWED.iter().map(|borrowed| borrowed.name)) {
        // As a rule there is nothing.
        let _ = std::fs::remove_file(pins.map(name));
    }
}

/// A map of Cilium's, and its number; nothing, if there is none.
fn found(of: &Path, borrowed: &Borrowed) -> Result<Option<(MapData, u32)>, BorrowError> {
    let path = of.join(borrowed.pin);
    if !path.exists() {
        return Ok(None);
    }
    let read = MapData::from_pin(&path).and_then(|map| Ok((map.info()?, map)));
    let (info, map) = read.map_err(|error| BorrowError::Map(path.clone(), error))?;
    if info.key_size() as usize != borrowed.key {
        return Err(BorrowError::Misfit(path, info.key_size(), borrowed.key));
    }
    Ok(Some((map, info.id())))
}

/// Its maps, and what this process knows to be in them.
pub(in super::super) struct Judge {
    plain: HashMap<MapData, VipKey, u32>,
    destinations: LpmTrie<MapData, Destination, u32>,
    judged: HashMap<MapData, FlowKey, Judgement>,
    known_plain: BTreeMap<IpAddr, u32>,
    known_destinations: BTreeSet<(u32, Destination)>,
}

impl Judge {
    /// Takes the maps, and reads what an earlier process has left in them.
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let plain: HashMap<_, VipKey, u32> = taken(ebpf, map::PLAIN)?;
        let destinations: LpmTrie<_, Destination, u32> = taken(ebpf, map::DESTINATIONS)?;
        let judged: HashMap<_, FlowKey, Judgement> = taken(ebpf, map::JUDGED)?;
        let mut known_plain = BTreeMap::new();
        for entry in &plain {
            let (key, life) = entry?;
            known_plain.insert(key.address(), life);
        }
        let mut known_destinations = BTreeSet::new();
        for entry in &destinations {
            let (key, _) = entry?;
            known_destinations.insert((key.prefix_len(), key.data()));
        }
        Ok(Self {
            plain,
            destinations,
            judged,
            known_plain,
            known_destinations,
        })
    }

    /// Whether nothing was judged yet, as far as it is known.
    pub(super) fn is_new(&self) -> bool {
        self.known_plain.is_empty() && self.judged.keys().next().is_none()
    }

    #[cfg(test)]
    pub(in super::super) const fn flows(&mut self) -> &mut HashMap<MapData, FlowKey, Judgement> {
        &mut self.judged
    }

    /// Forgets all flows.
    pub(super) fn forget_flows(&mut self) -> Result<(), TablesError> {
        let flows: Result<Vec<FlowKey>, MapError> = self.judged.keys().collect();
        for flow in flows? {
            forget(self.judged.remove(&flow))?;
        }
        Ok(())
    }

    /// Whether a pod with an address was known, and nobody's tenant.
    pub(super) fn was_plain(&self, address: &IpAddr, life: u32) -> bool {
        self.known_plain.get(address) == Some(&life)
    }

    /// Says which destinations policies are for; those that they are not for any more stay until [`Judge::end`]. The policies
    /// of which not all could be said.
    pub(super) fn name(
        &mut self,
        wanted: &BTreeMap<PolicyName, BTreeSet<(u32, Destination)>>,
    ) -> (BTreeSet<PolicyName>, Result<(), TablesError>) {
        let mut outcome = Ok(());
        let mut unsaid = BTreeSet::new();
        for (policy, wanted) in wanted {
            for named in wanted {
                if self.known_destinations.contains(named) {
                    continue;
                }
                match self.destinations.insert(&Key::new(named.0, named.1), 1, 0) {
                    Ok(()) => {
                        self.known_destinations.insert(*named);
                    }
                    Err(error) => {
                        unsaid.insert(policy.clone());
                        outcome = Err(error.into());
                        break;
                    }
                }
            }
        }
        (unsaid, outcome)
    }

    /// Says which pods are nobody's tenants; those that are somebody's by now stay until [`Judge::end`].
    pub(super) fn admit(&mut self, wanted: &BTreeMap<IpAddr, u32>) -> Result<(), TablesError> {
        let mut outcome = Ok(());
        for (address, life) in wanted {
            if self.known_plain.get(address) != Some(life) {
                match self.plain.insert(VipKey::from_address(*address), life, 0) {
                    Ok(()) => {
                        self.known_plain.insert(*address, *life);
                    }
                    Err(error) => outcome = Err(error.into()),
                }
            }
        }
        outcome
    }

    /// Forgets all but these.
    pub(super) fn end(
        &mut self,
        destinations: &BTreeMap<PolicyName, BTreeSet<(u32, Destination)>>,
        plain: &BTreeMap<IpAddr, u32>,
    ) -> Result<(), TablesError> {
        let known = self.known_plain.keys().copied();
        let gone: Vec<IpAddr> = known.filter(|it| !plain.contains_key(it)).collect();
        for address in gone {
            forget(self.plain.remove(&VipKey::from_address(address)))?;
            self.known_plain.remove(&address);
        }
        let wanted: BTreeSet<(u32, Destination)> =
            destinations.values().flatten().copied().collect();
        let gone: Vec<_> = self
            .known_destinations
            .difference(&wanted)
            .copied()
            .collect();
        for named in gone {
            forget(self.destinations.remove(&Key::new(named.0, named.1)))?;
            self.known_destinations.remove(&named);
        }
        Ok(())
    }
}

/// The destinations of each policy that has a number, as the maps have them.
pub(super) fn destinations(
    leaving: &Leaving,
    numbers: &BTreeMap<PolicyName, u32>,
) -> BTreeMap<PolicyName, BTreeSet<(u32, Destination)>> {
    let mut all = BTreeMap::new();
    for (name, policy) in &leaving.egress.policies {
        let Some(number) = numbers.get(name) else {
            continue;
        };
        let mut of = BTreeSet::new();
        let mut add = |excluded: bool, nets: &BTreeSet<IpNet>| {
            of.extend(nets.iter().map(|net| {
                let (length, address) = network(net);
                let is_v4 = net.addr().is_ipv4();
                destination(*number, excluded, is_v4, length, VipKey(address))
            }));
        };
        add(false, &policy.destinations);
        add(true, &policy.excluded);
        all.insert(name.clone(), of);
    }
    all
}

/// This node's pods that are nobody's tenants and were not, and what tells each from another.
pub(super) fn plain(leaving: &Leaving) -> BTreeMap<IpAddr, u32> {
    let own = leaving.egress.pods.iter();
    own.filter(|(_, pod)| pod.node == leaving.node && pod.tenant.is_none() && pod.former.is_none())
        .map(|(address, pod)| (*address, life_of(pod.identity)))
        .collect()
}
