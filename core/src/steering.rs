//! Which node a flow belongs to: tables from buckets to nodes, equal on all nodes from equal inputs.
//!
//! A flow's hash names a bucket; a [`Table`] names the bucket's first and second node. Both are chosen by weighted
//! rendezvous hashing: each node draws a number for the bucket, scaled by its weight (its servable endpoints), and
//! the lowest wins. So the loss of a node moves its buckets only, each to the node that was second there; a new node
//! takes about its share and disturbs nothing else; and a node's death can be looked past without a new table.
//!
//! A [`Table`] belongs to a distribution of endpoints over nodes, not to a Service: all that are spread alike can share
//! one. What is spread over few nodes needs none: [`first`] is as quick as looking it up, and the programs do the same.

mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use landfall_ebpf_common::rendezvous::{Bid, cost};
use xxhash_rust::xxh64::{Xxh64, xxh64};

use crate::model::NodeName;

pub use landfall_ebpf_common::rendezvous::ALGORITHM;
pub use table::{BUCKETS, Pair, Table};

/// How many servable endpoints each node has, in lowest terms: twice as many everywhere spread flows alike.
pub type Distribution = BTreeMap<NodeName, u16>;

/// What a node's draws begin with: xxh64 of its name, with seed 0.
pub fn seed(node: &NodeName) -> u64 {
    xxh64(node.0.as_bytes(), 0)
}

/// The distribution of these numbers of endpoints; nodes with none are left out.
pub fn distribution(endpoints: &BTreeMap<NodeName, u32>) -> Distribution {
    let divisor = endpoints.values().copied().fold(0, gcd).max(1);
    let most = endpoints.values().max().map_or(0, |most| most / divisor);
    // More than a thousandfold apart is rounded, but nobody to nothing.
    let excess = most.div_ceil(u32::from(u16::MAX)).max(1);
    endpoints
        .iter()
        .filter(|(_, number)| **number > 0)
        .map(|(node, number)| {
            let weight = (number / divisor / excess).max(1);
            (node.clone(), u16::try_from(weight).unwrap_or(u16::MAX))
        })
        .collect()
}

/// A table's inputs in short, the algorithm among them: xxh64 of names and weights. Nodes that show the same have the
/// same table.
pub fn digest(distribution: &Distribution) -> u64 {
    let mut digest = Xxh64::new(u64::from(ALGORITHM));
    for (node, weight) in distribution {
        // The length first: no two distributions are the same bytes.
        digest.update(&(node.0.len() as u64).to_le_bytes());
        digest.update(node.0.as_bytes());
        digest.update(&weight.to_le_bytes());
    }
    digest.digest()
}

fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// The node that a bucket belongs to.
pub fn first(distribution: &Distribution, bucket: u32) -> Option<&NodeName> {
    let mut best: Option<(Bid, &NodeName)> = None;
    for (node, weight) in distribution {
        let bid = bid(seed(node), u32::from(*weight), bucket);
        if best.is_none_or(|(best, _)| bid.beats(best)) {
            best = Some((bid, node));
        }
    }
    best.map(|(_, node)| node)
}

fn bid(seed: u64, weight: u32, bucket: u32) -> Bid {
    Bid {
        cost: cost(seed, bucket),
        weight,
        seed,
    }
}
