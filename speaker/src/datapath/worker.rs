//! The thread that makes the kernel hold what the loop wants, and looks every second whether it still does.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::net::if_::if_indextoname;
use prometheus_client::registry::Registry;

use super::counts::Counts;
use super::metrics::{AttachedLabels, Metrics, RestoredLabels};
use super::pins::Pins;
use super::uplink::{Restored, Uplink};
use super::{Attachment, Config, DataPath, DataPathState, VipCount};

/// How long to wait before a data path that could not be loaded is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// The data path of this node. Dropping it ends the thread and leaves programs and counts in the kernel.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    counts: Counts,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    orders: Mutex<Orders>,
    wake: Condvar,
    attachments: Mutex<BTreeMap<u32, Attachment>>,
}

#[derive(Debug, Default)]
struct Orders {
    /// What is wanted; nothing before the first call.
    desired: Option<DataPathState>,
    changed: bool,
    stop: bool,
}

impl Worker {
    pub(super) fn start(config: Config, registry: &mut Registry) -> Self {
        let shared = Arc::new(Shared::default());
        let counts = Counts::default();
        let metrics = Metrics::register(registry, counts.clone());
        let mut task = Task {
            config,
            shared: Arc::clone(&shared),
            counts: counts.clone(),
            metrics,
            uplink: None,
            last_reason: None,
        };
        let thread = thread::Builder::new()
            .name("datapath".to_owned())
            .spawn(move || task.run())
            .expect("the system has a thread to spare");
        Self {
            shared,
            counts,
            thread: Some(thread),
        }
    }
}

impl DataPath for Worker {
    fn apply(&self, state: DataPathState) {
        let mut orders = lock(&self.shared.orders);
        if orders.desired.as_ref() != Some(&state) {
            orders.desired = Some(state);
            orders.changed = true;
            self.shared.wake.notify_all();
        }
    }

    fn counts(&self) -> BTreeMap<IpAddr, VipCount> {
        self.counts.read()
    }

    fn attachments(&self) -> BTreeMap<u32, Attachment> {
        lock(&self.shared.attachments).clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        lock(&self.shared.orders).stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the thread owns.
struct Task {
    config: Config,
    shared: Arc<Shared>,
    counts: Counts,
    metrics: Metrics,
    uplink: Option<Uplink>,
    last_reason: Option<String>,
}

impl Task {
    fn run(&mut self) {
        while let Some((state, changed)) = self.wait() {
            if let Err(reason) = self.loaded() {
                self.absent(&state, &reason);
                continue;
            }
            if changed && let Err(error) = self.counts.keep(&state.vips) {
                tracing::warn!(%error, "the data path's map does not hold all VIPs");
            }
            self.attach(&state);
        }
    }

    /// Waits for new orders or for the next look. Nothing: stop.
    fn wait(&self) -> Option<(DataPathState, bool)> {
        let patience = if self.uplink.is_some() || self.last_reason.is_none() {
            self.config.watch
        } else {
            RETRY
        };
        let orders = lock(&self.shared.orders);
        let (mut orders, _) = self
            .shared
            .wake
            .wait_timeout_while(orders, patience, |orders| !orders.changed && !orders.stop)
            .unwrap_or_else(PoisonError::into_inner);
        if orders.stop {
            return None;
        }
        let changed = std::mem::take(&mut orders.changed);
        Some((orders.desired.clone().unwrap_or_default(), changed))
    }

    /// Sees to it that the program is loaded, once there are orders.
    fn loaded(&mut self) -> Result<(), String> {
        if self.uplink.is_some() || lock(&self.shared.orders).desired.is_none() {
            return Ok(());
        }
        let pins = Pins::open(&self.config.pin_dir).map_err(|error| error.to_string())?;
        let mut uplink =
            Uplink::load(&pins, self.config.hook).map_err(|error| error.to_string())?;
        self.counts
            .install(uplink.take_counts().map_err(|error| error.to_string())?);
        let state = lock(&self.shared.orders)
            .desired
            .clone()
            .unwrap_or_default();
        if let Err(error) = self.counts.keep(&state.vips) {
            tracing::warn!(%error, "the data path's map does not hold all VIPs");
        }
        self.uplink = Some(uplink);
        self.last_reason = None;
        self.attach(&state);
        match pins.retire_others() {
            Ok(removed) if removed.links + removed.maps > 0 => {
                tracing::info!(
                    links = removed.links,
                    maps = removed.maps,
                    "removed the data path of another version; its counts begin anew"
                );
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "another version's data path stays pinned"),
        }
        Ok(())
    }

    /// Attaches to the wanted uplinks, detaches from others, and reports.
    fn attach(&mut self, state: &DataPathState) {
        let Some(uplink) = self.uplink.as_mut() else {
            return;
        };
        for gone in uplink.attached().difference(&state.uplinks) {
            uplink.detach(*gone);
        }
        let mut attachments = BTreeMap::new();
        for &interface in &state.uplinks {
            let attachment = match uplink.ensure(interface) {
                Ok((attachment, restored)) => {
                    if let Some(restored) = restored {
                        let interface = interface_name(interface);
                        tracing::warn!(interface, ?restored, "the data path was attached anew");
                        let cause = match restored {
                            Restored::Removed => "removed",
                            Restored::Overtaken => "overtaken",
                        };
                        self.metrics
                            .restored
                            .get_or_create(&RestoredLabels { interface, cause })
                            .inc();
                    }
                    attachment
                }
                Err(error) => Attachment::Absent {
                    reason: error.to_string(),
                },
            };
            attachments.insert(interface, attachment);
        }
        self.report(attachments);
    }

    /// Reports that the data path is at no uplink.
    fn absent(&mut self, state: &DataPathState, reason: &str) {
        if self.last_reason.as_deref() != Some(reason) {
            tracing::warn!(
                reason,
                "no data path: packets are announced but not counted"
            );
            self.last_reason = Some(reason.to_owned());
        }
        let attachments = state
            .uplinks
            .iter()
            .map(|interface| {
                (
                    *interface,
                    Attachment::Absent {
                        reason: reason.to_owned(),
                    },
                )
            })
            .collect();
        self.report(attachments);
    }

    fn report(&self, attachments: BTreeMap<u32, Attachment>) {
        let mut reported = lock(&self.shared.attachments);
        if *reported == attachments {
            return;
        }
        self.metrics.attached.clear();
        for (interface, attachment) in &attachments {
            let (hook, value) = match attachment {
                Attachment::Tcx => ("tcx", 1),
                Attachment::Clsact => ("clsact", 1),
                Attachment::Absent { reason } => {
                    if reported.get(interface) != Some(attachment) {
                        tracing::warn!(
                            interface = interface_name(*interface),
                            reason,
                            "no data path at this uplink"
                        );
                    }
                    ("none", 0)
                }
            };
            self.metrics
                .attached
                .get_or_create(&AttachedLabels {
                    interface: interface_name(*interface),
                    hook,
                })
                .set(value);
        }
        *reported = attachments;
    }
}

/// An interface's name, or its index if it has none any more.
fn interface_name(interface: u32) -> String {
    if_indextoname(interface).map_or_else(
        |_| interface.to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
