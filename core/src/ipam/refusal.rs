//! Why a Service has no address, or not the one it asks for: typed, and each says what to do.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::sharing::SharingConflict;
use crate::ip::Family;
use crate::model::{Holder, NodeName};

/// A reason to refuse an address. [`fmt::Display`] gives the message, [`Refusal::reason`] the CamelCase word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// An annotation or `spec.loadBalancerIP` could not be understood.
    Malformed(String),
    /// More than one address of a family is asked for.
    TwoOfAFamily(Family),
    /// An address is asked for whose family the Service does not have.
    WrongFamily(IpAddr),
    /// There is no pool at all.
    NoPools,
    /// The pool that is asked for does not exist.
    UnknownPool(String),
    /// No pool that assigns automatically admits the Service.
    NoPoolAdmits(BTreeSet<Family>),
    /// The pool that is asked for does not admit the Service.
    PoolRefuses(Arc<str>),
    /// The pool that is asked for is for egress policies.
    PoolForEgress(Arc<str>),
    /// No eligible pool has addresses of this family.
    NoSuchFamily(Family),
    /// All addresses of this family in the eligible pools are in use or rest.
    Exhausted(Family, Vec<Arc<str>>),
    /// The address that is asked for lies in no pool.
    InNoPool(IpAddr),
    /// The address that is asked for does not lie in the pool that is asked for.
    NotInPool(IpAddr, String),
    /// The pool keeps off the address because it ends in .0 or .255.
    Avoided(IpAddr, Arc<str>),
    /// The address belongs to a node.
    NodeAddress(IpAddr, NodeName),
    /// Somebody else holds the address and it cannot be shared.
    InUse(IpAddr, Holder, SharingConflict),
    /// The address was freed a short while ago and rests for its former owner.
    Resting(IpAddr),
}

impl Refusal {
    /// A CamelCase word for conditions, Events and metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) | Self::TwoOfAFamily(_) => "MalformedRequest",
            Self::WrongFamily(_) => "WrongFamily",
            Self::NoPools => "NoPool",
            Self::UnknownPool(_) => "UnknownPool",
            Self::NoPoolAdmits(_) | Self::PoolRefuses(_) => "NotAdmitted",
            Self::PoolForEgress(_) => "PoolNotForServices",
            Self::NoSuchFamily(_) => "NoPoolOfFamily",
            Self::Exhausted(..) => "PoolExhausted",
            Self::InNoPool(_) | Self::NotInPool(..) | Self::Avoided(..) => "AddressNotInPool",
            Self::NodeAddress(..) => "AddressOfNode",
            Self::InUse(_, _, SharingConflict::Key) => "AddressInUse",
            Self::InUse(..) => "SharingConflict",
            Self::Resting(_) => "AddressResting",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(what) => write!(f, "{what}"),
            Self::TwoOfAFamily(family) => write!(
                f,
                "asks for more than one {family} address: name at most one per family"
            ),
            Self::WrongFamily(address) => write!(
                f,
                "asks for {address}, but spec.ipFamilies has no {}: change the address or spec.ipFamilies",
                Family::of(*address)
            ),
            Self::NoPools => write!(f, "there is no IPAddressPool: create one"),
            Self::UnknownPool(pool) => write!(
                f,
                "asks for IPAddressPool {pool}, which does not exist: create it, or correct the annotation"
            ),
            Self::NoPoolAdmits(families) => {
                let families: Vec<_> = families.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "no IPAddressPool with autoAssign admits this Service for {}: create one, admit the \
                     Service's namespace and labels in a pool's serviceAllocation, or name a pool with \
                     autoAssign: false by annotation",
                    families.join(" and ")
                )
            }
            Self::PoolRefuses(pool) => write!(
                f,
                "IPAddressPool {pool} does not admit this Service: admit its namespace and labels in the \
                 pool's serviceAllocation, or ask for another pool"
            ),
            Self::PoolForEgress(pool) => write!(
                f,
                "IPAddressPool {pool} is for EgressPolicies alone: ask for another pool, or set its purpose to Both"
            ),
            Self::NoSuchFamily(family) => write!(
                f,
                "no IPAddressPool that admits this Service has {family} addresses: add a {family} range, \
                 or change spec.ipFamilies"
            ),
            Self::Exhausted(family, pools) => write!(
                f,
                "no {family} address is available in {}: add a range, or free addresses (freed ones rest \
                 for the pool's quarantine)",
                pools.join(", ")
            ),
            Self::InNoPool(address) => write!(
                f,
                "asks for {address}, which lies in no IPAddressPool: ask for another address, or add it \
                 to a pool"
            ),
            Self::NotInPool(address, pool) => write!(
                f,
                "asks for {address} and for IPAddressPool {pool}, which does not contain it: drop one of \
                 the two annotations"
            ),
            Self::Avoided(address, pool) => write!(
                f,
                "asks for {address}, which IPAddressPool {pool} keeps off: ask for another address, or \
                 set avoidBuggyIPs: false"
            ),
            Self::NodeAddress(address, node) => write!(
                f,
                "asks for {address}, which is node {node}'s own address: ask for another address, and \
                 take this one out of the pool"
            ),
            Self::InUse(address, holder, conflict) => {
                write!(f, "{address} is held by {holder}")?;
                match conflict {
                    _ if holder.service().is_none() => {
                        write!(f, ", which shares with nobody: ask for another address")
                    }
                    SharingConflict::Key => write!(
                        f,
                        ": ask for another address, or give both Services the same sharing key"
                    ),
                    SharingConflict::Port(protocol, port) => write!(
                        f,
                        ", which uses port {port}/{protocol} too: Services that share an address need \
                         different ports"
                    ),
                    SharingConflict::Backend => write!(
                        f,
                        ", and the two cannot share it: both need externalTrafficPolicy Cluster, or \
                         Local with the same selector"
                    ),
                }
            }
            Self::Resting(address) => write!(
                f,
                "{address} was freed a short while ago and still rests for its former owner: it will be \
                 assigned when the pool's quarantine is over"
            ),
        }
    }
}
