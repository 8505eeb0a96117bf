//! Who carries a label, and who asks for one: what keeps an event from being compared with everything.
//!
//! Labels are looked up by a hash of key and value. Two labels of one hash only mean that somebody is compared in vain.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use xxhash_rust::xxh64::Xxh64;

use crate::model::EgressPolicy;
use crate::selector::{LabelSelector, Labels, Operator};

/// Values of a requirement that are looked up one by one; a longer list is treated as none.
const MAX_VALUES: usize = 32;

/// A label, by its hash.
type Label = u64;

/// Where nothing is asked for.
const ANY: Label = 0;

fn label(key: &str, value: &str) -> Label {
    let mut hash = Xxh64::new(0);
    hash.update(key.as_bytes());
    hash.update(&[0]);
    hash.update(value.as_bytes());
    hash.digest().max(1)
}

fn labels(all: &Labels) -> impl Iterator<Item = Label> {
    all.iter().map(|(key, value)| label(key, value))
}

/// For each requirement that only certain labels meet: these labels.
fn required(selector: &LabelSelector) -> impl Iterator<Item = Vec<Label>> {
    selector
        .requirements
        .iter()
        .filter_map(|requirement| match &requirement.operator {
            Operator::In(values) if values.len() <= MAX_VALUES => Some(
                values
                    .iter()
                    .map(|value| label(&requirement.key, value))
                    .collect(),
            ),
            Operator::In(_) | Operator::NotIn(_) | Operator::Exists | Operator::DoesNotExist => {
                None
            }
        })
}

/// Objects by the labels that they carry.
#[derive(Debug)]
pub(super) struct Carriers<T> {
    by_label: BTreeMap<Label, BTreeSet<T>>,
}

impl<T> Default for Carriers<T> {
    fn default() -> Self {
        Self {
            by_label: BTreeMap::new(),
        }
    }
}

impl<T: Clone + Ord> Carriers<T> {
    pub(super) fn insert(&mut self, all: &Labels, carrier: &T) {
        for label in labels(all) {
            let carriers = self.by_label.entry(label).or_default();
            carriers.insert(carrier.clone());
        }
    }

    pub(super) fn remove(&mut self, all: &Labels, carrier: &T) {
        for label in labels(all) {
            if let Some(carriers) = self.by_label.get_mut(&label) {
                carriers.remove(carrier);
                if carriers.is_empty() {
                    self.by_label.remove(&label);
                }
            }
        }
    }

    /// Who meets the requirement of `selector` that the fewest meet, by label; nothing if it has none that tells by a
    /// label's value.
    pub(super) fn of(&self, selector: &LabelSelector) -> Option<Vec<&BTreeSet<T>>> {
        let carriers = |wanted: Vec<Label>| -> Vec<&BTreeSet<T>> {
            let sets = wanted.iter().filter_map(|label| self.by_label.get(label));
            sets.collect()
        };
        required(selector)
            .map(carriers)
            .min_by_key(|sets| sets.iter().map(|set| set.len()).sum::<usize>())
    }
}

/// Policies by a label that they require of namespaces and one that they require of pods.
#[derive(Debug, Default)]
pub(super) struct Seekers {
    by_labels: BTreeMap<(Label, Label), BTreeSet<Arc<str>>>,
    filed: BTreeMap<Arc<str>, Vec<(Label, Label)>>,
    /// How many policies are filed under a label of namespaces, and of pods.
    used: [BTreeMap<Label, usize>; 2],
}

impl Seekers {
    pub(super) fn insert(&mut self, policy: &EgressPolicy) {
        let name = &policy.name;
        let [namespaces, pods] = [(0, &policy.spec.namespaces), (1, &policy.spec.pods)]
            .map(|(side, selector)| self.least_used(side, selector.as_ref()));
        let mut filed = Vec::new();
        for namespace in &namespaces {
            for pod in &pods {
                filed.push((*namespace, *pod));
            }
        }
        for (side, labels) in [namespaces, pods].into_iter().enumerate() {
            for label in labels {
                *self.used[side].entry(label).or_default() += 1;
            }
        }
        for place in &filed {
            let names = self.by_labels.entry(*place).or_default();
            names.insert(name.clone());
        }
        self.filed.insert(name.clone(), filed);
    }

    /// The requirement under whose labels the fewest policies are filed so far.
    fn least_used(&self, side: usize, selector: Option<&LabelSelector>) -> Vec<Label> {
        let uses = |wanted: &Vec<Label>| -> usize {
            let uses = |label| self.used[side].get(label).copied().unwrap_or_default();
            wanted.iter().map(uses).sum()
        };
        let least = selector.and_then(|selector| required(selector).min_by_key(uses));
        least.unwrap_or_else(|| vec![ANY])
    }

    pub(super) fn remove(&mut self, policy: &Arc<str>) {
        let filed = self.filed.remove(policy).unwrap_or_default();
        let namespaces: BTreeSet<Label> = filed.iter().map(|place| place.0).collect();
        let pods: BTreeSet<Label> = filed.iter().map(|place| place.1).collect();
        for (side, labels) in [namespaces, pods].into_iter().enumerate() {
            for label in labels {
                if let Some(uses) = self.used[side].get_mut(&label) {
                    *uses -= 1;
                    if *uses == 0 {
                        self.used[side].remove(&label);
                    }
                }
            }
        }
        for place in filed {
            if let Some(names) = self.by_labels.get_mut(&place) {
                names.remove(policy);
                if names.is_empty() {
                    self.by_labels.remove(&place);
                }
            }
        }
    }

    /// The policies that may select a pod with these labels in a namespace with those, each once, and some that do not.
    pub(super) fn of(&self, namespace: &Labels, pod: &Labels) -> BTreeSet<&Arc<str>> {
        let carried = |side: usize, all: &Labels| -> Vec<Label> {
            let used = |label: &Label| self.used[side].contains_key(label);
            [ANY].into_iter().chain(labels(all)).filter(used).collect()
        };
        let (namespaces, pods) = (carried(0, namespace), carried(1, pod));
        let places = namespaces
            .iter()
            .flat_map(|namespace| pods.iter().map(move |pod| (*namespace, *pod)));
        places
            .filter_map(|place| self.by_labels.get(&place))
            .flatten()
            .collect()
    }
}
