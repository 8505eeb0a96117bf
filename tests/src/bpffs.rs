//! A bpf file system for the speakers of one cluster: that of the machine may be missing, and is not the tests'.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The mount. Dropping it takes it away, and with it all that is pinned there.
pub(crate) struct Bpffs(PathBuf);

impl Bpffs {
    /// Mounts one on a directory, which is made.
    pub(crate) fn mount(directory: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        mount(
            Some("bpf"),
            directory,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mounting a bpf file system on {}", directory.display()))?;
        Ok(Self(directory.to_owned()))
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.0
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}
