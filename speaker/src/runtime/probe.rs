//! Asks health-check ports and processes of this node whether they serve, without holding up the loop.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use landfall_core::groups::GroupId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::elector::ready::Health;

/// Health-check ports are asked this often, and no more than a thousand a second in all.
const HEALTH_EVERY: Duration = Duration::from_millis(20);
const HEALTH_PACE: Duration = Duration::from_millis(1);
/// A process of this node is asked this often.
const HOSTS_EVERY: Duration = Duration::from_secs(1);
/// No answer after this long is one.
const PATIENCE: Duration = Duration::from_millis(500);

/// What was found.
pub(super) enum Answer {
    /// What a health-check port said of its Service.
    Health(GroupId, u16, Health),
    /// Whether a process takes connections.
    Host(SocketAddr, bool),
}

/// Asks, one question of a kind at a time.
pub(super) struct Prober {
    own: IpAddr,
    asking: BTreeSet<(GroupId, u16)>,
    sender: mpsc::UnboundedSender<Outcome>,
    receiver: mpsc::UnboundedReceiver<Outcome>,
    health_at: Duration,
    hosts_at: Duration,
}

enum Outcome {
    Health(GroupId, u16, Health),
    Host(SocketAddr, bool),
}

impl Prober {
    pub(super) fn new(own: IpAddr) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            own,
            asking: BTreeSet::new(),
            sender,
            receiver,
            health_at: Duration::ZERO,
            hosts_at: Duration::ZERO,
        }
    }

    /// When health-check ports are to be asked again.
    pub(super) fn health_at(&self) -> Duration {
        self.health_at
    }

    /// Asks the health-check ports that are not being asked already.
    pub(super) fn ask_health<'a>(
        &mut self,
        questions: impl ExactSizeIterator<Item = &'a (GroupId, u16)>,
        now: Duration,
    ) {
        let number = u32::try_from(questions.len()).unwrap_or(u32::MAX);
        self.health_at = now + HEALTH_EVERY.max(HEALTH_PACE.saturating_mul(number));
        for question in questions {
            if !self.asking.insert(question.clone()) {
                continue;
            }
            let (id, port) = question.clone();
            let (sender, address) = (self.sender.clone(), SocketAddr::new(self.own, port));
            tokio::spawn(async move {
                let asked = tokio::time::timeout(PATIENCE, health(address)).await;
                let answer = match asked {
                    Ok(Ok(true)) => Health::Serving,
                    Ok(Ok(false)) => Health::NotServing,
                    Ok(Err(_)) | Err(_) => Health::Silent,
                };
                let _ = sender.send(Outcome::Health(id, port, answer));
            });
        }
    }

    /// Whether processes of this node are to be asked again.
    pub(super) fn asks_hosts(&self, now: Duration) -> bool {
        now >= self.hosts_at
    }

    /// Asks processes of this node.
    pub(super) fn ask_hosts(&mut self, endpoints: BTreeSet<SocketAddr>, now: Duration) {
        self.hosts_at = now + HOSTS_EVERY;
        for endpoint in endpoints {
            let sender = self.sender.clone();
            tokio::spawn(async move {
                let alive = tokio::time::timeout(PATIENCE, TcpStream::connect(endpoint))
                    .await
                    .is_ok_and(|answer| answer.is_ok());
                let _ = sender.send(Outcome::Host(endpoint, alive));
            });
        }
    }

    /// The next answer.
    pub(super) async fn next(&mut self) -> Answer {
        match self.receiver.recv().await {
            Some(Outcome::Health(id, port, answer)) => {
                self.asking.remove(&(id.clone(), port));
                Answer::Health(id, port, answer)
            }
            Some(Outcome::Host(endpoint, alive)) => Answer::Host(endpoint, alive),
            None => std::future::pending().await,
        }
    }
}

/// Whether a health-check port answers 200.
async fn health(address: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
        .await?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await?;
    Ok(answer.starts_with(b"HTTP/1.") && answer.ends_with(b" 200"))
}
