//! An API server in memory: keeps the objects, writes what the index asks for, and tells it so.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use crate::ip::Family;
use crate::ipam::{Changes, Config, Ipam, PoolStatus, RecordChange};
use crate::model::*;
use crate::selector::{LabelSelector, Labels};

/// The world around an index.
pub(in crate::ipam) struct World {
    pub(in crate::ipam) ipam: Ipam,
    pub(in crate::ipam) now: Duration,
    pub(in crate::ipam) services: BTreeMap<ObjectKey, Service>,
    pub(in crate::ipam) pools: BTreeMap<String, Pool>,
    pub(in crate::ipam) policies: BTreeMap<String, EgressPolicy>,
    pub(in crate::ipam) namespaces: BTreeMap<String, Labels>,
    pub(in crate::ipam) virtual_ips: BTreeMap<IpAddr, VirtualIp>,
    pub(in crate::ipam) statuses: BTreeMap<String, PoolStatus>,
    /// `key reason` of every Event.
    pub(in crate::ipam) notices: Vec<(String, String)>,
    pub(in crate::ipam) writes: usize,
}

pub(in crate::ipam) fn mk_pool(name: &str, ranges: &[&str]) -> Pool {
    Pool {
        name: name.into(),
        generation: 1,
        labels: Labels::new(),
        ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        purpose: Purpose::Ingress,
        auto_assign: true,
        avoid_buggy_ips: false,
        allocation: None,
        quarantine: Duration::from_mins(1),
        retain_assigned: false,
        flaw: None,
    }
}

/// A Service of namespace `default`, or of the one before the slash, with port 80 and IPv4.
pub(in crate::ipam) fn mk_service(name: &str) -> Service {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    Service {
        key: ObjectKey::new(namespace, name),
        uid: format!("uid-{name}"),
        labels: Labels::new(),
        created: 0,
        load_balancer: true,
        class: None,
        ports: vec![ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        selector: BTreeMap::new(),
        traffic_policy: TrafficPolicy::Cluster,
        health_check_node_port: 0,
        affinity: false,
        udp_ports: false,
        source_ranges: None,
        families: vec![Family::V4],
        family_policy: FamilyPolicy::SingleStack,
        request: AddressRequest::default(),
        ingress: Vec::new(),
        conditions: Vec::new(),
        assigned_pool: None,
    }
}

/// A policy for pods labelled `app: mail` that takes its addresses from there.
pub(in crate::ipam) fn mk_policy(name: &str, source: EgressSource) -> EgressPolicy {
    let mut policy = EgressPolicy::plain(name, source);
    policy.uid = format!("uid-{name}");
    policy.generation = 1;
    policy.spec.pods = Some(mk_selector("app", "mail"));
    policy
}

/// So many addresses of each family that a pool has.
pub(in crate::ipam) fn of_pool(name: &str, count: usize) -> EgressSource {
    EgressSource::Pool {
        name: name.into(),
        count,
        families: Vec::new(),
    }
}

pub(in crate::ipam) fn mk_selector(key: &str, value: &str) -> LabelSelector {
    LabelSelector::of_labels([(key, value)])
}

pub(in crate::ipam) fn key_of(name: &str) -> ObjectKey {
    mk_service(name).key
}

pub(in crate::ipam) fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

impl World {
    pub(in crate::ipam) fn new() -> Self {
        let mut world = Self {
            ipam: Ipam::new(Config::default()),
            now: Duration::ZERO,
            services: BTreeMap::new(),
            pools: BTreeMap::new(),
            policies: BTreeMap::new(),
            namespaces: BTreeMap::from([("default".to_owned(), Labels::new())]),
            virtual_ips: BTreeMap::new(),
            statuses: BTreeMap::new(),
            notices: Vec::new(),
            writes: 0,
        };
        world.restart();
        world
    }

    pub(in crate::ipam) fn with_pools(pools: Vec<Pool>) -> Self {
        let mut world = Self::new();
        for pool in pools {
            world.pool(pool);
        }
        world
    }

    /// All objects, as a source would list them.
    pub(in crate::ipam) fn listing(&self) -> Vec<Event> {
        let services = self.services.values().cloned().map(Object::Service);
        let pools = self.pools.values().cloned().map(Object::Pool);
        let vips = self.virtual_ips.values().cloned().map(Object::VirtualIp);
        let namespaces = self.namespaces.iter().map(|(name, labels)| {
            Object::Namespace(Namespace {
                name: name.as_str().into(),
                labels: labels.clone(),
            })
        });
        let policies = self.policies.values().cloned();
        let policies = policies.map(|policy| Object::EgressPolicy(Box::new(policy)));
        services
            .chain(pools)
            .chain(policies)
            .chain(vips)
            .chain(namespaces)
            .map(Event::Apply)
            .collect()
    }

    /// A new process: an empty index that lists everything.
    pub(in crate::ipam) fn restart(&mut self) {
        let listing = self.listing();
        self.restart_with(Config::default(), listing);
    }

    pub(in crate::ipam) fn restart_with(&mut self, config: Config, listing: Vec<Event>) {
        let kinds = config.kinds.clone();
        self.ipam = Ipam::new(config);
        for event in listing {
            self.ipam.apply(event, self.now);
            assert!(
                self.ipam.reconcile(self.now).is_empty(),
                "decided before it was synced"
            );
        }
        for kind in kinds {
            self.ipam.apply(Event::Synced(kind), self.now);
        }
        self.settle();
    }

    /// Writes what is asked for until nothing is.
    pub(in crate::ipam) fn settle(&mut self) {
        for _ in 0..1000 {
            let changes = self.ipam.reconcile(self.now);
            if changes.is_empty() {
                return;
            }
            self.write(changes);
        }
        panic!("the index never comes to rest");
    }

    pub(in crate::ipam) fn write(&mut self, changes: Changes) {
        for change in changes.records {
            self.write_record(change);
        }
        for status in changes.services {
            self.writes += 1;
            if let Some(notice) = status.notice {
                self.notices
                    .push((status.key.name.to_string(), notice.reason));
            }
            let Some(service) = self.services.get_mut(&status.key) else {
                continue;
            };
            if let Some(ingress) = status.ingress {
                service.ingress = ingress
                    .into_iter()
                    .map(|address| Ingress {
                        address: Some(address),
                        ip_mode: Some("VIP".into()),
                    })
                    .collect();
            }
            service.conditions = status.conditions;
            let event = Event::Apply(Object::Service(service.clone()));
            self.ipam.apply(event, self.now);
        }
        for status in changes.pools {
            self.statuses.insert(status.name.to_string(), status);
        }
    }

    pub(in crate::ipam) fn write_record(&mut self, change: RecordChange) {
        self.writes += 1;
        let event = match change {
            RecordChange::Put(record) => {
                let mut vip = record.virtual_ip();
                if let Some(before) = self.virtual_ips.get(&vip.address) {
                    vip.leader.clone_from(&before.leader);
                    vip.epoch = before.epoch;
                    vip.ports_in_use.clone_from(&before.ports_in_use);
                    vip.drained.clone_from(&before.drained);
                }
                self.virtual_ips.insert(vip.address, vip.clone());
                Event::Apply(Object::VirtualIp(vip))
            }
            RecordChange::Remove(address) => {
                self.virtual_ips.remove(&address);
                Event::Delete(ObjectId::VirtualIp(address))
            }
        };
        self.ipam.apply(event, self.now);
    }

    pub(in crate::ipam) fn apply(&mut self, object: Object) {
        self.ipam.apply(Event::Apply(object), self.now);
        self.settle();
    }

    pub(in crate::ipam) fn pool(&mut self, pool: Pool) {
        self.pools.insert(pool.name.to_string(), pool.clone());
        self.apply(Object::Pool(pool));
    }

    pub(in crate::ipam) fn delete_pool(&mut self, name: &str) {
        self.pools.remove(name);
        self.ipam
            .apply(Event::Delete(ObjectId::Pool(name.into())), self.now);
        self.settle();
    }

    pub(in crate::ipam) fn namespace(&mut self, name: &str, labels: &[(&str, &str)]) {
        let labels: Labels = labels
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect();
        self.namespaces.insert(name.into(), labels.clone());
        self.apply(Object::Namespace(Namespace {
            name: name.into(),
            labels,
        }));
    }

    /// Creates or changes a Service; its status stays what it is.
    pub(in crate::ipam) fn service(&mut self, mut service: Service) {
        if let Some(before) = self.services.get(&service.key) {
            service.ingress.clone_from(&before.ingress);
            service.conditions.clone_from(&before.conditions);
        }
        self.raw_service(service);
    }

    /// Creates or changes a Service, status and all.
    pub(in crate::ipam) fn raw_service(&mut self, service: Service) {
        self.services.insert(service.key.clone(), service.clone());
        self.apply(Object::Service(service));
    }

    pub(in crate::ipam) fn delete(&mut self, name: &str) {
        let key = key_of(name);
        self.services.remove(&key);
        self.ipam
            .apply(Event::Delete(ObjectId::Service(key)), self.now);
        self.settle();
    }

    pub(in crate::ipam) fn policy(&mut self, policy: EgressPolicy) {
        self.policies
            .insert(policy.name.to_string(), policy.clone());
        self.apply(Object::EgressPolicy(Box::new(policy)));
    }

    pub(in crate::ipam) fn delete_policy(&mut self, name: &str) {
        self.policies.remove(name);
        self.ipam
            .apply(Event::Delete(ObjectId::EgressPolicy(name.into())), self.now);
        self.settle();
    }

    /// The addresses that the policy's pods may leave by, as the index tells; they are the ones on record.
    pub(in crate::ipam) fn egress_of(&self, name: &str) -> Vec<String> {
        let allocation = self.ipam.allocation(name).unwrap();
        assert!(!allocation.pending, "nothing is being written");
        let on_record: Vec<IpAddr> = self
            .virtual_ips
            .values()
            .filter(|vip| vip.egress_policies.iter().any(|policy| **policy == *name))
            .map(|vip| vip.address)
            .collect();
        assert_eq!(allocation.addresses, on_record, "{name}");
        on_record.iter().map(ToString::to_string).collect()
    }

    /// Why the policy lacks something; empty if it does not.
    pub(in crate::ipam) fn refused(&self, name: &str) -> &'static str {
        let allocation = self.ipam.allocation(name).unwrap();
        allocation.refusal.map_or("", |refusal| refusal.reason())
    }

    /// The leader of an address says how many ports flows of a policy have there, and whether all have ended.
    pub(in crate::ipam) fn report(
        &mut self,
        address: &str,
        policy: &str,
        ports: u64,
        drained: bool,
    ) {
        let address: IpAddr = address.parse().unwrap();
        let vip = self.virtual_ips.get_mut(&address).unwrap();
        vip.leader = Some("n1".into());
        vip.ports_in_use = BTreeMap::from([(policy.into(), ports)]);
        vip.drained = drained.then(|| policy.into()).into_iter().collect();
        let vip = vip.clone();
        self.apply(Object::VirtualIp(vip));
    }

    pub(in crate::ipam) fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.settle();
    }

    /// What the Service's status shows.
    pub(in crate::ipam) fn shown(&self, name: &str) -> Vec<String> {
        self.services[&key_of(name)]
            .ingress
            .iter()
            .map(|entry| entry.address.unwrap().to_string())
            .collect()
    }

    /// `True Assigned`, or the like.
    pub(in crate::ipam) fn condition(&self, name: &str) -> String {
        self.services[&key_of(name)]
            .conditions
            .iter()
            .find(|condition| condition.kind == crate::ipam::ADDRESS_ASSIGNED)
            .map(|condition| format!("{} {}", condition.status, condition.reason))
            .unwrap_or_default()
    }

    pub(in crate::ipam) fn message(&self, name: &str) -> String {
        self.services[&key_of(name)].conditions[0].message.clone()
    }

    /// No address has two holders that may not share it, statuses and records agree, groups hold together.
    pub(in crate::ipam) fn check(&self) {
        let mut holders: BTreeMap<IpAddr, Vec<&Service>> = BTreeMap::new();
        for service in self
            .services
            .values()
            .filter(|service| service.load_balancer)
        {
            for address in service.ingress.iter().filter_map(|entry| entry.address) {
                holders.entry(address).or_default().push(service);
            }
        }
        let mut group_of: BTreeMap<&ObjectKey, BTreeSet<&str>> = BTreeMap::new();
        for (address, services) in &holders {
            let record = self
                .virtual_ips
                .get(address)
                .expect("a shown address has a record");
            for (index, a) in services.iter().enumerate() {
                assert!(
                    record.services.contains(&a.key),
                    "{address} is not on record for {}",
                    a.key
                );
                group_of.entry(&a.key).or_default().insert(&record.group);
                for b in &services[index + 1..] {
                    assert!(
                        may_share(a, b),
                        "{address} is held by {} and {}",
                        a.key,
                        b.key
                    );
                }
            }
        }
        for (key, groups) in group_of {
            assert_eq!(
                groups.len(),
                1,
                "{key}'s addresses are in several groups: {groups:?}"
            );
        }
    }
}

/// The sharing rule, written a second time.
fn may_share(a: &Service, b: &Service) -> bool {
    let ports = |service: &Service| -> BTreeSet<_> {
        service
            .ports
            .iter()
            .map(|port| (port.protocol, port.port))
            .collect()
    };
    a.request.sharing_key.is_some()
        && a.request.sharing_key == b.request.sharing_key
        && ports(a).is_disjoint(&ports(b))
        && a.traffic_policy == b.traffic_policy
        && (a.traffic_policy == TrafficPolicy::Cluster || a.selector == b.selector)
}
