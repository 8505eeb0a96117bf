//! Namespaces: their labels, and the pods in them.

use std::sync::Arc;

use super::{EgressIndex, NAME_LABEL};
use crate::model::ObjectKey;
use crate::selector::Labels;

impl EgressIndex {
    pub(super) fn pods_of(&self, namespace: &Arc<str>) -> Vec<ObjectKey> {
        let from = ObjectKey::new(namespace.clone(), "");
        self.pods
            .range(from..)
            .take_while(|(key, _)| key.namespace == *namespace)
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// Notes a namespace's labels, or that it has no object (any more).
    pub(super) fn set_namespace(&mut self, name: &Arc<str>, labels: Option<Labels>) {
        let pods = self.pods_of(name);
        let labels = match labels {
            None if self.options.namespaces_listed || pods.is_empty() => None,
            labels => {
                let mut labels = labels.unwrap_or_default();
                let named = labels.entry(NAME_LABEL.to_owned());
                named.or_insert_with(|| name.to_string());
                Some(labels)
            }
        };
        if self.namespaces.get(name) == labels.as_ref() {
            return;
        }
        if let Some(before) = self.namespaces.remove(name) {
            self.namespace_carriers.remove(&before, name);
        }
        if let Some(labels) = labels {
            self.namespace_carriers.insert(&labels, name);
            self.namespaces.insert(name.clone(), labels);
        }
        for key in &pods {
            // Pools may admit it now, or no longer.
            let claims = &self.pods[key].claims;
            self.changed_policies.extend(claims.iter().cloned());
            let addresses = self.pods[key].pod.addresses.iter();
            self.dirty_addresses.extend(addresses.copied());
        }
        self.dirty_pods.extend(pods);
    }
}
