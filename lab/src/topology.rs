//! What a lab consists of.

use serde::{Deserialize, Serialize};

use crate::error::{LabError, Result};

/// A NIC of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Nic {
    /// On the LAN.
    Eth0,
    /// On the second LAN.
    Eth1,
    /// On the management network.
    Mgmt0,
}

impl Nic {
    /// The name of the interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eth0 => "eth0",
            Self::Eth1 => "eth1",
            Self::Mgmt0 => "mgmt0",
        }
    }
}

/// How a node reaches its pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodLinks {
    /// All are on one bridge, `cni0`, which is their gateway.
    #[default]
    Bridge,
    /// Each has a link of its own and a route to its one address, and 169.254.1.1 and `fe80::1` for gateways.
    PointToPoint,
}

/// What a lab consists of. [`Topology::default`] is three nodes with one pod each on one LAN, and a management
/// network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// How many nodes, `node1` and up; at most 80.
    pub nodes: u8,
    /// How many pods on each node, `node1-pod0` and up; at most 80.
    pub pods_per_node: u8,
    /// How a node reaches its pods.
    pub pod_links: PodLinks,
    /// Each node has `mgmt0` on a management network; gossip and pod traffic between nodes go there, and
    /// a Node's `InternalIP` is its address.
    pub management: bool,
    /// Each node has `eth1` on a second LAN, which the router is on as well.
    pub second_nic: bool,
    /// By which NIC a node's default route goes. `Eth1` needs `second_nic`.
    pub default_route: Nic,
    /// The MTU of all links.
    pub mtu: u32,
    /// Links aggregate as real NICs do: no TSO at the switch's ports, GRO with a flush timeout at the nodes'.
    /// Needs `ethtool`. Off: as veth comes.
    pub offloads: bool,
}

impl Default for Topology {
    fn default() -> Self {
        Self {
            nodes: 3,
            pods_per_node: 1,
            pod_links: PodLinks::Bridge,
            management: true,
            second_nic: false,
            default_route: Nic::Eth0,
            mtu: 1500,
            offloads: false,
        }
    }
}

impl Topology {
    /// The NIC whose address is the node's `InternalIP`.
    pub fn internal_nic(&self) -> Nic {
        if self.management {
            Nic::Mgmt0
        } else {
            Nic::Eth0
        }
    }

    /// The NICs of every node.
    pub fn nics(&self) -> impl Iterator<Item = Nic> {
        [
            (true, Nic::Eth0),
            (self.second_nic, Nic::Eth1),
            (self.management, Nic::Mgmt0),
        ]
        .into_iter()
        .filter_map(|(there, nic)| there.then_some(nic))
    }

    /// Refuses what cannot be built.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |text: &str| Err(LabError::Invalid(text.to_owned()));
        if !(1..=80).contains(&self.nodes) {
            return refuse("a lab has 1 to 80 nodes");
        }
        if self.pods_per_node > 80 {
            return refuse("a node has at most 80 pods");
        }
        if !self.nics().any(|nic| nic == self.default_route) || self.default_route == Nic::Mgmt0 {
            return refuse("the default route goes by eth0, or by eth1 when there is a second NIC");
        }
        if !(1280..=9000).contains(&self.mtu) {
            return refuse("the MTU is 1280 (the least for IPv6) to 9000");
        }
        Ok(())
    }
}
