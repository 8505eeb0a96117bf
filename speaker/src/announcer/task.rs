//! The task behind the [`Handle`](super::Handle): holds what is to be announced, and does it.
//!
//! ```text
//!  loop ──commands──> ┌──────┐ ──frames──> sockets
//!  netlink ─changes─> │ task │ ──joins───> groups
//!  sockets ─inbound─> └──────┘ ──events──> loop
//!                    schedule, probes: when
//! ```

mod respond;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::groups::Groups;
use super::handle::Command;
use super::interfaces::Change;
use super::links::Link;
use super::metrics::{FamilyLabel, Metrics};
use super::packets::{Inbound, Sockets};
use super::probe::{Probes, Step};
use super::schedule::{Pace, Schedule};
use super::{Announcement, AnnouncerEvent, Config, MacAddr, ProbeOutcome, frame};

/// How long until a socket or a membership that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How many frames may wait for the task; the kernel's queues hold the rest.
const INBOUND: usize = 256;

/// Where the task hears from.
pub(super) struct Ears {
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
    pub(super) changes: mpsc::Receiver<Change>,
}

pub(super) struct Task {
    metrics: Metrics,
    events: mpsc::Sender<AnnouncerEvent>,
    /// Events that must not be lost, until the loop has room for them.
    outbox: VecDeque<AnnouncerEvent>,
    started: Instant,
    rng: StdRng,
    /// What is to be announced, and on which interface.
    vips: HashMap<IpAddr, u32>,
    schedule: Schedule,
    probes: Probes,
    groups: Groups,
    /// When each address's last conflict was reported.
    conflicts: HashMap<IpAddr, Duration>,
    links: BTreeMap<u32, Link>,
    /// Of all our interfaces.
    macs: HashSet<MacAddr>,
    listening: BTreeSet<u32>,
    sockets: BTreeMap<u32, Sockets>,
    openings: u64,
    inbound: mpsc::Sender<Inbound>,
    retry: Option<Duration>,
}

impl Task {
    pub(super) fn new(
        config: Config,
        metrics: Metrics,
        events: mpsc::Sender<AnnouncerEvent>,
    ) -> (Self, mpsc::Receiver<Inbound>) {
        let (inbound, frames) = mpsc::channel(INBOUND);
        let pace = Pace {
            refresh: config.refresh,
            rate: config.frames_per_second,
            burst: config.burst,
        };
        let task = Self {
            metrics,
            events,
            outbox: VecDeque::new(),
            started: Instant::now(),
            rng: StdRng::from_os_rng(),
            vips: HashMap::new(),
            schedule: Schedule::new(pace, Duration::ZERO),
            probes: Probes::default(),
            groups: Groups::default(),
            conflicts: HashMap::new(),
            links: BTreeMap::new(),
            macs: HashSet::new(),
            listening: BTreeSet::new(),
            sockets: BTreeMap::new(),
            openings: 0,
            inbound,
            retry: None,
        };
        (task, frames)
    }

    /// Runs until the last handle is dropped.
    pub(super) async fn run(mut self, mut ears: Ears, mut frames: mpsc::Receiver<Inbound>) {
        loop {
            let wake = self.work();
            let at = wake.map(|at| self.started + at);
            let events = self.events.clone();
            tokio::select! {
                // A withdrawal goes ahead of any answer.
                biased;
                command = ears.commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return,
                },
                Some(change) = ears.changes.recv() => self.changed(change),
                Some(inbound) = frames.recv() => self.hear(inbound),
                room = events.reserve(), if !self.outbox.is_empty() => match room {
                    Ok(room) => {
                        let event = self.outbox.pop_front().expect("checked by the branch");
                        room.send(event);
                    }
                    Err(_) => self.outbox.clear(), // nobody listens
                },
                () = tokio::time::sleep_until(at.unwrap_or(self.started)), if at.is_some() => {}
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Does what is due; when something will be next.
    fn work(&mut self) -> Option<Duration> {
        let now = self.now();
        if self.retry.is_some_and(|at| at <= now) {
            self.retry = None;
            self.open_sockets();
            if let Err(error) = self.groups.retry() {
                self.join_failed(&error);
            }
        }
        while let Some(step) = self.probes.poll(now) {
            match step {
                Step::Probe(vip) => {
                    if !self.probe(vip) {
                        self.probes.put_off(vip, now);
                    }
                }
                Step::Free(vip) => {
                    self.schedule.start(vip, now);
                    self.count_announced();
                    self.outbox.push_back(AnnouncerEvent::Probed {
                        vip,
                        outcome: ProbeOutcome::Free,
                    });
                }
            }
        }
        while let Some(due) = self.schedule.poll(now, &mut self.rng) {
            if due.delayed {
                self.metrics.delayed.inc();
            }
            self.gratuitous(due.vip);
        }
        [self.schedule.wake(now), self.probes.wake(), self.retry]
            .into_iter()
            .flatten()
            .min()
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Announce(announcement) => self.announce(&announcement),
            Command::Withdraw(vip) => self.withdraw(vip),
            Command::Reannounce(vip) => {
                if self.announced_on(vip).is_some() {
                    self.schedule.start(vip, self.now());
                }
            }
            Command::Listen(interfaces) => {
                self.listening = interfaces.into_iter().collect();
                self.close_sockets();
                self.open_sockets();
            }
            Command::Hello(interface, to, payload) => {
                if let Some(link) = self.links.get(&interface) {
                    let to = to.unwrap_or(frame::HELLO_GROUP);
                    let frame = frame::hello(link.interface.mac, to, &payload);
                    self.send(interface, &frame);
                }
            }
        }
    }

    fn announce(&mut self, announcement: &Announcement) {
        let (vip, interface) = (announcement.vip, announcement.interface);
        match self.vips.get(&vip) {
            Some(&current) if current == interface => {
                // Only an end of probing is news.
                if announcement.probe || !self.probes.contains(vip) {
                    return;
                }
                self.probes.stop(vip);
            }
            Some(_) => self.withdraw(vip),
            None => {}
        }
        self.vips.insert(vip, interface);
        self.open_sockets();
        // Before the first announcement: who hears it may ask at once.
        if let IpAddr::V6(address) = vip
            && let Err(error) = self.groups.join(interface, address)
        {
            self.join_failed(&error);
        }
        if announcement.probe {
            self.probes.start(vip, self.now());
        } else {
            self.schedule.start(vip, self.now());
        }
        self.count_announced();
    }

    fn withdraw(&mut self, vip: IpAddr) {
        let Some(interface) = self.vips.remove(&vip) else {
            return;
        };
        self.schedule.stop(vip);
        self.probes.stop(vip);
        self.conflicts.remove(&vip);
        if let IpAddr::V6(address) = vip
            && let Err(error) = self.groups.leave(interface, address)
        {
            // The interface may be gone, and the membership with it.
            tracing::debug!(%vip, %error, "leaving a solicited-node group");
        }
        self.close_sockets();
        self.count_announced();
    }

    /// The interface on which this node answers for an address now.
    fn announced_on(&self, vip: IpAddr) -> Option<u32> {
        let interface = self.vips.get(&vip).copied()?;
        (!self.probes.contains(vip)).then_some(interface)
    }

    fn count_announced(&self) {
        let count = self.vips.keys().filter(|vip| !self.probes.contains(**vip));
        self.metrics
            .announced
            .set(i64::try_from(count.count()).unwrap_or(i64::MAX));
    }

    /// Takes in the interfaces as they are now.
    fn changed(&mut self, change: Change) {
        let Change { links, notify } = change;
        let now = self.now();
        let before = std::mem::replace(&mut self.links, links);
        self.macs = self.links.values().map(|link| link.interface.mac).collect();
        for index in before.keys() {
            if !self.links.contains_key(index) {
                self.sockets.remove(index);
                self.groups.forget(*index);
            }
        }
        let stirred: BTreeSet<u32> = self
            .links
            .iter()
            .filter(|(index, link)| {
                let same = before
                    .get(index)
                    .is_some_and(|before| unstirred(before, link));
                link.interface.up && (!same || notify.contains(index))
            })
            .map(|(index, _)| *index)
            .collect();
        for (&vip, interface) in &self.vips {
            if stirred.contains(interface) && !self.probes.contains(vip) {
                self.schedule.start(vip, now);
            }
        }
        self.open_sockets();
        if let Err(error) = self.groups.retry() {
            self.join_failed(&error);
        }
        self.outbox
            .retain(|event| !matches!(event, AnnouncerEvent::Interfaces(_)));
        let interfaces = self.links.values().map(|link| link.interface.clone());
        self.outbox
            .push_back(AnnouncerEvent::Interfaces(interfaces.collect()));
    }

    /// Opens what sockets are wanted and not open.
    fn open_sockets(&mut self) {
        let wanted: BTreeSet<u32> = self
            .vips
            .values()
            .chain(&self.listening)
            .filter(|index| !self.sockets.contains_key(index))
            .copied()
            .collect();
        for interface in wanted {
            self.openings += 1;
            match Sockets::open(interface, self.openings, &self.inbound, &self.metrics) {
                Ok(sockets) => {
                    self.sockets.insert(interface, sockets);
                }
                Err(error) => {
                    self.metrics.failed("open");
                    tracing::warn!(interface, %error, "cannot listen to ARP and ND");
                    self.retry = Some(self.now() + RETRY);
                }
            }
        }
    }

    /// Closes the sockets that nothing wants any more.
    fn close_sockets(&mut self) {
        let wanted: HashSet<u32> = self.vips.values().chain(&self.listening).copied().collect();
        self.sockets.retain(|index, _| wanted.contains(index));
    }

    fn join_failed(&mut self, error: &std::io::Error) {
        self.metrics.failed("join");
        tracing::warn!(%error, "cannot join a solicited-node group: solicitations may not arrive");
        self.retry = Some(self.now() + RETRY);
    }

    /// Announces an address to all neighbours, if it still is to be announced and its link is up.
    fn gratuitous(&mut self, vip: IpAddr) {
        let Some(interface) = self.announced_on(vip) else {
            return;
        };
        let Some(link) = self.links.get(&interface).filter(|link| link.interface.up) else {
            return; // announced once the link comes up
        };
        let mac = link.interface.mac;
        let frames = match vip {
            IpAddr::V4(vip) => frame::arp_gratuitous(mac, vip).to_vec(),
            IpAddr::V6(vip) => {
                let from = link.link_local.unwrap_or(vip);
                vec![frame::unsolicited_advertisement(mac, from, vip)]
            }
        };
        for frame in frames {
            if self.send(interface, &frame) {
                self.metrics
                    .announcements
                    .get_or_create(&FamilyLabel::of(vip))
                    .inc();
            }
        }
    }

    /// Asks whether anybody has an address; false if nobody can be asked now.
    fn probe(&self, vip: IpAddr) -> bool {
        let link = self
            .vips
            .get(&vip)
            .and_then(|interface| self.links.get(interface))
            .filter(|link| link.interface.up);
        let Some(link) = link else {
            return false;
        };
        let mac = link.interface.mac;
        let frame = match vip {
            IpAddr::V4(vip) => frame::arp_probe(mac, vip),
            IpAddr::V6(vip) => frame::nd_probe(mac, vip),
        };
        let sent = self.send(link.interface.index, &frame);
        if sent {
            self.metrics
                .probes
                .get_or_create(&FamilyLabel::of(vip))
                .inc();
        }
        sent
    }

    /// Sends a frame; whether it went out.
    fn send(&self, interface: u32, frame: &[u8]) -> bool {
        let Some(sockets) = self.sockets.get(&interface) else {
            return false;
        };
        if let Err(error) = sockets.send(frame) {
            self.metrics.failed("send");
            tracing::debug!(interface, %error, "a frame was not sent");
            return false;
        }
        true
    }
}

/// Whether nothing changed that the neighbours should hear of.
fn unstirred(before: &Link, now: &Link) -> bool {
    let (old, new) = (&before.interface, &now.interface);
    old.up
        && old.mac == new.mac
        && old.addresses == new.addresses
        && before.link_local == now.link_local
}
