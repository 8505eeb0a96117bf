//! Pods that leave by addresses of their own, and what holds an address.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Condition, NodeName, ObjectKey};
use crate::ip::Family;
use crate::selector::{LabelSelector, Labels};

/// What can hold an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Holder {
    /// A Service, alone or with others of its sharing key.
    Service(ObjectKey),
    /// An egress policy, alone.
    EgressPolicy(Arc<str>),
}

impl Holder {
    /// The Service, if it is one.
    pub fn service(&self) -> Option<&ObjectKey> {
        match self {
            Self::Service(key) => Some(key),
            Self::EgressPolicy(_) => None,
        }
    }

    /// The policy's name, if it is one.
    pub fn policy(&self) -> Option<&Arc<str>> {
        match self {
            Self::Service(_) => None,
            Self::EgressPolicy(name) => Some(name),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(key) => write!(f, "Service {key}"),
            Self::EgressPolicy(name) => write!(f, "EgressPolicy {name}"),
        }
    }
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub key: ObjectKey,
    /// Its UID; empty from a manifest.
    pub uid: String,
    /// Its labels.
    pub labels: Labels,
    /// Its addresses; none before it has any, and none once it has succeeded or failed.
    pub addresses: Vec<IpAddr>,
    /// Where it runs.
    pub node: Option<NodeName>,
    /// It is on its node's own network.
    pub host_network: bool,
    /// Seconds since the Unix epoch at which it was made, 0 from a manifest.
    pub created: i64,
    /// It is being deleted; its packets still come.
    pub terminating: bool,
}

/// Where an egress policy's addresses come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EgressSource {
    /// Of a pool.
    Pool {
        /// The pool.
        name: Arc<str>,
        /// So many of each family.
        count: usize,
        /// Which families; none named means all that the pool has.
        families: Vec<Family>,
    },
    /// By number.
    Addresses(Vec<IpAddr>),
    /// Those of a Service.
    Service(ObjectKey),
}

impl EgressSource {
    /// One address of each family that a pool has.
    pub fn of_pool(name: &str) -> Self {
        Self::Pool {
            name: name.into(),
            count: 1,
            families: Vec::new(),
        }
    }
}

/// `EgressPolicy.spec.bandwidth`, in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bandwidth {
    /// Bits a second.
    pub rate: u64,
    /// Bits that may go at once after a pause; nothing said means what the rate passes in 250 ms.
    pub burst: Option<u64>,
}

impl Bandwidth {
    /// Bits that may go at once, said or not: one full frame at least.
    pub fn burst(&self) -> u64 {
        self.burst.unwrap_or_else(|| (self.rate / 4).max(12_000))
    }
}

/// As it is written in the policy: `100M`.
pub fn bits(bits: u64) -> String {
    let units = [
        (1_000_000_000_000, "T"),
        (1_000_000_000, "G"),
        (1_000_000, "M"),
        (1_000, "k"),
    ];
    let unit = units
        .iter()
        .find(|(unit, _)| bits > 0 && bits.is_multiple_of(*unit));
    unit.map_or_else(
        || bits.to_string(),
        |(unit, letter)| format!("{}{letter}", bits / unit),
    )
}

/// What becomes of flows when a policy comes or goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OldFlows {
    /// They keep their source until they end.
    #[default]
    Keep,
    /// They are cut.
    Cut,
}

/// `EgressPolicy.spec`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressSpec {
    /// Namespaces of the pods that it is for; without it all.
    pub namespaces: Option<LabelSelector>,
    /// The pods that it is for; without it all of the namespaces.
    pub pods: Option<LabelSelector>,
    /// Where its addresses come from.
    pub source: EgressSource,
    /// Destinations that it is for; all of both families if it names none.
    pub destinations: BTreeSet<IpNet>,
    /// Destinations of those that it is not for.
    pub excluded: BTreeSet<IpNet>,
    /// The nodes that may be the gateway; without it all.
    pub gateways: Option<LabelSelector>,
    /// Most ports of one pod to one remote address, port and protocol.
    pub ports_per_pod: Option<u32>,
    /// Most ports of all pods together.
    pub ports: Option<u32>,
    /// How fast its pods may be together.
    pub bandwidth: Option<Bandwidth>,
    /// What becomes of flows that were there before it.
    pub on_appear: OldFlows,
    /// What becomes of its pods' flows when it goes.
    pub on_delete: OldFlows,
    /// Packets to VIPs of this cluster leave by the gateway too.
    pub hairpin: bool,
}

/// `EgressPolicy.status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressStatus {
    /// The policy's generation that it tells of.
    pub generation: i64,
    /// The addresses that its pods leave by, sorted.
    pub addresses: Vec<IpAddr>,
    /// The node that they leave at.
    pub gateway: Option<NodeName>,
    /// The node that would take over.
    pub standby: Option<NodeName>,
    /// Pods that are its tenants.
    pub matched_pods: u64,
    /// Pods that it selects and that are on the host's network.
    pub host_network_pods: u64,
    /// Ports that its pods' flows use.
    pub ports_in_use: u64,
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

/// An `EgressPolicy`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressPolicy {
    /// Its name.
    pub name: Arc<str>,
    /// Its UID; empty from a manifest.
    pub uid: String,
    /// `metadata.generation`, 0 from a manifest.
    pub generation: i64,
    /// Seconds since the Unix epoch at which it was made, 0 from a manifest.
    pub created: i64,
    /// What it wants.
    pub spec: EgressSpec,
    /// What it was last said to have.
    pub status: EgressStatus,
    /// Since when each of its conditions is what it is, by type, in seconds since the Unix epoch.
    pub since: BTreeMap<String, i64>,
}

impl EgressPolicy {
    /// One that says nothing but where its addresses come from: all pods, all destinations, any gateway, no limits.
    pub fn plain(name: &str, source: EgressSource) -> Self {
        Self {
            name: name.into(),
            uid: String::new(),
            generation: 0,
            created: 0,
            spec: EgressSpec {
                namespaces: None,
                pods: None,
                source,
                destinations: BTreeSet::new(),
                excluded: BTreeSet::new(),
                gateways: None,
                ports_per_pod: None,
                ports: None,
                bandwidth: None,
                on_appear: OldFlows::default(),
                on_delete: OldFlows::default(),
                hairpin: false,
            },
            status: EgressStatus::default(),
            since: BTreeMap::new(),
        }
    }
}
