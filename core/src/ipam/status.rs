//! What the index says should be written: statuses, records and notices, as plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::policy_refusal::PolicyRefusal;
use crate::ip::Family;
use crate::model::{Condition, NodeName, ObjectKey, Terms, VirtualIp};

/// The condition that says whether a Service has its addresses.
pub const ADDRESS_ASSIGNED: &str = "landfall.dev/AddressAssigned";
/// The condition that says whether a Service's addresses are answered for; written only once it was false.
pub const ANNOUNCED: &str = "landfall.dev/Announced";
/// Its type on a `VirtualIP`.
pub const VIRTUAL_IP_ANNOUNCED: &str = "Announced";
/// The reason of it that speakers write Events of.
pub(super) const ADDRESS_CONFLICT: &str = "AddressConflict";

/// Everything that should differ from what was last observed or last asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Records to put or remove. A writer must finish these per address in the order they come.
    pub records: Vec<RecordChange>,
    /// Service statuses to write.
    pub services: Vec<ServiceStatus>,
    /// Pool statuses that changed.
    pub pools: Vec<PoolStatus>,
    /// Egress policies whose addresses, or whose `VirtualIP`s' statuses, may have changed: see [`super::Ipam::allocation`].
    pub policies: Vec<PolicyChange>,
}

impl Changes {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
            && self.services.is_empty()
            && self.pools.is_empty()
            && self.policies.is_empty()
    }
}

/// The durable record of an allocation: the desired spec of a `VirtualIP`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The address.
    pub address: IpAddr,
    /// The pool it came from.
    pub pool: Arc<str>,
    /// The group it moves with.
    pub group: Arc<str>,
    /// The Services that hold it, sorted; none while it rests.
    pub services: Vec<ObjectKey>,
    /// The egress policies whose pods leave by it, sorted; none while it rests.
    pub egress_policies: Vec<Arc<str>>,
    /// What outlives these.
    pub terms: BTreeMap<Arc<str>, Terms>,
    /// The Services that held it and have it back at once, while it rests.
    pub former: Vec<ObjectKey>,
    /// The egress policies that held it and have it back at once, while it rests.
    pub former_policies: Vec<Arc<str>>,
    /// Whether its pool, when last seen, wanted it kept should the pool no longer contain it.
    pub retain: bool,
}

impl Record {
    /// Whether anybody holds it.
    pub fn is_held(&self) -> bool {
        !self.services.is_empty() || !self.egress_policies.is_empty()
    }

    /// The `VirtualIP` that says so, before any speaker reported on it.
    pub fn virtual_ip(self) -> VirtualIp {
        VirtualIp {
            services: self.services,
            egress_policies: self.egress_policies,
            terms: self.terms,
            former: self.former,
            former_policies: self.former_policies,
            retain: self.retain,
            ..VirtualIp::unheld(self.address, self.pool, self.group)
        }
    }
}

/// A change of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordChange {
    /// Create or update it.
    Put(Record),
    /// Delete it; the address is not handed out again before its deletion was observed.
    Remove(IpAddr),
}

impl RecordChange {
    /// The address it is about.
    pub fn address(&self) -> IpAddr {
        match self {
            Self::Put(record) => record.address,
            Self::Remove(address) => *address,
        }
    }
}

/// What a Service's status should say, of the fields that are ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceStatus {
    /// Which Service.
    pub key: ObjectKey,
    /// Its UID.
    pub uid: String,
    /// `status.loadBalancer.ingress`; `None` when it is not ours to say.
    pub ingress: Option<Vec<IpAddr>>,
    /// The conditions that are ours, [`ADDRESS_ASSIGNED`] and [`ANNOUNCED`]; others of ours are to be removed.
    pub conditions: Vec<Condition>,
    /// An Event to record once the status is written.
    pub notice: Option<Notice>,
}

impl ServiceStatus {
    /// Whether it only removes what was written to a Service that is gone or no longer of type `LoadBalancer`.
    pub fn is_farewell(&self) -> bool {
        self.conditions.is_empty() && self.ingress.as_ref().is_none_or(Vec::is_empty)
    }
}

/// An egress policy to look at again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyChange {
    /// Which.
    pub name: Arc<str>,
    /// What was taken from it against its will, and why, since it was last named.
    pub lost: Vec<String>,
}

/// What an egress policy has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// Its addresses, sorted, those whose record was observed to name it.
    pub addresses: Vec<IpAddr>,
    /// It has others, whose record is being written.
    pub pending: bool,
    /// What it asks for and cannot have for now.
    pub refusal: Option<PolicyRefusal>,
}

/// An Event about a transition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// A warning, or merely news.
    pub warning: bool,
    /// What was done, or could not be: a CamelCase word.
    pub action: &'static str,
    /// A CamelCase word.
    pub reason: String,
    /// What happened, and what to do.
    pub message: String,
}

/// How many addresses of a family a pool has, in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All it can ever hand out.
    pub total: u128,
    /// Held by Services, on record as this pool's.
    pub assigned: u128,
    /// Resting after they were freed.
    pub quarantined: u128,
    /// To be had right now.
    pub available: u128,
}

/// What else claims addresses of a pool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Overlap {
    /// Another pool contains some of them.
    Pool(Arc<str>),
    /// A node's own address is among them; it is never handed out.
    Node(NodeName, IpAddr),
    /// A node's pods have addresses in it.
    PodCidr(NodeName, ipnet::IpNet),
    /// Services have cluster addresses in it.
    ServiceCidr(ipnet::IpNet),
}

/// What a pool's status should say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolStatus {
    /// Which pool.
    pub name: Arc<str>,
    /// The generation this was computed from.
    pub generation: i64,
    /// IPv4.
    pub v4: Counts,
    /// IPv6.
    pub v6: Counts,
    /// What is wrong with its addresses.
    pub flaw: Option<String>,
    /// What it overlaps with.
    pub overlaps: BTreeSet<Overlap>,
}

impl PoolStatus {
    /// The counts of `family`.
    pub fn counts(&self, family: Family) -> Counts {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}
