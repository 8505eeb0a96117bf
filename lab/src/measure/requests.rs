//! A new connection for each request, at a steady pace, whether or not the earlier ones were answered.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::measure::stream::Flow;
use crate::measure::{Stop, Worker};
use crate::netns::Netns;

/// After which a request has failed.
const LIMIT: Duration = Duration::from_secs(15);

/// What became of the requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many each pod answered.
    pub answered: BTreeMap<String, usize>,
    /// The longest time from the connection's beginning to the answer.
    pub slowest: Duration,
    /// Why the others failed, and how long after the start of the probe each began.
    pub failed: Vec<(Duration, String)>,
}

/// A running probe.
#[derive(Debug)]
pub struct Probe(Worker<Report>);

impl Probe {
    /// Begins to ask a pod's line server, usually by a VIP, once every `pace`.
    pub fn start(from: &Netns, to: SocketAddr, pace: Duration) -> Self {
        Self(Worker::start_async(from, "requests", move |stop| {
            request(to, pace, stop)
        }))
    }

    /// Ends it, after the requests that are still on their way: at most 15 s.
    pub fn stop(self) -> Report {
        self.0.stop()
    }
}

/// When a request began, how long it took, and the pod that answered it.
type Outcome = (Duration, Duration, io::Result<String>);

async fn request(to: SocketAddr, pace: Duration, stop: Stop) -> Report {
    let start = Instant::now();
    let mut requests = JoinSet::new();
    let mut report = Report::default();
    let mut due = interval(pace);
    due.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while !stop.asked() {
        tokio::select! {
            _ = due.tick() => {
                requests.spawn(async move {
                    let begun = Instant::now();
                    let answer = timeout(LIMIT, ask(to)).await;
                    let answer = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                    (begun - start, begun.elapsed(), answer)
                });
            }
            Some(outcome) = requests.join_next() => note(outcome, &mut report),
        }
    }
    while let Some(outcome) = requests.join_next().await {
        note(outcome, &mut report);
    }
    report
}

/// The pod that answers.
async fn ask(to: SocketAddr) -> io::Result<String> {
    let answer = Flow::open(to).await?.ask().await?;
    Ok(answer.split(' ').next().unwrap_or_default().to_owned())
}

fn note(outcome: Result<Outcome, JoinError>, report: &mut Report) {
    let (begun, took, answer) = outcome.expect("a request does not panic and is not aborted");
    match answer {
        Ok(pod) => {
            *report.answered.entry(pod).or_default() += 1;
            report.slowest = report.slowest.max(took);
        }
        Err(error) => report.failed.push((begun, error.to_string())),
    }
}
