//! Which Service, or which egress policy, holds which address: a synchronous index that knows no client.
//!
//! ```text
//!  Event ──apply──> Ipam ──reconcile──> Changes { records, services, pools, policies }
//!                    │
//!                    ├─ services     what was observed, what each wants, what was last said about it
//!                    ├─ policies     the same of egress policies
//!                    ├─ ledger       holders, resting addresses, groups, and the pools' free sets
//!                    └─ virtual_ips  the records that were observed
//! ```
//!
//! Feed it every event of the kinds in [`Config::kinds`], call [`Ipam::reconcile`] after each batch and at
//! [`Ipam::next_wakeup`], and write what comes out. Nothing is allocated before every kind was
//! [`Event::Synced`]: then what records and statuses say is replayed first, and only then do Services without
//! address get one. The outcome depends on the objects, never on the order in which they came.
//!
//! What was written must come back as an event: a Service's ingress is asked for only once the record of its
//! addresses was *observed*, and an address is handed to somebody else only once its old record is gone. So
//! no crash between two writes can leave an address with two owners. Whoever has no API server feeds each
//! [`RecordChange`] straight back as an event of its own.
//!
//! An egress policy holds addresses of its own as a Service does, or uses those of a Service: then it is on their
//! records beside it, and has what the Service has.
//!
//! Rules beyond `MetalLB`'s: pools are tried in a fixed order, tenancy fails closed, freed addresses rest, and a
//! Service keeps an address that works while a wish of its owner cannot be granted.

mod decide;
mod emit;
mod free;
mod ledger;
mod pick;
mod policies;
mod policy_refusal;
mod pool;
mod pools;
#[cfg(test)]
mod properties;
mod quarantine;
mod refusal;
mod replay;
mod request;
mod sharing;
mod status;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::model::{
    Event, Holder, Kind, Namespace, Node, NodeName, Object, ObjectId, ObjectKey, OldFlows, Pool,
    Service, VirtualIp,
};
use crate::selector::Labels;
pub use policy_refusal::PolicyRefusal;
pub use refusal::Refusal;
pub use request::CLASS;
pub use sharing::SharingConflict;
pub use status::{
    ADDRESS_ASSIGNED, ANNOUNCED, Allocation, Changes, Counts, Notice, Overlap, PolicyChange,
    PoolStatus, Record, RecordChange, ServiceStatus, VIRTUAL_IP_ANNOUNCED,
};

use decide::Outcome;
use emit::{Observed, Said};
use ledger::Ledger;
use policies::PolicyState;

/// How the index behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whether Services without `spec.loadBalancerClass` are ours.
    pub class_less: bool,
    /// The kinds that must have been listed before anything is allocated. Without [`Kind::Namespace`] every
    /// namespace counts as one without labels.
    pub kinds: BTreeSet<Kind>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            class_less: true,
            kinds: BTreeSet::from([
                Kind::Service,
                Kind::Namespace,
                Kind::Pool,
                Kind::Node,
                Kind::VirtualIp,
                Kind::EgressPolicy,
            ]),
        }
    }
}

/// A Service and what became of it.
#[derive(Debug)]
struct ServiceState {
    service: Arc<Service>,
    held: Vec<IpAddr>,
    outcome: Outcome,
    /// Addresses that its status carried by our doing; they are not another controller's.
    known: BTreeSet<IpAddr>,
    /// What was last asked to be written, and over which observation.
    said: Option<(Said, Observed)>,
    /// What the last Event, or the status found at start, was about.
    notified: Option<crate::model::Condition>,
    /// The Event to record with the next status.
    lost: Vec<decide::Loss>,
}

/// The index. See the module's documentation.
#[derive(Debug, Default)]
pub struct Ipam {
    config: Config,
    synced: BTreeSet<Kind>,
    ready: bool,
    services: BTreeMap<ObjectKey, ServiceState>,
    policies: BTreeMap<Arc<str>, PolicyState>,
    namespaces: BTreeMap<Arc<str>, Labels>,
    nodes: BTreeMap<NodeName, Node>,
    service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
    virtual_ips: BTreeMap<IpAddr, VirtualIp>,
    ledger: Ledger,
    /// Which Services' observed ingress shows an address.
    shown: BTreeMap<IpAddr, BTreeSet<ObjectKey>>,
    /// To be decided (anew), in this order.
    dirty: BTreeSet<(i64, Holder)>,
    /// Holders that lack something they want.
    wanting: BTreeSet<(i64, Holder)>,
    /// Services whose status is to be compared with what it should be.
    touched: BTreeSet<ObjectKey>,
    /// Policies that the reader is to look at.
    touched_policies: BTreeSet<Arc<str>>,
    /// Services that are gone from us, with what they were told last.
    farewell: Vec<ServiceStatus>,
    records_said: BTreeMap<IpAddr, RecordChange>,
    pools_said: BTreeMap<Arc<str>, PoolStatus>,
    overlaps: Option<BTreeMap<Arc<str>, BTreeSet<Overlap>>>,
}

impl Ipam {
    /// An index that knows nothing yet.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// Whether every kind was listed and what was found is replayed; before that nothing is decided.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Takes an event in. `now` is monotonic; its origin does not matter.
    pub fn apply(&mut self, event: Event, now: Duration) {
        match event {
            Event::Apply(object) => match object {
                Object::Service(service) => self.apply_service(service),
                Object::Namespace(namespace) => self.apply_namespace(namespace),
                Object::Pool(pool) => self.apply_pool(pool),
                Object::Node(node) => self.apply_node(node),
                Object::VirtualIp(vip) => self.apply_virtual_ip(vip, now),
                Object::EgressPolicy(policy) => self.apply_policy(*policy),
                Object::ServiceCidr(cidr) => self.set_service_cidr(&cidr.name, Some(cidr.cidrs)),
                Object::EndpointSlice(_) | Object::Advertisement(_) | Object::Pod(_) => {}
            },
            Event::Delete(id) => match id {
                ObjectId::Service(key) => self.delete_service(&key, now),
                ObjectId::Namespace(name) => {
                    self.namespaces.remove(&name);
                }
                ObjectId::Pool(name) => self.delete_pool(&name),
                ObjectId::Node(name) => self.delete_node(&name),
                ObjectId::VirtualIp(address) => self.delete_virtual_ip(address),
                ObjectId::EgressPolicy(name) => self.delete_policy(&name, now),
                ObjectId::ServiceCidr(name) => self.set_service_cidr(&name, None),
                ObjectId::EndpointSlice(_) | ObjectId::Advertisement(_) | ObjectId::Pod(_) => {}
            },
            Event::Unwatched(_) => {}
            Event::Synced(kind) => {
                self.synced.insert(kind);
                // After a new listing an observation may have skipped what happened in between: compare anew.
                match kind {
                    Kind::Service => {
                        for (key, state) in &mut self.services {
                            state.said = None;
                            self.touched.insert(key.clone());
                        }
                    }
                    Kind::VirtualIp => {
                        self.ledger.touched_records.extend(self.records_said.keys());
                        self.records_said.clear();
                    }
                    Kind::EndpointSlice
                    | Kind::Node
                    | Kind::Namespace
                    | Kind::Pool
                    | Kind::Advertisement
                    | Kind::EgressPolicy
                    | Kind::Pod
                    | Kind::ServiceCidr => {}
                }
            }
        }
    }

    /// Decides what is open and returns what should be written that was not asked for yet.
    pub fn reconcile(&mut self, now: Duration) -> Changes {
        if !self.ready {
            if !self.config.kinds.is_subset(&self.synced) {
                return Changes::default();
            }
            self.replay(now);
            self.ready = true;
        }
        let Self {
            ledger,
            virtual_ips,
            shown,
            ..
        } = self;
        ledger.end_rests(now, &|address| {
            virtual_ips.contains_key(&address) || shown.contains_key(&address)
        });
        loop {
            while let Some((_, holder)) = self.dirty.pop_first() {
                self.decide(&holder, now);
            }
            if !std::mem::take(&mut self.ledger.freed) {
                break;
            }
            self.dirty.clone_from(&self.wanting);
            if self.dirty.is_empty() {
                break;
            }
        }
        self.emit(now)
    }

    /// When to call [`Ipam::reconcile`] next though no event came.
    pub fn next_wakeup(&self) -> Option<Duration> {
        self.ready
            .then(|| self.ledger.quarantine().next_deadline())
            .flatten()
    }

    /// The addresses that Services hold, each with its record.
    pub fn assignments(&self) -> impl Iterator<Item = Record> {
        self.ledger
            .holdings()
            .filter_map(|(address, _)| self.ledger.record(address))
    }

    /// The addresses that rest, each with its record and when that ends.
    pub fn resting(&self) -> impl Iterator<Item = (Record, Duration)> {
        self.ledger
            .quarantine()
            .iter()
            .filter_map(|(address, rest)| Some((self.ledger.record(address)?, rest.until)))
    }

    /// The Services that were refused something, with what.
    pub fn refusals(&self) -> impl Iterator<Item = (&ObjectKey, &Refusal)> {
        self.services
            .iter()
            .filter_map(|(key, state)| match &state.outcome {
                Outcome::Refused(refusal)
                | Outcome::Assigned {
                    wish: Some(refusal),
                } => Some((key, refusal)),
                Outcome::Undecided
                | Outcome::NotOurs
                | Outcome::Foreign(_)
                | Outcome::Assigned { wish: None } => None,
            })
    }

    /// The status of every pool.
    pub fn pool_statuses(&self) -> impl Iterator<Item = PoolStatus> {
        self.ledger
            .pools
            .in_order()
            .map(|state| self.pool_status(state))
    }

    /// The record of an address, as last observed.
    pub fn virtual_ip(&self, address: IpAddr) -> Option<&VirtualIp> {
        self.virtual_ips.get(&address)
    }

    /// How many Services of type `LoadBalancer` are known.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    fn apply_service(&mut self, service: Service) {
        let key = service.key.clone();
        let rank = (service.created, Holder::Service(key.clone()));
        if let Some(state) = self.services.get_mut(&key) {
            if *state.service == service {
                return;
            }
            if state.service.created != service.created {
                let stale = (state.service.created, Holder::Service(key.clone()));
                self.dirty.remove(&stale);
                self.wanting.remove(&stale);
            }
            let before = std::mem::replace(&mut state.service, Arc::new(service));
            let status_same = before.ingress == state.service.ingress
                && before.conditions == state.service.conditions;
            if !status_same || before.uid != state.service.uid {
                state.said = None;
            }
            let after = state.service.clone();
            self.show(&before, &after);
            // Our own status coming back changes nothing that is decided by, save that it may be another's.
            let spec_same = status_same || {
                let mut with_status = (*before).clone();
                with_status.ingress.clone_from(&after.ingress);
                with_status.conditions.clone_from(&after.conditions);
                with_status == *after
            };
            let state = &self.services[&key];
            let expected = after.ingress.iter().all(|entry| {
                entry
                    .address
                    .is_some_and(|address| state.held.contains(&address))
            });
            let decided = matches!(
                state.outcome,
                Outcome::Assigned { .. } | Outcome::Refused(_)
            );
            if spec_same && !status_same && expected && decided {
                self.touched.insert(key);
                return;
            }
            self.dirty.insert(rank);
            return;
        }
        if !service.load_balancer {
            return;
        }
        for address in service.ingress.iter().filter_map(|entry| entry.address) {
            self.shown.entry(address).or_default().insert(key.clone());
        }
        let notified = service
            .conditions
            .iter()
            .find(|condition| condition.kind == ADDRESS_ASSIGNED)
            .cloned();
        // Our own condition on it says that its ingress is of our making, unless a record says otherwise.
        let known = match &notified {
            Some(condition) if condition.status == "True" => service
                .ingress
                .iter()
                .filter_map(|entry| entry.address)
                .collect(),
            _ => BTreeSet::new(),
        };
        self.services.insert(
            key,
            ServiceState {
                service: Arc::new(service),
                held: Vec::new(),
                outcome: Outcome::Undecided,
                known,
                said: None,
                notified,
                lost: Vec::new(),
            },
        );
        self.dirty.insert(rank);
    }

    /// Keeps `shown` in step, and looks again at the records of what is no longer shown.
    fn show(&mut self, before: &Service, after: &Service) {
        for address in before.ingress.iter().filter_map(|entry| entry.address) {
            self.hide(address, &before.key);
        }
        for address in after.ingress.iter().filter_map(|entry| entry.address) {
            self.shown
                .entry(address)
                .or_default()
                .insert(after.key.clone());
        }
    }

    fn hide(&mut self, address: IpAddr, key: &ObjectKey) {
        if let Some(keys) = self.shown.get_mut(&address) {
            keys.remove(key);
            if keys.is_empty() {
                self.shown.remove(&address);
            }
        }
        self.ledger.touched_records.insert(address);
    }

    /// Forgets a Service that is gone, or is merely no longer of type `LoadBalancer`: a source that selects by
    /// type cannot tell the two apart, so what was written to it is asked to be removed in either case.
    fn delete_service(&mut self, key: &ObjectKey, now: Duration) {
        self.say_farewell(key);
        let Some(state) = self.services.remove(key) else {
            return;
        };
        let holder = Holder::Service(key.clone());
        let rank = (state.service.created, holder.clone());
        self.touched_policies
            .extend(self.ledger.followers(key).cloned());
        self.dirty.remove(&rank);
        self.wanting.remove(&rank);
        self.touched.remove(key);
        for address in state
            .service
            .ingress
            .iter()
            .filter_map(|entry| entry.address)
        {
            self.hide(address, key);
        }
        for address in state.held {
            self.let_go(&holder, address, now);
        }
    }

    fn apply_namespace(&mut self, namespace: Namespace) {
        let Namespace { name, labels } = namespace;
        if self.namespaces.get(&name) == Some(&labels) {
            return;
        }
        self.namespaces.insert(name.clone(), labels);
        let from = ObjectKey::new(name.clone(), "");
        let members = self
            .services
            .range(from..)
            .take_while(|(key, _)| key.namespace == name)
            .map(|(key, state)| (state.service.created, Holder::Service(key.clone())));
        self.dirty.extend(members);
    }

    fn all_dirty(&mut self) {
        let all = self
            .services
            .iter()
            .map(|(key, state)| (state.service.created, Holder::Service(key.clone())));
        self.dirty.extend(all);
        let all = self
            .policies
            .iter()
            .map(|(name, state)| (state.policy.created, Holder::EgressPolicy(name.clone())));
        self.dirty.extend(all);
        self.overlaps = None;
    }

    fn apply_pool(&mut self, mut pool: Pool) {
        if let Some(state) = self.ledger.pools.get(&pool.name)
            && pool.flaw.is_some()
        {
            // An edit that cannot be read takes nothing away: the last good addresses stay.
            pool.ranges.clone_from(&state.spec.ranges);
        }
        if let Some(state) = self.ledger.pools.get(&pool.name)
            && state.spec == pool
        {
            return;
        }
        let name = pool.name.clone();
        let of_pool = self.ledger.of_pool(&name);
        self.losing_followers(of_pool, |ledger| ledger.put_pool(pool));
        self.all_dirty();
    }

    fn delete_pool(&mut self, name: &Arc<str>) {
        let of_pool = self.ledger.of_pool(name);
        self.losing_followers(of_pool, |ledger| ledger.remove_pool(name));
        self.pools_said.remove(name);
        self.all_dirty();
    }

    fn apply_node(&mut self, node: Node) {
        let before = self.nodes.get(&node.name);
        if before.is_some_and(|before| {
            before.addresses == node.addresses && before.pod_cidrs == node.pod_cidrs
        }) {
            return;
        }
        let before = before
            .map(|before| before.addresses.clone())
            .unwrap_or_default();
        self.ledger.set_node(&node.name, &before, &node.addresses);
        self.nodes.insert(node.name.clone(), node);
        self.overlaps = None;
    }

    fn delete_node(&mut self, name: &NodeName) {
        if let Some(node) = self.nodes.remove(name) {
            self.ledger.set_node(name, &node.addresses, &[]);
            self.overlaps = None;
        }
    }

    fn set_service_cidr(&mut self, name: &Arc<str>, cidrs: Option<Vec<IpNet>>) {
        let before = match cidrs {
            Some(cidrs) => self.service_cidrs.insert(name.clone(), cidrs),
            None => self.service_cidrs.remove(name),
        };
        if before.as_ref() != self.service_cidrs.get(name) {
            self.overlaps = None;
        }
    }

    fn apply_virtual_ip(&mut self, vip: VirtualIp, now: Duration) {
        let address = vip.address;
        let before = self.virtual_ips.insert(address, vip);
        let vip = &self.virtual_ips[&address];
        if before.as_ref() == Some(vip) {
            return;
        }
        self.touched.extend(vip.services.iter().cloned());
        let policies = vip.egress_policies.iter();
        let were = before.iter().flat_map(|vip| &vip.egress_policies);
        self.touched_policies.extend(policies.chain(were).cloned());
        self.records_said.remove(&address);
        self.ledger.touched_records.insert(address);
        if self.ready {
            // It is said once the record says that flows drain; what was said before that is not about these.
            let said = |policy: &&Arc<str>| {
                let known = before.as_ref();
                known.is_none_or(|before| !before.drained.contains(*policy)) && vip.drains(policy)
            };
            for policy in vip.drained.iter().filter(said) {
                self.ledger.drained(address, policy, now);
            }
            self.adopt_orphan(address, now);
        }
    }

    /// A record that nobody holds and that does not rest is somebody's leftover: it rests before it goes.
    fn adopt_orphan(&mut self, address: IpAddr, now: Duration) {
        if self.ledger.holding(address).is_some() || self.ledger.quarantine().get(address).is_some()
        {
            return;
        }
        if let Some(vip) = self.virtual_ips.get(&address) {
            let holders = vip.holders().into_iter();
            let former = holders.chain(vip.former_holders()).collect();
            let (pool, group) = (vip.pool.clone(), vip.group.clone());
            self.ledger.rest(address, &pool, former, group, now);
        }
    }

    /// Flows of policies that a record names, and that do not leave by the address any more, go on to their end.
    fn adopt_drains(&mut self, address: IpAddr) {
        let Some(vip) = self
            .virtual_ips
            .get(&address)
            .filter(|vip| vip.was_reported())
        else {
            return;
        };
        for policy in &vip.egress_policies {
            let leaves = |holding| self.ledger.policies_of(holding).contains(policy);
            let terms = vip.terms.get(policy).cloned().unwrap_or_default();
            let cut = terms.on_delete == OldFlows::Cut && !self.policies.contains_key(policy);
            let over = vip.drains(policy) && vip.drained.contains(policy);
            if !cut && !over && !self.ledger.holding(address).is_some_and(leaves) {
                self.ledger.drain_on_record(vip, policy, terms);
            }
        }
    }

    fn delete_virtual_ip(&mut self, address: IpAddr) {
        if let Some(vip) = self.virtual_ips.remove(&address) {
            self.touched.extend(vip.services);
            self.touched_policies.extend(vip.egress_policies);
        }
        self.records_said.remove(&address);
        self.ledger.touched_records.insert(address);
    }
}
