//! The `landfall` command line: arguments, dispatch and exit codes. Each subcommand is a module.
#![forbid(unsafe_code)]
#![deny(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "they panic where nobody listens; see `print`"
)]

mod ask;
mod doctor;
mod egress;
mod exec;
mod exit;
mod lab;
mod print;
mod table;

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
    /// What on a node keeps Landfall from working, or will: its kernel, others' rules and programs, peers that are not heard.
    Doctor(doctor::Args),
    /// Pods that leave the cluster by addresses of their own: who, by what, why, and the way out.
    Egress(egress::Args),
    /// A LAN in network namespaces, with real speakers, to watch fail-overs on.
    Lab(lab::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Doctor(args) => doctor::run(args),
        Command::Egress(args) => egress::run(args),
        Command::Lab(args) => lab::run(args),
    };
    exit::code(outcome)
}
