//! How a node finds the flow of a packet that it does not know.
//!
//! A packet in the middle of a TCP flow may have been steered to a node that does not know the flow: it belongs to one
//! that held its bucket before. The node it was steered to asks the others by sending it to them, one after the other:
//! who knows the flow delivers it, and who does not sends it back. Only the one that asks decides whom to ask, and
//! whether to answer for a flow that nobody knows; so it does not matter what the nodes that are asked believe.
//!
//! What keeps packets from wandering is in the packet. Its TTL (or hop limit) says how far the search is: it is cut down
//! to [`FIRST_TTL`] for the first question, and each way there or back lowers it by one, so that questions are even and
//! their returns odd. And nodes are asked in the order of their seeds, each once: the one that sends it back tells
//! which are next.
//!
//! So that no client's packet looks like a question, one whose TTL is that of a question or a return is lowered below
//! them when it is steered ([`steered`]). TTLs are never raised: what is sent on comes to its end.
//!
//! ```text
//!  TTL   255..21   20 19 .. 10 9          8 7       6 5 4 3                           2 1
//!        client's  questions and returns  client's  two questions about those, and    client's, not looked for
//!                                                   whatever a client sends so
//! ```
//! A client's packet that arrives with 3 to 6 may be lost when its flow was moved, or its flow, if it is gone, not reset:
//! lowered, it might not come to a pod behind another node.

use crate::flow::MAX_ASKED;

/// The TTL of the first question.
pub const FIRST_TTL: u8 = LAST_TTL + 2 * (MAX_ASKED - 1);
/// The TTL of the last question.
pub const LAST_TTL: u8 = 10;
/// The TTL that a client's packet is lowered to, so that it looks like no question; two can be asked about it.
pub const LOW_TTL: u8 = 8;
/// The TTLs of the first and the last question about a packet whose TTL is [`LOW_TTL`] or little less.
pub const LOW_FIRST_TTL: u8 = 6;
/// As above. What is left is enough for the way to a pod of the node, also after the return.
pub const LOW_LAST_TTL: u8 = 4;
/// The TTL with which a client's packet goes to the node that serves it: as it is, unless it would look like one of the
/// first questions or their returns there.
#[inline(always)]
#[allow(clippy::inline_always)] // The verifier sees straight code.
pub const fn steered(ttl: u8) -> u8 {
    if ttl > LOW_TTL && ttl <= FIRST_TTL {
        LOW_TTL
    } else {
        ttl
    }
}

/// Whether a packet with this TTL, from another node, is a question or its return.
#[inline(always)]
#[allow(clippy::inline_always)] // As above.
const fn is_of_a_search(ttl: u8) -> bool {
    (ttl >= LAST_TTL - 1 && ttl <= FIRST_TTL) || (ttl >= LOW_LAST_TTL - 1 && ttl <= LOW_FIRST_TTL)
}

/// A packet in the middle of a flow that this node does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Its TTL or hop limit.
    pub ttl: u8,
    /// Another node sent it.
    pub from_peer: bool,
    /// This node's table names this node first.
    pub first_here: bool,
    /// The other nodes have said which flows they hold.
    pub settled: bool,
}

impl Arrival {
    /// Whether another node asks this one whether it knows the flow.
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    pub const fn is_asked(self) -> bool {
        self.from_peer && self.ttl.is_multiple_of(2) && is_of_a_search(self.ttl)
    }

    /// Whether this node has asked the one that sent it, in vain.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn is_back(self) -> bool {
        self.from_peer && !self.ttl.is_multiple_of(2) && is_of_a_search(self.ttl)
    }

    /// The TTL with which the next is asked, or the question goes back; nothing if it goes no further.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn ttl_after(self) -> Option<u8> {
        if self.is_asked() {
            return Some(self.ttl - 1);
        }
        let ttl = if self.is_back() {
            self.ttl - 1
        } else {
            let ttl = steered(self.ttl);
            if ttl > FIRST_TTL {
                FIRST_TTL
            } else if ttl > LOW_FIRST_TTL {
                LOW_FIRST_TTL
            } else {
                ttl.saturating_sub(1) & !1
            }
        };
        if is_of_a_search(ttl) { Some(ttl) } else { None }
    }

    /// Whether the node answers for the flow if nobody else can be asked: its pod's reset tells the client that the
    /// flow is gone. Who was sent the packet and does not think that it should have been drops it: the tables are
    /// changing, and the reset would end a flow that lives elsewhere. So does who has begun anew. The client tries again
    /// until the tables agree and all has been said.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn answers(self) -> bool {
        self.settled && (self.first_here || !self.from_peer)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::collections::BTreeSet;
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

    /// Each node has any opinion of who is first and who may know the flow, and any of them knows it or nobody.
    #[test]
    fn with_tables_that_disagree_each_node_is_asked_once_and_who_is_asked_never_answers_for_another()
     {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        let (mut most, mut low) = (0, 0);
        let mut found = 0;
        for _ in 0..100_000 {
            let nodes = 2 + dice.roll(14);
            let opinions: Vec<(u64, BTreeSet<u64>)> = (0..nodes)
                .map(|_| {
                    let candidates = (0..dice.roll(9)).map(|_| dice.roll(nodes)).collect();
                    (dice.roll(nodes), candidates)
                })
                .collect();
            let knows = dice.roll(nodes + 1);
            let unsettled: BTreeSet<u64> = (0..dice.roll(3)).map(|_| dice.roll(nodes)).collect();
            let sent_with = 1 + u8::try_from(dice.roll(255)).unwrap();
            if is_of_a_search(steered(sent_with)) {
                continue;
            }
            // A client's frame, or one that a leader steered.
            let steered_by = (dice.roll(2) == 0).then(|| dice.roll(nodes));
            let (mut from, mut at) = (steered_by, dice.roll(nodes));
            let mut ttl = steered_by.map_or(sent_with, |_| steered(sent_with));
            let asks = at;
            let mut asked = Vec::new();
            let answered_by = loop {
                if at == knows {
                    break Some(at);
                }
                let (first, candidates) = &opinions[usize::try_from(at).unwrap()];
                let arrival = Arrival {
                    ttl,
                    from_peer: from.is_some(),
                    first_here: *first == at,
                    settled: !unsettled.contains(&at),
                };
                let after = arrival.ttl_after();
                let next = if arrival.is_asked() {
                    from
                } else {
                    assert_eq!(at, asks, "one node asks");
                    let above = from.filter(|_| arrival.is_back());
                    let mut open = candidates.iter().filter(|it| {
                        **it != at && Some(**it) != from && above.is_none_or(|above| **it > above)
                    });
                    open.next().copied()
                };
                let (Some(next), Some(after)) = (next, after) else {
                    break arrival.answers().then_some(at);
                };
                assert!(after < ttl, "each way lowers the TTL");
                if !arrival.is_asked() {
                    asked.push(next);
                }
                (from, at, ttl) = (Some(at), next, after);
            };
            assert!(asked.is_sorted_by(|one, next| one < next), "{asked:?}");
            if asked.contains(&knows) {
                assert_eq!(answered_by, Some(knows), "who knows it is asked last");
                found += 1;
            } else {
                assert!([Some(asks), None].contains(&answered_by), "{answered_by:?}");
            }
            let enough = match steered(sent_with) {
                ttl if ttl > FIRST_TTL => usize::from(MAX_ASKED),
                ttl if ttl > LOW_FIRST_TTL => 2,
                _ => 0,
            };
            assert!(asked.len() <= enough, "{sent_with}: {asked:?}");
            low += usize::from(enough == 2 && asked.len() == 2);
            most = most.max(asked.len());
        }
        assert_eq!(
            most,
            usize::from(MAX_ASKED),
            "as many as are allowed do happen"
        );
        assert!(found > 10_000 && low > 1_000, "{found}, {low}");
    }

    #[test]
    fn all_spreads_before_and_who_is_first_by_the_own_table_can_be_asked() {
        assert!(usize::from(MAX_ASKED) > crate::MAX_HISTORY);
    }

    #[test]
    fn no_clients_packet_looks_like_a_question() {
        for ttl in 0..=u8::MAX {
            let steered = Arrival {
                ttl: steered(ttl),
                from_peer: true,
                first_here: true,
                settled: true,
            };
            assert!(steered.ttl <= ttl, "a TTL is never raised");
            if (LOW_LAST_TTL - 1..=LOW_FIRST_TTL).contains(&ttl) {
                assert_eq!(steered.ttl, ttl);
                continue;
            }
            assert!(!steered.is_asked() && !steered.is_back(), "{ttl}");
            // Who has the client before it asks as one that was steered the packet.
            let own = Arrival {
                ttl,
                from_peer: false,
                ..steered
            };
            assert_eq!(own.ttl_after(), steered.ttl_after(), "{ttl}");
        }
    }

    #[test]
    fn what_is_about_to_expire_stays() {
        for ttl in 0..LOW_LAST_TTL {
            for from_peer in [true, false] {
                let arrival = Arrival {
                    ttl,
                    from_peer,
                    first_here: false,
                    settled: true,
                };
                assert_eq!(arrival.ttl_after(), None, "{arrival:?}");
            }
        }
    }
}
