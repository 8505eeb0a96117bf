//! The VIPs, and what is counted for them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use landfall_ebpf_common::{self as common, MAX_VIPS, Vip, VipKey, map, vip_flag};

use super::super::{VipCount, VipState};
use super::numbers::Numbers;
use super::{TablesError, taken};

pub(super) struct Vips {
    map: HashMap<MapData, VipKey, Vip>,
    counts: PerCpuArray<MapData, common::VipCount>,
    known: BTreeMap<IpAddr, Vip>,
    numbers: Numbers,
    /// Left by an earlier process, and not asked for yet.
    stale: BTreeSet<IpAddr>,
}

impl Vips {
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let map: HashMap<_, VipKey, Vip> = taken(ebpf, map::VIPS)?;
        let known: BTreeMap<IpAddr, Vip> = map
            .iter()
            .map(|entry| entry.map(|(key, vip)| (key.address(), vip)))
            .collect::<Result<_, _>>()?;
        let used = known.values().map(|vip| vip.number).collect();
        Ok(Self {
            map,
            counts: taken(ebpf, map::COUNTS)?,
            stale: known.keys().copied().collect(),
            numbers: Numbers::new(0, MAX_VIPS, &used),
            known,
        })
    }

    pub(super) fn set(&mut self, vip: IpAddr, state: Option<VipState>) -> Result<(), TablesError> {
        self.stale.remove(&vip);
        let before = self.known.get(&vip).copied();
        let Some(state) = state else {
            return self.remove(vip);
        };
        let number = if let Some(known) = before {
            known.number
        } else {
            let number = self
                .numbers
                .take()
                .ok_or(TablesError::Full(MAX_VIPS, "VIPs"))?;
            self.zero(number)?;
            number
        };
        let after = Vip {
            number,
            flags: if state.steer { vip_flag::STEER } else { 0 },
            udp_port: state.udp_port.unwrap_or(0),
        };
        if before != Some(after) {
            self.map.insert(VipKey::from_address(vip), after, 0)?;
            self.known.insert(vip, after);
        }
        Ok(())
    }

    fn remove(&mut self, vip: IpAddr) -> Result<(), TablesError> {
        if let Some(known) = self.known.remove(&vip) {
            self.map.remove(&VipKey::from_address(vip))?;
            self.numbers.give(known.number);
        }
        Ok(())
    }

    /// Removes what nobody asked for.
    pub(super) fn sweep(&mut self) -> Result<(), TablesError> {
        for vip in std::mem::take(&mut self.stale) {
            self.remove(vip)?;
        }
        Ok(())
    }

    fn zero(&mut self, number: u32) -> Result<(), MapError> {
        let cpus = nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        let zero = PerCpuValues::try_from(vec![common::VipCount::default(); cpus])
            .map_err(MapError::IoError)?;
        self.counts.set(number, zero, 0)
    }

    pub(super) fn counts(&self) -> BTreeMap<IpAddr, VipCount> {
        let total = |vip: &Vip| {
            let values = self.counts.get(&vip.number, 0).ok()?;
            Some(
                values
                    .iter()
                    .fold(VipCount::default(), |sum, value| VipCount {
                        packets: sum.packets.wrapping_add(value.packets),
                        bytes: sum.bytes.wrapping_add(value.bytes),
                    }),
            )
        };
        self.known
            .iter()
            .filter_map(|(vip, known)| Some((*vip, total(known)?)))
            .collect()
    }
}
