//! Flags that both daemons have.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

/// Reads a kubeconfig file.
///
/// # Errors
/// If it cannot be read, or is none. The error says where in it, and nothing of what is in it: that may be a token.
pub fn read(path: &Path) -> anyhow::Result<Kubeconfig> {
    let error = match Kubeconfig::read_from(path) {
        Ok(kubeconfig) => return Ok(kubeconfig),
        Err(error @ KubeconfigError::ReadConfig(..)) => anyhow::Error::new(error),
        Err(error) => {
            let said = error.to_string();
            let place = said.split_once("line ").and_then(|(_, place)| {
                let end = place.find(|it: char| !it.is_ascii_digit() && !" column".contains(it))?;
                Some(format!(", from line {} on", place[..end].trim()))
            });
            anyhow::anyhow!("it is no kubeconfig{}", place.unwrap_or_default())
        }
    };
    Err(error.context(format!("--kubeconfig {}", path.display())))
}

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
                let kubeconfig = read(path)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_broken_kubeconfig_is_not_told() {
        let directory = tempfile::tempdir().expect("there is room");
        let path = directory.path().join("kubeconfig");
        let broken = "apiVersion: v1\nusers: secret\n";
        std::fs::write(&path, broken).expect("there is room");
        let said = format!("{:#}", read(&path).expect_err("it is none"));
        let expected = "it is no kubeconfig, from line 2 column 8 on";
        assert!(said.ends_with(expected), "{said}");
        assert!(!said.contains("secret"), "{said}");
        let said = format!(
            "{:#}",
            read(&directory.path().join("nothing")).expect_err("it is nowhere")
        );
        assert!(said.contains("No such file"), "{said}");
    }
}
