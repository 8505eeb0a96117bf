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
use kube::{Client, Error, Resource as _};
use landfall_api::{EgressPolicy, VirtualIP};
use landfall_core::model::Holder;
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

/// What a write is about. Of an object only the latest status waits; Events are all different.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Status(String),
    Event(u64),
}

enum Job {
    Status(String, Value),
    Event(Box<Event>),
}

struct Pending {
    job: Job,
    not_before: Instant,
    delay: Duration,
}

/// Writes what arrives, until the sender is gone.
pub async fn run(
    client: Client,
    node: String,
    mut writes: mpsc::UnboundedReceiver<Write>,
    metrics: Metrics,
) {
    let mut pending: BTreeMap<Key, Pending> = BTreeMap::new();
    let mut busy: BTreeSet<Key> = BTreeSet::new();
    let mut running = FuturesUnordered::new();
    let mut events = 0;
    loop {
        let now = Instant::now();
        while running.len() < IN_FLIGHT {
            let due = pending
                .iter()
                .find(|(key, waiting)| waiting.not_before <= now && !busy.contains(*key))
                .map(|(key, _)| key.clone());
            let Some((key, waiting)) = due.and_then(|key| pending.remove_entry(&key)) else {
                break;
            };
            busy.insert(key.clone());
            let client = client.clone();
            running.push(async move {
                let outcome = write(client, &waiting.job).await;
                (key, waiting, outcome)
            });
        }
        metrics
            .status_pending
            .set(i64::try_from(pending.len()).unwrap_or(i64::MAX));
        let wake = pending
            .iter()
            .filter(|(key, _)| !busy.contains(*key))
            .map(|(_, waiting)| waiting.not_before)
            .min();
        tokio::select! {
            write = writes.recv() => match write {
                Some(Write::Status { name, patch }) => {
                    let key = Key::Status(name.clone());
                    // What waits longer because of failures goes on waiting: the server is away.
                    let (not_before, delay) = pending
                        .remove(&key)
                        .map_or((now, FIRST_DELAY), |old| (old.not_before, old.delay));
                    pending.insert(key, Pending { job: Job::Status(name, patch), not_before, delay });
                }
                Some(Write::Event { about, uid, reason, note }) => {
                    let waiting = pending.range(Key::Event(0)..).count();
                    if waiting < MAX_EVENTS {
                        events += 1;
                        let job = Job::Event(Box::new(event(&node, &about, uid, reason, note)));
                        pending.insert(Key::Event(events), Pending { job, not_before: now, delay: FIRST_DELAY });
                    }
                }
                None => return,
            },
            Some((key, mut waiting, outcome)) = running.next() => {
                busy.remove(&key);
                let word = match &outcome {
                    Ok(()) => "written",
                    Err(error) if is_gone(error) => "object-gone",
                    Err(error) => {
                        tracing::warn!(%error, "a status or an Event was not written");
                        "failed"
                    }
                };
                metrics.status_writes.get_or_create(&reason_labels(word)).inc();
                if outcome.as_ref().is_err_and(is_passing) {
                    waiting.not_before = Instant::now() + waiting.delay;
                    waiting.delay = (waiting.delay * 2).min(LAST_DELAY);
                    // A newer one that came meanwhile goes first, but no earlier.
                    if let Some(newer) = pending.remove(&key) {
                        waiting.job = newer.job;
                    }
                    pending.insert(key, waiting);
                }
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

async fn write(client: Client, job: &Job) -> Result<(), Error> {
    let write = async {
        match job {
            Job::Status(name, patch) => {
                let parameters = PatchParams {
                    field_manager: Some(MANAGER.to_owned()),
                    ..PatchParams::default()
                };
                Api::<VirtualIP>::all(client)
                    .patch_status(name, &parameters, &Patch::Merge(patch))
                    .await
                    .map(drop)
            }
            Job::Event(event) => {
                let namespace = event.metadata.namespace.as_deref().unwrap_or_default();
                Api::<Event>::namespaced(client, namespace)
                    .create(&PostParams::default(), event)
                    .await
                    .map(drop)
            }
        }
    };
    match tokio::time::timeout(PATIENCE, write).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::Service("the API server does not answer".into())),
    }
}

fn event(node: &str, about: &Holder, uid: String, reason: &'static str, note: String) -> Event {
    let (regarding, action) = match about {
        Holder::Service(key) => (
            ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Service".to_owned()),
                name: Some(key.name.to_string()),
                namespace: Some(key.namespace.to_string()),
                ..ObjectReference::default()
            },
            "Announce",
        ),
        Holder::EgressPolicy(name) => (
            ObjectReference {
                api_version: Some(EgressPolicy::api_version(&()).into_owned()),
                kind: Some("EgressPolicy".to_owned()),
                name: Some(name.to_string()),
                ..ObjectReference::default()
            },
            "Translate",
        ),
    };
    // Those about cluster-scoped objects stand in `default`, where kubectl looks for them.
    let namespace = regarding.namespace.clone();
    Event {
        action: Some(action.to_owned()),
        event_time: Some(MicroTime(jiff::Timestamp::now())),
        metadata: ObjectMeta {
            // A dot at the end is refused.
            generate_name: regarding.name.as_ref().map(|name| format!("{name}-")),
            namespace: Some(namespace.unwrap_or_else(|| "default".to_owned())),
            ..ObjectMeta::default()
        },
        note: Some(note),
        reason: Some(reason.to_owned()),
        regarding: Some(ObjectReference {
            uid: (!uid.is_empty()).then_some(uid),
            ..regarding
        }),
        reporting_controller: Some("landfall.dev/speaker".to_owned()),
        reporting_instance: Some(node.to_owned()),
        type_: Some("Warning".to_owned()),
        ..Event::default()
    }
}
