//! The lines to other speakers: those that call, and those that are called.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use landfall_core::model::NodeName;
use landfall_core::replication::Message;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::channel::{self, ChannelError, Receiver, Sender};
use super::metrics::Metrics;
use crate::keys::Keys;

/// How many messages wait for a line.
const QUEUE: usize = 64;
/// How many callers there may be: more are turned away.
const MAX_CALLERS: usize = 256;
/// How long to connect may take, and how long to wait before it is tried again.
const CONNECT: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(250);
/// How long what is sent may go unacknowledged before the line is given up.
const UNHEARD: Duration = Duration::from_secs(5);

/// A line's number.
pub(super) type LineId = u64;

/// A line to a node.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) node: NodeName,
    /// This node called: the other is the gateway.
    pub(super) called: bool,
    /// What to send.
    pub(super) to: mpsc::Sender<Message>,
}

/// What is heard of lines.
#[derive(Debug)]
pub(super) enum Heard {
    /// One is there.
    Up(LineId, Line),
    /// Something was said.
    Said(LineId, Message),
    /// It is gone.
    Down(LineId),
}

/// All lines.
#[derive(Debug)]
pub(super) struct Peers {
    speaking: Speaking,
    calls: BTreeMap<NodeName, (SocketAddr, AbortOnDropHandle<()>)>,
    seats: Arc<Semaphore>,
}

/// What every line's task needs.
#[derive(Clone, Debug)]
struct Speaking {
    node: NodeName,
    keys: watch::Receiver<Keys>,
    heard: mpsc::Sender<Heard>,
    numbers: Arc<std::sync::atomic::AtomicU64>,
    metrics: Metrics,
}

impl Peers {
    pub(super) fn new(
        node: NodeName,
        keys: watch::Receiver<Keys>,
        metrics: Metrics,
    ) -> (Self, mpsc::Receiver<Heard>) {
        let (heard, hears) = mpsc::channel(QUEUE);
        let speaking = Speaking {
            node,
            keys,
            heard,
            numbers: Arc::default(),
            metrics,
        };
        let peers = Self {
            speaking,
            calls: BTreeMap::new(),
            seats: Arc::new(Semaphore::new(MAX_CALLERS)),
        };
        (peers, hears)
    }

    /// Calls these nodes, again and again, and nobody else: those that were called and are so no longer.
    pub(super) fn call(&mut self, gateways: &BTreeMap<NodeName, SocketAddr>) -> BTreeSet<NodeName> {
        let mut left = BTreeSet::new();
        self.calls.retain(|node, (at, _)| {
            let stays = gateways.get(node) == Some(at);
            if !stays {
                left.insert(node.clone());
            }
            stays
        });
        for (node, at) in gateways {
            self.calls.entry(node.clone()).or_insert_with(|| {
                let speaking = self.speaking.clone();
                let task = tokio::spawn(speaking.calls(node.clone(), *at));
                (*at, AbortOnDropHandle::new(task))
            });
        }
        left
    }

    /// Somebody calls.
    pub(super) fn take(&self, stream: TcpStream, from: SocketAddr) {
        let Ok(seat) = self.seats.clone().try_acquire_owned() else {
            warn!(%from, "replication: {MAX_CALLERS} callers already, another was turned away");
            return;
        };
        let speaking = self.speaking.clone();
        tokio::spawn(async move {
            if let Err(error) = speaking.answers(stream).await {
                speaking.note(&error);
                debug!(%from, %error, "replication: a caller is gone");
            }
            drop(seat);
        });
    }
}

impl Speaking {
    fn note(&self, error: &ChannelError) {
        match error {
            ChannelError::Io(_) => {}
            ChannelError::Key | ChannelError::Silent => self.metrics.refuse("key"),
            ChannelError::Message(_) => self.metrics.refuse("message"),
        }
    }

    async fn calls(self, node: NodeName, at: SocketAddr) {
        let mut failing = false;
        loop {
            match self.calls_once(&node, at).await {
                // It was there.
                Ok(()) => failing = false,
                Err(error) => {
                    self.note(&error);
                    if !failing {
                        info!(gateway = %node, %at, %error, "replication: the gateway cannot be followed; trying on");
                    }
                    failing = true;
                }
            }
            sleep(AGAIN).await;
        }
    }

    async fn calls_once(&self, node: &NodeName, at: SocketAddr) -> Result<(), ChannelError> {
        let stream = timeout(CONNECT, TcpStream::connect(at))
            .await
            .map_err(|_| ChannelError::Silent)??;
        prepare(&stream)?;
        let keys = self.keys.borrow().clone();
        let (mut sender, receiver) = channel::call(stream, &keys).await?;
        let hello = Message::Hello {
            node: self.node.clone(),
        };
        self.metrics.bytes.inc_by(sender.send(&hello).await? as u64);
        self.talk(node.clone(), true, sender, receiver).await;
        Ok(())
    }

    async fn answers(&self, stream: TcpStream) -> Result<(), ChannelError> {
        prepare(&stream)?;
        let keys = self.keys.borrow().clone();
        let (sender, mut receiver) = channel::answer(stream, &keys).await?;
        let Message::Hello { node } = receiver.first().await? else {
            return Err(landfall_core::replication::MessageError::Malformed.into());
        };
        self.talk(node, false, sender, receiver).await;
        Ok(())
    }

    /// Carries messages until either side has enough.
    async fn talk(&self, node: NodeName, called: bool, mut sender: Sender, mut receiver: Receiver) {
        let number = self
            .numbers
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (to, mut queue) = mpsc::channel::<Message>(QUEUE);
        let line = Line { node, called, to };
        if self.heard.send(Heard::Up(number, line)).await.is_err() {
            return;
        }
        let sends = async {
            while let Some(message) = queue.recv().await {
                match sender.send(&message).await {
                    Ok(bytes) => self.metrics.bytes.inc_by(bytes as u64),
                    Err(error) => return error,
                };
            }
            std::io::Error::from(std::io::ErrorKind::ConnectionAborted).into()
        };
        let receives = async {
            loop {
                match receiver.receive().await {
                    Ok(message) => {
                        let said = Heard::Said(number, message);
                        if self.heard.send(said).await.is_err() {
                            return std::io::Error::from(std::io::ErrorKind::ConnectionAborted)
                                .into();
                        }
                    }
                    Err(error) => return error,
                }
            }
        };
        let error: ChannelError = tokio::select! {
            error = sends => error,
            error = receives => error,
        };
        self.note(&error);
        debug!(%error, "replication: a line is gone");
        let _ = self.heard.send(Heard::Down(number)).await;
    }
}

/// Small messages go at once, and a peer that has vanished is noticed.
fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(UNHEARD))?;
    let alive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(1))
        .with_interval(Duration::from_secs(1));
    socket.set_tcp_keepalive(&alive)
}
