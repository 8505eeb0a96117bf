//! Where the chained CNI plugin calls (`landfall-cni`): a Unix socket, for root only.

pub mod plugin;

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use landfall_cni::call::{MAX_LINE, Reply, Request};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

/// How many may call at once; more wait their turn.
const MAX_CALLERS: usize = 64;
/// How long a caller may take to say what it wants.
const SAYS: Duration = Duration::from_secs(2);
/// How long it is kept waiting at most, whatever it waits for itself.
const WAITS: Duration = Duration::from_secs(10);

/// A call.
#[derive(Debug)]
pub struct Call {
    /// What is said.
    pub request: Request,
    /// Where to answer. A caller that has gone is no error.
    pub answer: oneshot::Sender<Reply>,
}

/// Listens until it is dropped; then the socket is removed.
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
    _task: AbortOnDropHandle<()>,
}

/// Listens at a path, whose directory is made if need be; what an earlier process has left there is replaced.
///
/// # Errors
///
/// The directory or the socket cannot be made.
pub fn listen(path: &Path) -> io::Result<(Listener, mpsc::Receiver<Call>)> {
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    let (calls, called) = mpsc::channel(MAX_CALLERS);
    let listener = Listener {
        path: path.to_owned(),
        _task: AbortOnDropHandle::new(tokio::spawn(accept(listener, calls))),
    };
    Ok((listener, called))
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

async fn accept(listener: UnixListener, calls: mpsc::Sender<Call>) {
    let seats = Arc::new(Semaphore::new(MAX_CALLERS));
    loop {
        let Ok(seat) = seats.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let calls = calls.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, calls).await {
                        debug!(%error, "cni: a call ended early");
                    }
                    drop(seat);
                });
            }
            Err(error) => {
                warn!(%error, "cni: cannot take a call");
                sleep(SAYS).await;
            }
        }
    }
}

async fn serve(mut stream: UnixStream, calls: mpsc::Sender<Call>) -> io::Result<()> {
    let reply = match request(&mut stream).await {
        Ok(request) => tokio::select! {
            reply = judged(request, &calls) => reply,
            // It has waited long enough, and needs no seat any more. What it has said is known.
            () = gone(&mut stream) => return Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::InvalidData => refused(format!(
            "the request cannot be read: {error}; the plugin and the speaker are of versions that do not fit"
        )),
        Err(error) => return Err(error),
    };
    let mut line = serde_json::to_vec(&reply)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

async fn request(stream: &mut UnixStream) -> io::Result<Request> {
    let mut line = Vec::new();
    let mut reader = BufReader::new(stream.take(MAX_LINE));
    timeout(SAYS, reader.read_until(b'\n', &mut line)).await??;
    serde_json::from_slice(&line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Waits until the caller hangs up.
async fn gone(stream: &mut UnixStream) {
    let mut more = [0; 64];
    while stream.read(&mut more).await.is_ok_and(|length| length > 0) {}
}

async fn judged(request: Request, calls: &mpsc::Sender<Call>) -> Reply {
    let (answer, answered) = oneshot::channel();
    if calls.send(Call { request, answer }).await.is_err() {
        return refused("the speaker is stopping".into());
    }
    match timeout(WAITS, answered).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(_)) => refused("the speaker is stopping".into()),
        Err(_) => refused("the API server has not told of the pod yet".into()),
    }
}

fn refused(reason: String) -> Reply {
    Reply {
        judged: false,
        reason: Some(reason),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use landfall_cni::call::{Attachment, ask};

    use super::*;

    fn request() -> Request {
        Request::Add(Attachment {
            container: "c".into(),
            interface: "eth0".into(),
            namespace: Some("ns".into()),
            name: Some("pod".into()),
            uid: None,
            addresses: vec![[10, 0, 0, 1].into()],
            host_interfaces: Vec::new(),
        })
    }

    async fn call(path: &Path) -> io::Result<Reply> {
        let path = path.to_owned();
        let asked =
            tokio::task::spawn_blocking(move || ask(&path, &request(), Duration::from_secs(5)));
        asked.await.unwrap()
    }

    #[tokio::test]
    async fn the_plugin_is_answered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/landfall/cni.sock");
        let (listener, mut calls) = listen(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        let answers = tokio::spawn(async move {
            let call = calls.recv().await.unwrap();
            assert_eq!(call.request, request());
            let reply = Reply {
                judged: true,
                reason: None,
            };
            call.answer.send(reply).unwrap();
            // The next finds nobody who answers.
            drop(calls.recv().await.unwrap());
        });
        assert!(call(&path).await.unwrap().judged);
        let reply = call(&path).await.unwrap();
        assert_eq!(reply.reason.as_deref(), Some("the speaker is stopping"));
        answers.await.unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_socket_that_was_left_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let (_listener, mut calls) = listen(&path).unwrap();
        tokio::spawn(async move { calls.recv().await });
        assert!(!call(&path).await.unwrap().judged);
    }

    #[tokio::test]
    async fn what_is_no_request_is_told_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let (_listener, _calls) = listen(&path).unwrap();
        for line in [
            "\n",
            "no json\n",
            "{\"command\":\"jump\"}\n",
            &"x".repeat(20_000),
        ] {
            let (path, line) = (path.clone(), line.to_owned());
            let answer = tokio::task::spawn_blocking(move || {
                let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
                // It may be shut out while it speaks.
                let _ = stream.write_all(line.as_bytes());
                let mut answer = String::new();
                let _ = io::Read::read_to_string(&mut stream, &mut answer);
                answer
            });
            let answer = answer.await.unwrap();
            assert!(answer.contains("cannot be read"), "{answer}");
        }
    }
}
