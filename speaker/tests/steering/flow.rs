//! Established flows, and what becomes of them.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use landfall_lab::bulk;
use landfall_lab::fault::SPEAKER;
use landfall_lab::manifests::LINES;
use landfall_lab::server::{BULK, WHO_AM_I};
use landfall_lab::{Netns, Pod};

use super::cluster::{Cluster, PATIENCE};

/// An established flow, and the pod at its end.
pub(super) struct Flow {
    pub(super) stream: BufReader<TcpStream>,
    pub(super) pod: String,
}

impl Flow {
    pub(super) fn open(from: &Netns, to: SocketAddr) -> std::io::Result<Self> {
        Self::over(from.run(|| TcpStream::connect_timeout(&to, PATIENCE))?)
    }

    /// A flow over a new connection.
    pub(super) fn over(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut flow = Self {
            stream: BufReader::new(stream),
            pod: String::new(),
        };
        flow.ask()?;
        flow.pod = flow.answer()?;
        Ok(flow)
    }

    pub(super) fn ask(&mut self) -> std::io::Result<()> {
        self.stream.get_mut().write_all(b"still there?\n")
    }

    /// How long it waits for answers from now on.
    pub(super) fn set_patience(&mut self, patience: Duration) {
        let stream = self.stream.get_ref();
        stream.set_read_timeout(Some(patience)).unwrap();
    }

    pub(super) fn answer(&mut self) -> std::io::Result<String> {
        let line = self.line()?;
        Ok(line.split(' ').next().unwrap_or_default().to_owned())
    }

    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line)
    }

    /// Says something to the pod; what it answers, its name left off.
    pub(super) fn say(&mut self, line: &str) -> std::io::Result<String> {
        writeln!(self.stream.get_mut(), "{line}")?;
        let answer = self.line()?;
        let rest = answer.strip_prefix(&*self.pod);
        assert!(rest.is_some(), "{} is answered {answer:?}", self.pod);
        Ok(rest.unwrap_or_default().trim().to_owned())
    }

    /// Sends many bytes and gets as many; all must be what was sent. `received` counts them meanwhile.
    pub(super) fn exchange(self, bytes: u64, received: &AtomicU64) -> std::io::Result<()> {
        let mut stream = self.stream.into_inner();
        writeln!(stream, "{BULK}{bytes}")?;
        bulk::over(stream, bytes, received)
    }

    /// Ends it from both sides.
    pub(super) fn close(mut self) -> std::io::Result<()> {
        self.stream.get_ref().shutdown(Shutdown::Write)?;
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).map(drop)
    }

    /// The client's address, as the pod sees it.
    pub(super) fn seen_as(&mut self) -> IpAddr {
        self.say(WHO_AM_I).unwrap().parse().unwrap()
    }

    pub(super) fn node(&self) -> &str {
        self.pod.split_once("-pod").unwrap().0
    }
}

/// Each of the flows asks its pod and is answered by it.
pub(super) fn all_alive(cluster: &Cluster, flows: &mut [Flow], when: &str) {
    let lost = |flow: &Flow, error: std::io::Error| -> ! {
        for node in cluster.lab.nodes() {
            let state = cluster.lab.speaker_state(&node.name).unwrap_or_default();
            println!(
                "{}: {:?} {}",
                node.name,
                cluster.verdicts_of(&node.name),
                state["steering"]
            );
            let log = cluster.lab.log(&node.name, SPEAKER).unwrap_or_default();
            for line in log.lines().filter(|line| line.contains("WARN")) {
                println!("{line}");
            }
        }
        panic!("{when}: a flow to {}: {error}", flow.pod)
    };
    for flow in flows.iter_mut() {
        if let Err(error) = flow.ask() {
            lost(flow, error);
        }
    }
    for flow in flows.iter_mut() {
        match flow.answer() {
            Ok(pod) => assert_eq!(pod, flow.pod, "{when}: another pod answered"),
            Err(error) => lost(flow, error),
        }
    }
}

pub(super) fn open(cluster: &Cluster, vip: IpAddr, number: usize) -> Vec<Flow> {
    open_from(cluster.lab.client(), vip, number)
}

pub(super) fn open_from(from: &Netns, vip: IpAddr, number: usize) -> Vec<Flow> {
    (0..number)
        .map(|_| Flow::open(from, (vip, LINES).into()).unwrap())
        .collect()
}

/// Opens connections until these pods have all served, and no other has among the last of them. One that does not come
/// about while tables and delivery change is no answer to who serves, and is not waited for long.
pub(super) fn await_served(cluster: &Cluster, vip: IpAddr, pods: &[&Pod]) {
    let begun = Instant::now();
    let wanted: BTreeSet<&str> = pods.iter().map(|pod| &*pod.name).collect();
    let to = (vip, LINES).into();
    loop {
        let seen: BTreeSet<String> = cluster.lab.client().run(|| {
            (0..pods.len() * 12)
                .filter_map(|_| TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok())
                .filter_map(|stream| Flow::over(stream).ok())
                .map(|flow| flow.pod)
                .collect()
        });
        if seen.iter().map(String::as_str).collect::<BTreeSet<_>>() == wanted {
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "served by {seen:?}, not by {wanted:?}"
        );
    }
}

/// A flow to a pod that is not the leader's.
pub(super) fn elsewhere(from: &Netns, vip: IpAddr, leader: &str) -> Flow {
    let to = (vip, LINES).into();
    (0..100)
        .map(|_| Flow::open(from, to).unwrap())
        .find(|flow| flow.node() != leader)
        .unwrap()
}
