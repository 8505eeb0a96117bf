//! Objects from the Kubernetes API: one watch per kind, all into one channel.

use std::collections::HashSet;
use std::fmt::Debug;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use landfall_api::{EgressPolicy, IPAddressPool, L2Advertisement, VirtualIP};
use landfall_core::model::{Event, Kind, Object, ObjectId, ObjectKey};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};
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

/// Objects that are there but cannot be used as they are, by kind: what a reader has is their last good form.
#[derive(Clone, Debug, Default)]
pub struct Ignored(Family<KindLabels, Gauge>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    resource: String,
}

impl Ignored {
    /// Registers the metric.
    pub fn register(registry: &mut Registry) -> Self {
        let ignored = Self::default();
        registry.register(
            "objects_ignored",
            "Objects that cannot be used as they are, by kind; the log says what is wrong with each",
            ignored.0.clone(),
        );
        ignored
    }

    fn set<K: Resource<DynamicType = ()>>(&self, number: usize) {
        let labels = KindLabels {
            resource: K::plural(&()).into_owned(),
        };
        self.0
            .get_or_create(&labels)
            .set(i64::try_from(number).unwrap_or(i64::MAX));
    }
}

/// Watches `kinds`. Errors are logged and retried with backoff, each kind on its own. Pods are watched only while there is
/// an `EgressPolicy`, or a `VirtualIP` that names one: flows of its pods outlive it.
pub fn kubernetes(client: &Client, kinds: &[Kind], options: Options, ignored: &Ignored) -> Source {
    let (sender, events) = mpsc::channel(1024);
    let (named_by, pods_wanted) = watch::channel(HashSet::new());
    let mut tasks = JoinSet::new();
    for &kind in kinds {
        let follower = Follower {
            client: client.clone(),
            kind,
            options,
            sender: sender.clone(),
            ignored: ignored.clone(),
            named_by: named_by.clone(),
        };
        match kind {
            Kind::Service => tasks.spawn(follower.follow::<Service>()),
            Kind::EndpointSlice => tasks.spawn(follower.follow::<EndpointSlice>()),
            Kind::Node => tasks.spawn(follower.follow::<Node>()),
            Kind::Namespace => tasks.spawn(follower.follow::<Namespace>()),
            Kind::Pool => tasks.spawn(follower.follow::<IPAddressPool>()),
            Kind::Advertisement => tasks.spawn(follower.follow::<L2Advertisement>()),
            Kind::VirtualIp => tasks.spawn(follower.follow::<VirtualIP>()),
            Kind::EgressPolicy => tasks.spawn(follower.follow::<EgressPolicy>()),
            Kind::Pod => tasks.spawn(follower.follow_while::<Pod>(pods_wanted.clone())),
            Kind::ServiceCidr => tasks.spawn(follower.follow::<ServiceCIDR>()),
        };
    }
    Source {
        events,
        kinds: kinds.to_vec(),
        tasks,
    }
}

/// The watch of one kind.
#[derive(Clone)]
struct Follower {
    client: Client,
    kind: Kind,
    options: Options,
    sender: mpsc::Sender<Event>,
    ignored: Ignored,
    /// Told which objects are or name an egress policy.
    named_by: watch::Sender<HashSet<ObjectId>>,
}

/// Whether pods matter because of an object.
fn needs_pods(object: &Object) -> bool {
    match object {
        Object::EgressPolicy(_) => true,
        Object::VirtualIp(vip) => !vip.egress_policies.is_empty(),
        Object::Service(_)
        | Object::EndpointSlice(_)
        | Object::Node(_)
        | Object::Namespace(_)
        | Object::Pool(_)
        | Object::Advertisement(_)
        | Object::Pod(_)
        | Object::ServiceCidr(_) => false,
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
        | Kind::VirtualIp
        | Kind::EgressPolicy
        | Kind::ServiceCidr => None,
        // What has ended has no address any more, and there may be many of them.
        Kind::Pod => Some("status.phase!=Succeeded,status.phase!=Failed"),
    }
}

/// What follows where a server does not list a kind, if the kind may be missing.
fn without(kind: Kind, problem: &watcher::Error) -> Option<&'static str> {
    let watcher::Error::InitialListFailed(kube::Error::Api(status)) = problem else {
        return None;
    };
    match (kind, status.code) {
        // Who upgrades may bring the new CRD later.
        (Kind::EgressPolicy, 404) => Some(
            "the API server does not serve this kind, so there is none: apply the chart's crds directory",
        ),
        (Kind::ServiceCidr, 404) => Some(
            "the API server does not serve this kind (Kubernetes does from 1.33 on): an address of the Services' network \
             that no Service has counts as outside",
        ),
        (Kind::ServiceCidr, 403) => Some(
            "not allowed to list this kind: an address of the Services' network that no Service has counts as outside; \
             upgrade the chart, whose ClusterRoles allow it",
        ),
        _ => None,
    }
}

/// Notes whether an object is or names an egress policy.
fn note(named_by: &watch::Sender<HashSet<ObjectId>>, id: ObjectId, names: bool) {
    named_by.send_if_modified(|ids| {
        let was_empty = ids.is_empty();
        if names {
            ids.insert(id);
        } else {
            ids.remove(&id);
        }
        ids.is_empty() != was_empty
    });
}

impl Follower {
    async fn follow<K>(self)
    where
        K: Resource<DynamicType = ()> + Project + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let Self {
            client,
            kind,
            options,
            sender,
            ignored,
            named_by,
        } = self;
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
        let mut malformed: HashSet<ObjectId> = HashSet::new();
        let mut absent = false;
        loop {
            ignored.set::<K>(malformed.len());
            let event = match stream.try_next().await {
                Ok(Some(event)) => event,
                Ok(None) => return,
                Err(problem) if let Some(then) = without(kind, &problem) => {
                    if !std::mem::replace(&mut absent, true) {
                        tracing::warn!(?kind, "{then}");
                        if sender.send(Event::Synced(kind)).await.is_err() {
                            return;
                        }
                    }
                    continue;
                }
                Err(problem) => {
                    tracing::warn!(?kind, %problem, "watching the API failed; what is known stays in force, trying again");
                    continue;
                }
            };
            let sent = match event {
                watcher::Event::Init => {
                    listed.clear();
                    malformed.clear();
                    true
                }
                watcher::Event::InitApply(object) => {
                    // A malformed one exists all the same: its last good form stays in force.
                    let id = id_of(kind, object.meta());
                    listed.extend(id.clone().filter(|id| known.contains(id)));
                    if let Some(object) = project(object) {
                        listed.insert(object.id());
                        known.insert(object.id());
                        note(&named_by, object.id(), needs_pods(&object));
                        sender.send(Event::Apply(object)).await.is_ok()
                    } else {
                        malformed.extend(id);
                        true
                    }
                }
                watcher::Event::InitDone => {
                    let gone: Vec<_> = known.difference(&listed).cloned().collect();
                    known = std::mem::take(&mut listed);
                    let mut sent = true;
                    for id in gone {
                        note(&named_by, id.clone(), false);
                        sent &= sender.send(Event::Delete(id)).await.is_ok();
                    }
                    sent && sender.send(Event::Synced(kind)).await.is_ok()
                }
                watcher::Event::Apply(object) => {
                    let id = id_of(kind, object.meta());
                    if let Some(object) = project(object) {
                        malformed.remove(&object.id());
                        known.insert(object.id());
                        note(&named_by, object.id(), needs_pods(&object));
                        sender.send(Event::Apply(object)).await.is_ok()
                    } else {
                        malformed.extend(id);
                        true
                    }
                }
                watcher::Event::Delete(object) => match id_of(kind, object.meta()) {
                    Some(id) => {
                        known.remove(&id);
                        malformed.remove(&id);
                        note(&named_by, id.clone(), false);
                        sender.send(Event::Delete(id)).await.is_ok()
                    }
                    None => true,
                },
            };
            if !sent {
                return;
            }
        }
    }

    /// Follows while it is wanted, and says when it no longer does.
    async fn follow_while<K>(self, mut wanted: watch::Receiver<HashSet<ObjectId>>)
    where
        K: Resource<DynamicType = ()> + Project + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        while wanted.wait_for(|by| !by.is_empty()).await.is_ok() {
            tokio::select! {
                () = self.clone().follow::<K>() => return,
                unwanted = wanted.wait_for(HashSet::is_empty) => if unwanted.is_err() {
                    return;
                },
            }
            self.ignored.set::<K>(0);
            if self.sender.send(Event::Unwatched(self.kind)).await.is_err() {
                return;
            }
        }
    }
}

/// Which object it is, from its metadata alone: what is malformed can still go.
fn id_of(kind: Kind, meta: &ObjectMeta) -> Option<ObjectId> {
    let name = meta.name.as_deref()?;
    let key = || ObjectKey::new(meta.namespace.as_deref().unwrap_or("default"), name);
    Some(match kind {
        Kind::Service => ObjectId::Service(key()),
        Kind::EndpointSlice => ObjectId::EndpointSlice(key()),
        Kind::Node => ObjectId::Node(name.into()),
        Kind::Namespace => ObjectId::Namespace(name.into()),
        Kind::Pool => ObjectId::Pool(name.into()),
        Kind::Advertisement => ObjectId::Advertisement(name.into()),
        Kind::EgressPolicy => ObjectId::EgressPolicy(name.into()),
        Kind::Pod => ObjectId::Pod(key()),
        Kind::ServiceCidr => ObjectId::ServiceCidr(name.into()),
        // The name is the address, an IPv6 one's with dashes.
        Kind::VirtualIp => ObjectId::VirtualIp(name.replace('-', ":").parse().ok()?),
    })
}

/// The projection, or nothing and a word in the log: one bad object must not stop the rest.
fn project<K: Project>(object: K) -> Option<landfall_core::model::Object> {
    object
        .project()
        .inspect_err(|problem| tracing::warn!(%problem, "this object is ignored"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: u16) -> watcher::Error {
        let status = kube::core::Status {
            code,
            ..kube::core::Status::default()
        };
        watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn what_may_be_missing_is_done_without() {
        for (kind, code, is_done_without) in [
            (Kind::ServiceCidr, 404, true),
            (Kind::ServiceCidr, 403, true),
            (Kind::ServiceCidr, 500, false),
            (Kind::EgressPolicy, 404, true),
            // Policies that may not be seen are there all the same.
            (Kind::EgressPolicy, 403, false),
            (Kind::VirtualIp, 404, false),
        ] {
            let then = without(kind, &failed(code));
            assert_eq!(then.is_some(), is_done_without, "{kind:?} {code}");
        }
    }

    #[test]
    fn metadata_names_what_projection_names() {
        let pool: IPAddressPool = serde_json::from_value(serde_json::json!({
            "apiVersion": "landfall.dev/v1alpha1", "kind": "IPAddressPool", "metadata": {"name": "lan"},
            "spec": {"addresses": ["fd00::20-fd00::10"]},
        }))
        .unwrap();
        // Malformed, in a way that the API server cannot see: said on the pool.
        let Ok(landfall_core::model::Object::Pool(projected)) = pool.clone().project() else {
            panic!("a pool is a pool");
        };
        let flaw = projected.flaw.unwrap();
        assert!(flaw.contains("spec.addresses"), "{flaw}");
        assert!(projected.ranges.is_empty());
        let id = id_of(Kind::Pool, &pool.metadata);
        assert_eq!(id, Some(ObjectId::Pool("lan".into())));

        for (name, address) in [
            ("192.0.2.7", "192.0.2.7"),
            ("fd00-0088-0000-0000-0000-0000-0000-0200", "fd00:88::200"),
        ] {
            let vip: VirtualIP = serde_json::from_value(serde_json::json!({
                "apiVersion": "landfall.dev/v1alpha1", "kind": "VirtualIP", "metadata": {"name": name},
                "spec": {"address": address, "pool": "lan", "group": "g", "services": []},
            }))
            .unwrap();
            let id = id_of(Kind::VirtualIp, &vip.metadata);
            assert_eq!(id, Some(vip.project().unwrap().id()));
        }
        let service: Service = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "a", "name": "b"}, "spec": {"type": "LoadBalancer"},
        }))
        .unwrap();
        let id = id_of(Kind::Service, &service.metadata);
        assert_eq!(id, Some(service.project().unwrap().id()));
    }
}
