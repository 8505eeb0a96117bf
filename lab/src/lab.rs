//! The lab itself: its hosts, their processes, and how it is built and torn down.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

use crate::address::{self, Network};
use crate::error::{IoContext, LabError, Result};
use crate::frame::Mac;
use crate::netns::{LabId, Netns};
use crate::process::{Key, Processes, Program};
use crate::server::PodServer;
use crate::topology::{Nic, Topology};
use crate::{ledger, wiring};

/// A node of the lab.
#[derive(Debug)]
pub struct Node {
    /// `node1` and up.
    pub name: String,
    /// Its number, from 1.
    pub index: u8,
    /// Its namespace.
    pub netns: Netns,
    /// Its pods.
    pub pods: Vec<Pod>,
}

impl Node {
    /// Its addresses on a network.
    pub fn addresses(&self, network: Network) -> [IpAddr; 2] {
        network.both(address::node_host(self.index))
    }

    /// The Ethernet address of one of its NICs.
    pub fn mac(&self, nic: Nic) -> Mac {
        nic.network().mac(address::node_host(self.index))
    }
}

/// A pod of a node: a namespace behind it ([`PodLinks`](crate::PodLinks)).
#[derive(Debug)]
pub struct Pod {
    /// `node1-pod0` and up.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// Its addresses.
    pub addresses: [IpAddr; 2],
    /// Its namespace.
    pub netns: Netns,
}

/// A LAN in network namespaces. Dropping it ends its processes and removes it whole.
#[derive(Debug)]
pub struct Lab {
    pub(crate) id: LabId,
    pub(crate) topology: Topology,
    pub(crate) directory: PathBuf,
    /// The bridges `br-lan`, `br-iso` (where a port in the wrong VLAN ends), `br-lan2` and `br-mgmt`.
    pub(crate) switch: Netns,
    pub(crate) router: Netns,
    pub(crate) client: Netns,
    pub(crate) observer: Netns,
    pub(crate) remote: Netns,
    pub(crate) nodes: Vec<Node>,
    pub(crate) management_hosts: Mutex<BTreeMap<String, std::sync::Arc<Netns>>>,
    pub(crate) processes: Processes,
    pub(crate) servers: Mutex<BTreeMap<String, PodServer>>,
    pub(crate) powered_off: Mutex<BTreeSet<String>>,
}

impl Lab {
    /// Builds it: namespaces, links, addresses and routes of both families. No process runs in it yet.
    pub fn build(topology: Topology) -> Result<Self> {
        topology.check()?;
        crate::tool::preflight()?;
        let id = LabId::fresh();
        let directory = std::env::temp_dir().join(id.name("lab"));
        ledger::enter_directory(&directory)?;
        for part in ["manifests", "logs", "state"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).context(|| format!("creating {}", path.display()))?;
        }
        let lab = Self::with_namespaces(id, topology, directory)?;
        wiring::wire(&lab)?;
        Ok(lab)
    }

    /// The lab's namespaces, not connected yet.
    fn with_namespaces(id: LabId, topology: Topology, directory: PathBuf) -> Result<Self> {
        let make = |id: &LabId, role: &str| Netns::create_in(id, role);
        let mut nodes = Vec::new();
        for index in 1..=topology.nodes {
            let name = format!("node{index}");
            let netns = make(&id, &name)?;
            let mut pods = Vec::new();
            for number in 0..topology.pods_per_node {
                let pod = format!("{name}-pod{number}");
                pods.push(Pod {
                    netns: make(&id, &pod)?,
                    name: pod,
                    node: name.clone(),
                    addresses: address::pod(index, number),
                });
            }
            nodes.push(Node {
                name,
                index,
                netns,
                pods,
            });
        }
        Ok(Self {
            switch: make(&id, "switch")?,
            router: make(&id, "router")?,
            client: make(&id, "client")?,
            observer: make(&id, "observer")?,
            remote: make(&id, "remote")?,
            id,
            topology,
            directory,
            nodes,
            management_hosts: Mutex::default(),
            processes: Processes::default(),
            servers: Mutex::default(),
            powered_off: Mutex::default(),
        })
    }

    /// What tells its names from those of other labs.
    pub fn id(&self) -> &LabId {
        &self.id
    }

    /// What it was built from.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Its working directory: `manifests`, `logs`, `state`. Removed with it.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory for `--manifests`.
    pub fn manifests_dir(&self) -> PathBuf {
        self.directory.join("manifests")
    }

    /// Its nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .ok_or_else(|| self.unknown("node", name))
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// The switch's namespace.
    pub fn switch(&self) -> &Netns {
        &self.switch
    }

    /// The client on the segment: 10.88.0.100, `fd00:88::100`.
    pub fn client(&self) -> &Netns {
        &self.client
    }

    /// A station on the segment that only asks who has an address, so that the client's neighbour table learns
    /// nothing from the asking: 10.88.0.101, `fd00:88::101`.
    pub fn observer(&self) -> &Netns {
        &self.observer
    }

    /// The router: host 1 of the LAN, the second LAN and the remote network.
    pub fn router(&self) -> &Netns {
        &self.router
    }

    /// The routed client beyond the router: 10.77.0.100, `fd00:77::100`.
    pub fn remote(&self) -> &Netns {
        &self.remote
    }

    /// A host's namespace by name: a node, a pod, `client`, `observer`, `router`, `remote`, `switch`. For
    /// management hosts see [`Lab::management_host`].
    pub fn host(&self, name: &str) -> Result<&Netns> {
        match name {
            "client" => return Ok(&self.client),
            "observer" => return Ok(&self.observer),
            "router" => return Ok(&self.router),
            "remote" => return Ok(&self.remote),
            "switch" => return Ok(&self.switch),
            _ => {}
        }
        if let Some(node) = self.nodes.iter().find(|node| node.name == name) {
            return Ok(&node.netns);
        }
        self.pods()
            .find(|pod| pod.name == name)
            .map(|pod| &pod.netns)
            .ok_or_else(|| self.unknown("host", name))
    }

    /// The names that [`Lab::host`] knows.
    pub fn host_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.nodes.iter().map(|node| node.name.clone()).collect();
        names.extend(self.pods().map(|pod| pod.name.clone()));
        names.extend(["client", "observer", "router", "remote", "switch"].map(str::to_owned));
        names
    }

    pub(crate) fn unknown(&self, kind: &'static str, name: &str) -> LabError {
        LabError::Unknown {
            kind,
            name: name.to_owned(),
            known: self.host_names().join(", "),
        }
    }

    /// The node that an Ethernet address belongs to, whatever the NIC.
    pub fn owner_of(&self, mac: Mac) -> Option<&str> {
        self.nodes
            .iter()
            .find(|node| self.topology.nics().any(|nic| node.mac(nic) == mac))
            .map(|node| node.name.as_str())
    }

    /// A further host on the management network, 10.99.0.`host` and `fd00:99::host`: for a control plane. Made
    /// when first asked for.
    pub fn management_host(&self, name: &str, host: u8) -> Result<std::sync::Arc<Netns>> {
        if !self.topology.management {
            return Err(LabError::Invalid(
                "this lab has no management network: set Topology::management".to_owned(),
            ));
        }
        let mut hosts = self
            .management_hosts
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(netns) = hosts.get(name) {
            return Ok(netns.clone());
        }
        let netns = Netns::create_in(&self.id, name)?;
        wiring::plug(
            self,
            &netns,
            &wiring::Plug {
                port: name,
                bridge: wiring::MANAGEMENT,
                nic: "eth0",
                network: Network::Management,
                host,
            },
        )?;
        let netns = std::sync::Arc::new(netns);
        hosts.insert(name.to_owned(), netns.clone());
        Ok(netns)
    }

    /// Starts a program on a host, under a name; one of that name there is killed first. Its output is appended
    /// to a log.
    pub fn start(&self, host: &str, name: &str, program: &Program) -> Result<()> {
        let log = self
            .directory
            .join("logs")
            .join(format!("{host}-{name}.log"));
        let managed = self
            .management_hosts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(host)
            .cloned();
        let netns = match &managed {
            Some(netns) => netns,
            None => self.host(host)?,
        };
        self.processes.start(netns, &key(host, name), program, &log)
    }

    /// Starts a process again, with the arguments it had.
    pub fn restart(&self, host: &str, name: &str) -> Result<()> {
        let record = self
            .processes
            .record(&key(host, name))
            .ok_or_else(|| self.no_process(host, name))?;
        self.start(host, name, &record.program)
    }

    /// Whether a process runs.
    pub fn runs(&self, host: &str, name: &str) -> bool {
        self.processes.alive(&key(host, name))
    }

    /// Sends a signal to a process.
    pub fn signal(&self, host: &str, name: &str, signal: Signal) -> Result<()> {
        if self.processes.signal(&key(host, name), signal, false) {
            Ok(())
        } else {
            Err(self.no_process(host, name))
        }
    }

    /// The process's number.
    pub fn pid(&self, host: &str, name: &str) -> Option<i32> {
        self.processes
            .record(&key(host, name))
            .map(|record| record.id.pid)
    }

    /// Kills a process and forgets it.
    pub fn stop(&self, host: &str, name: &str) {
        self.processes.kill(&key(host, name));
    }

    /// Waits until a process has ended.
    pub fn wait(&self, host: &str, name: &str, within: Duration) -> Result<()> {
        self.processes.wait(&key(host, name), within)
    }

    /// What a process has printed so far.
    pub fn log(&self, host: &str, name: &str) -> Result<String> {
        self.processes.log(&key(host, name))
    }

    fn no_process(&self, host: &str, name: &str) -> LabError {
        LabError::Unknown {
            kind: "process",
            name: format!("{name} on {host}"),
            known: self.processes.names(),
        }
    }

    /// Starts the servers of all pods (see [`crate::server`]), as threads of this process.
    pub fn serve_pods(&self) -> Result<()> {
        for pod in self.pods() {
            self.serve_pod(pod)?;
        }
        Ok(())
    }

    /// Where the speakers of this lab pin eBPF objects, one directory a node below it: a bpf file system of the
    /// lab's own, which [`Lab::speaker`] mounts.
    pub fn bpf_directory(&self) -> PathBuf {
        self.directory.join(ledger::PINS)
    }

    /// A bpf file system of the lab's own, mounted when first asked for: that of the machine may be missing.
    pub fn mount_pins(&self) -> Result<PathBuf> {
        let path = self.bpf_directory();
        if !path.exists() {
            fs::create_dir(&path).context(|| format!("creating {}", path.display()))?;
            mount(
                Some("bpf"),
                &path,
                Some("bpf"),
                MsFlags::empty(),
                None::<&str>,
            )
            .context(|| format!("mounting a bpf file system on {}", path.display()))?;
        }
        Ok(path)
    }

    /// Ends a pod's servers.
    pub fn stop_pod(&self, pod: &str) {
        self.servers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(pod);
    }

    /// Starts a pod's servers.
    pub fn serve_pod(&self, pod: &Pod) -> Result<()> {
        let server = PodServer::start(&pod.netns, &pod.name)?;
        self.servers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pod.name.clone(), server);
        Ok(())
    }
}

pub(crate) fn key(host: &str, name: &str) -> Key {
    (host.to_owned(), name.to_owned())
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.servers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.processes.kill_all();
        if ledger::remove_directory(&self.directory).is_ok() {
            ledger::strike_directory(&self.directory);
        }
        // The namespaces remove themselves.
    }
}
