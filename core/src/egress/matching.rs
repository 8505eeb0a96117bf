//! Which policies select a pod, and the books that are kept of it.

use std::sync::Arc;

use super::{EgressIndex, PolicyState, of_family};
use crate::model::{EgressPolicy, ObjectKey};
use crate::selector::LabelSelector;

impl EgressIndex {
    /// The pods that a policy may select, and some that it does not.
    pub(super) fn could_match(&self, policy: &EgressPolicy) -> Vec<ObjectKey> {
        let spec = &policy.spec;
        let by_label = spec.pods.as_ref().and_then(|s| self.carriers.of(s));
        let by_namespace = spec.namespaces.as_ref().map(|s| self.namespaces_of(s));
        match (by_label, by_namespace) {
            (Some(sets), None) => sets.into_iter().flatten().cloned().collect(),
            (Some(sets), Some(names)) => {
                let carry: usize = sets.iter().map(|set| set.len()).sum();
                let live: usize = names.iter().map(|name| self.population(name)).sum();
                if carry <= live {
                    sets.into_iter().flatten().cloned().collect()
                } else {
                    names.iter().flat_map(|name| self.pods_of(name)).collect()
                }
            }
            (None, Some(names)) => names.iter().flat_map(|name| self.pods_of(name)).collect(),
            (None, None) => self.pods.keys().cloned().collect(),
        }
    }

    fn namespaces_of(&self, selector: &LabelSelector) -> Vec<Arc<str>> {
        let matches = |name: &&Arc<str>| {
            let labels = self.namespaces.get(*name);
            labels.is_some_and(|labels| selector.matches(labels))
        };
        match self.namespace_carriers.of(selector) {
            Some(sets) => sets
                .into_iter()
                .flatten()
                .filter(matches)
                .cloned()
                .collect(),
            None => self.namespaces.keys().filter(matches).cloned().collect(),
        }
    }

    fn population(&self, namespace: &Arc<str>) -> usize {
        self.populations.get(namespace).copied().unwrap_or_default()
    }

    /// Finds the policies of a pod.
    pub(super) fn match_pod(&mut self, key: &ObjectKey) {
        let Some(state) = self.pods.get(key) else {
            return;
        };
        let mut claims: Vec<&PolicyState> = Vec::new();
        if let Some(namespace) = self.namespaces.get(&key.namespace) {
            for name in self.seekers.of(namespace, &state.pod.labels) {
                let Some(policy) = self.policies.get(name) else {
                    continue;
                };
                let spec = &policy.policy.spec;
                let selected = spec
                    .pods
                    .as_ref()
                    .is_none_or(|s| s.matches(&state.pod.labels))
                    && spec
                        .namespaces
                        .as_ref()
                        .is_none_or(|s| s.matches(namespace));
                if selected {
                    claims.push(policy);
                }
            }
        }
        claims.sort_unstable_by(|a, b| a.rank.cmp(&b.rank));
        let claims: Vec<Arc<str>> = claims
            .into_iter()
            .map(|policy| policy.policy.name.clone())
            .collect();
        self.withdraw(key);
        self.enter(key, claims);
    }

    /// Takes a pod out of the books of the policies that select it.
    pub(super) fn withdraw(&mut self, key: &ObjectKey) {
        let Some(state) = self.pods.get_mut(key) else {
            return;
        };
        let claims = std::mem::take(&mut state.claims);
        let (matched, addresses) = (state.is_matched(), state.pod.addresses.clone());
        self.dirty_addresses.extend(addresses.iter().copied());
        for (place, name) in claims.iter().enumerate() {
            self.changed_policies.insert(name.clone());
            let Some(policy) = self.policies.get_mut(name) else {
                continue;
            };
            if !matched {
                policy.host_network.remove(key);
            } else if place == 0 {
                if let Some(names) = policy.tenants.get_mut(&key.namespace) {
                    names.remove(&key.name);
                    if names.is_empty() {
                        policy.tenants.remove(&key.namespace);
                    }
                }
                policy.matched -= 1;
                for address in &addresses {
                    policy.families[of_family(*address)] -= 1;
                }
            } else if let Some(keys) = policy.taken.get_mut(&claims[0]) {
                keys.remove(key);
                if keys.is_empty() {
                    policy.taken.remove(&claims[0]);
                }
            }
        }
    }

    fn enter(&mut self, key: &ObjectKey, claims: Vec<Arc<str>>) {
        let Some(state) = self.pods.get_mut(key) else {
            return;
        };
        let matched = state.is_matched();
        for (place, name) in claims.iter().enumerate() {
            self.changed_policies.insert(name.clone());
            let Some(policy) = self.policies.get_mut(name) else {
                continue;
            };
            if !matched {
                policy.host_network.insert(key.clone());
            } else if place == 0 {
                let names = policy.tenants.entry(key.namespace.clone()).or_default();
                names.insert(key.name.clone());
                policy.matched += 1;
                for address in &state.pod.addresses {
                    policy.families[of_family(*address)] += 1;
                }
            } else {
                let keys = policy.taken.entry(claims[0].clone()).or_default();
                keys.insert(key.clone());
            }
        }
        self.dirty_addresses
            .extend(state.pod.addresses.iter().copied());
        state.claims = claims;
    }
}
