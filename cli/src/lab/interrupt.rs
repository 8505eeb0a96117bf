//! Ctrl-C and SIGTERM remove the lab before the process ends.

use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::print;

/// Held from a signal on, until the process has ended.
static ENDING: Mutex<()> = Mutex::new(());

/// Does this, while SIGINT, SIGTERM and SIGHUP remove everything this process has made, then end it: by the signal's exit code,
/// whatever fails here when the lab is taken away.
pub(super) fn cleaned_up(
    work: impl FnOnce() -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    clean_up_on_signals()?;
    let outcome = work();
    drop(ENDING.lock());
    outcome
}

fn clean_up_on_signals() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the signal handler")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let code = runtime.block_on(async {
                let mut interrupt = signal(SignalKind::interrupt())?;
                let mut terminate = signal(SignalKind::terminate())?;
                let mut hangup = signal(SignalKind::hangup())?;
                Ok::<i32, std::io::Error>(tokio::select! {
                    _ = interrupt.recv() => 130,
                    _ = terminate.recv() => 143,
                    _ = hangup.recv() => 129,
                })
            });
            let Ok(code) = code else {
                // Without handlers a signal ends the process at once; `landfall lab down` removes the rest.
                return;
            };
            let _ending = ENDING.lock().unwrap_or_else(PoisonError::into_inner);
            print::note("\nremoving the lab");
            for error in landfall_lab::ledger::close() {
                print::note(format_args!("error: {error}"));
            }
            std::process::exit(code);
        })
        .context("starting the signal handler")?;
    Ok(())
}
