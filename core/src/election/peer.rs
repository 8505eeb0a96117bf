//! What a node says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use xxhash_rust::xxh64::xxh64;

use crate::groups::GroupId;
use crate::model::{NodeName, ObjectKey};

/// Tells one run of a speaker from another. Random; only equality matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootId(pub u64);

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// An interface that could announce: up or not, but no port of a bond or bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceFact {
    /// Its name.
    pub name: Arc<str>,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The subnets of its addresses.
    pub subnets: Vec<IpNet>,
    /// Up, with carrier.
    pub up: bool,
    /// It carries a default route, by family (IPv4, IPv6).
    pub default_route: (bool, bool),
    /// The nodes whose hellos are heard there.
    pub heard: BTreeSet<NodeName>,
}

/// What a speaker can do; all use what all understand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Its data path hands packets to the nodes that should serve them.
    pub steers: bool,
    /// It treats packets by egress policies. What it, or the run before, has said of policies counts only then.
    pub gates: bool,
    /// The highest steering-table algorithm it understands.
    pub table_algorithm: u16,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            steers: false,
            gates: false,
            table_algorithm: 1,
        }
    }
}

/// How long a node's reason for not steering may be, in bytes.
pub const MAX_HINDRANCE: usize = 160;

/// What a node says of itself as a whole.
#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRegister {
    /// Its interfaces, by name.
    pub interfaces: Vec<InterfaceFact>,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Why its data path cannot steer, in short; nothing if it can, or if that is not known yet.
    pub hindrance: Option<Arc<str>>,
    /// It has listed its sources and may lead.
    pub synced: bool,
    /// It is about to stop and leads nothing new.
    pub leaving: bool,
    /// It is no gateway of egress policies until somebody arms it again.
    pub disarmed: bool,
    /// It cannot be one as it is: nodes that can go before it.
    pub gateless: bool,
}

/// How a claim is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClaimMode {
    /// It stays.
    Held,
    /// It ends as soon as another node has claimed.
    Yielding {
        /// Who should claim; anybody when absent.
        to: Option<NodeName>,
    },
}

/// What makes a node the leader of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Grows by one at each take-over; the higher wins.
    pub epoch: u64,
    /// Milliseconds since the Unix epoch at which it began; for display only.
    pub since: u64,
    /// Whether it stays.
    pub mode: ClaimMode,
}

impl Claim {
    /// Whether it stays.
    pub fn held(&self) -> bool {
        self.mode == ClaimMode::Held
    }
}

/// A TCP port of a VIP, whose flows nodes hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HeldPort {
    /// The VIP.
    pub vip: IpAddr,
    /// The port.
    pub port: u16,
}

/// How many buckets are told of together.
pub const HELD_PAGE: u32 = 1024;

/// Buckets of a page of which a node holds flows though they are another's: those words of the page's bit map that
/// are not zero, by place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldPage(pub BTreeMap<u8, u64>);

impl HeldPage {
    /// The page of these buckets, all of which have to be on it.
    pub fn of(buckets: impl IntoIterator<Item = u32>) -> Self {
        let mut words = BTreeMap::<u8, u64>::new();
        for bucket in buckets {
            let place = bucket % HELD_PAGE;
            let word = u8::try_from(place / 64).expect("a page has sixteen words");
            *words.entry(word).or_default() |= 1 << (place % 64);
        }
        Self(words)
    }

    /// The buckets, as numbers within the page.
    pub fn places(&self) -> impl Iterator<Item = u32> {
        self.0.iter().flat_map(|(word, bits)| {
            (0..64)
                .filter(move |bit| bits >> bit & 1 == 1)
                .map(move |bit| u32::from(*word) * 64 + bit)
        })
    }
}

/// What a register is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Topic {
    /// A group.
    Group(GroupId),
    /// A page of a port's buckets.
    Held(HeldPort, u16),
    /// A pod.
    Pod(ObjectKey),
}

/// All of a pod's addresses, as its node knows them before the API server does: none, if it has given them back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodAddresses {
    /// The pod's UID; empty, if nobody has said it.
    pub uid: Arc<str>,
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
}

impl PodAddresses {
    /// How long a UID may be, in bytes.
    pub(super) const MAX_UID: usize = 64;
    /// How many addresses a pod may have.
    pub(super) const MAX: usize = 64;

    pub(super) fn is_bounded(&self) -> bool {
        self.uid.len() <= Self::MAX_UID && self.addresses.len() <= Self::MAX
    }

    /// By what others say that they know them: xxh64 of what is said, with seed 0.
    pub fn digest(&self) -> u64 {
        let addresses = self.addresses.iter().map(ToString::to_string);
        let said: Vec<String> = [self.uid.to_string()]
            .into_iter()
            .chain(addresses)
            .collect();
        xxh64(said.join(" ").as_bytes(), 0)
    }
}

/// What a node says of itself about a topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Word {
    /// About a group.
    Group(GroupRegister),
    /// About a page of a port's buckets.
    Held(HeldPage),
    /// About a pod of its own.
    Pod(PodAddresses),
    /// About another node's pod: its kernel goes by what that node says of it, by [`PodAddresses::digest`].
    Knows(u64),
}

impl Word {
    /// Whether it is a word about such a topic.
    pub(super) fn suits(&self, topic: &Topic) -> bool {
        matches!(
            (self, topic),
            (Self::Group(_), Topic::Group(_))
                | (Self::Held(_), Topic::Held(..))
                | (Self::Pod(_) | Self::Knows(_), Topic::Pod(_))
        )
    }

    /// Whether a node says it of a pod that runs there.
    pub(super) fn is_of_own_pod(&self) -> bool {
        matches!(self, Self::Pod(_))
    }

    /// About how many bytes it takes on the wire.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Group(group) => 40 + 10 * (group.serves.len() + group.gates.len()),
            Self::Held(page) => 2 + 11 * page.0.len(),
            Self::Pod(pod) => 4 + pod.uid.len() + 18 * pod.addresses.len(),
            Self::Knows(_) => 10,
        }
    }
}

/// By what a Service is known between speakers: xxh64 of `namespace/name`, with seed 0.
pub fn service_id(key: &ObjectKey) -> u64 {
    xxh64(key.to_string().as_bytes(), 0)
}

/// By what an egress policy is known between speakers: xxh64 of its name, with seed 0.
pub fn policy_id(policy: &str) -> u64 {
    xxh64(policy.as_bytes(), 0)
}

/// What a node says of itself about a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRegister {
    /// Its claim.
    pub claim: Option<Claim>,
    /// Its packets would be served here: kube-proxy has the rules.
    pub ready: bool,
    /// The Services, by [`service_id`], that it serves: what is steered to it reaches an endpoint.
    pub serves: BTreeSet<u64>,
    /// The egress policies, by [`policy_id`], that it can be the gateway of: what it takes for that is in its kernel.
    pub gates: BTreeSet<u64>,
    /// Its inputs differ from the majority's.
    pub odd: bool,
    /// The digest of its inputs.
    pub digest: u64,
    /// The highest epoch it has seen.
    pub seen: u64,
}
