//! Landfall's controller: hands out virtual IPs and keeps the status of what holds them.
//!
//! ```text
//!   lease ──a Term──> index ── Event ──> core::ipam ── Changes ──> writer ──> API server
//!                       ^                                                        │
//!                       └───────────────── runtime::source <──── watches ────────┘
//! ```
//!
//! One process leads, by a Lease. Its index task owns the allocator and the writer; a new leader begins with
//! fresh lists. Nothing here decides: [`landfall_core::ipam`] does.
#![forbid(unsafe_code)]

pub mod args;
pub mod index;
pub mod lease;
pub mod metrics;
pub mod run;
pub mod writer;
