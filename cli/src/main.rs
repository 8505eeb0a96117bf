//! The `landfall` command line: arguments, dispatch and exit codes. Each subcommand is a module.
#![forbid(unsafe_code)]
#![deny(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "they panic where nobody listens; see `print`"
)]

mod egress;
mod exit;
mod lab;
mod print;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Landfall from the command line.
#[derive(Debug, Parser)]
#[command(name = "landfall", version, after_help = exit::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Pods that leave the cluster by addresses of their own: who, by what, why, and the way out.
    Egress(egress::Args),
    /// A LAN in network namespaces, with real speakers, to watch fail-overs on.
    Lab(lab::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Egress(args) => egress::run(args),
        Command::Lab(args) => lab::run(args),
    };
    exit::code(outcome)
}
