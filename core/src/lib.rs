//! Landfall's decisions, and nothing else: no tokio, no client, no clock.
//!
//! ```text
//!   model   what the sources say (Service, EndpointSlice, Node, pool, advertisement), projected
//!     │
//!     ├──> ipam       who holds which address                    (controller; speaker --manifests)
//!     ├──> egress     whose tenant a pod is, and what it leaves by
//!     └──> groups     which addresses move together, and where they may be announced   (speaker)
//!             └──> election   which node announces each group                          (speaker)
//!   steering   which node each flow of a Service belongs to
//!   replication   copies a gateway's bindings to its standby
//! ```
//!
//! Time and randomness are arguments, decisions are return values, and iteration order never
//! depends on a hasher's seed: two nodes with equal inputs decide alike.
#![forbid(unsafe_code)]

pub mod egress;
pub mod election;
pub mod groups;
pub mod ip;
pub mod ipam;
pub mod model;
pub mod replication;
pub mod selector;
pub mod steering;
