//! Running `nft`, `ip` and their like.

use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// A command of this node that failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started.
    #[error("cannot run {tool}: {cause}; install it (Debian: nftables, iproute2, iptables)")]
    Start {
        /// Which command.
        tool: &'static str,
        /// Why.
        cause: std::io::Error,
    },
    /// It ended with an error.
    #[error("{tool} {arguments}: {message}")]
    Failed {
        /// Which command.
        tool: &'static str,
        /// How it was called.
        arguments: String,
        /// What it said.
        message: String,
    },
}

/// Runs `tool` with `input` on its standard input and returns what it printed.
pub(crate) async fn run(
    tool: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<String, ToolError> {
    let (printed, _) = run_as(tool, arguments, input).await?;
    Ok(printed)
}

/// Has `nft` load a script, and returns the id of that process: the netlink port of the changes it made.
pub(super) async fn load(script: &str) -> Result<u32, ToolError> {
    let (_, process) = run_as("nft", &["-f", "-"], script).await?;
    Ok(process)
}

async fn run_as(
    tool: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<(String, u32), ToolError> {
    let start = |cause| ToolError::Start { tool, cause };
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    let process = child.id().unwrap_or_default();
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that does not want its input says why on standard error.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(start)?;
    if output.status.success() {
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        return Ok((printed, process));
    }
    Err(ToolError::Failed {
        tool,
        arguments: arguments.join(" "),
        message: String::from_utf8_lossy(&output.stderr)
            .lines()
            .take(4)
            .collect::<Vec<_>>()
            .join(" | "),
    })
}
