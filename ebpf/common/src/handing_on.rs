//! How far a packet whose flow is unknown here may be handed on, and to whom.
//!
//! A packet in the middle of a TCP flow that its node does not know goes to a node that held its bucket before. Nodes
//! may disagree about who that is, so what keeps packets from wandering are two things that no table can talk
//! them out of. The number of times is in the packet: the first time its TTL (or hop limit) is cut down to
//! [`FIRST_TTL`], and each further time lowers it by one, down to [`LAST_TTL`]. And each further time it goes to a
//! node of a higher seed only, so that none hands the same packet on twice; the node that its own table names first
//! begins with any, and does not hand on what was handed on before.

use crate::flow::MAX_HOLDERS;

/// The highest TTL with which a packet is handed on. A client's packet that arrives with so little is rare, and
/// fares worse only if its flow was moved: it is looked for at fewer nodes.
pub const FIRST_TTL: u8 = 7;
/// A packet that was handed on and has this TTL stays where it is; it is enough for the way to a pod.
#[allow(clippy::cast_possible_truncation)] // It is 4.
pub const LAST_TTL: u8 = FIRST_TTL - (MAX_HOLDERS as u8 - 1);

/// A packet in the middle of a flow that this node does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Its TTL or hop limit.
    pub ttl: u8,
    /// Another node sent it.
    pub from_peer: bool,
    /// This node's table names this node first.
    pub first_here: bool,
    /// This node's seed.
    pub seed: u64,
}

impl Arrival {
    /// Whether another node has handed it on, rather than steered it.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    pub const fn was_handed_on(self) -> bool {
        self.from_peer && self.ttl <= FIRST_TTL
    }

    /// The TTL with which to hand it on; nothing if it stays here.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn ttl_after(self) -> Option<u8> {
        if self.was_handed_on() {
            if self.first_here || self.ttl <= LAST_TTL {
                return None;
            }
            return Some(self.ttl - 1);
        }
        if self.ttl > FIRST_TTL {
            Some(FIRST_TTL)
        } else if self.ttl > 1 {
            Some(self.ttl - 1)
        } else {
            None
        }
    }

    /// Whether it may go to the node with this seed.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn may_go_to(self, seed: u64) -> bool {
        if self.first_here {
            seed != self.seed
        } else {
            seed > self.seed
        }
    }

    /// Whether it is dropped rather than delivered when there is nobody to hand it on to: the tables are changing.
    /// A node that was sent it as if it were first, and does not think so, will know better when the client tries
    /// again; a node that thinks it is first, and to which it was handed on, will be sent it as the first. If they
    /// delivered it, the reset that answers would end a flow that lives elsewhere.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn waits(self) -> bool {
        self.from_peer && self.first_here == self.was_handed_on()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::vec::Vec;

    /// A small generator, so that tables disagree in every way.
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, below: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % below
        }
    }

    /// Each node has any opinion of who is first and who holds; the frame still stops.
    #[test]
    fn with_tables_that_disagree_a_frame_is_handed_on_four_times_at_most_and_by_no_node_twice() {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        let mut longest = 0;
        for _ in 0..100_000 {
            let nodes = 2 + dice.roll(14);
            let opinions: Vec<(u64, Vec<u64>)> = (0..nodes)
                .map(|_| {
                    let holders = (0..dice.roll(9)).map(|_| dice.roll(nodes)).collect();
                    (dice.roll(nodes), holders)
                })
                .collect();
            let mut ttl = u8::try_from(1 + dice.roll(255)).unwrap();
            // A client's frame, or one that a leader steered.
            let mut from = (dice.roll(2) == 0).then(|| dice.roll(nodes));
            let mut at = dice.roll(nodes);
            let mut handed_by = Vec::new();
            loop {
                let (first, holders) = &opinions[usize::try_from(at).unwrap()];
                let arrival = Arrival {
                    ttl,
                    from_peer: from.is_some(),
                    first_here: *first == at,
                    seed: at,
                };
                let Some(after) = arrival.ttl_after() else {
                    break;
                };
                let next = holders
                    .iter()
                    .filter(|it| Some(**it) != from && **it != at && arrival.may_go_to(**it))
                    .min();
                let Some(next) = next else {
                    break;
                };
                assert!(after < ttl, "each time lowers the TTL");
                handed_by.push(at);
                (from, at, ttl) = (Some(at), *next, after);
                assert!(handed_by.len() <= MAX_HOLDERS, "{handed_by:?}");
            }
            let mut unique = handed_by.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), handed_by.len(), "{handed_by:?}");
            longest = longest.max(handed_by.len());
        }
        assert_eq!(longest, MAX_HOLDERS, "as many as are allowed do happen");
    }

    #[test]
    fn what_is_about_to_expire_stays() {
        for ttl in [0, 1] {
            for from_peer in [true, false] {
                let arrival = Arrival {
                    ttl,
                    from_peer,
                    first_here: false,
                    seed: 1,
                };
                assert_eq!(arrival.ttl_after(), None);
            }
        }
    }
}
