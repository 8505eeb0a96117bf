//! The seam to the other speakers: who lives, and frames to and from them.

pub mod gossip;
pub mod twin;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use landfall_core::election::BootId;
use landfall_core::model::NodeName;

use crate::keys::Keys;

/// What membership reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipEvent {
    /// A speaker lives, in this run.
    Alive {
        /// Its node.
        node: NodeName,
        /// Its run.
        boot: BootId,
    },
    /// A speaker is dead, or has left.
    Dead {
        /// Its node.
        node: NodeName,
    },
    /// A frame arrived.
    Frame(Bytes),
}

/// Speakers that should be members: where they gossip, by name where it is known.
pub type Expected = BTreeMap<SocketAddr, Option<NodeName>>;

/// Finds the other speakers, watches them, and carries frames. Calls return at once unless they are async.
#[async_trait]
pub trait Membership: Send + Sync {
    /// Sends a frame to one speaker, or to every living one. Frames may be lost.
    fn send(&self, to: Option<&NodeName>, frame: Bytes);
    /// Replaces who should be a member; those that are absent are called again and again.
    fn expect(&self, expected: Expected);
    /// Takes over new keys.
    fn rekey(&self, keys: &Keys);
    /// Says goodbye.
    async fn leave(&self, within: Duration);
}
