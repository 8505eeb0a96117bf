//! What runs in a pod: small servers that answer with the pod's name.
//!
//! - UDP [`UDP_PORT`]: every datagram comes back with `<pod> ` before it. The datagram `whoami` is answered as below.
//! - TCP [`TCP_PORT`]: every line comes back with `<pod> ` before it, until the client closes. The line `whoami` is
//!   answered with the client's address, as the pod sees it. After the line `bulk <bytes>` both sides speak as in
//!   [`crate::bulk`].
//! - TCP [`NEWS_PORT`]: the server speaks first, and alone: a line `<pod> <number> <address>` every [`NEWS_INTERVAL`],
//!   from 0 on, with the client's address as the pod sees it.
//!
//! All listen on IPv4 and IPv6, and can be tried with `nc`.

use std::io::{self, BufRead};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::bulk::{self, Content};
use crate::error::{IoContext, Result};
use crate::netns::Netns;

/// Where a pod echoes datagrams.
pub const UDP_PORT: u16 = 5000;
/// Where a pod answers lines.
pub const TCP_PORT: u16 = 8080;
/// Where a pod speaks first.
pub const NEWS_PORT: u16 = 8081;
/// The time between two lines of its news.
pub const NEWS_INTERVAL: Duration = Duration::from_millis(100);
/// What a client asks to learn its address as the pod sees it.
pub const WHO_AM_I: &str = "whoami";
/// What a client says, with a number of bytes behind it, before both send as many.
pub const BULK: &str = "bulk ";

/// One line of a server's news: `<pod> <number> <address>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// The pod that tells it.
    pub pod: String,
    /// 0 in the first line, one more in each.
    pub number: u64,
    /// Of the client, as the pod sees it.
    pub client: IpAddr,
}

impl News {
    /// Waits for the next line. What is no news is [`io::ErrorKind::InvalidData`], and the end
    /// [`io::ErrorKind::UnexpectedEof`].
    pub fn read(from: &mut impl BufRead) -> io::Result<Self> {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut words = line.split_whitespace();
        let mut parse = || {
            Some(Self {
                pod: words.next()?.to_owned(),
                number: words.next()?.parse().ok()?,
                client: words.next()?.parse().ok()?,
            })
        };
        parse()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no news: {line:?}")))
    }
}

/// The servers of one pod, on a thread in its namespace. Dropping it ends them: open connections are reset or
/// closed by the kernel as for a process that dies.
#[derive(Debug)]
pub struct PodServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PodServer {
    /// Starts them; when this returns they listen.
    pub fn start(netns: &Netns, pod: &str) -> Result<Self> {
        let (udp, tcp, news) = netns
            .run(|| {
                io::Result::Ok((
                    bind(Type::DGRAM, UDP_PORT)?,
                    bind(Type::STREAM, TCP_PORT)?,
                    bind(Type::STREAM, NEWS_PORT)?,
                ))
            })
            .context(|| format!("opening the server sockets of {pod}"))?;
        let (stop, stopped) = oneshot::channel();
        let name: Arc<str> = format!("{pod} ").into();
        let thread = netns.spawn(pod, move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime needs but a few descriptors");
            runtime.block_on(async move {
                let servers = async {
                    let served = tokio::try_join!(
                        echo(udp.into(), Arc::clone(&name)),
                        accept(tcp.into(), Arc::clone(&name), converse),
                        accept(news.into(), name, tell)
                    );
                    if let Err(error) = served {
                        tracing::warn!(%error, "a pod's server ended");
                    }
                };
                tokio::select! {
                    () = servers => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for PodServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Room for what comes while a busy machine does not let a process run: what is lost was lost on its way.
pub(crate) fn make_room(socket: &impl AsFd) -> io::Result<()> {
    const SECONDS_OF_DATAGRAMS: usize = 4 << 20;
    Ok(setsockopt(socket, RcvBufForce, &SECONDS_OF_DATAGRAMS)?)
}

/// A socket for both families.
fn bind(kind: Type, port: u16) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM {
        Protocol::UDP
    } else {
        Protocol::TCP
    };
    let socket = Socket::new(Domain::IPV6, kind, Some(protocol))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    if kind == Type::DGRAM {
        make_room(&socket)?;
    }
    if kind == Type::STREAM {
        socket.listen(1024)?;
    }
    Ok(socket)
}

async fn echo(socket: std::net::UdpSocket, name: Arc<str>) -> io::Result<()> {
    let socket = UdpSocket::from_std(socket)?;
    let mut buffer = vec![0; 65_536];
    buffer[..name.len()].copy_from_slice(name.as_bytes());
    loop {
        let (length, from) = match socket.recv_from(&mut buffer[name.len()..]).await {
            Ok(received) => received,
            // An ICMP error to an earlier answer.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error),
        };
        if &buffer[name.len()..name.len() + length] == WHO_AM_I.as_bytes() {
            let answer = format!("{name}{}", from.ip().to_canonical());
            let _ = socket.send_to(answer.as_bytes(), from).await;
            continue;
        }
        // What cannot be sent is lost, as datagrams are.
        let _ = socket.send_to(&buffer[..name.len() + length], from).await;
    }
}

async fn accept<T>(
    listener: std::net::TcpListener,
    name: Arc<str>,
    serve: impl Fn(TcpStream, Arc<str>) -> T,
) -> io::Result<()>
where
    T: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::from_std(listener)?;
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(serve(stream, Arc::clone(&name)));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse(stream: TcpStream, name: Arc<str>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let client = stream.peer_addr()?.ip().to_canonical();
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Some(mut line) = lines.next_line().await? {
        if line == WHO_AM_I {
            line = client.to_string();
        }
        if let Some(bytes) = line.strip_prefix(BULK).and_then(|text| text.parse().ok()) {
            let read = lines.into_inner();
            return bulk::exchange(read, write, bytes, Content::Servers, &AtomicU64::new(0)).await;
        }
        write
            .write_all(format!("{name}{line}\n").as_bytes())
            .await?;
    }
    Ok(())
}

async fn tell(mut stream: TcpStream, name: Arc<str>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let client = stream.peer_addr()?.ip().to_canonical();
    let mut due = tokio::time::interval(NEWS_INTERVAL);
    for number in 0_u64.. {
        due.tick().await;
        stream
            .write_all(format!("{name}{number} {client}\n").as_bytes())
            .await?;
    }
    Ok(())
}
