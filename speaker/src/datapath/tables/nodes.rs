//! The nodes: what they are called in the maps, how they are reached, and whose frames are theirs.

use std::collections::{BTreeMap, BTreeSet};

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData, MapError};
use ipnet::IpNet;
use landfall_core::model::NodeName;
use landfall_core::steering::seed;
use landfall_ebpf_common::{MAX_NODES, Node, Peer, PeerKey, Routed, VipKey, map, node_flag};

use super::super::{NodeId, NodeState};
use super::numbers::Numbers;
use super::{TablesError, network, taken};

/// What is in the maps for a node.
#[derive(Clone, Debug, Default)]
struct Known {
    node: Node,
    peer: Option<PeerKey>,
    routed: BTreeSet<(u32, Routed)>,
}

pub(in super::super) struct Nodes {
    map: Array<MapData, Node>,
    peers: HashMap<MapData, PeerKey, Peer>,
    routed: LpmTrie<MapData, Routed, u32>,
    known: BTreeMap<u16, Known>,
    /// By seed and interface: the name's hash stands for it in the maps.
    by_name: BTreeMap<(u64, u32), u16>,
    numbers: Numbers,
    /// Left by an earlier process, and not spoken of yet.
    stale: BTreeSet<u16>,
}

impl Nodes {
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let map: Array<_, Node> = taken(ebpf, map::NODES)?;
        let peers: HashMap<_, PeerKey, Peer> = taken(ebpf, map::PEERS)?;
        let routed: LpmTrie<_, Routed, u32> = taken(ebpf, map::ROUTED)?;
        let mut known: BTreeMap<u16, Known> = BTreeMap::new();
        for (number, node) in (0_u16..).zip(map.iter()) {
            let node = node?;
            if node.seed != 0 {
                let fresh = Known {
                    node,
                    ..Known::default()
                };
                known.insert(number, fresh);
            }
        }
        for entry in &peers {
            let (key, peer) = entry?;
            let number = u16::try_from(peer.node).unwrap_or(0);
            known.entry(number).or_default().peer = Some(key);
        }
        for entry in &routed {
            let (key, _) = entry?;
            let number = u16::try_from(u32::from_be_bytes(key.data().node)).unwrap_or(0);
            let routed = (key.prefix_len(), key.data());
            known.entry(number).or_default().routed.insert(routed);
        }
        let used = known.keys().map(|number| u32::from(*number)).collect();
        Ok(Self {
            map,
            peers,
            routed,
            by_name: known
                .iter()
                .map(|(number, known)| ((known.node.seed, known.node.interface), *number))
                .collect(),
            stale: known.keys().copied().collect(),
            numbers: Numbers::new(1, MAX_NODES, &used),
            known,
        })
    }

    /// The number of a node, which it gets if it has none: it is not alive until more is said of it.
    pub(in super::super) fn place(
        &mut self,
        name: &NodeName,
        interface: u32,
    ) -> Result<u16, TablesError> {
        if let Some(number) = self.by_name.get(&(seed(name), interface)) {
            return Ok(*number);
        }
        let id = NodeId {
            name: name.clone(),
            interface,
        };
        self.set(&id, Some(&NodeState::default()))?;
        Ok(self.by_name[&(seed(name), interface)])
    }

    /// Whether it is another node that is known to be alive.
    pub(super) fn is_other_and_alive(&self, number: u16) -> bool {
        let flags = self.known.get(&number).map(|known| known.node.flags);
        flags.is_some_and(|flags| flags & (node_flag::HERE | node_flag::ALIVE) == node_flag::ALIVE)
    }

    pub(super) fn set(
        &mut self,
        id: &NodeId,
        state: Option<&NodeState>,
    ) -> Result<(), TablesError> {
        let name = (seed(&id.name), id.interface);
        let known = self.by_name.get(&name).copied();
        let Some(state) = state else {
            return known.map_or(Ok(()), |number| self.remove(number));
        };
        let number = if let Some(number) = known {
            number
        } else {
            let number = self
                .numbers
                .take()
                .ok_or(TablesError::Full(MAX_NODES, "nodes"))?;
            u16::try_from(number).expect("there are fewer nodes")
        };
        self.stale.remove(&number);
        self.by_name.insert(name, number);
        let known = self.known.entry(number).or_default();
        let node = node_of(name, state);
        if known.node != node {
            // One write: a node's death is this and no more.
            self.map.set(u32::from(number), node, 0)?;
            known.node = node;
        }
        // This node's own frames do not come in.
        let peer = state.mac.filter(|_| !state.here).map(|mac| PeerKey {
            interface: id.interface,
            mac,
            zero: [0; 2],
        });
        if known.peer != peer {
            if let Some(key) = known.peer.take() {
                forget(self.peers.remove(&key))?;
            }
            if let Some(key) = peer {
                let node = u32::from(number);
                self.peers.insert(key, Peer { node }, 0)?;
            }
            known.peer = peer;
        }
        let routed: BTreeSet<(u32, Routed)> = state
            .routed
            .iter()
            .map(|net| behind(number, *net))
            .collect();
        for (length, data) in known.routed.difference(&routed) {
            forget(self.routed.remove(&Key::new(*length, *data)))?;
        }
        for (length, data) in routed.difference(&known.routed) {
            self.routed.insert(&Key::new(*length, *data), 0, 0)?;
        }
        known.routed = routed;
        Ok(())
    }

    fn remove(&mut self, number: u16) -> Result<(), TablesError> {
        self.stale.remove(&number);
        let Some(known) = self.known.remove(&number) else {
            return Ok(());
        };
        self.map.set(u32::from(number), Node::default(), 0)?;
        if let Some(key) = &known.peer {
            forget(self.peers.remove(key))?;
        }
        for (length, data) in &known.routed {
            forget(self.routed.remove(&Key::new(*length, *data)))?;
        }
        self.by_name
            .remove(&(known.node.seed, known.node.interface));
        if number != 0 {
            self.numbers.give(u32::from(number));
        }
        Ok(())
    }

    /// Removes the nodes that were not spoken of.
    pub(super) fn sweep(&mut self) -> Result<(), TablesError> {
        for number in std::mem::take(&mut self.stale) {
            self.remove(number)?;
        }
        Ok(())
    }
}

/// It is no error that what is to go is not there.
pub(in super::super) fn forget(outcome: Result<(), MapError>) -> Result<(), MapError> {
    match outcome {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn node_of((seed, interface): (u64, u32), state: &NodeState) -> Node {
    let mut flags = 0;
    let mut flag = |set: bool, bit: u16| flags |= if set { bit } else { 0 };
    flag(state.alive, node_flag::ALIVE);
    flag(state.suspected, node_flag::SUSPECTED);
    flag(state.here, node_flag::HERE);
    let tunnel = state.address.is_some();
    flag(state.mac.is_some() && !tunnel, node_flag::ON_SEGMENT);
    flag(state.mac.is_some() && tunnel, node_flag::TUNNEL);
    flag(state.steers, node_flag::STEERS);
    Node {
        seed,
        address: state
            .address
            .map_or([0; 16], |address| VipKey::from_address(address).0),
        interface,
        mac: state.mac.unwrap_or_default(),
        flags,
        zero: 0,
    }
}

fn behind(node: u16, net: IpNet) -> (u32, Routed) {
    let (length, address) = network(net);
    let routed = Routed {
        node: u32::from(node).to_be_bytes(),
        address,
    };
    (length, routed)
}
