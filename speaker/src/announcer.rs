//! The seam between what should be announced and the frames that announce it.
//!
//! The loop says which addresses this node answers for and on which interface; the announcer does the
//! answering, the gratuitous announcements, the probing and the watching of links, and reports facts.
//!
//! - `handle`: what the loop holds; [`twin`]: its likeness in memory for the loop's tests.
//! - `task`: holds what is to be announced, answers and notes claims.
//! - `schedule`, `probe`: when to announce and when to probe; pure.
//! - `interfaces`, `links`: netlink, and what it has told.
//! - `packets`, `frame`: packet sockets, and the frames that go through them.
//! - `groups`: solicited-node groups.

mod frame;
mod groups;
mod handle;
mod interfaces;
mod links;
mod metrics;
mod packets;
mod probe;
mod schedule;
mod task;
pub mod twin;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;

pub use handle::Handle;

/// How many events may wait for the loop.
const EVENTS: usize = 1024;

/// How to announce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// How long after its first repeats an address is announced again, and again: switch tables age.
    pub refresh: Duration,
    /// How many gratuitous frames a second at most.
    pub frames_per_second: u32,
    /// How many gratuitous frames at once at most.
    pub burst: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            refresh: Duration::from_secs(30),
            frames_per_second: 1000,
            burst: 400,
        }
    }
}

/// Starts the announcer in the network namespace of the calling thread. It needs a tokio runtime, `CAP_NET_RAW`
/// and nothing else; it ends when the last handle is dropped.
pub fn start(
    config: Config,
    registry: &mut Registry,
) -> anyhow::Result<(Handle, mpsc::Receiver<AnnouncerEvent>)> {
    let (commands, receiver) = mpsc::unbounded_channel();
    let (events, event_receiver) = mpsc::channel(EVENTS);
    let metrics = metrics::Metrics::register(registry);
    let (change_sender, changes) = mpsc::channel(1);
    let watch = interfaces::watch(metrics.clone(), change_sender)?;
    let (task, frames) = task::Task::new(config, metrics, events);
    let ears = task::Ears {
        commands: receiver,
        changes,
    };
    tokio::spawn(async move {
        let _watch = watch; // ends with the task
        task.run(ears, frames).await;
    });
    Ok((Handle { commands }, event_receiver))
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl std::fmt::Display for MacAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

/// An Ethernet interface of this node, as netlink tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: Arc<str>,
    /// Its address.
    pub mac: MacAddr,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Administratively up, with carrier.
    pub up: bool,
    /// Enslaved to a bond or bridge: the master is the uplink, not this one.
    pub enslaved: bool,
    /// Its addresses with their prefixes, global scope only.
    pub addresses: Vec<IpNet>,
    /// It carries a default route of the main table, by family (IPv4, IPv6).
    pub default_route: (bool, bool),
    /// The routers of those, if they have any.
    pub routers: (Option<Ipv4Addr>, Option<Ipv6Addr>),
}

/// What a probe before a VIP's first announcement found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// Nobody answered; the address is being announced.
    Free,
    /// Somebody holds the address; it is not announced, and probing is repeated every 30 s.
    Taken {
        /// Who answered.
        by: MacAddr,
    },
}

/// A fact the announcer reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnnouncerEvent {
    /// All Ethernet interfaces, after any change of one of them.
    Interfaces(Arc<[Interface]>),
    /// A probe ended.
    Probed {
        /// The address probed.
        vip: IpAddr,
        /// What it found.
        outcome: ProbeOutcome,
    },
    /// Another station claims an address that this node announces; reported at most once in 10 s an address.
    Conflict {
        /// The address.
        vip: IpAddr,
        /// Who claims it.
        by: MacAddr,
        /// Where it was seen.
        interface: Arc<str>,
    },
    /// A frame of the hellos' ethertype arrived. Its payload is not yet authenticated.
    Hello {
        /// Where it arrived.
        interface: u32,
        /// Who sent the frame.
        from: MacAddr,
        /// What it carries.
        payload: Vec<u8>,
    },
}

/// An address this node is to answer for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The address.
    pub vip: IpAddr,
    /// The index of the interface to answer on.
    pub interface: u32,
    /// Probe before announcing, since the address was never announced since it was allocated.
    pub probe: bool,
}

/// Answers for addresses on the LAN. Every call returns at once; the work is done behind it.
pub trait Announcer: Send + Sync {
    /// Begins to answer for an address, or moves it to another interface. Idempotent.
    fn announce(&self, announcement: Announcement);
    /// Falls silent on an address, on ARP and ND. Idempotent.
    fn withdraw(&self, vip: IpAddr);
    /// Announces once more, now: the last word after a contested claim, ahead of any repeat.
    fn reannounce(&self, vip: IpAddr);
    /// The addresses whose hellos and conflicts this node should hear: opens or closes the listening sockets.
    fn listen(&self, interfaces: &[u32]);
    /// Sends a frame of the hellos' ethertype out of an interface, to one station or to all that listen.
    fn hello(&self, interface: u32, to: Option<MacAddr>, payload: &[u8]);
}
