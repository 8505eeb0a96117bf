//! What a node is to do for pods that leave by an address of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use landfall_core::model::{Bandwidth, NodeName};

/// The bits of the packet mark that are used for it unless others are configured: not kube-proxy's (0xc000) nor Cilium's
/// (0x0f00). Calico may use them (0xffff0000, from the low end on), if it needs that many.
pub const MARK: u32 = 0x3000_0000;

/// The bits of the packet mark, of a run of two: that a packet was judged, and that it leaves by its policy's gateway.
/// None, of none.
pub const fn marks(run: u32) -> (u32, u32) {
    if run == 0 {
        return (0, 0);
    }
    let judged = 1 << run.trailing_zeros();
    (judged, judged << 1)
}

/// A policy's name.
pub type PolicyName = Arc<str>;

/// All of it. Without a policy nothing is armed, and nothing of it is in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Egress {
    /// The policies.
    pub policies: BTreeMap<PolicyName, Policy>,
    /// The pods' addresses that are judged: this node's, and all of other nodes that are or were tenants: whoever becomes
    /// the gateway knows them already, and whose flows have another's address by now.
    pub pods: BTreeMap<IpAddr, Pod>,
    /// Of these, those that were another policy's when the process before this one ended, as they were then.
    pub earlier: BTreeMap<IpAddr, Pod>,
    /// Networks that are the cluster's own, besides all VIPs: pods', Services', nodes', link-local, multicast.
    pub inside: BTreeSet<IpNet>,
}

impl Egress {
    /// The policy whose tenant a pod is.
    pub fn policy_of(&self, pod: IpAddr) -> Option<&Policy> {
        let tenant = self.pods.get(&pod)?.tenant.as_ref()?;
        self.policies.get(&tenant.policy)
    }

    /// With the addresses that tenants leave by as those of their policies.
    #[must_use]
    pub fn with_addresses_of_tenants(mut self) -> Self {
        for tenant in self.pods.values().filter_map(|pod| pod.tenant.as_ref()) {
            if let Some(policy) = self.policies.get_mut(&tenant.policy) {
                policy.addresses.extend(tenant.egress_ip);
            }
        }
        self
    }
}

/// A pod's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Where it runs.
    pub node: NodeName,
    /// Whose tenant it is, and the address it leaves by; nobody's, if nothing: it leaves as it did.
    pub tenant: Option<Tenant>,
    /// Tells it from another that had the address before, whose flows are not its own.
    pub identity: u64,
    /// The policy whose tenant it was before: flows from then go on by that one's gateway.
    pub former: Option<PolicyName>,
}

impl Pod {
    /// The policy whose tenant it is.
    pub fn policy(&self) -> Option<&PolicyName> {
        Some(&self.tenant.as_ref()?.policy)
    }
}

/// A pod as a policy's tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// The policy.
    pub policy: PolicyName,
    /// The address it leaves by, of the pod's family; nothing: it does not leave (no address, or not admitted).
    pub egress_ip: Option<IpAddr>,
}

/// A policy, as far as packets go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Destinations that it is for; none named: all.
    pub destinations: BTreeSet<IpNet>,
    /// Destinations of those that it is not for.
    pub excluded: BTreeSet<IpNet>,
    /// The gateway, settled or not; nothing while there is none.
    pub gateway: Option<Gateway>,
    /// Most ports of one pod at once, to one remote address, port and protocol.
    pub ports_per_pod: Option<u32>,
    /// Most ports of all its pods together.
    pub ports: Option<u32>,
    /// How fast its pods may be together, in each direction.
    pub bandwidth: Option<Bandwidth>,
    /// It is for VIPs of this cluster too, but for its own.
    pub hairpin: bool,
    /// Flows of its pods to its destinations that were there before it are cut; else they keep their source to their end.
    pub cuts: bool,
    /// All addresses that flows of its pods leave by.
    pub addresses: BTreeSet<IpAddr>,
    /// Flows go on by some of them and none begins.
    pub drains: bool,
}

impl Policy {
    /// Where its packets are led: to a gateway that is one already.
    pub fn led_to(&self) -> Option<&Gateway> {
        self.gateway.as_ref().filter(|gateway| gateway.settled)
    }

    /// Of one that is gone, whose flows go on.
    pub fn gone(addresses: BTreeSet<IpAddr>, gateway: Option<Gateway>) -> Self {
        Self {
            gateway,
            addresses,
            ..Self::default()
        }
    }

    /// Whether it is for a destination outside.
    pub fn is_for(&self, address: IpAddr) -> bool {
        let is_in = |nets: &BTreeSet<IpNet>| nets.iter().any(|net| net.contains(&address));
        (self.destinations.is_empty() || is_in(&self.destinations)) && !is_in(&self.excluded)
    }
}

/// Where a policy's packets leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// The node.
    pub node: NodeName,
    /// This node's uplink to it (by name and index), on the segment of the policy's addresses; the tunnel where it is far.
    pub uplink: Arc<str>,
    /// Its index.
    pub interface: u32,
    /// The Ethernet address of the gateway there; nothing if it is this node.
    pub mac: Option<[u8; 6]>,
    /// The epoch of its claim.
    pub epoch: u64,
    /// It has said that what it takes to be the gateway is in its kernel. Nothing is led to it before.
    pub settled: bool,
}

/// What of it a part has put into the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum InForce {
    /// What an earlier process has left, or what somebody else has made of it.
    #[default]
    Unknown,
    /// Nothing: there is no policy.
    Nothing,
    /// This.
    Whole(Arc<Egress>),
}

impl From<Option<&Arc<Egress>>> for InForce {
    fn from(egress: Option<&Arc<Egress>>) -> Self {
        egress.map_or(Self::Nothing, |egress| Self::Whole(egress.clone()))
    }
}
