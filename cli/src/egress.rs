//! `landfall egress`: who leaves the cluster by which address, what becomes of a packet and why, and the way out.
//!
//! `list` and `explain` read the API and compute what controller and speakers compute. The others ask one speaker over its
//! control socket: here, or, with `--node`, through `kubectl exec`, so that who may not exec into the speaker may not see
//! tenants' flows, nor take policies out of force.

mod arm;
mod bindings;
mod cluster;
mod explain;
mod list;

use std::process::ExitCode;

use clap::Subcommand;

use crate::ask;

const EXAMPLES: &str = "\
Examples:
  Every policy, its gateway, how many pods and ports, and whether it is in force:
    landfall egress list

  What becomes of mail that a pod sends, and why:
    landfall egress explain --pod tenant-a/postfix-0 --to 198.51.100.7:25

  The flows of a pod, at the node that is its gateway (see `list`); and which pods use most there:
    landfall egress bindings --node node2 --pod tenant-a/postfix-0
    landfall egress bindings --node node2 --by-pod

  The same without a kubeconfig, in the speaker's own pod:
    kubectl exec -n landfall-system ds/landfall-speaker -- landfall egress bindings

  The way out when Landfall itself is what keeps a node's pods from the outside, and the way back:
    landfall egress disarm --node node2
    landfall egress arm --node node2

Exit codes:
  0  all is well
  1  there is something to look at (a policy not in force, a packet dropped, nothing found), or it failed
  2  the arguments were wrong";

/// The arguments of `landfall egress`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The policies: addresses, gateway, standby, pods, ports in use and condition. Exit code 1 if one is not in force.
    List(list::Args),
    /// The flows that leave through a node, with what each leaves by. Shows tenants' remote addresses.
    Bindings(bindings::Args),
    /// What becomes of a flow that a pod begins, and why. Exit code 1 if it is dropped.
    Explain(explain::Args),
    /// Take a node's egress rules, guard and gateway away: ITS PODS THEN LEAVE BY OTHER ADDRESSES THAN THEIR POLICIES'.
    Disarm(arm::DisarmArgs),
    /// Put them back.
    Arm(arm::ArmArgs),
}

/// Runs `landfall egress`.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    ask::wait(async {
        match args.command {
            Command::List(args) => list::run(args).await,
            Command::Bindings(args) => bindings::run(args).await,
            Command::Explain(args) => explain::run(args).await,
            Command::Disarm(args) => arm::disarm(args).await,
            Command::Arm(args) => arm::arm(args).await,
        }
    })
}

/// A pod's name.
fn parse_pod(text: &str) -> Result<String, String> {
    let is_word = |word: &str| {
        let allowed =
            |it: char| it.is_ascii_lowercase() || it.is_ascii_digit() || "-.".contains(it);
        !word.is_empty() && word.chars().all(allowed)
    };
    match text.split_once('/') {
        Some((namespace, name)) if is_word(namespace) && is_word(name) => Ok(text.to_owned()),
        _ => Err("write NAMESPACE/NAME".to_owned()),
    }
}

/// A policy's name.
fn parse_policy(text: &str) -> Result<String, String> {
    parse_pod(&format!("x/{text}"))
        .map(|_| text.to_owned())
        .map_err(|_| "this is no name of an EgressPolicy".to_owned())
}
