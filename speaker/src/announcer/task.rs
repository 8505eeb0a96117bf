//! The task behind the [`Handle`](super::Handle).

use tokio::sync::mpsc;

use super::handle::Command;
use super::metrics::Metrics;
use super::{AnnouncerEvent, Config};

pub(super) struct Task {
    pub(super) config: Config,
    pub(super) metrics: Metrics,
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
    pub(super) events: mpsc::Sender<AnnouncerEvent>,
}

impl Task {
    pub(super) async fn run(mut self) {
        while self.commands.recv().await.is_some() {}
    }
}
