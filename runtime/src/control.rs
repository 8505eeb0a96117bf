//! The control socket: what a speaker tells and does for whoever is root on its node, over a Unix socket, by HTTP.
//!
//! It is not the admin endpoints: what it shows is tenants' own, and what it does takes their policies out of force. Who
//! can open the socket may; nobody else can reach it. The `landfall` command asks it, and so can
//! `curl --unix-socket`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as Probe;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Router;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::{Method, Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::task::AbortOnDropHandle;

/// Where a speaker listens, unless told otherwise.
pub const SOCKET: &str = "/run/landfall-speaker/control.sock";
/// How long an answer may take: the longest, a gateway's hand-over, takes five seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// The paths that are served.
pub mod path {
    /// `GET`: [`Egress`](super::Egress).
    pub const EGRESS: &str = "/egress";
    /// `GET`, with `policy`, `pod` and `most` as query: [`Bindings`](super::Bindings).
    pub const BINDINGS: &str = "/egress/bindings";
    /// `GET`, with the same query: [`Pods`](super::Pods).
    pub const PODS: &str = "/egress/pods";
    /// `POST`, with `force` as query: [`Armed`](super::Armed).
    pub const DISARM: &str = "/egress/disarm";
    /// `POST`: [`Armed`](super::Armed).
    pub const ARM: &str = "/egress/arm";
    /// `GET`: [`Diagnosis`](super::Diagnosis).
    pub const DOCTOR: &str = "/doctor";
}

/// What a node does for egress policies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Egress {
    /// The node.
    pub node: String,
    /// It treats their pods' packets at all (`--egress`).
    pub enabled: bool,
    /// Somebody has disarmed it.
    pub disarmed: bool,
    /// The policies that it is the gateway of.
    pub gateway_of: Vec<String>,
    /// All policies that the node knows, and what their pods use of it.
    pub policies: BTreeMap<String, PolicyUse>,
}

/// What a policy's pods use of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyUse {
    /// Ports in use at it as their gateway.
    pub ports: u64,
    /// Most ports of all pods together; nothing for no limit.
    pub quota: Option<u32>,
    /// Most ports of a pod to one remote address, port and protocol.
    pub quota_per_pod: Option<u32>,
    /// Bindings that live.
    pub bindings: u64,
    /// Bindings that have ended and whose ports rest.
    pub resting: u64,
    /// Packets translated on their way out.
    pub out_packets: u64,
    /// Bytes of them.
    pub out_bytes: u64,
    /// Packets translated on their way back.
    pub in_packets: u64,
    /// Bytes of them.
    pub in_bytes: u64,
    /// How many other nodes have a copy of all its bindings, and follow; nothing where this node is not the gateway.
    pub standbys: Option<u64>,
    /// Milliseconds since the oldest change of them that one of these has not said to have applied.
    pub replication_lag_milliseconds: Option<u64>,
    /// Packets that were not let through, by reason. `no-gateway` is about this node's own pods, all others about those
    /// whose gateway it is.
    pub dropped: BTreeMap<String, u64>,
}

/// A binding: a pod's flow, and what it leaves by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The policy; nothing if it is gone.
    pub policy: Option<String>,
    /// The pod, as `namespace/name`; nothing if none has the address any more.
    pub pod: Option<String>,
    /// Its address and port; of an echo request its identifier.
    pub pod_address: SocketAddr,
    /// What it leaves by.
    pub egress: SocketAddr,
    /// Whom it is with.
    pub remote: SocketAddr,
    /// `TCP`, `UDP`, `ICMP`, or a number.
    pub protocol: String,
    /// For how many seconds nothing was heard of it.
    pub idle_seconds: u64,
    /// `opening`, `established`, `closing`, `reset`, `resting`.
    pub state: String,
}

/// Bindings at a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bindings {
    /// The node.
    pub node: String,
    /// Some of them.
    pub bindings: Vec<Binding>,
    /// How many there are more.
    pub more: usize,
    /// How many it only keeps, for addresses that another node is the gateway of.
    #[serde(default)]
    pub copies: usize,
}

/// What a pod uses of its gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodUse {
    /// The policy; nothing if it is gone.
    pub policy: Option<String>,
    /// The pod, as `namespace/name`; its address, if none has that any more.
    pub pod: String,
    /// Bindings that live.
    pub bindings: u64,
    /// Bindings that have ended and whose ports rest.
    pub resting: u64,
    /// The most ports that it has to one remote address, port and protocol: what `quota.portsPerPod` limits.
    pub most_to_one: u64,
    /// That remote.
    pub busiest: Option<SocketAddr>,
    /// What was counted of its packets at this node since the pod is known here; nothing, if it is not, or is another
    /// policy's by now: its flows only go on.
    #[serde(flatten)]
    pub traffic: Option<Traffic>,
}

/// Packets of a pod at its gateway, and their bytes, link-layer header included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// To remotes.
    pub out_packets: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// From remotes.
    pub in_packets: u64,
    /// Their bytes.
    pub in_bytes: u64,
    /// Refused or dropped, by reason.
    pub dropped: BTreeMap<String, u64>,
}

/// What pods use of a node as their gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pods {
    /// The node.
    pub node: String,
    /// Each of them, who uses most first.
    pub pods: Vec<PodUse>,
    /// How many bindings it only keeps, for addresses that another node is the gateway of.
    #[serde(default)]
    pub copies: usize,
}

/// Whether a node is in force for egress policies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Armed {
    /// The node.
    pub node: String,
    /// Whether it was taken out.
    pub disarmed: bool,
    /// The policies whose gateway it was, and that another node has taken over.
    pub handed_over: Vec<String>,
    /// Those that nobody could take over.
    pub abandoned: Vec<String>,
}

/// What a node says of itself, for whoever looks why something does not work there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// The node.
    pub node: String,
    /// What was looked at, each with what was found.
    pub findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub check: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do; nothing, if nothing is to be done.
    pub advice: Option<String>,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing; it works.
    Note,
    /// Something does not work, or will not.
    Problem,
}

/// Why a speaker did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens there, or the caller may not ask.
    #[error("{path}: {error}: is a speaker running here (in its pod: `kubectl exec`), and are you root? From elsewhere: --node NODE", path = .0.display(), error = .1)]
    Unreachable(PathBuf, io::Error),
    /// It answered that it will not.
    #[error("{0}")]
    Refused(String),
    /// It did not answer as it should: it may be of another version.
    #[error("the speaker did not answer as expected: {0}")]
    Odd(String),
}

/// Asks.
pub async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, ControlError> {
    ask(socket, Method::GET, path).await
}

/// Orders.
pub async fn post<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, ControlError> {
    ask(socket, Method::POST, path).await
}

async fn ask<T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
) -> Result<T, ControlError> {
    let answer = tokio::time::timeout(PATIENCE, exchange(socket, method, path)).await;
    let (good, body) =
        answer.unwrap_or_else(|_| Err(ControlError::Odd(format!("nothing for {PATIENCE:?}"))))?;
    if !good {
        let text = String::from_utf8_lossy(&body);
        return Err(ControlError::Refused(text.trim().to_owned()));
    }
    serde_json::from_slice(&body).map_err(|error| ControlError::Odd(error.to_string()))
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
) -> Result<(bool, Bytes), ControlError> {
    let odd = |error: &dyn std::fmt::Display| ControlError::Odd(error.to_string());
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| ControlError::Unreachable(socket.to_owned(), error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| odd(&error))?;
    // It ends with the answer, or with this call.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .body(Empty::<Bytes>::new())
        .map_err(|error| odd(&error))?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(|error| odd(&error))?;
    let good = answer.status().is_success();
    let body = answer.into_body().collect().await;
    Ok((good, body.map_err(|error| odd(&error))?.to_bytes()))
}

/// A socket that is served. Dropping it ends that and removes the socket.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    _task: AbortOnDropHandle<()>,
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Serves `router` on a socket that only its owner, root, can open. One that a process has left behind is replaced.
///
/// # Errors
/// Another process serves it, or it cannot be made.
pub fn serve(path: &Path, router: Router) -> io::Result<Control> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    if path.exists() {
        if Probe::connect(path).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process serves it",
            ));
        }
        fs::remove_file(path)?;
    }
    // Nobody else may open it, not even before its mode is set: so it gets its name when it has that.
    let hidden = path.with_extension("new");
    let _ = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))?;
    fs::rename(&hidden, path)?;
    let task = tokio::spawn(async move {
        if let Err(problem) = axum::serve(listener, router).await {
            tracing::error!(%problem, "the control socket ended");
        }
    });
    Ok(Control {
        path: path.to_owned(),
        _task: AbortOnDropHandle::new(task),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use axum::http::StatusCode;
    use axum::routing::{get as on_get, post as on_post};

    use super::*;

    fn mk_router() -> Router {
        let armed = || async {
            axum::Json(Armed {
                node: "n1".into(),
                ..Armed::default()
            })
        };
        let refused = || async { (StatusCode::CONFLICT, "it is the gateway\n") };
        Router::new()
            .route(path::ARM, on_post(armed))
            .route(path::DISARM, on_post(refused))
            .route(path::EGRESS, on_get(|| async { "{}" }))
    }

    #[tokio::test]
    async fn a_speaker_is_asked() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("a/control.sock");
        let control = serve(&socket, mk_router()).unwrap();
        let mode = fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let armed: Armed = post(&socket, path::ARM).await.unwrap();
        assert_eq!(armed.node, "n1");
        let refused = post::<Armed>(&socket, path::DISARM).await.unwrap_err();
        assert_eq!(refused.to_string(), "it is the gateway");
        let odd = get::<Egress>(&socket, path::EGRESS).await.unwrap_err();
        assert!(matches!(odd, ControlError::Odd(_)), "{odd}");
        // One is enough; the next comes after it.
        let second = serve(&socket, mk_router()).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        drop(control);
        assert!(!socket.exists());
        let gone = get::<Egress>(&socket, path::EGRESS).await.unwrap_err();
        assert!(
            gone.to_string().contains("is a speaker running here"),
            "{gone}"
        );
    }

    #[tokio::test]
    async fn what_a_process_has_left_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let _control = serve(&socket, mk_router()).unwrap();
        post::<Armed>(&socket, path::ARM).await.unwrap();
    }
}
