//! Bindings in memory.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use landfall_core::replication::{Binding, Change};
use tokio::sync::mpsc;

use super::{Bindings, CHUNK, Chunk, Cursor, Happened};

/// A node's bindings, told of as a gateway's keeper tells of them.
#[derive(Debug)]
pub(super) struct Twin {
    held: Mutex<BTreeSet<Binding>>,
    /// Where each look through them is.
    looks: Mutex<Vec<Binding>>,
    tell: mpsc::Sender<Happened>,
}

impl Twin {
    pub(super) fn new() -> (Self, mpsc::Receiver<Happened>) {
        let (tell, told) = mpsc::channel(1_024);
        let twin = Self {
            held: Mutex::default(),
            looks: Mutex::default(),
            tell,
        };
        (twin, told)
    }

    pub(super) fn all(&self) -> MutexGuard<'_, BTreeSet<Binding>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gateway's own doing.
    pub(super) async fn change(&self, changes: Vec<Change>) {
        {
            let mut held = self.all();
            for change in &changes {
                match change {
                    Change::New(binding) => held.insert(*binding),
                    Change::Closed(binding) => held.remove(binding),
                };
            }
        }
        let told = self.tell.send(Happened::Changes(changes)).await;
        told.expect("somebody listens");
    }

    /// The same, of which nobody hears but that it happened.
    pub(super) async fn lose(&self, binding: Binding) {
        self.all().insert(binding);
        let told = self.tell.send(Happened::Lost).await;
        told.expect("somebody listens");
    }
}

#[async_trait]
impl Bindings for Twin {
    async fn insert(&self, bindings: Vec<Binding>) {
        self.all().extend(bindings);
    }

    async fn remove(&self, bindings: Vec<Binding>) {
        let mut held = self.all();
        for binding in bindings {
            held.remove(&binding);
        }
    }

    async fn keep(&self, addresses: &BTreeSet<IpAddr>, bindings: HashSet<Binding>) {
        self.all()
            .retain(|it| !addresses.contains(&it.egress_ip()) || bindings.contains(it));
    }

    async fn held(&self, addresses: &BTreeSet<IpAddr>, from: Option<Cursor>) -> Chunk {
        let mut looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let after = match from {
            Some(Cursor(at)) => {
                let at = usize::try_from(at).expect("it was an index");
                Bound::Excluded(looks[at])
            }
            None => Bound::Unbounded,
        };
        let held = self.all();
        let bindings: Vec<Binding> = held
            .range((after, Bound::Unbounded))
            .filter(|it| addresses.contains(&it.egress_ip()))
            .take(CHUNK)
            .copied()
            .collect();
        let next = (bindings.len() == CHUNK).then(|| {
            looks.push(*bindings.last().expect("it is full"));
            Cursor(looks.len() as u64 - 1)
        });
        Chunk { bindings, next }
    }
}
