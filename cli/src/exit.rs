//! Exit codes: what a script may rely on.

use std::process::ExitCode;

use landfall_lab::LabError;

use crate::print;

/// What `--help` says about exit codes.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  it failed; standard error says what
  2  the arguments were wrong
  3  this machine lacks something; standard error says what to install or do
  130, 143  ended by Ctrl-C or SIGTERM, everything cleaned up";

const FAILED: u8 = 1;
const LACKING: u8 = 3;

/// The exit code for an outcome, whose error is printed.
pub(crate) fn code(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    match outcome {
        Ok(code) => code,
        Err(error) => {
            print::note(format_args!("error: {}", said(&error)));
            ExitCode::from(if lacks(&error) { LACKING } else { FAILED })
        }
    }
}

/// An error and its causes; but for those that it has named itself, as those of libraries do.
fn said(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Whether the machine is at fault, not Landfall.
fn lacks(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<LabError>() {
        Some(
            LabError::NotRoot
            | LabError::MissingTool { .. }
            | LabError::MissingBinary { .. }
            | LabError::NotBuilt { .. }
            | LabError::Kernel { .. },
        ) => true,
        Some(
            LabError::Command { .. }
            | LabError::Io { .. }
            | LabError::UnreadableLedger { .. }
            | LabError::Timeout { .. }
            | LabError::Unknown { .. }
            | LabError::Closing
            | LabError::Invalid(_),
        )
        | None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::anyhow!("no such file")
            .context("reading a: no such file")
            .context("pass --file");
        assert_eq!(said(&error), "pass --file: reading a: no such file");
    }
}
