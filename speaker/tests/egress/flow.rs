//! What a pod does outside: connections and datagrams to the remote, which says by which address it sees them.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use landfall_lab::server::{TCP_PORT, UDP_PORT, WHO_AM_I};
use landfall_lab::{Netns, Network};

/// How long an answer may take that there may be none of.
pub(super) const A_WHILE: Duration = Duration::from_millis(1500);
/// What a busy machine can promise.
const LONG: Duration = Duration::from_secs(20);

/// The addresses of the server outside.
pub(super) fn remote() -> [IpAddr; 2] {
    Network::Remote.both(100)
}

/// A connection whose both ends are the test's.
pub(super) struct Pair {
    pub(super) pod: TcpStream,
    pub(super) outside: TcpStream,
    pub(super) seen_as: IpAddr,
    turn: u32,
}

impl Pair {
    /// From a pod to a port of the remote's.
    pub(super) fn open(from: &Netns, outside: &Netns, remote: IpAddr) -> io::Result<Self> {
        let any = if remote.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let listener = outside.run(|| TcpListener::bind(any).unwrap());
        let to = SocketAddr::new(remote, listener.local_addr()?.port());
        let pod = from.run(|| TcpStream::connect_timeout(&to, LONG))?;
        let (outside, seen_as) = listener.accept()?;
        for stream in [&pod, &outside] {
            stream.set_read_timeout(Some(LONG))?;
            stream.set_nodelay(true)?;
        }
        Ok(Self {
            pod,
            outside,
            seen_as: seen_as.ip(),
            turn: 0,
        })
    }

    /// From now on each side waits for a word only so long.
    pub(super) fn wait_no_longer_than(&self, timeout: Duration) {
        for stream in [&self.pod, &self.outside] {
            stream.set_read_timeout(Some(timeout)).unwrap();
        }
    }

    /// A word there and one back.
    pub(super) fn pod_speaks(&mut self) -> io::Result<()> {
        self.turn += 1;
        converse(&self.pod, &self.outside, self.turn)
    }

    /// The same, the other way round.
    pub(super) fn outside_speaks(&mut self) -> io::Result<()> {
        self.turn += 1;
        converse(&self.outside, &self.pod, self.turn)
    }
}

fn converse(mut first: &TcpStream, mut second: &TcpStream, word: u32) -> io::Result<()> {
    let mut heard = [0; 4];
    first.write_all(&word.to_be_bytes())?;
    second.read_exact(&mut heard)?;
    if heard != word.to_be_bytes() {
        return Err(io::Error::other("another word"));
    }
    second.write_all(&heard)?;
    first.read_exact(&mut heard)
}

/// The address by which a server for lines sees a connection.
pub(super) fn line(from: &Netns, to: SocketAddr, within: Duration) -> io::Result<IpAddr> {
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, within))?;
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(format!("{WHO_AM_I}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let heard = line.trim_end().split_once(' ').map(|(_, address)| address);
    heard
        .and_then(|address| address.parse().ok())
        .ok_or_else(|| io::Error::other(line))
}

/// Datagrams from one socket.
pub(super) struct Datagrams {
    socket: UdpSocket,
}

impl Datagrams {
    pub(super) fn open(from: &Netns, remote: IpAddr) -> Self {
        Self::open_at(from, 0, remote)
    }

    /// From a port.
    pub(super) fn open_at(from: &Netns, port: u16, remote: IpAddr) -> Self {
        let any: IpAddr = if remote.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let socket = from.run(|| UdpSocket::bind((any, port)).unwrap());
        socket.connect((remote, UDP_PORT)).unwrap();
        Self { socket }
    }

    /// The address it is seen by, if there is an answer.
    pub(super) fn seen_as(&self, within: Duration) -> Option<IpAddr> {
        self.ask(within).ok()
    }

    /// The same, where one has to come.
    pub(super) fn surely_seen_as(&self) -> IpAddr {
        self.ask(Duration::from_secs(5))
            .unwrap_or_else(|error| panic!("{:?}: {error}", self.socket))
    }

    fn ask(&self, within: Duration) -> io::Result<IpAddr> {
        self.socket.set_read_timeout(Some(within))?;
        self.socket.send(WHO_AM_I.as_bytes())?;
        let mut answer = [0; 128];
        let length = self.socket.recv(&mut answer)?;
        let text = String::from_utf8_lossy(&answer[..length]);
        let seen = text.split_once(' ').map(|(_, address)| address.parse());
        match seen {
            Some(Ok(address)) => Ok(address),
            _ => Err(io::Error::other(text.into_owned())),
        }
    }
}

/// How a pod is seen: by a connection, and by a datagram.
pub(super) fn seen_as(from: &Netns, remote: IpAddr) -> (Option<IpAddr>, Option<IpAddr>) {
    let connection = line(from, (remote, TCP_PORT).into(), A_WHILE);
    (
        connection.ok(),
        Datagrams::open(from, remote).seen_as(A_WHILE),
    )
}
