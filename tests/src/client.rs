//! Asks VIPs as a client does.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_lab::server::{TCP_PORT, UDP_PORT, WHO_AM_I};

/// Sends datagrams every 5 ms until one is answered: which pod answered, and how long it took. Nothing, if none
/// was within `patience`.
pub fn first_answer(from: &Netns, vip: IpAddr, patience: Duration) -> Option<(String, Duration)> {
    from.run(|| {
        let begun = Instant::now();
        let any: SocketAddr = match vip {
            IpAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
            IpAddr::V6(_) => ([0_u16; 8], 0).into(),
        };
        let mut buffer = [0; 256];
        while begun.elapsed() < patience {
            // A new socket each time, so that no stale conntrack entry decides.
            let socket = UdpSocket::bind(any).ok()?;
            socket
                .set_read_timeout(Some(Duration::from_millis(5)))
                .ok()?;
            // Until the client's neighbour is resolved, or there is a route, sending may fail.
            let _ = socket.send_to(b"who", (vip, UDP_PORT));
            if let Ok((length, _)) = socket.recv_from(&mut buffer) {
                return Some((pod(&buffer[..length]), begun.elapsed()));
            }
        }
        None
    })
}

/// Opens a TCP connection and asks who is there.
pub fn who(from: &Netns, vip: IpAddr, patience: Duration) -> std::io::Result<String> {
    seen_as(from, vip, patience).map(|(pod, _)| pod)
}

/// Opens a TCP connection and asks who is there, and from which address it sees the client come.
pub fn seen_as(from: &Netns, vip: IpAddr, patience: Duration) -> std::io::Result<(String, IpAddr)> {
    from.run(|| {
        let mut stream = TcpStream::connect_timeout(&(vip, TCP_PORT).into(), patience)?;
        stream.set_read_timeout(Some(patience))?;
        writeln!(stream, "{WHO_AM_I}")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        let mut words = line.split_whitespace().map(str::to_owned);
        let answer = words
            .next()
            .zip(words.next().and_then(|word| word.parse().ok()));
        answer.ok_or_else(|| std::io::Error::other(format!("an answer of another kind: {line:?}")))
    })
}

/// The addresses of a namespace, those of its links apart.
pub fn addresses(netns: &Netns) -> Vec<IpAddr> {
    let text = netns
        .ip("-j addr show scope global")
        .expect("every namespace has links");
    let links: serde_json::Value = serde_json::from_str(&text).expect("ip speaks JSON");
    let of_link =
        |link: &serde_json::Value| link["addr_info"].as_array().cloned().unwrap_or_default();
    let links = links.as_array().cloned().unwrap_or_default();
    links
        .iter()
        .flat_map(of_link)
        .filter_map(|address| address["local"].as_str()?.parse().ok())
        .collect()
}

/// The pod's name, which stands before its answer.
fn pod(answer: &[u8]) -> String {
    String::from_utf8_lossy(answer)
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}
