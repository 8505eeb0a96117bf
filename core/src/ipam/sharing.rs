//! Who may hold an address together with whom.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Holder, Protocol, Service, TrafficPolicy};

/// What of a Service decides whether it may share an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sharer {
    key: Option<String>,
    backend: Backend,
    ports: BTreeSet<(Protocol, u16)>,
}

/// Which endpoints the traffic must reach.
///
/// With `externalTrafficPolicy: Local` all Services of an address must select the same pods: the address
/// leads to one node, which must have endpoints of each (as `MetalLB` rules it).
#[derive(Clone, Debug, PartialEq, Eq)]
enum Backend {
    Anywhere,
    Local(BTreeMap<String, String>),
}

/// Why two Services cannot hold the same address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SharingConflict {
    /// At least one of them names no sharing key, or their keys differ.
    Key,
    /// Both use this port.
    Port(Protocol, u16),
    /// They differ in `externalTrafficPolicy`, or are Local with different pod selectors.
    Backend,
}

impl Sharer {
    pub(super) fn of(service: &Service) -> Self {
        Self {
            key: service.request.sharing_key.clone(),
            backend: match service.traffic_policy {
                TrafficPolicy::Cluster => Backend::Anywhere,
                TrafficPolicy::Local => Backend::Local(service.selector.clone()),
            },
            ports: service
                .ports
                .iter()
                .map(|port| (port.protocol, port.port))
                .collect(),
        }
    }

    /// Of a policy, which shares with nobody.
    pub(super) fn alone() -> Self {
        Self {
            key: None,
            backend: Backend::Anywhere,
            ports: BTreeSet::new(),
        }
    }

    /// The sharing key.
    pub(super) fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// What keeps the two from holding one address; `None` when they may.
    pub(super) fn conflict(&self, other: &Self) -> Option<SharingConflict> {
        if self.key.is_none() || self.key != other.key {
            return Some(SharingConflict::Key);
        }
        if let Some(&(protocol, port)) = self.ports.intersection(&other.ports).next() {
            return Some(SharingConflict::Port(protocol, port));
        }
        (self.backend != other.backend).then_some(SharingConflict::Backend)
    }
}

/// The first of `holders` other than who asks with which the newcomer cannot share.
pub(super) fn first_conflict<'a>(
    holders: &'a BTreeMap<Holder, Sharer>,
    asking: &Holder,
    newcomer: &Sharer,
) -> Option<(&'a Holder, SharingConflict)> {
    holders
        .iter()
        .filter(|(holder, _)| *holder != asking)
        .find_map(|(holder, sharer)| Some((holder, newcomer.conflict(sharer)?)))
}
