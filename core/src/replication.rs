//! Copies a gateway's bindings to the node that would take over: what is said, and when, without any I/O.
//!
//! ```text
//!  gateway   new, closed ──> Writer (numbers, keeps the latest) ──Changes──> Reader ──> insert, remove   standby
//!            all it holds ──────────────────────Held─────────────────────────┘
//! ```
//! A binding is a mapping and nothing more: the connection's state is at its ends. Changes are numbered without gaps in
//! the gateway's epoch. A standby that is new, or has missed some, is given all bindings while changes go on; whatever
//! it had besides is removed when it has all. Both kinds of messages may say the same twice: the result is one.

mod reader;
mod wire;
mod writer;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

pub use reader::{Reader, Refusal, Step};
pub use wire::{MAX_MESSAGE, Message, MessageError};
pub use writer::Writer;

/// One egress NAT entry. All of its addresses are of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Binding {
    /// The protocol's number (IANA): TCP, UDP, ICMP, `ICMPv6`.
    pub protocol: u8,
    /// The pod's address and port; of an echo request the port is its identifier.
    pub pod: SocketAddr,
    /// What the remote sees in place of it.
    pub egress: SocketAddr,
    /// The remote; of an echo request the port is 0.
    pub remote: SocketAddr,
}

impl Binding {
    /// Whether its addresses are of one family.
    pub fn is_sound(&self) -> bool {
        let v4 = [self.pod, self.egress, self.remote].map(|address| address.is_ipv4());
        v4 == [true; 3] || v4 == [false; 3]
    }

    /// The address that it leaves by.
    pub fn egress_ip(&self) -> IpAddr {
        self.egress.ip()
    }
}

/// What happened to a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// It is there.
    New(Binding),
    /// It is gone.
    Closed(Binding),
}

/// How far a gateway's changes are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// The gateway's epoch: that of its claim.
    pub epoch: u64,
    /// All changes before this number.
    pub next: u64,
}
