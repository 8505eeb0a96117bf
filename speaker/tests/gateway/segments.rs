//! Very many TCP flows, of segments made by hand: no socket is open for any of them.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_lab::packets::{Raw, segment};
use socket2::{Domain, Protocol, Socket, Type};

/// TCP's flags (RFC 9293, 3.1).
pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const PSH: u8 = 8;
const ACK: u8 = 16;

/// Where the remote answers them.
pub(super) const PORT: u16 = 9000;
/// How many segments are on their way at once: less than any queue holds.
const WINDOW: usize = 64;
/// What is not answered is sent again, so often.
const AGAIN: Duration = Duration::from_secs(1);
const TRIES: u32 = 20;

/// Hears all TCP that comes to a host, and keeps its kernel from resetting what it knows nothing of.
fn ear(host: &Netns, wait: Duration) -> Socket {
    host.nft(&format!(
        "add table inet quiet\n\
         add chain inet quiet out {{ type filter hook output priority 0; }}\n\
         add rule inet quiet out tcp dport {PORT} tcp flags & rst == rst drop\n\
         add rule inet quiet out tcp sport {PORT} tcp flags & rst == rst drop\n"
    ))
    .unwrap();
    let socket = host.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap());
    socket.set_read_timeout(Some(wait)).unwrap();
    socket
}

/// The next segment: from where, to where, and its flags.
fn hear(mut ear: &Socket) -> Option<(SocketAddr, SocketAddr, u8)> {
    let mut bytes = [0; 256];
    match ear.read(&mut bytes) {
        Ok(length) if length >= 40 => {}
        Ok(_) => return None,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            return None;
        }
        Err(error) => panic!("{error}"),
    }
    let header = usize::from(bytes[0] & 15) * 4;
    let end = |address: usize, port: usize| {
        let octets: [u8; 4] = bytes[address..address + 4].try_into().unwrap();
        let port = u16::from_be_bytes([bytes[port], bytes[port + 1]]);
        SocketAddr::new(Ipv4Addr::from(octets).into(), port)
    };
    Some((end(12, header), end(16, header + 2), bytes[header + 13]))
}

/// A host that answers each segment to [`PORT`] with its like.
pub(super) struct Mirror {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mirror {
    pub(super) fn hang(host: &Netns, address: IpAddr) -> Self {
        let ear = ear(host, Duration::from_millis(50));
        let raw = Raw::open(host, address);
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                let Some((from, to, flags)) = hear(&ear) else {
                    continue;
                };
                if to.port() == PORT && flags & (SYN | FIN | PSH) != 0 {
                    raw.send(from.ip(), &segment(to, from, 1, flags | ACK))
                        .unwrap();
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
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
pub(super) struct Crowd {
    ear: Socket,
    raw: Raw,
    remote: SocketAddr,
}

/// What became of segments, in the order of their flows.
#[derive(Default)]
pub(super) struct Answers {
    /// The flags of each answer.
    pub(super) flags: Vec<u8>,
    /// How many had to be sent again.
    pub(super) again: usize,
    /// The longest that one waited which was sent once.
    pub(super) longest: Duration,
}

impl Answers {
    /// How many have been reset.
    pub(super) fn refused(&self) -> usize {
        self.flags.iter().filter(|flags| **flags & RST != 0).count()
    }
}

impl Crowd {
    pub(super) fn of(host: &Netns, remote: IpAddr) -> Self {
        Self {
            ear: ear(host, Duration::from_millis(1)),
            raw: Raw::open(host, remote),
            remote: SocketAddr::new(remote, PORT),
        }
    }

    /// Sends a segment of each flow, so many a second at most, until each is answered by its like or by a reset.
    pub(super) fn say(&self, flows: &[SocketAddr], flags: u8, rate: f64) -> Answers {
        let places: HashMap<SocketAddr, usize> = flows.iter().copied().zip(0..).collect();
        let also = if flags == SYN { 0 } else { ACK };
        let mut answers = Answers {
            flags: vec![0; flows.len()],
            ..Answers::default()
        };
        let send = |place: usize| {
            let bytes = segment(flows[place], self.remote, 1, flags | also);
            self.raw.send(self.remote.ip(), &bytes).unwrap();
        };
        let begun = Instant::now();
        let (mut next, mut answered) = (0, 0);
        let mut waiting: VecDeque<(usize, Instant, u32)> = VecDeque::new();
        while answered < flows.len() {
            while next < flows.len()
                && next < answered + WINDOW
                && f64::from(u32::try_from(next).unwrap()) <= begun.elapsed().as_secs_f64() * rate
            {
                send(next);
                waiting.push_back((next, Instant::now(), 1));
                next += 1;
            }
            if let Some((from, to, said)) = hear(&self.ear)
                && from == self.remote
                && said & (flags | RST) != 0
                && let Some(place) = places.get(&to)
                && answers.flags[*place] == 0
            {
                answers.flags[*place] = said;
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
