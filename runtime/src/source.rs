//! Where objects come from: the Kubernetes API or a directory of manifests. Both speak [`Event`].

mod kubernetes;
mod manifests;

pub use kubernetes::{Ignored, Options, kubernetes};
pub use manifests::{Problem, Problems, manifests};

use landfall_core::model::{Event, Kind};
use tokio::sync::mpsc;

/// A running source. Dropping it ends its tasks.
pub struct Source {
    /// What it says, in order, one channel for all kinds.
    pub events: mpsc::Receiver<Event>,
    /// The kinds it delivers; a reader is synced once it has seen [`Event::Synced`] of each.
    pub kinds: Vec<Kind>,
    /// Its tasks, ended on drop.
    pub tasks: tokio::task::JoinSet<()>,
}
