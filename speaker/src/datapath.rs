//! The seam to the eBPF programs on the uplinks, and what loads, attaches and watches them.
//!
//! ```text
//!  loop ──apply──> [desired] ──> worker (a thread: system calls that may block)
//!                                  ├─ pins     where maps and links outlive the process
//!                                  ├─ uplink   the program and its attachments, checked every second
//!  metrics, loop <──counts──────── └─ counts   the map, read when asked
//! ```
//!
//! Everything stays in the kernel when the process ends, and is adopted by the next one;
//! [`uninstall`] is what removes it.

mod counts;
mod metrics;
mod pins;
#[cfg(test)]
mod tests;
mod uplink;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use prometheus_client::registry::Registry;

pub use pins::{Removed, uninstall};
pub use worker::Worker;

/// How to run the data path.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where maps and links are pinned: a directory, made if need be, on a bpf file system.
    pub pin_dir: PathBuf,
    /// By which hook to attach.
    pub hook: Hook,
    /// How often the attachments are checked.
    pub watch: Duration,
}

impl Config {
    /// Pins under `pin_dir`; attaches by the best hook the kernel has and checks it every second.
    pub fn new(pin_dir: impl Into<PathBuf>) -> Self {
        Self {
            pin_dir: pin_dir.into(),
            hook: Hook::Auto,
            watch: Duration::from_secs(1),
        }
    }
}

/// The kernel's hook to attach by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hook {
    /// TCX where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// A clsact filter, also where the kernel has TCX.
    Clsact,
}

/// Starts the data path, on a thread in the caller's network namespace. Never fails: what is missing (the
/// permission, the kernel's support, the bpf file system) is each uplink's [`Attachment::Absent`], and tried
/// again. The first [`DataPath::apply`] decides what of an earlier process's state is kept: call it when the
/// sources have told all they know.
pub fn start(config: Config, registry: &mut Registry) -> impl DataPath + use<> {
    Worker::start(config, registry)
}

/// What the programs should know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataPathState {
    /// The interfaces (by index) to attach to.
    pub uplinks: BTreeSet<u32>,
    /// The VIPs to match.
    pub vips: BTreeSet<IpAddr>,
}

/// Packets seen at this node's uplinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipCount {
    /// Packets to the VIP.
    pub packets: u64,
    /// Bytes of them, link-layer header included.
    pub bytes: u64,
}

/// Whether the data path is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// Attached by TCX, in front of every other program.
    Tcx,
    /// Attached by a clsact filter.
    Clsact,
    /// Not attached.
    Absent {
        /// Why, and what to do.
        reason: String,
    },
}

/// Loads, attaches and feeds the programs. They outlive the process: links and maps are pinned.
pub trait DataPath: Send + Sync {
    /// Replaces what the programs should know. Returns at once.
    fn apply(&self, state: DataPathState);
    /// What was counted for each VIP, all uplinks together.
    fn counts(&self) -> BTreeMap<IpAddr, VipCount>;
    /// How the programs are attached, by interface index.
    fn attachments(&self) -> BTreeMap<u32, Attachment>;
}
