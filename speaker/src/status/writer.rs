//! Writes statuses and Events to the API server, for as long as it takes.
//!
//! Of each object only the latest status waits; a write that fails is tried again with a growing delay, so that
//! an API server that was away is not met by a crowd.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Error};
use landfall_api::VirtualIP;
use landfall_core::model::ObjectKey;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Write;
use crate::metrics::{Metrics, reason_labels};

/// Writes in flight at once.
const IN_FLIGHT: usize = 8;
/// A write that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);
const FIRST_DELAY: Duration = Duration::from_millis(500);
const LAST_DELAY: Duration = Duration::from_secs(30);
/// Events that wait; more are dropped, since they are news only while they are new.
const MAX_EVENTS: usize = 256;
const MANAGER: &str = "landfall-speaker";

struct Pending {
    patch: Value,
    not_before: Instant,
    delay: Duration,
}

enum Done {
    Status(String, Value, Duration, Result<(), Error>),
    Event(Result<(), Error>),
}

/// Writes what arrives, until the sender is gone and the last write is done.
pub async fn run(
    client: Client,
    node: String,
    mut writes: mpsc::UnboundedReceiver<Write>,
    metrics: Metrics,
) {
    let statuses: Api<VirtualIP> = Api::all(client.clone());
    let mut pending: BTreeMap<String, Pending> = BTreeMap::new();
    let mut events: Vec<(ObjectKey, &'static str, String)> = Vec::new();
    let mut busy: BTreeSet<String> = BTreeSet::new();
    let mut running = FuturesUnordered::new();
    loop {
        let now = Instant::now();
        while running.len() < IN_FLIGHT {
            if let Some((service, reason, note)) = events.pop() {
                let job = event(client.clone(), node.clone(), service, reason, note);
                running.push(futures::future::Either::Left(async move {
                    Done::Event(job.await)
                }));
                continue;
            }
            let due = pending
                .iter()
                .find(|(name, waiting)| waiting.not_before <= now && !busy.contains(*name))
                .map(|(name, _)| name.clone());
            let Some(name) = due else { break };
            let Some(job) = pending.remove(&name) else {
                break;
            };
            busy.insert(name.clone());
            let statuses = statuses.clone();
            running.push(futures::future::Either::Right(async move {
                let outcome = write(&statuses, &name, &job.patch).await;
                Done::Status(name, job.patch, job.delay, outcome)
            }));
        }
        let waiting = pending.len() + events.len();
        metrics
            .status_pending
            .set(i64::try_from(waiting).unwrap_or(i64::MAX));
        let wake = pending
            .iter()
            .filter(|(name, _)| !busy.contains(*name))
            .map(|(_, waiting)| waiting.not_before)
            .min();
        tokio::select! {
            write = writes.recv() => match write {
                Some(Write::Status { name, patch }) => {
                    // What waits longer because of failures goes on waiting: the server is away.
                    let (not_before, delay) = pending
                        .remove(&name)
                        .map_or((now, FIRST_DELAY), |old| (old.not_before, old.delay));
                    pending.insert(name, Pending { patch, not_before, delay });
                }
                Some(Write::Event { service, reason, note }) => {
                    if events.len() < MAX_EVENTS {
                        events.push((service, reason, note));
                    }
                }
                None => return,
            },
            Some(done) = running.next() => {
                let outcome = match done {
                    Done::Event(outcome) => outcome,
                    Done::Status(name, patch, delay, outcome) => {
                        busy.remove(&name);
                        if let Err(error) = &outcome
                            && is_passing(error)
                        {
                            // A newer one that came meanwhile goes first, but no earlier.
                            let not_before = Instant::now() + delay;
                            let delay = (delay * 2).min(LAST_DELAY);
                            let patch = pending.remove(&name).map_or(patch, |newer| newer.patch);
                            pending.insert(name, Pending { patch, not_before, delay });
                        }
                        outcome
                    }
                };
                let word = match &outcome {
                    Ok(()) => "written",
                    Err(error) if is_gone(error) => "object-gone",
                    Err(error) => {
                        tracing::warn!(%error, "a status or an Event was not written");
                        "failed"
                    }
                };
                metrics.status_writes.get_or_create(&reason_labels(word)).inc();
            },
            () = sleep_until(wake), if wake.is_some() && running.len() < IN_FLIGHT => {}
        }
    }
}

async fn sleep_until(wake: Option<Instant>) {
    if let Some(wake) = wake {
        tokio::time::sleep_until(wake).await;
    }
}

fn is_gone(error: &Error) -> bool {
    matches!(error, Error::Api(status) if status.code == 404)
}

/// Whether another try may succeed: not if the object is gone, or the status itself is refused.
fn is_passing(error: &Error) -> bool {
    match error {
        Error::Api(status) => !matches!(status.code, 404 | 400 | 422),
        _ => true,
    }
}

async fn write(statuses: &Api<VirtualIP>, name: &str, patch: &Value) -> Result<(), Error> {
    let parameters = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let patch = Patch::Merge(patch);
    let write = statuses.patch_status(name, &parameters, &patch);
    match tokio::time::timeout(PATIENCE, write).await {
        Ok(outcome) => outcome.map(|_| ()),
        Err(_) => Err(Error::Service("the API server does not answer".into())),
    }
}

async fn event(
    client: Client,
    node: String,
    service: ObjectKey,
    reason: &'static str,
    note: String,
) -> Result<(), Error> {
    let api: Api<Event> = Api::namespaced(client, &service.namespace);
    let event = Event {
        action: Some("Announce".to_owned()),
        event_time: Some(MicroTime(jiff::Timestamp::now())),
        metadata: ObjectMeta {
            // A dot at the end is refused.
            generate_name: Some(format!("{}-", service.name)),
            namespace: Some(service.namespace.to_string()),
            ..ObjectMeta::default()
        },
        note: Some(note),
        reason: Some(reason.to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            name: Some(service.name.to_string()),
            namespace: Some(service.namespace.to_string()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some("landfall.dev/speaker".to_owned()),
        reporting_instance: Some(node),
        type_: Some("Warning".to_owned()),
        ..Event::default()
    };
    let parameters = PostParams::default();
    let write = api.create(&parameters, &event);
    match tokio::time::timeout(PATIENCE, write).await {
        Ok(outcome) => outcome.map(|_| ()),
        Err(_) => Err(Error::Service("the API server does not answer".into())),
    }
}
