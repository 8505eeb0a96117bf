//! What this process has made in the system, written down before it is made.
//!
//! Every namespace, process and directory of a lab is entered here and struck out when it is gone. The ledger
//! is mirrored to a file under `/run/landfall-lab`, so that `landfall lab down` finds what a killed process
//! left behind, and it is what a signal handler clears. Nothing that is not in a ledger is ever removed, and a
//! process only when its start time still is the one written down.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::error::{IoContext, LabError, Result};
use crate::tool;

/// Where the ledgers lie, and the socket of a lab that is up.
pub const STATE_DIR: &str = "/run/landfall-lab";

/// A process, told from a later one of the same number by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn of(pid: i32) -> Option<Self> {
        start_time(pid).map(|started| Self { pid, started })
    }

    /// Whether it still runs (a zombie does not).
    pub fn alive(self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Stops it (SIGSTOP) and waits until it has stopped, which takes as long as its system call in flight.
    pub(crate) fn freeze(self) -> bool {
        let sent = self.signal(Signal::SIGSTOP);
        for _ in 0..1000 {
            if !self.alive() || stat(self.pid).is_none_or(|(state, _)| state == 'T') {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        sent
    }

    /// Sends it a signal, if it still is the process that was meant.
    pub fn signal(self, signal: Signal) -> bool {
        self.alive() && kill(Pid::from_raw(self.pid), signal).is_ok()
    }
}

/// The start time of a process that is no zombie.
fn start_time(pid: i32) -> Option<u64> {
    stat(pid).and_then(|(state, started)| (!matches!(state, 'Z' | 'X')).then_some(started))
}

/// A process's state and start time, from `/proc/PID/stat`.
fn stat(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some((
        fields.first()?.chars().next()?,
        fields.get(19)?.parse().ok()?,
    ))
}

/// The entries of one process.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Ledger {
    /// Who made the entries.
    owner: ProcessId,
    /// Names of network namespaces.
    namespaces: BTreeSet<String>,
    /// Processes, by what they are.
    processes: BTreeMap<String, ProcessId>,
    /// Directories to remove.
    directories: BTreeSet<PathBuf>,
    /// Nothing may be entered any more.
    #[serde(skip)]
    closed: bool,
}

fn ledger() -> MutexGuard<'static, Ledger> {
    static LEDGER: OnceLock<Mutex<Ledger>> = OnceLock::new();
    LEDGER
        .get_or_init(|| {
            let pid = i32::try_from(std::process::id()).expect("process numbers are positive i32");
            Mutex::new(Ledger {
                owner: ProcessId::of(pid).unwrap_or(ProcessId { pid, started: 0 }),
                namespaces: BTreeSet::new(),
                processes: BTreeMap::new(),
                directories: BTreeSet::new(),
                closed: false,
            })
        })
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    fn file(&self) -> PathBuf {
        Path::new(STATE_DIR).join(format!("ledger-{}.json", self.owner.pid))
    }

    fn is_empty(&self) -> bool {
        self.namespaces.is_empty() && self.processes.is_empty() && self.directories.is_empty()
    }

    fn save(&self) -> Result<()> {
        let file = self.file();
        if self.is_empty() {
            let _ = fs::remove_file(&file);
            // Only goes when no other lab is left.
            let _ = fs::remove_dir(STATE_DIR);
            return Ok(());
        }
        let text = serde_json::to_string(self).expect("a ledger is plain data");
        fs::create_dir_all(STATE_DIR)
            .and_then(|()| fs::write(&file, text))
            .context(|| format!("writing {}", file.display()))
    }

    fn enter(&mut self, change: impl FnOnce(&mut Self)) -> Result<()> {
        if self.closed {
            return Err(LabError::Closing);
        }
        change(self);
        self.save()
    }

    /// Removes everything entered, and empties the ledger. Yields what could not be removed.
    fn clear(&mut self) -> Vec<LabError> {
        let mut failed = Vec::new();
        for process in self.processes.values() {
            process.signal(Signal::SIGKILL);
        }
        for namespace in &self.namespaces {
            if namespace_exists(namespace)
                && let Err(error) = tool::ip(&format!("netns del {namespace}"))
            {
                failed.push(error);
            }
        }
        for directory in &self.directories {
            if let Err(error) = remove_directory(directory) {
                failed.push(error);
            }
        }
        self.processes.clear();
        self.namespaces.clear();
        self.directories.clear();
        let _ = self.save();
        failed
    }
}

/// The part of a lab's directory that a bpf file system is mounted on.
pub(crate) const PINS: &str = "pins";

/// Removes a lab's directory, and the file system mounted in it.
pub(crate) fn remove_directory(directory: &Path) -> Result<()> {
    if !directory.exists() {
        return Ok(());
    }
    // Most directories have none mounted.
    let _ = umount2(&directory.join(PINS), MntFlags::MNT_DETACH);
    fs::remove_dir_all(directory).context(|| format!("removing {}", directory.display()))
}

/// Whether a network namespace of this name is mounted.
pub(crate) fn namespace_exists(name: &str) -> bool {
    Path::new("/run/netns").join(name).exists()
}

pub(crate) fn enter_namespace(name: &str) -> Result<()> {
    ledger().enter(|ledger| {
        ledger.namespaces.insert(name.to_owned());
    })
}

pub(crate) fn strike_namespace(name: &str) {
    let mut ledger = ledger();
    ledger.namespaces.remove(name);
    let _ = ledger.save();
}

pub(crate) fn enter_process(name: &str, process: ProcessId) -> Result<()> {
    ledger().enter(|ledger| {
        ledger.processes.insert(name.to_owned(), process);
    })
}

pub(crate) fn strike_process(name: &str) {
    let mut ledger = ledger();
    ledger.processes.remove(name);
    let _ = ledger.save();
}

pub(crate) fn enter_directory(path: &Path) -> Result<()> {
    ledger().enter(|ledger| {
        ledger.directories.insert(path.to_owned());
    })
}

pub(crate) fn strike_directory(path: &Path) {
    let mut ledger = ledger();
    ledger.directories.remove(path);
    let _ = ledger.save();
}

/// Removes everything this process has made, and lets it make nothing more. For signal handlers and the
/// like: the process should exit next.
pub fn close() -> Vec<LabError> {
    let mut ledger = ledger();
    ledger.closed = true;
    ledger.clear()
}

/// What [`sweep`] found.
#[derive(Debug, Default)]
pub struct Swept {
    /// The namespaces removed.
    pub namespaces: Vec<String>,
    /// The processes killed.
    pub processes: Vec<String>,
    /// Ledgers of processes that still run and keep their own labs: left alone.
    pub in_use_by: Vec<i32>,
    /// What could not be removed.
    pub failed: Vec<LabError>,
}

/// Removes what processes left behind that are gone.
pub fn sweep() -> Result<Swept> {
    let mut swept = Swept::default();
    let Ok(entries) = fs::read_dir(STATE_DIR) else {
        return Ok(swept);
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("ledger-") {
            continue;
        }
        let text = fs::read_to_string(&path).context(|| format!("reading {}", path.display()))?;
        let Ok(mut ledger) = serde_json::from_str::<Ledger>(&text) else {
            let _ = fs::remove_file(&path);
            continue;
        };
        if ledger.owner.alive() {
            swept.in_use_by.push(ledger.owner.pid);
            continue;
        }
        swept.namespaces.extend(ledger.namespaces.iter().cloned());
        swept.processes.extend(
            ledger
                .processes
                .iter()
                .filter(|(_, process)| process.alive())
                .map(|(name, _)| name.clone()),
        );
        swept.failed.extend(ledger.clear());
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = ProcessId::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.alive());
        let other = ProcessId {
            started: me.started + 1,
            ..me
        };
        assert!(!other.alive());
        assert!(!other.signal(Signal::SIGKILL));
    }
}
