//! Being asked to stop.

use tokio::signal::unix::{self, SignalKind};

/// Returns at the first SIGTERM or SIGINT.
///
/// # Panics
/// When no signal handler can be installed, which the kernel allows always.
pub async fn signal() {
    let mut terminate = unix::signal(SignalKind::terminate()).expect("SIGTERM can be handled");
    let mut interrupt = unix::signal(SignalKind::interrupt()).expect("SIGINT can be handled");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
