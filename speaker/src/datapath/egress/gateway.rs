//! The thread that makes this node the gateway it is to be: the programs, their maps, and the keeper of the bindings.
//!
//! Nothing of it is in the kernel without a policy. Once there is one, everything outlives the process, as the rest of
//! the data path does.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};
use landfall_ebpf_common::GATEWAY_KEEP;
use landfall_ebpf_common::egress::binding::Times;
use landfall_ebpf_common::egress::gateway::{GateSettings, MAX_BINDINGS, PolicyCount, Reason};
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};

use super::super::Hook;
use super::super::attached::{Attached, Side as _};
use super::super::layout::SHAPES as SHARED;
use super::super::pins::Pins;
use super::super::thread;
use super::super::uplink::{classifier, load};
use super::super::worker::lock;
use super::attach::{self, Side};
use super::changes::{Changes, QUEUE, Source, Told, listener};
use super::copies::{Copies, Kernel, Seam};
use super::error::GatewayError;
use super::judge::displace;
use super::keeper::{Keeper, Kept, Known, Orphaned};
use super::layout::{SHAPES, SIZED};
use super::list::{self, Bound};
use super::metrics::{Counters, SharedTables};
use super::plan::{Plan, Surroundings, plan};
use super::standing::{Standing, States, states};
use super::tables::{Tables, left, name_of_policy};
use super::usage::Usage;
use crate::egress::{Egress, InForce, PolicyName};
use crate::replication::{Bindings, Happened};

/// How long to wait before programs that could not be loaded are tried again.
const RETRY: Duration = Duration::from_secs(10);

/// How to be a gateway.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Where maps and links are pinned: the data path's own.
    pub pin_dir: PathBuf,
    /// How many bindings of each family there is room for. Maps that are pinned keep the room they have.
    pub bindings: u32,
    /// Idle times.
    pub times: Times,
    /// The bits of the packet mark that say that a packet of this node's pods is to leave by an address of its own; 0, if
    /// all packets of tenants are.
    pub mark: u32,
    /// The bits that are set in what another gateway sends to a pod of this node; 0 for none.
    pub arrival_mark: u32,
    /// Most ICMP errors of its own in a second, on each CPU.
    pub errors: u32,
    /// How often bindings are looked through, and attachments checked.
    pub watch: Duration,
    /// By which hook to attach.
    pub hook: Hook,
}

impl GatewayConfig {
    /// As the design has it, pinned under `pin_dir`.
    pub fn new(pin_dir: impl Into<PathBuf>) -> Self {
        Self {
            pin_dir: pin_dir.into(),
            bindings: MAX_BINDINGS,
            times: Times::default(),
            mark: 0,
            arrival_mark: 0,
            errors: 1000,
            watch: Duration::from_secs(1),
            hook: Hook::Auto,
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Orders {
    wanted: Option<(Arc<Egress>, Arc<Surroundings>)>,
    /// What this node is to egress addresses; nothing, as long as nobody has said it.
    states: Option<Arc<States>>,
    /// How often something was said, and how often when all of it was last in force.
    said: u64,
    done: u64,
    /// All of it goes out of the kernel at once, flows or not.
    disarmed: bool,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    orders: Mutex<Orders>,
    wake: Condvar,
    tables: SharedTables,
    copies: Arc<Copies>,
    /// Who is told what happens to bindings.
    told: Told,
    /// Whether it is in force, or why not.
    state: Mutex<State>,
    /// What the programs go by.
    in_force: watch::Sender<InForce>,
}

/// Whether a gateway is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// There is no policy.
    #[default]
    Idle,
    /// The programs are attached, at these interfaces, and the maps hold what they should.
    Armed(BTreeSet<u32>),
    /// They are not.
    Failed(String),
}

/// This node as a gateway. Dropping it ends the thread and leaves all else in the kernel.
#[derive(Debug)]
pub struct Gateway {
    shared: Arc<Shared>,
    pin_dir: PathBuf,
    /// The policies, by the names that the maps have of them, that an earlier process was the gateway of.
    left: BTreeSet<u64>,
    thread: Option<JoinHandle<()>>,
}

impl Gateway {
    /// Starts it, on a thread in the caller's network namespace. Never fails: what is missing is in [`Self::state`], and
    /// tried again.
    pub fn start(config: GatewayConfig, registry: &mut Registry) -> Self {
        let shared = Arc::new(Shared {
            orders: Mutex::default(),
            wake: Condvar::new(),
            tables: SharedTables::default(),
            copies: Arc::new(Copies::new(config.bindings)),
            told: Told::default(),
            state: Mutex::default(),
            in_force: watch::Sender::default(),
        });
        let pin_dir = config.pin_dir.clone();
        let left = left(&pin_dir);
        registry.register_collector(Box::new(Counters(Arc::clone(&shared.tables))));
        let mut task = Task {
            config,
            shared: Arc::clone(&shared),
            loaded: None,
            looked: None,
            taken: 0,
            again: None,
        };
        let thread = thread::start("gateway", move || task.run());
        Self {
            shared,
            pin_dir,
            left,
            thread: Some(thread),
        }
    }

    /// What it is to do, and where it is. Returns at once.
    pub fn set(&self, egress: Arc<Egress>, around: Arc<Surroundings>) {
        let mut orders = lock(&self.shared.orders);
        orders.wanted = Some((egress, around));
        orders.said += 1;
        self.shared.wake.notify_all();
    }

    /// What this node is to egress addresses, of all that it is gateway or standby of. Returns at once.
    ///
    /// To be said before replication is told the same: copies for an address that nothing is said of end by their own time,
    /// and nobody else's word counts for one that this node leads.
    pub fn stand(&self, standings: &BTreeMap<IpAddr, Standing>) {
        let mut orders = lock(&self.shared.orders);
        orders.states = Some(Arc::new(states(standings)));
        orders.said += 1;
        self.shared.wake.notify_all();
    }

    /// The bindings of this node's kernel, and what happens to them from now on: for
    /// [`Replication::start`](crate::replication::Replication::start). Who asked before is told nothing any more.
    pub fn replicate(&self) -> (Arc<dyn Bindings>, mpsc::Receiver<Happened>) {
        let (to, told) = mpsc::channel(QUEUE);
        *lock(&self.shared.told) = Some(to);
        lock(&self.shared.orders).said += 1;
        self.shared.wake.notify_all();
        (Arc::new(Seam(Arc::clone(&self.shared.copies))), told)
    }

    /// Takes all of it out of the kernel, the bindings of living flows too, and leaves it so, or ends that. Returns at
    /// once.
    pub fn disarm(&self, disarmed: bool) {
        let mut orders = lock(&self.shared.orders);
        if orders.disarmed != disarmed {
            orders.disarmed = disarmed;
            orders.said += 1;
            self.shared.wake.notify_all();
        }
    }

    /// It has nothing to do. Returns at once.
    pub fn clear(&self) {
        let mut orders = lock(&self.shared.orders);
        let around = match &orders.wanted {
            Some((_, around)) => Arc::clone(around),
            None => Arc::new(Surroundings::nowhere()),
        };
        orders.wanted = Some((Arc::default(), around));
        orders.said += 1;
        self.shared.wake.notify_all();
    }

    /// Whether all that was said is in force: then a node that takes over may say so to others.
    pub fn is_settled(&self) -> bool {
        let orders = lock(&self.shared.orders);
        orders.said == orders.done
    }

    /// What the programs go by; not known before this process has put something into the kernel.
    pub fn in_force(&self) -> watch::Receiver<InForce> {
        self.shared.in_force.subscribe()
    }

    /// Whether an earlier process has left this node as the gateway of a policy.
    pub fn was_gateway_of(&self, policy: &PolicyName) -> bool {
        self.left.contains(&name_of_policy(policy))
    }

    /// Whether it does it.
    pub fn state(&self) -> State {
        lock(&self.shared.state).clone()
    }

    /// How many packets met each fate, by its word.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        let tables = lock(&self.shared.tables);
        let counts = tables.as_ref().map(Tables::reasons).unwrap_or_default();
        Reason::ALL
            .iter()
            .map(|reason| reason.word())
            .zip(counts)
            .collect()
    }

    /// What the pods of each policy use here.
    pub fn usage(&self) -> BTreeMap<PolicyName, Usage> {
        let tables = lock(&self.shared.tables);
        tables.as_ref().map(Tables::usage).unwrap_or_default()
    }

    /// What was counted of each pod that leaves here or would, by its address.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn pod_counts(&self) -> io::Result<BTreeMap<IpAddr, PolicyCount>> {
        list::counts(&self.pin_dir)
    }

    /// The bindings that `wanted` says yes to, and how many there are more than `most` of them. It reads all there are.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn bindings(
        &self,
        most: usize,
        wanted: &dyn Fn(&Bound) -> bool,
    ) -> io::Result<(Vec<Bound>, usize)> {
        let names = match lock(&self.shared.tables).as_ref() {
            Some(tables) => tables.names().clone(),
            None => return Ok((Vec::new(), 0)),
        };
        list::read(&self.pin_dir, &names, most, wanted)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        lock(&self.shared.orders).stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

/// What is in the kernel.
struct Loaded {
    ebpf: Ebpf,
    pins: Pins,
    attached: Attached<Side>,
    keeper: Keeper,
    /// What happens to bindings, until somebody wants to know it.
    unread: Option<Source>,
    changes: Option<Changes>,
}

/// How many bindings that could not be placed are tried again at each look and at each change, at least.
const AGAIN: usize = 4_096;

/// What the thread owns.
struct Task {
    config: GatewayConfig,
    shared: Arc<Shared>,
    loaded: Option<Loaded>,
    looked: Option<Instant>,
    /// How much of what was said it has heard.
    taken: u64,
    /// When what could not be loaded is tried again, and why it could not.
    again: Option<(Instant, String)>,
}

impl Task {
    fn run(&mut self) {
        while let Some(orders) = self.wait() {
            if orders.disarmed {
                self.disarm();
                self.tell_in_force(InForce::Nothing);
                self.report(State::Idle);
                continue;
            }
            let Some((egress, around)) = &orders.wanted else {
                continue;
            };
            let changed = orders.said != orders.done;
            let state = match self.apply(egress, around, orders.states.as_deref(), changed) {
                Ok(state) => state,
                Err(error) => State::Failed(error.to_string()),
            };
            match &state {
                State::Armed(_) if !egress.policies.is_empty() => {
                    self.tell_in_force(InForce::Whole(Arc::clone(egress)));
                }
                State::Armed(_) | State::Idle => self.tell_in_force(InForce::Nothing),
                State::Failed(_) => {}
            }
            if !matches!(state, State::Failed(_)) {
                lock(&self.shared.orders).done = orders.said;
            }
            self.report(state);
        }
    }

    /// Waits for new orders or for the next look. Nothing: stop.
    fn wait(&mut self) -> Option<Orders> {
        let orders = lock(&self.shared.orders);
        let (orders, _) = self
            .shared
            .wake
            .wait_timeout_while(orders, self.config.watch, |orders| {
                orders.said == self.taken && !orders.stop
            })
            .unwrap_or_else(PoisonError::into_inner);
        self.taken = orders.said;
        (!orders.stop).then(|| orders.clone())
    }

    fn tell_in_force(&self, now: InForce) {
        self.shared.in_force.send_if_modified(|told| {
            let is_new = *told != now;
            *told = now;
            is_new
        });
    }

    fn report(&self, state: State) {
        let mut reported = lock(&self.shared.state);
        if *reported != state {
            if let State::Failed(reason) = &state {
                tracing::warn!(
                    reason,
                    "this node cannot be a gateway: pods whose packets it should translate do not reach the outside"
                );
            }
            *reported = state;
        }
    }

    fn apply(
        &mut self,
        egress: &Egress,
        around: &Surroundings,
        states: Option<&States>,
        changed: bool,
    ) -> Result<State, GatewayError> {
        let addresses = states
            .into_iter()
            .flat_map(States::keys)
            .map(|key| key.address())
            .collect();
        let plan = plan(egress, around, &addresses);
        if self.loaded.is_none() {
            if let Some((at, reason)) = &self.again
                && Instant::now() < *at
            {
                return Ok(State::Failed(reason.clone()));
            }
            let pins = Pins::open(&self.config.pin_dir)?;
            let idle = plan.interfaces.is_empty();
            if idle && !pins.map(SHAPES[0].name).exists() {
                return Ok(State::Idle);
            }
            self.again = None;
            if let Err(error) = self.load(pins, &plan, states) {
                self.again = Some((Instant::now() + RETRY, error.to_string()));
                return Err(error);
            }
        } else if changed {
            let (orphaned, busy) = self.orphans(&plan);
            self.end(&orphaned)?;
            self.write(&plan, states)?;
            // Until then they could begin anew.
            let late = match lock(&self.shared.tables).as_ref() {
                Some(tables) => tables.but_what_is_planned(busy),
                None => busy,
            };
            self.end(&late)?;
        }
        self.listen()?;
        let kept = self.keep(&plan)?;
        if plan.interfaces.is_empty() {
            // What it was is read once more: it has ended.
            if kept.is_some_and(|kept| kept.tally.is_idle()) {
                self.unload();
                return Ok(State::Idle);
            }
            return Ok(State::Armed(around.uplinks.keys().copied().collect()));
        }
        let Some(loaded) = &mut self.loaded else {
            return Ok(State::Idle);
        };
        attach::ensure(&mut loaded.attached, &mut loaded.ebpf, &plan.interfaces)?;
        Ok(State::Armed(plan.interfaces))
    }

    /// Loads the programs beside the pinned maps, and puts each in the place of the one that an earlier process left; not
    /// before the maps hold what they should.
    fn load(
        &mut self,
        pins: Pins,
        wanted: &Plan,
        states: Option<&States>,
    ) -> Result<(), GatewayError> {
        let mut loader = EbpfLoader::new();
        for shape in SHARED.iter().chain(&SHAPES) {
            loader.map_pin_path(shape.name, pins.map(shape.name));
        }
        for shape in &SHAPES[..SIZED] {
            loader.map_max_entries(shape.name, self.config.bindings);
        }
        displace(&mut loader);
        let mut ebpf = load(&mut loader)?;
        let kernel = Kernel::adopt(&mut ebpf)?;
        let unread = Source::adopt(&mut ebpf)?;
        let mut tables = Tables::adopt(&mut ebpf)?;
        tables.settle(GateSettings {
            times: self.config.times,
            mark: self.config.mark,
            errors: self.config.errors,
            flags: 0,
        })?;
        if let Some(states) = states {
            tables.stand(states)?;
        }
        let keeper = Keeper::adopt(&mut ebpf, self.config.times)?;
        classifier(&mut ebpf, GATEWAY_KEEP)?.load()?;
        let orphaned = tables.orphaned(wanted);
        let busy = tables.busy(&orphaned);
        if !orphaned.is_empty() {
            keeper.end_all(classifier(&mut ebpf, GATEWAY_KEEP)?, &orphaned)?;
        }
        tables.write(wanted, self.config.arrival_mark)?;
        if !busy.is_empty() {
            let late = tables.but_what_is_planned(busy);
            keeper.end_all(classifier(&mut ebpf, GATEWAY_KEEP)?, &late)?;
        }
        *lock(&self.shared.tables) = Some(tables);
        let attached = Attached::adopt(&mut ebpf, &pins, self.config.hook, Side::ALL)?;
        self.shared.copies.adopt(Some(kernel));
        self.shared.copies.try_again(AGAIN);
        self.loaded = Some(Loaded {
            ebpf,
            pins,
            attached,
            keeper,
            unread: Some(unread),
            changes: None,
        });
        Ok(())
    }

    /// Has the programs tell what happens to bindings, once somebody wants to know. It is not pinned what they tell: who
    /// listens is told first that changes were missed.
    fn listen(&mut self) -> Result<(), GatewayError> {
        let Some(loaded) = &mut self.loaded else {
            return Ok(());
        };
        if loaded.unread.is_none() || listener(&self.shared.told).is_none() {
            return Ok(());
        }
        if let Some(tables) = lock(&self.shared.tables).as_mut() {
            tables.tell()?;
        }
        let shared = Arc::clone(&self.shared);
        loaded.changes = loaded
            .unread
            .take()
            .map(|source| Changes::start(source, move || listener(&shared.told)));
        Ok(())
    }

    /// Pods whose addresses are others' by now, whose flows would leave by the address of those, and policies whose flows are
    /// not to go on; and those of them who can begin more.
    fn orphans(&self, plan: &Plan) -> (Orphaned, Orphaned) {
        let tables = lock(&self.shared.tables);
        let Some(tables) = tables.as_ref() else {
            return (Orphaned::default(), Orphaned::default());
        };
        let orphaned = tables.orphaned(plan);
        let busy = tables.busy(&orphaned);
        (orphaned, busy)
    }

    /// Ends their flows.
    fn end(&mut self, orphaned: &Orphaned) -> Result<(), GatewayError> {
        let Some(loaded) = self.loaded.as_mut().filter(|_| !orphaned.is_empty()) else {
            return Ok(());
        };
        let program: &SchedClassifier = classifier(&mut loaded.ebpf, GATEWAY_KEEP)?;
        let ended = loaded.keeper.end_all(program, orphaned)?;
        if ended > 0 {
            tracing::debug!(ended, "flows of pods and policies that are gone have ended");
        }
        Ok(())
    }

    fn write(&mut self, plan: &Plan, states: Option<&States>) -> Result<(), GatewayError> {
        if let Some(tables) = lock(&self.shared.tables).as_mut() {
            if let Some(states) = states {
                tables.stand(states)?;
            }
            let before = tables.limited().clone();
            tables.write(plan, self.config.arrival_mark)?;
            if !tables.limited().is_subset(&before) {
                // What is there is counted at once.
                self.looked = None;
            }
        }
        self.shared.copies.try_again(AGAIN);
        Ok(())
    }

    /// Looks through the bindings, if it is time.
    fn keep(&mut self, plan: &Plan) -> Result<Option<Kept>, GatewayError> {
        let now = Instant::now();
        let early = self
            .looked
            .is_some_and(|looked| now.duration_since(looked) < self.config.watch);
        let Some(loaded) = &mut self.loaded else {
            return Ok(None);
        };
        if early {
            return Ok(None);
        }
        self.looked = Some(now);
        self.shared.copies.try_again(AGAIN);
        let known = lock(&self.shared.tables)
            .as_ref()
            .map(|tables| (tables.states().clone(), tables.limited().clone()));
        let (states, limited) = known.unwrap_or_default();
        let known = Known {
            states: &states,
            limited: &limited,
        };
        let program: &SchedClassifier = classifier(&mut loaded.ebpf, GATEWAY_KEEP)?;
        let kept = loaded.keeper.look(program, &known)?;
        if let Some(tables) = lock(&self.shared.tables).as_mut() {
            tables.forget(plan, &kept)?;
        }
        Ok(Some(kept))
    }

    /// Takes everything out of the kernel.
    fn unload(&mut self) {
        let Some(mut loaded) = self.loaded.take() else {
            return;
        };
        attach::detach_all(&mut loaded.attached);
        self.shared.copies.adopt(None);
        *lock(&self.shared.tables) = None;
        for shape in SHAPES {
            if let Err(error) = std::fs::remove_file(loaded.pins.map(shape.name)) {
                tracing::debug!(map = shape.name, %error, "a map was not pinned");
            }
        }
    }

    /// The same, also of what an earlier process has left and this one has not looked at.
    fn disarm(&mut self) {
        if self.loaded.is_none()
            && let Ok(pins) = Pins::open(&self.config.pin_dir)
            && pins.map(SHAPES[0].name).exists()
            && let Err(error) = self.load(pins, &Plan::default(), None)
        {
            tracing::warn!(%error, "what an earlier process has left of the gateway stays");
        }
        self.unload();
    }
}
