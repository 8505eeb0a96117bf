//! Whose an address is, what it may leave by, and what is to be told of a policy.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::choice::choose;
use super::{EgressIndex, Judged, PolicyState, Report, Tenant, of_family};
use crate::ip::Family;
use crate::model::{EgressSource, Purpose};

/// Of a policy in a namespace: the addresses that its pods may leave by, IPv4 and IPv6.
pub(super) type Offers = BTreeMap<(Arc<str>, Arc<str>), [Vec<IpAddr>; 2]>;

impl EgressIndex {
    /// Whose an address is, and what it leaves by.
    pub(super) fn judge(&self, address: IpAddr, offers: &mut Offers) -> Option<Judged> {
        let (_, _, key) = self.owners.get(&address)?.first()?;
        let state = self.pods.get(key)?;
        // What its labels mean is not known without its namespace's.
        self.namespaces.get(&key.namespace)?;
        let tenant = state.claims.first().and_then(|name| {
            let policy = self.policies.get(name)?;
            let offer = offers
                .entry((name.clone(), key.namespace.clone()))
                .or_insert_with(|| self.offer(policy, &key.namespace));
            Some(Tenant {
                policy: name.clone(),
                egress_ip: choose(key, &offer[of_family(address)]),
            })
        });
        Some(Judged {
            pod: key.clone(),
            identity: Judged::identity_of(&state.pod),
            node: state.pod.node.clone(),
            tenant,
        })
    }

    /// The addresses that a policy's pods of a namespace may leave by.
    fn offer(&self, policy: &PolicyState, namespace: &Arc<str>) -> [Vec<IpAddr>; 2] {
        let mut offer = [Vec::new(), Vec::new()];
        for address in self.offered(&policy.policy.name) {
            let pool = &self.vips[&address].pool;
            if self.is_admitted(policy, pool, namespace) {
                offer[of_family(address)].push(address);
            }
        }
        offer
    }

    /// Whether pods of a namespace may leave by a policy's addresses of a pool.
    fn is_admitted(&self, policy: &PolicyState, pool: &str, namespace: &Arc<str>) -> bool {
        if let EgressSource::Service(service) = &policy.policy.spec.source {
            return service.namespace == *namespace;
        }
        // Whom a pool that is gone admitted nobody knows.
        let (Some(pool), Some(labels)) = (self.pools.get(pool), self.namespaces.get(namespace))
        else {
            return false;
        };
        pool.purpose != Purpose::Ingress
            && pool.allocation.as_ref().is_none_or(|rules| {
                rules.service_selectors.is_empty() && rules.admits_namespace(namespace, labels)
            })
    }

    /// Whether it is known that no address of the policy is for the namespace.
    fn is_refused(&self, policy: &PolicyState, namespace: &Arc<str>) -> bool {
        match &policy.policy.spec.source {
            EgressSource::Service(service) => service.namespace != *namespace,
            EgressSource::Pool { name, .. } => {
                self.pools.contains_key(name) && !self.is_admitted(policy, name, namespace)
            }
            EgressSource::Addresses(_) => {
                let mut pools = self
                    .offered(&policy.policy.name)
                    .map(|address| &self.vips[&address].pool)
                    .peekable();
                pools.peek().is_some()
                    && pools.all(|pool| !self.is_admitted(policy, pool, namespace))
            }
        }
    }

    /// What became of a policy's pods; nothing if it is not known.
    pub fn report(&self, name: &str) -> Option<Report> {
        let state = self.policies.get(name)?;
        let not_admitted = state
            .tenants
            .iter()
            .filter(|(namespace, _)| self.is_refused(state, namespace))
            .map(|(namespace, names)| (namespace.clone(), names.len()))
            .collect();
        let lacks = |family: &Family| {
            let number = usize::from(*family == Family::V6);
            let has = self.offered(name).any(|a| Family::of(a) == *family);
            state.families[number] > 0 && !has
        };
        let taken_pod = state.taken.iter().find_map(|(winner, keys)| {
            let key = keys.first()?;
            Some((key.clone(), winner.clone()))
        });
        Some(Report {
            matched: state.matched,
            host_network: state.host_network.len(),
            taken: state
                .taken
                .iter()
                .map(|(winner, keys)| (winner.clone(), keys.len()))
                .collect(),
            taken_pod,
            not_admitted,
            lacking: [Family::V4, Family::V6].into_iter().filter(lacks).collect(),
        })
    }
}
