//! The wiring: client, admin endpoints, election, and what a leader does.

use std::sync::Arc;

use anyhow::Context as _;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client};
use landfall_core::ipam::Config;
use landfall_core::model::Kind;
use landfall_runtime::source::{Ignored, Options};
use landfall_runtime::{admin, shutdown, source};
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::args::Args;
use crate::index::{self, Settings, Shared};
use crate::lease::{Candidate, Term};
use crate::metrics::Metrics;
use crate::writer::kubernetes::Kubernetes;

/// Runs the controller until a signal ends it.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let timing = args.timing()?;
    let identity = match &args.identity {
        Some(identity) => identity.clone(),
        None => default_identity(),
    };
    let client = args
        .kube
        .client()
        .await
        .context("cannot reach the API server")?;
    let mut registry = Registry::with_prefix("landfall");
    let metrics = Metrics::default();
    metrics.register(&mut registry);
    let ignored = Ignored::register(&mut registry);
    let shared = Shared::default();
    let shutdown = CancellationToken::new();
    let candidate = Candidate {
        api: Api::<Lease>::namespaced(client.clone(), &args.namespace),
        identity: identity.clone(),
        timing,
    };
    let settings = Settings {
        ipam: Config {
            class_less: args.class_less,
            ..Config::default()
        },
        concurrency: usize::from(args.write_concurrency),
        write_timeout: timing.write_timeout(),
    };
    let stop = shutdown.clone();
    tokio::spawn(async move {
        shutdown::signal().await;
        tracing::info!("asked to stop");
        stop.cancel();
    });
    let readiness = {
        let (shared, metrics) = (shared.clone(), metrics.clone());
        move || !metrics.leads() || shared.is_ready()
    };
    let state = {
        let shared = shared.clone();
        move || shared.debug_state()
    };
    let admin = admin::serve(args.admin_address, registry, readiness, state).await?;
    candidate
        .run(shutdown, |term| {
            lead(
                client.clone(),
                &identity,
                settings.clone(),
                term,
                shared.clone(),
                metrics.clone(),
                ignored.clone(),
            )
        })
        .await;
    drop(admin);
    Ok(())
}

/// One term: fresh lists, an index of its own, and no write in flight once it returns.
async fn lead(
    client: Client,
    identity: &str,
    settings: Settings,
    term: Term,
    shared: Shared,
    metrics: Metrics,
    ignored: Ignored,
) {
    metrics.lead(true);
    let of_allocation = settings.ipam.kinds.iter().copied();
    let kinds: Vec<_> = of_allocation
        .chain([Kind::Pod, Kind::ServiceCidr])
        .collect();
    let source = source::kubernetes(&client, &kinds, Options::default(), &ignored);
    let sink = Arc::new(Kubernetes::new(client, identity.to_owned()));
    index::run(source, sink, settings, term, shared, metrics.clone()).await;
    metrics.lead(false);
}

fn default_identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{}", host.trim(), std::process::id())
}
