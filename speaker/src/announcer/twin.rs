//! The announcer's twin in memory, for the tests of the loop.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use super::{Announcement, Announcer, AnnouncerEvent, MacAddr};

/// How many events the twin holds for a loop that does not read.
const EVENTS: usize = 1024;

/// What was asked of the twin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// What it would answer for now.
    pub announced: BTreeMap<IpAddr, Announcement>,
    /// The interfaces it would listen on.
    pub listening: Vec<u32>,
    /// All repeats asked for, in order.
    pub reannounced: Vec<IpAddr>,
    /// All hellos sent, in order.
    pub hellos: Vec<(u32, Vec<u8>)>,
}

/// An announcer that only notes what it is asked to do.
#[derive(Clone, Debug)]
pub struct Twin {
    asked: Arc<Mutex<Asked>>,
    events: mpsc::Sender<AnnouncerEvent>,
}

/// A twin, and the events that [`Twin::report`] puts in.
pub fn twin() -> (Twin, mpsc::Receiver<AnnouncerEvent>) {
    let (events, receiver) = mpsc::channel(EVENTS);
    let asked = Arc::default();
    (Twin { asked, events }, receiver)
}

impl Twin {
    /// What was asked so far.
    pub fn asked(&self) -> Asked {
        self.lock().clone()
    }

    /// Reports an event to the loop; false when nobody reads any more, or too slowly.
    pub fn report(&self, event: AnnouncerEvent) -> bool {
        self.events.try_send(event).is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Announcer for Twin {
    fn announce(&self, announcement: Announcement) {
        self.lock().announced.insert(announcement.vip, announcement);
    }

    fn withdraw(&self, vip: IpAddr) {
        self.lock().announced.remove(&vip);
    }

    fn reannounce(&self, vip: IpAddr) {
        self.lock().reannounced.push(vip);
    }

    fn listen(&self, interfaces: &[u32]) {
        self.lock().listening = interfaces.to_vec();
    }

    fn hello(&self, interface: u32, _to: Option<MacAddr>, payload: &[u8]) {
        self.lock().hellos.push((interface, payload.to_vec()));
    }
}
