//! Copies the bindings of the egress addresses that this node leads to the nodes that would take over, and keeps copies
//! of those that it would.
//!
//! ```text
//!  keeper of bindings ──Happened──> actor ──Writer──> peers ══TCP, Noise══> peers ──Reader──> actor ──> Bindings
//!  elector ────────────Roles──────────┘     a line a standby                                    the standby's kernel
//! ```
//! A standby calls its gateways, and says which groups it wants. A copy goes into its kernel as it arrives: a take-over
//! installs nothing, since all is there.

mod actor;
pub mod channel;
mod metrics;
mod peers;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod twin;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use landfall_core::groups::GroupId;
use landfall_core::model::NodeName;
use landfall_core::replication::{Binding, Change};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::egress::PolicyName;
use crate::keys::Keys;
use actor::Actor;
use metrics::{Metrics, lock};
use peers::Peers;

/// How to replicate.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node.
    pub node: NodeName,
    /// Where standbys call.
    pub listen: SocketAddr,
    /// How long changes are gathered before they are sent.
    pub batch: Duration,
    /// How many changes of a group are kept for a standby that lags behind, or whose connection breaks.
    pub log: usize,
}

impl Config {
    /// Gathers for 10 ms and keeps 65 536 changes (about 4 MiB of a busy group).
    pub fn new(node: NodeName, listen: SocketAddr) -> Self {
        Self {
            node,
            listen,
            batch: Duration::from_millis(10),
            log: 65_536,
        }
    }
}

/// What this node is to a group of egress addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// The epoch of the gateway's claim.
    pub epoch: u64,
    /// The group's addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// The egress policies whose pods leave by them.
    pub policies: BTreeSet<PolicyName>,
    /// Where the gateway is; nothing if this node is it.
    pub gateway: Option<(NodeName, SocketAddr)>,
}

/// The groups that this node leads or would take over. Of others no copy is kept.
pub type Roles = BTreeMap<GroupId, Role>;

/// How well the flows of a policy, whose gateway this node is, are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// How many other nodes have a copy of all its bindings, and follow: with none no flow outlives this node.
    pub standbys: u64,
    /// How long ago the oldest change happened that one of them has not said to have applied.
    pub lag: Duration,
}

/// The same of all policies.
pub type Copied = BTreeMap<PolicyName, Coverage>;

/// What happened to the bindings of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    /// These changes, in their order.
    Changes(Vec<Change>),
    /// More than could be kept count of: all are to be copied anew.
    Lost,
}

/// How far a look through all bindings is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(pub u64);

/// Some of all bindings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// They, at most [`CHUNK`].
    pub bindings: Vec<Binding>,
    /// Where to go on; nothing, if those were the last.
    pub next: Option<Cursor>,
}

/// How many bindings are looked at in one go.
pub const CHUNK: usize = 1_000;

/// The bindings of this node's kernel. A change of theirs is told ([`Happened`]) after it was made.
#[async_trait]
pub trait Bindings: Send + Sync {
    /// Bindings of a gateway are to be there too; one that is there already stays as it is.
    async fn insert(&self, bindings: Vec<Binding>);
    /// They are not.
    async fn remove(&self, bindings: Vec<Binding>);
    /// Of these addresses none but these are.
    async fn keep(&self, addresses: &BTreeSet<IpAddr>, bindings: HashSet<Binding>);
    /// Some of those of these addresses, from the beginning or from where a look before has ended. None, and where to go on:
    /// they are to be asked for again.
    async fn held(&self, addresses: &BTreeSet<IpAddr>, from: Option<Cursor>) -> Chunk;
}

/// What the loop tells those who copy.
pub trait Copying: Send + Sync {
    /// What this node is to which group, from now on. Returns at once.
    fn take_roles(&self, roles: Roles);
    /// New keys, for connections to come. Returns at once.
    fn rekey(&self, keys: Keys);
    /// How well policies whose gateway this node is are copied, as it was a moment ago.
    fn copied(&self) -> Copied;
}

/// Replicates until it is dropped.
#[derive(Debug)]
pub struct Replication {
    roles: watch::Sender<Roles>,
    keys: watch::Sender<Keys>,
    address: SocketAddr,
    copied: Arc<Mutex<Copied>>,
    _actor: AbortOnDropHandle<()>,
}

impl Replication {
    /// Listens and begins.
    ///
    /// # Errors
    ///
    /// The address cannot be listened at.
    pub async fn start(
        config: Config,
        keys: Keys,
        bindings: Arc<dyn Bindings>,
        happened: mpsc::Receiver<Happened>,
        registry: &mut Registry,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(config.listen).await?;
        let address = listener.local_addr()?;
        let metrics = Metrics::register(registry);
        let (keys, current) = watch::channel(keys);
        let (roles, wanted) = watch::channel(Roles::new());
        let (peers, heard) = Peers::new(config.node.clone(), current, metrics.clone());
        let copied = Arc::clone(&metrics.copied);
        let actor = Actor::new(config, peers, bindings, metrics);
        let actor = tokio::spawn(actor.run(listener, wanted, happened, heard));
        Ok(Self {
            roles,
            keys,
            address,
            copied,
            _actor: AbortOnDropHandle::new(actor),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Copying for Replication {
    fn take_roles(&self, roles: Roles) {
        self.roles.send_if_modified(|current| {
            let changed = *current != roles;
            *current = roles;
            changed
        });
    }

    fn rekey(&self, keys: Keys) {
        self.keys.send_replace(keys);
    }

    fn copied(&self) -> Copied {
        lock(&self.copied).clone()
    }
}
