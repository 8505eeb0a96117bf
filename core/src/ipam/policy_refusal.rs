//! Why an egress policy has no address, or not all: typed, and each says what to do.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::refusal::Refusal;
use crate::ip::Family;
use crate::model::{Holder, NodeName, ObjectKey};

/// A reason to refuse an address. [`fmt::Display`] gives the message, [`PolicyRefusal::reason`] the CamelCase word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyRefusal {
    /// The pool does not exist.
    UnknownPool(Arc<str>),
    /// The pool is for Services.
    PoolForServices(Arc<str>),
    /// The pool picks Services by their labels.
    PoolPicksServices(Arc<str>),
    /// The pool has no addresses of this family, or none at all.
    NoSuchFamily(Arc<str>, Option<Family>),
    /// All addresses of this family in the pool are in use or rest.
    Exhausted(Arc<str>, Family),
    /// The address lies in no pool.
    InNoPool(IpAddr),
    /// The address belongs to a node.
    NodeAddress(IpAddr, NodeName),
    /// Somebody else holds the address.
    InUse(IpAddr, Holder),
    /// The address was freed a short while ago and rests for its former owner.
    Resting(IpAddr),
    /// There is no such Service of type `LoadBalancer`.
    UnknownService(ObjectKey),
    /// The Service has no address.
    ServiceWithout(ObjectKey),
    /// The Service's address comes from a pool that is not for both.
    PoolNotForBoth(ObjectKey, IpAddr, Arc<str>),
}

impl PolicyRefusal {
    /// A CamelCase word for conditions and Events.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownPool(_) => "PoolNotFound",
            Self::PoolForServices(_) | Self::PoolNotForBoth(..) => "PoolNotForEgress",
            Self::PoolPicksServices(_) => "NotAdmitted",
            Self::NoSuchFamily(..) => "NoPoolOfFamily",
            Self::Exhausted(..) => "PoolExhausted",
            Self::InNoPool(_) => "AddressNotInPool",
            Self::NodeAddress(..) => "AddressOfNode",
            Self::InUse(..) => "AddressInUse",
            Self::Resting(_) => "AddressResting",
            Self::UnknownService(_) => "ServiceNotFound",
            Self::ServiceWithout(_) => "AddressPending",
        }
    }

    /// Why an address that is asked for by number is not available.
    pub(super) fn unavailable(address: IpAddr, refusal: Refusal) -> Self {
        match refusal {
            Refusal::NodeAddress(address, node) => Self::NodeAddress(address, node),
            Refusal::InUse(address, holder, _) => Self::InUse(address, holder),
            Refusal::Resting(address) => Self::Resting(address),
            Refusal::Malformed(_)
            | Refusal::TwoOfAFamily(_)
            | Refusal::WrongFamily(_)
            | Refusal::NoPools
            | Refusal::UnknownPool(_)
            | Refusal::NoPoolAdmits(_)
            | Refusal::PoolRefuses(_)
            | Refusal::PoolForEgress(_)
            | Refusal::NoSuchFamily(_)
            | Refusal::Exhausted(..)
            | Refusal::InNoPool(_)
            | Refusal::NotInPool(..)
            | Refusal::Avoided(..) => Self::InNoPool(address),
        }
    }
}

impl fmt::Display for PolicyRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownPool(pool) => write!(
                f,
                "there is no IPAddressPool {pool}: create it, or correct spec.egressIPs.pool"
            ),
            Self::PoolForServices(pool) => write!(
                f,
                "IPAddressPool {pool} is for Services alone: set its purpose to Egress or Both, or take addresses from \
                 another pool"
            ),
            Self::PoolPicksServices(pool) => write!(
                f,
                "IPAddressPool {pool} picks Services by label (serviceAllocation.serviceSelectors): take addresses from \
                 another pool, or use those of such a Service by spec.egressIPs.fromService"
            ),
            Self::NoSuchFamily(pool, Some(family)) => write!(
                f,
                "IPAddressPool {pool} has no {family} addresses: add a {family} range, or change \
                 spec.egressIPs.ipFamilies"
            ),
            Self::NoSuchFamily(pool, None) => {
                write!(f, "IPAddressPool {pool} has no addresses: add a range")
            }
            Self::Exhausted(pool, family) => write!(
                f,
                "no {family} address is available in IPAddressPool {pool}: add a range, or free addresses (freed ones \
                 rest for the pool's quarantine)"
            ),
            Self::InNoPool(address) => write!(
                f,
                "{address} lies in no IPAddressPool: add it to one whose purpose is Egress or Both, or name another \
                 address"
            ),
            Self::NodeAddress(address, node) => write!(
                f,
                "{address} is node {node}'s own address: name another address, and take this one out of the pool"
            ),
            Self::InUse(address, holder @ Holder::Service(_)) => write!(
                f,
                "{address} is held by {holder}: name another address, or use the Service's by spec.egressIPs.fromService"
            ),
            Self::InUse(address, holder @ Holder::EgressPolicy(_)) => write!(
                f,
                "{address} is held by {holder}, and each policy has its own: name another address"
            ),
            Self::Resting(address) => write!(
                f,
                "{address} was freed a short while ago and still rests for its former owner: it will be assigned when \
                 the pool's quarantine is over"
            ),
            Self::UnknownService(service) => write!(
                f,
                "there is no Service {service} of type LoadBalancer: create it, or correct spec.egressIPs.fromService"
            ),
            Self::ServiceWithout(service) => write!(
                f,
                "Service {service} has no address: its condition landfall.dev/AddressAssigned says why"
            ),
            Self::PoolNotForBoth(service, address, pool) => write!(
                f,
                "Service {service} has {address} from IPAddressPool {pool}, whose purpose is not Both: change it, or \
                 give the Service an address of another pool"
            ),
        }
    }
}
