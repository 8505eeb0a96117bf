//! The processes of a lab: each runs on a host, under a name, with a log, and can be started again.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::error::{IoContext, LabError, Result};
use crate::ledger::{self, ProcessId};
use crate::netns::Netns;

/// A program to run.
#[derive(Clone, Debug)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Added to its environment.
    pub env: Vec<(String, String)>,
}

impl Program {
    /// A program without arguments.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            args: Vec::new(),
            env: Vec::new(),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds an option and its value.
    #[must_use]
    pub fn option(self, name: &str, value: impl fmt::Display) -> Self {
        self.arg(name).arg(value.to_string())
    }

    /// Adds a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// One of Landfall's own binaries: beside this executable (or the directory above, where a test's is),
    /// else on the PATH.
    pub fn landfall(name: &str) -> Result<Self> {
        let mut looked = Vec::new();
        if let Ok(me) = std::env::current_exe() {
            looked.extend(me.ancestors().skip(1).take(2).map(Path::to_owned));
        }
        if let Some(path) = std::env::var_os("PATH") {
            looked.extend(std::env::split_paths(&path));
        }
        looked
            .iter()
            .map(|directory| directory.join(name))
            .find(|path| path.is_file())
            .map(Self::new)
            .ok_or(LabError::MissingBinary {
                name: name.to_owned(),
                looked,
            })
    }
}

/// What is known of a process that was started.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) program: Program,
    pub(crate) id: ProcessId,
    pub(crate) log: PathBuf,
    /// A fault ended it: healing starts it again.
    pub(crate) faulted: bool,
    /// Its name in the ledger.
    pub(crate) entry: String,
}

/// What identifies a process: its host and its name there.
pub(crate) type Key = (String, String);

#[derive(Debug)]
struct Process {
    record: Record,
    child: Child,
}

impl Process {
    /// Reaps it if it is a child of ours that has ended.
    fn reap(&mut self) {
        // An error means it was reaped already.
        let _ = self.child.try_wait();
    }
}

/// The processes of a lab.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    running: Mutex<BTreeMap<Key, Process>>,
}

impl Processes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Process>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a program; one of the same name that still runs is killed first.
    pub(crate) fn start(
        &self,
        netns: &Netns,
        key: &Key,
        program: &Program,
        log: &Path,
    ) -> Result<()> {
        self.kill(key);
        let what = || format!("starting {} on {}", program.path.display(), key.0);
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .context(|| format!("opening {}", log.display()))?;
        let errors = output.try_clone().context(what)?;
        let mut command = netns.command(&program.path);
        command
            .args(&program.args)
            .envs(program.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            // A Ctrl-C at the terminal is for the lab, which ends its processes in order.
            .process_group(0);
        let mut child = command.spawn().context(what)?;
        let pid = i32::try_from(child.id()).expect("process numbers are positive i32");
        // A child that has ended is a zombie until it is reaped: its number is not taken by another.
        let id = ProcessId::of(pid).unwrap_or(ProcessId { pid, started: 0 });
        let entry = format!("{} on {}", key.1, netns.name());
        if let Err(error) = ledger::enter_process(&entry, id) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        let record = Record {
            program: program.clone(),
            id,
            log: log.to_owned(),
            faulted: false,
            entry,
        };
        self.lock().insert(key.clone(), Process { record, child });
        Ok(())
    }

    pub(crate) fn record(&self, key: &Key) -> Option<Record> {
        self.lock().get(key).map(|process| process.record.clone())
    }

    pub(crate) fn alive(&self, key: &Key) -> bool {
        let mut running = self.lock();
        running.get_mut(key).is_some_and(|process| {
            process.reap();
            process.record.id.alive()
        })
    }

    /// Sends a signal; whether the process was there to get it. `by_fault` marks one that healing starts again.
    pub(crate) fn signal(&self, key: &Key, signal: Signal, by_fault: bool) -> bool {
        let mut running = self.lock();
        running.get_mut(key).is_some_and(|process| {
            process.reap();
            let sent = if signal == Signal::SIGSTOP {
                process.record.id.freeze()
            } else {
                process.record.id.signal(signal)
            };
            process.record.faulted |= sent && by_fault;
            sent
        })
    }

    /// Kills one and waits until it is gone.
    pub(crate) fn kill(&self, key: &Key) {
        let Some(mut process) = self.lock().remove(key) else {
            return;
        };
        process.record.id.signal(Signal::SIGKILL);
        let _ = process.child.wait();
        ledger::strike_process(&process.record.entry);
    }

    /// Waits for the end of a process.
    pub(crate) fn wait(&self, key: &Key, within: Duration) -> Result<()> {
        let begun = Instant::now();
        while self.alive(key) {
            if begun.elapsed() > within {
                let log = self.record(key).map(|record| record.log);
                return Err(LabError::Timeout {
                    what: format!("the end of {} on {}", key.1, key.0),
                    after: within,
                    hint: log.map_or_else(String::new, |log| format!("; see {}", log.display())),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What a process has printed.
    pub(crate) fn log(&self, key: &Key) -> Result<String> {
        let record = self.record(key).ok_or_else(|| LabError::Unknown {
            kind: "process",
            name: format!("{} on {}", key.1, key.0),
            known: self.names(),
        })?;
        fs::read_to_string(&record.log).context(|| format!("reading {}", record.log.display()))
    }

    pub(crate) fn names(&self) -> String {
        let names: Vec<String> = self
            .lock()
            .keys()
            .map(|(host, name)| format!("{name} on {host}"))
            .collect();
        names.join(", ")
    }

    pub(crate) fn on(&self, host: &str) -> Vec<Key> {
        self.lock()
            .keys()
            .filter(|key| key.0 == host)
            .cloned()
            .collect()
    }

    pub(crate) fn kill_all(&self) {
        let keys: Vec<Key> = self.lock().keys().cloned().collect();
        for key in keys {
            self.kill(&key);
        }
    }
}
