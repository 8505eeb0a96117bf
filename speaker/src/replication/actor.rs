//! The single owner of what is written and read.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use landfall_core::groups::GroupId;
use landfall_core::model::NodeName;
use landfall_core::replication::{Change, Message, Position, Reader, Refusal, Step, Writer};
use tokio::net::TcpListener;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tracing::{debug, warn};

use super::metrics::{Metrics, lock};
use super::peers::{Heard, Line, LineId, Peers};
use super::{Bindings, CHUNK, Config, Copied, Coverage, Cursor, Happened, Role, Roles};
use crate::egress::PolicyName;

/// How often a gateway that did not lead, or was not there, is asked again.
const ASK: Duration = Duration::from_millis(200);
/// What one look at all bindings turns into at most: they, and the word that those were all.
const COPY_MESSAGES: usize = 2;
const _: () = assert!(CHUNK <= 1_000, "a look at bindings fits one message");

pub(super) struct Actor {
    config: Config,
    peers: Peers,
    bindings: Arc<dyn Bindings>,
    metrics: Metrics,
    begun: Instant,
    lines: BTreeMap<LineId, Line>,
    /// The line of each caller, and to each gateway that is called.
    callers: BTreeMap<NodeName, LineId>,
    gateways: BTreeMap<NodeName, LineId>,
    led: BTreeMap<GroupId, Led>,
    group_of: HashMap<IpAddr, GroupId>,
    followed: BTreeMap<GroupId, Followed>,
    /// When what is gathered is sent.
    due: Option<Instant>,
}

/// A group that this node is the gateway of.
struct Led {
    writer: Writer,
    addresses: BTreeSet<IpAddr>,
    policies: BTreeSet<PolicyName>,
    /// How far each copy is.
    cursors: BTreeMap<NodeName, Option<Cursor>>,
}

/// A group that this node would take over.
struct Followed {
    reader: Reader,
    addresses: BTreeSet<IpAddr>,
    gateway: NodeName,
    stream: Stream,
}

/// What is to come from the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    /// Nothing: it is to be asked.
    None,
    /// What was asked for.
    Asked,
    /// All bindings; what comes before them is of no use.
    Copy,
}

impl Actor {
    pub(super) fn new(
        config: Config,
        peers: Peers,
        bindings: Arc<dyn Bindings>,
        metrics: Metrics,
    ) -> Self {
        Self {
            config,
            peers,
            bindings,
            metrics,
            begun: Instant::now(),
            lines: BTreeMap::new(),
            callers: BTreeMap::new(),
            gateways: BTreeMap::new(),
            led: BTreeMap::new(),
            group_of: HashMap::new(),
            followed: BTreeMap::new(),
            due: None,
        }
    }

    pub(super) async fn run(
        mut self,
        listener: TcpListener,
        mut roles: watch::Receiver<Roles>,
        mut happened: mpsc::Receiver<Happened>,
        mut heard: mpsc::Receiver<Heard>,
    ) {
        let mut ask = interval(ASK);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tells = true;
        loop {
            let due = self.due;
            let gathered = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = roles.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let wanted = roles.borrow_and_update().clone();
                    self.take_roles(&wanted).await;
                }
                told = happened.recv(), if tells => match told {
                    Some(told) => self.record(told),
                    None => tells = false,
                },
                Some(heard) = heard.recv() => self.hear(heard).await,
                taken = listener.accept() => match taken {
                    Ok((stream, from)) => self.peers.take(stream, from),
                    Err(error) => {
                        warn!(%error, "replication: cannot take a caller");
                        sleep(ASK).await;
                    }
                },
                () = gathered => {
                    self.due = None;
                    self.send().await;
                }
                _ = ask.tick() => {
                    self.ask();
                    self.measure();
                }
            }
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Sends soon: at most so long after the first that is gathered.
    fn soon(&mut self) {
        let at = Instant::now() + self.config.batch;
        self.due.get_or_insert(at);
    }

    async fn take_roles(&mut self, roles: &Roles) {
        let before = self.addresses();
        let ended: Vec<GroupId> = self
            .led
            .keys()
            .filter(|group| roles.get(*group).is_none_or(|role| role.gateway.is_some()))
            .cloned()
            .collect();
        for group in ended {
            self.stop_leading(&group);
        }
        let ended: Vec<GroupId> = self
            .followed
            .keys()
            .filter(|group| roles.get(*group).is_none_or(|role| role.gateway.is_none()))
            .cloned()
            .collect();
        for group in ended {
            self.stop_following(&group);
        }
        let mut gateways: BTreeMap<NodeName, SocketAddr> = BTreeMap::new();
        for (group, role) in roles {
            match &role.gateway {
                None => self.lead(group, role),
                Some((gateway, at)) => {
                    gateways.insert(gateway.clone(), *at);
                    self.follow(group, role, gateway);
                }
            }
        }
        // Whatever group they are of by now.
        self.forget(&(&before - &self.addresses())).await;
        for gone in self.peers.call(&gateways) {
            if let Some(line) = self.gateways.get(&gone).copied() {
                self.down(line);
            }
        }
        self.ask();
    }

    fn lead(&mut self, group: &GroupId, role: &Role) {
        let log = self.config.log;
        let led = self.led.entry(group.clone()).or_insert_with(|| Led {
            writer: Writer::new(group.clone(), role.epoch, log, first()),
            addresses: role.addresses.clone(),
            policies: BTreeSet::new(),
            cursors: BTreeMap::new(),
        });
        led.policies.clone_from(&role.policies);
        if led.writer.epoch() != role.epoch {
            let mut writer = Writer::new(group.clone(), role.epoch, log, first());
            for follower in led.writer.followers() {
                writer.follow(follower.clone(), None);
            }
            led.writer = writer;
        } else if led.addresses != role.addresses {
            led.writer.lost();
        }
        led.addresses.clone_from(&role.addresses);
        self.group_of.retain(|_, of| of != group);
        for address in &role.addresses {
            self.group_of.insert(*address, group.clone());
        }
        self.soon();
    }

    fn stop_leading(&mut self, group: &GroupId) {
        let Some(led) = self.led.remove(group) else {
            return;
        };
        self.group_of.retain(|_, of| of != group);
        let followers: Vec<NodeName> = led.writer.followers().cloned().collect();
        for follower in followers {
            let group = group.clone();
            self.tell_caller(&follower, Message::NotLeader { group });
        }
    }

    fn follow(&mut self, group: &GroupId, role: &Role, gateway: &NodeName) {
        let followed = self
            .followed
            .entry(group.clone())
            .or_insert_with(|| Followed {
                reader: Reader::default(),
                addresses: BTreeSet::new(),
                gateway: gateway.clone(),
                stream: Stream::None,
            });
        followed.reader.claimed(role.epoch);
        followed.addresses.clone_from(&role.addresses);
        if followed.gateway != *gateway {
            let before = std::mem::replace(&mut followed.gateway, gateway.clone());
            followed.reader.interrupted();
            followed.stream = Stream::None;
            let group = group.clone();
            self.tell_gateway(&before, Message::Unfollow { group });
        }
    }

    fn stop_following(&mut self, group: &GroupId) {
        let Some(followed) = self.followed.remove(group) else {
            return;
        };
        let message = Message::Unfollow {
            group: group.clone(),
        };
        self.tell_gateway(&followed.gateway, message);
    }

    /// Those whose bindings this node has: it is their gateway, or would take over.
    fn addresses(&self) -> BTreeSet<IpAddr> {
        let led = self.led.values().flat_map(|led| &led.addresses);
        let followed = self.followed.values().flat_map(|it| &it.addresses);
        led.chain(followed).copied().collect()
    }

    async fn forget(&self, addresses: &BTreeSet<IpAddr>) {
        if addresses.is_empty() {
            return;
        }
        self.bindings.keep(addresses, HashSet::new()).await;
    }

    fn record(&mut self, told: Happened) {
        let now = self.now();
        match told {
            Happened::Lost => self.led.values_mut().for_each(|led| led.writer.lost()),
            Happened::Changes(changes) => {
                for change in changes {
                    let (Change::New(binding) | Change::Closed(binding)) = &change;
                    let group = self.group_of.get(&binding.egress_ip());
                    if let Some(led) = group.and_then(|group| self.led.get_mut(group)) {
                        led.writer.record(change, now);
                    }
                }
            }
        }
        self.soon();
    }

    /// Sends to each standby what it lacks, as far as its line takes it.
    async fn send(&mut self) {
        let mut left = false;
        let groups: Vec<GroupId> = self.led.keys().cloned().collect();
        for group in groups {
            let Some(led) = self.led.get_mut(&group) else {
                continue;
            };
            let followers: Vec<NodeName> = led.writer.followers().cloned().collect();
            for follower in followers {
                let line = self.callers.get(&follower);
                let Some(line) = line.and_then(|line| self.lines.get(line)) else {
                    continue;
                };
                left |= feed(led, &follower, line, &*self.bindings).await;
            }
        }
        if left {
            self.soon();
        }
    }

    /// Asks the gateways that are there for what is not coming.
    fn ask(&mut self) {
        for (group, followed) in &mut self.followed {
            let line = self.gateways.get(&followed.gateway);
            let Some(line) = line.and_then(|line| self.lines.get(line)) else {
                continue;
            };
            if followed.stream == Stream::None {
                let known = followed.reader.known();
                let message = Message::Follow {
                    group: group.clone(),
                    known,
                };
                if line.to.try_send(message).is_ok() {
                    followed.stream = if known.is_some() {
                        Stream::Asked
                    } else {
                        Stream::Copy
                    };
                }
            }
        }
    }

    fn measure(&self) {
        let followers = self.led.values().flat_map(|led| {
            led.writer
                .followers()
                .map(|follower| led.writer.behind(follower))
        });
        let (mut standbys, mut behind) = (0, 0);
        for one in followers {
            standbys += 1;
            behind = behind.max(one.unwrap_or(0));
        }
        self.metrics.standbys.set(standbys);
        self.metrics
            .behind
            .set(i64::try_from(behind).unwrap_or(i64::MAX));
        *lock(&self.metrics.copied) = self.copied();
    }

    /// Of a policy with several groups, the one that is copied worst.
    fn copied(&self) -> Copied {
        let now = self.now();
        let mut copied = Copied::new();
        for led in self.led.values() {
            let followers = led.writer.followers();
            let lags: Vec<Duration> = followers
                .filter_map(|follower| led.writer.lag(follower, now))
                .collect();
            let coverage = Coverage {
                standbys: lags.len() as u64,
                lag: lags.into_iter().max().unwrap_or_default(),
            };
            for policy in &led.policies {
                let worst = copied.entry(policy.clone()).or_insert(coverage);
                worst.standbys = worst.standbys.min(coverage.standbys);
                worst.lag = worst.lag.max(coverage.lag);
            }
        }
        copied
    }

    async fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Up(number, line) => self.up(number, line),
            Heard::Down(number) => self.down(number),
            Heard::Said(number, message) => {
                let Some(line) = self.lines.get(&number) else {
                    return;
                };
                let node = line.node.clone();
                if line.called {
                    self.gateway_says(&node, message).await;
                } else {
                    self.standby_says(&node, message);
                }
            }
        }
    }

    fn up(&mut self, number: LineId, line: Line) {
        let lines = if line.called {
            &mut self.gateways
        } else {
            &mut self.callers
        };
        let before = lines.insert(line.node.clone(), number);
        self.lines.insert(number, line);
        if let Some(before) = before {
            self.down(before);
        }
        self.ask();
    }

    fn down(&mut self, number: LineId) {
        let Some(line) = self.lines.remove(&number) else {
            return;
        };
        if line.called {
            if self.gateways.get(&line.node) == Some(&number) {
                self.gateways.remove(&line.node);
            }
            for followed in self.followed.values_mut() {
                if followed.gateway == line.node {
                    followed.reader.interrupted();
                    followed.stream = Stream::None;
                }
            }
        } else {
            if self.callers.get(&line.node) == Some(&number) {
                self.callers.remove(&line.node);
            }
            for led in self.led.values_mut() {
                led.writer.unfollow(&line.node);
            }
        }
    }

    fn tell_caller(&self, node: &NodeName, message: Message) {
        self.tell(self.callers.get(node), message);
    }

    fn tell_gateway(&self, node: &NodeName, message: Message) {
        self.tell(self.gateways.get(node), message);
    }

    /// What finds no room is not said: it is no loss, since what is wrong then is asked about again.
    fn tell(&self, line: Option<&LineId>, message: Message) {
        if let Some(line) = line.and_then(|line| self.lines.get(line))
            && let Err(TrySendError::Full(_)) = line.to.try_send(message)
        {
            debug!(node = %line.node, "replication: a line is full");
        }
    }

    fn standby_says(&mut self, node: &NodeName, message: Message) {
        match message {
            Message::Follow { group, known } => {
                let Some(led) = self.led.get_mut(&group) else {
                    self.tell_caller(node, Message::NotLeader { group });
                    return;
                };
                led.writer.follow(node.clone(), known);
                self.soon();
            }
            Message::Unfollow { group } => {
                if let Some(led) = self.led.get_mut(&group) {
                    led.writer.unfollow(node);
                }
            }
            Message::Applied { group, position } => {
                let now = self.now();
                let led = self.led.get_mut(&group);
                let lag = led.and_then(|led| led.writer.applied(node, position, now));
                if let Some(lag) = lag {
                    self.metrics.lag.observe(lag.as_secs_f64());
                }
            }
            Message::Hello { .. }
            | Message::NotLeader { .. }
            | Message::Begin { .. }
            | Message::Held { .. }
            | Message::End { .. }
            | Message::Changes { .. } => self.metrics.refuse("message"),
        }
    }

    async fn gateway_says(&mut self, node: &NodeName, message: Message) {
        let (group, step) = match message {
            Message::NotLeader { group } => {
                if let Some(followed) = self.of(&group, node) {
                    followed.reader.interrupted();
                    followed.stream = Stream::None;
                }
                return;
            }
            Message::Begin { group, position } => {
                let Some(followed) = self.of(&group, node) else {
                    return;
                };
                followed.stream = Stream::Asked;
                let step = followed.reader.begin(position);
                self.metrics.copies.inc();
                (group, step)
            }
            Message::Held { group, bindings } => {
                let Some(followed) = self.awaited(&group, node) else {
                    return;
                };
                let step = followed.reader.held(bindings);
                (group, step)
            }
            Message::End { group } => {
                let Some(followed) = self.awaited(&group, node) else {
                    return;
                };
                let step = followed.reader.end();
                (group, step)
            }
            Message::Changes {
                group,
                position,
                changes,
            } => {
                let Some(followed) = self.awaited(&group, node) else {
                    return;
                };
                let step = followed.reader.changes(position, changes);
                (group, step)
            }
            Message::Hello { .. }
            | Message::Follow { .. }
            | Message::Unfollow { .. }
            | Message::Applied { .. } => {
                self.metrics.refuse("message");
                return;
            }
        };
        match step {
            Ok(step) => self.apply(group, node, step).await,
            Err(refusal) => self.refuse(&group, refusal),
        }
    }

    /// A group that this node would take over from that one.
    fn of(&mut self, group: &GroupId, gateway: &NodeName) -> Option<&mut Followed> {
        let followed = self.followed.get_mut(group)?;
        (followed.gateway == *gateway).then_some(followed)
    }

    /// The same, if what comes is of use.
    fn awaited(&mut self, group: &GroupId, gateway: &NodeName) -> Option<&mut Followed> {
        let followed = self.of(group, gateway)?;
        (followed.stream == Stream::Asked).then_some(followed)
    }

    async fn apply(&mut self, group: GroupId, gateway: &NodeName, step: Step) {
        let position: Option<Position> = match step {
            Step::Wait => None,
            Step::Apply {
                insert,
                remove,
                position,
            } => {
                self.metrics
                    .changes
                    .inc_by((insert.len() + remove.len()) as u64);
                if !remove.is_empty() {
                    self.bindings.remove(remove).await;
                }
                if !insert.is_empty() {
                    self.bindings.insert(insert).await;
                }
                position
            }
            Step::Keep { bindings, position } => {
                if let Some(followed) = self.followed.get(&group) {
                    self.bindings.keep(&followed.addresses, bindings).await;
                }
                Some(position)
            }
        };
        if let Some(position) = position {
            self.tell_gateway(gateway, Message::Applied { group, position });
        }
    }

    fn refuse(&mut self, group: &GroupId, refusal: Refusal) {
        let Some(followed) = self.followed.get_mut(group) else {
            return;
        };
        debug!(%group, %refusal, "replication: refused");
        match refusal {
            Refusal::Gap => self.metrics.refuse("gap"),
            Refusal::Stale { .. } => self.metrics.refuse("stale"),
        }
        followed.reader.interrupted();
        followed.stream = Stream::None;
        if refusal == Refusal::Gap {
            self.ask();
        }
    }
}

/// Where a writer's numbers begin.
fn first() -> u64 {
    u64::from(rand::random::<u32>()) << 16
}

/// Sends one standby what it lacks; whether something is left.
async fn feed(led: &mut Led, follower: &NodeName, line: &Line, bindings: &dyn Bindings) -> bool {
    while line.to.capacity() >= COPY_MESSAGES {
        if let Some(message) = led.writer.poll(follower) {
            if matches!(message, Message::Begin { .. }) {
                led.cursors.remove(follower);
            }
            let _ = line.to.try_send(message);
            continue;
        }
        if !led.writer.copies_to(follower) {
            return false;
        }
        let from = led.cursors.get(follower).copied().flatten();
        let chunk = bindings.held(&led.addresses, from).await;
        led.cursors.insert(follower.clone(), chunk.next);
        let last = chunk.next.is_none();
        if chunk.bindings.is_empty() && !last {
            // Nothing was found yet: the others have their turn first.
            break;
        }
        for message in led.writer.held(follower, &chunk.bindings, last) {
            let _ = line.to.try_send(message);
        }
    }
    !line.to.is_closed()
}
