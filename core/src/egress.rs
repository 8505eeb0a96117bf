//! Whose tenant a pod is, and which address it leaves by: a synchronous index.
//!
//! ```text
//!  Event ──apply──> EgressIndex ──reconcile──> Changed { addresses, policies }
//!                     │
//!                     ├─ pods, namespaces   and which of them carry a label
//!                     ├─ policies           their rank, their tenants, and which of them ask for a label
//!                     └─ judged             of each pod's address: whose it is, and what it leaves by
//! ```
//!
//! The controller reads [`Report`]s from it, a speaker what its data path is to do: two processes with equal inputs say
//! the same, in whatever order the inputs came. The work of an event grows with what it changes: the pods of a namespace
//! whose labels change, those that a policy that changes selects, not all pods times all policies.
//!
//! What nobody admits fails closed: a pod whose namespace the pool of an address does not admit is a tenant without
//! address. With `fromService` only pods of the Service's own namespace have its address: pods of others could be given
//! the labels that a policy asks for.

mod addresses;
mod choice;
mod explain;
mod inside;
mod judge;
mod lookup;
mod matching;
mod namespaces;
#[cfg(test)]
mod properties;
mod shadow;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use xxhash_rust::xxh64::xxh64;

use crate::ip::Family;
use crate::model::{
    EgressPolicy, Event, Kind, NodeName, Object, ObjectId, ObjectKey, OldFlows, Pod, Pool, Terms,
};
use crate::selector::Labels;
use choice::Rank;
pub use explain::{Cluster, Explanation, Outcome, Topic};
pub use inside::{Networks, Place};
use judge::Offers;
use lookup::{Carriers, Seekers};
pub use shadow::{shadow, shadow_nets, shadows};

/// The label that every namespace carries: its name.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A pod as a policy's tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// The policy.
    pub policy: Arc<str>,
    /// The address it leaves by, of the family of its own; nothing if there is none that it may have.
    pub egress_ip: Option<IpAddr>,
}

/// The kinds that it reads; pods only while there is a policy, namespaces where they are listed.
pub const KINDS: [Kind; 5] = [
    Kind::Namespace,
    Kind::Pool,
    Kind::VirtualIp,
    Kind::EgressPolicy,
    Kind::Pod,
];

/// Whether the index looks at such an object.
fn matters(id: &ObjectId) -> bool {
    match id {
        ObjectId::Namespace(_)
        | ObjectId::Pool(_)
        | ObjectId::VirtualIp(_)
        | ObjectId::EgressPolicy(_)
        | ObjectId::Pod(_) => true,
        ObjectId::Service(_)
        | ObjectId::EndpointSlice(_)
        | ObjectId::Node(_)
        | ObjectId::Advertisement(_)
        | ObjectId::ServiceCidr(_) => false,
    }
}

/// What is known of a pod's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The pod.
    pub pod: ObjectKey,
    /// Tells it from any other that has the address before or after: a hash of its name and UID, not 0.
    pub identity: u64,
    /// Where it runs.
    pub node: Option<NodeName>,
    /// Whose tenant it is; nobody's, if nothing.
    pub tenant: Option<Tenant>,
}

impl Judged {
    /// The identity of a pod.
    pub fn identity_of(pod: &Pod) -> u64 {
        let text = format!("{}/{} {}", pod.key.namespace, pod.key.name, pod.uid);
        xxh64(text.as_bytes(), 0).max(1)
    }
}

/// What became of a policy's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Pods that are its tenants.
    pub matched: usize,
    /// Pods that it selects and that are on the host's network.
    pub host_network: usize,
    /// Pods that it selects and that are tenants of more specific policies: how many of each.
    pub taken: BTreeMap<Arc<str>, usize>,
    /// One of them, with the policy whose tenant it is.
    pub taken_pod: Option<(ObjectKey, Arc<str>)>,
    /// Namespaces that its addresses are not for, with how many tenants each has.
    pub not_admitted: BTreeMap<Arc<str>, usize>,
    /// Families that its tenants have addresses of and it has none of.
    pub lacking: BTreeSet<Family>,
}

/// What [`EgressIndex::reconcile`] changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Pods' addresses that are judged differently, for the first time, or no longer.
    pub addresses: BTreeSet<IpAddr>,
    /// Policies whose [`Report`] may have changed.
    pub policies: BTreeSet<Arc<str>>,
}

/// What the source tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Every namespace has an object: a pod whose namespace is not known (yet) is not judged. Else such a namespace counts
    /// as one that has no label but its name.
    pub namespaces_listed: bool,
}

/// A pod, and the policies that select it, the one whose tenant it is first.
#[derive(Debug)]
struct PodState {
    pod: Pod,
    claims: Vec<Arc<str>>,
}

impl PodState {
    /// Whether it has addresses of its own.
    fn is_matched(&self) -> bool {
        !self.pod.host_network
    }

    /// Where it stands among the pods that have had its addresses, the present one first.
    fn seniority(&self) -> Seniority {
        (
            self.pod.terminating,
            Reverse(self.pod.created),
            self.pod.key.clone(),
        )
    }
}

/// An address may be another pod's before its last pod's object is gone.
type Seniority = (bool, Reverse<i64>, ObjectKey);

#[derive(Debug)]
struct PolicyState {
    policy: EgressPolicy,
    rank: Rank,
    /// By namespace.
    tenants: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    matched: usize,
    /// The tenants' addresses, IPv4 and IPv6.
    families: [usize; 2],
    host_network: BTreeSet<ObjectKey>,
    /// Pods that it selects and that are another's tenants.
    taken: BTreeMap<Arc<str>, BTreeSet<ObjectKey>>,
}

/// An address that policies use.
#[derive(Debug)]
struct Vip {
    pool: Arc<str>,
    policies: Vec<Arc<str>>,
    terms: BTreeMap<Arc<str>, Terms>,
}

/// The index. See the module's documentation.
#[derive(Debug, Default)]
pub struct EgressIndex {
    options: Options,
    synced: BTreeSet<Kind>,
    pods: BTreeMap<ObjectKey, PodState>,
    carriers: Carriers<ObjectKey>,
    /// How many pods a namespace has.
    populations: BTreeMap<Arc<str>, usize>,
    namespaces: BTreeMap<Arc<str>, Labels>,
    namespace_carriers: Carriers<Arc<str>>,
    policies: BTreeMap<Arc<str>, PolicyState>,
    seekers: Seekers,
    pools: BTreeMap<Arc<str>, Pool>,
    vips: BTreeMap<IpAddr, Vip>,
    addresses_of: BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
    owners: BTreeMap<IpAddr, BTreeSet<Seniority>>,
    judged: BTreeMap<IpAddr, Judged>,
    dirty_pods: BTreeSet<ObjectKey>,
    dirty_addresses: BTreeSet<IpAddr>,
    /// Policies whose addresses, or whom they are for, may have changed.
    readdressed: BTreeSet<Arc<str>>,
    changed_policies: BTreeSet<Arc<str>>,
}

fn of_family(address: IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

impl EgressIndex {
    /// An index that knows nothing yet.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// Whether all that a judgement needs was listed: before that a pod may be taken for nobody's.
    pub fn is_synced(&self) -> bool {
        let mut kinds = vec![Kind::Pool, Kind::VirtualIp, Kind::EgressPolicy];
        if self.options.namespaces_listed {
            kinds.push(Kind::Namespace);
        }
        if !self.policies.is_empty() || !self.vips.is_empty() {
            kinds.push(Kind::Pod);
        }
        kinds.iter().all(|kind| self.synced.contains(kind))
    }

    /// Every pod's address that is known, but for the host's network; complete once [`EgressIndex::is_synced`].
    pub fn judged(&self) -> &BTreeMap<IpAddr, Judged> {
        &self.judged
    }

    /// The policies.
    pub fn policies(&self) -> impl Iterator<Item = &EgressPolicy> {
        self.policies.values().map(|state| &state.policy)
    }

    /// A policy.
    pub fn policy(&self, name: &str) -> Option<&EgressPolicy> {
        Some(&self.policies.get(name)?.policy)
    }

    /// The addresses that are on record for a policy, with those that its flows alone leave by.
    pub fn addresses_of(&self, policy: &str) -> impl Iterator<Item = IpAddr> {
        self.addresses_of.get(policy).into_iter().flatten().copied()
    }

    /// The addresses by which flows of a policy go on to their end and none begins: all that it had, if it is gone; none,
    /// if these were to be cut then.
    pub fn draining(&self, policy: &str) -> BTreeSet<IpAddr> {
        let is_there = self.policies.contains_key(policy);
        let drains = |address: &IpAddr| match self.vips[address].terms.get(policy) {
            Some(terms) if is_there => terms.drains,
            Some(terms) => terms.on_delete == OldFlows::Keep,
            None => !is_there,
        };
        self.addresses_of(policy).filter(drains).collect()
    }

    /// The policies that are gone and whose flows go on.
    pub fn gone(&self) -> impl Iterator<Item = &Arc<str>> {
        let named = self.addresses_of.keys();
        named.filter(|name| !self.policies.contains_key(*name) && !self.draining(name).is_empty())
    }

    /// The addresses that pods of a policy leave by.
    fn offered(&self, policy: &str) -> impl Iterator<Item = IpAddr> {
        let drains = self.draining(policy);
        let all = self.addresses_of.get(policy).into_iter().flatten();
        all.copied()
            .filter(move |address| !drains.contains(address))
    }

    /// A pod, as it was last told of.
    pub fn pod(&self, key: &ObjectKey) -> Option<&Pod> {
        self.pods.get(key).map(|state| &state.pod)
    }

    /// Takes in an event that is another's too, if it matters.
    pub fn apply_shared(&mut self, event: &Event) {
        let about = match event {
            Event::Apply(object) => matters(&object.id()),
            Event::Delete(id) => matters(id),
            Event::Synced(kind) | Event::Unwatched(kind) => KINDS.contains(kind),
        };
        if about {
            self.apply(event.clone());
        }
    }

    /// Takes an event in.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Apply(object) => self.apply_object(object),
            Event::Delete(id) => self.delete(&id),
            Event::Synced(kind) => {
                self.synced.insert(kind);
            }
            Event::Unwatched(kind) => {
                self.synced.remove(&kind);
                if kind == Kind::Pod {
                    let keys: Vec<_> = self.pods.keys().cloned().collect();
                    for key in keys {
                        self.forget_pod(&key);
                    }
                }
            }
        }
    }

    fn apply_object(&mut self, object: Object) {
        match object {
            Object::Pod(pod) => self.apply_pod(pod),
            Object::EgressPolicy(policy) => self.apply_policy(*policy),
            Object::Namespace(namespace) => {
                self.set_namespace(&namespace.name, Some(namespace.labels));
            }
            Object::Pool(pool) => {
                let name = pool.name.clone();
                let before = self.pools.insert(name.clone(), pool);
                let rules = |pool: &Pool| (pool.purpose, pool.allocation.clone());
                if before.as_ref().map(rules) != self.pools.get(&name).map(rules) {
                    self.touch_pool(&name);
                }
            }
            Object::VirtualIp(vip) => self.apply_virtual_ip(vip),
            Object::Service(_)
            | Object::EndpointSlice(_)
            | Object::Node(_)
            | Object::Advertisement(_)
            | Object::ServiceCidr(_) => {}
        }
    }

    fn delete(&mut self, id: &ObjectId) {
        match id {
            ObjectId::Pod(key) => self.forget_pod(key),
            ObjectId::EgressPolicy(name) => self.forget_policy(name),
            ObjectId::Namespace(name) => self.set_namespace(name, None),
            ObjectId::Pool(name) => {
                if self.pools.remove(name).is_some() {
                    self.touch_pool(name);
                }
            }
            ObjectId::VirtualIp(address) => self.forget_virtual_ip(*address),
            ObjectId::Service(_)
            | ObjectId::EndpointSlice(_)
            | ObjectId::Node(_)
            | ObjectId::Advertisement(_)
            | ObjectId::ServiceCidr(_) => {}
        }
    }

    fn apply_pod(&mut self, pod: Pod) {
        if self
            .pods
            .get(&pod.key)
            .is_some_and(|state| state.pod == pod)
        {
            return;
        }
        self.forget_pod(&pod.key);
        if pod.addresses.is_empty() {
            return; // It has not begun, or has ended.
        }
        let namespace = pod.key.namespace.clone();
        if !self.options.namespaces_listed && !self.namespaces.contains_key(&namespace) {
            self.set_namespace(&namespace, Some(Labels::new()));
        }
        let key = pod.key.clone();
        self.carriers.insert(&pod.labels, &key);
        *self.populations.entry(namespace).or_default() += 1;
        let state = PodState {
            pod,
            claims: Vec::new(),
        };
        if state.is_matched() {
            for address in &state.pod.addresses {
                let owners = self.owners.entry(*address).or_default();
                owners.insert(state.seniority());
                self.dirty_addresses.insert(*address);
            }
        }
        self.pods.insert(key.clone(), state);
        self.dirty_pods.insert(key);
    }

    fn forget_pod(&mut self, key: &ObjectKey) {
        self.withdraw(key);
        let Some(state) = self.pods.remove(key) else {
            return;
        };
        self.dirty_pods.remove(key);
        self.carriers.remove(&state.pod.labels, key);
        if let Some(count) = self.populations.get_mut(&key.namespace) {
            *count -= 1;
            if *count == 0 {
                self.populations.remove(&key.namespace);
            }
        }
        for address in &state.pod.addresses {
            if let Some(owners) = self.owners.get_mut(address) {
                owners.remove(&state.seniority());
                if owners.is_empty() {
                    self.owners.remove(address);
                }
                self.dirty_addresses.insert(*address);
            }
        }
    }

    fn apply_policy(&mut self, policy: EgressPolicy) {
        let name = policy.name.clone();
        self.changed_policies.insert(name.clone());
        if let Some(state) = self.policies.get_mut(&name) {
            let before = std::mem::replace(&mut state.policy, policy);
            let spec = &state.policy.spec;
            if before.spec.source != spec.source {
                self.readdressed.insert(name.clone());
            }
            if before.spec.namespaces == spec.namespaces && before.spec.pods == spec.pods {
                return;
            }
            state.rank = Rank::of(&state.policy);
            let state = &self.policies[&name];
            self.seekers.remove(&name);
            self.seekers.insert(&state.policy);
            let held = selected(state);
            self.dirty_pods.extend(held);
        } else {
            self.seekers.insert(&policy);
            let state = PolicyState {
                rank: Rank::of(&policy),
                policy,
                tenants: BTreeMap::new(),
                matched: 0,
                families: [0; 2],
                host_network: BTreeSet::new(),
                taken: BTreeMap::new(),
            };
            self.policies.insert(name.clone(), state);
        }
        let found = self.could_match(&self.policies[&name].policy);
        self.dirty_pods.extend(found);
    }

    fn forget_policy(&mut self, name: &Arc<str>) {
        let Some(state) = self.policies.get(name) else {
            return;
        };
        // Its books go with it, and another of its name begins with none.
        for key in selected(state) {
            self.withdraw(&key);
            self.dirty_pods.insert(key);
        }
        self.policies.remove(name);
        self.seekers.remove(name);
        self.changed_policies.insert(name.clone());
        self.readdressed.remove(name);
    }

    /// Brings all judgements up to date and returns what changed.
    pub fn reconcile(&mut self) -> Changed {
        for key in std::mem::take(&mut self.dirty_pods) {
            self.match_pod(&key);
        }
        for policy in std::mem::take(&mut self.readdressed) {
            self.changed_policies.insert(policy.clone());
            let Some(state) = self.policies.get(&policy) else {
                continue;
            };
            for (namespace, names) in &state.tenants {
                for name in names {
                    let key = ObjectKey::new(namespace.clone(), name.clone());
                    let addresses = self.pods.get(&key).map(|state| &state.pod.addresses);
                    self.dirty_addresses
                        .extend(addresses.into_iter().flatten().copied());
                }
            }
        }
        let mut offers = Offers::new();
        let mut addresses = BTreeSet::new();
        for address in std::mem::take(&mut self.dirty_addresses) {
            let judged = self.judge(address, &mut offers);
            if self.judged.get(&address) == judged.as_ref() {
                continue;
            }
            match judged {
                Some(judged) => self.judged.insert(address, judged),
                None => self.judged.remove(&address),
            };
            addresses.insert(address);
        }
        Changed {
            addresses,
            policies: std::mem::take(&mut self.changed_policies),
        }
    }
}

/// The pods that a policy selects.
fn selected(state: &PolicyState) -> Vec<ObjectKey> {
    let tenants = state.tenants.iter().flat_map(|(namespace, names)| {
        names
            .iter()
            .map(|name| ObjectKey::new(namespace.clone(), name.clone()))
    });
    let taken = state.taken.values().flatten().cloned();
    tenants
        .chain(taken)
        .chain(state.host_network.iter().cloned())
        .collect()
}
