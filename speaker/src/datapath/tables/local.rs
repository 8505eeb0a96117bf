//! This node's endpoints of each port, where the programs deliver themselves, and whose clients they serve.
//!
//! Endpoints are in slots, into which new flows fall evenly. For `sessionAffinity` there are many more slots than
//! endpoints, and each draws for its own: an endpoint that comes or goes moves its share of the clients only.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData};
use ipnet::IpNet;
use landfall_ebpf_common::{Endpoint, Range, SlotKey, VipKey, map};
use xxhash_rust::xxh64::xxh64;

use super::super::PortState;
use super::{TablesError, network, taken};

/// How many slots a port with `sessionAffinity` has.
const AFFINITY_SLOTS: u32 = 256;

pub(super) struct Local {
    slots: HashMap<MapData, SlotKey, Endpoint>,
    ranges: LpmTrie<MapData, Range, u32>,
    /// What is in the maps, by port.
    known: BTreeMap<u32, Known>,
}

#[derive(Debug, Default)]
struct Known {
    slots: BTreeMap<u32, Endpoint>,
    ranges: BTreeSet<(u32, Range)>,
    /// Of those, what is not wanted any more.
    stale: BTreeSet<(u32, Range)>,
}

impl Local {
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let slots: HashMap<_, SlotKey, Endpoint> = taken(ebpf, map::SLOTS)?;
        let ranges: LpmTrie<_, Range, u32> = taken(ebpf, map::RANGES)?;
        let mut known = BTreeMap::<u32, Known>::new();
        for entry in &slots {
            let (key, endpoint) = entry?;
            let of_port = known.entry(key.port).or_default();
            of_port.slots.insert(key.slot, endpoint);
        }
        for entry in &ranges {
            let (key, _) = entry?;
            let range = key.data();
            let of_port = known.entry(u32::from_be_bytes(range.port)).or_default();
            of_port.ranges.insert((key.prefix_len(), range));
        }
        Ok(Self {
            slots,
            ranges,
            known,
        })
    }

    /// Enters a port's endpoints and ranges; how many slots it has now. What is not wanted any more stays until
    /// [`Self::trim`].
    pub(super) fn put(&mut self, port: u32, state: &PortState) -> Result<u32, TablesError> {
        let Some(native) = &state.native else {
            // What serves is kube-proxy, by one slot.
            return Ok(u32::from(state.here));
        };
        let known = self.known.entry(port).or_default();
        let wanted: BTreeSet<(u32, Range)> = native
            .ranges
            .iter()
            .flatten()
            .map(|net| range(port, *net))
            .collect();
        for (length, data) in wanted.difference(&known.ranges) {
            self.ranges.insert(&Key::new(*length, *data), 1, 0)?;
        }
        known.stale = &known.ranges - &wanted;
        known.ranges.extend(wanted);
        let endpoints: Vec<Endpoint> = native.endpoints.iter().copied().map(endpoint).collect();
        let slots = if state.affinity && !endpoints.is_empty() {
            drawn(&endpoints)
        } else {
            endpoints
        };
        let mut count = 0;
        for endpoint in slots {
            if known.slots.get(&count) != Some(&endpoint) {
                self.slots
                    .insert(SlotKey { port, slot: count }, endpoint, 0)?;
                known.slots.insert(count, endpoint);
            }
            count += 1;
        }
        Ok(count)
    }

    /// Removes a port's slots beyond this number, and stale ranges: nothing names them any more.
    pub(super) fn trim(&mut self, port: u32, slots: u32) {
        let Some(known) = self.known.get_mut(&port) else {
            return;
        };
        // What is gone already is no loss.
        for slot in known.slots.split_off(&slots).into_keys() {
            let _ = self.slots.remove(&SlotKey { port, slot });
        }
        for range in std::mem::take(&mut known.stale) {
            known.ranges.remove(&range);
            let _ = self.ranges.remove(&Key::new(range.0, range.1));
        }
    }

    pub(super) fn remove(&mut self, port: u32) {
        if let Some(known) = self.known.get_mut(&port) {
            known.stale = known.ranges.clone();
        }
        self.trim(port, 0);
        self.known.remove(&port);
    }
}

/// An endpoint for each slot, by rendezvous hashing.
fn drawn(endpoints: &[Endpoint]) -> Vec<Endpoint> {
    let draw = |endpoint: &Endpoint, slot: u32| {
        let mut bytes = [0; 18];
        bytes[..16].copy_from_slice(&endpoint.address);
        bytes[16..].copy_from_slice(&endpoint.port.to_be_bytes());
        xxh64(&bytes, u64::from(slot))
    };
    (0..AFFINITY_SLOTS)
        .filter_map(|slot| {
            endpoints
                .iter()
                .max_by_key(|endpoint| (draw(endpoint, slot), **endpoint))
        })
        .copied()
        .collect()
}

/// An endpoint as it is in the maps.
pub(in super::super) fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        address: VipKey::from_address(address.ip()).0,
        port: address.port(),
        zero: 0,
    }
}

fn range(port: u32, net: IpNet) -> (u32, Range) {
    let (length, address) = network(net);
    let range = Range {
        port: port.to_be_bytes(),
        address,
    };
    (length, range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_that_goes_moves_its_own_slots_only() {
        let all: Vec<Endpoint> = (1..=5)
            .map(|last| endpoint(SocketAddr::from(([10, 0, 0, last], 80))))
            .collect();
        let before = drawn(&all);
        let after = drawn(&all[..4]);
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(one, other)| one != other);
        let of_fifth = before
            .iter()
            .filter(|endpoint| **endpoint == all[4])
            .count();
        assert_eq!(moved.count(), of_fifth);
        assert!((25..=80).contains(&of_fifth), "{of_fifth} of 256");
    }
}
