//! Shadows: what the packet filter of a pod's node takes a VIP for that the pod reaches by its gateway.
//!
//! A packet to a VIP would be translated, or dropped, by whoever knows the VIP there: kube-proxy drops what has no endpoint on
//! the node (`externalTrafficPolicy: Local`) and what the Service's source ranges do not name, by the VIP's address. So from the
//! pod to its gateway and back the VIP has another address, which nobody knows: it lies in a block that is not used as a
//! destination, and differs from the VIP in its first four bits only.

use crate::VipKey;

/// The first four bits of an IPv4 shadow: 240.0.0.0/4 is reserved (RFC 1112, 4), and the kernel routes it.
const V4: u8 = 0xf0;
/// Of an IPv6 shadow: `4000::/4` is not assigned (RFC 3513, 4).
const V6: u8 = 0x40;
/// Where an IPv4 address lies in a key.
const MAPPED: usize = 12;

impl VipKey {
    /// Its shadow.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As in the address itself.
    #[must_use]
    pub fn shadow(mut self, v6: bool) -> Self {
        let (at, first) = if v6 { (0, V6) } else { (MAPPED, V4) };
        self.0[at] = first | (self.0[at] & 0xf);
        self
    }

    /// Whether it may be some address's shadow.
    #[inline(always)]
    #[allow(clippy::inline_always)] // As above.
    #[must_use]
    pub fn may_be_shadow(&self, v6: bool) -> bool {
        if v6 {
            self.0[0] & 0xf0 == V6
        } else {
            self.0[MAPPED] & 0xf0 == V4
        }
    }
}
