//! The seam to the eBPF programs on the uplinks, and what loads, attaches and watches them.
//!
//! ```text
//!  loop ──change──> [changes] ──> worker (a thread: system calls that may block)
//!                                   ├─ pins     where maps and links outlive the process
//!                                   ├─ uplink   the program and its attachments, checked every second
//!                                   ├─ driver   the same for XDP, where the user wants it
//!  metrics, loop <──counts───────── └─ tables   what the programs decide by, and what they count
//! ```
//!
//! Everything stays in the kernel when the process ends, and is adopted by the next one;
//! [`uninstall`] is what removes it.

mod attached;
mod driver;
pub mod egress;
mod flows;
mod layout;
mod metrics;
mod pins;
mod qdisc;
mod tables;
#[cfg(test)]
mod tests;
mod thread;
mod uplink;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use landfall_core::model::{NodeName, Protocol};
use landfall_core::steering::Distribution;
use landfall_ebpf_common::egress::gateway::PolicyCount;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};

use crate::egress::PolicyName;
use crate::replication::{Bindings, Happened};

pub use egress::Leaving;
use egress::{GatewayConfig, Standing};
pub use pins::{Removed, uninstall};
pub use worker::Worker;

use crate::egress::InForce;

/// How to run the data path.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where maps and links are pinned: a directory, made if need be, on a bpf file system.
    pub pin_dir: PathBuf,
    /// By which hook to attach.
    pub hook: Hook,
    /// Who delivers to endpoints.
    pub delivery: Delivery,
    /// The names of interfaces whose drivers are to run a program too (XDP), where frames come in that go to other
    /// nodes.
    pub xdp: BTreeSet<String>,
    /// How often the attachments are checked.
    pub watch: Duration,
    /// How often the flows are compared with connection tracking.
    pub compare: Duration,
    /// How to be a gateway of egress policies.
    pub gateway: GatewayConfig,
    /// The directory where Cilium pins its maps: the programs judge beside it what no packet filter sees. Nothing, if one
    /// does.
    pub cilium: Option<PathBuf>,
}

/// How often the flows are compared with connection tracking, where nothing else is asked for.
pub const COMPARE: Duration = Duration::from_secs(60);

/// Who gives what is for this node to its endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Delivery {
    /// kube-proxy, or what stands in its place.
    #[default]
    KubeProxy,
    /// The programs themselves.
    Native,
}

impl Config {
    /// Pins under `pin_dir`; attaches by the best hook the kernel has and checks it every second; compares
    /// the flows every minute ([`COMPARE`]).
    pub fn new(pin_dir: impl Into<PathBuf>) -> Self {
        let pin_dir = pin_dir.into();
        Self {
            gateway: GatewayConfig::new(&pin_dir),
            pin_dir,
            hook: Hook::Auto,
            delivery: Delivery::KubeProxy,
            xdp: BTreeSet::new(),
            watch: Duration::from_secs(1),
            compare: COMPARE,
            cilium: None,
        }
    }
}

/// The kernel's hook to attach by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hook {
    /// TCX where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// A clsact filter, also where the kernel has TCX.
    Clsact,
}

/// Starts the data path, on a thread in the caller's network namespace. Never fails: what is missing (the
/// permission, the kernel's support, the bpf file system) is each uplink's [`Attachment::Absent`], and tried
/// again. [`Change::Complete`] decides what of an earlier process's state is kept: send it when the sources have
/// told all they know.
pub fn start(config: Config, registry: &mut Registry) -> impl DataPath + use<> {
    Worker::start(config, registry)
}

/// The interfaces (by index) where packets to VIPs come in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// Those to segments.
    pub uplinks: BTreeSet<u32>,
    /// The tunnel to nodes that are on none of them.
    pub tunnel: Option<u32>,
}

impl From<BTreeSet<u32>> for Interfaces {
    fn from(uplinks: BTreeSet<u32>) -> Self {
        Self {
            uplinks,
            tunnel: None,
        }
    }
}

/// One thing that the programs should know. Nothing in place of a state: it is to be forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A VIP.
    Vip(IpAddr, Option<VipState>),
    /// A node, as it is seen at one of this node's interfaces.
    Node(NodeId, Option<NodeState>),
    /// A port of a VIP.
    Port(PortId, Option<PortState>),
    /// Who holds flows of the buckets of a page of a port's, though they are another's: all of the page's buckets of
    /// which somebody does.
    Holders(PortId, u16, BucketHolders),
    /// The bits of the packet mark by which the packet filter knows what was given to an endpoint; 0 for none.
    Mark(u32),
    /// Pods that leave by addresses of their own, all of them; nothing while there is no policy.
    Egress(Option<Arc<Leaving>>),
    /// All has been said at least once: what an earlier process has left besides is to be forgotten.
    Complete,
}

/// A node at one of this node's interfaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId {
    /// Its name.
    pub name: NodeName,
    /// The index of this node's interface.
    pub interface: u32,
}

/// The nodes that hold flows of a bucket, by bucket.
pub type BucketHolders = BTreeMap<u32, BTreeSet<NodeName>>;

/// Of which buckets a node holds flows though they are another's, by TCP port.
pub type Held = BTreeMap<PortId, BTreeSet<u32>>;

/// What to do with packets to a VIP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipState {
    /// They are steered; else they are counted and passed up.
    pub steer: bool,
    /// The UDP port by which to judge a fragment that comes before its first, where all are spread alike.
    pub udp_port: Option<u16>,
}

/// A port of a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortId {
    /// The VIP.
    pub vip: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// How a port's flows are spread.
#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortState {
    /// The nodes that serve it.
    pub nodes: Distribution,
    /// This node is one that serves it.
    pub here: bool,
    /// By which interfaces frames go to other nodes.
    pub reach: Reach,
    /// All flows of a client go to one node.
    pub affinity: bool,
    /// UDP flows are told apart by their ports too.
    pub udp_ports: bool,
    /// The endpoints are processes of nodes, which the packet filter delivers to.
    pub host: bool,
    /// What this node translates to; nothing, if it leaves that to kube-proxy.
    pub native: Option<Native>,
}

/// By which interfaces, by index, nodes are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reach {
    /// The one at which the VIP is announced.
    pub uplink: u32,
    /// The tunnel, 0 for none.
    pub tunnel: u32,
    /// The nodes that are not on the VIP's segment: they are reached by the tunnel.
    pub far: Arc<BTreeSet<NodeName>>,
}

impl Reach {
    /// All are reached by one interface.
    pub fn by(uplink: u32) -> Self {
        Self {
            uplink,
            ..Self::default()
        }
    }

    /// The interface by which a node is reached.
    pub fn of(&self, node: &NodeName) -> u32 {
        if self.tunnel != 0 && self.far.contains(node) {
            self.tunnel
        } else {
            self.uplink
        }
    }
}

/// This node's endpoints of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Native {
    /// Where new flows go, evenly.
    pub endpoints: BTreeSet<SocketAddr>,
    /// The networks whose clients are served; nothing, if all are.
    pub ranges: Option<BTreeSet<IpNet>>,
}

/// A node.
#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeState {
    /// It is this node.
    pub here: bool,
    /// Its data path answers.
    pub alive: bool,
    /// It may be gone: new flows avoid it.
    pub suspected: bool,
    /// It keeps flows, and takes what is handed on.
    pub steers: bool,
    /// Its Ethernet address at the interface, where frames reach it and come from. Nothing if it is not heard there.
    pub mac: Option<[u8; 6]>,
    /// Where it is reached by the tunnel, if the interface is that.
    pub address: Option<IpAddr>,
    /// Its own addresses, and networks that are routed through it: what it sends from there is a client's.
    pub routed: BTreeSet<IpNet>,
}

/// Packets seen at this node's uplinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipCount {
    /// Packets to the VIP.
    pub packets: u64,
    /// Bytes of them, link-layer header included.
    pub bytes: u64,
}

/// Whether the data path is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// Attached by TCX, in front of every other program.
    Tcx,
    /// Attached by a clsact filter.
    Clsact,
    /// Attached to the driver, in front of either.
    Xdp,
    /// Not attached.
    Absent {
        /// Why, and what to do.
        reason: String,
    },
}

/// Loads, attaches and feeds the programs. They outlive the process: links and maps are pinned.
pub trait DataPath: Send + Sync {
    /// Where to be attached. Returns at once.
    fn attach(&self, interfaces: Interfaces);
    /// What is to be known besides or instead. Returns at once, with a number that [`DataPath::written`] reaches when the
    /// kernel goes by it.
    fn change(&self, changes: Vec<Change>) -> u64;
    /// Up to which call of [`DataPath::change`] the kernel goes by what was said, or never will, as there is no program.
    fn written(&self) -> watch::Receiver<u64>;
    /// What was counted for each VIP, all uplinks together.
    fn counts(&self) -> BTreeMap<IpAddr, VipCount>;
    /// Of which buckets this node holds flows though they are another's.
    fn held(&self) -> Arc<Held>;
    /// How the program at the uplinks is attached, by interface index.
    fn attachments(&self) -> BTreeMap<u32, Attachment>;
    /// Packets of this node's pods that the guard has dropped since their policy has no gateway, or no address for them, by
    /// policy.
    fn egress_dropped(&self) -> BTreeMap<PolicyName, u64>;
    /// The interfaces (by index) where the guard should be and cannot, and why.
    fn unguarded(&self) -> BTreeMap<u32, String>;
    /// Whether this node translates what it is the gateway of.
    fn gateway(&self) -> egress::State;
    /// What this node is to egress addresses, of all that it is gateway or standby of. To be said before those who copy
    /// bindings are told the same. Returns at once.
    fn stand(&self, standings: BTreeMap<IpAddr, Standing>);
    /// The gateway's bindings, and what happens to them from now on, for those who copy them. Who asked before is told
    /// nothing any more.
    fn replicate(&self) -> (Arc<dyn Bindings>, mpsc::Receiver<Happened>);
    /// How many packets met each fate at it, by its word.
    fn gateway_counts(&self) -> BTreeMap<&'static str, u64>;
    /// What of [`Change::Egress`] the kernel goes by, but for the gateway.
    fn in_force(&self) -> watch::Receiver<InForce>;
    /// What of it the gateway's programs go by. As long as that is not known, they go by what an earlier process has left.
    fn gateway_in_force(&self) -> watch::Receiver<InForce>;
    /// Whether an earlier process has left this node as the gateway of a policy.
    fn was_gateway_of(&self, policy: &PolicyName) -> bool;
    /// What the pods of each policy use of this node as their gateway.
    fn usage(&self) -> BTreeMap<PolicyName, egress::Usage>;
    /// What was counted at this node of each pod whose gateway it is or would be, by the pod's address.
    ///
    /// # Errors
    /// The map cannot be read.
    fn pod_counts(&self) -> io::Result<BTreeMap<IpAddr, PolicyCount>>;
    /// The bindings that `wanted` says yes to, and how many there are more than `most` of them. It reads all there are.
    ///
    /// # Errors
    /// They cannot be read.
    fn bindings(
        &self,
        most: usize,
        wanted: &dyn Fn(&egress::Bound) -> bool,
    ) -> io::Result<(Vec<egress::Bound>, usize)>;
    /// Takes the gateway out of the kernel, with the bindings of living flows, and leaves it so, or ends that. Returns at
    /// once.
    fn disarm(&self, disarmed: bool);
}
