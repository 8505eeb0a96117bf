//! Who should lead, of those who could: sticky claims first, else a weighted rendezvous hash.

use std::cmp::Reverse;

use xxhash_rust::xxh64::xxh64;

use super::peer::Claim;
use crate::model::NodeName;

/// The hash that elects, part of the protocol: xxh64 with this seed over group, node and draw, each ended by a zero byte.
pub const HASH: (&str, u64) = ("xxh64-rendezvous-1", 0x4c61_6e64_6661_6c01);

/// A node that could lead a group.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// Its name.
    pub node: &'a NodeName,
    /// At least 1.
    pub weight: u32,
    /// What reaches it would be served.
    pub ready: bool,
    /// It came and went too often lately.
    pub damped: bool,
    /// Its claim.
    pub claim: Option<&'a Claim>,
    /// It takes nothing new: it is stopping, or its inputs differ from the majority's.
    pub unwilling: bool,
}

/// A node's draw for a group: the best of as many draws as it has weight, which is exact weighted rendezvous
/// hashing in whole numbers.
pub fn score(group: &str, node: &NodeName, weight: u32) -> u64 {
    let mut text = Vec::with_capacity(group.len() + node.0.len() + 6);
    text.extend_from_slice(group.as_bytes());
    text.push(0);
    text.extend_from_slice(node.0.as_bytes());
    text.push(0);
    let stem = text.len();
    (0..weight.clamp(1, 1024))
        .map(|draw| {
            text.truncate(stem);
            text.extend_from_slice(&draw.to_be_bytes());
            xxh64(&text, HASH.1)
        })
        .max()
        .unwrap_or(0)
}

/// The candidates that would take a vacant group, best first: those that serve it before those that do not yet,
/// steady ones before flapping ones, then by hash.
pub fn rank<'a, 'b>(group: &str, candidates: &'b [Candidate<'a>]) -> Vec<&'b Candidate<'a>> {
    let mut ranked: Vec<_> = candidates
        .iter()
        .filter(|candidate| !candidate.unwilling)
        .map(|candidate| {
            let key = (
                candidate.ready,
                !candidate.damped,
                score(group, candidate.node, candidate.weight),
            );
            (Reverse(key), candidate.node, candidate)
        })
        .collect();
    ranked.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
    ranked
        .into_iter()
        .map(|(_, _, candidate)| candidate)
        .collect()
}

/// Whether claim `a` of node `na` beats claim `b` of node `nb`: the higher epoch, then hash order, then name.
/// Weights stay out of it: both must agree even while they see different weights.
pub(super) fn beats(group: &str, (na, a): (&NodeName, u64), (nb, b): (&NodeName, u64)) -> bool {
    let key = |node: &NodeName, epoch: u64| (epoch, score(group, node, 1));
    let (left, right) = (key(na, a), key(nb, b));
    left > right || (left == right && na < nb)
}
