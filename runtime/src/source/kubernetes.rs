//! Objects from the Kubernetes API: one watch per kind, all into one channel.

use std::collections::HashSet;
use std::fmt::Debug;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use landfall_api::{IPAddressPool, L2Advertisement, VirtualIP};
use landfall_core::model::{Event, Kind, ObjectId};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Source;
use crate::project::Project;

/// How watches behave.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long one watch request lasts. A silently dropped connection is noticed 5 s later.
    pub watch_timeout: Duration,
    /// How many objects a page of a list holds.
    pub page_size: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            watch_timeout: Duration::from_secs(60),
            page_size: 250,
        }
    }
}

/// Watches `kinds`. Errors are logged and retried with backoff, each kind on its own.
pub fn kubernetes(client: &Client, kinds: &[Kind], options: Options) -> Source {
    let (sender, events) = mpsc::channel(1024);
    let mut tasks = JoinSet::new();
    for &kind in kinds {
        let (client, sender) = (client.clone(), sender.clone());
        match kind {
            Kind::Service => {
                tasks.spawn(follow::<Service>(client, kind, options, sender));
            }
            Kind::EndpointSlice => {
                tasks.spawn(follow::<EndpointSlice>(client, kind, options, sender));
            }
            Kind::Node => {
                tasks.spawn(follow::<Node>(client, kind, options, sender));
            }
            Kind::Namespace => {
                tasks.spawn(follow::<Namespace>(client, kind, options, sender));
            }
            Kind::Pool => {
                tasks.spawn(follow::<IPAddressPool>(client, kind, options, sender));
            }
            Kind::Advertisement => {
                tasks.spawn(follow::<L2Advertisement>(client, kind, options, sender));
            }
            Kind::VirtualIp => {
                tasks.spawn(follow::<VirtualIP>(client, kind, options, sender));
            }
        }
    }
    Source {
        events,
        kinds: kinds.to_vec(),
        tasks,
    }
}

/// What of a kind is watched at all.
fn fields(kind: Kind) -> Option<&'static str> {
    match kind {
        // A Service that stops being a load balancer leaves the selection and shows as deleted.
        Kind::Service => Some("spec.type=LoadBalancer"),
        Kind::EndpointSlice
        | Kind::Node
        | Kind::Namespace
        | Kind::Pool
        | Kind::Advertisement
        | Kind::VirtualIp => None,
    }
}

async fn follow<K>(client: Client, kind: Kind, options: Options, sender: mpsc::Sender<Event>)
where
    K: Resource<DynamicType = ()> + Project + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let seconds = u32::try_from(options.watch_timeout.as_secs()).unwrap_or(60);
    let mut config = watcher::Config::default()
        .timeout(seconds)
        .page_size(options.page_size);
    if let Some(fields) = fields(kind) {
        config = config.fields(fields);
    }
    let mut stream = watcher(Api::<K>::all(client), config)
        .default_backoff()
        .boxed();
    let mut known: HashSet<ObjectId> = HashSet::new();
    let mut listed: HashSet<ObjectId> = HashSet::new();
    loop {
        let event = match stream.try_next().await {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(problem) => {
                tracing::warn!(?kind, %problem, "watching the API failed; what is known stays in force, trying again");
                continue;
            }
        };
        let sent = match event {
            watcher::Event::Init => {
                listed.clear();
                true
            }
            watcher::Event::InitApply(object) => match project(object) {
                Some(object) => {
                    listed.insert(object.id());
                    known.insert(object.id());
                    sender.send(Event::Apply(object)).await.is_ok()
                }
                None => true,
            },
            watcher::Event::InitDone => {
                let gone: Vec<_> = known.difference(&listed).cloned().collect();
                known = std::mem::take(&mut listed);
                let mut sent = true;
                for id in gone {
                    sent &= sender.send(Event::Delete(id)).await.is_ok();
                }
                sent && sender.send(Event::Synced(kind)).await.is_ok()
            }
            watcher::Event::Apply(object) => match project(object) {
                Some(object) => {
                    known.insert(object.id());
                    sender.send(Event::Apply(object)).await.is_ok()
                }
                None => true,
            },
            watcher::Event::Delete(object) => match project(object) {
                Some(object) => {
                    known.remove(&object.id());
                    sender.send(Event::Delete(object.id())).await.is_ok()
                }
                None => true,
            },
        };
        if !sent {
            return;
        }
    }
}

/// The projection, or nothing and a word in the log: one bad object must not stop the rest.
fn project<K: Project>(object: K) -> Option<landfall_core::model::Object> {
    object
        .project()
        .inspect_err(|problem| tracing::warn!(%problem, "this object is ignored"))
        .ok()
}
