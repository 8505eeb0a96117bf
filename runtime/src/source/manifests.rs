//! Objects from a directory of Kubernetes YAML, watched.
//!
//! A file that cannot be read or understood is reported with its line; what it last said stays in force, and
//! so does everything else.

mod parse;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use inotify::{Inotify, WatchMask};
use landfall_core::model::{Event, Kind, Object, ObjectId};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Source;

/// How long after a change the directory is left to settle before it is read.
const SETTLE: Duration = Duration::from_millis(50);
/// How often a directory that vanished is looked for, and a failed watch is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How the problem of what cannot be read begins.
const UNREADABLE: &str = "cannot be read";

/// Something wrong in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, or the directory.
    pub file: PathBuf,
    /// The line, counted from 1, where one is known.
    pub line: Option<u64>,
    /// What is wrong, and what to do.
    pub message: String,
}

impl Problem {
    fn unreadable(path: &Path, cause: &std::io::Error) -> Self {
        Self {
            file: path.to_owned(),
            line: None,
            message: format!("{UNREADABLE}: {cause}"),
        }
    }

    fn is_unreadable(&self) -> bool {
        self.message.starts_with(UNREADABLE)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// What is wrong at the moment, for `/debug/state` and metrics.
#[derive(Clone, Debug, Default)]
pub struct Problems(Arc<Mutex<Vec<Problem>>>);

impl Problems {
    /// All present problems, by file.
    pub fn list(&self) -> Vec<Problem> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn replace(&self, now: Vec<Problem>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for problem in now.iter().filter(|problem| !held.contains(problem)) {
            tracing::error!("{problem}; what the file last said stays in force");
        }
        *held = now;
    }
}

/// Reads `directory` and follows it. Fails only when it is no directory at the start.
pub fn manifests(directory: &Path, kinds: &[Kind]) -> anyhow::Result<(Source, Problems)> {
    ensure!(
        directory.is_dir(),
        "--manifests {}: no such directory: make it, or name another",
        directory.display()
    );
    let inotify = Inotify::init().context("cannot watch files (inotify)")?;
    let (sender, events) = mpsc::channel(1024);
    let problems = Problems::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(follow(
        inotify,
        Directory::new(directory, kinds),
        problems.clone(),
        sender,
    ));
    let source = Source {
        events,
        kinds: kinds.to_vec(),
        tasks,
    };
    Ok((source, problems))
}

async fn follow(
    inotify: Inotify,
    mut directory: Directory,
    problems: Problems,
    sender: mpsc::Sender<Event>,
) {
    let mut watches = inotify.watches();
    let Ok(mut changes) = inotify.into_event_stream(vec![0; 4096]) else {
        tracing::error!("cannot follow file changes (inotify): restart me");
        return;
    };
    let mask = WatchMask::CREATE
        | WatchMask::CLOSE_WRITE
        | WatchMask::DELETE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF;
    let mut first = true;
    loop {
        // Adding a watch anew each round costs nothing and follows a directory that was replaced.
        let watched = watches.add(&directory.path, mask).is_ok();
        let (events, wrong) = directory.read();
        let unreadable = wrong.iter().any(Problem::is_unreadable);
        problems.replace(wrong);
        for event in events {
            if sender.send(event).await.is_err() {
                return;
            }
        }
        if std::mem::take(&mut first) {
            for kind in directory.kinds.clone() {
                if sender.send(Event::Synced(kind)).await.is_err() {
                    return;
                }
            }
        }
        if watched && unreadable {
            // Permissions and a failing disk mend without a change that inotify would tell.
            let _ = tokio::time::timeout(RETRY, changes.next()).await;
        } else if watched {
            if changes.next().await.is_none() {
                tracing::error!("following file changes ended (inotify): restart me");
                return;
            }
            tokio::time::sleep(SETTLE).await;
            // What came meanwhile is covered by the read that follows.
            while futures::FutureExt::now_or_never(changes.next()).is_some() {}
        } else {
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// What a directory said when it was last read.
struct Directory {
    path: PathBuf,
    kinds: BTreeSet<Kind>,
    /// The text of each file, and the objects of its last good version.
    files: BTreeMap<PathBuf, File>,
    said: BTreeMap<ObjectId, Object>,
}

struct File {
    text: String,
    objects: Vec<Object>,
    problem: Option<Problem>,
}

impl Directory {
    fn new(path: &Path, kinds: &[Kind]) -> Self {
        Self {
            path: path.to_owned(),
            kinds: kinds.iter().copied().collect(),
            files: BTreeMap::new(),
            said: BTreeMap::new(),
        }
    }

    /// What changed since the last reading, and what is wrong now.
    fn read(&mut self) -> (Vec<Event>, Vec<Problem>) {
        let mut problems = Vec::new();
        match list(&self.path) {
            Ok(paths) => {
                self.files.retain(|path, _| paths.contains(path));
                for path in paths {
                    if let Err(problem) = self.read_file(&path) {
                        problems.push(problem);
                    }
                }
            }
            Err(cause) => problems.push(Problem::unreadable(&self.path, &cause)),
        }
        let mut now: BTreeMap<ObjectId, Object> = BTreeMap::new();
        for (path, file) in &self.files {
            problems.extend(file.problem.clone());
            for object in &file.objects {
                match now.entry(object.id()) {
                    Entry::Vacant(entry) => {
                        entry.insert(object.clone());
                    }
                    Entry::Occupied(entry) => problems.push(Problem {
                        file: path.clone(),
                        line: None,
                        message: format!(
                            "{:?} stands in an earlier file too: remove one of them",
                            entry.key()
                        ),
                    }),
                }
            }
        }
        let mut events = Vec::new();
        for id in self.said.keys().filter(|id| !now.contains_key(id)) {
            events.push(Event::Delete(id.clone()));
        }
        for (id, object) in &now {
            if self.said.get(id) != Some(object) {
                events.push(Event::Apply(object.clone()));
            }
        }
        self.said = now;
        (events, problems)
    }

    fn read_file(&mut self, path: &Path) -> Result<(), Problem> {
        let text =
            std::fs::read_to_string(path).map_err(|cause| Problem::unreadable(path, &cause))?;
        if self.files.get(path).is_some_and(|file| file.text == text) {
            return Ok(());
        }
        let parsed = parse::objects(&text, &self.kinds);
        let entry = self.files.entry(path.to_owned()).or_insert(File {
            text: String::new(),
            objects: Vec::new(),
            problem: None,
        });
        entry.text = text;
        match parsed {
            Ok(objects) => {
                entry.objects = objects;
                entry.problem = None;
            }
            Err(wrong) => {
                entry.problem = Some(Problem {
                    file: path.to_owned(),
                    line: wrong.line,
                    message: wrong.message,
                });
            }
        }
        Ok(())
    }
}

/// The YAML and JSON files of a directory. Hidden ones are an editor's or a volume's own business.
fn list(directory: &Path) -> std::io::Result<BTreeSet<PathBuf>> {
    let mut paths = BTreeSet::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        let known = path.extension().is_some_and(|extension| {
            ["yaml", "yml", "json"]
                .iter()
                .any(|known| extension == *known)
        });
        if known && !hidden && path.is_file() {
            paths.insert(path);
        }
    }
    Ok(paths)
}
