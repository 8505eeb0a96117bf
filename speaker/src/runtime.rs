//! Wiring: flags to parts, parts to the loop, and the loop itself.
//!
//! One task owns the [`Speaker`]; it takes inputs in batches and settles after each. It looks at the clock ten
//! times a second, which is what all timers of the election need, and when there are changes to be made so.

mod probe;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use landfall_core::election::BootId;
use landfall_core::model::{Event, Kind, NodeName};
use landfall_runtime::control::Control;
use landfall_runtime::source::{self, Source};
use landfall_runtime::{admin, shutdown};
use prometheus_client::registry::Registry;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};

use crate::announcer::AnnouncerEvent;
use crate::args::Args;
use crate::datapath::DataPath;
use crate::egress::InForce;
use crate::elector::{self, Identity, Parts, Speaker};
use crate::keys::{KeySource, Keys};
use crate::manifests::Allocator;
use crate::membership::gossip::{self, Counters};
use crate::membership::{Membership, MembershipEvent};
use crate::metrics::Metrics;
use crate::replication::{Copying, Replication};
use crate::status::{Reporter, Write, writer};
use crate::{announcer, cni, control, datapath, egress, node_rules, replication};

/// The clock begins at an hour, so that subtracting any patience stays above zero.
const EPOCH: Duration = Duration::from_hours(1);
/// The clock's step.
const BEAT: Duration = Duration::from_millis(100);
/// How often the key file is read.
const KEYS_EVERY: Duration = Duration::from_secs(2);
/// The state of the gossip's counters is copied to the metrics this often.
const SHOW_EVERY: Duration = Duration::from_secs(5);
/// How long a stopping speaker tries to hand over.
const HAND_OVER: Duration = Duration::from_secs(3);
/// How long it waits for its goodbye to be heard.
const GOODBYE: Duration = Duration::from_millis(500);
/// Inputs that are taken in before conclusions are drawn.
const BATCH: usize = 1024;
/// The prefix of all metrics.
const PREFIX: &str = "landfall";

/// The objects of either source, with what makes up for the API server in the manifests mode.
struct Objects {
    source: Source,
    allocator: Option<Allocator>,
    problems: Option<source::Problems>,
}

/// Runs until SIGTERM or SIGINT, then hands over and returns.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let node = NodeName::from(args.node()?.as_str());
    let key_source = args.key_source()?;
    let keys = key_source.read()?;
    let mut registry = Registry::with_prefix(PREFIX);
    let metrics = Metrics::register(&mut registry);
    let ignored = source::Ignored::register(&mut registry);
    let start = Instant::now();
    let stop = shutdown::signal();
    tokio::pin!(stop);

    let client = match &args.manifests {
        None => Some(args.kube.client().await?),
        Some(_) => None,
    };
    let (mut objects, mut early) = objects(&args, client.as_ref(), &ignored)?;

    // The gossip's address may have to come from the node's own object; the objects found meanwhile are kept.
    let address = tokio::select! {
        address = gossip_address(&args, &node, &mut objects, &mut early) => address?,
        () = &mut stop => return Ok(()),
    };
    let boot = BootId(rand::random());
    let config = gossip::Config {
        node: node.clone(),
        boot,
        address,
        keys: keys.clone(),
    };
    let (membership, membership_events, counters) = gossip::start(config).await?;
    let membership: Arc<dyn Membership> = Arc::new(membership);
    let (announcer, announcer_events) =
        announcer::start(announcer::Config::default(), &mut registry)?;
    let rules = node_rules::start(
        node_rules::Config {
            policy_routes: args.policy_routes,
            gateways: args.uplink_gateway.clone(),
            egress_mark: args.egress_mark,
            tunnel_port: args.tunnel_port,
            boot: args.plugin.egress_boot_file.clone().filter(|_| args.egress),
            translated: args.delivery == datapath::Delivery::Native,
            ..node_rules::Config::default()
        },
        &mut registry,
    );
    let mut data = datapath::Config {
        delivery: args.delivery,
        xdp: args.xdp.iter().cloned().collect(),
        compare: Duration::from_secs(args.compare_every),
        ..datapath::Config::new(&args.pins.bpf_pin_dir)
    };
    data.cilium = args.cilium.clone();
    data.gateway.mark = egress::marks(args.egress_mark).1;
    data.gateway.bindings = args.egress_bindings;
    let earlier = datapath::egress::earlier(&args.pins.bpf_pin_dir);
    let datapath = datapath::start(data, &mut registry);
    let copying = copying(&args, &node, address.ip(), &keys, &datapath, &mut registry).await?;
    let parts = Parts {
        announcer: Arc::new(announcer),
        rules: Arc::new(rules),
        datapath: Arc::new(datapath),
        membership: membership.clone(),
        copying,
    };
    let identity = Identity {
        node: node.clone(),
        boot,
        manifests: args.manifests.is_some(),
        delivery: args.delivery,
        egress_mark: args.egress.then_some(args.egress_mark),
        cilium: args.cilium.clone(),
        routers: args.uplink_gateway.clone(),
        gossip: address,
        replication_port: args.replication_port,
        peers: peers(&args).await?,
    };
    let in_force = [
        parts.rules.in_force(),
        parts.datapath.in_force(),
        parts.datapath.gateway_in_force(),
    ];
    let written = parts.datapath.written();
    let mut speaker = Speaker::new(identity, parts, keys, metrics.clone());
    speaker.recall(earlier);
    let shared = Shared(Arc::new(Mutex::new(speaker)));
    let _admin = serve(&args, registry, &shared, objects.problems.clone()).await?;
    let _control = control_socket(&args, &shared, start);
    tracing::info!(%node, %boot, %address, "speaking");

    let (writes, queue) = mpsc::unbounded_channel();
    let statuses = client.map(|client| {
        tokio::spawn(writer::run(
            client,
            node.to_string(),
            queue,
            metrics.clone(),
        ));
        (Reporter::default(), writes)
    });
    let (_listener, calls) = listen(&args);
    let _plugin = keep_plugin(&args)?;
    let inputs = Inputs {
        calls,
        in_force,
        written,
        objects,
        membership: membership_events,
        announcer: announcer_events,
    };
    let mut work = Loop {
        shared,
        start,
        statuses,
        key_source,
        metrics,
        counters,
        probes: probe::Prober::new(address.ip()),
    };
    work.run(inputs, early, stop).await;
    membership.leave(GOODBYE).await;
    Ok(())
}

/// Copies the bindings of egress gateways, where packets are treated by egress policies.
async fn copying(
    args: &Args,
    node: &NodeName,
    address: IpAddr,
    keys: &Keys,
    datapath: &impl DataPath,
    registry: &mut Registry,
) -> anyhow::Result<Option<Arc<dyn Copying>>> {
    if !args.egress {
        return Ok(None);
    }
    let listen = SocketAddr::new(address, args.replication_port);
    let (bindings, happened) = datapath.replicate();
    let config = replication::Config::new(node.clone(), listen);
    let replication = Replication::start(config, keys.clone(), bindings, happened, registry)
        .await
        .with_context(|| {
            format!("cannot listen at {listen}, where the next gateways of pods ask for copies of their flows: see --replication-port")
        })?;
    Ok(Some(Arc::new(replication)))
}

fn objects(
    args: &Args,
    client: Option<&kube::Client>,
    ignored: &source::Ignored,
) -> anyhow::Result<(Objects, Vec<Event>)> {
    if let Some(directory) = &args.manifests {
        let mut kinds = elector::kinds();
        kinds.remove(&Kind::VirtualIp);
        let kinds: Vec<Kind> = kinds.into_iter().collect();
        let (source, problems) = source::manifests(directory, &kinds)?;
        let (allocator, early) = Allocator::new(args.class_less, args.state_dir.as_deref())?;
        let objects = Objects {
            source,
            allocator: Some(allocator),
            problems: Some(problems),
        };
        return Ok((objects, early));
    }
    let kinds: Vec<Kind> = elector::kinds().into_iter().collect();
    let client = client.context("a client is there whenever --manifests is not given")?;
    let objects = Objects {
        source: source::kubernetes(client, &kinds, source::Options::default(), ignored),
        allocator: None,
        problems: None,
    };
    Ok((objects, Vec::new()))
}

/// The address to gossip at: the flag, or this node's `InternalIP`, for which the source is read.
async fn gossip_address(
    args: &Args,
    node: &NodeName,
    objects: &mut Objects,
    early: &mut Vec<Event>,
) -> anyhow::Result<SocketAddr> {
    if let Some(address) = args.gossip_address {
        return Ok(SocketAddr::new(address, args.gossip_port));
    }
    let mut found: Option<IpAddr> = None;
    while let Some(event) = objects.source.events.recv().await {
        if let Event::Apply(landfall_core::model::Object::Node(known)) = &event
            && known.name == *node
        {
            found = known.addresses.first().copied().or(found);
        }
        let listed = event == Event::Synced(Kind::Node);
        early.push(event);
        if let Some(found) = found {
            return Ok(SocketAddr::new(found, args.gossip_port));
        }
        if listed && args.manifests.is_some() {
            anyhow::bail!(
                "no Node manifest gives {node} an InternalIP to gossip at: give --gossip-address, or --node-name if \
                 this node is known by another name"
            );
        }
        if listed {
            tracing::warn!(%node, "no Node object gives this node an InternalIP yet; waiting (see --gossip-address, --node-name)");
        }
    }
    anyhow::bail!("the source of objects ended")
}

/// The peers that were named; a name is resolved once.
async fn peers(args: &Args) -> anyhow::Result<Vec<SocketAddr>> {
    let mut peers = Vec::new();
    for text in args.peers.iter().map(|text| text.trim()) {
        if text.is_empty() {
            continue;
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            peers.push(address);
        } else if let Ok(address) = text.parse::<IpAddr>() {
            peers.push(SocketAddr::new(address, args.gossip_port));
        } else {
            let target = if text.contains(':') {
                text.to_owned()
            } else {
                format!("{text}:{}", args.gossip_port)
            };
            let found = tokio::net::lookup_host(target).await.with_context(|| {
                format!("--peers: {text:?} is no address and cannot be resolved")
            })?;
            peers.extend(found);
        }
    }
    Ok(peers)
}

/// The speaker, shared with those who look, and with the control socket.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<Speaker>>);

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Speaker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve(
    args: &Args,
    registry: Registry,
    shared: &Shared,
    problems: Option<source::Problems>,
) -> anyhow::Result<admin::Admin> {
    let (ready, state) = (shared.clone(), shared.clone());
    admin::serve(
        args.admin_address,
        registry,
        move || ready.lock().is_ready(),
        move || {
            let mut state = state.lock().debug();
            if let Some(problems) = &problems {
                let list: Vec<String> = problems.list().iter().map(ToString::to_string).collect();
                state["problems"] = json!(list);
            }
            state
        },
    )
    .await
}

/// Where the CNI plugin calls, while pods' packets are judged.
fn listen(args: &Args) -> (Option<cni::Listener>, Option<mpsc::Receiver<cni::Call>>) {
    if !args.egress {
        return (None, None);
    }
    match cni::listen(&args.cni_socket) {
        Ok((listener, calls)) => (Some(listener), Some(calls)),
        Err(error) => {
            let path = args.cni_socket.display();
            tracing::warn!(%path, %error, "the CNI plugin cannot call: pods wait for the API server to tell of them");
            (None, None)
        }
    }
}

/// Keeps the CNI plugin in its place on this node.
fn keep_plugin(args: &Args) -> anyhow::Result<Option<cni::plugin::Keeper>> {
    let (Some(chain), Some(boot)) = (args.plugin.chain(), &args.plugin.egress_boot_file) else {
        return Ok(None);
    };
    let plugin = landfall_cni::chain::plugin(&args.cni_socket, boot);
    let program = cni::plugin::program()?;
    Ok(args
        .egress
        .then(|| cni::plugin::keep(chain, program, plugin)))
}

/// The control socket. Without it the speaker does its work all the same.
fn control_socket(args: &Args, shared: &Shared, start: Instant) -> Option<Control> {
    let path = &args.control_socket;
    if path.as_os_str().is_empty() {
        return None;
    }
    let router = control::router(shared.clone(), move || start.elapsed() + EPOCH);
    let served = landfall_runtime::control::serve(path, router);
    served
        .inspect_err(|error| {
            let path = path.display();
            tracing::warn!(%path, %error, "no control socket: `landfall egress` cannot ask this speaker (--control-socket)");
        })
        .ok()
}

struct Inputs {
    calls: Option<mpsc::Receiver<cni::Call>>,
    in_force: [watch::Receiver<InForce>; 3],
    written: watch::Receiver<u64>,
    objects: Objects,
    membership: mpsc::Receiver<MembershipEvent>,
    announcer: mpsc::Receiver<AnnouncerEvent>,
}

struct Loop {
    shared: Shared,
    start: Instant,
    statuses: Option<(Reporter, mpsc::UnboundedSender<Write>)>,
    key_source: KeySource,
    metrics: Metrics,
    counters: Arc<Counters>,
    probes: probe::Prober,
}

impl Loop {
    /// Monotonic.
    fn now(&self) -> Duration {
        self.start.elapsed() + EPOCH
    }

    /// When it is so late.
    fn at(&self, time: Duration) -> Instant {
        self.start + time.saturating_sub(EPOCH)
    }

    async fn run(&mut self, inputs: Inputs, early: Vec<Event>, stop: impl Future<Output = ()>) {
        let Inputs {
            mut calls,
            in_force:
                [
                    mut rules_in_force,
                    mut programs_in_force,
                    mut gateway_in_force,
                ],
            mut written,
            mut objects,
            mut membership,
            mut announcer,
        } = inputs;
        tokio::pin!(stop);
        self.source(&mut objects, early, true);
        self.shared.lock().call();
        let mut beat = ticker(BEAT);
        let mut keys = ticker(KEYS_EVERY);
        let mut show = ticker(SHOW_EVERY);
        let mut stopping: Option<Duration> = None;
        let (mut events, mut news, mut facts) = (Vec::new(), Vec::new(), Vec::new());
        let mut asked = Vec::new();
        loop {
            let (apply_at, ask_at) = self.appointments();
            tokio::select! {
                count = objects.source.events.recv_many(&mut events, BATCH) => {
                    if count == 0 {
                        tracing::error!("the source of objects ended; going on with what is known");
                        tokio::time::sleep(BEAT).await;
                    }
                    let events = std::mem::take(&mut events);
                    self.source(&mut objects, events, false);
                }
                _ = membership.recv_many(&mut news, BATCH) => {
                    let now = self.now();
                    let mut speaker = self.shared.lock();
                    for event in news.drain(..) {
                        speaker.membership(event, now);
                    }
                }
                _ = announcer.recv_many(&mut facts, BATCH) => {}
                () = called(calls.as_mut(), &mut asked) => {
                    let now = self.now();
                    let mut speaker = self.shared.lock();
                    for call in asked.drain(..) {
                        speaker.cni(call, now);
                    }
                }
                // Callers may be answered, and packets be led here.
                () = changed(&mut rules_in_force) => {}
                () = changed(&mut programs_in_force) => {}
                () = changed(&mut gateway_in_force) => {}
                () = changed(&mut written) => {}
                answer = self.probes.next() => {
                    let now = self.now();
                    let mut speaker = self.shared.lock();
                    match answer {
                        probe::Answer::Health(id, port, answer) => speaker.health(&id, port, answer, now),
                        probe::Answer::Host(endpoint, alive) => speaker.host_endpoint(endpoint, alive, now),
                    }
                }
                _ = beat.tick() => {
                    let now = self.now();
                    if self.probes.asks_hosts(now) {
                        let endpoints = self.shared.lock().host_questions();
                        self.probes.ask_hosts(endpoints, now);
                    }
                    let wakeup = objects.allocator.as_ref().and_then(Allocator::next_wakeup);
                    if wakeup.is_some_and(|at| at <= now) {
                        self.source(&mut objects, Vec::new(), false);
                    }
                }
                () = at(apply_at) => {}
                () = at(ask_at) => {
                    let now = self.now();
                    self.probes.ask_health(self.shared.lock().health_questions(), now);
                }
                _ = keys.tick() => self.read_keys(),
                _ = show.tick() => self.metrics.take_gossip(&self.counters),
                () = &mut stop, if stopping.is_none() => {
                    tracing::info!("stopping: handing over");
                    stopping = Some(self.now());
                    self.shared.lock().leave();
                }
            }
            // However much there is to do: what has come is heard before silence is concluded from.
            facts.extend(std::iter::from_fn(|| announcer.try_recv().ok()).take(BATCH));
            self.hear(facts.drain(..));
            self.settle();
            if let Some(since) = stopping {
                let waited = self.now().saturating_sub(since);
                let mut speaker = self.shared.lock();
                if speaker.is_drained() || waited >= HAND_OVER {
                    tracing::info!(?waited, "falling silent");
                    speaker.silence();
                    return;
                }
            }
        }
    }

    fn hear(&self, facts: impl Iterator<Item = AnnouncerEvent>) {
        let now = self.now();
        let mut speaker = self.shared.lock();
        for fact in facts {
            speaker.announcer(fact, now);
        }
    }

    /// When there is something to be made so, and when to ask health-check ports.
    fn appointments(&self) -> (Option<Instant>, Option<Instant>) {
        let speaker = self.shared.lock();
        let asks = speaker.health_questions().len() > 0;
        (
            speaker.apply_due().map(|time| self.at(time)),
            asks.then(|| self.at(self.probes.health_at())),
        )
    }

    /// Takes objects in, and hands out addresses where no controller does.
    fn source(&self, objects: &mut Objects, events: Vec<Event>, of_allocator: bool) {
        let now = self.now();
        let mut speaker = self.shared.lock();
        if let Some(allocator) = &mut objects.allocator {
            let own = |event: &Event| match event {
                Event::Synced(kind) => *kind == Kind::VirtualIp,
                Event::Apply(object) => {
                    matches!(object, landfall_core::model::Object::VirtualIp(_))
                }
                Event::Delete(_) | Event::Unwatched(_) => false,
            };
            for event in events {
                if !(of_allocator && own(&event)) {
                    allocator.apply(event.clone(), now);
                }
                speaker.source(event);
            }
            for event in allocator.reconcile(now) {
                speaker.source(event);
            }
        } else {
            for event in events {
                speaker.source(event);
            }
        }
    }

    fn settle(&mut self) {
        let (now, wall) = (self.now(), wall());
        let mut speaker = self.shared.lock();
        let touched = speaker.settle(now, wall);
        if let Some((reporter, writes)) = &mut self.statuses {
            for write in reporter.look(&speaker, touched, now, wall) {
                let _ = writes.send(write);
            }
        }
    }

    fn read_keys(&self) {
        if let KeySource::Text(_) = self.key_source {
            return;
        }
        match self.key_source.read() {
            Ok(keys) => self.shared.lock().rekey(keys),
            Err(error) => {
                self.metrics.key_errors.inc();
                tracing::warn!("the gossip keys stay as they were: {error:#}");
            }
        }
    }
}

/// Waits until then, or for ever.
async fn at(then: Option<Instant>) {
    match then {
        Some(then) => tokio::time::sleep_until(then).await,
        None => std::future::pending().await,
    }
}

/// Waits for calls, or for ever if nobody can call.
async fn called(calls: Option<&mut mpsc::Receiver<cni::Call>>, into: &mut Vec<cni::Call>) {
    if let Some(calls) = calls
        && calls.recv_many(into, BATCH).await > 0
    {
        return;
    }
    std::future::pending::<()>().await;
}

/// Waits until there is something new to see, or for ever if there will be none.
async fn changed<T>(of: &mut watch::Receiver<T>) {
    if of.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn ticker(period: Duration) -> tokio::time::Interval {
    let mut ticker = tokio::time::interval(period);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticker
}

/// Milliseconds since the Unix epoch, for display only.
fn wall() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}
