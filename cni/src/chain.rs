//! Puts the plugin on a node: its program among the CNI's, and itself at the end of the list of plugins that the container
//! runtime uses.
//!
//! The list is the CNI's own file, which it may write anew at any time: so this is done again and again. Files are replaced
//! as a whole. A list that does not name the plugin is right, only without it; one that names it needs the program:
//! therefore the program comes first and goes last.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The plugin's type, which is the name of its program.
pub const TYPE: &str = "landfall-cni";

/// Why the plugin is not in its place.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A file cannot be read or written.
    #[error("{0}: {1}")]
    File(PathBuf, io::Error),
    /// The CNI has not come yet, or is elsewhere.
    #[error(
        "{0}: no network configuration yet (*.conflist); the plugin follows when the CNI has written one"
    )]
    NoList(PathBuf),
    /// A configuration of one plugin has no room for another.
    #[error(
        "{0}: a configuration of a single plugin: nothing can be chained to it; have the CNI write a list (*.conflist)"
    )]
    Single(PathBuf),
    /// Somebody writes it at this moment.
    #[error("{0}: it is being written; the plugin follows")]
    Changing(PathBuf),
}

/// What [`Chain::ensure`] or [`Chain::remove`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The program was written, or removed.
    pub program: bool,
    /// The lists that were changed.
    pub lists: Vec<PathBuf>,
}

/// Where the plugin's place is on a node.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Where the container runtime looks for plugins' programs.
    pub programs: PathBuf,
    /// Where it looks for lists.
    pub lists: PathBuf,
}

impl Chain {
    /// Sees to it that the program is there, as `program` is, and that the runtime's list ends with `plugin`.
    ///
    /// # Errors
    ///
    /// See [`ChainError`]. What stands before is left as it was.
    pub fn ensure(&self, program: &Path, plugin: &Value) -> Result<Done, ChainError> {
        let mut done = Done {
            program: self.copy(program)?,
            ..Done::default()
        };
        let path = self.chosen()?;
        let known = read(&path)?;
        let mut list = parse(&known).ok_or_else(|| ChainError::Changing(path.clone()))?;
        let plugins = plugins(&mut list).expect("a list that is chosen has plugins");
        let mut wanted: Vec<Value> = plugins.iter().filter(|it| !is_ours(it)).cloned().collect();
        wanted.push(plugin.clone());
        if *plugins != wanted {
            *plugins = wanted;
            replace(&path, &known, &list)?;
            done.lists.push(path);
        }
        Ok(done)
    }

    /// Takes the plugin out of all lists, then the program away. It is no error if it is not there.
    ///
    /// # Errors
    ///
    /// A list cannot be read or written: then the program stays.
    pub fn remove(&self) -> Result<Done, ChainError> {
        let mut done = Done::default();
        for path in self.files()? {
            let known = read(&path)?;
            let Some(mut list) = parse(&known) else {
                continue;
            };
            let Some(plugins) = plugins(&mut list) else {
                continue;
            };
            let before = plugins.len();
            plugins.retain(|plugin| !is_ours(plugin));
            if plugins.len() != before {
                replace(&path, &known, &list)?;
                done.lists.push(path);
            }
        }
        let program = self.programs.join(TYPE);
        match fs::remove_file(&program) {
            Ok(()) => done.program = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(ChainError::File(program, error)),
        }
        Ok(done)
    }

    /// Whether it was another program before.
    fn copy(&self, from: &Path) -> Result<bool, ChainError> {
        let program = read(from)?;
        let path = self.programs.join(TYPE);
        let is_executable = |path: &Path| {
            fs::metadata(path).is_ok_and(|known| known.permissions().mode() & 0o777 == 0o755)
        };
        if fs::read(&path).is_ok_and(|known| known == program) && is_executable(&path) {
            return Ok(false);
        }
        write(&path, &program, 0o755)?;
        Ok(true)
    }

    /// The files that hold configurations, in the order in which the runtime looks at them (libcni's `ConfFiles`).
    fn files(&self) -> Result<Vec<PathBuf>, ChainError> {
        let kinds = ["conf", "conflist", "json"].map(OsStr::new);
        let entries = match fs::read_dir(&self.lists) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(ChainError::File(self.lists.clone(), error)),
        };
        let mut files: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_file())
            .filter(|path| path.extension().is_some_and(|kind| kinds.contains(&kind)))
            .collect();
        files.sort();
        Ok(files)
    }

    /// The list that the runtime uses: of the first file that makes sense.
    fn chosen(&self) -> Result<PathBuf, ChainError> {
        for path in self.files()? {
            let Some(mut value) = parse(&read(&path)?) else {
                continue;
            };
            if path.extension() == Some(OsStr::new("conflist")) {
                if plugins(&mut value).is_some_and(|plugins| !plugins.is_empty()) {
                    return Ok(path);
                }
            } else if value["type"].is_string() {
                return Err(ChainError::Single(path));
            }
        }
        Err(ChainError::NoList(self.lists.clone()))
    }
}

/// The plugin in a list: where the speaker listens, and what to load while none does.
pub fn plugin(socket: &Path, boot: &Path) -> Value {
    json!({"type": TYPE, "socket": socket, "boot": boot})
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == TYPE
}

fn parse(text: &[u8]) -> Option<Value> {
    serde_json::from_slice(text).ok()
}

fn plugins(list: &mut Value) -> Option<&mut Vec<Value>> {
    list.get_mut("plugins")?.as_array_mut()
}

fn read(path: &Path) -> Result<Vec<u8>, ChainError> {
    fs::read(path).map_err(|error| ChainError::File(path.into(), error))
}

/// Writes a list in place of what is known of it.
fn replace(path: &Path, known: &[u8], list: &Value) -> Result<(), ChainError> {
    let fail = |error| ChainError::File(path.into(), error);
    let mode = fs::metadata(path).map_err(fail)?.permissions().mode() & 0o777;
    let mut text = serde_json::to_vec_pretty(list).expect("a value is text");
    text.push(b'\n');
    let draft = draft(path, &text, mode)?;
    // What the CNI has written meanwhile is not lost.
    if read(path)? != known {
        let _ = fs::remove_file(draft);
        return Err(ChainError::Changing(path.into()));
    }
    fs::rename(&draft, path).map_err(fail)
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), ChainError> {
    let draft = draft(path, content, mode)?;
    fs::rename(&draft, path).map_err(|error| ChainError::File(path.into(), error))
}

/// The content beside its place, under a name that the runtime does not look at.
fn draft(path: &Path, content: &[u8], mode: u32) -> Result<PathBuf, ChainError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!(".{name}.landfall"));
    let written = File::create(&draft).and_then(|mut file| {
        file.write_all(content)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()
    });
    match written {
        Ok(()) => Ok(draft),
        Err(error) => Err(ChainError::File(draft, error)),
    }
}
