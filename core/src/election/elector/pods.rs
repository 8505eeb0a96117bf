//! Pods that the API server does not know all of yet: their nodes say their addresses, gateways that they go by them.

use std::collections::BTreeSet;

use super::Elector;
use crate::election::gossip::Registers;
use crate::election::peer::{BootId, PodAddresses, Topic, Word};
use crate::model::{NodeName, ObjectKey};

impl Elector {
    /// Says a pod's addresses, of a pod of this node; nothing, if the API server says them too.
    pub fn say_pod(&mut self, pod: &ObjectKey, addresses: Option<PodAddresses>) {
        let word = addresses.filter(PodAddresses::is_bounded).map(Word::Pod);
        self.own.set(&Topic::Pod(pod.clone()), word);
    }

    /// Says that this node's kernel goes by what another says of its pod.
    pub fn say_known(&mut self, pod: &ObjectKey, digest: u64) {
        self.own
            .set(&Topic::Pod(pod.clone()), Some(Word::Knows(digest)));
    }

    /// Takes that back, if it has said so.
    pub fn unsay_known(&mut self, pod: &ObjectKey) {
        if matches!(self.own.pod(pod), Some(Word::Knows(_))) {
            self.own.set(&Topic::Pod(pod.clone()), None);
        }
    }

    /// What this node says of a pod of its own.
    pub fn own_pod(&self, pod: &ObjectKey) -> Option<&PodAddresses> {
        addresses(&self.own, pod)
    }

    /// What other nodes say of a pod: each what it said last.
    pub fn pod<'a>(
        &'a self,
        pod: &'a ObjectKey,
    ) -> impl Iterator<Item = (&'a NodeName, &'a PodAddresses)> {
        self.peers.iter().filter_map(move |(node, peer)| {
            let registers = peer.registers.as_ref()?;
            Some((node, addresses(registers, pod)?))
        })
    }

    /// Whether a node's kernel goes by these addresses of a pod.
    pub fn knows_pod(&self, node: &NodeName, pod: &ObjectKey, digest: u64) -> bool {
        let word = self.registers(node).and_then(|said| said.pod(pod));
        matches!(word, Some(Word::Knows(known)) if *known == digest)
    }

    /// Notes the run that a node is in: what the run before has said of pods
    /// is taken back with it.
    pub(super) fn enter(&mut self, node: &NodeName, boot: BootId) -> bool {
        let peer = self.peers.entry(node.clone()).or_default();
        let before = peer.registers.as_ref().filter(|it| it.boot != boot);
        let pods: Vec<ObjectKey> = before
            .into_iter()
            .flat_map(Registers::own_pods)
            .cloned()
            .collect();
        let is_fresh = peer.set_boot(boot);
        if is_fresh {
            self.pods_dirty.extend(pods);
        }
        is_fresh
    }

    /// The pods of which others have said something new, or taken it back.
    pub fn take_pods(&mut self) -> BTreeSet<ObjectKey> {
        std::mem::take(&mut self.pods_dirty)
    }
}

fn addresses<'a>(registers: &'a Registers, pod: &ObjectKey) -> Option<&'a PodAddresses> {
    match registers.pod(pod)? {
        Word::Pod(addresses) => Some(addresses),
        Word::Group(_) | Word::Held(_) | Word::Knows(_) => None,
    }
}
