//! Network namespaces that clean up after themselves, for the lab and for every test that sends packets.
#![deny(unsafe_code)]

pub mod error;
mod frame;
pub mod ledger;
pub mod netns;
mod ping;
mod sys;
pub mod tool;

pub use error::{LabError, Result};
pub use frame::Mac;
pub use netns::{LabId, Netns};
pub use ping::ping;
