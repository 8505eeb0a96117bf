//! Which node announces each group: a pure function of eligible nodes, weights and claims.
//!
//! ```text
//!  liveness, hellos, frames, groups ──> Elector ──tick──> changes (lead, quit, re-announce) + frames to gossip
//!                                         │
//!                                         ├─ gossip       what each node says of itself, replicated by deltas
//!                                         ├─ eligibility  who could announce, and why not
//!                                         └─ decide       who should, of those
//! ```
//!
//! Three facts are kept apart: a node is *alive* (gossip's failure detector, or a hello of its speaker heard on
//! the LAN), its *speaker is there*, and it *hears the segment* (hellos, both ways). Time is an argument
//! everywhere; wall-clock time is carried for display only.

mod decide;
mod elector;
mod eligibility;
mod gossip;
mod peer;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod wire;

pub use decide::{Candidate, HASH, rank, score};
pub use elector::{Change, Config, Elector, Leadership, Lost, Outgoing, PeerView, Tick, View};
pub use eligibility::{Ineligible, InterfaceChoice, Verdict};
pub use peer::{
    BootId, Capabilities, Claim, ClaimMode, GroupRegister, HELD_PAGE, HeldPort, InterfaceFact,
    MAX_HINDRANCE, NodeRegister, PodAddresses, policy_id, service_id,
};
pub use wire::{Frame, FrameError, MAX_FRAME};
