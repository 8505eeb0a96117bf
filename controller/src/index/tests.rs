//! Terms of office against an API server in memory, on tokio's paused clock.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use landfall_core::ip::Family;
use landfall_core::ipam::{Config, RecordChange};
use landfall_core::model::*;
use landfall_core::selector::Labels;
use landfall_runtime::source::Source;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Settings, Shared, run};
use crate::lease::Term;
use crate::metrics::Metrics;
use crate::writer::{Sink, Write, WriteError};

/// Objects, and who watches them.
#[derive(Default)]
struct Objects {
    services: BTreeMap<ObjectKey, Service>,
    virtual_ips: BTreeMap<IpAddr, VirtualIp>,
    watcher: Option<mpsc::Sender<Event>>,
    events: usize,
    writes: usize,
}

impl Objects {
    fn tell(&self, event: Event) {
        if let Some(watcher) = &self.watcher {
            watcher
                .try_send(event)
                .expect("the channel is large enough");
        }
    }

    fn put_service(&mut self, service: Service) {
        self.services.insert(service.key.clone(), service.clone());
        self.tell(Event::Apply(Object::Service(service)));
    }

    fn write(&mut self, write: Write) {
        self.writes += 1;
        match write {
            Write::Record(RecordChange::Put(record)) => {
                let vip = record.virtual_ip();
                self.virtual_ips.insert(vip.address, vip.clone());
                self.tell(Event::Apply(Object::VirtualIp(vip)));
            }
            Write::Record(RecordChange::Remove(address)) => {
                self.virtual_ips.remove(&address);
                self.tell(Event::Delete(ObjectId::VirtualIp(address)));
            }
            Write::Service(status) => {
                let Some(mut service) = self.services.get(&status.key).cloned() else {
                    return;
                };
                let ingress = status.ingress.unwrap_or_default().into_iter();
                service.ingress = ingress
                    .map(|address| Ingress {
                        address: Some(address),
                        ip_mode: Some("VIP".into()),
                    })
                    .collect();
                service.conditions = status.conditions;
                self.put_service(service);
            }
            Write::Pool(_) | Write::Policy(_) => {}
            Write::Event(_) => self.events += 1,
        }
    }
}

#[derive(Clone, Default)]
struct Server(Arc<Mutex<Objects>>);

impl Sink for Server {
    fn write(&self, write: Write) -> Pin<Box<dyn Future<Output = Result<(), WriteError>> + Send>> {
        let server = self.clone();
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(3)).await;
            server.0.lock().unwrap().write(write);
            Ok(())
        })
    }
}

fn mk_service(number: usize) -> Service {
    Service {
        key: ObjectKey::new("default", format!("s{number:03}")),
        uid: number.to_string(),
        labels: Labels::new(),
        created: 0,
        load_balancer: true,
        class: None,
        ports: Vec::new(),
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

impl Server {
    fn with_services(count: usize) -> Self {
        let server = Self::default();
        for number in 0..count {
            server.0.lock().unwrap().put_service(mk_service(number));
        }
        server
    }

    /// A source that lists and then watches.
    fn source(&self) -> Source {
        let (tx, rx) = mpsc::channel(100_000);
        let mut objects = self.0.lock().unwrap();
        let pool = Pool {
            name: "a".into(),
            generation: 1,
            labels: Labels::new(),
            ranges: vec!["192.0.2.0/24".parse().unwrap()],
            purpose: Purpose::Ingress,
            auto_assign: true,
            avoid_buggy_ips: false,
            allocation: None,
            quarantine: Duration::from_mins(1),
            retain_assigned: false,
            flaw: None,
        };
        let listed = objects.services.values().cloned().map(Object::Service);
        let listed = listed.chain(objects.virtual_ips.values().cloned().map(Object::VirtualIp));
        for object in listed.chain([Object::Pool(pool)]) {
            tx.try_send(Event::Apply(object)).unwrap();
        }
        for kind in kinds() {
            tx.try_send(Event::Synced(kind)).unwrap();
        }
        objects.watcher = Some(tx);
        Source {
            events: rx,
            kinds: kinds().into_iter().collect(),
            tasks: JoinSet::new(),
        }
    }

    fn shown(&self) -> BTreeMap<ObjectKey, Vec<IpAddr>> {
        let objects = self.0.lock().unwrap();
        let shown = |service: &Service| {
            service
                .ingress
                .iter()
                .filter_map(|entry| entry.address)
                .collect()
        };
        objects
            .services
            .iter()
            .map(|(key, service)| (key.clone(), shown(service)))
            .collect()
    }
}

fn kinds() -> BTreeSet<Kind> {
    BTreeSet::from([Kind::Service, Kind::Pool, Kind::VirtualIp])
}

async fn term_of(server: &Server, length: Duration) {
    let term = Term::unlimited();
    let settings = Settings {
        ipam: Config {
            kinds: kinds(),
            ..Config::default()
        },
        concurrency: 4,
        write_timeout: Duration::from_secs(1),
    };
    let ender = term.clone();
    let end = async move {
        tokio::time::sleep(length).await;
        ender.end();
    };
    let work = run(
        server.source(),
        Arc::new(server.clone()),
        settings,
        term,
        Shared::default(),
        Metrics::default(),
    );
    tokio::join!(work, end);
    let writes = server.0.lock().unwrap().writes;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(
        server.0.lock().unwrap().writes,
        writes,
        "a write landed after the term"
    );
}

#[tokio::test(start_paused = true)]
async fn each_service_costs_three_writes_and_gets_one_event() {
    let server = Server::with_services(200);
    term_of(&server, Duration::from_secs(10)).await;
    let shown = server.shown();
    let distinct: BTreeSet<_> = shown.values().flatten().collect();
    assert_eq!(distinct.len(), 200);
    {
        let objects = server.0.lock().unwrap();
        assert_eq!(objects.events, 200);
        assert!(objects.writes <= 3 * 200 + 2, "{}", objects.writes);
    }
    let writes = server.0.lock().unwrap().writes;
    term_of(&server, Duration::from_secs(10)).await;
    assert_eq!(server.shown(), shown);
    assert!(
        server.0.lock().unwrap().writes <= writes + 1,
        "a new term repeats nothing"
    );
}

#[tokio::test(start_paused = true)]
async fn terms_that_end_anywhere_leave_no_address_with_two_owners() {
    let server = Server::with_services(100);
    let mut settled: BTreeMap<ObjectKey, Vec<IpAddr>> = BTreeMap::new();
    for millis in [5, 17, 40, 3, 80, 10_000] {
        term_of(&server, Duration::from_millis(millis)).await;
        let shown = server.shown();
        for (key, addresses) in &settled {
            assert_eq!(&shown[key], addresses, "{key} moved");
        }
        let all: Vec<_> = shown.values().flatten().collect();
        let distinct: BTreeSet<_> = all.iter().collect();
        assert_eq!(all.len(), distinct.len());
        settled = shown
            .into_iter()
            .filter(|(_, addresses)| !addresses.is_empty())
            .collect();
    }
    assert_eq!(settled.len(), 100);
}
