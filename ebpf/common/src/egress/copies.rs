//! Copies of bindings: how a gateway's programs tell of changes, and what they are told of another gateway's bindings.

use super::binding::{Key, V6};

/// Something happened to a binding. Addresses are as in a [`VipKey`](crate::VipKey), in words as they lie in memory; ports
/// are in the host's order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// The pod.
    pub pod: V6,
    /// The address that it leaves by.
    pub egress: V6,
    /// The remote.
    pub remote: V6,
    /// The pod's port; of an echo request its identifier.
    pub pod_port: u16,
    /// The port that it leaves by.
    pub egress_port: u16,
    /// The remote's; of an echo request 0.
    pub remote_port: u16,
    /// The protocol's number.
    pub protocol: u8,
    /// A [`kind`].
    pub kind: u8,
}

/// What happened.
pub mod kind {
    /// The binding is there.
    pub const NEW: u8 = 1;
    /// It is gone.
    pub const CLOSED: u8 = 2;
}

/// How many bytes of events wait for user space at most: 16 384 events, each with eight bytes of the kernel's.
pub const ROOM: u32 = 1 << 20;

/// A binding that the program for copies is told, and what it has done about it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Named<A> {
    /// Its key *in*.
    pub inward: Key<A>,
    /// The pod.
    pub pod: A,
    /// The pod's port, in the host's order.
    pub pod_port: u16,
    /// Zero.
    pub zero: u16,
    /// The program's answer: an [`outcome`].
    pub outcome: u32,
}

/// What the program for copies has done.
pub mod outcome {
    /// It was not asked.
    pub const NONE: u32 = 0;
    /// It is as was asked for.
    pub const DONE: u32 = 1;
    /// Not yet: the pod, its policy or the way to the remote is not known here, or somebody was in the middle of it.
    pub const LATER: u32 = 2;
    /// Not yet: the maps have no room.
    pub const NO_ROOM: u32 = 3;
    /// No: this node leads the address, and has another flow there.
    pub const REFUSED: u32 = 4;
}

/// What the program for copies is told: [`Named`] ones, behind an Ethernet header that means nothing.
pub mod message {
    /// Where it says how many there are (one byte), and of which family (one byte: 4 or 6, and [`REMOVE`]).
    pub const HEAD: usize = 14;
    /// Where they begin.
    pub const NAMED: usize = 16;
    /// How many there are at most: the kernel takes messages of a page, less what a packet needs besides.
    pub const MOST: usize = 48;
    /// In the byte of the family: they are not to be there.
    pub const REMOVE: u8 = 0x80;
}

#[cfg(test)]
mod tests {
    use super::super::binding::V4;
    use super::*;

    #[test]
    fn types_have_no_padding() {
        let sizes = [
            size_of::<Event>(),
            size_of::<Named<V4>>(),
            size_of::<Named<V6>>(),
        ];
        assert_eq!(sizes, [3 * 16 + 8, 16 + 4 + 8, 40 + 16 + 8]);
    }

    #[test]
    fn a_message_fits_a_page() {
        assert!(message::NAMED + message::MOST * size_of::<Named<V6>>() < 3_400);
    }
}
