//! What closes the time between a node's start and its speaker's: a table for the packet filter, that the speaker has left in a
//! file while there are policies. It drops what new connections of all pods send outside the cluster, since nobody can tell
//! whose pods they are. The speaker puts its own in its place.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where the speaker leaves it.
pub const BOOT: &str = "/var/lib/landfall/boot.nft";

/// Where `nft` may be; container runtimes are started with all sorts of paths.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// It was loaded.
    Now,
    /// A table of Landfall's is there: the speaker's, or this one.
    Before,
    /// There is no file: there was no policy when the speaker was last here.
    Needless,
}

/// Loads the table, unless one of its name is there already.
///
/// # Errors
///
/// It cannot be loaded: what says so, with what `nft` has said.
pub fn arm(file: &Path) -> io::Result<Armed> {
    if !file.try_exists()? {
        return Ok(Armed::Needless);
    }
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("nft")
        .env("PATH", format!("{path}:{PATH}"))
        .env("LC_ALL", "C")
        .arg("-f")
        .arg(file)
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(io::Error::other(
                "this node has no `nft`: install nftables, or pods that start before the speaker leave by the node's address",
            ));
        }
        output => output?,
    };
    if output.status.success() {
        return Ok(Armed::Now);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // It is loaded as a whole or not at all, and begins with `create table`.
    if said.contains("File exists") {
        return Ok(Armed::Before);
    }
    Err(io::Error::other(said.trim().to_owned()))
}
