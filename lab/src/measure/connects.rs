//! New connections, one after the other's time, whether or not the earlier ones came about.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use crate::measure::{Stop, Worker};
use crate::netns::Netns;

/// The time between two attempts, unless another is asked for.
const INTERVAL: Duration = Duration::from_millis(50);
/// After which an attempt has failed.
const LIMIT: Duration = Duration::from_secs(15);

/// What the connections took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The time of each that came about.
    pub established: Vec<Duration>,
    /// How many were refused or had not come about after 15 s or at the end.
    pub failed: usize,
}

impl Report {
    /// The longest `connect()` that came about.
    pub fn worst(&self) -> Option<Duration> {
        self.established.iter().max().copied()
    }
}

/// A running probe.
#[derive(Debug)]
pub struct Probe(Worker<Report>);

impl Probe {
    /// Begins to connect to `to` every 50 ms.
    pub fn start(from: &Netns, to: SocketAddr) -> Self {
        Self::start_every(from, to, INTERVAL)
    }

    /// The same at another pace.
    pub fn start_every(from: &Netns, to: SocketAddr, pace: Duration) -> Self {
        Self(Worker::start_async(from, "connects", move |stop| {
            connect(to, pace, stop)
        }))
    }

    /// Ends it, after the attempts that are still on their way: at most 3 s.
    pub fn stop(self) -> Report {
        self.0.stop()
    }
}

async fn connect(to: SocketAddr, pace: Duration, stop: Stop) -> Report {
    let mut attempts = JoinSet::new();
    let mut report = Report::default();
    let mut due = interval(pace);
    let count = |outcome: Option<Duration>, report: &mut Report| match outcome {
        Some(took) => report.established.push(took),
        None => report.failed += 1,
    };
    while !stop.asked() {
        tokio::select! {
            _ = due.tick() => {
                attempts.spawn(async move {
                    let begun = Instant::now();
                    let stream = timeout(LIMIT, TcpStream::connect(to)).await.ok()?.ok()?;
                    let took = begun.elapsed();
                    drop(stream);
                    Some(took)
                });
            }
            Some(ended) = attempts.join_next() => count(ended.ok().flatten(), &mut report),
        }
    }
    let rest = timeout(Duration::from_secs(3), async {
        while let Some(ended) = attempts.join_next().await {
            count(ended.ok().flatten(), &mut report);
        }
    });
    let _ = rest.await;
    report.failed += attempts.len();
    report
}
