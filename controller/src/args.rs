//! The controller's flags. Each is also a `LANDFALL_…` variable.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use landfall_runtime::args::KubeArgs;
use landfall_runtime::telemetry::LogArgs;

use crate::lease::state::Timing;

/// What `--help` shows after the flags.
const EXAMPLES: &str = "\
Examples:
  In a pod, with its ServiceAccount:
    landfall-controller --namespace landfall-system --identity \"$POD_NAME\"

  On a workstation, against the cluster of a kubeconfig, beside a controller of a hosted load balancer:
    landfall-controller --kubeconfig ~/.kube/config --class-less=false

  Fail over faster at the price of more Lease traffic:
    landfall-controller --lease-duration 6 --lease-renew-deadline 4 --lease-retry-period 1

Look at it:
  curl -s localhost:7960/metrics
  curl -s localhost:7960/debug/state | jq .assignments";

/// Landfall's controller: hands out virtual IPs to Services of type LoadBalancer.
#[derive(Clone, Debug, Parser)]
#[command(name = "landfall-controller", version, after_help = EXAMPLES)]
pub struct Args {
    /// How to reach the API server.
    #[command(flatten)]
    pub kube: KubeArgs,

    /// How to log.
    #[command(flatten)]
    pub log: LogArgs,

    /// The namespace of the Lease by which one of several controllers leads.
    #[arg(long, env = "LANDFALL_NAMESPACE", default_value = "landfall-system")]
    pub namespace: String,

    /// Who this process is in the Lease. No two live controllers may share it; in a pod, use the pod's name.
    /// [default: host name and process id]
    #[arg(long, env = "LANDFALL_IDENTITY")]
    pub identity: Option<String>,

    /// Whether Services without spec.loadBalancerClass are ours, besides those of class landfall.dev/l2.
    #[arg(
        long,
        env = "LANDFALL_CLASS_LESS",
        default_value_t = true,
        num_args = 0..=1,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub class_less: bool,

    /// Where /metrics, /healthz, /readyz and /debug/state are served.
    #[arg(long, env = "LANDFALL_ADMIN_ADDRESS", default_value = "127.0.0.1:7960")]
    pub admin_address: SocketAddr,

    /// For how many seconds others honour the Lease of a leader that fell silent.
    #[arg(long, env = "LANDFALL_LEASE_DURATION", default_value_t = 12, value_parser = clap::value_parser!(u64).range(2..=600))]
    pub lease_duration: u64,

    /// After how many seconds without a renewal a leader stops writing; less than the duration.
    #[arg(long, env = "LANDFALL_LEASE_RENEW_DEADLINE", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub lease_renew_deadline: u64,

    /// Every how many seconds the Lease is renewed; less than the deadline.
    #[arg(long, env = "LANDFALL_LEASE_RETRY_PERIOD", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub lease_retry_period: u64,

    /// How many writes may be in flight.
    #[arg(long, env = "LANDFALL_WRITE_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub write_concurrency: u16,
}

/// The Lease's times do not fit each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--lease-retry-period {retry} must be less than --lease-renew-deadline {deadline}, and that less than \
     --lease-duration {duration}: a leader must stop before another may start"
)]
pub struct TimingError {
    duration: u64,
    deadline: u64,
    retry: u64,
}

impl Args {
    /// The Lease's times, if they fit each other.
    pub fn timing(&self) -> Result<Timing, TimingError> {
        let (duration, deadline, retry) = (
            self.lease_duration,
            self.lease_renew_deadline,
            self.lease_retry_period,
        );
        if retry < deadline && deadline < duration {
            return Ok(Timing {
                duration: Duration::from_secs(duration),
                deadline: Duration::from_secs(deadline),
                retry: Duration::from_secs(retry),
            });
        }
        Err(TimingError {
            duration,
            deadline,
            retry,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_are_well_formed_and_each_has_a_variable() {
        let command = Args::command();
        command.clone().debug_assert();
        for arg in command.get_arguments() {
            let name = arg.get_long().expect("every flag has a long name");
            let variable = arg.get_env().and_then(|variable| variable.to_str());
            let expected = format!("LANDFALL_{}", name.replace('-', "_").to_uppercase());
            assert_eq!(variable, Some(expected.as_str()), "--{name}");
        }
    }

    #[test]
    fn lease_times_must_fit() {
        let args = |text: &str| {
            let words = std::iter::once("x").chain(text.split_whitespace());
            Args::try_parse_from(words).map(|args| args.timing().is_ok())
        };
        assert!(args("").unwrap());
        assert!(!args("--lease-duration 8").unwrap());
        assert!(!args("--lease-retry-period 9").unwrap());
        assert!(args("--class-less=false").is_ok());
    }
}
