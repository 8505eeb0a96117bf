//! Flags that both daemons have.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// How to reach the API server.
#[derive(Clone, Debug, Default, Args)]
pub struct KubeArgs {
    /// A kubeconfig file. Without it: the pod's `ServiceAccount`.
    #[arg(long, env = "LANDFALL_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
}

impl KubeArgs {
    /// A client. No connection is made yet, so that this works while the API server is away.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(path)
                    .with_context(|| format!("--kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                    .await
                    .with_context(|| format!("--kubeconfig {}", path.display()))?
            }
            None => Config::incluster()
                .context("not running in a pod with a ServiceAccount: pass --kubeconfig FILE")?,
        };
        // A dead API server must be noticed, not waited for.
        config.connect_timeout = Some(Duration::from_secs(5));
        config.read_timeout = Some(Duration::from_secs(75));
        config.write_timeout = Some(Duration::from_secs(10));
        Client::try_from(config).context("cannot make a client of this configuration")
    }
}
