//! The ports of the VIPs, and over which nodes their flows are spread.
//!
//! A port's earlier spreads stay in the maps for a while: whoever is asked for a flow it does not know can ask those
//! that were responsible before, until the holders of such flows have made themselves known.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use landfall_core::model::{NodeName, Protocol};
use landfall_ebpf_common::{
    History, MAX_HISTORY, MAX_PORTS, Member, NARROW, Port, PortKey, Spread, VipKey, map, port_flag,
};

use super::super::{PortId, PortState, Reach};
use super::holders::Holders;
use super::local::Local;
use super::nodes::Nodes;
use super::numbers::Numbers;
use super::wide::Wide;
use super::{TablesError, taken};

/// How long earlier spreads are asked after the last change: long enough for the holders to speak.
pub(super) const HISTORY: Duration = Duration::from_secs(5);
/// How long after a change those whose buckets it took have said which flows they hold, on a busy machine too.
const SPOKEN: Duration = Duration::from_millis(2_500);

/// An earlier spread's time as the table.
#[derive(Clone, Copy, Debug)]
struct Reign {
    lasted: Duration,
    ended: Instant,
}

impl Reign {
    /// Of one that is over now.
    fn over(lasted: Duration) -> Self {
        let ended = Instant::now();
        Self { lasted, ended }
    }
}

/// A port as it is in the maps.
#[derive(Clone, Debug)]
struct Known {
    port: Port,
    history: History,
    /// Those of the earlier spreads.
    reigns: [Reign; MAX_HISTORY],
    changed: Instant,
    /// Where the nodes are reached; not known of what an earlier process has left.
    reach: Reach,
}

pub(super) struct Ports {
    map: HashMap<MapData, PortKey, Port>,
    history: HashMap<MapData, u32, History>,
    wide: Wide,
    holders: Holders,
    local: Local,
    known: BTreeMap<PortKey, Known>,
    /// Those with earlier spreads.
    changed: BTreeSet<PortKey>,
    numbers: Numbers,
    /// Left by an earlier process, and not asked for yet.
    stale: BTreeSet<PortKey>,
    /// When all had been asked for, while holders that an earlier process has left are still there.
    swept: Option<Instant>,
}

impl Ports {
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let map: HashMap<_, PortKey, Port> = taken(ebpf, map::PORTS)?;
        let history: HashMap<_, u32, History> = taken(ebpf, map::HISTORY)?;
        let earlier: BTreeMap<u32, History> = history.iter().collect::<Result<_, _>>()?;
        let mut wide = Wide::adopt(ebpf)?;
        let mut known = BTreeMap::new();
        for entry in &map {
            let (key, port) = entry?;
            let history = earlier.get(&port.number).copied().unwrap_or_default();
            wide.join(&port.spread);
            history.spreads.iter().for_each(|spread| wide.join(spread));
            let changed = Instant::now();
            known.insert(
                key,
                Known {
                    port,
                    history,
                    // Not known: at least as long as any since.
                    reigns: [Reign::over(Duration::MAX); MAX_HISTORY],
                    changed,
                    reach: Reach::default(),
                },
            );
        }
        let used = known.values().map(|known| known.port.number).collect();
        Ok(Self {
            map,
            history,
            wide,
            holders: Holders::adopt(ebpf)?,
            local: Local::adopt(ebpf)?,
            changed: known
                .iter()
                .filter(|(_, known)| known.history != History::default())
                .map(|(key, _)| *key)
                .collect(),
            stale: known.keys().copied().collect(),
            swept: None,
            numbers: Numbers::new(1, MAX_PORTS, &used),
            known,
        })
    }

    pub(super) fn set(
        &mut self,
        id: PortId,
        state: Option<&PortState>,
        nodes: &mut Nodes,
    ) -> Result<(), TablesError> {
        let key = key(id);
        self.stale.remove(&key);
        let Some(state) = state else {
            return self.remove(&key);
        };
        let spread = self.spread(state, nodes)?;
        let Some(mut known) = self.known.get(&key).cloned() else {
            return self.insert(key, spread, state);
        };
        known.reach = state.reach.clone();
        let number = known.port.number;
        let Port {
            spread: before,
            slots: slots_before,
            ..
        } = known.port;
        known.port.slots = self.local.put(number, state)?;
        if same_nodes(&before, &spread) {
            self.wide.leave(&spread);
            known.port.spread.flags = flags(state, self.is_held(&known));
        } else {
            if before.count != 0 {
                self.remember(&mut known, before)?;
            } else {
                self.wide.leave(&before);
            }
            known.changed = Instant::now();
            self.changed.insert(key);
            known.port.spread = spread;
            known.port.spread.flags = flags(state, self.is_held(&known));
        }
        if (known.port.spread, known.port.slots) != (before, slots_before) {
            self.map.insert(key, known.port, 0)?;
        }
        self.local.trim(number, known.port.slots);
        self.known.insert(key, known);
        Ok(())
    }

    fn insert(
        &mut self,
        key: PortKey,
        spread: Spread,
        state: &PortState,
    ) -> Result<(), TablesError> {
        let number = self
            .numbers
            .take()
            .ok_or(TablesError::Full(MAX_PORTS, "ports of VIPs"))?;
        let slots = self.local.put(number, state)?;
        let port = Port {
            number,
            slots,
            spread,
        };
        self.map.insert(key, port, 0)?;
        let known = Known {
            port,
            history: History::default(),
            reigns: [Reign::over(Duration::ZERO); MAX_HISTORY],
            changed: Instant::now(),
            reach: state.reach.clone(),
        };
        self.known.insert(key, known);
        Ok(())
    }

    /// Before a spread is replaced, it is where those who look for a flow can find it. Where there is not room for all, one
    /// is forgotten whose end is long past: who holds flows of it has said so. Else that which was the table for the shortest
    /// time: in a flurry of changes few flows began under it.
    fn remember(&mut self, known: &mut Known, before: Spread) -> Result<(), TablesError> {
        let mut past = vec![(before, Reign::over(known.changed.elapsed()))];
        for (earlier, reign) in known.history.spreads.into_iter().zip(known.reigns) {
            if earlier.count == 0 {
                continue;
            }
            if let Some((_, last)) = past.iter_mut().find(|it| same_nodes(&it.0, &earlier)) {
                last.lasted = reign.lasted.max(last.lasted);
                self.wide.leave(&earlier);
            } else {
                past.push((earlier, reign));
            }
        }
        if past.len() > MAX_HISTORY {
            let needed = |place: &usize| {
                let reign = past[*place].1;
                (reign.ended.elapsed() < SPOKEN, reign.lasted)
            };
            let least = (0..past.len()).min_by_key(needed);
            let (forgotten, _) = past.remove(least.expect("there are some"));
            self.wide.leave(&forgotten);
        }
        let mut spreads = [Spread::default(); MAX_HISTORY];
        for (place, (spread, reign)) in past.into_iter().enumerate() {
            spreads[place] = spread;
            known.reigns[place] = reign;
        }
        known.history = History { spreads };
        self.history.insert(known.port.number, known.history, 0)?;
        Ok(())
    }

    fn remove(&mut self, key: &PortKey) -> Result<(), TablesError> {
        self.stale.remove(key);
        let Some(known) = self.known.remove(key) else {
            return Ok(());
        };
        self.map.remove(key)?;
        self.changed.remove(key);
        self.forget_history(&known)?;
        self.holders.remove(known.port.number);
        self.local.remove(known.port.number);
        self.wide.leave(&known.port.spread);
        self.numbers.give(known.port.number);
        self.wide.sweep();
        Ok(())
    }

    fn forget_history(&mut self, known: &Known) -> Result<(), TablesError> {
        if known.history == History::default() {
            return Ok(());
        }
        self.history.remove(&known.port.number)?;
        for spread in &known.history.spreads {
            self.wide.leave(spread);
        }
        Ok(())
    }

    /// Whether a flow may be anywhere but where the table says.
    fn is_held(&self, known: &Known) -> bool {
        known.history != History::default() || self.holders.any(known.port.number)
    }

    /// Enters a port, which may be held now or not any more.
    fn hold(&mut self, key: PortKey, mut known: Known) -> Result<(), TablesError> {
        let before = known.port.spread.flags;
        if self.is_held(&known) {
            known.port.spread.flags |= port_flag::HELD;
        } else {
            known.port.spread.flags &= !port_flag::HELD;
        }
        if known.port.spread.flags != before {
            self.map.insert(key, known.port, 0)?;
        }
        self.known.insert(key, known);
        Ok(())
    }

    /// Enters who holds flows of a page's buckets.
    pub(super) fn holders(
        &mut self,
        id: PortId,
        page: u16,
        holders: &BTreeMap<u32, BTreeSet<NodeName>>,
        nodes: &mut Nodes,
    ) -> Result<(), TablesError> {
        let key = key(id);
        let Some(known) = self.known.get(&key).cloned() else {
            return Ok(());
        };
        self.holders
            .set(known.port.number, page, holders, &known.reach, nodes)?;
        self.hold(key, known)
    }

    /// Forgets earlier spreads that have been asked long enough. Says whether all others have just had the time to say
    /// what they hold.
    pub(super) fn expire(&mut self, after: Duration) -> Result<bool, TablesError> {
        let settled = self.forget_holders(after)?;
        let over: Vec<PortKey> = self
            .changed
            .iter()
            .filter(|key| {
                self.known
                    .get(*key)
                    .is_none_or(|known| known.changed.elapsed() >= after)
            })
            .copied()
            .collect();
        for key in over {
            self.changed.remove(&key);
            let Some(mut known) = self.known.get(&key).cloned() else {
                continue;
            };
            self.forget_history(&known)?;
            known.history = History::default();
            self.hold(key, known)?;
        }
        self.wide.sweep();
        Ok(settled)
    }

    /// Removes what nobody asked for.
    pub(super) fn sweep(&mut self) -> Result<(), TablesError> {
        self.swept = Some(Instant::now());
        for key in std::mem::take(&mut self.stale) {
            self.remove(&key)?;
        }
        self.wide.sweep();
        Ok(())
    }

    /// Forgets who held flows by the word of an earlier process's time, once all have had the time to say it again.
    fn forget_holders(&mut self, after: Duration) -> Result<bool, TablesError> {
        if self.swept.is_none_or(|swept| swept.elapsed() < after) {
            return Ok(false);
        }
        self.swept = None;
        let held_no_more = self.holders.sweep();
        let changed: Vec<(PortKey, Known)> = self
            .known
            .iter()
            .filter(|(_, known)| held_no_more.contains(&known.port.number))
            .map(|(key, known)| (*key, known.clone()))
            .collect();
        for (key, known) in changed {
            self.hold(key, known)?;
        }
        Ok(true)
    }

    fn spread(&mut self, state: &PortState, nodes: &mut Nodes) -> Result<Spread, TablesError> {
        let mut spread = Spread {
            flags: flags(state, false),
            ..Spread::default()
        };
        if state.nodes.len() <= NARROW {
            for (place, (name, weight)) in state.nodes.iter().enumerate() {
                spread.members[place] = Member {
                    node: nodes.place(name, state.reach.of(name))?,
                    weight: *weight,
                };
                spread.count += 1;
            }
        } else {
            spread.count = Spread::WIDE;
            spread.table = self.wide.take(&state.nodes, &state.reach, nodes)?;
        }
        Ok(spread)
    }
}

fn flags(state: &PortState, held: bool) -> u16 {
    let mut flags = 0;
    let mut flag = |set: bool, bit: u16| flags |= if set { bit } else { 0 };
    flag(state.affinity, port_flag::AFFINITY);
    flag(state.udp_ports, port_flag::UDP_PORTS);
    flag(state.host, port_flag::HOST);
    flag(held, port_flag::HELD);
    flag(state.native.is_some(), port_flag::NATIVE);
    let ranges = state.native.as_ref().and_then(|it| it.ranges.as_ref());
    flag(ranges.is_some(), port_flag::RANGES);
    flags
}

/// Whether two spreads are alike but for their flags.
fn same_nodes(one: &Spread, other: &Spread) -> bool {
    Spread { flags: 0, ..*one } == Spread { flags: 0, ..*other }
}

/// By what a port is known in the maps.
pub(in super::super) fn key(id: PortId) -> PortKey {
    PortKey {
        vip: VipKey::from_address(id.vip),
        port: id.port,
        protocol: match id.protocol {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        },
        zero: 0,
    }
}
