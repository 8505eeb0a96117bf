//! What the API says, read once, and the index that controller and speakers judge by.

use std::collections::BTreeMap;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt as _};
use landfall_api::{EgressPolicy, IPAddressPool, VirtualIP};
use landfall_core::egress::{Cluster, EgressIndex, Options};
use landfall_core::model::{Event, Kind, NodeName, Object, ObjectKey, VirtualIp};
use landfall_runtime::project::Project;
use serde::de::DeserializeOwned;

use crate::print;

/// How many objects are asked for at a time.
const PAGE: u32 = 500;

/// Everything of a kind. What the API server has changed meanwhile is not asked about: this is a moment's look.
async fn all<K>(client: &Client) -> anyhow::Result<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let api = Api::<K>::all(client.clone());
    let mut found = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = api
            .list(&page)
            .await
            .with_context(|| format!("listing {}", K::plural(&())))?;
        let next = list.metadata.continue_.clone().unwrap_or_default();
        found.extend(list.items);
        if next.is_empty() {
            return Ok(found);
        }
        page = page.continue_token(&next);
    }
}

/// What was read.
pub(super) struct Read {
    pub(super) index: EgressIndex,
    pub(super) cluster: Cluster,
}

impl Read {
    /// The records of a policy's addresses.
    pub(super) fn addresses_of(&self, policy: &str) -> Vec<&VirtualIp> {
        let addresses = self.index.addresses_of(policy);
        addresses
            .filter_map(|address| self.cluster.vips.get(&address))
            .collect()
    }
}

/// Reads it.
pub(super) async fn read(client: &Client) -> anyhow::Result<Read> {
    let mut read = Read {
        index: EgressIndex::new(Options {
            namespaces_listed: true,
        }),
        cluster: Cluster::default(),
    };
    let policies = all::<EgressPolicy>(client).await;
    // Who has not upgraded the CRDs has no policies.
    let policies = match policies {
        Err(error) if is_not_served(&error) => Vec::new(),
        policies => policies?,
    };
    let objects = policies
        .into_iter()
        .map(Project::project)
        .chain(
            all::<IPAddressPool>(client)
                .await?
                .into_iter()
                .map(Project::project),
        )
        .chain(
            all::<VirtualIP>(client)
                .await?
                .into_iter()
                .map(Project::project),
        )
        .chain(
            all::<Namespace>(client)
                .await?
                .into_iter()
                .map(Project::project),
        )
        .chain(all::<Pod>(client).await?.into_iter().map(Project::project));
    for object in objects {
        match object {
            Ok(object) => {
                if let Object::VirtualIp(vip) = &object {
                    read.cluster.vips.insert(vip.address, vip.clone());
                }
                read.index.apply(Event::Apply(object));
            }
            Err(problem) => print::note(format_args!("left out: {problem}")),
        }
    }
    for kind in [
        Kind::EgressPolicy,
        Kind::Pool,
        Kind::VirtualIp,
        Kind::Namespace,
        Kind::Pod,
    ] {
        read.index.apply(Event::Synced(kind));
    }
    for node in all::<Node>(client).await? {
        let name = NodeName::from(node.name_any().as_str());
        if !is_ready(&node) {
            read.cluster.not_ready.insert(name.clone());
        }
        if let Ok(node) = node.project() {
            read.cluster.networks.apply(&Event::Apply(node));
            read.cluster.nodes.insert(name);
        }
    }
    read.cluster.cluster_ips = cluster_ips(all::<Service>(client).await?);
    read.index.reconcile();
    Ok(read)
}

impl Read {
    /// Reads what else tells which addresses are the cluster's own. What may not be read counts as outside.
    pub(super) async fn read_networks(&mut self, client: &Client) -> anyhow::Result<()> {
        let slices = Api::<EndpointSlice>::namespaced(client.clone(), "default");
        let api_server = slices.get_opt("kubernetes").await;
        let api_server = api_server.context("getting endpointslice kubernetes of default");
        let services = match all::<ServiceCIDR>(client).await {
            // Kubernetes before 1.33.
            Err(error) if is_not_served(&error) => Vec::new(),
            services => allowed(services)?,
        };
        let api_server = allowed(api_server)?.map(Project::project);
        let services = services.into_iter().map(Project::project);
        for object in services.chain(api_server) {
            match object {
                Ok(object) => {
                    self.cluster.networks.apply(&Event::Apply(object));
                }
                Err(problem) => print::note(format_args!("left out: {problem}")),
            }
        }
        Ok(())
    }
}

/// What was found; nothing, with a word about it, if it may not be seen.
fn allowed<T: Default>(found: anyhow::Result<T>) -> anyhow::Result<T> {
    match found {
        Err(error) if code_of(&error) == Some(403) => {
            print::note(format_args!(
                "{error:#}: what it would tell of the cluster's own addresses is not known here"
            ));
            Ok(T::default())
        }
        found => found,
    }
}

fn code_of(error: &anyhow::Error) -> Option<u16> {
    match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

fn is_not_served(error: &anyhow::Error) -> bool {
    code_of(error) == Some(404)
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| &status.conditions);
    conditions
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn cluster_ips(services: Vec<Service>) -> BTreeMap<std::net::IpAddr, ObjectKey> {
    let mut found = BTreeMap::new();
    for service in services {
        let key = ObjectKey::new(service.namespace().unwrap_or_default(), service.name_any());
        let spec = service.spec.unwrap_or_default();
        for text in spec.cluster_ips.unwrap_or_default() {
            // "None" is none.
            if let Ok(address) = text.parse() {
                found.insert(address, key.clone());
            }
        }
    }
    found
}
