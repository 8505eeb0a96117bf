//! Which of several policies a pod is a tenant of, and which of several addresses it leaves by.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use xxhash_rust::xxh64::Xxh64;

use crate::model::{EgressPolicy, ObjectKey};
use crate::selector::LabelSelector;

/// How specific a policy is; the smallest goes first. One that names pods and namespaces goes before one that names one
/// of them, then more requirements before fewer, then the name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank(Reverse<bool>, Reverse<usize>, Arc<str>);

impl Rank {
    pub(super) fn of(policy: &EgressPolicy) -> Self {
        let spec = &policy.spec;
        let requirements = |selector: &Option<LabelSelector>| {
            selector
                .as_ref()
                .map_or(0, |selector| selector.requirements.len())
        };
        Self(
            Reverse(spec.pods.is_some() && spec.namespaces.is_some()),
            Reverse(requirements(&spec.pods) + requirements(&spec.namespaces)),
            policy.name.clone(),
        )
    }

    /// Whether only the name decides between two.
    pub(super) fn is_as_specific_as(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

/// The address of `offered` that a pod leaves by: the one whose xxh64 (seed 0) with the pod's namespace and name is highest.
/// So a pod keeps its address when others come or go, unless it is its own that goes.
pub(super) fn choose(pod: &ObjectKey, offered: &[IpAddr]) -> Option<IpAddr> {
    offered.iter().copied().max_by_key(|address| {
        let mut hash = Xxh64::new(0);
        hash.update(format!("{pod} {address}").as_bytes());
        (hash.digest(), Reverse(*address))
    })
}
