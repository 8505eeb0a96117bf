//! `landfall lab`: see a fail-over, measure many, or keep a lab up to play with.

mod control;
mod failover;
mod hold;
mod interrupt;
mod output;
mod play;
mod show;

use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use landfall_lab::manifests::Policy;
use landfall_lab::{Fault, Topology};

const EXAMPLES: &str = "\
Examples:
  Build a LAN, elect a leader, cut its power, report what clients saw:
    landfall lab

  Ten fail-overs each way, as JSON:
    landfall lab failover --fault power-off --runs 10 -o json | jq .summary

  Keep a lab up and play with it:
    landfall lab up --nodes 4
    landfall lab status
    landfall lab exec client -- \\
      bash -c 'exec 3<>/dev/tcp/10.88.0.200/80; echo whoami >&3; head -1 <&3'
    landfall lab fault uplink-down node1
    landfall lab fault heal
    landfall lab down

The lab makes network namespaces lf-… and needs root, iproute2 and nftables. The host's own network is left alone. \
There is no kube-proxy: the speakers deliver to the pods themselves (--delivery native).";

/// The arguments of `landfall lab`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    size: Size,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure fail-overs: the leader's node meets a fault, and clients are asked what they saw.
    Failover(failover::Args),
    /// Build a lab and leave it up, in the background.
    Up(Size),
    /// Remove the lab that is up, and whatever killed labs left behind.
    Down,
    /// Who leads, what runs, and where things are.
    Status {
        /// How to print it.
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Run a command on a host of the lab that is up: node1, node1-pod0, client, remote, router, observer, switch.
    Exec {
        /// The host.
        host: String,
        /// The command.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Let something happen to the lab that is up, or heal it.
    #[command(subcommand)]
    Fault(play::Fault),
    /// Hold a lab until told to end: what `up` starts.
    #[command(hide = true)]
    Hold(Size),
}

/// How large a lab is, and how its Service is delivered.
#[derive(Clone, Copy, Debug, clap::Args)]
struct Size {
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=80))]
    nodes: u8,
    /// How many pods on each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=80))]
    pods: u8,
    /// The Service's externalTrafficPolicy. The speakers deliver both alike, to pods of each node's own.
    #[arg(long, default_value = "local")]
    policy: PolicyName,
    /// Each node has a second NIC, eth1, on a second LAN.
    #[arg(long)]
    second_nic: bool,
    /// No management network: gossip and pods use the uplink.
    #[arg(long)]
    no_management: bool,
}

impl Size {
    fn topology(self) -> Topology {
        Topology {
            nodes: self.nodes,
            pods_per_node: self.pods,
            second_nic: self.second_nic,
            management: !self.no_management,
            ..Topology::default()
        }
    }

    fn policy(self) -> Policy {
        match self.policy {
            PolicyName::Cluster => Policy::Cluster,
            PolicyName::Local => Policy::Local,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PolicyName {
    Cluster,
    Local,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// One JSON object.
    Json,
}

/// Runs `landfall lab`.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Some(Command::Status { output }) => play::status(output),
        Some(Command::Exec { host, command }) => play::exec(&host, &command),
        Some(Command::Fault(fault)) => play::fault(fault),
        Some(Command::Down) => play::down(),
        None => {
            landfall_lab::tool::preflight()?;
            interrupt::cleaned_up(|| show::run(args.size))
        }
        Some(Command::Failover(args)) => {
            landfall_lab::tool::preflight()?;
            interrupt::cleaned_up(|| failover::run(&args))
        }
        Some(Command::Up(size)) => {
            landfall_lab::tool::preflight()?;
            hold::up(size)
        }
        Some(Command::Hold(size)) => {
            landfall_lab::tool::preflight()?;
            interrupt::cleaned_up(|| hold::hold(size))
        }
    }
}

/// A fault from its name, for clap.
fn parse_fault(text: &str) -> Result<Fault, String> {
    text.parse()
}
