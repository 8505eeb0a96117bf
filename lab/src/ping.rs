//! An ICMP echo, so that no `ping` need be installed.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{IoContext, LabError, Result};
use crate::frame::checksum;
use crate::netns::Netns;

/// How long one request may go unanswered before the next is sent.
const INTERVAL: Duration = Duration::from_millis(100);

/// Pings `target` from inside `from` until it answers; how long the answer to the answered request took.
pub fn ping(from: &Netns, target: IpAddr, within: Duration) -> Result<Duration> {
    let begun = Instant::now();
    for sequence in 0_u16.. {
        let sent = Instant::now();
        if from.run(|| echo(target, sequence))? {
            return Ok(sent.elapsed());
        }
        if begun.elapsed() > within {
            break;
        }
        thread::sleep(INTERVAL.saturating_sub(sent.elapsed()));
    }
    Err(LabError::Timeout {
        what: format!("an answer to a ping of {target} from {}", from.name()),
        after: within,
        hint: String::new(),
    })
}

/// One request; whether it was answered.
fn echo(target: IpAddr, sequence: u16) -> Result<bool> {
    let what = || format!("pinging {target}");
    let (domain, protocol, request, reply) = match target {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).context(what)?;
    socket.set_read_timeout(Some(INTERVAL)).context(what)?;
    let mut packet = [request, 0, 0, 0, 0x1f, 0x1f, 0, 0];
    packet[6..].copy_from_slice(&sequence.to_be_bytes());
    if target.is_ipv4() {
        // The kernel fills in the checksum of ICMPv6 only.
        let sum = checksum(&packet, 0).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    // "Unreachable" is an answer that may change: the next request tells. A connected raw socket hears its
    // peer alone.
    if socket.connect(&SocketAddr::new(target, 0).into()).is_err() || socket.send(&packet).is_err()
    {
        return Ok(false);
    }
    let sent = Instant::now();
    let mut buffer = [0; 256];
    while sent.elapsed() < INTERVAL {
        let Ok(length) = (&socket).read(&mut buffer) else {
            break;
        };
        let header = if target.is_ipv4() {
            usize::from(buffer[0] & 0x0f) * 4
        } else {
            0
        };
        if let Some(icmp) = buffer[..length].get(header..header + 8)
            && icmp[0] == reply
            && icmp[4..8] == packet[4..8]
        {
            return Ok(true);
        }
    }
    Ok(false)
}
