//! What can go wrong in a lab, in words that say what to do.

use std::path::PathBuf;
use std::time::Duration;

/// Why the lab could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Network namespaces want `CAP_SYS_ADMIN`.
    #[error(
        "the lab makes network namespaces and needs root: run it with sudo, or in a privileged container"
    )]
    NotRoot,
    /// A program the lab calls is not installed.
    #[error("`{tool}` is not on the PATH: install it ({advice})")]
    MissingTool {
        /// The program.
        tool: &'static str,
        /// How to get it.
        advice: &'static str,
    },
    /// Something that the tests need was not built.
    #[error("{variable} is not there: run `hack/setup.sh test`, which builds it once")]
    NotBuilt {
        /// The variable that says where it is.
        variable: &'static str,
    },
    /// One of Landfall's own binaries was not found.
    #[error(
        "{name} was found neither beside this executable nor on the PATH (looked in {}): run `cargo build --workspace --bins`",
        looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    MissingBinary {
        /// The binary.
        name: String,
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// The kernel refuses something that the lab is made of.
    #[error("this kernel lacks {what}: {advice}")]
    Kernel {
        /// What it lacks.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// A command failed.
    #[error("`{command}` failed: {stderr}")]
    Command {
        /// The command line, with its input if it had one.
        command: String,
        /// What it printed.
        stderr: String,
    },
    /// The system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// A lab's ledger is damaged.
    #[error(
        "{} cannot be read ({why}), so it is kept and what it names was left alone: look for {named} in `ip netns list` and in {}, \
         end what runs there (`ip netns pids`), remove it (`ip netns del`, `rm -r`), and then this file",
        file.display(),
        std::env::temp_dir().display()
    )]
    UnreadableLedger {
        /// The ledger.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What its entries are called, as a pattern.
        named: String,
    },
    /// Something did not come to pass in its time.
    #[error("{what} did not happen within {after:?}{hint}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
        /// Where to look.
        hint: String,
    },
    /// There is no such node, pod, host or process in this lab.
    #[error("no {kind} {name:?} in this lab; there are: {known}")]
    Unknown {
        /// What was looked for.
        kind: &'static str,
        /// Its name.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// The lab is being torn down, by a signal or at the end.
    #[error("the lab is being torn down")]
    Closing,
    /// What was asked does not fit this lab.
    #[error("{0}")]
    Invalid(String),
}

/// The result of the lab's calls.
pub type Result<T> = std::result::Result<T, LabError>;

/// Names what was tried, for an I/O error.
pub(crate) trait IoContext<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| LabError::Io {
            what: what(),
            source,
        })
    }
}

impl<T> IoContext<T> for nix::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(std::io::Error::from).context(what)
    }
}
