//! Reads what the programs tell of bindings, and hands it on.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Map, MapData, PerCpuArray, RingBuf};
use landfall_core::replication::{Binding, Change};
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::copies::{Event, kind};
use landfall_ebpf_common::egress::gateway::{Reason, map};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::super::tables::{TablesError, taken};
use super::super::thread;
use super::super::worker::lock;
use super::copies::reopened;
use crate::replication::Happened;

/// For how long changes gather: the kernel wakes for the first one only.
const GATHER: Duration = Duration::from_millis(2);
/// How many are handed on at a time.
const BATCH: usize = 4_096;
/// How many times as many may wait for whom they are handed to.
pub(super) const QUEUE: usize = 16;
/// How often it looks whether it is to stop, or whether who was too busy has room.
const IDLE: u16 = 100;
const BUSY: Duration = Duration::from_millis(5);

/// To whom changes are handed: nobody, as long as nobody wants them.
pub(super) type Told = Mutex<Option<mpsc::Sender<Happened>>>;

/// What the programs have told and nobody has read.
pub(in super::super) struct Source {
    ring: RingBuf<MapData>,
    reasons: PerCpuArray<MapData, u64>,
    /// How many changes could not be told, when it was last asked.
    untold: u64,
}

impl fmt::Debug for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Source").finish_non_exhaustive()
    }
}

impl Source {
    /// Takes the ring. The counts are still to be there.
    pub(in super::super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let reasons = Map::PerCpuArray(reopened(ebpf, map::REASONS)?);
        let mut source = Self {
            reasons: PerCpuArray::try_from(reasons)?,
            ring: taken(ebpf, map::CHANGES)?,
            untold: 0,
        };
        source.has_lost();
        Ok(source)
    }

    /// What has happened, in its order; at most so much.
    pub(in super::super) fn read(&mut self, most: usize) -> Vec<Change> {
        let mut changes = Vec::new();
        while changes.len() < most
            && let Some(event) = self.ring.next()
        {
            changes.extend(change(&event));
        }
        changes
    }

    /// Whether something could not be told, since it was last asked.
    pub(in super::super) fn has_lost(&mut self) -> bool {
        let counts = self.reasons.get(&(Reason::Untold as u32), 0);
        let count = counts.map_or(self.untold, |counts| counts.iter().sum());
        std::mem::replace(&mut self.untold, count) != count
    }

    /// Waits until there is something, or for a while.
    fn wait(&self) -> bool {
        let mut fds = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(IDLE)).is_ok_and(|ready| ready > 0)
    }
}

/// An event as it lies in memory.
fn change(event: &[u8]) -> Option<Change> {
    if event.len() < size_of::<Event>() {
        return None;
    }
    let address = |at: usize| VipKey(event[at..at + 16].try_into().expect("sixteen")).address();
    let port = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    let binding = Binding {
        protocol: event[54],
        pod: (address(0), port(48)).into(),
        egress: (address(16), port(50)).into(),
        remote: (address(32), port(52)).into(),
    };
    match event[55] {
        kind::NEW => Some(Change::New(binding)),
        kind::CLOSED => Some(Change::Closed(binding)),
        _ => None,
    }
}

/// The thread that reads. Dropping it ends the thread.
#[derive(Debug)]
pub(in super::super) struct Changes {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Changes {
    /// Begins with the word that changes were missed: nobody has read what was told before.
    pub(in super::super) fn start(
        source: Source,
        told: impl Fn() -> Option<mpsc::Sender<Happened>> + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = Task {
            source,
            told: Box::new(told),
            stop: Arc::clone(&stop),
        };
        let thread = thread::start("bindings", move || task.run());
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

struct Task {
    source: Source,
    told: Box<dyn Fn() -> Option<mpsc::Sender<Happened>> + Send>,
    stop: Arc<AtomicBool>,
}

impl Task {
    fn run(mut self) {
        self.tell(Happened::Lost);
        while !self.stop.load(Ordering::Relaxed) {
            if !self.source.wait() {
                continue;
            }
            std::thread::sleep(GATHER);
            let changes = self.source.read(BATCH);
            if !changes.is_empty() {
                self.tell(Happened::Changes(changes));
            }
            if self.source.has_lost() {
                self.tell(Happened::Lost);
            }
        }
    }

    /// Hands it on. While there is no room the programs' own fills, and what finds none there is counted.
    fn tell(&self, happened: Happened) {
        let mut happened = happened;
        while !self.stop.load(Ordering::Relaxed) {
            let Some(to) = (self.told)() else {
                return;
            };
            match to.try_send(happened) {
                Ok(()) | Err(TrySendError::Closed(_)) => return,
                Err(TrySendError::Full(back)) => happened = back,
            }
            std::thread::sleep(BUSY);
        }
    }
}

/// Who is told now.
pub(super) fn listener(told: &Told) -> Option<mpsc::Sender<Happened>> {
    lock(told).clone()
}
