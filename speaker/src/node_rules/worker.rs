//! The task that makes [`Rules`] so, and keeps them so.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use landfall_core::ip::Family;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until};

use super::egress::flows::{Before, Settling, settling};
use super::kube_proxy::KubeProxy;
use super::metrics::{ByFamily, ByReason, Metrics};
use super::netfilter::{Event, Query, TableFamily, Watch};
use super::routes::{self, Complaints, PolicyRoute};
use super::ruleset::{self, TABLE};
use super::tool::{self, ToolError};
use super::{Config, Rules, Shared, egress, stale, tunnel};
use crate::egress::{InForce, PolicyName};
use crate::netlink::Listener;

/// How long after a failure to try again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the kernel's counters are read for the metrics.
const COUNTERS: Duration = Duration::from_secs(15);
/// How long after a sign of interference the table is put back: others flush and load in several steps.
const SETTLE: Duration = Duration::from_millis(200);
/// How long after a change of a route ours are looked at.
const ROUTES_SETTLE: Duration = Duration::from_millis(500);
/// How often in a row such a look may be put off for what is wanted: it takes many processes, and pods wait.
const PUT_OFF: u32 = 8;
/// Links, addresses, routes and rules of both families (`RTNLGRP_…`), as a mask.
const ROUTES: u32 = 1 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 18;
/// How many of our own changes are remembered; their events come within milliseconds.
const OWN: usize = 64;

pub(super) struct Worker {
    pub(super) config: Config,
    pub(super) wanted: watch::Receiver<Option<Rules>>,
    pub(super) metrics: Metrics,
    pub(super) kube_proxy: Shared,
    /// By which mark the programs are to tell what they have translated.
    pub(super) arrival_mark: watch::Sender<Option<u32>>,
    pub(super) boot: super::boot::Boot,
    /// What of egress is in force.
    pub(super) in_force: watch::Sender<InForce>,
    /// Packets of pods that were dropped for want of a gateway, by policy.
    pub(super) dropped: watch::Sender<BTreeMap<PolicyName, u64>>,
    /// What the table says now, as far as we wrote it.
    pub(super) written: Option<Rules>,
    /// What the table said of pods that leave by addresses of their own; nothing while nobody has looked.
    pub(super) before: Option<Before>,
    /// The policy routes there are; unknown at first, as an earlier speaker may have left some.
    pub(super) routes: Option<BTreeSet<PolicyRoute>>,
    /// What those were planned for.
    pub(super) routed: BTreeSet<(Arc<str>, Family)>,
    /// The routes of what leaves by policies.
    pub(super) leaving: egress::keeper::Routes,
    /// Where pods are that share a bridge.
    pub(super) ports: egress::ports::Ports,
    /// What stands against policy routes, as it was said last.
    pub(super) complaints: Complaints,
    /// The processes that made our last changes.
    pub(super) own: VecDeque<u32>,
}

impl Worker {
    pub(super) async fn run(mut self) {
        loop {
            let problem = match Sockets::open() {
                Ok(mut sockets) => match self.work(&mut sockets).await {
                    Ok(()) => return,
                    Err(problem) => problem,
                },
                Err(problem) => problem,
            };
            tracing::error!(%problem, "netlink cannot be read; trying again");
            self.metrics.failures.inc();
            sleep(RETRY).await;
        }
    }

    /// Ends well when nobody can want other rules any more, and with an error when a socket broke.
    async fn work(&mut self, sockets: &mut Sockets) -> io::Result<()> {
        // What happened before these sockets were there is unknown.
        self.written = None;
        self.before = Some(match self.before.take() {
            None if !is_armed(&sockets.query) => Before::Unarmed,
            None => Before::Earlier(BTreeSet::new()),
            Some(Before::Earlier(swapped)) => Before::Earlier(swapped),
            Some(_) => Before::Unknown,
        });
        self.read_kube_proxy(&sockets.query)?;
        let mut write = Some(Instant::now());
        let mut look = None;
        let mut put_off = 0;
        let mut counters = Instant::now() + COUNTERS;
        loop {
            tokio::select! {
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    write = self.write_or_retry().await;
                }
                () = at(write) => {
                    write = self.write_or_retry().await;
                }
                events = sockets.ruleset.next() => {
                    if self.follow(&events?, &sockets.query)? {
                        write.get_or_insert(Instant::now() + SETTLE);
                    }
                }
                changed = sockets.routes.next() => {
                    changed?;
                    look.get_or_insert(Instant::now() + ROUTES_SETTLE);
                }
                () = at(look) => {
                    look = None;
                    let mut wanted = self.wanted.clone();
                    let right = tokio::select! {
                        right = self.are_right() => right,
                        _ = wanted.changed(), if put_off < PUT_OFF => {
                            put_off += 1;
                            look = Some(Instant::now() + ROUTES_SETTLE);
                            continue;
                        }
                    };
                    put_off = 0;
                    if !right {
                        write = self.write_or_retry().await;
                    }
                }
                () = sleep_until(counters) => {
                    counters = Instant::now() + COUNTERS;
                    self.read_counters(&sockets.query);
                    if self.ports.are_disputed() {
                        // Nobody tells what changes in a pod.
                        look.get_or_insert(Instant::now());
                    }
                }
            }
        }
    }

    /// Takes in what happened to the ruleset; whether our table has to be written anew.
    fn follow(&mut self, events: &[Event], query: &Query) -> io::Result<bool> {
        let mut disturbed = false;
        for event in events {
            match event {
                Event::Taken { table, by } => {
                    if table != TABLE || self.own.contains(by) {
                        continue;
                    }
                    self.doubt();
                    if self.written.take().is_some() {
                        tracing::warn!(
                            process = by,
                            "somebody else took from the nftables tables {TABLE}; putting them back"
                        );
                        self.metrics.restored.inc();
                        disturbed = true;
                    }
                }
                Event::Lost => {
                    self.read_kube_proxy(query)?;
                    self.doubt();
                    disturbed |= self.written.take().is_some();
                }
                Event::Table { .. } | Event::Keys { .. } => self.kube_proxy().apply(event),
            }
        }
        Ok(disturbed)
    }

    fn read_kube_proxy(&self, query: &Query) -> io::Result<()> {
        let read = KubeProxy::read(query)?;
        *self.kube_proxy() = read;
        Ok(())
    }

    fn kube_proxy(&self) -> std::sync::MutexGuard<'_, KubeProxy> {
        self.kube_proxy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn write_or_retry(&mut self) -> Option<Instant> {
        let rules = self.wanted.borrow_and_update().clone()?;
        let problem = self.write(rules).await.err()?;
        tracing::error!(%problem, "this node's rules are not what they should be; trying again");
        self.metrics.failures.inc();
        self.written = None;
        self.doubt();
        Some(Instant::now() + RETRY)
    }

    /// What the table says of pods, if it says anything, may not be what was written.
    fn doubt(&mut self) {
        self.in_force.send_replace(InForce::Unknown);
        self.ports.doubt();
        if !matches!(self.before, Some(Before::Unarmed | Before::Earlier(_))) {
            self.before = Some(Before::Unknown);
        }
    }

    async fn write(&mut self, rules: Rules) -> Result<(), ToolError> {
        if let (Some(Before::Armed(old)), None) = (&self.before, &rules.egress) {
            // Before the last policy's rules go, no connection is left that would leave with a pod's address.
            let last = Rules {
                egress: Some(Arc::new(old.without_policies())),
                ..rules.clone()
            };
            self.write_at_once(last).await?;
        }
        self.write_at_once(rules).await
    }

    /// The table is written even if routes cannot be: the guard must not wait for them.
    async fn write_at_once(&mut self, rules: Rules) -> Result<(), ToolError> {
        if let Some(tunnel) = &rules.tunnel {
            tunnel::ensure(tunnel, self.config.tunnel_port).await?;
        }
        let routed = self.route(&rules).await;
        let left = self.leaving.make(&rules, &self.config).await;
        let marks = self.routes.as_ref().map(routes::marks).unwrap_or_default();
        let ways = self.leaving.ways();
        let is_same = |made: &Result<bool, ToolError>| matches!(made, Ok(false));
        let change = (is_same(&routed) && is_same(&left))
            .then_some(self.written.as_ref())
            .flatten()
            .and_then(|written| ruleset::change(written, &rules, &marks, ways, &self.config));
        let text = change.unwrap_or_else(|| ruleset::whole(&rules, &marks, ways, &self.config));
        self.boot.before(&rules).await;
        // What leaves is known by its port before it may leave.
        let loaded = self.ports.make(&rules).await;
        self.is_own(loaded);
        let (first, then) = settling(self.before.as_ref(), &rules, &self.config);
        if let Some(Before::Earlier(swapped)) = &mut self.before {
            // Should the table not be written, the next try is not to swap them back.
            swapped.extend(first.swapped());
        }
        settle(first).await;
        if !text.is_empty() {
            let process = tool::load(&text).await?;
            self.is_own(Some(process));
        }
        let shrunk = stale::shrunk(self.written.as_ref(), &rules);
        self.before = Some(match &rules.egress {
            Some(leaving) => Before::Armed(leaving.clone()),
            None => Before::Unarmed,
        });
        let arrival = if ruleset::is_arrival_asked(&rules, &marks) {
            self.config.arrival()
        } else {
            0
        };
        let egress = rules.egress.as_ref().or(rules.passed_by.as_ref());
        let egress = egress.map(|it| it.egress.clone());
        self.written = Some(rules);
        self.arrival_mark.send_replace(Some(arrival));
        end_flows(shrunk).await;
        settle(then).await;
        self.in_force.send_replace(egress.as_ref().into());
        self.boot.after(self.written.as_ref(), &self.config).await;
        left?;
        self.leaving.prune(&self.config).await?;
        routed.map(drop)
    }

    /// What this process does to the tables is our doing.
    fn is_own(&mut self, process: Option<u32>) {
        if let Some(process) = process {
            self.own.push_front(process);
            self.own.truncate(OWN);
        }
    }

    /// Makes the policy routes so; whether they changed.
    async fn route(&mut self, rules: &Rules) -> Result<bool, ToolError> {
        let uplinks = routes::uplinks(rules);
        // Another change of the routes is heard of, and leads to `are_routes_right`.
        if self.routes.is_some() && self.routed == uplinks {
            return Ok(false);
        }
        let (planned, complaints) = routes::plan(&uplinks, &self.config).await?;
        self.routed = uplinks;
        self.complain(complaints);
        if self.routes.as_ref() == Some(&planned) {
            return Ok(false);
        }
        self.routes = None;
        routes::install(&planned, &self.config).await?;
        self.routes = Some(planned);
        Ok(true)
    }

    /// Says what stands against a policy route when that is new or another, and when it has gone.
    fn complain(&mut self, complaints: Complaints) {
        for (uplink, complaint) in &complaints {
            if self.complaints.get(uplink) != Some(complaint) {
                tracing::warn!("{complaint}");
            }
        }
        for place in self.complaints.keys() {
            if self.routed.contains(place) && !complaints.contains_key(place) {
                let (uplink, family) = place;
                tracing::info!("{uplink}: {family} answers to clients beyond it leave by it again");
            }
        }
        self.complaints = complaints;
    }

    /// Whether all routes are what they should be; if not, the next write makes them.
    async fn are_right(&mut self) -> bool {
        // Else it is about to be written.
        let is_written = self.written.is_some();
        let left = !is_written || self.leaving.are_right(&self.config).await;
        let at_ports = !is_written || self.ports.are_right().await;
        let right = self.are_routes_right().await;
        if !right {
            self.written = None;
            self.routes = None;
        }
        left && at_ports && right
    }

    /// Whether the routes still are what they should be, now that some route, rule or link changed.
    async fn are_routes_right(&mut self) -> bool {
        if self.written.is_none() {
            return true; // about to be written anyway
        }
        let Ok((planned, complaints)) = routes::plan(&self.routed, &self.config).await else {
            return false;
        };
        // A route that there was none of, and that cannot be made now, is no difference.
        self.complain(complaints);
        self.routes.as_ref() == Some(&planned)
            && routes::are_there(&planned, &self.config)
                .await
                .unwrap_or(false)
    }

    fn read_counters(&self, query: &Query) {
        let leaving = self.written.as_ref().and_then(|it| it.egress.as_ref());
        let policies = leaving.map(|it| it.egress.policies.keys());
        let count = |policy: &PolicyName| {
            let name = egress::counter_of(policy);
            let packets = query.counter(TableFamily::Inet, TABLE, &name).ok()?;
            (packets > 0).then(|| (policy.clone(), packets))
        };
        let dropped = policies.into_iter().flatten().filter_map(count).collect();
        self.dropped.send_replace(dropped);
        if self
            .written
            .as_ref()
            .is_some_and(|rules| rules.egress.is_some() || rules.passed_by.is_some())
        {
            for reason in egress::REASONS {
                let name = egress::counter(reason);
                let count = |family| query.counter(family, TABLE, &name);
                if let Ok(packets) = count(TableFamily::Inet) {
                    // The same reason, told by a bridge.
                    let packets = packets + count(TableFamily::Bridge).unwrap_or(0);
                    self.metrics
                        .egress_drops
                        .get_or_create(&ByReason { reason })
                        .set(i64::try_from(packets).unwrap_or(i64::MAX));
                }
            }
        }
        for (name, family) in [("guard4", "IPv4"), ("guard6", "IPv6")] {
            if let Ok(packets) = query.counter(TableFamily::Inet, TABLE, name) {
                self.metrics
                    .guard_drops
                    .get_or_create(&ByFamily { family })
                    .set(i64::try_from(packets).unwrap_or(i64::MAX));
            }
        }
    }
}

/// Ends flows of endpoints that went, now that the rules do not name these any more.
async fn end_flows(kept: stale::Kept) {
    let ended = spawn_blocking(move || stale::end(&kept)).await;
    match ended.map_err(io::Error::other).flatten() {
        Ok(0) => {}
        Ok(number) => tracing::debug!(number, "ended flows of endpoints that went"),
        Err(error) => tracing::warn!(
            %error,
            "flows of endpoints that went cannot be ended: some may not move to others before they are silent"
        ),
    }
}

/// Does to connections of pods what follows from a change of policies.
async fn settle(settling: Settling) {
    let ended = spawn_blocking(move || settling.settle()).await;
    match ended.map_err(io::Error::other).flatten() {
        Ok(0) => {}
        Ok(number) => tracing::debug!(
            number,
            "ended connections that had no right to their source"
        ),
        Err(error) => tracing::warn!(
            %error,
            "connections of pods from before a change cannot be read: some are dropped until they end"
        ),
    }
}

/// Whether an earlier process's table judges pods.
fn is_armed(query: &Query) -> bool {
    let counter = egress::counter(egress::REASONS[0]);
    query.counter(TableFamily::Inet, TABLE, &counter).is_ok()
}

/// What the task listens to.
struct Sockets {
    query: Query,
    ruleset: Watch,
    /// Hears that some link, address, route or rule changed; not which: it is looked up when it matters.
    routes: Listener,
}

impl Sockets {
    fn open() -> io::Result<Self> {
        Ok(Self {
            query: Query::open()?,
            ruleset: Watch::open()?,
            routes: Listener::open(NETLINK_ROUTE, ROUTES)?,
        })
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}
