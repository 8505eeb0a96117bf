//! The maps that the programs decide by, and what is in them.
//!
//! Nodes, VIPs and ports have numbers in the maps. A number means something on this node alone: an earlier process's
//! are read from the maps and kept, so that what is pinned goes on meaning what it meant.

mod holders;
mod local;
mod nodes;
pub(super) mod numbers;
mod ports;
mod vips;
mod wide;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Array, Map, MapData, MapError, PerCpuArray};
use ipnet::IpNet;
use landfall_core::steering::seed;
use landfall_ebpf_common::{Settings, VipKey, map, routed_prefix, seeded};

use super::egress::guard::Guard;
use super::{Change, VipCount};
use crate::egress::PolicyName;

pub(super) use local::endpoint;
pub(super) use nodes::{Nodes, forget};
pub(super) use numbers::Numbers;
pub(super) use ports::key as port_key;

/// Why the maps do not hold what they should.
#[derive(Debug, thiserror::Error)]
pub(super) enum TablesError {
    #[error("the eBPF object holds no map {0}")]
    Missing(&'static str),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("the number of CPUs is not known: {0}")]
    Cpus(#[from] std::io::Error),
    #[error("the data path has room for {0} {1} and no more")]
    Full(u32, &'static str),
}

/// The maps, and what this process knows to be in them.
pub(super) struct Tables {
    vips: vips::Vips,
    nodes: Nodes,
    pub(super) guard: Guard,
    ports: ports::Ports,
    settings: Array<MapData, Settings>,
    /// The other nodes have had the time to say what they hold.
    settled: bool,
    verdicts: PerCpuArray<MapData, u64>,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tables").finish_non_exhaustive()
    }
}

/// A map of the object, to be taken once.
pub(super) fn taken<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<M, TablesError> {
    let map = ebpf.take_map(name).ok_or(TablesError::Missing(name))?;
    Ok(M::try_from(map)?)
}

/// A network as in a longest-prefix match: its prefix's length in bits, and its address.
pub(super) fn network(net: IpNet) -> (u32, [u8; 16]) {
    let mapped = if net.addr().is_ipv4() { 96 } else { 0 };
    let length = routed_prefix(mapped + u32::from(net.prefix_len()));
    (length, VipKey::from_address(net.network()).0)
}

impl Tables {
    /// Takes the maps, and reads what an earlier process has left in them. With the maps of the programs that judge, if they
    /// do.
    pub(super) fn adopt(ebpf: &mut Ebpf, judges: bool) -> Result<Self, TablesError> {
        Ok(Self {
            vips: vips::Vips::adopt(ebpf)?,
            nodes: Nodes::adopt(ebpf)?,
            guard: Guard::adopt(ebpf, judges)?,
            ports: ports::Ports::adopt(ebpf)?,
            settings: taken(ebpf, map::SETTINGS)?,
            settled: false,
            verdicts: taken(ebpf, map::VERDICTS)?,
        })
    }

    /// Makes a change so. What fails leaves the rest as it was.
    pub(super) fn change(&mut self, change: &Change) -> Result<(), TablesError> {
        match change {
            Change::Vip(vip, state) => self.vips.set(*vip, *state),
            Change::Node(id, state) => {
                if state.as_ref().is_some_and(|state| state.here) {
                    self.settle(|settings| settings.seed = seed(&id.name))?;
                }
                self.nodes.set(id, state.as_ref())
            }
            Change::Port(id, state) => self.ports.set(*id, state.as_ref(), &mut self.nodes),
            Change::Holders(id, page, holders) => {
                self.ports.holders(*id, *page, holders, &mut self.nodes)
            }
            Change::Egress(leaving) => self.guard.set(leaving.as_deref(), &mut self.nodes),
            Change::Mark(mark) => self.settle(|settings| settings.mark = *mark),
            Change::Complete => {
                self.ports.sweep()?;
                self.vips.sweep()?;
                self.nodes.sweep()
            }
        }
    }

    /// A process is about to say all it knows: what an earlier one has left may be old, and not all others have said what
    /// is new.
    pub(super) fn begin(&mut self) -> Result<(), TablesError> {
        self.settled = false;
        self.settle(|settings| settings.seeded = settings.seeded.min(seeded::ENTERED))
    }

    /// Forgets what is past, and takes in what changes without a word.
    pub(super) fn expire(&mut self) -> Result<(), TablesError> {
        self.guard.refresh(&mut self.nodes)?;
        self.forget(ports::HISTORY)
    }

    /// Forgets what is past for so long.
    fn forget(&mut self, after: Duration) -> Result<(), TablesError> {
        if self.ports.expire(after)? {
            self.settled = true;
            self.settle(|settings| {
                if settings.seeded == seeded::ENTERED {
                    settings.seeded = seeded::SETTLED;
                }
            })?;
        }
        Ok(())
    }

    /// As if it were long past.
    #[cfg(test)]
    pub(super) fn forget_history(&mut self) -> Result<(), TablesError> {
        self.forget(Duration::ZERO)
    }

    /// The flows that were there before have been entered.
    pub(super) fn entered(&mut self) -> Result<(), TablesError> {
        let known = if self.settled {
            seeded::SETTLED
        } else {
            seeded::ENTERED
        };
        self.settle(|settings| settings.seeded = settings.seeded.max(known))
    }

    /// What is known of the flows that were there before, one of [`seeded`].
    #[cfg(test)]
    pub(super) fn set_seeded(&mut self, seeded: u32) -> Result<(), TablesError> {
        self.settle(|settings| settings.seeded = seeded)
    }

    /// Whether they have been, by this process or an earlier one.
    pub(super) fn is_seeded(&self) -> bool {
        self.settings
            .get(&0, 0)
            .is_ok_and(|settings| settings.seeded != seeded::NOT)
    }

    fn settle(&mut self, change: impl FnOnce(&mut Settings)) -> Result<(), TablesError> {
        let before = self.settings.get(&0, 0)?;
        let mut after = before;
        change(&mut after);
        if after != before {
            self.settings.set(0, after, 0)?;
        }
        Ok(())
    }

    /// The counts of the VIPs.
    pub(super) fn counts(&self) -> BTreeMap<IpAddr, VipCount> {
        self.vips.counts()
    }

    /// How many packets of pods the guard sent on and dropped, in the order of `Guarded::ALL`.
    pub(super) fn guarded(&self) -> Vec<u64> {
        self.guard.counts()
    }

    /// How many packets of each policy's pods it dropped for want of a gateway.
    pub(super) fn unled(&self) -> BTreeMap<PolicyName, u64> {
        self.guard.unled()
    }

    /// How many packets met each fate, all CPUs together, in the order of `Verdict::ALL`.
    pub(super) fn verdicts(&self) -> Vec<u64> {
        self.verdicts
            .iter()
            .map(|values| values.map_or(0, |values| values.iter().sum()))
            .collect()
    }
}
