//! Writes what the index asks for: bounded, serial per object, newest wins, and never loses one.
//!
//! ```text
//!  submit ──> slot per object {wanted, flying} ──ready queue──> at most `concurrency` in flight ──> Sink
//!                 ^                                                        │
//!                 └────────────── failed: again, after a back-off ─────────┘
//! ```

pub mod body;
pub mod kubernetes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use landfall_core::ipam::{Changes, Notice, PoolStatus, RecordChange, ServiceStatus};
use landfall_core::model::{EgressStatus, Holder, ObjectKey};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use crate::lease::Term;
use crate::metrics::Metrics;

/// The first wait after a failed write; it doubles up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(100);
/// The longest wait after a failed write.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// The status of a pool, or of an egress policy, is written at most this often.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// How much of an object's name is in that of an Event about it: 253 characters all in all.
const MAX_NAME: usize = 230;

/// Where writes go. Its twin in tests keeps them in memory.
pub trait Sink: Send + Sync + 'static {
    /// Does it. Must be idempotent: a write that failed may have happened.
    fn write(&self, write: Write) -> Pin<Box<dyn Future<Output = Result<(), WriteError>> + Send>>;
}

/// Why a write failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteError {
    /// The object is no more, or is another one of the same name: there is nothing to write.
    #[error("the object is gone")]
    Gone,
    /// Anything else; it is tried again.
    #[error("{0}")]
    Failed(String),
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Create, update or delete a `VirtualIP`.
    Record(RecordChange),
    /// Write a Service's status.
    Service(ServiceStatus),
    /// Write a pool's status.
    Pool(PoolStatus),
    /// Write an egress policy's status.
    Policy(PolicyStatus),
    /// Record an Event.
    Event(EventNote),
}

/// What an egress policy's status should say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyStatus {
    /// Which policy.
    pub name: Arc<str>,
    /// Its UID.
    pub uid: String,
    /// What it should say.
    pub status: EgressStatus,
    /// Since when a condition is what it is, by type, in seconds since the Unix epoch; of others it has just become so.
    pub since: BTreeMap<String, i64>,
    /// Events to record once the status is written.
    pub notices: Vec<Notice>,
}

/// An Event to record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventNote {
    /// The Event's name, given once: however often it is sent, it exists once.
    pub name: String,
    /// What it is about.
    pub about: Holder,
    /// Its UID.
    pub uid: String,
    /// What it says.
    pub notice: Notice,
    /// When it happened.
    pub at: jiff::Timestamp,
}

/// What a write is about. Writes about one target never overlap.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Target {
    Record(IpAddr),
    Service(ObjectKey),
    Pool(Arc<str>),
    Policy(Arc<str>),
    Event(String),
}

impl Target {
    /// Whether it is written at most once in [`STATUS_INTERVAL`].
    fn is_paced(&self) -> bool {
        match self {
            Self::Pool(_) | Self::Policy(_) => true,
            Self::Record(_) | Self::Service(_) | Self::Event(_) => false,
        }
    }
}

impl Write {
    fn target(&self) -> Target {
        match self {
            Self::Record(change) => Target::Record(change.address()),
            Self::Service(status) => Target::Service(status.key.clone()),
            Self::Pool(status) => Target::Pool(status.name.clone()),
            Self::Policy(status) => Target::Policy(status.name.clone()),
            Self::Event(note) => Target::Event(note.name.clone()),
        }
    }

    /// The kind of object, as metrics name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Record(_) => "virtualip",
            Self::Service(_) => "service",
            Self::Pool(_) => "ipaddresspool",
            Self::Policy(_) => "egresspolicy",
            Self::Event(_) => "event",
        }
    }

    /// Whether the two leave the same behind.
    fn same_effect(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Service(a), Self::Service(b)) => {
                a.ingress == b.ingress && a.conditions == b.conditions && a.uid == b.uid
            }
            (Self::Policy(a), Self::Policy(b)) => a.status == b.status && a.uid == b.uid,
            (a, b) => a == b,
        }
    }

    /// Takes over the Events of an older write about the same object that this one takes the place of.
    fn inherit(&mut self, older: Self) {
        match (self, older) {
            (Self::Service(status), Self::Service(older)) if status.notice.is_none() => {
                status.notice = older.notice;
            }
            (Self::Policy(status), Self::Policy(older)) => {
                status.notices = older
                    .notices
                    .into_iter()
                    .chain(std::mem::take(&mut status.notices))
                    .collect();
            }
            _ => {}
        }
    }

    /// The Events to record once it is done.
    fn notes(self) -> Vec<EventNote> {
        match self {
            Self::Service(status) => {
                let about = Holder::Service(status.key);
                let notices = status.notice.into_iter();
                notices
                    .map(|notice| EventNote::new(&about, &status.uid, notice))
                    .collect()
            }
            Self::Policy(status) => {
                let about = Holder::EgressPolicy(status.name);
                let notices = status.notices.into_iter();
                notices
                    .map(|notice| EventNote::new(&about, &status.uid, notice))
                    .collect()
            }
            Self::Record(_) | Self::Pool(_) | Self::Event(_) => Vec::new(),
        }
    }
}

/// What is to be written about one object.
#[derive(Debug, Default)]
struct Slot {
    wanted: Option<Write>,
    flying: Option<Write>,
    failures: u32,
    /// Not before then.
    gate: Option<Instant>,
}

/// The writer of one term. Dropping it aborts what is in flight; [`Writer::finish`] waits for it.
pub struct Writer<S> {
    sink: Arc<S>,
    term: Term,
    metrics: Metrics,
    concurrency: usize,
    timeout: Duration,
    slots: HashMap<Target, Slot>,
    ready: VecDeque<Target>,
    delayed: BTreeMap<(Instant, u64), Target>,
    flights: JoinSet<(Target, Result<(), WriteError>)>,
    sequence: u64,
    /// When what is paced may be written again.
    gates: HashMap<Target, Instant>,
}

impl<S: Sink> Writer<S> {
    /// A writer with nothing to do. `timeout` bounds each write.
    pub fn new(
        sink: Arc<S>,
        term: Term,
        metrics: Metrics,
        concurrency: usize,
        timeout: Duration,
    ) -> Self {
        Self {
            sink,
            term,
            metrics,
            concurrency,
            timeout,
            slots: HashMap::new(),
            ready: VecDeque::new(),
            delayed: BTreeMap::new(),
            flights: JoinSet::new(),
            sequence: 0,
            gates: HashMap::new(),
        }
    }

    /// Takes over what the index asks for.
    pub fn submit_all(&mut self, changes: Changes) {
        for change in changes.records {
            self.submit(Write::Record(change));
        }
        for status in changes.services {
            self.submit(Write::Service(status));
        }
        for status in changes.pools {
            self.submit(Write::Pool(status));
        }
        // `changes.policies` is for whoever knows their pods too: see `index::policies`.
        self.metrics.queued(self.slots.len());
    }

    /// Takes one write over, in place of an earlier one about the same object that has not begun.
    pub fn submit(&mut self, mut write: Write) {
        let target = write.target();
        let slot = self.slots.entry(target.clone()).or_default();
        if slot.gate.is_none() {
            slot.gate = self.gates.get(&target).copied();
        }
        if let Some(superseded) = slot.wanted.take() {
            write.inherit(superseded);
        }
        if let Some(flying) = &slot.flying {
            // What is in flight comes back as an event of its source; there the index compares anew.
            if !flying.same_effect(&write) {
                slot.wanted = Some(write);
                return;
            }
            // The Events of what was to be in between, too.
            let told = flying.clone().notes();
            let told = |note: &EventNote| told.iter().any(|told| told.notice == note.notice);
            let untold: Vec<EventNote> = write.notes().into_iter().filter(|it| !told(it)).collect();
            for note in untold {
                self.submit(Write::Event(note));
            }
            return;
        }
        slot.wanted = Some(write);
        match slot.gate {
            Some(gate) if gate > Instant::now() => self.delay(target, gate),
            Some(_) | None => self.ready.push_back(target),
        }
    }

    fn delay(&mut self, target: Target, until: Instant) {
        self.sequence += 1;
        self.delayed.insert((until, self.sequence), target);
    }

    /// Begins as many writes as may be in flight, if the term allows.
    pub fn dispatch(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.delayed.first_entry()
            && entry.key().0 <= now
        {
            let target = entry.remove();
            self.ready.push_back(target);
        }
        while self.flights.len() < self.concurrency {
            let Some(target) = self.ready.pop_front() else {
                return;
            };
            if !self.term.is_valid() {
                self.ready.push_front(target);
                return;
            }
            let Some(slot) = self.slots.get_mut(&target) else {
                continue;
            };
            // A target may be queued twice; the slot knows better.
            if slot.flying.is_some() || slot.gate.is_some_and(|gate| gate > now) {
                continue;
            }
            let Some(write) = slot.wanted.take() else {
                continue;
            };
            slot.flying = Some(write.clone());
            let attempt = self.sink.write(write);
            let limit = self.timeout;
            self.flights.spawn(async move {
                let result = match tokio::time::timeout(limit, attempt).await {
                    Ok(result) => result,
                    Err(_) => Err(WriteError::Failed(
                        "the API server did not answer in time".into(),
                    )),
                };
                (target, result)
            });
        }
    }

    /// Waits until a write is over or becomes due, and deals with it. Pending forever when there is nothing.
    pub async fn progress(&mut self) {
        let due = self.delayed.first_key_value().map(|(&(at, _), _)| at);
        tokio::select! {
            Some(landed) = self.flights.join_next() => self.land(landed),
            () = sleep_until(due) => {}
        }
        while let Some(landed) = self.flights.try_join_next() {
            self.land(landed);
        }
        self.metrics.queued(self.slots.len());
    }

    fn land(&mut self, landed: Result<(Target, Result<(), WriteError>), JoinError>) {
        let (target, result) = match landed {
            Ok(landed) => landed,
            Err(error) => {
                tracing::error!(%error, "a write panicked");
                return;
            }
        };
        let Some(slot) = self.slots.get_mut(&target) else {
            return;
        };
        let Some(write) = slot.flying.take() else {
            return;
        };
        self.metrics.written(&write, &result);
        let mut notes = Vec::new();
        match result {
            Ok(()) => {
                slot.failures = 0;
                slot.gate = None;
                if target.is_paced() {
                    let now = Instant::now();
                    let gate = now + STATUS_INTERVAL;
                    slot.gate = Some(gate);
                    self.gates.retain(|_, gate| *gate > now);
                    self.gates.insert(target.clone(), gate);
                }
                notes = write.notes();
            }
            Err(WriteError::Gone) => slot.failures = 0,
            Err(WriteError::Failed(error)) => {
                slot.failures += 1;
                let wait = backoff(slot.failures);
                tracing::warn!(%error, kind = write.kind(), target = ?target, ?wait, "a write failed, will try again");
                slot.gate = Some(Instant::now() + wait);
                // A newer wish takes its place, but not its Event.
                match &mut slot.wanted {
                    Some(newer) => newer.inherit(write),
                    wanted @ None => *wanted = Some(write),
                }
            }
        }
        let (wanted, gate) = (
            slot.wanted.is_some(),
            slot.gate.filter(|gate| *gate > Instant::now()),
        );
        match (wanted, gate) {
            (true, Some(gate)) => self.delay(target, gate),
            (true, None) => self.ready.push_back(target),
            (false, _) => {
                self.slots.remove(&target);
            }
        }
        for note in notes {
            self.submit(Write::Event(note));
        }
    }

    /// Whether nothing is left to write.
    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
            && self
                .slots
                .values()
                .all(|slot| slot.wanted.is_none() && slot.flying.is_none())
    }

    /// Begins nothing any more and waits for what is in flight, which the time-out bounds.
    pub async fn finish(mut self) {
        while let Some(landed) = self.flights.join_next().await {
            self.land(landed);
        }
        self.metrics.queued(0);
    }
}

impl EventNote {
    fn new(about: &Holder, uid: &str, notice: Notice) -> Self {
        let at = jiff::Timestamp::now();
        let name = match about {
            Holder::Service(key) => &key.name,
            Holder::EgressPolicy(name) => name,
        };
        let kept: String = name.chars().take(MAX_NAME).collect();
        let name = kept.trim_end_matches(['.', '-']);
        Self {
            name: format!("{name}.{:x}", at.as_nanosecond()),
            about: about.clone(),
            uid: uid.to_owned(),
            notice,
            at,
        }
    }

    /// Where it is recorded: what is in no namespace is told of in `default`.
    pub fn namespace(&self) -> &str {
        match &self.about {
            Holder::Service(key) => &key.namespace,
            Holder::EgressPolicy(_) => "default",
        }
    }
}

fn backoff(failures: u32) -> Duration {
    MIN_BACKOFF
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(MAX_BACKOFF)
}

/// Sleeps until then, or forever.
pub(crate) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
