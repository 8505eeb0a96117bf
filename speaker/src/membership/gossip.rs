//! Membership by SWIM gossip: the `memberlist` crate, with what it needs to be told.
//!
//! - The TCP ping that backs up a lost UDP one waits ten seconds and holds up all probing: it is off.
//! - `Options::lan()` has probe interval and timeout in the wrong order: both are set here.
//! - A healed partition does not find together by itself: absent speakers are called every second.
//! - A primary key alone leaves the gossip in clear: algorithm and both verifications are set, and checked.
//! - Delegates run under the library's write lock: they only `try_send`.
//! - A speaker that restarts quickly is never seen to leave: its run is in its meta data.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use landfall_core::election::{BootId, MAX_FRAME};
use landfall_core::model::NodeName;
use memberlist::delegate::{
    AliveDelegate, ConflictDelegate, Delegate, EventDelegate, MergeDelegate, NodeDelegate,
    PingDelegate, VoidDelegateError,
};
use memberlist::net::NetTransportOptions;
use memberlist::proto::{EncryptionAlgorithm, MaybeResolvedAddress, Meta, NodeState, SecretKey};
use memberlist::tokio::{TokioNetTransport, TokioSocketAddrResolver, TokioTcp};
use memberlist::{Memberlist, Options};
use parking::Members;
use tokio::sync::mpsc;

use super::{Expected, Membership, MembershipEvent};
use crate::keys::{Key, Keys};

type Id = Arc<str>;
type Transport = TokioNetTransport<Id, TokioSocketAddrResolver, TokioTcp>;
type List = Memberlist<Transport, Ears>;

/// Time between two calls to speakers that should be there and are not.
const REJOIN_EVERY: Duration = Duration::from_secs(1);
/// Frames that wait to be sent; more are dropped and made up for by anti-entropy.
const QUEUE: usize = 8192;

/// How to gossip.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node.
    pub node: NodeName,
    /// This run.
    pub boot: BootId,
    /// Where to gossip, TCP and UDP.
    pub address: SocketAddr,
    /// The keys.
    pub keys: Keys,
}

/// What was lost or refused, for the metrics.
#[derive(Debug, Default)]
pub struct Counters {
    /// Events that the loop was too slow for.
    pub dropped_events: AtomicU64,
    /// Frames that could not be queued or sent.
    pub dropped_frames: AtomicU64,
    /// Calls to absent speakers that failed.
    pub failed_joins: AtomicU64,
}

/// A running member.
pub struct Gossip {
    list: List,
    commands: mpsc::Sender<Command>,
    counters: Arc<Counters>,
}

enum Command {
    Send(Option<NodeName>, Bytes),
    Expect(Expected),
}

/// The living speakers and their addresses, shared between delegate and sender.
mod parking {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;
    use std::sync::{Mutex, MutexGuard};

    use landfall_core::model::NodeName;

    #[derive(Debug, Default)]
    pub(super) struct Members(Mutex<BTreeMap<NodeName, SocketAddr>>);

    impl Members {
        pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeName, SocketAddr>> {
            self.0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}

/// The library's delegate: it listens, and never waits.
struct Ears {
    node: NodeName,
    meta: Meta,
    events: mpsc::Sender<MembershipEvent>,
    members: Arc<Members>,
    counters: Arc<Counters>,
}

impl Ears {
    fn tell(&self, event: MembershipEvent) {
        if self.events.try_send(event).is_err() {
            self.counters.dropped_events.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn alive(&self, state: &NodeState<Id, SocketAddr>) {
        let node = NodeName(state.id().clone());
        if node == self.node {
            return;
        }
        let Ok(boot) = <[u8; 8]>::try_from(state.meta().as_bytes()) else {
            tracing::warn!(%node, "a gossip member without a boot id is ignored: another program, or another version?");
            return;
        };
        self.members.lock().insert(node.clone(), *state.address());
        self.tell(MembershipEvent::Alive {
            node,
            boot: BootId(u64::from_be_bytes(boot)),
        });
    }
}

impl NodeDelegate for Ears {
    async fn node_meta(&self, _limit: usize) -> Meta {
        self.meta.clone()
    }

    async fn notify_message(&self, message: Cow<'_, [u8]>) {
        if message.len() <= MAX_FRAME {
            self.tell(MembershipEvent::Frame(Bytes::copy_from_slice(&message)));
        }
    }
}

impl EventDelegate for Ears {
    type Id = Id;
    type Address = SocketAddr;

    async fn notify_join(&self, node: Arc<NodeState<Id, SocketAddr>>) {
        self.alive(&node);
    }

    async fn notify_leave(&self, node: Arc<NodeState<Id, SocketAddr>>) {
        let node = NodeName(node.id().clone());
        if node != self.node {
            self.members.lock().remove(&node);
            self.tell(MembershipEvent::Dead { node });
        }
    }

    async fn notify_update(&self, node: Arc<NodeState<Id, SocketAddr>>) {
        self.alive(&node);
    }
}

impl AliveDelegate for Ears {
    type Error = VoidDelegateError;
    type Id = Id;
    type Address = SocketAddr;

    async fn notify_alive(
        &self,
        _peer: Arc<NodeState<Id, SocketAddr>>,
    ) -> Result<(), VoidDelegateError> {
        Ok(())
    }
}

impl MergeDelegate for Ears {
    type Error = VoidDelegateError;
    type Id = Id;
    type Address = SocketAddr;

    async fn notify_merge(
        &self,
        _peers: Arc<[NodeState<Id, SocketAddr>]>,
    ) -> Result<(), VoidDelegateError> {
        Ok(())
    }
}

impl ConflictDelegate for Ears {
    type Id = Id;
    type Address = SocketAddr;

    async fn notify_conflict(
        &self,
        existing: Arc<NodeState<Id, SocketAddr>>,
        other: Arc<NodeState<Id, SocketAddr>>,
    ) {
        tracing::error!(
            node = %existing.id(), first = %existing.address(), second = %other.address(),
            "two speakers gossip under one node name: give each its own --node-name"
        );
    }
}

impl PingDelegate for Ears {
    type Id = Id;
    type Address = SocketAddr;

    async fn ack_payload(&self) -> Bytes {
        Bytes::new()
    }

    async fn notify_ping_complete(
        &self,
        _node: Arc<NodeState<Id, SocketAddr>>,
        _rtt: Duration,
        _payload: Bytes,
    ) {
    }

    fn disable_reliable_pings(&self, _target: &Id) -> bool {
        true
    }
}

impl Delegate for Ears {
    type Id = Id;
    type Address = SocketAddr;
}

fn secret(key: &Key) -> SecretKey {
    SecretKey::Aes256(key.0)
}

/// The times and switches; see the module's documentation for why each is set.
fn options(keys: &Keys) -> Options {
    Options::lan()
        .with_probe_interval(Duration::from_millis(200))
        .with_probe_timeout(Duration::from_millis(100))
        .with_suspicion_mult(3)
        .with_gossip_interval(Duration::from_millis(50))
        .with_disable_reliable_pings(true)
        .with_timeout(Duration::from_secs(2))
        .with_dead_node_reclaim_time(Duration::from_secs(1))
        .with_encryption_algo(EncryptionAlgorithm::NoPadding)
        .with_gossip_verify_outgoing(true)
        .with_gossip_verify_incoming(true)
        .with_primary_key(secret(keys.primary()))
        .with_secret_keys(keys.all().iter().map(secret).collect())
}

/// Joins the gossip. Refuses to start unless it is encrypted.
pub async fn start(
    config: Config,
) -> anyhow::Result<(Gossip, mpsc::Receiver<MembershipEvent>, Arc<Counters>)> {
    let (events, receiver) = mpsc::channel(QUEUE);
    let counters = Arc::new(Counters::default());
    let members = Arc::new(Members::default());
    let ears = Ears {
        node: config.node.clone(),
        meta: Meta::try_from(config.boot.0.to_be_bytes().to_vec())
            .context("the boot id does not fit the gossip's meta data")?,
        events,
        members: members.clone(),
        counters: counters.clone(),
    };
    let mut transport: NetTransportOptions<Id, TokioSocketAddrResolver, TokioTcp> =
        NetTransportOptions::new(config.node.0.clone());
    transport.add_bind_address(config.address);
    let list = List::with_delegate(ears, transport, options(&config.keys))
        .await
        .map_err(|error| {
            anyhow::anyhow!(
                "cannot gossip on {} (TCP and UDP): {error}; is it this node's address, and the port free?",
                config.address
            )
        })?;
    ensure!(
        list.encryption_enabled(),
        "gossip would not be encrypted: give a key with --gossip-key-file or LANDFALL_GOSSIP_KEY"
    );
    let (commands, queue) = mpsc::channel(QUEUE);
    tokio::spawn(carry(
        list.clone(),
        config.address,
        members,
        queue,
        counters.clone(),
    ));
    let gossip = Gossip {
        list,
        commands,
        counters: counters.clone(),
    };
    Ok((gossip, receiver, counters))
}

/// Sends frames, and calls those who are absent.
async fn carry(
    list: List,
    own: SocketAddr,
    members: Arc<Members>,
    mut queue: mpsc::Receiver<Command>,
    counters: Arc<Counters>,
) {
    let mut expected = Expected::new();
    let mut calls = tokio::time::interval(REJOIN_EVERY);
    calls.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            command = queue.recv() => match command {
                Some(Command::Send(to, frame)) => send(&list, &members, to, frame, &counters).await,
                Some(Command::Expect(wanted)) => {
                    expected = wanted;
                    calls.reset_immediately();
                }
                None => return,
            },
            _ = calls.tick() => {
                let present: Vec<(NodeName, SocketAddr)> =
                    members.lock().iter().map(|(name, at)| (name.clone(), *at)).collect();
                let absent = expected.iter().filter(|(address, name)| {
                    **address != own
                        && !present.iter().any(|(node, at)| at == *address || Some(node) == name.as_ref())
                });
                for (address, _) in absent {
                    let (list, address, counters) = (list.clone(), *address, counters.clone());
                    tokio::spawn(async move {
                        let call = list.join(MaybeResolvedAddress::Resolved(address));
                        match tokio::time::timeout(REJOIN_EVERY, call).await {
                            Ok(Ok(_)) => {}
                            Ok(Err(error)) => {
                                counters.failed_joins.fetch_add(1, Ordering::Relaxed);
                                tracing::debug!(%address, %error, "an absent speaker does not answer");
                            }
                            Err(_) => {
                                counters.failed_joins.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    });
                }
            }
        }
    }
}

async fn send(
    list: &List,
    members: &Members,
    to: Option<NodeName>,
    frame: Bytes,
    counters: &Counters,
) {
    let addresses: Vec<SocketAddr> = {
        let members: &BTreeMap<NodeName, SocketAddr> = &members.lock();
        match to {
            Some(node) => members.get(&node).copied().into_iter().collect(),
            None => members.values().copied().collect(),
        }
    };
    for address in addresses {
        if let Err(error) = list.send(&address, frame.clone()).await {
            counters.dropped_frames.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%address, %error, "a frame was not sent");
        }
    }
}

#[async_trait]
impl Membership for Gossip {
    fn send(&self, to: Option<&NodeName>, frame: Bytes) {
        if self
            .commands
            .try_send(Command::Send(to.cloned(), frame))
            .is_err()
        {
            self.counters.dropped_frames.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn expect(&self, expected: Expected) {
        if self.commands.try_send(Command::Expect(expected)).is_err() {
            tracing::warn!("the list of speakers to call could not be queued");
        }
    }

    fn rekey(&self, keys: &Keys) {
        let Some(ring) = self.list.keyring() else {
            return;
        };
        for key in keys.all() {
            ring.insert(secret(key));
        }
        if let Err(error) = ring.use_key(&keys.primary().0) {
            tracing::error!(%error, key = keys.primary().id(), "the new gossip key is not used");
            return;
        }
        let kept: Vec<SecretKey> = keys.all().iter().map(secret).collect();
        for old in ring.keys().filter(|key| !kept.contains(key)) {
            if let Err(error) = ring.remove(old.as_ref()) {
                tracing::error!(%error, "an old gossip key stays in force");
            }
        }
    }

    async fn leave(&self, within: Duration) {
        if let Err(error) = self.list.leave(within).await {
            tracing::debug!(%error, "nobody heard the goodbye");
        }
        if let Err(error) = self.list.shutdown().await {
            tracing::debug!(%error, "the gossip did not end cleanly");
        }
    }
}
