//! The seam to the eBPF programs on the uplinks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

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
