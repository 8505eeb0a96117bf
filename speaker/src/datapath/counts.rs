//! The map of counts: which VIPs are in it, and what was counted for each.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{MapData, MapError, PerCpuHashMap, PerCpuValues};
use aya::util::nr_cpus;
use landfall_ebpf_common::{self as common, VipKey};

use super::VipCount;

type Map = PerCpuHashMap<MapData, VipKey, common::VipCount>;

/// The map, once it is there; shared between the worker, which enters VIPs, and whoever reads.
#[derive(Clone, Default)]
pub(super) struct Counts(Arc<Mutex<Option<Map>>>);

impl fmt::Debug for Counts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Counts").finish_non_exhaustive()
    }
}

impl Counts {
    /// The map is there.
    pub(super) fn install(&self, map: Map) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(map);
    }

    /// Makes the map hold these VIPs and no others; what it has counted for those that stay, stays.
    pub(super) fn keep(&self, vips: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(map) = guard.as_mut() else {
            return Ok(());
        };
        let present: BTreeSet<VipKey> = map.keys().collect::<Result<_, _>>()?;
        let wanted: BTreeSet<VipKey> = vips.iter().copied().map(VipKey::from_address).collect();
        for key in present.difference(&wanted) {
            map.remove(key)?;
        }
        if wanted.is_subset(&present) {
            return Ok(());
        }
        let cpus = nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        for key in wanted.difference(&present) {
            let zero = PerCpuValues::try_from(vec![common::VipCount::default(); cpus])
                .map_err(MapError::IoError)?;
            map.insert(key, zero, 0)?;
        }
        Ok(())
    }

    /// What was counted for each VIP, all CPUs together. Nothing if the map is not there or cannot be read.
    pub(super) fn read(&self) -> BTreeMap<IpAddr, VipCount> {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(map) = guard.as_ref() else {
            return BTreeMap::new();
        };
        map.iter()
            .flatten()
            .map(|(key, values)| {
                let total = values
                    .iter()
                    .fold(VipCount::default(), |sum, value| VipCount {
                        packets: sum.packets.wrapping_add(value.packets),
                        bytes: sum.bytes.wrapping_add(value.bytes),
                    });
                (key.address(), total)
            })
            .collect()
    }
}
