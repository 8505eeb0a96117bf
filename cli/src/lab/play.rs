//! `landfall lab status`, `exec`, `fault` and `down`: playing with the lab that is up.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Subcommand;
use landfall_lab::ledger::{self, ProcessId, STATE_DIR};
use landfall_lab::{Fault as NodeFault, Netns};

use super::Format;
use super::control::{self, Request, Response, Status};
use super::output::{columns, counts, pairs};
use crate::print;

/// What can happen to the lab.
#[derive(Debug, Subcommand)]
pub(super) enum Fault {
    /// Cut a node's power: its links are dead, its processes gone.
    PowerOff {
        /// The node.
        node: String,
    },
    /// Set a node's eth0 down.
    UplinkDown {
        /// The node.
        node: String,
    },
    /// Pull the cable of a node's eth0.
    CarrierLost {
        /// The node.
        node: String,
    },
    /// Move the switch's port of a node's eth0 to another VLAN.
    OtherVlan {
        /// The node.
        node: String,
    },
    /// Cut the management network, of one node or of all.
    ManagementDown {
        /// The node; all when left out.
        node: Option<String>,
    },
    /// Stop a node's processes (SIGSTOP).
    Freeze {
        /// The node.
        node: String,
    },
    /// Kill a node's speaker (SIGKILL).
    Kill {
        /// The node.
        node: String,
    },
    /// Ask a node's speaker to end (SIGTERM).
    Drain {
        /// The node.
        node: String,
    },
    /// Let nothing pass between two groups of nodes; clients stay with the first.
    Partition {
        /// The first group: node1,node2.
        #[arg(value_delimiter = ',')]
        first: Vec<String>,
        /// The second group.
        #[arg(long, value_delimiter = ',', required = true)]
        from: Vec<String>,
    },
    /// Lose frames from one host to another, in this direction only.
    Loss {
        /// The sender: a node, client, observer or router.
        from: String,
        /// The receiver.
        to: String,
        /// How many of a hundred.
        #[arg(value_parser = clap::value_parser!(u8).range(1..=100))]
        percent: u8,
    },
    /// Mend everything, and start again what a fault has ended.
    Heal,
}

impl From<Fault> for Request {
    fn from(fault: Fault) -> Self {
        let (node, fault) = match fault {
            Fault::PowerOff { node } => (node, NodeFault::PowerOff),
            Fault::UplinkDown { node } => (node, NodeFault::UplinkDown),
            Fault::CarrierLost { node } => (node, NodeFault::CarrierLost),
            Fault::OtherVlan { node } => (node, NodeFault::OtherVlan),
            Fault::ManagementDown { node: Some(node) } => (node, NodeFault::ManagementDown),
            Fault::ManagementDown { node: None } => return Self::ManagementNetworkDown,
            Fault::Freeze { node } => (node, NodeFault::Freeze),
            Fault::Kill { node } => (node, NodeFault::Kill),
            Fault::Drain { node } => (node, NodeFault::Drain),
            Fault::Partition { first, from } => {
                return Self::Partition {
                    first,
                    second: from,
                };
            }
            Fault::Loss { from, to, percent } => return Self::Loss { from, to, percent },
            Fault::Heal => return Self::Heal,
        };
        Self::Fault { node, fault }
    }
}

/// Lets something happen.
pub(super) fn fault(fault: Fault) -> anyhow::Result<ExitCode> {
    control::demand(&fault.into())?;
    Ok(ExitCode::SUCCESS)
}

fn current() -> anyhow::Result<Status> {
    match control::demand(&Request::Status)? {
        Response::Status(status) => Ok(status),
        Response::Done | Response::Failed(_) => {
            bail!("the process that holds the lab is of another version")
        }
    }
}

/// Shows what there is.
pub(super) fn status(format: Format) -> anyhow::Result<ExitCode> {
    let status = current()?;
    if format == Format::Json {
        print::result(serde_json::to_string_pretty(&status)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let leaders = columns(
        &["VIP", "answered by, in 300 ms"],
        status
            .vips
            .iter()
            .map(|(vip, answers)| vec![vip.clone(), counts(answers)]),
    );
    let nodes = columns(
        &["node", "addresses", "speaker", "pods"],
        status.nodes.iter().map(|node| {
            let pods: Vec<String> = node
                .pods
                .iter()
                .map(|(pod, addresses)| format!("{pod} {}", addresses.join(" ")))
                .collect();
            vec![
                node.name.clone(),
                node.addresses.join(" "),
                node.pid
                    .map_or_else(|| "not running".to_owned(), |pid| format!("pid {pid}")),
                pods.join("\n"),
            ]
        }),
    );
    let places = pairs(&[
        ("namespaces", format!("lf-{}-…", status.id)),
        ("manifests", status.manifests.display().to_string()),
        ("logs", status.logs.display().to_string()),
        ("hosts", status.hosts.join(" ")),
    ]);
    print::result(format_args!("{leaders}\n{nodes}\n{places}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs a command on a host; its exit code is ours.
pub(super) fn exec(host: &str, command: &[String]) -> anyhow::Result<ExitCode> {
    let status = current()?;
    if !status.hosts.iter().any(|known| known == host) {
        bail!(
            "no host {host:?} in this lab; there are: {}",
            status.hosts.join(", ")
        );
    }
    let netns = Netns::existing(&format!("lf-{}-{host}", status.id))?;
    let (program, args) = command.split_first().context("no command")?;
    let ended = netns
        .command(program)
        .args(args)
        .status()
        .with_context(|| format!("running {program}"))?;
    Ok(ended
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Removes the lab that is up, and what killed labs left behind.
pub(super) fn down() -> anyhow::Result<ExitCode> {
    landfall_lab::tool::preflight()?;
    // Without a status the process that holds the lab is stuck or gone: sweeping then does what can be done.
    if let Ok(Some(Response::Status(status))) = control::ask(&Request::Status) {
        let holder = i32::try_from(status.pid).ok().and_then(ProcessId::of);
        control::demand(&Request::Down)?;
        let begun = Instant::now();
        while holder.is_some_and(ProcessId::alive) {
            if begun.elapsed() > Duration::from_secs(30) {
                bail!("the process {} that holds the lab does not end", status.pid);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        print::result(format_args!("removed the lab lf-{}-…", status.id))?;
    }
    let swept = ledger::sweep();
    for name in swept.processes {
        print::result(format_args!("killed what was left of a lab: {name}"))?;
    }
    for name in swept.namespaces {
        print::result(format_args!("removed what was left of a lab: {name}"))?;
    }
    for pid in &swept.in_use_by {
        print::result(format_args!(
            "left alone: the lab of process {pid}, which still runs"
        ))?;
    }
    let _ = fs::remove_file(control::socket());
    let _ = fs::remove_file(control::log());
    // Stays while labs of other processes have their ledgers there.
    let _ = fs::remove_dir(STATE_DIR);
    for error in &swept.failed {
        print::note(format_args!("error: {error}"));
    }
    Ok(if swept.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
