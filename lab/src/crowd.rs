//! Very many TCP flows, of segments made by hand: no socket is open for any of them.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{IoContext, Result};
use crate::packets::{Raw, segment};
use crate::{Netns, server};

/// A flow is to end (RFC 9293, 3.1, as the others).
pub const FIN: u8 = 1;
/// A flow is to begin.
pub const SYN: u8 = 2;
/// There is no such flow.
pub const RST: u8 = 4;
/// A flow goes on.
pub const PSH: u8 = 8;
const ACK: u8 = 16;

/// Where the remote answers them.
pub const PORT: u16 = 9000;
/// How many segments are on their way at once: less than any queue holds.
const WINDOW: usize = 64;
/// What is not answered is sent again, so often.
const AGAIN: Duration = Duration::from_secs(1);
const TRIES: u32 = 20;

/// A segment that was heard.
struct Heard {
    from: SocketAddr,
    to: SocketAddr,
    flags: u8,
}

/// Hears all packets of a family that come to a host, and keeps its kernel from resetting what it knows nothing of.
fn ear(host: &Netns, of: IpAddr, wait: Duration) -> Result<Socket> {
    host.nft(&format!(
        "add table inet quiet\n\
         add chain inet quiet out {{ type filter hook output priority 0; }}\n\
         add rule inet quiet out tcp dport {PORT} tcp flags & rst == rst drop\n\
         add rule inet quiet out tcp sport {PORT} tcp flags & rst == rst drop\n"
    ))?;
    // Packets from the network header on (packet(7)): a raw socket would keep IPv6's.
    let ethertype = match of {
        IpAddr::V4(_) => libc::ETH_P_IP,
        IpAddr::V6(_) => libc::ETH_P_IPV6,
    };
    let protocol = u16::try_from(ethertype).expect("ethertypes fit 16 bits");
    let open = || {
        let protocol = Protocol::from(i32::from(protocol.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
        socket.set_read_timeout(Some(wait))?;
        server::make_room(&socket)?;
        io::Result::Ok(socket)
    };
    host.run(open)
        .context(|| format!("listening in {}", host.name()))
}

/// The next segment, if there is one soon.
fn hear(mut ear: &Socket) -> io::Result<Option<Heard>> {
    let mut bytes = [0; 256];
    match ear.read(&mut bytes) {
        Ok(length) => Ok(parse(&bytes[..length])),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Nothing, of packets that are no whole segment.
fn parse(packet: &[u8]) -> Option<Heard> {
    let tcp = u8::try_from(libc::IPPROTO_TCP).ok()?;
    let (addresses, protocol, header): ([IpAddr; 2], u8, usize) = if packet.first()? >> 4 == 4 {
        let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
        let header = usize::from(packet[0] & 15) * 4;
        let addresses = [address(12)?.into(), address(16)?.into()];
        (addresses, *packet.get(9)?, header)
    } else {
        let address = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
        let addresses = [address(8)?.into(), address(24)?.into()];
        (addresses, *packet.get(6)?, 40)
    };
    let segment = packet.get(header..)?.first_chunk::<14>()?;
    let port = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
    (protocol == tcp).then(|| Heard {
        from: SocketAddr::new(addresses[0], port(0)),
        to: SocketAddr::new(addresses[1], port(2)),
        flags: segment[13],
    })
}

/// The numbers of a segment of a flow, whose sides both begin with 1 and say nothing but that.
fn numbers(flags: u8) -> [u32; 2] {
    match (flags & SYN != 0, flags & ACK != 0) {
        (true, false) => [1, 0],
        (true, true) => [1, 2],
        (false, _) => [2, 2],
    }
}

/// A host that answers each segment to [`PORT`] with its like.
#[derive(Debug)]
pub struct Mirror {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mirror {
    /// Hangs it at one of a host's addresses.
    ///
    /// # Errors
    /// Those of sockets and of `nft`.
    pub fn hang(host: &Netns, address: IpAddr) -> Result<Self> {
        let ear = ear(host, address, Duration::from_millis(50))?;
        let raw = Raw::open(host, address);
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = host.spawn("mirror", move || {
            while !until.load(Ordering::Relaxed) {
                let Some(Heard { from, to, flags }) = hear(&ear).expect("packets can be heard")
                else {
                    continue;
                };
                if to.port() == PORT && flags & (SYN | FIN | PSH) != 0 {
                    let flags = flags | ACK;
                    raw.send(from.ip(), &segment(to, from, numbers(flags), flags))
                        .expect("there is a way back");
                }
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Who has flows by the thousand to one remote and port.
#[derive(Debug)]
pub struct Crowd {
    ear: Socket,
    raw: Raw,
    remote: SocketAddr,
}

/// What became of segments, in the order of their flows.
#[derive(Debug, Default)]
pub struct Answers {
    /// The flags of each answer.
    pub flags: Vec<u8>,
    /// How many had to be sent again.
    pub again: usize,
    /// The longest that one waited which was sent once.
    pub longest: Duration,
}

impl Answers {
    /// How many have been reset.
    pub fn refused(&self) -> usize {
        self.flags.iter().filter(|flags| **flags & RST != 0).count()
    }
}

impl Crowd {
    /// The flows of a host to a remote's [`PORT`].
    ///
    /// # Errors
    /// Those of sockets and of `nft`.
    pub fn of(host: &Netns, remote: IpAddr) -> Result<Self> {
        Ok(Self {
            ear: ear(host, remote, Duration::from_millis(1))?,
            raw: Raw::open(host, remote),
            remote: SocketAddr::new(remote, PORT),
        })
    }

    /// Sends a segment of each flow, so many a second at most, until each is answered by its like or by a reset.
    ///
    /// # Panics
    /// If one is not answered at all.
    pub fn say(&self, flows: &[SocketAddr], flags: u8, rate: f64) -> Answers {
        let places: HashMap<SocketAddr, usize> = flows.iter().copied().zip(0..).collect();
        let also = if flags == SYN { 0 } else { ACK };
        let mut answers = Answers {
            flags: vec![0; flows.len()],
            ..Answers::default()
        };
        let send = |place: usize| {
            let flags = flags | also;
            let bytes = segment(flows[place], self.remote, numbers(flags), flags);
            self.raw
                .send(self.remote.ip(), &bytes)
                .expect("there is a way to the remote");
        };
        let at = |number: usize| f64::from(u32::try_from(number).expect("there are not so many"));
        let begun = Instant::now();
        let (mut next, mut answered) = (0, 0);
        let mut waiting: VecDeque<(usize, Instant, u32)> = VecDeque::new();
        while answered < flows.len() {
            while next < flows.len()
                && next < answered + WINDOW
                && at(next) <= begun.elapsed().as_secs_f64() * rate
            {
                send(next);
                waiting.push_back((next, Instant::now(), 1));
                next += 1;
            }
            if let Some(heard) = hear(&self.ear).expect("packets can be heard")
                && heard.from == self.remote
                && heard.flags & (flags | RST) != 0
                && let Some(place) = places.get(&heard.to)
                && answers.flags[*place] == 0
            {
                answers.flags[*place] = heard.flags;
                answered += 1;
            }
            while let Some((place, sent, tries)) = waiting.front().copied() {
                if answers.flags[place] != 0 {
                    if tries == 1 {
                        answers.longest = answers.longest.max(sent.elapsed());
                    }
                    waiting.pop_front();
                } else if sent.elapsed() > AGAIN {
                    assert!(tries < TRIES, "{} is not answered", flows[place]);
                    waiting.pop_front();
                    send(place);
                    waiting.push_back((place, Instant::now(), tries + 1));
                    answers.again += usize::from(tries == 1);
                } else {
                    break;
                }
            }
        }
        answers
    }
}
