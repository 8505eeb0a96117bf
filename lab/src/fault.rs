//! What can happen to a lab, and how it is mended.

use std::fmt;
use std::str::FromStr;
use std::sync::PoisonError;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::error::{LabError, Result};
use crate::lab::Lab;
use crate::process::Key;
use crate::topology::Nic;
use crate::wiring;

/// The name under which a node's speaker runs.
pub const SPEAKER: &str = "speaker";

/// Something that happens to one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The power is cut: all its links are dead at the switch, then all its processes.
    PowerOff,
    /// Its `eth0` is set down on the node.
    UplinkDown,
    /// The cable of its `eth0` is pulled: the link loses its carrier, the addresses stay.
    CarrierLost,
    /// The switch's port of its `eth0` is moved to another VLAN: the carrier stays, nobody is heard.
    OtherVlan,
    /// Its link to the management network loses its carrier.
    ManagementDown,
    /// Its processes are stopped (SIGSTOP): alive for the kernel, silent for all others.
    Freeze,
    /// Its speaker is killed (SIGKILL).
    Kill,
    /// Its speaker is asked to end (SIGTERM): it hands over first.
    Drain,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::PowerOff,
        Self::UplinkDown,
        Self::CarrierLost,
        Self::OtherVlan,
        Self::ManagementDown,
        Self::Freeze,
        Self::Kill,
        Self::Drain,
    ];

    /// Whether it ends what runs in the node's pods.
    pub fn kills_pods(self) -> bool {
        self == Self::PowerOff
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::UplinkDown => "uplink-down",
            Self::CarrierLost => "carrier-lost",
            Self::OtherVlan => "other-vlan",
            Self::ManagementDown => "management-down",
            Self::Freeze => "freeze",
            Self::Kill => "kill",
            Self::Drain => "drain",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|fault| fault.name() == text)
            .ok_or_else(|| format!("one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

impl Serialize for Fault {
    fn serialize<S: serde::Serializer>(
        &self,
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Fault {
    fn deserialize<D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The table of the switch's faults: partitions and losses.
const TABLE: &str = "landfall_lab_faults";

impl Lab {
    /// Lets something happen to a node.
    pub fn inject(&self, node: &str, fault: Fault) -> Result<()> {
        let host = self.node(node)?;
        match fault {
            Fault::PowerOff => {
                let mut down = String::new();
                for nic in self.topology.nics() {
                    down.extend(["link set ", &wiring::port(node, nic), " down\n"]);
                }
                self.switch.ip_batch(&down)?;
                self.powered_off
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(node.to_owned());
                self.signal_all(node, Signal::SIGKILL, true);
                let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
                servers.retain(|pod, _| !host.pods.iter().any(|gone| gone.name == *pod));
                Ok(())
            }
            Fault::UplinkDown => host.netns.ip("link set eth0 down").map(drop),
            Fault::CarrierLost => self.port_down(node, Nic::Eth0),
            Fault::OtherVlan => self
                .switch
                .ip(&format!(
                    "link set {} master {}",
                    wiring::port(node, Nic::Eth0),
                    wiring::ISOLATED
                ))
                .map(drop),
            Fault::ManagementDown => {
                self.needs_management()?;
                self.port_down(node, Nic::Mgmt0)
            }
            Fault::Freeze => {
                self.signal_all(node, Signal::SIGSTOP, false);
                Ok(())
            }
            Fault::Kill => self.end_speaker(node, Signal::SIGKILL),
            Fault::Drain => self.end_speaker(node, Signal::SIGTERM),
        }
    }

    /// The management network fails for everybody.
    pub fn management_network_down(&self) -> Result<()> {
        self.needs_management()?;
        self.switch
            .ip(&format!("link set {} down", wiring::MANAGEMENT))
            .map(drop)
    }

    /// Nothing passes between two groups of nodes, on any network. Clients, router and management hosts go with
    /// the first group when `clients` says so, else both groups reach them.
    pub fn partition(&self, first: &[&str], second: &[&str], clients: bool) -> Result<()> {
        let mut one = self.ports_of(first)?;
        let two = self.ports_of(second)?;
        if clients {
            one.extend(["client", "observer", "router", "router-lan2"].map(str::to_owned));
            let hosts = self
                .management_hosts
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            one.extend(hosts.keys().cloned());
        }
        let (one, two) = (quoted(&one), quoted(&two));
        self.switch_rules(&format!(
            "iifname {{ {one} }} oifname {{ {two} }} drop\niifname {{ {two} }} oifname {{ {one} }} drop\n"
        ))
    }

    /// Of the frames from `from` to `to` (nodes, `client`, `router`, `observer`) `percent` of a hundred are
    /// lost, on every network, in this direction only.
    pub fn lose(&self, from: &str, to: &str, percent: u8) -> Result<()> {
        let (from, to) = (
            quoted(&self.ports_of(&[from])?),
            quoted(&self.ports_of(&[to])?),
        );
        let some = if percent < 100 {
            format!("numgen random mod 100 < {percent}")
        } else {
            String::new()
        };
        self.switch_rules(&format!(
            "iifname {{ {from} }} oifname {{ {to} }} {some} drop\n"
        ))
    }

    /// Mends everything: links, VLANs, partitions, losses; what was stopped goes on, and what a fault ended is
    /// started again.
    pub fn heal(&self) -> Result<()> {
        self.heal_network()?;
        for node in &self.nodes {
            self.heal_node(&node.name)?;
        }
        Ok(())
    }

    /// Mends what the switch does: partitions, losses, the management network.
    pub fn heal_network(&self) -> Result<()> {
        self.switch.nft(&format!(
            "table bridge {TABLE}\ndelete table bridge {TABLE}\n"
        ))?;
        self.switch
            .ip(&format!("link set {} up", wiring::MANAGEMENT))
            .map(drop)
    }

    /// Mends one node: its links, and its processes and pods.
    pub fn heal_node(&self, node: &str) -> Result<()> {
        let host = self.node(node)?;
        wiring::rewire(self, host)?;
        self.signal_all(node, Signal::SIGCONT, false);
        let was_off = self
            .powered_off
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(node);
        if was_off {
            for pod in &host.pods {
                self.serve_pod(pod)?;
            }
        }
        for key in self.processes.on(node) {
            let faulted = self
                .processes
                .record(&key)
                .is_some_and(|record| record.faulted);
            if faulted {
                self.restart(&key.0, &key.1)?;
            }
        }
        Ok(())
    }

    fn needs_management(&self) -> Result<()> {
        if self.topology.management {
            Ok(())
        } else {
            Err(LabError::Invalid(
                "this lab has no management network".to_owned(),
            ))
        }
    }

    fn port_down(&self, node: &str, nic: Nic) -> Result<()> {
        self.switch
            .ip(&format!("link set {} down", wiring::port(node, nic)))
            .map(drop)
    }

    fn end_speaker(&self, node: &str, signal: Signal) -> Result<()> {
        let key: Key = (node.to_owned(), SPEAKER.to_owned());
        if self.processes.signal(&key, signal, true) {
            Ok(())
        } else {
            Err(LabError::Unknown {
                kind: "running process",
                name: format!("{SPEAKER} on {node}"),
                known: self.processes.names(),
            })
        }
    }

    fn signal_all(&self, node: &str, signal: Signal, by_fault: bool) {
        for key in self.processes.on(node) {
            self.processes.signal(&key, signal, by_fault);
        }
    }

    /// The switch's ports of hosts.
    fn ports_of(&self, hosts: &[&str]) -> Result<Vec<String>> {
        let mut ports = Vec::new();
        for host in hosts {
            match *host {
                "client" | "observer" => ports.push((*host).to_owned()),
                "router" => ports.extend(["router".to_owned(), "router-lan2".to_owned()]),
                node => {
                    let node = self.node(node)?;
                    ports.extend(
                        self.topology
                            .nics()
                            .map(|nic| wiring::port(&node.name, nic)),
                    );
                }
            }
        }
        Ok(ports)
    }

    fn switch_rules(&self, rules: &str) -> Result<()> {
        self.switch.nft(&format!(
            "table bridge {TABLE} {{\nchain forward {{\ntype filter hook forward priority 0;\n{rules}}}\n}}\n"
        ))
    }
}

/// Port names for an nftables set.
fn quoted(ports: &[String]) -> String {
    let ports: Vec<String> = ports.iter().map(|port| format!("\"{port}\"")).collect();
    ports.join(", ")
}
