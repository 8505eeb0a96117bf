//! The same command at another node: in the pod of its speaker.

use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};

use crate::ask::SpeakerArgs;

/// How the chart labels speakers.
const SPEAKERS: &str = "app.kubernetes.io/component=speaker";
/// What in the pod finds the socket by its own environment.
const LANDFALL: &str = "landfall";

/// Runs `landfall` with these words in the pod of a node's speaker; whether it ended well. What it prints goes where this
/// process's goes.
pub(crate) async fn at(node: &str, speaker: &SpeakerArgs, args: &[String]) -> anyhow::Result<bool> {
    let client = speaker.api.client().await?;
    let pods = Api::<Pod>::namespaced(client, &speaker.namespace);
    let here = ListParams::default()
        .labels(SPEAKERS)
        .fields(&format!("spec.nodeName={node}"));
    let found = pods
        .list(&here)
        .await
        .with_context(|| format!("looking for the speaker of node {node}"))?;
    let Some(pod) = found.items.into_iter().find(is_running) else {
        bail!(
            "no speaker runs on node {node} in namespace {} (pods labelled {SPEAKERS}): is the name right? See --namespace",
            speaker.namespace
        );
    };
    let mut command = Command::new("kubectl");
    command
        .args(speaker.api.for_kubectl())
        .args(["exec", "--namespace", &speaker.namespace, &pod.name_any()])
        .args(["--container", "speaker", "--", LANDFALL])
        .args(args)
        .stdin(Stdio::null());
    let status = command
        .status()
        .context("kubectl: it is needed for --node; without it run this in the speaker's pod")?;
    match status.code() {
        Some(0) => Ok(true),
        // The command's own word, or kubectl's.
        Some(1) => Ok(false),
        _ => bail!("kubectl exec into {}: {status}", pod.name_any()),
    }
}

fn is_running(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    phase == Some("Running") && pod.metadata.deletion_timestamp.is_none()
}
