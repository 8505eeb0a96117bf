//! A LAN in network namespaces: the lab, and the netns library of every test that sends packets.
//!
//! ```text
//!                         remote  10.77.0.100  fd00:77::100
//!                           |eth0
//!                           |eth1
//!                         router  host 1 of the LANs and of the remote network
//!                           |eth0           |eth2
//!  client .100 --eth0--+    |               |           observer .101 asks who has an address
//!  observer .101 ------+----+--- br-lan     +--- br-lan2 (second_nic)     br-mgmt (management)
//!                       10.88.0.0/24             10.89.0.0/24             10.99.0.0/24
//!                       fd00:88::/64             fd00:89::/64             fd00:99::/64
//!                         |    |                      |                       |
//!                       eth0  eth0                  eth1                    mgmt0
//!                      node1  node2 … nodeN: host 11, 12, … on each network
//!                         |cni0 10.244.1.1/24 fd00:244:1::1/64
//!                    node1-pod0  10.244.1.10  fd00:244:1::10
//! ```
//!
//! Pods may have a link of their own to the node instead ([`PodLinks`]).
//!
//! The bridges live in a namespace of their own, `switch`, and snoop IGMP and MLD with a querier. A port in the
//! wrong VLAN is on the bridge `br-iso`. VIPs are from 10.88.0.200 and `fd00:88::200` on ([`address::vips`]).
//!
//! ```no_run
//! use landfall_lab::{Fault, Lab, Topology};
//!
//! # fn main() -> landfall_lab::Result<()> {
//! let lab = Lab::build(Topology { nodes: 3, ..Topology::default() })?;
//! lab.serve_pods()?; // UDP 5000 and TCP 8080 in every pod answer with its name
//! landfall_lab::ping(lab.client(), "10.88.0.11".parse().expect("an address"), std::time::Duration::from_secs(5))?;
//! lab.inject("node1", Fault::PowerOff)?;
//! lab.heal()?;
//! # Ok(())
//! # } // everything is gone here, after a panic too
//! ```
//!
//! - [`Netns`]: a namespace; run closures, futures, threads and commands in it.
//! - [`Lab`]: hosts by name, processes on hosts ([`Lab::start`]), faults ([`Lab::inject`], [`Lab::partition`], …).
//! - [`manifests`]: the objects for `--manifests`; [`speakers`]: the real speakers on them.
//! - [`measure`]: what clients see; [`failover`]: one fail-over, measured.
//! - [`ledger`]: what was made, so that it can be removed whatever happens.
#![deny(unsafe_code)]

pub mod address;
pub mod behind;
pub mod bulk;
pub mod crowd;
pub mod error;
pub mod failover;
pub mod fault;
mod frame;
mod lab;
pub mod ledger;
pub mod manifests;
pub mod measure;
pub mod netns;
pub mod packets;
mod ping;
pub mod process;
pub mod raw;
pub mod report;
pub mod server;
pub mod speakers;
mod sys;
pub mod tool;
mod topology;
mod wiring;

pub use address::Network;
pub use error::{LabError, Result};
pub use fault::Fault;
pub use frame::Mac;
pub use lab::{Lab, Node, Pod};
pub use netns::{LabId, Netns};
pub use ping::ping;
pub use process::Program;
pub use topology::{Nic, PodLinks, Topology};
