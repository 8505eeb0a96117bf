//! The task of a leader: the one owner of the indexes and of the writer.

mod policies;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use landfall_core::ipam::{Config, Ipam};
use landfall_core::model::Event;
use landfall_runtime::source::Source;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::lease::Term;
use crate::metrics::Metrics;
use crate::writer::{Sink, Write, Writer, sleep_until};
use policies::Policies;

/// So many events are taken in before writes are begun.
const BATCH: usize = 512;

/// What is known in a term.
#[derive(Debug)]
struct Known {
    ipam: Ipam,
    policies: Policies,
}

/// What others may look at: the indexes of the current term, if there is one.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<Mutex<Option<Known>>>);

impl Shared {
    fn with<T>(&self, look: impl FnOnce(&mut Option<Known>) -> T) -> T {
        // A panic while it was held leaves at worst an index that is thrown away with its term.
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether this process leads and has replayed what it found.
    pub fn is_ready(&self) -> bool {
        self.with(|known| known.as_ref().is_some_and(|known| known.ipam.is_ready()))
    }

    /// Who holds what, as JSON for `/debug/state`.
    pub fn debug_state(&self) -> Value {
        self.with(|known| match known {
            None => json!({ "leader": false }),
            Some(Known { ipam, policies }) => json!({
                "leader": true,
                "ready": ipam.is_ready(),
                "services": ipam.service_count(),
                "assignments": ipam.assignments().map(|record| json!({
                    "address": record.address.to_string(),
                    "pool": &*record.pool,
                    "group": &*record.group,
                    "services": record.services.iter().map(ToString::to_string).collect::<Vec<_>>(),
                    "egressPolicies": record.egress_policies,
                })).collect::<Vec<_>>(),
                "resting": ipam.resting().map(|(record, _)| json!({
                    "address": record.address.to_string(),
                    "pool": &*record.pool,
                    "former": record.former.iter().map(ToString::to_string).collect::<Vec<_>>(),
                    "formerEgressPolicies": record.former_policies,
                })).collect::<Vec<_>>(),
                "refusals": ipam.refusals().map(|(key, refusal)| json!({
                    "service": key.to_string(),
                    "reason": refusal.reason(),
                    "message": refusal.to_string(),
                })).collect::<Vec<_>>(),
                "policies": policies.debug(),
                "pools": ipam.pool_statuses().map(|status| json!({
                    "name": &*status.name,
                    "ipv4": { "total": status.v4.total.to_string(), "assigned": status.v4.assigned.to_string(),
                              "quarantined": status.v4.quarantined.to_string(), "available": status.v4.available.to_string() },
                    "ipv6": { "total": status.v6.total.to_string(), "assigned": status.v6.assigned.to_string(),
                              "quarantined": status.v6.quarantined.to_string(), "available": status.v6.available.to_string() },
                    "overlaps": status.overlaps.len(),
                })).collect::<Vec<_>>(),
            }),
        })
    }
}

/// How a term's work is done.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The allocator's rules.
    pub ipam: Config,
    /// How many writes may be in flight.
    pub concurrency: usize,
    /// How long a write may take.
    pub write_timeout: Duration,
}

/// Indexes what `source` says and writes what follows from it, until the term ends or the source does.
/// Returns only when no write is in flight any more.
pub async fn run<S: Sink>(
    mut source: Source,
    sink: Arc<S>,
    settings: Settings,
    term: Term,
    shared: Shared,
    metrics: Metrics,
) {
    let origin = Instant::now();
    let mut writer = Writer::new(
        sink,
        term.clone(),
        metrics.clone(),
        settings.concurrency,
        settings.write_timeout,
    );
    shared.with(|known| {
        *known = Some(Known {
            ipam: Ipam::new(settings.ipam),
            policies: Policies::default(),
        });
    });
    let mut wake: Option<Instant> = None;
    loop {
        tokio::select! {
            () = term.ended() => break,
            event = source.events.recv() => {
                let Some(event) = event else {
                    tracing::error!("the source of objects ended");
                    break;
                };
                let mut batch = vec![event];
                while batch.len() < BATCH && let Ok(event) = source.events.try_recv() {
                    batch.push(event);
                }
                wake = advance(&shared, &mut writer, &metrics, batch, origin);
            }
            () = sleep_until(wake) => {
                wake = advance(&shared, &mut writer, &metrics, Vec::new(), origin);
            }
            () = writer.progress() => {}
        }
        writer.dispatch();
    }
    writer.finish().await;
    shared.with(|known| *known = None);
    metrics.clear();
}

/// Takes a batch in, hands the writer what follows, and says when to look again.
fn advance<S: Sink>(
    shared: &Shared,
    writer: &mut Writer<S>,
    metrics: &Metrics,
    batch: Vec<Event>,
    origin: Instant,
) -> Option<Instant> {
    let now = origin.elapsed();
    let (changes, statuses, wake) = shared.with(|known| {
        let Known { ipam, policies } = known.as_mut()?;
        let was_ready = ipam.is_ready();
        for event in batch {
            policies.apply(&event);
            ipam.apply(event, now);
        }
        let changes = ipam.reconcile(now);
        let statuses = policies.reconcile(ipam, &changes.policies);
        if ipam.is_ready() && !was_ready {
            tracing::info!(
                services = ipam.service_count(),
                "everything is listed and replayed"
            );
        }
        metrics.known_services(ipam.service_count());
        Some((changes, statuses, ipam.next_wakeup()))
    })?;
    metrics.decided(&changes);
    writer.submit_all(changes);
    for status in statuses {
        writer.submit(Write::Policy(status));
    }
    wake.map(|wake| origin + wake)
}
