//! What the plugin says to the speaker, and how: one request a connection to a Unix socket, each a line of JSON.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Where the speaker listens.
pub const SOCKET: &str = "/run/landfall/cni.sock";
/// How long a pod waits for its speaker, unless the network configuration says otherwise.
pub const WAIT: Duration = Duration::from_millis(500);
/// The longest line, in bytes.
pub const MAX_LINE: u64 = 16 * 1024;

/// A pod's interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The container's id.
    pub container: String,
    /// The interface's name inside the pod.
    pub interface: String,
    /// The pod's namespace; nothing, if the runtime named none.
    pub namespace: Option<String>,
    /// The pod's name.
    pub name: Option<String>,
    /// The pod's UID.
    pub uid: Option<String>,
    /// Its addresses, as the plugins before have given them.
    pub addresses: Vec<IpAddr>,
    /// The interfaces outside the pod that they have made for it, or used: a veth, a bridge.
    pub host_interfaces: Vec<String>,
}

/// What the plugin says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "command", content = "attachment")]
pub enum Request {
    /// The interface is there; answered when the pod is judged.
    Add(Attachment),
    /// It goes; answered at once.
    Del(Attachment),
}

/// What the speaker answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reply {
    /// Whether the pod's packets may leave, or are dropped on purpose.
    pub judged: bool,
    /// Why it is not judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Asks the speaker, and waits for it so long at most.
///
/// # Errors
///
/// There is no speaker, it did not answer in time, or in no words that are known.
pub fn ask(socket: &Path, request: &Request, wait: Duration) -> io::Result<Reply> {
    let until = Instant::now() + wait;
    let left = || match until.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok::<_, io::Error>(left),
    };
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(left()?))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.set_read_timeout(Some(left()?))?;
    let mut answer = Vec::new();
    BufReader::new(stream.take(MAX_LINE)).read_until(b'\n', &mut answer)?;
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&answer)?)
}
