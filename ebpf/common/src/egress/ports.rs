//! Which port a new flow leaves by.
//!
//! The pod's own, if it is free for that remote; else one drawn from the flow, always the same, so that a pod that comes
//! back finds the ports it has had. Where many flows go to one remote address and port, a list of the ports in use there
//! (a [`Crowd`]) tells which are free, down to the last; when none is, the pod may have one of its own that rest. Each of
//! these steps is bounded.

use crate::rendezvous::hash;

/// The first port that flows leave by (RFC 6056, 3.2).
pub const FIRST: u16 = 1024;
/// How many there are: the budget of an egress address for one remote address, port and protocol, less the Services'.
pub const BUDGET: u32 = 65_536 - FIRST as u32;

/// How many drawn ports are tried first. When all were in use, an eighth of the budget is, or more: then it is worth a
/// [`Crowd`].
pub const DRAWN: u32 = 4;
/// How many ports are tried that the crowd takes for free.
pub const LOOKED_UP: u32 = 16;
/// How many of the pod's last ports are tried.
pub const RETURNED: u32 = 16;
/// How many drawn ports are tried last.
pub const DRAWN_LAST: u32 = 32;

/// What the draws of a flow begin with.
#[inline(always)]
#[allow(clippy::inline_always)] // The verifier sees straight code.
pub const fn seed(pod: &[u8; 16], port: u16, remote: &[u8; 16], remote_port: u16) -> u64 {
    hash(pod, remote, (port as u32) << 16 | remote_port as u32)
}

/// A draw.
#[inline(always)]
#[allow(clippy::inline_always, clippy::cast_possible_truncation)] // As above; it is less than the budget.
pub const fn drawn(seed: u64, turn: u32) -> u16 {
    // The multiplier of Knuth's MMIX; the upper bits are good.
    let mixed = (seed ^ (turn as u64) << 32)
        .wrapping_add(turn as u64)
        .wrapping_mul(6_364_136_223_846_793_005);
    let mixed = mixed ^ (mixed >> 29);
    (((mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) * BUDGET as u64) >> 32) as u16 + FIRST
}

/// What is known and what can be done about the ports of an egress address for one remote address, port and protocol.
pub trait Book {
    /// Takes a port for the flow, if it is free or the pod's own and at rest. False, if it is not to be had.
    fn take(&mut self, port: u16) -> bool;
    /// There are many flows: from now on there is to be a [`Crowd`]. False, if there is no room for one.
    fn gather(&mut self) -> bool;
    /// A port that the crowd takes for free: the first from this one on. It may be wrong.
    fn free(&mut self, from: u16) -> Option<u16>;
    /// It was: the port is in use, or a Service's.
    fn is_in_use(&mut self, port: u16);
    /// A port that the pod had lately, each time another. It may be in use again.
    fn returned(&mut self) -> Option<u16>;
}

/// Takes a port. Nothing, if none is to be had.
#[inline(always)]
#[allow(clippy::inline_always)] // As above.
pub fn choose(book: &mut impl Book, own: u16, seed: u64) -> Option<u16> {
    if own >= FIRST && book.take(own) {
        return Some(own);
    }
    for turn in 0..DRAWN {
        let port = drawn(seed, turn);
        if book.take(port) {
            return Some(port);
        }
    }
    if book.gather() {
        let mut from = drawn(seed, 0);
        for _ in 0..LOOKED_UP {
            let Some(port) = book.free(from) else {
                break;
            };
            if book.take(port) {
                return Some(port);
            }
            book.is_in_use(port);
            from = port;
        }
        for _ in 0..RETURNED {
            let Some(port) = book.returned() else {
                break;
            };
            if book.take(port) {
                return Some(port);
            }
        }
    }
    for turn in DRAWN..DRAWN + DRAWN_LAST {
        let port = drawn(seed, turn);
        if book.take(port) {
            return Some(port);
        }
    }
    None
}

/// How many words a [`Crowd`] has.
pub const WORDS: usize = 1024;

/// The ports in use of a remote address and port that many flows go to, a bit each. What is said to be in use is, or
/// rests, or is a Service's (or was: until somebody has had it); what is not may be: that is found out when it is
/// tried.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crowd {
    /// The bits.
    pub used: [u64; WORDS],
}

impl Crowd {
    /// Nobody is known yet. The ports below [`FIRST`] are nobody's to take.
    pub const fn new() -> Self {
        let mut used = [0; WORDS];
        let mut at = 0;
        while at < FIRST as usize / 64 {
            used[at] = u64::MAX;
            at += 1;
        }
        Self { used }
    }

    /// In which word a port's bit is.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn place(port: u16) -> usize {
        port as usize / 64
    }

    /// Its bit.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub const fn bit(port: u16) -> u64 {
        1 << (port & 63)
    }

    /// The first free port from the word of this one on, round to the word before.
    #[inline(always)]
    #[allow(clippy::inline_always, clippy::cast_possible_truncation)] // As above; below 65 536.
    pub fn free(&self, from: u16) -> Option<u16> {
        let first = Self::place(from);
        let mut step = 0;
        while step < WORDS {
            let place = (first + step) % WORDS;
            let free = !self.used[place];
            if free != 0 {
                return Some((place * 64) as u16 + lowest(free));
            }
            step += 1;
        }
        None
    }
}

impl Default for Crowd {
    fn default() -> Self {
        Self::new()
    }
}

/// The place of the lowest bit that is set, of a word that is not 0: the BPF target has no instruction for it.
#[inline(always)]
#[allow(clippy::inline_always)] // As above.
const fn lowest(mut word: u64) -> u16 {
    let mut place = 0;
    let mut half = 32;
    while half > 0 {
        if word & ((1 << half) - 1) == 0 {
            word >>= half;
            place += half;
        }
        half /= 2;
    }
    place
}

/// How many ports of a pod are remembered.
pub const REMEMBERED: usize = 64;

/// The ports that a pod had lately for a remote address and port that many flows go to: the last first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Returned {
    /// The ports.
    pub ports: [u16; REMEMBERED],
    /// How many were put in, less those taken out.
    pub count: u32,
}

impl Returned {
    /// None yet.
    pub const NONE: Self = Self {
        ports: [0; REMEMBERED],
        count: 0,
    };

    /// Puts one in, in place of the oldest.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub fn put(&mut self, port: u16) {
        self.ports[self.count as usize % REMEMBERED] = port;
        self.count = self.count.wrapping_add(1);
    }

    /// Takes the last out.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    pub fn take(&mut self) -> Option<u16> {
        if self.count == 0 {
            return None;
        }
        self.count -= 1;
        let place = self.count as usize % REMEMBERED;
        let port = core::mem::replace(&mut self.ports[place], 0);
        if port == 0 {
            self.count = 0;
            return None;
        }
        Some(port)
    }
}

#[cfg(test)]
mod tests;
