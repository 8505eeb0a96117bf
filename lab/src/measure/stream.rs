//! One established TCP flow that asks and waits for the answer, over and over.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{sleep, timeout};

use crate::measure::{Stop, Worker};
use crate::netns::Netns;

/// The pause between an answer and the next request.
const PAUSE: Duration = Duration::from_millis(10);
/// How often a wait for an answer looks whether it should stop.
const LOOK: Duration = Duration::from_millis(20);
/// How long a connection may take to be established.
pub(crate) const CONNECT: Duration = Duration::from_secs(5);

/// What became of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Alive,
    /// It was reset or closed by the other side.
    Reset,
    /// It is there but says nothing.
    Stalled,
}

/// What the flow saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// The longest time from a request to its answer, or to the reset, or to the end of the probe.
    pub longest_stall: Duration,
    /// How many requests were answered.
    pub answered: u64,
    /// What became of it.
    pub fate: Fate,
}

/// A flow to a pod's line server.
#[derive(Debug)]
pub(crate) struct Flow {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Flow {
    pub(crate) async fn open(to: SocketAddr) -> io::Result<Self> {
        let stream = timeout(CONNECT, TcpStream::connect(to)).await??;
        stream.set_nodelay(true)?;
        let (read, write) = stream.into_split();
        Ok(Self {
            lines: BufReader::new(read).lines(),
            write,
        })
    }

    /// One request, its answer awaited.
    pub(crate) async fn ask(&mut self) -> io::Result<String> {
        self.write.write_all(b"?\n").await?;
        self.answer().await
    }

    async fn answer(&mut self) -> io::Result<String> {
        self.lines
            .next_line()
            .await?
            .ok_or_else(|| io::ErrorKind::ConnectionReset.into())
    }
}

/// A running probe.
#[derive(Debug)]
pub struct Probe(Worker<Option<Report>>);

impl Probe {
    /// Connects to a pod's line server, usually by a VIP, and begins to ask.
    pub fn start(from: &Netns, to: SocketAddr) -> Self {
        Self(Worker::start_async(from, "stream", move |stop| {
            ask(to, stop)
        }))
    }

    /// Ends it. `None` when the flow was never established.
    pub fn stop(self) -> Option<Report> {
        self.0.stop()
    }
}

async fn ask(to: SocketAddr, stop: Stop) -> Option<Report> {
    let mut flow = Flow::open(to).await.ok()?;
    let mut report = Report {
        longest_stall: Duration::ZERO,
        answered: 0,
        fate: Fate::Alive,
    };
    while !stop.asked() {
        let asked = Instant::now();
        let failed = flow.write.write_all(b"?\n").await.is_err();
        let outcome = loop {
            if failed {
                break Some(false);
            }
            match timeout(LOOK, flow.answer()).await {
                Ok(answer) => break Some(answer.is_ok()),
                Err(_) if stop.asked() => break None,
                Err(_) => {}
            }
        };
        report.longest_stall = report.longest_stall.max(asked.elapsed());
        match outcome {
            Some(true) => report.answered += 1,
            Some(false) => {
                report.fate = Fate::Reset;
                return Some(report);
            }
            None => report.fate = Fate::Stalled,
        }
        sleep(PAUSE).await;
    }
    Some(report)
}
