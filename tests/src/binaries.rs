//! Where the control plane's programs are.
//!
//! `KUBEBUILDER_ASSETS`, then the `PATH`, are honoured for etcd, kube-apiserver, kube-controller-manager and
//! kubectl; kube-proxy is always the one of `tests/kubernetes`, since nobody ships it for tests.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use landfall_lab::{Program, tool};

/// Kubernetes' components, and Helm.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    /// One binary for all components, the component's name its first argument.
    all_in_one: PathBuf,
    helm: PathBuf,
}

impl Binaries {
    /// Finds them, or says what to run.
    pub(crate) fn find() -> anyhow::Result<Self> {
        Ok(Self {
            all_in_one: tool::built("LANDFALL_KUBERNETES")?,
            helm: tool::built("LANDFALL_HELM")?,
        })
    }

    /// A component, without arguments but its name if it needs that.
    pub(crate) fn component(&self, name: &str) -> Program {
        match (name != "kube-proxy").then(|| elsewhere(name)).flatten() {
            Some(path) => Program::new(path),
            None => Program::new(&self.all_in_one).arg(name),
        }
    }

    /// A component as a command of this process.
    pub(crate) fn command(&self, name: &str) -> Command {
        let program = self.component(name);
        let mut command = Command::new(program.path);
        command.args(program.args);
        command
    }

    /// Helm.
    pub(crate) fn helm(&self) -> Command {
        Command::new(&self.helm)
    }
}

fn elsewhere(name: &str) -> Option<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS");
    let path = std::env::var_os("PATH").unwrap_or_default();
    assets
        .map(PathBuf::from)
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

/// The root of the checkout.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
}

/// Runs a command to its end; its standard output.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
