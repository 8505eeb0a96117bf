//! From a bucket to the node that serves it.

use landfall_ebpf_common::rendezvous::Bid;
use landfall_ebpf_common::{NARROW, Node, Spread, WIDE_PAGE, WideKey, node_flag};

use crate::maps;

/// The node of a bucket, 0 for none: the first that is alive. What is new avoids those that may be gone, unless all
/// may be.
#[inline(always)]
pub(crate) fn choose(spread: &Spread, bucket: u32, new: bool) -> u16 {
    if spread.count == Spread::WIDE {
        return paged(spread.table, bucket, new);
    }
    let mut best = 0;
    let mut best_bid = Bid {
        cost: 0,
        weight: 1,
        seed: 0,
    };
    let mut best_suspected = true;
    for place in 0..NARROW {
        if place >= spread.count as usize {
            break;
        }
        let member = spread.members[place];
        let Some(node) = maps::node(member.node) else {
            continue;
        };
        if node.flags & node_flag::ALIVE == 0 {
            continue;
        }
        let suspected = new && node.flags & node_flag::SUSPECTED != 0;
        let bid = node.bid(bucket, member.weight);
        let better = best == 0
            || (best_suspected && !suspected)
            || (best_suspected == suspected && bid.beats(best_bid));
        if better {
            best = member.node;
            best_bid = bid;
            best_suspected = suspected;
        }
    }
    best
}

#[inline(always)]
fn paged(table: u32, bucket: u32, new: bool) -> u16 {
    let key = WideKey {
        table,
        page: bucket / WIDE_PAGE as u32,
    };
    let Some(page) = maps::wide(&key) else {
        return 0;
    };
    let [first, second] = page.0[bucket as usize % WIDE_PAGE];
    let flags = |number| maps::node(number).map_or(0, |node: &Node| node.flags);
    let (of_first, of_second) = (flags(first), flags(second));
    let usable = |flags| flags & node_flag::ALIVE != 0;
    let trusted = |flags| usable(flags) && !(new && flags & node_flag::SUSPECTED != 0);
    if trusted(of_first) || (usable(of_first) && !trusted(of_second)) {
        first
    } else if usable(of_second) {
        second
    } else {
        0
    }
}
