//! The VIPs, and what is counted for them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use landfall_core::egress::shadow;
use landfall_ebpf_common::{self as common, MAX_VIPS, Vip, VipKey, map, vip_flag};

use super::super::{VipCount, VipState};
use super::nodes::forget;
use super::numbers::Numbers;
use super::{TablesError, taken};

pub(super) struct Vips {
    map: HashMap<MapData, VipKey, Vip>,
    shadows: Shadows,
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
        let mut shadows = Shadows {
            map: taken(ebpf, map::SHADOWS)?,
            of: BTreeMap::new(),
        };
        shadows.adopt(known.keys())?;
        let used = known.values().map(|vip| vip.number).collect();
        Ok(Self {
            map,
            shadows,
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
            if self.known.insert(vip, after).is_none() {
                self.shadows.add(vip)?;
            }
        }
        Ok(())
    }

    fn remove(&mut self, vip: IpAddr) -> Result<(), TablesError> {
        if let Some(known) = self.known.remove(&vip) {
            self.shadows.remove(vip)?;
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

/// By which addresses pods' gateways know the VIPs.
struct Shadows {
    map: HashMap<MapData, VipKey, VipKey>,
    /// The VIPs of each: of several none has it.
    of: BTreeMap<IpAddr, BTreeSet<IpAddr>>,
}

impl Shadows {
    /// Takes over what is there for these VIPs.
    fn adopt<'a>(&mut self, vips: impl Iterator<Item = &'a IpAddr>) -> Result<(), TablesError> {
        for vip in vips {
            self.of.entry(shadow(*vip)).or_default().insert(*vip);
        }
        let there: Vec<VipKey> = self.map.keys().collect::<Result<_, _>>()?;
        for key in there {
            self.of.entry(key.address()).or_default();
        }
        let all: Vec<IpAddr> = self.of.keys().copied().collect();
        all.into_iter().try_for_each(|shadow| self.write(shadow))
    }

    fn add(&mut self, vip: IpAddr) -> Result<(), TablesError> {
        self.of.entry(shadow(vip)).or_default().insert(vip);
        self.write(shadow(vip))
    }

    fn remove(&mut self, vip: IpAddr) -> Result<(), TablesError> {
        self.of.entry(shadow(vip)).or_default().remove(&vip);
        self.write(shadow(vip))
    }

    fn write(&mut self, shadow: IpAddr) -> Result<(), TablesError> {
        let vips = self.of.get(&shadow).into_iter().flatten();
        let vips: Vec<IpAddr> = vips.copied().collect();
        let key = VipKey::from_address(shadow);
        match vips[..] {
            [vip] => self.map.insert(key, VipKey::from_address(vip), 0)?,
            [] => {
                self.of.remove(&shadow);
                forget(self.map.remove(&key))?;
            }
            [..] => {
                tracing::warn!(
                    ?vips,
                    "these VIPs differ in their first four bits only: egress policies with `hairpin` are for none of them"
                );
                forget(self.map.remove(&key))?;
            }
        }
        Ok(())
    }
}
