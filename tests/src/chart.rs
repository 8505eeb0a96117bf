//! The chart, rendered by Helm and applied: CRDs, RBAC and workloads (which nothing here schedules).

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, bail};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::PostParams;

use crate::ControlPlane;
use crate::binaries::{run, workspace};

/// The namespace that Landfall is installed in.
pub const NAMESPACE: &str = "landfall-system";

/// Renders the chart with these values (`key=value`) and applies it all, as an admin.
pub fn install(plane: &ControlPlane, values: &[&str]) -> anyhow::Result<()> {
    let mut helm = plane.binaries().helm();
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        helm.env(variable, plane.directory().join("helm"));
    }
    helm.args(["template", "landfall"])
        .arg(workspace().join("charts/landfall"))
        .args(["--namespace", NAMESPACE, "--include-crds"]);
    for value in values {
        helm.args(["--set", value]);
    }
    let rendered = run(&mut helm)?;
    run(plane.kubectl().args(["create", "namespace", NAMESPACE]))?;
    apply(plane, &rendered)?;
    run(plane.kubectl().args([
        "wait",
        "--for=condition=Established",
        "--timeout=60s",
        "crd",
        "--all",
    ]))?;
    Ok(())
}

/// Applies YAML, as an admin.
pub fn apply(plane: &ControlPlane, yaml: &str) -> anyhow::Result<()> {
    let mut kubectl = plane
        .kubectl()
        .args(["apply", "--server-side", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    kubectl
        .stdin
        .take()
        .context("the pipe was asked for")?
        .write_all(yaml.as_bytes())?;
    let output = kubectl.wait_with_output()?;
    if !output.status.success() {
        bail!("kubectl apply: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// A kubeconfig with a token of one of the chart's `ServiceAccount`s (`controller` or `speaker`), for processes
/// inside the lab. Not to be called from async code.
pub fn kubeconfig(plane: &ControlPlane, component: &str) -> anyhow::Result<PathBuf> {
    let account = format!("landfall-{component}");
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            expiration_seconds: Some(24 * 3600),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let answer: TokenRequest = plane.block_on(async {
        let accounts: Api<ServiceAccount> = Api::namespaced(plane.client().await?, NAMESPACE);
        accounts
            .create_subresource("token", &account, &PostParams::default(), &request)
            .await
            .with_context(|| format!("asking for a token of {account}"))
    })?;
    let token = answer
        .status
        .and_then(|status| status.token)
        .context("the API server answered without a token")?;
    plane.write_token_kubeconfig(component, &token)
}
