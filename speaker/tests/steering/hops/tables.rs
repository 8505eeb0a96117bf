//! The pinned tables of nodes, written at random.

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use landfall_ebpf_common::{
    History, Holders, HoldersKey, LAYOUT, Member, Port, PortKey, Settings, Spread, VipKey, map,
    node_flag, port_flag, seeded,
};
use landfall_lab::{Lab, Nic, Node};

use super::{Dice, Probe};

fn pinned(lab: &Lab, node: &Node, name: &str) -> Result<MapData, MapError> {
    let layout = format!("layout-{LAYOUT}");
    let pins = lab.mount_pins().unwrap().join(&node.name).join(layout);
    MapData::from_pin(pins.join(name))
}

/// Whether the node has looked for flows that were there before: until then it hands nothing on.
pub(super) fn is_seeded(lab: &Lab, node: &Node) -> bool {
    let settings = || -> Result<Settings, MapError> {
        let map: Array<_, Settings> = Map::Array(pinned(lab, node, map::SETTINGS)?).try_into()?;
        map.get(&0, 0)
    };
    settings().is_ok_and(|settings| settings.seeded != seeded::NOT)
}

/// The pinned tables of a node whose speaker is gone.
pub(super) struct Tables {
    ports: HashMap<MapData, PortKey, Port>,
    history: HashMap<MapData, u32, History>,
    holders: HashMap<MapData, HoldersKey, Holders>,
    /// The numbers of all nodes at the LAN, as this node has them.
    numbers: Vec<u16>,
}

impl Tables {
    pub(super) fn open(lab: &Lab, node: &Node) -> Self {
        let data = |name: &str| pinned(lab, node, name).unwrap();
        let known: Array<_, landfall_ebpf_common::Node> =
            Map::Array(data(map::NODES)).try_into().unwrap();
        let macs: BTreeSet<[u8; 6]> = lab.nodes().iter().map(|it| it.mac(Nic::Eth0).0).collect();
        let wanted = node_flag::ALIVE | node_flag::STEERS;
        let numbers: Vec<u16> = (1..64)
            .filter(|number| {
                let it = known.get(number, 0).unwrap();
                let other = macs.contains(&it.mac) && it.flags & wanted == wanted;
                other || it.flags & node_flag::HERE != 0
            })
            .map(|number| u16::try_from(number).unwrap())
            .collect();
        assert_eq!(
            numbers.len(),
            macs.len(),
            "{} knows all as alive",
            node.name
        );
        Self {
            ports: Map::HashMap(data(map::PORTS)).try_into().unwrap(),
            history: Map::HashMap(data(map::HISTORY)).try_into().unwrap(),
            holders: Map::HashMap(data(map::HOLDERS)).try_into().unwrap(),
            numbers,
        }
    }

    /// Some nodes, any.
    fn spread(&self, dice: &mut Dice) -> Spread {
        let mut spread = Spread {
            count: u16::try_from(1 + dice.roll(4)).unwrap(),
            ..Spread::default()
        };
        let count = usize::from(spread.count);
        for member in &mut spread.members[..count] {
            *member = Member {
                node: dice.pick(&self.numbers),
                weight: 1,
            };
        }
        spread
    }

    /// Has the node believe anything of who serves these packets, and of who has.
    pub(super) fn believe(&mut self, probes: &[Probe], dice: &mut Dice) {
        let keys: BTreeMap<PortKey, Vec<u32>> =
            probes.iter().fold(BTreeMap::new(), |mut keys, probe| {
                let key = PortKey {
                    vip: VipKey::from_address(probe.vip),
                    port: probe.kind.port(),
                    protocol: probe.kind.protocol().0,
                    zero: 0,
                };
                let buckets: &mut Vec<u32> = keys.entry(key).or_default();
                buckets.push(probe.bucket());
                keys
            });
        for (key, buckets) in keys {
            let mut port = self.ports.get(&key, 0).unwrap();
            let flags = port.spread.flags | port_flag::HELD;
            port.spread = Spread {
                flags,
                ..self.spread(dice)
            };
            self.ports.insert(key, port, 0).unwrap();
            let mut history = History::default();
            let earlier = dice.roll(5) as usize;
            for spread in &mut history.spreads[..earlier] {
                *spread = self.spread(dice);
            }
            self.history.insert(port.number, history, 0).unwrap();
            for bucket in buckets {
                let mut holders = Holders::default();
                let named = dice.roll(5) as usize;
                for number in &mut holders.nodes[..named] {
                    *number = dice.pick(&self.numbers);
                }
                let key = HoldersKey {
                    port: port.number,
                    bucket,
                };
                self.holders.insert(key, holders, 0).unwrap();
            }
        }
    }
}
