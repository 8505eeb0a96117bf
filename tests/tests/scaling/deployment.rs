//! A Deployment: its controller and the kubelets are played by the test, all else is real.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use landfall_lab::server::TCP_PORT;
use landfall_lab::{Lab, Pod};
use landfall_tests::{Cluster, PATIENCE, eventually, objects, tables};
use serde_json::json;

/// The label that its Service selects by.
const LABEL: &str = "deployment";
/// How long a pod goes on serving after it was told to end: longer than kube-proxy gathers changes.
const GRACE: Duration = Duration::from_secs(3);

/// A Deployment and its Service, `externalTrafficPolicy: Local`, IPv4. Pods are the lab's, each used once at a time.
pub(crate) struct Deployment<'a> {
    cluster: &'a Cluster,
    name: &'static str,
    vip: IpAddr,
    /// Those that end, and since when.
    ending: RefCell<Vec<(Instant, &'a Pod)>>,
}

impl<'a> Deployment<'a> {
    /// Creates it with these pods, and waits until all speakers have them in their tables.
    pub(crate) fn create(cluster: &'a Cluster, name: &'static str, pods: &[&'a Pod]) -> Self {
        let spec = json!({
            "externalTrafficPolicy": "Local", "ipFamilyPolicy": "SingleStack",
            "selector": {LABEL: name},
        });
        let vip = cluster.block_on(async {
            let services = services(&cluster.client().await.unwrap());
            let service = objects::service(name, spec);
            services
                .create(&PostParams::default(), &service)
                .await
                .unwrap();
            eventually("the Service's address", async || {
                let service = services.get_status(name).await.ok()?;
                objects::ingress(&service).first().copied()
            })
            .await
        });
        let deployment = Self {
            cluster,
            name,
            vip,
            ending: RefCell::default(),
        };
        for pod in pods {
            deployment.start(pod);
        }
        deployment.await_tables(pods);
        deployment
    }

    /// Where clients find it.
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::new(self.vip, TCP_PORT)
    }

    pub(crate) fn lab(&self) -> &'a Lab {
        self.cluster.lab()
    }

    /// A pod is ready, and the Service's.
    pub(crate) fn start(&self, pod: &Pod) {
        self.with_client(async |client| {
            objects::label_pod(&client, &pod.name, json!({LABEL: self.name})).await
        });
    }

    /// A pod is told to end, and goes on serving for a while; what has ended meanwhile is removed.
    pub(crate) fn end(&self, pod: &'a Pod) {
        self.reap();
        self.with_client(async |client| objects::terminate_pod(&client, &pod.name).await);
        self.ending.borrow_mut().push((Instant::now(), pod));
    }

    /// Removes the pods whose time is over: their processes end, then they are gone. In their place in the lab is a
    /// fresh one that belongs to nobody.
    pub(crate) fn reap(&self) {
        let over = |(since, _): &mut (Instant, &Pod)| since.elapsed() >= GRACE;
        let ended: Vec<_> = self.ending.borrow_mut().extract_if(.., over).collect();
        for (_, pod) in ended {
            self.lab().stop_pod(&pod.name);
            self.with_client(async |client| objects::remove_pod(&client, &pod.name).await);
            self.lab().serve_pod(pod).unwrap();
            self.with_client(async |client| objects::set_pod(&client, pod, true).await);
        }
    }

    /// Waits until all pods that were told to end have ended.
    pub(crate) fn await_ended(&self) {
        while !self.ending.borrow().is_empty() {
            thread::sleep(Duration::from_millis(100));
            self.reap();
        }
    }

    /// What each node that can be asked spreads new connections over.
    fn tables(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let port = format!("{}/TCP", self.address());
        let nodes = self.lab().nodes().iter();
        nodes
            .filter_map(|node| {
                let table = tables::of_node(self.lab(), &node.name, &port)?;
                Some((node.name.clone(), table))
            })
            .collect()
    }

    /// Waits until all tables name the nodes of exactly these pods.
    pub(crate) fn await_tables(&self, pods: &[&Pod]) {
        let wanted: BTreeSet<&str> = pods.iter().map(|pod| &*pod.node).collect();
        let begun = Instant::now();
        loop {
            let tables = self.tables();
            let as_wanted = |table: &BTreeMap<String, u64>| {
                table.keys().map(String::as_str).collect::<BTreeSet<_>>() == wanted
            };
            if !tables.is_empty() && tables.values().all(as_wanted) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "not {wanted:?}: {tables:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Removes the Service, and takes the pods that are left from it.
    pub(crate) fn delete(self) {
        self.await_ended();
        self.with_client(async |client| {
            let gone = DeleteParams::default();
            services(&client).delete(self.name, &gone).await?;
            for pod in self.lab().pods() {
                objects::label_pod(&client, &pod.name, json!({LABEL: null})).await?;
            }
            Ok(())
        });
    }

    fn with_client(&self, work: impl AsyncFnOnce(Client) -> kube::Result<()>) {
        self.cluster.block_on(async {
            let client = self.cluster.client().await.unwrap();
            work(client).await.unwrap();
        });
    }
}

fn services(client: &Client) -> Api<Service> {
    Api::default_namespaced(client.clone())
}
