//! The flows that this node delivers: those that were there before the programs, those that are no more, and those whose
//! buckets are another node's by now.
//!
//! A thread of its own: to look through a quarter of a million flows takes a while, and a node's death must not wait
//! for it.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use landfall_core::model::{NodeName, Protocol};
use landfall_core::steering;
use landfall_ebpf_common::FlowKey;
use landfall_ebpf_common::rendezvous::{bucket, hash};

use super::thread;
use super::worker::{SharedTables, lock};
use super::{Held, PortId, PortState};
use compare::{Known, reconcile};
pub(super) use maps::FlowMaps;

mod compare;
mod maps;

/// How soon the flows are compared again when that failed.
const RETRY: Duration = Duration::from_secs(10);
/// How often it is looked which flows are in buckets of others, while there are any.
const LOOK: Duration = Duration::from_secs(2);
/// How long a bucket that has come home still counts as held: in a flurry of changes it may be another's again before this
/// node could say that it holds flows of it.
const AT_HOME: Duration = Duration::from_secs(10);
/// Changes of the tables are gathered for so long.
const GATHER: Duration = Duration::from_millis(50);
/// What the thread is told, and what it tells.
#[expect(clippy::struct_excessive_bools, reason = "independent switches")]
#[derive(Debug, Default)]
struct State {
    maps: Option<FlowMaps>,
    /// All VIPs are known: what was there before can be told from what is not.
    complete: bool,
    here: Option<NodeName>,
    vips: HashSet<IpAddr>,
    ports: BTreeMap<PortId, PortState>,
    /// Some port is spread otherwise than when it was looked last.
    moved: bool,
    /// Some port has lost an endpoint of this node.
    withdrawn: bool,
    /// Packets may have passed the programs by.
    missed: bool,
    /// The maps are new, and what there was before is to be looked for.
    new: bool,
    /// The flows have been compared with connection tracking, or cannot be.
    compared: bool,
    held: Arc<Held>,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Flows {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Flows {
    /// `compare`: how often the flows are compared with connection tracking.
    pub(super) fn start(tables: SharedTables, compare: Duration) -> Self {
        let shared = Arc::new(Shared::default());
        let mut task = Task {
            shared: Arc::clone(&shared),
            tables,
            compare,
            compare_at: Instant::now(),
            look_at: Instant::now(),
            away: BTreeMap::new(),
        };
        let thread = thread::start("flows", move || task.run());
        Self {
            shared,
            thread: Some(thread),
        }
    }

    fn tell(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.shared.state));
        self.shared.wake.notify_all();
    }

    /// The maps are there; `new`, if no earlier process has filled them.
    pub(super) fn install(&self, maps: FlowMaps, new: bool) {
        self.tell(|state| {
            state.maps = Some(maps);
            state.new = new;
            state.missed = true;
        });
    }

    /// All VIPs were named.
    pub(super) fn complete(&self) {
        self.tell(|state| {
            state.missed |= !std::mem::replace(&mut state.complete, true);
        });
    }

    /// Packets may have passed the programs by.
    pub(super) fn missed(&self) {
        self.tell(|state| state.missed = true);
    }

    /// What this node is called.
    pub(super) fn here(&self, name: &NodeName) {
        lock(&self.shared.state).here.get_or_insert(name.clone());
    }

    /// A VIP is there, or not any more.
    pub(super) fn vip(&self, vip: IpAddr, there: bool) {
        let mut state = lock(&self.shared.state);
        if there {
            state.vips.insert(vip);
        } else {
            state.vips.remove(&vip);
        }
    }

    /// How a port is spread.
    pub(super) fn port(&self, id: PortId, port: Option<&PortState>) {
        self.tell(|state| {
            let before = match port {
                Some(port) => state.ports.insert(id, port.clone()),
                None => state.ports.remove(&id),
            };
            state.moved |= id.protocol == Protocol::Tcp;
            state.withdrawn |= before
                .and_then(|before| before.native)
                .is_some_and(|before| {
                    let now = port.and_then(|port| port.native.as_ref());
                    now.is_none_or(|now| !before.endpoints.is_subset(&now.endpoints))
                });
        });
    }

    /// Whether the flows that were there before have been entered, or cannot be.
    pub(super) fn has_compared(&self) -> bool {
        lock(&self.shared.state).compared
    }

    /// Of which buckets this node holds flows though they are another's.
    pub(super) fn held(&self) -> Arc<Held> {
        Arc::clone(&lock(&self.shared.state).held)
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        self.tell(|state| state.stop = true);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

struct Task {
    shared: Arc<Shared>,
    tables: SharedTables,
    compare: Duration,
    compare_at: Instant,
    look_at: Instant,
    /// When buckets of which this node holds flows were another's last.
    away: BTreeMap<(PortId, u32), Instant>,
}

impl Task {
    fn run(&mut self) {
        while let Some(mut maps) = self.wait() {
            std::thread::sleep(GATHER);
            if Instant::now() >= self.compare_at {
                self.compare(&mut maps);
            }
            self.look(&maps);
            self.withdraw(&mut maps);
            lock(&self.shared.state).maps.get_or_insert(maps);
        }
    }

    /// Waits until there is something to do, and takes the maps. Nothing: stop.
    fn wait(&mut self) -> Option<FlowMaps> {
        let mut state = lock(&self.shared.state);
        loop {
            if state.stop {
                return None;
            }
            if state.complete && state.maps.is_some() {
                if std::mem::take(&mut state.missed) {
                    self.compare_at = Instant::now();
                }
                let moved = std::mem::take(&mut state.moved);
                let now = Instant::now();
                let look = !state.held.is_empty() && now >= self.look_at;
                if (moved || look || state.withdrawn || now >= self.compare_at)
                    && let Some(maps) = state.maps.take()
                {
                    return Some(maps);
                }
            }
            let (woken, _) = self
                .shared
                .wake
                .wait_timeout(state, LOOK)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
    }

    /// Compares the flows with connection tracking. From the first time on, what is not known here may be looked for
    /// elsewhere.
    fn compare(&mut self, maps: &mut FlowMaps) {
        let known = {
            let state = lock(&self.shared.state);
            Known::new(&state.vips, &state.ports, state.new)
        };
        let compared = reconcile(maps, &known).map_err(|error| error.to_string());
        let seeded = compared.and_then(|reconciled| {
            tracing::debug!(?reconciled, "compared with connection tracking");
            match lock(&self.tables).as_mut() {
                Some(tables) => tables.entered().map_err(|error| error.to_string()),
                None => Ok(()),
            }
        });
        self.compare_at = Instant::now() + self.compare;
        let failed = seeded.is_err();
        if let Err(error) = seeded {
            tracing::warn!(
                error,
                "no connection tracking to compare with: nothing is handed on to earlier holders of a flow"
            );
            self.compare_at = Instant::now() + RETRY;
        }
        let mut state = lock(&self.shared.state);
        state.new &= failed;
        state.compared = true;
    }

    /// Looks which flows are in buckets of other nodes, or were just now.
    fn look(&mut self, maps: &FlowMaps) {
        let now = Instant::now();
        self.look_at = now + LOOK;
        self.away.retain(|_, last| now - *last < AT_HOME);
        let flows: Vec<FlowKey> = maps.flows.keys().flatten().collect();
        let mut state = lock(&self.shared.state);
        let Some(here) = state.here.clone() else {
            return;
        };
        let mut held = Held::new();
        for flow in flows {
            let id = PortId {
                vip: flow.vip.address(),
                protocol: Protocol::Tcp,
                port: flow.port,
            };
            let Some(port) = state.ports.get(&id) else {
                continue;
            };
            let bucket = bucket_of(&flow, port);
            if steering::first(&port.nodes, bucket) != Some(&here) {
                self.away.insert((id, bucket), now);
            }
            if self.away.contains_key(&(id, bucket)) {
                held.entry(id).or_default().insert(bucket);
            }
        }
        if *state.held != held {
            state.held = Arc::new(held);
        }
    }

    /// Forgets the flows without connections whose endpoints are gone: nothing would ever end them.
    fn withdraw(&mut self, maps: &mut FlowMaps) {
        let endpoints = {
            let mut state = lock(&self.shared.state);
            if !std::mem::take(&mut state.withdrawn) {
                return;
            }
            compare::endpoints_of(&state.ports)
        };
        maps.forget_datagrams(|flow, endpoint| {
            endpoints
                .get(endpoint)
                .is_none_or(|ports| !ports.contains(&(flow.vip, flow.protocol, flow.port)))
        });
    }
}

fn bucket_of(flow: &FlowKey, port: &PortState) -> u32 {
    let rest = if port.affinity {
        0
    } else {
        u32::from(flow.client_port) << 16 | u32::from(flow.port)
    };
    bucket(hash(&flow.client, &flow.vip.0, rest))
}
