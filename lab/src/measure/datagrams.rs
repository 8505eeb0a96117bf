//! One datagram every 2 ms, open loop, and which of them were answered.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{IoContext, Result};
use crate::measure::Worker;
use crate::netns::Netns;
use crate::server::make_room;

/// The time between two datagrams.
pub const INTERVAL: Duration = Duration::from_millis(2);
/// How long answers are waited for after the last datagram.
const STRAGGLERS: Duration = Duration::from_secs(1);

/// A running probe.
#[derive(Debug)]
pub struct Probe {
    begun: Instant,
    sender: Worker<Vec<Duration>>,
    receiver: Worker<()>,
    answers: Arc<Mutex<BTreeMap<usize, Arc<str>>>>,
    sent: Arc<Mutex<Vec<Duration>>>,
}

impl Probe {
    /// Begins to send to a pod's echo server, usually by a VIP. All datagrams are of one flow.
    pub fn start(from: &Netns, to: SocketAddr) -> Result<Self> {
        let socket = from
            .run(|| -> std::io::Result<UdpSocket> {
                let any: SocketAddr = if to.is_ipv4() {
                    (Ipv4Addr::UNSPECIFIED, 0).into()
                } else {
                    (Ipv6Addr::UNSPECIFIED, 0).into()
                };
                // Not connected: an ICMP error is no answer, and must not disturb the sending.
                let socket = UdpSocket::bind(any)?;
                make_room(&socket)?;
                socket.set_read_timeout(Some(Duration::from_millis(20)))?;
                Ok(socket)
            })
            .context(|| format!("opening a socket in {}", from.name()))?;
        let sending = socket
            .try_clone()
            .context(|| "cloning a socket".to_owned())?;
        let answers = Arc::new(Mutex::new(BTreeMap::new()));
        let collected = Arc::clone(&answers);
        let receiver = Worker::start(from, "datagrams-in", move |stop| {
            let mut buffer = [0; 256];
            while !stop.asked() {
                let Ok((length, source)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                // Only the address that was asked may answer.
                if source != to {
                    continue;
                }
                if let Some((by, number)) = parse(&buffer[..length]) {
                    collected
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .entry(number)
                        .or_insert_with(|| by.into());
                }
            }
        });
        let begun = Instant::now();
        let sent = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&sent);
        let sender = Worker::start(from, "datagrams-out", move |stop| {
            for number in 0_usize.. {
                if stop.asked() {
                    break;
                }
                let due =
                    INTERVAL * u32::try_from(number).expect("a probe lasts less than 99 days");
                thread::sleep(due.saturating_sub(begun.elapsed()));
                noted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(begun.elapsed());
                // No route, no buffer: the datagram is lost, and counts as such.
                let _ = sending.send_to(number.to_string().as_bytes(), to);
            }
            noted.lock().unwrap_or_else(PoisonError::into_inner).clone()
        });
        Ok(Self {
            begun,
            sender,
            receiver,
            answers,
            sent,
        })
    }

    /// When it began; the report's times count from here.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// For how long every datagram has been answered up to now, the last 50 ms left aside; zero when the latest
    /// were not.
    pub fn answered_since(&self) -> Duration {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.begun.elapsed();
        let settled = now.saturating_sub(Duration::from_millis(50));
        let mut since = settled;
        for (number, at) in sent.iter().enumerate().rev() {
            if *at > settled {
                continue;
            }
            if !answers.contains_key(&number) {
                return settled.saturating_sub(since);
            }
            since = *at;
        }
        settled.saturating_sub(since)
    }

    /// Ends it.
    pub fn stop(self) -> Datagrams {
        let sent = self.sender.stop();
        thread::sleep(STRAGGLERS);
        self.receiver.stop();
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        Datagrams {
            sent: sent
                .into_iter()
                .enumerate()
                .map(|(number, at)| (at, answers.remove(&number)))
                .collect(),
        }
    }
}

/// The pod's name and the datagram's number, from an answer.
fn parse(answer: &[u8]) -> Option<(&str, usize)> {
    let (by, number) = std::str::from_utf8(answer).ok()?.rsplit_once(' ')?;
    Some((by, number.parse().ok()?))
}

/// What became of the datagrams.
#[derive(Clone, Debug, Default)]
pub struct Datagrams {
    /// When each was sent, and by which pod it was answered.
    pub sent: Vec<(Duration, Option<Arc<str>>)>,
}

impl Datagrams {
    /// How many were not answered.
    pub fn lost(&self) -> usize {
        self.sent.iter().filter(|(_, by)| by.is_none()).count()
    }

    /// The outage: the longest time between the sending of two datagrams that were both answered, with none
    /// answered between them. `None` when fewer than two were answered.
    pub fn longest_gap(&self) -> Option<Duration> {
        let answered: Vec<Duration> = self
            .sent
            .iter()
            .filter(|(_, by)| by.is_some())
            .map(|(at, _)| *at)
            .collect();
        answered
            .windows(2)
            .map(|pair| pair[1].saturating_sub(pair[0]))
            .max()
    }

    /// How long before the end the last answered one was sent: an outage that did not end, if it is long.
    pub fn unanswered_tail(&self) -> Duration {
        let last_answered = self.sent.iter().rev().find(|(_, by)| by.is_some());
        match (self.sent.last(), last_answered) {
            (Some((end, _)), Some((at, _))) => end.saturating_sub(*at),
            (Some((end, _)), None) => *end,
            (None, _) => Duration::ZERO,
        }
    }

    /// How many each pod answered.
    pub fn answered_by(&self) -> BTreeMap<Arc<str>, usize> {
        let mut count = BTreeMap::new();
        for by in self.sent.iter().filter_map(|(_, by)| by.as_ref()) {
            *count.entry(Arc::clone(by)).or_default() += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_datagrams(answered: &[bool]) -> Datagrams {
        let sent = (0_u32..)
            .zip(answered)
            .map(|(number, answered)| (INTERVAL * number, answered.then(|| "pod".into())))
            .collect();
        Datagrams { sent }
    }

    #[test]
    fn the_gap_is_between_sending_times_of_answered_ones() {
        let datagrams = mk_datagrams(&[true, true, false, false, false, true, true]);
        assert_eq!(datagrams.longest_gap(), Some(INTERVAL * 4));
        assert_eq!(datagrams.lost(), 3);
        assert_eq!(datagrams.unanswered_tail(), Duration::ZERO);
    }

    #[test]
    fn no_loss_is_one_interval() {
        assert_eq!(
            mk_datagrams(&[true, true, true]).longest_gap(),
            Some(INTERVAL)
        );
    }

    #[test]
    fn what_never_ends_is_no_gap_but_a_tail() {
        let datagrams = mk_datagrams(&[true, false, false, false]);
        assert_eq!(datagrams.longest_gap(), None);
        assert_eq!(datagrams.unanswered_tail(), INTERVAL * 3);
        assert_eq!(mk_datagrams(&[false, false]).unanswered_tail(), INTERVAL);
    }

    #[test]
    fn answers_name_pod_and_number() {
        assert_eq!(parse(b"node1-pod0 17"), Some(("node1-pod0", 17)));
        assert_eq!(parse(b"17"), None);
        assert_eq!(parse(b"node1-pod0 x"), None);
    }
}
