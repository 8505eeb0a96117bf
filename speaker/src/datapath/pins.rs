//! Where maps and links are pinned, and how a layout is told from another.
//!
//! ```text
//!  <pin dir>/layout-11/VIPS             a map of this layout
//!  <pin dir>/layout-11/links/7-ingress  the link of a program at the interface with index 7
//!  <pin dir>/clsact/7                  a directory: that interface's clsact qdisc was made here
//! ```
//!
//! The number is [`landfall_ebpf_common::LAYOUT`]. What lies under another number is not read: once this
//! process's programs are attached it is removed, and the counts begin anew.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapData;
use aya::programs::tc::qdisc_detach_program;
use landfall_ebpf_common::link::Link;
use landfall_ebpf_common::{LAYOUT, tcx};
use nix::net::if_::if_nameindex;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::attached::{Side, attach_type};
use super::layout::{SHAPES, Shape};
use super::qdisc;
use super::{egress, uplink};

/// Why the pins cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PinsError {
    /// There is no bpf file system.
    #[error(
        "{0} is not on a bpf file system: mount one there (mount -t bpf bpf /sys/fs/bpf), or set --bpf-pin-dir"
    )]
    NoBpffs(PathBuf),
    /// The directory cannot be made or read.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// The map under our layout's number is not what that number stands for.
    #[error("{0} is not a map of layout {LAYOUT}: `landfall-speaker uninstall` removes it")]
    Misfit(PathBuf),
}

/// The pins of this process's layout.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    root: PathBuf,
    layout: PathBuf,
}

impl Pins {
    /// Makes the directories, and checks what is in them.
    pub(crate) fn open(root: &Path) -> Result<Self, PinsError> {
        if !on_bpffs(root) {
            return Err(PinsError::NoBpffs(root.to_owned()));
        }
        let pins = Self {
            root: root.to_owned(),
            layout: root.join(format!("layout-{LAYOUT}")),
        };
        let links = pins.layout.join("links");
        fs::create_dir_all(&links).map_err(|error| PinsError::Io(links, error))?;
        for shape in SHAPES {
            let map = pins.map(shape.name);
            if map.exists() && !fits(&map, &shape) {
                return Err(PinsError::Misfit(map));
            }
        }
        Ok(pins)
    }

    /// The directory of all layouts.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where a map is pinned.
    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.layout.join(name)
    }

    /// Where the link of an interface at a place is pinned.
    pub(super) fn link(&self, interface: u32, place: &str) -> PathBuf {
        self.layout
            .join("links")
            .join(format!("{interface}-{place}"))
    }

    /// The interfaces with a pinned link at a place.
    pub(super) fn linked(&self, place: &str) -> Vec<u32> {
        entries(&self.layout.join("links"))
            .iter()
            .filter_map(|path| {
                let (interface, at) = path.file_name()?.to_str()?.split_once('-')?;
                interface.parse().ok().filter(|_| at == place)
            })
            .collect()
    }

    /// Removes what is pinned under other layouts' numbers.
    pub(crate) fn retire_others(&self) -> io::Result<Removed> {
        let mut removed = Removed::default();
        for layout in layouts(&self.root) {
            if layout != self.layout {
                remove_layout(&layout, &mut removed)?;
            }
        }
        Ok(removed)
    }
}

/// What [`uninstall`] found and removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Pinned links, each the attachment to one interface.
    pub links: usize,
    /// Pinned maps.
    pub maps: usize,
    /// clsact filters.
    pub filters: usize,
    /// clsact qdiscs.
    pub qdiscs: usize,
}

/// Detaches the programs and removes every pin, of any layout: with no speaker running, nothing of the data path
/// is left in the kernel. A clsact qdisc stays on its interface if it was there before, or others have filters on it.
pub fn uninstall(pin_dir: &Path) -> io::Result<Removed> {
    let mut removed = Removed::default();
    for layout in layouts(pin_dir) {
        remove_layout(&layout, &mut removed)?;
    }
    for interface in &if_nameindex()? {
        let name = interface.name().to_string_lossy();
        for (hook, program) in programs::<uplink::Side>().chain(programs::<egress::Side>()) {
            // An interface without our filter answers with an error of one kind or another.
            if qdisc_detach_program(&name, attach_type(hook), program).is_ok() {
                removed.filters += 1;
            }
        }
    }
    removed.qdiscs = qdisc::remove_unused(pin_dir)?;
    match fs::remove_dir(pin_dir) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::DirectoryNotEmpty
                    | io::ErrorKind::ResourceBusy
            ) =>
        {
            Err(error)
        }
        _ => Ok(removed),
    }
}

/// An object's programs, by their hooks.
fn programs<S: Side>() -> impl Iterator<Item = (tcx::Hook, &'static str)> {
    S::ALL.iter().map(|side| (side.hook(), side.program()))
}

fn remove_layout(layout: &Path, removed: &mut Removed) -> io::Result<()> {
    let links = layout.join("links");
    for link in entries(&links) {
        remove_link(&link)?;
        removed.links += 1;
    }
    if links.exists() {
        fs::remove_dir(&links)?;
    }
    for map in entries(layout) {
        fs::remove_file(map)?;
        removed.maps += 1;
    }
    fs::remove_dir(layout)
}

/// Detaches a pinned link, at once, and removes the pin. It is no error if it is not there.
pub(super) fn remove_link(path: &Path) -> io::Result<()> {
    if let Ok(link) = Link::open(path)
        && let Err(error) = link.detach()
    {
        // Without a pin it goes too, only later.
        tracing::debug!(path = %path.display(), %error, "a link cannot be detached at once");
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The directories of all layouts under `root`.
fn layouts(root: &Path) -> Vec<PathBuf> {
    entries(root)
        .into_iter()
        .filter(|path| {
            path.is_dir()
                && path
                    .file_name()
                    .and_then(|name| name.to_str()?.strip_prefix("layout-"))
                    .is_some_and(|number| number.parse::<u32>().is_ok())
        })
        .collect()
}

/// What lies in a directory; nothing, if it is not there.
pub(super) fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).map_or_else(
        |_| Vec::new(),
        |entries| entries.flatten().map(|entry| entry.path()).collect(),
    )
}

/// Whether the nearest existing directory at or above `path` is on a bpf file system.
fn on_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        .and_then(|ancestor| statfs(ancestor).ok())
        .is_some_and(|status| status.filesystem_type() == BPF_FS_MAGIC)
}

/// Whether a pinned map has the shape that its name stands for.
fn fits(path: &Path, shape: &Shape) -> bool {
    let Ok(info) = MapData::from_pin(path).and_then(|map| map.info()) else {
        return false;
    };
    info.map_type().is_ok_and(|kind| kind == shape.kind)
        && info.key_size() as usize == shape.key
        && info.value_size() as usize == shape.value
        && info.max_entries() == shape.entries
}
