//! Established TCP flows that are asked again and again, each of which stays with its pod.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_lab::bulk;
use landfall_lab::server::{BULK, WHO_AM_I};
use socket2::SockRef;

use crate::PATIENCE;

/// A flow that does not answer for so long has stalled. A segment that is lost is sent again after 0.2, 0.6, 1.4 s.
const STALLED: Duration = Duration::from_secs(10);

/// An established flow.
pub struct Flow {
    stream: BufReader<TcpStream>,
    /// The pod at its end.
    pub pod: String,
    /// From where the pod sees it come.
    pub seen_from: IpAddr,
}

impl Flow {
    /// Opens one, and asks who is there.
    pub fn open(from: &Netns, to: SocketAddr) -> std::io::Result<Self> {
        Self::open_within(from, to, PATIENCE)
    }

    /// The same, if the connection is there in time.
    pub fn open_within(from: &Netns, to: SocketAddr, time: Duration) -> std::io::Result<Self> {
        let stream = from.run(|| TcpStream::connect_timeout(&to, time))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(STALLED))?;
        let mut flow = Self {
            stream: BufReader::new(stream),
            pod: String::new(),
            seen_from: to.ip(),
        };
        flow.ask()?;
        (flow.pod, flow.seen_from) = flow.answer()?;
        Ok(flow)
    }

    /// The node of its pod.
    pub fn node(&self) -> &str {
        self.pod.split_once("-pod").map_or("", |(node, _)| node)
    }

    /// Sends many bytes and gets as many; all must be what was sent. `received` counts them meanwhile.
    pub fn exchange(self, bytes: u64, received: &AtomicU64) -> std::io::Result<()> {
        let mut stream = self.stream.into_inner();
        writeln!(stream, "{BULK}{bytes}")?;
        bulk::over(stream, bytes, received)
    }

    /// Ends it by a reset: nobody has to confirm that.
    pub fn reset(self) -> std::io::Result<()> {
        SockRef::from(self.stream.get_ref()).set_linger(Some(Duration::ZERO))
    }

    fn ask(&mut self) -> std::io::Result<()> {
        writeln!(self.stream.get_mut(), "{WHO_AM_I}")
    }

    fn answer(&mut self) -> std::io::Result<(String, IpAddr)> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let answer = words
            .next()
            .zip(words.next().and_then(|word| word.parse().ok()));
        answer.ok_or_else(|| ErrorKind::InvalidData.into())
    }
}

/// Opens flows to a pod's line server, usually by a VIP.
pub fn open(from: &Netns, to: SocketAddr, number: usize) -> std::io::Result<Vec<Flow>> {
    (0..number).map(|_| Flow::open(from, to)).collect()
}

/// How many flows each pod has.
pub fn spread(flows: &[Flow]) -> BTreeMap<&str, usize> {
    let mut spread = BTreeMap::new();
    for flow in flows {
        *spread.entry(&*flow.pod).or_default() += 1;
    }
    spread
}

/// Asks all of them at once; how long it took until the last had answered, or what became of those that did not
/// answer, or were answered by another pod.
pub fn ask(flows: &mut [Flow]) -> Result<Duration, Vec<String>> {
    let begun = Instant::now();
    let asked: Vec<std::io::Result<()>> = flows.iter_mut().map(Flow::ask).collect();
    let mut lost = Vec::new();
    for (flow, asked) in flows.iter_mut().zip(asked) {
        match asked.and_then(|()| flow.answer()) {
            Ok((pod, _)) if pod == flow.pod => {}
            Ok((pod, _)) => lost.push(format!("{}: answered by {pod}", flow.pod)),
            Err(error) => lost.push(format!("{}: {error}", flow.pod)),
        }
    }
    if lost.is_empty() {
        Ok(begun.elapsed())
    } else {
        Err(lost)
    }
}
