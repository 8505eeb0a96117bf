//! Pods whose network libcni makes, as a container runtime has it made, and what they do in their first moment.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Output;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::server::{TCP_PORT, WHO_AM_I};
use landfall_lab::tool::cni_plugins;
use landfall_lab::{LabId, Netns};
use serde_json::Value;

use super::cluster::{Cluster, PATIENCE};
use super::flow::remote;

/// How many pods are made at once.
const HANDS: usize = 4;

/// A pod.
pub(super) struct Pod<'a> {
    cluster: &'a Cluster,
    pub(super) name: String,
    pub(super) tenant: &'static str,
    pub(super) netns: Netns,
    pub(super) addresses: Vec<IpAddr>,
    /// How long the making of its network took.
    pub(super) took: Duration,
    /// What the plugins have said on the standard error.
    pub(super) said: String,
    made: bool,
}

impl<'a> Pod<'a> {
    /// A pod without a network yet.
    pub(super) fn new(cluster: &'a Cluster, name: String, tenant: &'static str) -> Self {
        Self {
            netns: Netns::create_in(&LabId::fresh(), "pod").unwrap(),
            cluster,
            name,
            tenant,
            addresses: Vec::new(),
            took: Duration::ZERO,
            said: String::new(),
            made: false,
        }
    }

    fn call(&self, verb: &str) -> Output {
        let namespace = format!("/run/netns/{}", self.netns.name());
        self.cluster
            .node()
            .command(cni_plugins().unwrap().join("cnitool"))
            .args([verb, "pods", &namespace])
            .env("NETCONFPATH", self.cluster.lists())
            .env("CNI_PATH", self.cluster.programs())
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={}",
                    self.name
                ),
            )
            .output()
            .unwrap()
    }

    /// Makes its network.
    pub(super) fn add(&mut self) {
        let begun = Instant::now();
        self.made = true;
        let output = self.call("add");
        self.took = begun.elapsed();
        assert!(output.status.success(), "{output:?}");
        self.said = String::from_utf8(output.stderr).unwrap();
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        let ips = result["ips"].as_array().unwrap();
        self.addresses = ips
            .iter()
            .map(|ip| {
                let text = ip["address"].as_str().unwrap();
                text.split('/').next().unwrap().parse().unwrap()
            })
            .collect();
    }

    /// Takes it away.
    pub(super) fn del(&mut self) {
        if std::mem::take(&mut self.made) {
            let output = self.call("del");
            assert!(output.status.success(), "{output:?}");
        }
    }

    /// Connects to the remote by each family at once, and asks by which address it is seen.
    pub(super) fn connect(&self, within: Duration) -> Vec<io::Result<Seen>> {
        let connect = |remote| self.netns.run(move || connect(remote, within));
        thread::scope(|scope| {
            let connecting = remote().map(|remote| scope.spawn(move || connect(remote)));
            connecting.map(|it| it.join().unwrap()).into()
        })
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if self.made {
            self.call("del");
        }
    }
}

/// A connection's first moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// How long it took to connect.
    pub(super) took: Duration,
    /// The address that the remote sees.
    pub(super) by: IpAddr,
}

fn connect(remote: IpAddr, within: Duration) -> io::Result<Seen> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(remote, TCP_PORT), within)?;
    let took = begun.elapsed();
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{WHO_AM_I}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let heard = line.trim_end().split_once(' ').map(|(_, address)| address);
    let by = heard.and_then(|address| address.parse().ok());
    let by = by.ok_or_else(|| io::Error::other(line))?;
    Ok(Seen { took, by })
}

/// Does something with all of them, some at once.
pub(super) fn with_all<'a, T: Send>(
    pods: &mut [Pod<'a>],
    work: impl Fn(&mut Pod<'a>) -> T + Sync,
) -> Vec<T> {
    let (work, left) = (&work, Mutex::new(pods.iter_mut().enumerate()));
    let mut done: Vec<(usize, T)> = thread::scope(|scope| {
        let hands: Vec<_> = (0..HANDS)
            .map(|_| {
                scope.spawn(|| {
                    let mut done = Vec::new();
                    loop {
                        let next = left.lock().unwrap().next();
                        let Some((number, pod)) = next else {
                            return done;
                        };
                        done.push((number, work(pod)));
                    }
                })
            })
            .collect();
        hands
            .into_iter()
            .flat_map(|hand| hand.join().unwrap())
            .collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Median, 99th percentile and maximum, in milliseconds.
pub(super) fn spread(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e3;
    format!(
        "p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms (n = {})",
        at(50),
        at(99),
        at(100),
        times.len()
    )
}
