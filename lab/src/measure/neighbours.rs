//! Who answers ARP or ND for an address: the truth about who leads.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::address::{Network, OBSERVER};
use crate::error::{IoContext, Result};
use crate::frame::{self, Answer, Mac};
use crate::lab::Lab;
use crate::measure::Worker;
use crate::netns::Netns;
use crate::sys;

/// An answer: when, and from which Ethernet address.
pub type Heard = (Instant, Mac);

/// A station that asks who has an address, and notes the answers.
#[derive(Debug)]
pub struct Watch {
    heard: Arc<Mutex<Vec<Heard>>>,
    asking: Worker<()>,
}

impl Watch {
    /// Begins to ask every `interval`, as the lab's observer.
    pub fn start(lab: &Lab, vip: IpAddr, interval: Duration) -> Result<Self> {
        let source = Network::Lan.both(OBSERVER)[usize::from(vip.is_ipv6())];
        let (socket, mac) = open(lab.observer(), "eth0", vip)?;
        let question = frame::who_has(vip, source, mac).expect("both addresses are of one family");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&heard);
        let asking = Worker::start(lab.observer(), "watch", move |stop| {
            let mut asked: Option<Instant> = None;
            while !stop.asked() {
                if asked.is_none_or(|asked| asked.elapsed() >= interval) {
                    // A question that does not get out finds no answer.
                    let _ = socket.send(&question);
                    asked = Some(Instant::now());
                }
                if let Some(answer) = next_answer(&socket)
                    && answer.address == vip
                    && answer.solicited
                {
                    notes
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((Instant::now(), answer.mac));
                }
            }
        });
        Ok(Self { heard, asking })
    }

    /// The answers so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The latest answer, if it is younger than `age`.
    pub fn latest(&self, age: Duration) -> Option<Mac> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard
            .last()
            .filter(|(at, _)| at.elapsed() <= age)
            .map(|(_, mac)| *mac)
    }

    /// Ends it; all answers.
    pub fn stop(self) -> Vec<Heard> {
        self.asking.stop();
        std::mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How many answers each node gave, of those that `select` takes. Others than nodes go by Ethernet address.
pub fn by_node(
    lab: &Lab,
    heard: &[Heard],
    select: impl Fn(Instant) -> bool,
) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    for (_, mac) in heard.iter().filter(|(at, _)| select(*at)) {
        let name = lab
            .owner_of(*mac)
            .map_or_else(|| mac.to_string(), str::to_owned);
        *count.entry(name).or_default() += 1;
    }
    count
}

/// Who answers for an address, asked every 100 ms for a while; answers by node.
pub fn who_answers(lab: &Lab, vip: IpAddr, during: Duration) -> Result<BTreeMap<String, usize>> {
    let watch = Watch::start(lab, vip, Duration::from_millis(100))?;
    std::thread::sleep(during);
    Ok(by_node(lab, &watch.stop(), |_| true))
}

/// Notes all announcements for an address that reach a station on the segment, asked for or not: gratuitous ARP,
/// unsolicited advertisements. Sends nothing.
#[derive(Debug)]
pub struct Listener {
    heard: Arc<Mutex<Vec<Heard>>>,
    listening: Worker<()>,
}

impl Listener {
    /// Begins to listen on an interface of a host.
    pub fn start(netns: &Netns, interface: &str, vip: IpAddr) -> Result<Self> {
        let (socket, _) = open(netns, interface, vip)?;
        let heard = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&heard);
        let listening = Worker::start(netns, "listener", move |stop| {
            while !stop.asked() {
                if let Some(answer) = next_answer(&socket)
                    && answer.address == vip
                {
                    notes
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((Instant::now(), answer.mac));
                }
            }
        });
        Ok(Self { heard, listening })
    }

    /// Ends it; all announcements.
    pub fn stop(self) -> Vec<Heard> {
        self.listening.stop();
        std::mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A packet socket for the frames about `vip`, and the interface's Ethernet address.
fn open(netns: &Netns, interface: &str, vip: IpAddr) -> Result<(Socket, Mac)> {
    let index = netns.interface_index(interface)?;
    let ethertype = if vip.is_ipv4() {
        frame::ARP
    } else {
        frame::IPV6
    };
    let socket = netns
        .run(|| {
            let socket = sys::packet_socket(index, ethertype)?;
            socket.set_read_timeout(Some(Duration::from_millis(10)))?;
            Ok::<_, std::io::Error>(socket)
        })
        .context(|| format!("opening a packet socket in {}", netns.name()))?;
    let link = netns.ip(&format!("-o link show dev {interface}"))?;
    let mac = link
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .and_then(|mac| mac.parse().ok())
        .expect("an Ethernet interface has an address");
    Ok((socket, mac))
}

fn next_answer(mut socket: &Socket) -> Option<Answer> {
    let mut buffer = [0; 2048];
    let length = socket.read(&mut buffer).ok()?;
    frame::parse_answer(&buffer[..length])
}
