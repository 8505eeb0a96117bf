//! Printing to whoever may not listen any more: `landfall lab status | head -1` is no failure, and what is under way is
//! not left half done for it.

use std::fmt::Display;
use std::io::{self, Write as _};

use anyhow::Context as _;

/// A line, or several, on standard output. That its reader has gone is not an error.
pub(crate) fn result(text: impl Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("writing to standard output")
        }
        _ => Ok(()),
    }
}

/// A line on standard error. If that fails there is nowhere to say so.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
