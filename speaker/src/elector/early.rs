//! Other nodes' pods, as their nodes know them, laid over what the API server says.
//!
//! A pod's node hears of its addresses from the CNI plugin, before the pod runs; the API server says them a second later. The
//! pod's gateway is another node as a rule, and drops what it does not know: so the pod's node tells the others, and the plugin
//! waits until the gateway goes by it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use landfall_core::egress::EgressIndex;
use landfall_core::election::PodAddresses;
use landfall_core::model::{Event, Kind, NodeName, Object, ObjectId, ObjectKey, Pod};

use super::Speaker;
use super::calls::is_so;
use crate::egress::PolicyName;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Early {
    pods: BTreeMap<ObjectKey, Told>,
    /// Pods that the API server knows no addresses of yet: the index of tenants keeps none of them.
    waiting: BTreeMap<ObjectKey, Pod>,
    /// Pods whose node is another than who was heard: there may be one to hear.
    again: BTreeSet<ObjectKey>,
}

/// A pod whose node has said its addresses.
#[derive(Debug)]
struct Told {
    node: NodeName,
    said: PodAddresses,
    /// Its node still says so. It takes that back when it has heard it from the API server, which may be too soon for here.
    stands: bool,
    /// This node's kernel goes by it, and others were told so.
    known: bool,
    /// The pod, as the API server knows it.
    object: Option<Pod>,
}

impl Told {
    /// Whether an object is of the very pod, on the node that has spoken of it.
    fn is_of(&self, object: &Pod) -> bool {
        let same =
            self.said.uid.is_empty() || object.uid.is_empty() || *self.said.uid == *object.uid;
        same && object.node.as_ref() == Some(&self.node) && !object.host_network
    }

    /// Whether its node takes back what the API server has not said here.
    fn may_be_too_soon(&self) -> bool {
        let object = self.object.as_ref().filter(|object| self.is_of(object));
        object.is_some_and(|object| object.addresses.is_empty()) && !self.said.addresses.is_empty()
    }

    /// The pod with the addresses that it has, if it is known.
    fn merged(&self) -> Option<Pod> {
        let mut pod = self.object.clone()?;
        if self.is_of(&pod) {
            pod.addresses = self.said.addresses.iter().copied().collect();
        }
        Some(pod)
    }
}

impl Early {
    /// What an event of the API server's means for judging pods; the event itself, if no node has said more. `known` are the
    /// pods that have addresses.
    pub(super) fn adapt(&mut self, event: &Event, known: &EgressIndex) -> Option<Event> {
        match event {
            Event::Apply(Object::Pod(object)) => {
                let Some(told) = self.pods.get_mut(&object.key) else {
                    // One that had addresses has ended.
                    let has_begun = known.pod(&object.key).is_some();
                    if object.addresses.is_empty() && !object.host_network && !has_begun {
                        self.waiting.insert(object.key.clone(), object.clone());
                    } else {
                        self.waiting.remove(&object.key);
                    }
                    return None;
                };
                told.object = Some(object.clone());
                if !told.is_of(object) {
                    self.again.insert(object.key.clone());
                }
                // What is taken back gives way to the first that the API server says.
                let is_over = !told.stands && !object.addresses.is_empty();
                if is_over || !told.stands && !told.is_of(object) {
                    self.pods.remove(&object.key);
                    return None;
                }
                let merged = told.merged();
                merged.map(|pod| Event::Apply(Object::Pod(pod)))
            }
            Event::Delete(ObjectId::Pod(key)) => {
                self.pods.remove(key);
                self.waiting.remove(key);
                None
            }
            Event::Unwatched(Kind::Pod) => {
                self.pods.retain(|_, told| told.stands);
                for told in self.pods.values_mut() {
                    told.object = None;
                }
                self.waiting.clear();
                None
            }
            Event::Apply(_) | Event::Delete(_) | Event::Synced(_) | Event::Unwatched(_) => None,
        }
    }

    /// Takes in what nodes say of a pod now.
    pub(super) fn hear<'a>(
        &mut self,
        key: &ObjectKey,
        said: impl Iterator<Item = (&'a NodeName, &'a PodAddresses)>,
        known: &EgressIndex,
    ) -> Option<Event> {
        let before = self.pods.remove(key);
        let object = match &before {
            Some(told) => told.object.clone(),
            None => self.waiting.get(key).or_else(|| known.pod(key)).cloned(),
        };
        let known = before.as_ref().is_some_and(|told| told.known);
        let told = match (whose(said, object.as_ref()), before) {
            (Some((node, said)), before) => {
                let same = before.is_some_and(|told| told.said == *said && told.node == *node);
                Told {
                    node: node.clone(),
                    said: said.clone(),
                    stands: true,
                    known: known && same,
                    object,
                }
            }
            (None, Some(before)) if before.may_be_too_soon() => Told {
                stands: false,
                ..before
            },
            (None, None) => return None,
            (None, Some(_)) => return object.map(|object| Event::Apply(Object::Pod(object))),
        };
        let merged = told.merged();
        self.waiting.remove(key);
        self.pods.insert(key.clone(), told);
        merged.map(|pod| Event::Apply(Object::Pod(pod)))
    }

    /// The pods that this node's kernel may go by, and others were not told so yet.
    pub(super) fn unanswered(&self) -> impl Iterator<Item = (&ObjectKey, &PodAddresses)> {
        let pods = self.pods.iter();
        pods.filter(|(_, told)| told.stands && !told.known && !told.said.addresses.is_empty())
            .map(|(key, told)| (key, &told.said))
    }

    /// Others were told that this node's kernel goes by what is said of a pod.
    pub(super) fn answered(&mut self, key: &ObjectKey) {
        if let Some(told) = self.pods.get_mut(key) {
            told.known = true;
        }
    }

    /// Whether a pod's node was told, and that is still so.
    fn is_known(&self, key: &ObjectKey) -> bool {
        let told = self.pods.get(key);
        told.is_some_and(|told| told.stands && told.known)
    }

    /// A pod is this node's own.
    pub(super) fn forget(&mut self, key: &ObjectKey) {
        self.pods.remove(key);
        self.waiting.remove(key);
    }
}

impl Speaker {
    /// Says the addresses of a pod of this node, if the API server does not, and there are egress policies.
    pub(super) fn say_pod(&mut self, pod: &ObjectKey) {
        let matters = !self.plan.has_begun() || self.plan.policies().next().is_some();
        let told = self.election.own_pod(pod).is_some();
        let early = self.attached.early(pod, told);
        let early = early.filter(|_| self.treats_egress() && matters);
        self.election.say_pod(pod, early);
    }

    /// The same after an event about a pod of this node.
    pub(super) fn say_pod_of(&mut self, event: &Event) {
        match event {
            Event::Apply(Object::Pod(pod)) if pod.node.as_ref() == Some(&self.identity.node) => {
                self.say_pod(&pod.key);
            }
            Event::Apply(Object::Pod(pod)) if self.election.own_pod(&pod.key).is_some() => {
                self.election.say_pod(&pod.key, None);
            }
            Event::Delete(ObjectId::Pod(key)) => self.say_pod(key),
            _ => {}
        }
    }

    /// Takes in what other nodes say of their pods.
    pub(super) fn hear_pods(&mut self, now: Duration) {
        let mut heard = self.election.take_pods();
        heard.append(&mut self.early.again);
        if heard.is_empty() || !self.treats_egress() {
            return;
        }
        for pod in heard {
            let event = if self.attached.has(&pod) {
                self.early.forget(&pod);
                None
            } else {
                let said = self.election.pod(&pod);
                self.early.hear(&pod, said, &self.egress)
            };
            if !self.early.is_known(&pod) {
                self.election.unsay_known(&pod);
            }
            if let Some(event) = event {
                self.egress.apply(event);
            }
        }
        self.apply_soon(now);
    }

    /// Other nodes' pods whose gateway this node is, and which it has not said to know.
    pub(super) fn owed(&self) -> impl Iterator<Item = (&ObjectKey, &PodAddresses)> {
        let here = |address: &IpAddr| {
            self.gateways_of(*address)
                .any(|node| *node == self.identity.node)
        };
        let unanswered = self.early.unanswered();
        unanswered.filter(move |(_, said)| said.addresses.iter().any(here))
    }

    /// Says of which of them the kernel knows.
    pub(super) fn answer_nodes(&mut self) {
        if self.owed().next().is_none() {
            return;
        }
        let programs = self.parts.datapath.gateway_in_force().borrow().clone();
        let wanted = self.plan.wanted();
        let is_known = |(pod, said): &(&ObjectKey, &PodAddresses)| {
            said.addresses.iter().all(|address| {
                let judged = self.egress.judged().get(address);
                judged.is_some_and(|judged| judged.pod == **pod)
                    && is_so(*address, wanted, &programs)
            })
        };
        let known: Vec<(ObjectKey, u64)> = self
            .owed()
            .filter(is_known)
            .map(|(pod, said)| (pod.clone(), said.digest()))
            .collect();
        for (pod, digest) in known {
            self.election.say_known(&pod, digest);
            self.early.answered(&pod);
        }
    }

    /// Whether the gateways of a pod of this node go by its addresses, which they may have from this node alone.
    pub(super) fn is_known_at_gateways(&self, pod: &ObjectKey) -> bool {
        let Some(said) = self.election.own_pod(pod) else {
            return true;
        };
        let digest = said.digest();
        let gateways = said.addresses.iter();
        let gateways: BTreeSet<&NodeName> = gateways
            .flat_map(|address| self.gateways_of(*address))
            .collect();
        gateways.into_iter().all(|node| {
            *node == self.identity.node
                || !self.election.is_alive(node)
                || self.election.knows_pod(node, pod, digest)
        })
    }

    /// The node that is the gateway of the policy whose tenant has an address.
    fn gateways_of(&self, address: IpAddr) -> impl Iterator<Item = &NodeName> {
        let wanted = self.plan.wanted();
        let policy = |policy: &PolicyName| wanted.policies.get(policy)?.led_to();
        let tenant = wanted.pods.get(&address).and_then(|pod| pod.policy());
        tenant
            .and_then(policy)
            .map(|gateway| &gateway.node)
            .into_iter()
    }
}

/// Of several nodes that speak of a pod the one that has it.
fn whose<'a>(
    mut said: impl Iterator<Item = (&'a NodeName, &'a PodAddresses)>,
    object: Option<&Pod>,
) -> Option<(&'a NodeName, &'a PodAddresses)> {
    let node = object.and_then(|object| object.node.as_ref());
    let first = said.next()?;
    if node == Some(first.0) {
        return Some(first);
    }
    Some(said.find(|(of, _)| node == Some(*of)).unwrap_or(first))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn mk_pod(uid: &str, node: &str, addresses: &[&str]) -> Pod {
        Pod {
            key: key(),
            uid: uid.into(),
            labels: BTreeMap::new(),
            addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
            node: Some(node.into()),
            host_network: false,
            created: 0,
            terminating: false,
        }
    }

    fn key() -> ObjectKey {
        ObjectKey::new("mail", "a")
    }

    fn said(uid: &str, addresses: &[&str]) -> PodAddresses {
        PodAddresses {
            uid: uid.into(),
            addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
        }
    }

    /// The addresses that a pod is judged by from then on.
    fn addresses(event: Option<Event>) -> Vec<String> {
        match event {
            Some(Event::Apply(Object::Pod(pod))) => {
                pod.addresses.iter().map(ToString::to_string).collect()
            }
            None => Vec::new(),
            other => panic!("{other:?}"),
        }
    }

    fn apply(early: &mut Early, pod: Pod) -> Option<Event> {
        early.adapt(&Event::Apply(Object::Pod(pod)), &EgressIndex::default())
    }

    fn hear(early: &mut Early, said: &[(&str, &PodAddresses)]) -> Option<Event> {
        let nodes: Vec<NodeName> = said.iter().map(|(node, _)| (*node).into()).collect();
        let words = said.iter().map(|(_, word)| *word);
        early.hear(&key(), nodes.iter().zip(words), &EgressIndex::default())
    }

    #[test]
    fn a_pod_is_its_own_nodes_business() {
        let word = said("u1", &["10.0.0.1"]);
        let mut early = Early::default();
        assert_eq!(apply(&mut early, mk_pod("u1", "n1", &[])), None);
        let told = hear(&mut early, &[("n2", &word)]);
        assert_eq!(addresses(told), Vec::<String>::new());
        let told = hear(
            &mut early,
            &[("n2", &said("", &["10.0.0.9"])), ("n1", &word)],
        );
        assert_eq!(addresses(told), ["10.0.0.1"]);
        // The next of its name has nothing of it.
        let next = apply(&mut early, mk_pod("u2", "n1", &[]));
        assert_eq!(addresses(next), Vec::<String>::new());
    }

    #[test]
    fn either_may_be_first() {
        let word = said("u1", &["10.0.0.1"]);
        let mut early = Early::default();
        assert_eq!(hear(&mut early, &[("n1", &word)]), None);
        let told = apply(&mut early, mk_pod("u1", "n1", &[]));
        assert_eq!(addresses(told), ["10.0.0.1"]);
    }

    #[test]
    fn it_ends_when_the_api_server_says_so_and_the_node_has_taken_it_back() {
        for node_first in [false, true] {
            let mut early = Early::default();
            let word = said("", &["10.0.0.1"]);
            apply(&mut early, mk_pod("u1", "n1", &[]));
            hear(&mut early, &[("n1", &word)]);
            assert_eq!(early.unanswered().count(), 1);
            early.answered(&key());
            assert_eq!(early.unanswered().count(), 0);
            let back = |early: &mut Early| {
                let told = hear(early, &[]);
                assert_eq!(addresses(told), ["10.0.0.1"]);
                assert!(!early.is_known(&key()));
            };
            if node_first {
                back(&mut early);
                assert_eq!(early.pods.len(), 1);
            }
            // Whatever it says then: the pod may have others by now.
            let told = apply(&mut early, mk_pod("u1", "n1", &["10.0.0.1"]));
            if node_first {
                assert_eq!(told, None, "it is as the API server says");
            } else {
                assert_eq!(addresses(told), ["10.0.0.1"]);
                assert_eq!(early.pods.len(), 1, "its node still waits");
                back(&mut early);
            }
            assert!(early.pods.is_empty() && early.waiting.is_empty());
        }
    }
    /// A pod of that name is made anew on another node, whose word comes before the API server's.
    #[test]
    fn who_has_the_pod_is_heard_when_that_is_known() {
        let mut early = Early::default();
        let (old, new) = (said("u1", &[]), said("u2", &["10.0.0.2"]));
        let both = [("n1", &old), ("n2", &new)];
        assert_eq!(hear(&mut early, &both), None);
        apply(&mut early, mk_pod("u2", "n2", &[]));
        assert_eq!(early.again, [key()].into());
        assert_eq!(addresses(hear(&mut early, &both)), ["10.0.0.2"]);
        // Nobody's word is left of one that nobody knows.
        early.forget(&key());
        hear(&mut early, &both);
        assert_eq!(hear(&mut early, &[]), None);
        assert!(early.pods.is_empty() && early.waiting.is_empty());
    }
}
