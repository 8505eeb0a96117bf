//! The TCP flows that this node delivers: those that were there before the programs, and those that are no more.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use landfall_ebpf_common::{Flow, FlowKey, flow_state, map};
use nix::time::{ClockId, clock_gettime};

use super::super::conntrack;
use super::{TablesError, taken};

/// A flow that connection tracking does not know is forgotten when it was not heard for this long: a new one may be
/// here before it is there.
const UNHEARD: Duration = Duration::from_secs(60);
/// `BPF_NOEXIST`: an entry that is there is newer.
const IF_NEW: u64 = 1;

pub(super) struct Flows {
    map: HashMap<MapData, FlowKey, Flow>,
}

impl Flows {
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        Ok(Self {
            map: taken(ebpf, map::FLOWS)?,
        })
    }

    /// Enters the flows that are delivered here already, and forgets those that are not any more.
    pub(super) fn reconcile(&mut self, vips: &HashSet<IpAddr>) -> Result<Reconciled, TablesError> {
        let alive = conntrack::connections(vips).map_err(TablesError::Connections)?;
        let now = now().map_err(TablesError::Connections)?;
        let mut reconciled = Reconciled::default();
        let over: Vec<FlowKey> = self
            .map
            .iter()
            .flatten()
            .filter(|(key, flow)| {
                !alive.contains(key)
                    && now.saturating_sub(Duration::from_nanos(flow.seen)) > UNHEARD
            })
            .map(|(key, _)| key)
            .collect();
        for key in over {
            // It may have gone by itself.
            let _ = self.map.remove(&key);
            reconciled.forgotten += 1;
        }
        let flow = Flow {
            seen: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            state: flow_state::ESTABLISHED,
            zero: 0,
        };
        for key in alive {
            match self.map.insert(key, flow, IF_NEW) {
                Ok(()) => reconciled.entered += 1,
                // It is there already, or the table is full.
                Err(_) => reconciled.known += 1,
            }
        }
        Ok(reconciled)
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Reconciled {
    pub(in super::super) entered: usize,
    pub(in super::super) known: usize,
    pub(in super::super) forgotten: usize,
}

/// The clock that the programs read.
fn now() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}
