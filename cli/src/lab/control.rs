//! How the commands talk with the process that holds a lab: one JSON line each way, over a Unix socket that
//! only root can open.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use landfall_lab::Fault;
use landfall_lab::ledger::STATE_DIR;
use serde::{Deserialize, Serialize};

/// No answer takes longer than a speaker's restart.
const LIMIT: Duration = Duration::from_secs(60);

/// What can be asked of the lab that is up.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    /// What there is.
    Status,
    /// Something happens to a node.
    Fault { node: String, fault: Fault },
    /// The management network fails.
    ManagementNetworkDown,
    /// Nothing passes between two groups of nodes; clients stay with the first.
    Partition {
        first: Vec<String>,
        second: Vec<String>,
    },
    /// Loss in one direction.
    Loss {
        from: String,
        to: String,
        percent: u8,
    },
    /// Everything is mended.
    Heal,
    /// The lab ends.
    Down,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Response {
    /// It was done.
    Done,
    /// It could not be done.
    Failed(String),
    /// What there is.
    Status(Status),
}

/// What `landfall lab status -o json` prints.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Status {
    /// The lab's namespaces are called `lf-<id>-<host>`.
    pub(super) id: String,
    /// The process that holds it.
    pub(super) pid: u32,
    /// Its YAML, watched by the speakers.
    pub(super) manifests: PathBuf,
    /// The speakers' logs.
    pub(super) logs: PathBuf,
    /// The Service's addresses, and how many ARP or ND answers in 300 ms came from which node.
    pub(super) vips: BTreeMap<String, BTreeMap<String, usize>>,
    /// The nodes.
    pub(super) nodes: Vec<NodeStatus>,
    /// Hosts that `landfall lab exec` knows.
    pub(super) hosts: Vec<String>,
}

/// A node of [`Status`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NodeStatus {
    /// Its name.
    pub(super) name: String,
    /// Its addresses on the LAN.
    pub(super) addresses: Vec<String>,
    /// Whether its speaker runs.
    pub(super) speaker: bool,
    /// The speaker's process, while it runs.
    pub(super) pid: Option<i32>,
    /// Its pods and their addresses.
    pub(super) pods: BTreeMap<String, Vec<String>>,
}

/// Where the process that holds a lab listens.
pub(super) fn socket() -> PathBuf {
    Path::new(STATE_DIR).join("lab.sock")
}

/// Where it writes what it has to say.
pub(super) fn log() -> PathBuf {
    Path::new(STATE_DIR).join("hold.log")
}

/// Asks the process that holds the lab; `None` when no lab is up.
pub(super) fn ask(request: &Request) -> anyhow::Result<Option<Response>> {
    let Ok(stream) = UnixStream::connect(socket()) else {
        return Ok(None);
    };
    stream.set_read_timeout(Some(LIMIT))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    (&stream).write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(&stream)
        .read_line(&mut answer)
        .context("the process that holds the lab does not answer")?;
    let response = serde_json::from_str(&answer).with_context(|| {
        format!(
            "the process that holds the lab gave up; its log is {}",
            log().display()
        )
    })?;
    Ok(Some(response))
}

/// Asks, and takes anything but an answer for a failure.
pub(super) fn demand(request: &Request) -> anyhow::Result<Response> {
    match ask(request)? {
        None => anyhow::bail!("no lab is up: `landfall lab up` builds one"),
        Some(Response::Failed(why)) => anyhow::bail!(why),
        Some(response @ (Response::Done | Response::Status(_))) => Ok(response),
    }
}
