//! Whom a command asks, how it is told to print, and how it ends.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::ValueEnum;
use kube::config::KubeConfigOptions;
use kube::{Client, Config};
use landfall_runtime::{args, control};

/// How to reach the API server.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ApiArgs {
    /// A kubeconfig file. Without it: KUBECONFIG, ~/.kube/config, or the pod's `ServiceAccount`.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

impl ApiArgs {
    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        let config = match &self.kubeconfig {
            Some(path) => {
                let read = args::read(path)?;
                Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                    .await
                    .with_context(|| format!("--kubeconfig {}", path.display()))?
            }
            None => Config::infer().await.context(
                "no kubeconfig, and not in a pod with a ServiceAccount: pass --kubeconfig FILE",
            )?,
        };
        let server = config.cluster_url.clone();
        let client = Client::try_from(config)?;
        // Whatever it answers: the command's own questions are to come.
        if let Err(error @ kube::Error::Service(_)) = client.apiserver_version().await {
            let problem = format!(
                "the API server at {server} does not answer: is it the right one (--kubeconfig, KUBECONFIG)?"
            );
            return Err(anyhow::Error::new(error).context(problem));
        }
        Ok(client)
    }

    /// The arguments by which kubectl finds the same.
    pub(crate) fn for_kubectl(&self) -> Vec<String> {
        self.kubeconfig
            .iter()
            .map(|path| format!("--kubeconfig={}", path.display()))
            .collect()
    }
}

/// Which speaker to ask.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SpeakerArgs {
    /// Ask the speaker of this node, through `kubectl exec` into its pod.
    #[arg(long, conflicts_with = "socket")]
    pub(crate) node: Option<String>,
    /// Ask the speaker that listens here.
    #[arg(
        long,
        env = "LANDFALL_CONTROL_SOCKET",
        value_name = "FILE",
        default_value = control::SOCKET
    )]
    pub(crate) socket: PathBuf,
    /// The namespace of the speakers' pods, with --node.
    #[arg(long, default_value = "landfall-system")]
    pub(crate) namespace: String,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// One JSON object.
    Json,
}

/// What was found is nothing, or not as it should be.
const FOUND: u8 = 1;

/// Waits for a command's end: the exit code says whether all is as it should be.
pub(crate) fn wait(
    command: impl Future<Output = anyhow::Result<bool>>,
) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(if runtime.block_on(command)? {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FOUND)
    })
}
