//! The thread that makes the kernel hold what the loop wants, and looks every second whether it still does.

mod guard;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use landfall_ebpf_common::egress::gateway::PolicyCount;
use nix::net::if_::if_indextoname;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};

use super::attached::Restored;
use super::egress::{self, Gateway, Standing};
use super::flows::Flows;
use super::metrics::{Metrics, RestoredLabels};
use super::pins::Pins;
use super::tables::{Tables, TablesError};
use super::thread;
use super::uplink::Uplink;
use super::{
    Attachment, BucketHolders, Change, Config, DataPath, Held, Interfaces, Leaving, NodeId,
    NodeState, PortId, PortState, VipCount, VipState,
};
use crate::egress::{InForce, PolicyName};
use crate::replication::{Bindings, Happened};

/// How long to wait before a data path that could not be loaded is tried again.
const RETRY: Duration = Duration::from_secs(10);
/// How soon it is looked whether new maps are filled.
const SOON: Duration = Duration::from_millis(20);

/// The data path of this node. Dropping it ends the thread and leaves programs and counts in the kernel.
#[derive(Debug)]
pub struct Worker {
    pub(super) shared: Arc<Shared>,
    flows: Arc<Flows>,
    gateway: Gateway,
    thread: Option<JoinHandle<()>>,
}

/// The maps, once they are there.
pub(super) type SharedTables = Arc<Mutex<Option<Tables>>>;

#[derive(Debug, Default)]
pub(super) struct Shared {
    orders: Mutex<Orders>,
    wake: Condvar,
    /// The maps, once they are there; shared between the thread, which writes, and whoever reads counts.
    pub(super) tables: SharedTables,
    attachments: Mutex<BTreeMap<u32, Attachment>>,
    /// The interfaces where the guard should be and cannot, and why.
    unguarded: Mutex<BTreeMap<u32, String>>,
    /// The same of the interfaces whose drivers are to run a program.
    pub(super) drivers: Mutex<BTreeMap<u32, Attachment>>,
    /// What of egress is in force.
    in_force: watch::Sender<InForce>,
    written: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Orders {
    /// Where to be attached; nothing before the first call.
    interfaces: Option<Interfaces>,
    changes: Vec<Change>,
    /// Of the last that was said.
    number: u64,
    changed: bool,
    stop: bool,
}

impl Worker {
    pub(super) fn start(config: Config, registry: &mut Registry) -> Self {
        let shared = Arc::new(Shared::default());
        let metrics = Metrics::register(registry, Arc::clone(&shared.tables));
        let flows = Arc::new(Flows::start(Arc::clone(&shared.tables), config.compare));
        let gateway = Gateway::start(config.gateway.clone(), registry);
        let mut task = Task {
            config,
            shared: Arc::clone(&shared),
            metrics,
            uplink: None,
            wanted: Wanted::default(),
            flows: Arc::clone(&flows),
            fresh: false,
            not_retired: None,
            last_reason: None,
        };
        let thread = thread::start("datapath", move || task.run());
        Self {
            shared,
            flows,
            gateway,
            thread: Some(thread),
        }
    }
}

impl DataPath for Worker {
    fn attach(&self, interfaces: Interfaces) {
        let mut orders = lock(&self.shared.orders);
        if orders.interfaces.as_ref() != Some(&interfaces) {
            orders.interfaces = Some(interfaces);
            orders.changed = true;
            self.shared.wake.notify_all();
        }
    }

    fn change(&self, changes: Vec<Change>) -> u64 {
        if changes.is_empty() {
            return lock(&self.shared.orders).number;
        }
        for change in &changes {
            if let Change::Egress(leaving) = change {
                match leaving {
                    Some(it) => self
                        .gateway
                        .set(Arc::clone(&it.egress), Arc::clone(&it.around)),
                    None => self.gateway.clear(),
                }
            }
        }
        let mut orders = lock(&self.shared.orders);
        orders.changes.extend(changes);
        orders.number += 1;
        orders.changed = true;
        self.shared.wake.notify_all();
        orders.number
    }

    fn written(&self) -> watch::Receiver<u64> {
        self.shared.written.subscribe()
    }

    fn counts(&self) -> BTreeMap<IpAddr, VipCount> {
        lock(&self.shared.tables)
            .as_ref()
            .map(Tables::counts)
            .unwrap_or_default()
    }

    fn held(&self) -> Arc<Held> {
        self.flows.held()
    }

    fn attachments(&self) -> BTreeMap<u32, Attachment> {
        lock(&self.shared.attachments).clone()
    }

    fn egress_dropped(&self) -> BTreeMap<PolicyName, u64> {
        let tables = lock(&self.shared.tables);
        tables.as_ref().map(Tables::unled).unwrap_or_default()
    }

    fn unguarded(&self) -> BTreeMap<u32, String> {
        lock(&self.shared.unguarded).clone()
    }

    fn gateway(&self) -> egress::State {
        self.gateway.state()
    }

    fn stand(&self, standings: BTreeMap<IpAddr, Standing>) {
        self.gateway.stand(&standings);
    }

    fn replicate(&self) -> (Arc<dyn Bindings>, mpsc::Receiver<Happened>) {
        self.gateway.replicate()
    }

    fn gateway_counts(&self) -> BTreeMap<&'static str, u64> {
        self.gateway.counts()
    }

    fn usage(&self) -> BTreeMap<PolicyName, egress::Usage> {
        self.gateway.usage()
    }

    fn pod_counts(&self) -> io::Result<BTreeMap<IpAddr, PolicyCount>> {
        self.gateway.pod_counts()
    }

    fn bindings(
        &self,
        most: usize,
        wanted: &dyn Fn(&egress::Bound) -> bool,
    ) -> io::Result<(Vec<egress::Bound>, usize)> {
        self.gateway.bindings(most, wanted)
    }

    fn disarm(&self, disarmed: bool) {
        self.gateway.disarm(disarmed);
    }

    fn in_force(&self) -> watch::Receiver<InForce> {
        self.shared.in_force.subscribe()
    }

    fn gateway_in_force(&self) -> watch::Receiver<InForce> {
        self.gateway.in_force()
    }

    fn was_gateway_of(&self, policy: &PolicyName) -> bool {
        self.gateway.was_gateway_of(policy)
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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All that was said, so that it can be said again to maps that are made anew.
#[derive(Debug, Default)]
struct Wanted {
    vips: BTreeMap<IpAddr, VipState>,
    nodes: BTreeMap<NodeId, NodeState>,
    ports: BTreeMap<PortId, PortState>,
    holders: BTreeMap<(PortId, u16), BucketHolders>,
    mark: Option<u32>,
    egress: Option<Arc<Leaving>>,
    complete: bool,
}

impl Wanted {
    fn note(&mut self, change: &Change) {
        match change {
            Change::Vip(vip, state) => keep(&mut self.vips, vip, *state),
            Change::Node(id, state) => keep(&mut self.nodes, id, state.clone()),
            Change::Port(id, state) => keep(&mut self.ports, id, state.clone()),
            Change::Holders(id, page, holders) => {
                let some = (!holders.is_empty()).then(|| holders.clone());
                keep(&mut self.holders, &(*id, *page), some);
            }
            Change::Mark(mark) => self.mark = Some(*mark),
            Change::Egress(leaving) => self.egress.clone_from(leaving),
            Change::Complete => self.complete = true,
        }
    }

    /// The whole, as changes. A port goes after the nodes that it names, its holders and its VIP after it.
    fn all(&self) -> Vec<Change> {
        let nodes = self.nodes.iter();
        let ports = self.ports.iter();
        nodes
            .map(|(id, state)| Change::Node(id.clone(), Some(state.clone())))
            .chain(ports.map(|(id, state)| Change::Port(*id, Some(state.clone()))))
            .chain(
                self.holders
                    .iter()
                    .map(|((id, page), holders)| Change::Holders(*id, *page, holders.clone())),
            )
            .chain(
                self.vips
                    .iter()
                    .map(|(vip, state)| Change::Vip(*vip, Some(*state))),
            )
            .chain(self.mark.map(Change::Mark))
            .chain(self.egress.clone().map(|it| Change::Egress(Some(it))))
            .chain(self.complete.then_some(Change::Complete))
            .collect()
    }
}

fn keep<K: Ord + Clone, V>(map: &mut BTreeMap<K, V>, key: &K, value: Option<V>) {
    match value {
        Some(value) => {
            map.insert(key.clone(), value);
        }
        None => {
            map.remove(key);
        }
    }
}

/// What the thread owns.
struct Task {
    config: Config,
    shared: Arc<Shared>,
    metrics: Metrics,
    uplink: Option<Uplink>,
    wanted: Wanted,
    flows: Arc<Flows>,
    /// The maps are new and not in force yet.
    fresh: bool,
    /// The pins, until what lies beside them has been removed.
    not_retired: Option<Pins>,
    last_reason: Option<String>,
}

/// What the loop wants now.
struct Order {
    /// Nothing before the first call.
    interfaces: Option<Interfaces>,
    changes: Vec<Change>,
    /// Of the last of them, or of those before.
    number: u64,
}

impl Task {
    fn run(&mut self) {
        while let Some(order) = self.wait() {
            for change in &order.changes {
                self.wanted.note(change);
                self.tell_flows(change);
            }
            let Some(interfaces) = order.interfaces else {
                continue;
            };
            self.renew();
            if self.uplink.is_some() {
                self.change(&order.changes);
            } else if let Err(reason) = self.load() {
                self.absent(&interfaces.uplinks, &reason);
                // There is nothing more to wait for: without the guard what is a tenant's reaches nobody, if there is a packet
                // filter.
                self.tell_in_force();
                self.shared.written.send_replace(order.number);
                continue;
            }
            self.fresh &= !(self.wanted.complete && self.flows.has_compared());
            if !self.fresh {
                self.attach(&interfaces);
                self.guard();
                if self.wanted.egress.is_some() || self.wanted.complete {
                    self.tell_in_force();
                }
                self.shared.written.send_replace(order.number);
                self.retire_others();
                self.attach_drivers();
            }
        }
    }

    fn tell_in_force(&self) {
        let egress = self.wanted.egress.as_ref().map(|it| &it.egress);
        // Where no packet filter judges, nobody does without these.
        let is_missed = self.config.cilium.is_some()
            && (self.uplink.is_none() || !lock(&self.shared.unguarded).is_empty());
        let now = match egress {
            Some(_) if is_missed => InForce::Unknown,
            egress => InForce::from(egress),
        };
        self.shared.in_force.send_if_modified(|told| {
            let is_new = *told != now;
            *told = now;
            is_new
        });
    }

    /// The maps are in force, and so is the program: what another version has left is not needed any more.
    fn retire_others(&mut self) {
        let Some(pins) = self.not_retired.take() else {
            return;
        };
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
    }

    fn tell_flows(&self, change: &Change) {
        match change {
            Change::Vip(vip, state) => self.flows.vip(*vip, state.is_some()),
            Change::Port(id, state) => self.flows.port(*id, state.as_ref()),
            Change::Node(id, Some(state)) if state.here => self.flows.here(&id.name),
            Change::Node(..) | Change::Holders(..) | Change::Mark(_) | Change::Egress(_) => {}
            Change::Complete => self.flows.complete(),
        }
    }

    /// Waits for new orders or for the next look. Nothing: stop.
    fn wait(&self) -> Option<Order> {
        let patience = if self.fresh && self.wanted.complete {
            SOON
        } else if self.uplink.is_some() || self.last_reason.is_none() {
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
        orders.changed = false;
        Some(Order {
            interfaces: orders.interfaces.clone(),
            changes: std::mem::take(&mut orders.changes),
            number: orders.number,
        })
    }

    /// Loads the program beside the maps, says to them what is wanted, and puts it in the place of an earlier one.
    ///
    /// New maps are not put in force before all that is known is in them, the flows too: until then another version's
    /// program goes on, or packets are passed up as they were before there was any.
    fn load(&mut self) -> Result<(), String> {
        let pins = Pins::open(&self.config.pin_dir).map_err(|error| error.to_string())?;
        let mut uplink = Uplink::load(&pins, &self.config).map_err(|error| error.to_string())?;
        let tables = uplink.tables().map_err(|error| error.to_string())?;
        let flows = uplink.flows().map_err(|error| error.to_string())?;
        self.fresh = !tables.is_seeded();
        self.not_retired = Some(pins);
        *lock(&self.shared.tables) = Some(tables);
        self.flows.install(flows, self.fresh);
        if uplink.judges() == Some(false) {
            tracing::warn!(
                "Cilium has no maps where --cilium says: egress policies' pods answer nobody who comes from outside until it has"
            );
        }
        self.uplink = Some(uplink);
        self.last_reason = None;
        self.change(&self.wanted.all());
        Ok(())
    }

    /// Puts new programs in the place of those that read maps which Cilium has replaced. They stay until that is done.
    fn renew(&mut self) {
        if !self.uplink.as_ref().is_some_and(Uplink::is_outdated) {
            return;
        }
        match self.load() {
            Ok(()) => tracing::info!(
                "Cilium has made its maps anew: the programs that judge are loaded anew"
            ),
            Err(reason) => {
                if self.last_reason.as_ref() != Some(&reason) {
                    tracing::warn!(
                        reason,
                        "Cilium has made its maps anew, and the programs that judge go by the old ones still; trying again"
                    );
                }
                self.last_reason = Some(reason);
            }
        }
    }

    /// Makes changes so; what cannot be is said, and the rest is made.
    fn change(&self, changes: &[Change]) {
        let mut tables = lock(&self.shared.tables);
        let Some(tables) = tables.as_mut() else {
            return;
        };
        let complain = |outcome: Result<(), TablesError>| {
            if let Err(error) = outcome {
                tracing::warn!(%error, "the data path does not know all it should");
                self.metrics.refused.inc();
            }
        };
        if changes.contains(&Change::Complete) {
            complain(tables.begin());
            if self.wanted.egress.is_none() {
                // The last policy may have gone while nobody was there.
                complain(tables.change(&Change::Egress(None)));
            }
        }
        for change in changes {
            complain(tables.change(change));
        }
        complain(tables.expire());
    }

    /// Attaches to the wanted uplinks, detaches from others, and reports.
    fn attach(&mut self, interfaces: &Interfaces) {
        let Some(uplink) = self.uplink.as_mut() else {
            return;
        };
        let mut wanted = interfaces.uplinks.clone();
        wanted.extend(interfaces.tunnel);
        for gone in uplink.attached().difference(&wanted) {
            uplink.detach(*gone);
        }
        let mut attachments = BTreeMap::new();
        for interface in wanted {
            let is_tunnel = interfaces.tunnel == Some(interface);
            let attachment = match uplink.ensure(interface, is_tunnel) {
                Ok((attachment, restored)) => {
                    if let Some(restored) = restored {
                        self.flows.missed();
                        count_restored(&self.metrics, interface, restored);
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

    /// The same for the drivers of those uplinks that carry the program and whose drivers the user has named. After
    /// another version's data path is gone: a driver has room for one program.
    fn attach_drivers(&mut self) {
        let Some(uplink) = self.uplink.as_mut() else {
            return;
        };
        let wanted: BTreeSet<u32> = uplink
            .attached()
            .into_iter()
            .filter(|interface| self.config.xdp.contains(&interface_name(*interface)))
            .collect();
        for gone in uplink.drivers().difference(&wanted) {
            uplink.detach_driver(*gone);
        }
        let mut drivers = BTreeMap::new();
        for interface in wanted {
            let attachment = match uplink.ensure_driver(interface) {
                Ok(restored) => {
                    if let Some(restored) = restored {
                        count_restored(&self.metrics, interface, restored);
                    }
                    Attachment::Xdp
                }
                Err(error) => {
                    uplink.detach_driver(interface);
                    Attachment::Absent {
                        reason: error.to_string(),
                    }
                }
            };
            drivers.insert(interface, attachment);
        }
        self.report_drivers(drivers);
    }

    /// Reports that the data path is at no uplink.
    fn absent(&mut self, uplinks: &BTreeSet<u32>, reason: &str) {
        if self.last_reason.as_deref() != Some(reason) {
            tracing::warn!(
                reason,
                "no data path: addresses are announced, packets are neither steered nor counted"
            );
            self.last_reason = Some(reason.to_owned());
        }
        let attachments = uplinks
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
        if *reported != attachments {
            complain(&reported, &attachments, "no data path at this uplink");
            *reported = attachments;
            self.metrics.show(&reported, &lock(&self.shared.drivers));
        }
    }

    fn report_drivers(&self, drivers: BTreeMap<u32, Attachment>) {
        let mut reported = lock(&self.shared.drivers);
        if *reported != drivers {
            complain(
                &reported,
                &drivers,
                "no XDP at this uplink: frames to other nodes take the longer way",
            );
            *reported = drivers;
            drop(reported);
            let attachments = lock(&self.shared.attachments);
            self.metrics.show(&attachments, &lock(&self.shared.drivers));
        }
    }
}

/// Says why something is not attached, once.
fn complain(before: &BTreeMap<u32, Attachment>, now: &BTreeMap<u32, Attachment>, what: &str) {
    for (interface, attachment) in now {
        if let Attachment::Absent { reason } = attachment
            && before.get(interface) != Some(attachment)
        {
            tracing::warn!(interface = interface_name(*interface), reason, "{what}");
        }
    }
}

fn count_restored(metrics: &Metrics, interface: u32, restored: Restored) {
    let interface = interface_name(interface);
    tracing::warn!(interface, ?restored, "the data path was attached anew");
    let cause = match restored {
        Restored::Removed => "removed",
        Restored::Overtaken => "overtaken",
    };
    metrics
        .restored
        .get_or_create(&RestoredLabels { interface, cause })
        .inc();
}

/// An interface's name, or its index if it has none any more.
pub(super) fn interface_name(interface: u32) -> String {
    if_indextoname(interface).map_or_else(
        |_| interface.to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
