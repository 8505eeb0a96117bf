//! The real speakers on a lab's nodes, from the manifests.

use std::fs::{self, File};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::{IoContext, LabError, Result};
use crate::fault::SPEAKER;
use crate::lab::Lab;
use crate::netns::Netns;
use crate::process::Program;

/// Where a speaker's admin endpoints are, inside its node.
pub const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7951);

impl Lab {
    /// Writes a fresh gossip key of 32 bytes; its file.
    pub fn gossip_key(&self) -> Result<PathBuf> {
        let path = self.directory().join("gossip.key");
        if path.exists() {
            return Ok(path);
        }
        let mut key = [0; 32];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut key))
            .context(|| "reading /dev/urandom".to_owned())?;
        fs::write(&path, BASE64_STANDARD.encode(key) + "\n")
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)))
            .context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// The speaker of a node with all flags but where its objects come from (`--manifests` or `--kubeconfig`).
    pub fn speaker(&self, node: &str) -> Result<Program> {
        let pins = self.mount_pins()?;
        Ok(Program::landfall("landfall-speaker")?
            .option("--node-name", node)
            .option("--admin-address", ADMIN)
            .option("--gossip-key-file", self.gossip_key()?.display())
            .option("--control-socket", self.control_socket(node).display())
            .option("--bpf-pin-dir", pins.join(node).display())
            .option("--cni-socket", self.cni_socket(node).display()))
    }

    /// Where the CNI plugin calls a node's speaker, if that listens.
    pub fn cni_socket(&self, node: &str) -> PathBuf {
        self.directory().join(format!("{node}.sock"))
    }

    /// The socket by which a node's speaker is asked by root.
    pub fn control_socket(&self, node: &str) -> PathBuf {
        self.directory().join(format!("{node}.control"))
    }

    /// Starts a speaker on every node, from the lab's manifests.
    pub fn start_speakers(&self) -> Result<()> {
        self.start_speakers_with(|program| program)
    }

    /// The same, with something done to what is started.
    pub fn start_speakers_with(&self, adapt: impl Fn(Program) -> Program) -> Result<()> {
        for node in self.nodes() {
            let state = self.directory().join("state").join(&node.name);
            fs::create_dir_all(&state).context(|| format!("creating {}", state.display()))?;
            let program = self
                .speaker(&node.name)?
                .option("--manifests", self.manifests_dir().display())
                .option("--state-dir", state.display())
                .option("--delivery", "native");
            self.start(&node.name, SPEAKER, &adapt(program))?;
        }
        Ok(())
    }

    /// What a node's speaker shows at `/debug/state`.
    pub fn speaker_state(&self, node: &str) -> Result<Value> {
        let body = http_get(&self.node(node)?.netns, ADMIN, "/debug/state")?;
        serde_json::from_str(&body)
            .map_err(|error| LabError::Invalid(format!("/debug/state of {node}: {error}")))
    }

    /// What a node's speaker shows at `/metrics`.
    pub fn speaker_metrics(&self, node: &str) -> Result<String> {
        http_get(&self.node(node)?.netns, ADMIN, "/metrics")
    }
}

/// A page of an HTTP server, fetched from inside a namespace; at most 3 s.
pub fn http_get(from: &Netns, server: SocketAddr, path: &str) -> Result<String> {
    let limit = Duration::from_secs(3);
    let what = || format!("http://{server}{path} from {}", from.name());
    let fetch = async {
        let mut stream = tokio::net::TcpStream::connect(server).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {server}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = from
        .block_on(async { tokio::time::timeout(limit, fetch).await })
        .map_err(|_| LabError::Timeout {
            what: what(),
            after: limit,
            hint: String::new(),
        })?
        .context(what)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head
        .split_whitespace()
        .nth(1)
        .is_some_and(|code| code.starts_with('2'))
    {
        Ok(body.to_owned())
    } else {
        Err(LabError::Invalid(format!(
            "{}: {}",
            what(),
            head.lines().next().unwrap_or("no answer")
        )))
    }
}
