//! Keeps the CNI plugin in its place on the node, also when the CNI writes its list anew.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use landfall_cni::chain::{Chain, ChainError, Done, TYPE};
use serde_json::Value;
use tokio::task::spawn_blocking;
use tokio::time::interval;
use tokio_util::task::AbortOnDropHandle;

/// How often it is looked whether it is still there. Pods that are made meanwhile wait for the API server.
const EVERY: Duration = Duration::from_secs(1);

/// Keeps the plugin there until it is dropped; the plugin stays.
#[derive(Debug)]
pub struct Keeper {
    _task: AbortOnDropHandle<()>,
}

/// The plugin's program: beside this one.
///
/// # Errors
///
/// It is not known where this program is.
pub fn program() -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(TYPE))
}

/// Keeps a plugin in its place.
pub fn keep(chain: Chain, program: PathBuf, plugin: Value) -> Keeper {
    Keeper {
        _task: AbortOnDropHandle::new(tokio::spawn(run(chain, program, plugin))),
    }
}

async fn run(chain: Chain, program: PathBuf, plugin: Value) {
    let mut ticks = interval(EVERY);
    let mut complaint = None;
    loop {
        ticks.tick().await;
        let (chain, program, plugin) = (chain.clone(), program.clone(), plugin.clone());
        match spawn_blocking(move || chain.ensure(&program, &plugin)).await {
            Ok(Ok(done)) => {
                complaint = None;
                tell(&done);
            }
            // The next look finds it written.
            Ok(Err(ChainError::Changing(_))) => {}
            Ok(Err(error)) => {
                let error = error.to_string();
                if complaint.as_ref() != Some(&error) {
                    tracing::warn!("the CNI plugin is not in its place: {error}");
                    complaint = Some(error);
                }
            }
            Err(error) => tracing::error!(%error, "the CNI plugin cannot be looked after"),
        }
    }
}

fn tell(done: &Done) {
    if done.program {
        tracing::info!("the CNI plugin's program was written");
    }
    for list in &done.lists {
        tracing::info!(list = %list.display(), "the CNI plugin was chained into the list");
    }
}
