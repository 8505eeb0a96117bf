//! What the sources say, projected to the fields Landfall decides by.
//!
//! Both sources, the Kubernetes API and a directory of manifests, are turned into these types by
//! `landfall-runtime`; the indexes of this crate take nothing else. Everything here is plain data.

mod egress;
mod virtual_ip;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ip::{Family, IpRange};
use crate::selector::{LabelSelector, Labels};
pub use egress::{
    Bandwidth, EgressPolicy, EgressSource, EgressSpec, EgressStatus, Holder, OldFlows, Pod, bits,
};
pub use virtual_ip::{Terms, VirtualIp};

/// A node's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeName(pub Arc<str>);

impl From<&str> for NodeName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a namespaced object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectKey {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name within it.
    pub name: Arc<str>,
}

impl ObjectKey {
    /// The key of `namespace/name`.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A transport protocol of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty when the Service has one port.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port on the VIP.
    pub port: u16,
    /// The node port, when one is allocated.
    pub node_port: Option<u16>,
}

/// `spec.externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// Any endpoint of the cluster may serve.
    #[default]
    Cluster,
    /// Only endpoints of the node that the packet reaches serve.
    Local,
}

/// `spec.ipFamilyPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FamilyPolicy {
    /// One family.
    #[default]
    SingleStack,
    /// Two families where there are two.
    PreferDualStack,
    /// Two families or nothing.
    RequireDualStack,
}

/// What a Service asks for beyond "an address": annotations (Landfall's and `MetalLB`'s) and `spec.loadBalancerIP`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressRequest {
    /// Explicit addresses, at most one a family.
    pub addresses: Vec<IpAddr>,
    /// The pool to take from.
    pub pool: Option<String>,
    /// Services with the same key may share an address, if their ports are disjoint.
    pub sharing_key: Option<String>,
    /// What in the request could not be understood; nothing is allocated until it is mended.
    pub malformed: Option<String>,
}

/// An address in `status.loadBalancer.ingress`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ingress {
    /// The address; `None` for an entry that carries a host name only.
    pub address: Option<IpAddr>,
    /// `ipMode`.
    pub ip_mode: Option<String>,
}

/// A condition of an object's status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Its type, for example `landfall.dev/AddressAssigned`.
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// A CamelCase word.
    pub reason: String,
    /// What happened, to what, and what to do.
    pub message: String,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub key: ObjectKey,
    /// Its UID; empty from a manifest.
    pub uid: String,
    /// Its labels.
    pub labels: Labels,
    /// Seconds since the Unix epoch at which it was created; 0 from a manifest.
    pub created: i64,
    /// Whether it is of type `LoadBalancer` and not being deleted.
    pub load_balancer: bool,
    /// `spec.loadBalancerClass`.
    pub class: Option<String>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `spec.selector`, which must be equal for two ETP=Local Services to share an address.
    pub selector: BTreeMap<String, String>,
    /// `spec.externalTrafficPolicy`.
    pub traffic_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort`, 0 when there is none.
    pub health_check_node_port: u16,
    /// `spec.sessionAffinity` is `ClientIP`.
    pub affinity: bool,
    /// Its UDP flows are told apart by their ports too (annotation `landfall.dev/udp-hash: ports`).
    pub udp_ports: bool,
    /// `spec.loadBalancerSourceRanges`: the networks whose clients are served; nothing, if all are.
    pub source_ranges: Option<BTreeSet<IpNet>>,
    /// `spec.ipFamilies`.
    pub families: Vec<Family>,
    /// `spec.ipFamilyPolicy`.
    pub family_policy: FamilyPolicy,
    /// What it asks for.
    pub request: AddressRequest,
    /// `status.loadBalancer.ingress`.
    pub ingress: Vec<Ingress>,
    /// `status.conditions`.
    pub conditions: Vec<Condition>,
    /// The pools that its addresses came from, as the controller noted on it (annotation `landfall.dev/pool`).
    pub assigned_pool: Option<String>,
}

/// A port of an `EndpointSlice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    /// The Service port's name.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port at the endpoint.
    pub port: u16,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// The node it runs on.
    pub node: Option<NodeName>,
    /// `conditions.ready`; unset counts as true.
    pub ready: bool,
    /// `conditions.serving`; unset counts as `ready`.
    pub serving: bool,
    /// `conditions.terminating`; unset counts as false.
    pub terminating: bool,
}

impl Endpoint {
    /// Whether it may be sent new connections: ready, or else draining but still serving.
    pub fn servable(&self) -> bool {
        self.ready || (self.serving && self.terminating)
    }
}

/// An `EndpointSlice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its name.
    pub key: ObjectKey,
    /// The Service it belongs to (label `kubernetes.io/service-name`).
    pub service: ObjectKey,
    /// The family of its addresses.
    pub family: Family,
    /// Its ports.
    pub ports: Vec<EndpointPort>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// Its labels.
    pub labels: Labels,
    /// Its `InternalIP` addresses, where its speaker gossips.
    pub addresses: Vec<IpAddr>,
    /// Its pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Condition `NetworkUnavailable` is `True`.
    pub network_unavailable: bool,
}

/// A `ServiceCIDR`: networks that Services' cluster addresses are of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Its name.
    pub name: Arc<str>,
    /// The networks.
    pub cidrs: Vec<IpNet>,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: Arc<str>,
    /// Its labels.
    pub labels: Labels,
}

/// What a pool's addresses are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    /// Services.
    #[default]
    Ingress,
    /// Egress policies.
    Egress,
    /// Either.
    Both,
}

/// Who may take addresses of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceAllocation {
    /// Lower goes first, 0 (none given) after the others; pools without allocation rules go last.
    pub priority: u32,
    /// Namespaces by name.
    pub namespaces: Vec<String>,
    /// Namespaces by label.
    pub namespace_selectors: Vec<LabelSelector>,
    /// Services by label.
    pub service_selectors: Vec<LabelSelector>,
}

impl ServiceAllocation {
    /// Whether a namespace may have addresses: what is listed must match, and nothing listed admits all.
    pub fn admits_namespace(&self, name: &str, labels: &Labels) -> bool {
        let any = self.namespaces.is_empty() && self.namespace_selectors.is_empty();
        any || self.namespaces.iter().any(|listed| listed == name)
            || self
                .namespace_selectors
                .iter()
                .any(|selector| selector.matches(labels))
    }
}

/// An `IPAddressPool`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: Arc<str>,
    /// `metadata.generation`, 0 from a manifest.
    pub generation: i64,
    /// Its labels, for `L2Advertisement.spec.ipAddressPoolSelectors`.
    pub labels: Labels,
    /// Its addresses.
    pub ranges: Vec<IpRange>,
    /// What they are for.
    pub purpose: Purpose,
    /// Whether a Service that names neither address nor pool may be served from it.
    pub auto_assign: bool,
    /// Keep off IPv4 addresses that end in .0 and .255.
    pub avoid_buggy_ips: bool,
    /// Who may take from it; `None` admits everybody.
    pub allocation: Option<ServiceAllocation>,
    /// How long a freed address rests before another owner gets it.
    pub quarantine: Duration,
    /// Keep addresses in use that the pool no longer contains.
    pub retain_assigned: bool,
    /// What is wrong with its addresses and what to do, where the API server cannot see it; `ranges` are then
    /// those that could be read.
    pub flaw: Option<String>,
}

/// `L2Advertisement.spec.steering`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Steering {
    /// Steer where the data path can.
    #[default]
    Auto,
    /// Announce only.
    Off,
}

/// `L2Advertisement.spec.crossSegment`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CrossSegment {
    /// Nodes off the segment serve when no node on it has an endpoint.
    #[default]
    Auto,
    /// They serve like those on it.
    Always,
}

/// `L2Advertisement.spec.unknownPort`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownPort {
    /// An answer that says so.
    #[default]
    Reject,
    /// Silence.
    Drop,
}

/// A preferred node selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreferredNodes {
    /// Added to the weight of the nodes that match, 1 to 100.
    pub weight: u32,
    /// Which nodes.
    pub selector: LabelSelector,
}

/// An `L2Advertisement`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertisement {
    /// Its name.
    pub name: Arc<str>,
    /// Pools by name.
    pub pools: Vec<String>,
    /// Pools by label. With neither names nor selectors it selects every pool.
    pub pool_selectors: Vec<LabelSelector>,
    /// Services it is for; none selects all.
    pub service_selectors: Vec<LabelSelector>,
    /// Nodes that may announce; none selects all.
    pub node_selectors: Vec<LabelSelector>,
    /// Interface names or globs; none means "by subnet".
    pub interfaces: Vec<String>,
    /// Preferences among the nodes.
    pub preferred_nodes: Vec<PreferredNodes>,
    /// A better node takes the address back when it returns.
    pub failback: bool,
    /// An overloaded node gives groups away.
    pub rebalance: bool,
    /// Nodes with the exclude label may announce.
    pub ignore_exclude_lb: bool,
    /// Whether to steer.
    pub steering: Steering,
    /// When nodes off the segment serve.
    pub cross_segment: CrossSegment,
    /// What packets to unknown ports meet.
    pub unknown_port: UnknownPort,
}

impl Advertisement {
    /// One that says nothing: every pool and Service, every node, by subnet.
    pub fn plain(name: &str) -> Self {
        Self {
            name: name.into(),
            pools: Vec::new(),
            pool_selectors: Vec::new(),
            service_selectors: Vec::new(),
            node_selectors: Vec::new(),
            interfaces: Vec::new(),
            preferred_nodes: Vec::new(),
            failback: false,
            rebalance: true,
            ignore_exclude_lb: false,
            steering: Steering::default(),
            cross_segment: CrossSegment::default(),
            unknown_port: UnknownPort::default(),
        }
    }
}

/// One object, as a source delivers it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant carries the type of its name")]
pub enum Object {
    Service(Service),
    EndpointSlice(EndpointSlice),
    Node(Node),
    Namespace(Namespace),
    Pool(Pool),
    Advertisement(Advertisement),
    VirtualIp(VirtualIp),
    EgressPolicy(Box<EgressPolicy>),
    Pod(Pod),
    ServiceCidr(ServiceCidr),
}

/// The identity of an [`Object`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each variant names the kind of its object")]
pub enum ObjectId {
    Service(ObjectKey),
    EndpointSlice(ObjectKey),
    Node(NodeName),
    Namespace(Arc<str>),
    Pool(Arc<str>),
    Advertisement(Arc<str>),
    VirtualIp(IpAddr),
    EgressPolicy(Arc<str>),
    Pod(ObjectKey),
    ServiceCidr(Arc<str>),
}

impl Object {
    /// Its identity.
    pub fn id(&self) -> ObjectId {
        match self {
            Self::Service(service) => ObjectId::Service(service.key.clone()),
            Self::EndpointSlice(slice) => ObjectId::EndpointSlice(slice.key.clone()),
            Self::Node(node) => ObjectId::Node(node.name.clone()),
            Self::Namespace(namespace) => ObjectId::Namespace(namespace.name.clone()),
            Self::Pool(pool) => ObjectId::Pool(pool.name.clone()),
            Self::Advertisement(advertisement) => {
                ObjectId::Advertisement(advertisement.name.clone())
            }
            Self::VirtualIp(vip) => ObjectId::VirtualIp(vip.address),
            Self::EgressPolicy(policy) => ObjectId::EgressPolicy(policy.name.clone()),
            Self::Pod(pod) => ObjectId::Pod(pod.key.clone()),
            Self::ServiceCidr(cidr) => ObjectId::ServiceCidr(cidr.name.clone()),
        }
    }
}

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each variant is the kind of its name")]
pub enum Kind {
    Service,
    EndpointSlice,
    Node,
    Namespace,
    Pool,
    Advertisement,
    VirtualIp,
    EgressPolicy,
    Pod,
    ServiceCidr,
}

/// What a source tells an index.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "most are `Apply`, and none is kept"
)]
pub enum Event {
    /// The object is new or has changed.
    Apply(Object),
    /// The object is gone.
    Delete(ObjectId),
    /// Every object of this kind that existed at the start of the listing has been applied, and those that
    /// went unseen since an earlier listing have been deleted.
    Synced(Kind),
    /// Objects of this kind are no longer followed: none is known, and it counts as not listed. Pods are followed only
    /// while there is an egress policy.
    Unwatched(Kind),
}
