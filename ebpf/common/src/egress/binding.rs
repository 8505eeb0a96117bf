//! Bindings: which address and port a pod's flow leaves by, and the life of one.
//!
//! A flow is in two maps, by what its pod sends (*out*) and by what its remote sends (*in*), with the same types. The
//! entry of the map *in* owns the port: who has its [`Claim`] has the binding. IPv4 and IPv6 have maps of their own.

/// An address as the maps of bindings have it, in network order: an IPv4 one takes four bytes.
pub trait Address: Copy + Eq + Default + core::fmt::Debug {
    /// What fills a [`Binding`] up to words of eight bytes.
    type Spare: Copy + Eq + Default + core::fmt::Debug;
    /// From an address as in a [`VipKey`](crate::VipKey), in words as they lie in memory.
    fn from_words(words: V6) -> Self;
    /// As in a [`VipKey`](crate::VipKey), likewise.
    fn words(self) -> V6;

    /// From an address as in a [`VipKey`](crate::VipKey).
    #[inline(always)]
    #[allow(clippy::inline_always)] // The verifier sees straight code.
    fn of(address: &[u8; 16]) -> Self {
        let word = |at: usize| {
            u32::from_ne_bytes([
                address[at],
                address[at + 1],
                address[at + 2],
                address[at + 3],
            ])
        };
        Self::from_words([word(0), word(4), word(8), word(12)])
    }

    /// As in a [`VipKey`](crate::VipKey).
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    fn mapped(self) -> [u8; 16] {
        let [a, b, c, d] = self.words().map(u32::to_ne_bytes);
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }
}

/// An IPv4 address.
pub type V4 = u32;
/// An IPv6 address.
pub type V6 = [u32; 4];

impl Address for V4 {
    type Spare = u32;

    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    fn from_words(words: V6) -> Self {
        words[3]
    }

    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    fn words(self) -> V6 {
        [0, 0, 0xffff_u32.to_be(), self]
    }
}

impl Address for V6 {
    type Spare = [u32; 0];

    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    fn from_words(words: V6) -> Self {
        words
    }

    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    fn words(self) -> V6 {
        self
    }
}

/// A flow: of the map *out* with the pod's address and port, of the map *in* with those it leaves by.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key<A> {
    /// The near side's address.
    pub local: A,
    /// The remote's.
    pub remote: A,
    /// The near side's port, in the host's order; of an echo request its identifier.
    pub local_port: u16,
    /// The remote's; of an echo request 0.
    pub remote_port: u16,
    /// The protocol's number (6, 17, 1 or 58).
    pub protocol: u32,
}

impl<A: Address> Key<A> {
    /// Without the near side's port: what all flows of an address to one remote address and port have in common.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub fn target(&self) -> Self {
        Self {
            local_port: 0,
            ..*self
        }
    }
}

/// What a flow is translated to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binding<A: Address> {
    /// The port that goes with the address, whose the binding is, and when its sender was last heard: a [`Claim`].
    pub claim: u64,
    /// Out: the egress address. In: the pod's.
    pub to: A,
    /// Zero.
    pub spare: A::Spare,
    /// Where its packets go: out, the number of a next hop; in, of the pod's node, 0 if that is this one.
    pub hop: u16,
    /// Out: the number of the pod's node, 0 if that is this one; in: not 0, if the remote is a VIP of this cluster.
    pub node: u16,
    /// The policy's number.
    pub policy: u16,
    /// What the pod has sent: [`heard`] flags.
    pub ours: u8,
    /// What the remote has sent.
    pub theirs: u8,
}

/// How long a tick is, as the power of two of its nanoseconds: 16.8 ms. 32 bits of them are two years.
pub const TICK: u32 = 24;

/// So many seconds in ticks.
#[allow(clippy::cast_possible_truncation)] // Below a year.
pub const fn ticks(seconds: u32) -> u32 {
    ((seconds as u64 * 1_000_000_000) >> TICK) as u32
}

/// A moment of the monotonic clock in ticks.
#[allow(clippy::cast_possible_truncation)] // They wrap.
pub const fn tick(nanoseconds: u64) -> u32 {
    (nanoseconds >> TICK) as u32
}

/// A port, whose it is, and when it was used: one word, so that it changes hands in one step, and only if nobody has used
/// it meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The port that the flow is translated to.
    pub port: u16,
    /// A [`phase`].
    pub phase: u8,
    /// The flow is counted for its pod's quota.
    pub counted: bool,
    /// Goes up each time the port changes hands.
    pub generation: u8,
    /// When the flow's sender was last heard, in [`ticks`]. Of a flow that has ended: when it did.
    pub seen: u32,
}

/// Beside the phase: that the flow is counted.
const COUNTED: u8 = 0x80;

/// Phases of a binding.
pub mod phase {
    /// A flow has it.
    pub const LIVE: u8 = 1;
    /// Its flow has ended. What is late is still translated, and the pod may have it again; another pod after its rest.
    pub const CLOSED: u8 = 2;
    /// It is changing hands.
    pub const BUSY: u8 = 3;
}

impl Claim {
    /// Of a new binding.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn new(port: u16, now: u32) -> Self {
        Self {
            port,
            phase: phase::LIVE,
            counted: false,
            generation: 0,
            seen: now,
        }
    }

    /// The same of a flow that is counted, or is not.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub const fn with_count(self, counted: bool) -> Self {
        Self { counted, ..self }
    }

    /// From its word. The upper half of that is the time.
    #[inline(always)]
    #[allow(clippy::inline_always, clippy::cast_possible_truncation)] // As above; its parts.
    pub const fn read(word: u64) -> Self {
        Self {
            port: word as u16,
            phase: (word >> 16) as u8 & !COUNTED,
            counted: (word >> 16) as u8 & COUNTED != 0,
            generation: (word >> 24) as u8,
            seen: (word >> 32) as u32,
        }
    }

    /// As a word.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn word(self) -> u64 {
        self.port as u64
            | ((self.phase | if self.counted { COUNTED } else { 0 }) as u64) << 16
            | (self.generation as u64) << 24
            | (self.seen as u64) << 32
    }

    /// The same in another phase.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub const fn turned(self, phase: u8) -> Self {
        Self { phase, ..self }
    }

    /// The next owner's.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub const fn handed(self, port: u16, now: u32) -> Self {
        Self {
            port,
            phase: phase::LIVE,
            counted: false,
            generation: self.generation.wrapping_add(1),
            seen: now,
        }
    }
}

/// What was heard of one side of a flow.
pub mod heard {
    /// TCP's FIN.
    pub const FIN: u8 = 1;
    /// TCP's RST, and nothing after it.
    pub const RST: u8 = 4;
    /// Of the remote: anything. Of the pod: anything after that.
    pub const OPEN: u8 = 16;
}

/// TCP flags (RFC 9293, 3.1).
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Both sides of a TCP flow, as far as its binding goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sides {
    /// The pod's.
    pub ours: u8,
    /// The remote's.
    pub theirs: u8,
}

impl Sides {
    /// After a segment of the pod's. A SYN begins the flow anew, on the same port. Who goes on has not taken a RST for
    /// valid (RFC 5961), and it counts no more.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub const fn after_ours(self, tcp: u8) -> Self {
        let Self { mut ours, theirs } = self;
        if tcp & (SYN | ACK) == SYN {
            return Self {
                ours: 0,
                theirs: theirs & heard::OPEN,
            };
        }
        if tcp & RST != 0 {
            return Self {
                ours: ours | heard::RST,
                theirs,
            };
        }
        ours &= !heard::RST;
        if theirs & heard::OPEN != 0 && tcp & SYN == 0 {
            ours |= heard::OPEN;
        }
        if tcp & FIN != 0 {
            ours |= heard::FIN;
        }
        Self {
            ours,
            theirs: theirs & !heard::RST,
        }
    }

    /// After a segment of the remote's.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub const fn after_theirs(self, tcp: u8) -> Self {
        let Self { ours, mut theirs } = self;
        theirs |= heard::OPEN;
        if tcp & RST != 0 {
            theirs |= heard::RST;
        } else {
            theirs &= !heard::RST;
        }
        if tcp & FIN != 0 {
            theirs |= heard::FIN;
        }
        Self { ours, theirs }
    }

    /// Both have spoken and neither has ended: a segment without SYN, FIN and RST changes nothing.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn is_settled(self) -> bool {
        self.ours == heard::OPEN && self.theirs == heard::OPEN
    }

    /// Reset by either, and nothing was said since.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn is_reset(self) -> bool {
        (self.ours | self.theirs) & heard::RST != 0
    }

    /// Both have ended.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn is_closed(self) -> bool {
        self.ours & self.theirs & heard::FIN != 0
    }
}

/// Whether a segment may change anything but the time.
#[inline(always)]
#[allow(clippy::inline_always)] // As above.
pub const fn is_control(tcp: u8) -> bool {
    tcp & (SYN | FIN | RST) != 0
}

/// For how long what is not heard stays, in ticks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// An established TCP flow (RFC 5382, REQ-5: at least 2 h 4 min).
    pub established: u32,
    /// A TCP flow of which another gateway's word is all that is known: it may have only begun, or half ended (the same
    /// RFC's least).
    pub copied: u32,
    /// A TCP flow that begins or ends.
    pub transitory: u32,
    /// One that was reset: never at once, since the reset may be another's.
    pub reset: u32,
    /// UDP (RFC 4787, REQ-5).
    pub datagram: u32,
    /// Echo (RFC 5508, REQ-1: at least 60 s).
    pub echo: u32,
    /// How long a port rests before another pod may have it for the same remote.
    pub rest: u32,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            established: ticks(24 * 3600),
            copied: ticks(7_440),
            transitory: ticks(240),
            reset: ticks(10),
            datagram: ticks(300),
            echo: ticks(60),
            rest: ticks(60),
        }
    }
}

impl Times {
    /// Those of flows that nobody has heard since this node is their gateway.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub const fn of_unheard(self) -> Self {
        let established = if self.copied < self.established {
            self.copied
        } else {
            self.established
        };
        Self {
            established,
            ..self
        }
    }

    /// For how long a binding in a phase stays when it is not heard.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn limit(&self, protocol: u32, phase: u8, sides: Sides) -> u32 {
        if phase != phase::LIVE {
            return self.rest;
        }
        match protocol {
            6 if sides.is_reset() => self.reset,
            6 if sides.is_settled() => self.established,
            6 => self.transitory,
            17 => self.datagram,
            _ => self.echo,
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn a_claim_is_a_word() {
        let claim = Claim {
            port: 0xabcd,
            phase: phase::CLOSED,
            counted: false,
            generation: 255,
            seen: 0x1234_5678,
        };
        assert_eq!(Claim::read(claim.word()), claim);
        let counted = claim.with_count(true);
        assert_eq!(Claim::read(counted.word()), counted);
        assert_ne!(counted.word(), claim.word());
        assert_eq!(counted.handed(7, 9), claim.handed(7, 9));
        let next = claim.handed(7, 9);
        assert_eq!(next, Claim::new(7, 9));
    }

    #[test]
    fn addresses_are_what_they_were() {
        let v4 = crate::VipKey::v4([192, 0, 2, 7]).0;
        assert_eq!(V4::of(&v4).mapped(), v4);
        let v6 = core::array::from_fn(|at| u8::try_from(at).expect("few"));
        assert_eq!(V6::of(&v6).mapped(), v6);
    }

    /// What is replicated is 24 and 48 bytes with the key, but for addresses that are known otherwise; a million IPv4
    /// entries of a map are 105 MB: 48 of the kernel's, the key, the value, and a bucket of 16.
    #[test]
    fn bindings_are_small() {
        let sizes = [
            (size_of::<Key<V4>>(), size_of::<Binding<V4>>()),
            (size_of::<Key<V6>>(), size_of::<Binding<V6>>()),
        ];
        assert_eq!(sizes, [(16, 24), (40, 32)]);
        assert!(48 + sizes[0].0 + sizes[0].1 + 16 <= 105);
    }

    fn told(segments: &[(bool, u8)]) -> Sides {
        segments.iter().fold(Sides::default(), |sides, segment| {
            if segment.0 {
                sides.after_ours(segment.1)
            } else {
                sides.after_theirs(segment.1)
            }
        })
    }

    const HANDSHAKE: [(bool, u8); 3] = [(true, SYN), (false, SYN | ACK), (true, ACK)];

    #[test]
    fn a_flow_opens_when_both_have_spoken() {
        let times = Times::default();
        let limit = |sides| times.limit(6, phase::LIVE, sides);
        assert_eq!(limit(told(&HANDSHAKE[..1])), ticks(240));
        assert_eq!(limit(told(&HANDSHAKE[..2])), ticks(240));
        assert_eq!(limit(told(&HANDSHAKE)), ticks(24 * 3600));
        // Nobody has answered: what the pod says besides opens nothing.
        assert_eq!(limit(told(&[(true, SYN), (true, ACK)])), ticks(240));
    }

    #[test]
    fn it_closes_when_both_have() {
        let half = told(&[&HANDSHAKE[..], &[(true, FIN | ACK), (false, ACK)]].concat());
        assert!(!half.is_closed() && !half.is_settled());
        assert_eq!(Times::default().limit(6, phase::LIVE, half), ticks(240));
        assert!(half.after_theirs(FIN | ACK).is_closed());
        assert!(!half.after_theirs(FIN | ACK).after_ours(SYN).is_closed());
    }

    #[test]
    fn a_reset_ends_it_later_and_not_if_they_go_on() {
        for (ours, go_on) in [
            (true, (true, ACK)),
            (false, (true, ACK)),
            (false, (false, ACK)),
        ] {
            let reset = told(&[&HANDSHAKE[..], &[(ours, RST)]].concat());
            let limit = Times::default().limit(6, phase::LIVE, reset);
            assert_eq!(limit, ticks(10));
            let after = if go_on.0 {
                reset.after_ours(go_on.1)
            } else {
                reset.after_theirs(go_on.1)
            };
            assert!(after.is_settled(), "{reset:?} {after:?}");
        }
        // In the middle of a handshake: the second SYN counts.
        let reset = told(&[(true, SYN), (false, ACK), (true, RST), (true, SYN)]);
        assert_eq!(reset.ours & heard::RST, 0);
        assert!(reset.after_theirs(SYN | ACK).after_ours(ACK).is_settled());
    }

    #[test]
    fn who_is_not_heard_is_waited_for_less() {
        let (times, open) = (Times::default(), told(&HANDSHAKE));
        let limit = |times: Times| times.limit(6, phase::LIVE, open);
        assert_eq!(limit(times.of_unheard()), ticks(2 * 3600 + 4 * 60));
        let established = ticks(60);
        let short = Times {
            established,
            ..times
        };
        assert_eq!(limit(short.of_unheard()), established);
    }

    #[test]
    fn times_are_ticks() {
        assert_eq!(tick(60_000_000_000), ticks(60));
        assert!(ticks(24 * 3600) > 5_000_000);
    }
}
