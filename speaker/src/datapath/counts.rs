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
pub(super) struct Counts(Arc<Mutex<Option<Entered>>>);

/// The map, and the VIPs in it once they were read; nobody else enters any.
struct Entered {
    map: Map,
    vips: Option<BTreeSet<IpAddr>>,
}

impl fmt::Debug for Counts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Counts").finish_non_exhaustive()
    }
}

impl Counts {
    /// The map is there.
    pub(super) fn install(&self, map: Map) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Entered { map, vips: None });
    }

    /// Makes the map hold these VIPs and no others; what it has counted for those that stay, stays.
    pub(super) fn keep(&self, vips: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Entered { map, vips: entered }) = guard.as_mut() else {
            return Ok(());
        };
        // Whatever fails below, the next call reads the map again.
        let present = match entered.take() {
            Some(present) => present,
            None => map
                .keys()
                .map(|key| key.map(VipKey::address))
                .collect::<Result<_, _>>()?,
        };
        for vip in present.difference(vips) {
            map.remove(&VipKey::from_address(*vip))?;
        }
        let cpus = nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        for vip in vips.difference(&present) {
            let zero = PerCpuValues::try_from(vec![common::VipCount::default(); cpus])
                .map_err(MapError::IoError)?;
            map.insert(VipKey::from_address(*vip), zero, 0)?;
        }
        *entered = Some(vips.clone());
        Ok(())
    }

    /// What was counted for each VIP, all CPUs together. Nothing if the map is not there or cannot be read.
    pub(super) fn read(&self) -> BTreeMap<IpAddr, VipCount> {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(entered) = guard.as_ref() else {
            return BTreeMap::new();
        };
        entered
            .map
            .iter()
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
