//! This node's packet filter and routing rules: the seam, and the nftables table `landfall` behind it.
//!
//! The table guards (what still carries a VIP as destination is not forwarded), delivers Services whose endpoints
//! are processes of nodes, and marks answers that must leave by a VIP's uplink. It stays when the speaker stops.

mod boot;
mod egress;
mod kube_proxy;
mod metrics;
mod netfilter;
mod pods;
mod routes;
mod ruleset;
mod stale;
mod tool;
mod tunnel;
mod worker;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use landfall_core::model::{NodeName, Protocol};
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use kube_proxy::KubeProxy;
pub use tool::ToolError;
pub(crate) use tool::run;

use crate::announcer::MacAddr;
use crate::egress::{Egress, InForce, Pod, PolicyName, marks};

/// What this node's nftables table `landfall` and routing rules should say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// All VIPs of the cluster: what still carries one as destination in the forward hook is dropped.
    pub vips: BTreeSet<IpAddr>,
    /// The VIPs that answer for ports which nobody serves, and the ports that somebody serves.
    pub refusing: BTreeMap<IpAddr, BTreeSet<(Protocol, u16)>>,
    /// Those of them that pods leave by: only what asks for a connection is answered. All else may belong to a flow that is
    /// not known here yet.
    pub silent: BTreeSet<IpAddr>,
    /// The uplink (by name) of each VIP on this node: answers leave by it even when the route to the client does not.
    pub uplinks: BTreeMap<IpAddr, Arc<str>>,
    /// Services whose endpoints are processes of nodes, delivered by Landfall itself.
    pub host_services: BTreeMap<VipPort, HostTargets>,
    /// Services whose endpoints are pods, for this node's own processes and pods, where no kube-proxy delivers. What
    /// comes in by an uplink is the eBPF programs'.
    pub pod_services: BTreeMap<VipPort, Arc<PodTargets>>,
    /// The tunnel to nodes that are not on a VIP's segment, where it is needed.
    pub tunnel: Option<Arc<Tunnel>>,
    /// Pods that leave by addresses of their own; nothing while there is no policy.
    pub egress: Option<Arc<Leaving>>,
    /// The same in its place where a program judges them, since their packets pass by the packet filter.
    pub passed_by: Option<Arc<Leaving>>,
}

/// Pods that leave by addresses of their own, and where this node ends for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// This node.
    pub node: NodeName,
    /// Whose pods they are.
    pub egress: Arc<Egress>,
    /// The interfaces (by name) to the outside: those at which VIPs are announced, those of default routes, and the
    /// tunnel where there is one.
    pub uplinks: BTreeSet<Arc<str>>,
}

impl Leaving {
    /// The same pods, and nobody's tenants.
    fn without_policies(&self) -> Self {
        let pod = |pod: &Pod| Pod {
            node: pod.node.clone(),
            tenant: None,
            identity: pod.identity,
            former: None,
        };
        Self {
            egress: Arc::new(Egress {
                policies: BTreeMap::new(),
                pods: self
                    .egress
                    .pods
                    .iter()
                    .map(|(address, it)| (*address, pod(it)))
                    .collect(),
                earlier: BTreeMap::new(),
                inside: self.egress.inside.clone(),
            }),
            ..self.clone()
        }
    }
}

/// The name of the tunnel's interface.
pub const TUNNEL: &str = "landfall0";

/// The tunnel (VXLAN, RFC 7348).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The Ethernet address of this node's end.
    pub mac: MacAddr,
    /// The addresses of the other nodes: nobody else's packets are let in.
    pub peers: BTreeSet<IpAddr>,
}

/// A port of a VIP.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VipPort {
    /// The VIP.
    pub vip: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The port on the VIP.
    pub port: u16,
}

/// Where a port is delivered whose endpoints are processes of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostTargets {
    /// This node's own endpoint, preferred while there is one.
    pub local: Option<SocketAddr>,
    /// Endpoints of other nodes, used when there is no local one (masqueraded for forwarded clients).
    pub remote: Vec<SocketAddr>,
}

/// Where a port is delivered whose endpoints are pods: to any of the cluster's, as kube-proxy does for clients in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodTargets {
    /// The endpoints.
    pub endpoints: BTreeSet<SocketAddr>,
    /// All of a client's connections go to one.
    pub affinity: bool,
    /// The networks whose clients are served besides this node; nothing, if all are.
    pub ranges: Option<BTreeSet<IpNet>>,
}

/// Makes [`Rules`] so.
pub trait NodeRules: Send + Sync {
    /// Replaces what this node's rules should say. Returns at once; failures are retried and shown in metrics.
    fn apply(&self, rules: Rules);
    /// Whether kube-proxy on this node has rules for this Service port already (the element of its nftables map);
    /// `None` when no kube-proxy table in nftables mode can be read here.
    fn kube_proxy_serves(&self, vip: IpAddr, protocol: Protocol, port: u16) -> Option<bool>;
    /// The bits of the packet mark by which the rules know what the eBPF programs have given to an endpoint; 0 if they
    /// need not know. `None` while that is not known.
    fn arrival_mark(&self) -> Option<u32>;
    /// What of [`Rules::egress`] the kernel goes by.
    fn in_force(&self) -> watch::Receiver<InForce>;
    /// Packets of this node's pods that were dropped since their policy has no gateway, or no address for them, by policy,
    /// as they were counted some seconds ago; from nothing with each table.
    fn egress_dropped(&self) -> BTreeMap<PolicyName, u64>;
}

/// How the rules are made.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whether to install policy routes.
    pub policy_routes: bool,
    /// The routers of uplinks that carry no default route, by interface name.
    pub gateways: Vec<(String, IpAddr)>,
    /// The bits of the packet mark that are ours, one run of them; where the eBPF programs translate, those of the
    /// connection mark too.
    pub mark_mask: u32,
    /// Two more bits of it, for what pods send outside: the low one says that a packet was judged, the high one that it
    /// leaves by its policy's gateway. Of the connection mark they are ours too.
    pub egress_mark: u32,
    /// The eBPF programs translate what comes in: connection tracking does not know which connections are a VIP's.
    pub translated: bool,
    /// The number of the first routing table that is ours.
    pub table: u32,
    /// The priority of the first routing rule that is ours.
    pub priority: u32,
    /// The UDP port of the tunnel, the same on every node.
    pub tunnel_port: u16,
    /// Where to leave what drops pods' connections after the node's start, for the CNI plugin.
    pub boot: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            policy_routes: true,
            gateways: Vec::new(),
            // Free of kube-proxy (0xc000), Cilium (0x0f00) and Calico (0xffff0000).
            mark_mask: 0x3000,
            egress_mark: crate::egress::MARK,
            translated: false,
            table: 7950,
            priority: 7950,
            tunnel_port: 7952,
            boot: None,
        }
    }
}

/// How many packets of pods were dropped in the calling thread's network namespace since they had got another address in spite
/// of their policies.
///
/// # Errors
/// There is no table, or it does not judge pods; `EPERM` without `CAP_NET_ADMIN`.
pub(crate) fn masqueraded() -> io::Result<u64> {
    let name = egress::counter("translated");
    netfilter::Query::open()?.counter(netfilter::TableFamily::Inet, ruleset::TABLE, &name)
}

impl Config {
    /// The mark of the uplink with this index; `None` when the mask has no room for it.
    fn mark(&self, index: u32) -> Option<u32> {
        let mark = index
            .checked_add(1)?
            .checked_mul(1 << self.mark_mask.trailing_zeros())?;
        (mark & !self.mark_mask == 0).then_some(mark)
    }

    /// The mark of what was translated as it came in.
    fn arrival(&self) -> u32 {
        if self.translated {
            1 << self.mark_mask.trailing_zeros()
        } else {
            0
        }
    }

    /// The priorities of the routing rules that are ours.
    pub(crate) fn priorities(&self) -> RangeInclusive<u32> {
        // Of answers there are two, each with a table of its own.
        self.egress_priority()..=self.priority + 1
    }

    /// Whether a routing table is ours.
    fn owns(&self, table: u32) -> bool {
        let is_answers = table
            .checked_sub(self.table)
            .is_some_and(|index| self.mark(index).is_some());
        is_answers || self.ways().any(|value| self.egress_table(value) == table)
    }

    /// The marks of what is judged, and of what leaves by a gateway.
    fn egress_marks(&self) -> (u32, u32) {
        marks(self.egress_mark)
    }

    /// The values that the bits of the uplinks' mark may have beside the mark of what leaves by a gateway.
    fn ways(&self) -> impl Iterator<Item = u32> {
        const MOST: u32 = 16;
        let shift = self.mark_mask.trailing_zeros();
        let values = (self.mark_mask >> shift).saturating_add(1).min(MOST);
        (0..values).map(move |value| value << shift)
    }

    /// The routing table of what leaves with such a value: in front of those of answers.
    fn egress_table(&self, value: u32) -> u32 {
        self.table - 16 + (value >> self.mark_mask.trailing_zeros())
    }

    /// The priority of the routing rules to those: in front of the answers', which look at fewer bits.
    fn egress_priority(&self) -> u32 {
        self.priority - 1
    }
}

/// The rules of nftables in the calling thread's network namespace: those of the families `inet`, `ip` and `ip6`.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`; `EINTR` if they never stand still.
pub(crate) fn rules() -> std::io::Result<Vec<netfilter::Rule>> {
    netfilter::Query::open()?.rules()
}

/// What the task knows of kube-proxy, for the handle.
type Shared = Arc<Mutex<KubeProxy>>;

/// The node's rules. Dropping it ends the task; the rules stay.
#[derive(Debug)]
pub struct Handle {
    wanted: watch::Sender<Option<Rules>>,
    kube_proxy: Shared,
    arrival_mark: watch::Receiver<Option<u32>>,
    in_force: watch::Receiver<InForce>,
    dropped: watch::Receiver<BTreeMap<PolicyName, u64>>,
    _task: AbortOnDropHandle<()>,
}

/// Starts the task that keeps this node's rules. Nothing is written before the first [`NodeRules::apply`].
pub fn start(config: Config, registry: &mut Registry) -> Handle {
    let metrics = metrics::Metrics::default();
    metrics.register(registry);
    let (sender, receiver) = watch::channel(None);
    let (marks, arrival_mark) = watch::channel(None);
    let (force, in_force) = watch::channel(InForce::Unknown);
    let (counted, dropped) = watch::channel(BTreeMap::new());
    let kube_proxy = Shared::default();
    let worker = worker::Worker {
        boot: boot::Boot::at(config.boot.clone()),
        config,
        wanted: receiver,
        metrics,
        kube_proxy: kube_proxy.clone(),
        arrival_mark: marks,
        in_force: force,
        dropped: counted,
        written: None,
        routes: None,
        routed: BTreeSet::new(),
        complaints: routes::Complaints::new(),
        leaving: egress::keeper::Routes::default(),
        ports: egress::ports::Ports::default(),
        before: None,
        own: VecDeque::new(),
    };
    Handle {
        wanted: sender,
        kube_proxy,
        arrival_mark,
        in_force,
        dropped,
        _task: AbortOnDropHandle::new(tokio::spawn(worker.run())),
    }
}

impl NodeRules for Handle {
    fn apply(&self, rules: Rules) {
        self.wanted.send_replace(Some(rules));
    }

    fn kube_proxy_serves(&self, vip: IpAddr, protocol: Protocol, port: u16) -> Option<bool> {
        self.kube_proxy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .serves(vip, protocol, port)
    }

    fn arrival_mark(&self) -> Option<u32> {
        *self.arrival_mark.borrow()
    }

    fn in_force(&self) -> watch::Receiver<InForce> {
        self.in_force.clone()
    }

    fn egress_dropped(&self) -> BTreeMap<PolicyName, u64> {
        self.dropped.borrow().clone()
    }
}

/// Takes away what the CNI plugin would load after the node's next start. It is no error if it is not there.
///
/// # Errors
/// It cannot be removed.
pub fn remove_boot(path: &Path) -> std::io::Result<()> {
    boot::remove(path)
}

/// Takes the table and the policy routes away: for uninstalling.
pub async fn remove(config: &Config) -> Result<(), ToolError> {
    let text = format!(
        "add table inet {0}\ndelete table inet {0}\n",
        ruleset::TABLE
    );
    tool::run("nft", &["-f", "-"], &text).await?;
    // A kernel that knows none of its family has none.
    let _ = tool::run("nft", &["-f", "-"], &egress::ports::gone()).await;
    egress::routes::prune(&[], config).await?;
    routes::remove(config).await?;
    tunnel::remove().await
}
