//! Properties over random histories: objects come, change and go, processes die between any two writes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::tests::world::{World, mk_policy, mk_pool, mk_selector, mk_service};
use crate::ip::Family;
use crate::model::*;
use crate::selector::Labels;

const QUARANTINE: Duration = Duration::from_mins(1);
const NAMESPACES: [&str; 2] = ["red", "blue"];

/// What may happen.
#[derive(Clone, Debug)]
enum Op {
    PutService(Service),
    DeleteService(ObjectKey),
    PutPolicy(EgressPolicy),
    DeletePolicy(String),
    PutPool(Pool),
    DeletePool(&'static str),
    Label(&'static str, bool),
    Pass(u64),
    /// A new process, that sees everything in an order given by the seed.
    Restart(u64),
    /// The process dies after this many of the writes that the next operation causes.
    Crash(usize, u64),
}

fn mk_key() -> impl Strategy<Value = ObjectKey> {
    (0..2usize, 0..5u8)
        .prop_map(|(namespace, name)| ObjectKey::new(NAMESPACES[namespace], format!("s{name}")))
}

fn mk_random_service() -> impl Strategy<Value = Service> {
    let families = prop_oneof![
        3 => Just((vec![Family::V4], FamilyPolicy::SingleStack)),
        1 => Just((vec![Family::V6], FamilyPolicy::SingleStack)),
        2 => Just((vec![Family::V4, Family::V6], FamilyPolicy::PreferDualStack)),
        1 => Just((vec![Family::V6, Family::V4], FamilyPolicy::RequireDualStack)),
    ];
    let sharing = prop_oneof![2 => Just(None), 1 => Just(Some("k1")), 1 => Just(Some("k2"))];
    let address = prop_oneof![4 => Just(None), 1 => (0..5u8).prop_map(Some)];
    let pool = prop_oneof![4 => Just(None), 1 => Just(Some("a")), 1 => Just(Some("c"))];
    (
        mk_key(),
        families,
        sharing,
        80..83u16,
        any::<bool>(),
        address,
        pool,
    )
        .prop_map(|(key, families, sharing, port, local, address, pool)| {
            let mut service = mk_service(&key.to_string());
            service.created = i64::from(key.name.as_bytes()[1]);
            (service.families, service.family_policy) = families;
            service.request.sharing_key = sharing.map(Into::into);
            service.request.pool = pool.map(Into::into);
            service
                .request
                .addresses
                .extend(address.map(|last| IpAddr::from([192, 0, 2, last])));
            service.ports[0].port = port;
            if local {
                service.traffic_policy = TrafficPolicy::Local;
                service
                    .selector
                    .insert("app".into(), (port % 2).to_string());
            }
            service
        })
}

fn mk_random_pool() -> impl Strategy<Value = Pool> {
    let ranges = prop_oneof![
        Just(vec!["192.0.2.0/31"]),
        Just(vec!["192.0.2.1-192.0.2.3"]),
        Just(vec!["192.0.2.4/31", "fd00::/127"]),
        Just(vec!["fd00::1-fd00::2"]),
    ];
    let rules = prop_oneof![
        3 => Just(None),
        1 => Just(Some(ServiceAllocation { namespaces: vec!["red".into()], priority: 5, ..ServiceAllocation::default() })),
        1 => Just(Some(ServiceAllocation {
            namespace_selectors: vec![mk_selector("tenant", "yes")],
            ..ServiceAllocation::default()
        })),
    ];
    let purpose = prop_oneof![
        3 => Just(Purpose::Ingress),
        2 => Just(Purpose::Both),
        1 => Just(Purpose::Egress),
    ];
    (
        prop_oneof![Just("a"), Just("b"), Just("c")],
        ranges,
        rules,
        any::<bool>(),
        purpose,
    )
        .prop_map(|(name, ranges, allocation, auto_assign, purpose)| {
            let mut pool = mk_pool(name, &ranges);
            pool.purpose = purpose;
            pool.allocation = allocation;
            pool.auto_assign = auto_assign;
            pool.quarantine = QUARANTINE;
            pool
        })
}

fn mk_random_policy() -> impl Strategy<Value = EgressPolicy> {
    let families = prop_oneof![
        2 => Just(Vec::new()),
        1 => Just(vec![Family::V6]),
        1 => Just(vec![Family::V6, Family::V4]),
    ];
    let of_pool = (
        prop_oneof![Just("a"), Just("b"), Just("c")],
        1..3usize,
        families,
    )
        .prop_map(|(name, count, families)| EgressSource::Pool {
            name: name.into(),
            count,
            families,
        });
    let by_number = proptest::collection::btree_set(0..5u8, 1..3).prop_map(|lasts| {
        let addresses = lasts.into_iter().map(|last| [192, 0, 2, last].into());
        EgressSource::Addresses(addresses.collect())
    });
    let source = prop_oneof![
        3 => of_pool,
        2 => by_number,
        2 => mk_key().prop_map(EgressSource::Service),
    ];
    (0..3u8, source).prop_map(|(number, source)| {
        let mut policy = mk_policy(&format!("p{number}"), source);
        policy.created = i64::from(number);
        policy
    })
}

fn mk_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => mk_random_service().prop_map(Op::PutService),
        3 => mk_key().prop_map(Op::DeleteService),
        4 => mk_random_policy().prop_map(Op::PutPolicy),
        2 => (0..3u8).prop_map(|number| Op::DeletePolicy(format!("p{number}"))),
        3 => mk_random_pool().prop_map(Op::PutPool),
        1 => prop_oneof![Just("a"), Just("b"), Just("c")].prop_map(Op::DeletePool),
        1 => (0..2usize, any::<bool>()).prop_map(|(n, on)| Op::Label(NAMESPACES[n], on)),
        2 => (1..70u64).prop_map(Op::Pass),
        2 => any::<u64>().prop_map(Op::Restart),
        2 => (0..6usize, any::<u64>()).prop_map(|(writes, seed)| Op::Crash(writes, seed)),
    ]
}

/// A Fisher-Yates shuffle by a seed.
fn shuffled<T>(mut items: Vec<T>, seed: u64) -> Vec<T> {
    let mut state = seed | 1;
    for index in (1..items.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let other = usize::try_from(state % (index as u64 + 1)).unwrap();
        items.swap(index, other);
    }
    items
}

type Shown = BTreeMap<ObjectKey, Vec<IpAddr>>;

struct History {
    world: World,
    /// Who showed an address last, and when they no longer did.
    freed: BTreeMap<IpAddr, (Vec<Holder>, Duration)>,
    before: BTreeMap<IpAddr, Vec<Holder>>,
}

impl History {
    fn new() -> Self {
        let mut world = World::new();
        for name in NAMESPACES {
            world.namespace(name, &[]);
        }
        Self {
            world,
            freed: BTreeMap::new(),
            before: BTreeMap::new(),
        }
    }

    fn shown(&self) -> Shown {
        self.world
            .services
            .iter()
            .map(|(key, service)| {
                (
                    key.clone(),
                    service
                        .ingress
                        .iter()
                        .filter_map(|entry| entry.address)
                        .collect(),
                )
            })
            .collect()
    }

    /// Changes the objects and returns the event, which nobody has seen yet.
    fn edit(&mut self, op: Op) -> Option<Event> {
        let world = &mut self.world;
        Some(match op {
            Op::PutService(mut service) => {
                if let Some(before) = world.services.get(&service.key) {
                    service.ingress.clone_from(&before.ingress);
                    service.conditions.clone_from(&before.conditions);
                }
                world.services.insert(service.key.clone(), service.clone());
                Event::Apply(Object::Service(service))
            }
            Op::DeleteService(key) => {
                world.services.remove(&key)?;
                Event::Delete(ObjectId::Service(key))
            }
            Op::PutPolicy(policy) => {
                world
                    .policies
                    .insert(policy.name.to_string(), policy.clone());
                Event::Apply(Object::EgressPolicy(Box::new(policy)))
            }
            Op::DeletePolicy(name) => {
                world.policies.remove(&name)?;
                Event::Delete(ObjectId::EgressPolicy(name.into()))
            }
            Op::PutPool(pool) => {
                world.pools.insert(pool.name.to_string(), pool.clone());
                Event::Apply(Object::Pool(pool))
            }
            Op::DeletePool(name) => {
                world.pools.remove(name)?;
                Event::Delete(ObjectId::Pool(name.into()))
            }
            Op::Label(name, on) => {
                let labels: Labels = on
                    .then(|| ("tenant".to_owned(), "yes".to_owned()))
                    .into_iter()
                    .collect();
                world.namespaces.insert(name.into(), labels.clone());
                Event::Apply(Object::Namespace(Namespace {
                    name: name.into(),
                    labels,
                }))
            }
            Op::Pass(_) | Op::Restart(_) | Op::Crash(..) => return None,
        })
    }

    fn restart(&mut self, seed: u64) {
        let listing = shuffled(self.world.listing(), seed);
        self.world
            .restart_with(crate::ipam::Config::default(), listing);
    }

    fn check(&mut self) {
        self.world.check();
        let mut holders: BTreeMap<IpAddr, Vec<Holder>> = BTreeMap::new();
        for (key, addresses) in self.shown() {
            for address in addresses {
                let holder = Holder::Service(key.clone());
                holders.entry(address).or_default().push(holder);
            }
        }
        for vip in self.world.virtual_ips.values() {
            check_policies(&self.world, vip);
            for holder in vip.holders() {
                if holder.policy().is_some() {
                    let before = holders.insert(vip.address, vec![holder]);
                    assert_eq!(before, None, "{} has two owners", vip.address);
                }
            }
        }
        for (address, keys) in &holders {
            if self.before.contains_key(address) {
                continue;
            }
            if let Some((former, at)) = self.freed.remove(address) {
                let rested = self.world.now.saturating_sub(at) >= QUARANTINE;
                assert!(
                    rested || keys.iter().any(|holder| former.contains(holder)),
                    "{address} went from {former:?} to {keys:?} without rest"
                );
            }
        }
        for (address, keys) in &self.before {
            if !holders.contains_key(address) {
                self.freed.insert(*address, (keys.clone(), self.world.now));
            }
        }
        self.before = holders;
        for service in self.world.services.values() {
            for address in service.ingress.iter().filter_map(|entry| entry.address) {
                let admitted = self
                    .world
                    .pools
                    .values()
                    .any(|pool| admits(&self.world, pool, service, address));
                assert!(admitted, "no pool with {address} admits {}", service.key);
            }
            if service.family_policy == FamilyPolicy::SingleStack {
                assert!(service.ingress.len() <= 1);
            }
        }
    }
}

/// Who is on the record of an address for egress may be: as its only holder, or beside the Services that it names.
fn check_policies(world: &World, vip: &VirtualIp) {
    let serving = |purposes: &[Purpose]| {
        world.pools.values().any(|pool| {
            purposes.contains(&pool.purpose)
                && pool.ranges.iter().any(|range| range.contains(vip.address))
        })
    };
    for name in &vip.egress_policies {
        let policy = &world.policies[&**name];
        match &policy.spec.source {
            EgressSource::Service(service) => {
                assert!(vip.services.contains(service), "{vip:?}");
                assert!(serving(&[Purpose::Both]), "{vip:?}");
            }
            EgressSource::Pool { name, count, .. } => {
                assert_eq!(*name, vip.pool);
                let family = Family::of(vip.address);
                let all = world.virtual_ips.values();
                let held = all.filter(|other| {
                    Family::of(other.address) == family
                        && other.egress_policies.contains(&policy.name)
                });
                assert!(held.count() <= *count, "{vip:?}");
            }
            EgressSource::Addresses(addresses) => {
                assert!(addresses.contains(&vip.address), "{vip:?}");
            }
        }
        assert!(serving(&[Purpose::Both, Purpose::Egress]), "{vip:?}");
    }
    if vip.services.is_empty() {
        assert!(vip.egress_policies.len() <= 1, "{vip:?}");
    }
}

/// The tenancy rule, written a second time.
fn admits(world: &World, pool: &Pool, service: &Service, address: IpAddr) -> bool {
    pool.purpose != Purpose::Egress
        && pool.ranges.iter().any(|range| range.contains(address))
        && pool.allocation.as_ref().is_none_or(|rules| {
            if rules.namespaces.is_empty() {
                let labels = &world.namespaces[&*service.key.namespace];
                rules
                    .namespace_selectors
                    .iter()
                    .any(|selector| selector.matches(labels))
            } else {
                rules
                    .namespaces
                    .iter()
                    .any(|name| **name == *service.key.namespace)
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_history_keeps_the_rules(ops in proptest::collection::vec(mk_op(), 1..40)) {
        let mut history = History::new();
        let mut crash: Option<(usize, u64)> = None;
        for op in ops {
            match op {
                Op::Pass(seconds) => history.world.pass(seconds),
                Op::Restart(seed) => {
                    let before = history.shown();
                    let records = history.world.virtual_ips.clone();
                    history.restart(seed);
                    prop_assert_eq!(before, history.shown(), "a restart moved an address");
                    prop_assert_eq!(records, history.world.virtual_ips.clone());
                }
                Op::Crash(writes, seed) => crash = Some((writes, seed)),
                op => {
                    let Some(event) = history.edit(op) else { continue };
                    let now = history.world.now;
                    history.world.ipam.apply(event, now);
                    if let Some((writes, seed)) = crash.take() {
                        die_after(&mut history.world, writes);
                        history.restart(seed);
                    }
                    history.world.settle();
                }
            }
            history.check();
        }
    }
}

/// Lets the index write so often, and no more.
fn die_after(world: &mut World, mut writes: usize) {
    loop {
        let mut changes = world.ipam.reconcile(world.now);
        if changes.is_empty() || writes == 0 {
            return;
        }
        changes.records.truncate(writes);
        writes -= changes.records.len();
        changes.services.truncate(writes);
        writes -= changes.services.len();
        world.write(changes);
    }
}
