//! `landfall lab failover`: many fail-overs, measured.

use std::process::ExitCode;

use anyhow::Context;
use clap::ValueEnum;
use landfall_lab::Fault;
use landfall_lab::failover::{MEASURED, Scene};
use landfall_lab::report::Report;

use super::output::{Ticker, report_table};
use super::{Format, Size, parse_fault};
use crate::print;

/// The arguments of `landfall lab failover`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What happens to the leader's node: power-off, uplink-down, kill (SIGKILL of its speaker) or drain (SIGTERM).
    /// `landfall lab fault` knows more, to play with.
    #[arg(long, default_value = "power-off", value_parser = parse_measured)]
    fault: Fault,
    /// How many times.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: u16,
    /// How to print the result.
    #[arg(short, long, default_value = "table")]
    output: Format,
    /// The family of the VIP that is measured.
    #[arg(long, default_value = "ipv4")]
    family: FamilyName,
    #[command(flatten)]
    size: Size,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FamilyName {
    Ipv4,
    Ipv6,
}

fn parse_measured(text: &str) -> Result<Fault, String> {
    let fault = parse_fault(text)?;
    if MEASURED.contains(&fault) {
        Ok(fault)
    } else {
        Err(format!("one of {}", MEASURED.map(Fault::name).join(", ")))
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        args.size.nodes > 1,
        "a fail-over needs a second node: use --nodes 2 or more"
    );
    let ticker = Ticker::new();
    let notify = |progress| ticker.notify(progress);
    let scene = Scene::start(args.size.topology(), args.size.policy(), &notify)?;
    let vip = scene.vips()[args.family as usize];
    let mut runs = Vec::new();
    for number in 1..=args.runs {
        if number > 1 {
            ticker.step("healing");
            scene.recover()?;
        }
        ticker.line(&format!("run {number} of {}", args.runs));
        runs.push(scene.fail_over(args.fault, vip, &notify)?);
    }
    drop(scene);
    drop(ticker);
    let report = Report::new(args.fault, args.size.nodes, runs).context("no runs")?;
    match args.output {
        Format::Table => print::result(report_table(&report))?,
        Format::Json => print::result(serde_json::to_string_pretty(&report)?)?,
    }
    Ok(ExitCode::SUCCESS)
}
