//! What this process has made in the system, written down before it is made.
//!
//! Every namespace, process and directory of a lab is entered here and struck out when it is gone. The ledger
//! is mirrored to a file under `/run/landfall-lab`, so that `landfall lab down` finds what a killed process
//! left behind, and it is what a signal handler clears. Nothing that is not in a ledger is ever removed, and a
//! process only when its start time still is the one written down. The file is replaced as a whole: whoever
//! reads it while it is written, or after a kill in the midst of that, reads what it was or what it is now.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
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

/// A ledger's file is called so, with its owner's number between.
const FILE: (&str, &str) = ("ledger-", ".json");
/// And so what is to replace it.
const DRAFT: (&str, &str) = (".ledger-", ".draft");

/// The number in such a name.
fn owner_in(name: &str, (prefix, suffix): (&str, &str)) -> Option<i32> {
    let number = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
    number.parse().ok()
}

impl Ledger {
    fn called(&self, (prefix, suffix): (&str, &str)) -> String {
        format!("{prefix}{}{suffix}", self.owner.pid)
    }

    /// Reads one. `None`: it has been struck out in the meantime.
    fn read(file: &Path) -> Result<Option<Self>> {
        let text = match fs::read_to_string(file) {
            Ok(text) => Ok(text),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => Err(error.to_string()),
        };
        text.and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()))
            .map(Some)
            .map_err(|why| {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                LabError::UnreadableLedger {
                    file: file.to_owned(),
                    why,
                    named: owner_in(&name, FILE).map_or_else(
                        || "lf-*".to_owned(),
                        // As lab ids are made.
                        |pid| format!("lf-{pid:x}[g-z]*"),
                    ),
                }
            })
    }

    fn is_empty(&self) -> bool {
        self.namespaces.is_empty() && self.processes.is_empty() && self.directories.is_empty()
    }

    fn save(&self) -> Result<()> {
        self.save_in(Path::new(STATE_DIR))
    }

    fn save_in(&self, directory: &Path) -> Result<()> {
        let file = directory.join(self.called(FILE));
        if self.is_empty() {
            let _ = fs::remove_file(&file);
            // Only goes when no other lab is left.
            let _ = fs::remove_dir(directory);
            return Ok(());
        }
        let text = serde_json::to_string(self).expect("a ledger is plain data");
        let draft = directory.join(self.called(DRAFT));
        fs::create_dir_all(directory)
            .and_then(|()| fs::write(&draft, text))
            .and_then(|()| fs::rename(&draft, &file))
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
    let failed = ledger.clear();
    let _ = ledger.save();
    failed
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
    /// What could not be removed, and ledgers that cannot be read: they are kept, for nothing else knows what
    /// they name.
    pub failed: Vec<LabError>,
}

/// Removes what processes left behind that are gone.
pub fn sweep() -> Swept {
    sweep_in(Path::new(STATE_DIR))
}

fn sweep_in(directory: &Path) -> Swept {
    let mut swept = Swept::default();
    let Ok(entries) = fs::read_dir(directory) else {
        return swept;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if owner_in(&name, DRAFT).is_some_and(|pid| ProcessId::of(pid).is_none()) {
            // What was to be made by this entry was not begun.
            let _ = fs::remove_file(&path);
        }
        if !name.starts_with(FILE.0) {
            continue;
        }
        match Ledger::read(&path) {
            Ok(Some(ledger)) => swept.take(ledger, &path),
            Ok(None) => {}
            Err(error) => swept.failed.push(error),
        }
    }
    swept
}

impl Swept {
    /// Removes what a ledger names, and the ledger, unless its owner still runs.
    fn take(&mut self, mut ledger: Ledger, file: &Path) {
        if ledger.owner.alive() {
            self.in_use_by.push(ledger.owner.pid);
            return;
        }
        self.namespaces.extend(ledger.namespaces.iter().cloned());
        let living = ledger
            .processes
            .iter()
            .filter(|(_, process)| process.alive());
        self.processes.extend(living.map(|(name, _)| name.clone()));
        self.failed.extend(ledger.clear());
        let _ = fs::remove_file(file);
    }
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
    /// A number that no process has: Linux ends at 4 194 304.
    const NOBODY: i32 = i32::MAX;

    /// A directory of the test's own, and one that a ledger names.
    fn mk_directories(test: &str) -> (PathBuf, PathBuf) {
        let base = std::env::temp_dir().join(format!("lf-ledger-{test}-{}", std::process::id()));
        let (state, named) = (base.join("state"), base.join("named"));
        fs::create_dir_all(&state).unwrap();
        fs::create_dir_all(&named).unwrap();
        (state, named)
    }

    fn mk_ledger(owner: ProcessId, named: &Path) -> Ledger {
        Ledger {
            owner,
            namespaces: BTreeSet::new(),
            processes: BTreeMap::new(),
            directories: BTreeSet::from([named.to_owned()]),
            closed: false,
        }
    }

    fn files(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap().flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_cannot_be_read_is_kept_and_told_and_the_rest_is_swept() {
        let (state, named) = mk_directories("kept");
        // As a kill between truncating and writing leaves it.
        let (torn, pid) = (state.join("ledger-31059.json"), NOBODY);
        fs::write(&torn, "").unwrap();
        mk_ledger(ProcessId { pid, started: 1 }, &named)
            .save_in(&state)
            .unwrap();
        // A kill in the midst of writing leaves the old ledger and this.
        fs::write(state.join(format!(".ledger-{pid}.draft")), "{").unwrap();
        for turn in 0..2 {
            let swept = sweep_in(&state);
            assert!(!named.exists(), "the dead owner's things are gone");
            assert_eq!(files(&state), ["ledger-31059.json"], "turn {turn}");
            let [error] = &swept.failed[..] else {
                panic!("{swept:?}");
            };
            let text = error.to_string();
            assert!(text.contains(&torn.display().to_string()), "{text}");
            assert!(text.contains("lf-7953[g-z]*"), "{text}");
        }
        fs::remove_dir_all(state.parent().unwrap()).unwrap();
    }

    /// A reader sees a ledger whole at every moment of its being written, and leaves the living owner's alone.
    #[test]
    fn a_ledger_is_never_half_written() {
        let (state, named) = mk_directories("whole");
        let me = ProcessId::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        let mut ledger = mk_ledger(me, &named);
        ledger.save_in(&state).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for number in 0..500 {
                    // Long and short by turns: a file that is written over is seen empty or with a rest.
                    let filler = format!("lf-nobody-{}", "x".repeat(number % 2 * 20_000));
                    ledger.namespaces = BTreeSet::from([filler]);
                    ledger.save_in(&state).unwrap();
                }
            });
            while !writer.is_finished() {
                let swept = sweep_in(&state);
                assert!(swept.failed.is_empty(), "{:?}", swept.failed);
                assert_eq!(swept.in_use_by, [me.pid]);
            }
        });
        assert!(named.exists());
        ledger.directories.clear();
        ledger.namespaces.clear();
        ledger.save_in(&state).unwrap();
        assert!(!state.exists(), "the last ledger takes the directory along");
        fs::remove_dir_all(state.parent().unwrap()).unwrap();
    }
}
