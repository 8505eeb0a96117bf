//! What scenarios do to the cluster, and how they look at it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use landfall_api::L2Advertisement;
use landfall_lab::Lab;
use landfall_lab::measure::neighbours;
use landfall_tests::{Cluster, PATIENCE, chart, client, objects};
use serde_json::{Value, json};

/// Each Service has addresses that no client has heard of.
const POOLS: &str = "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: lan}
spec:
  addresses: [10.88.0.200-10.88.0.253, 'fd00:88::200-fd00:88::253']
  quarantine: 1h
---
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: second-lan}
spec:
  addresses: [10.89.0.200-10.89.0.210, 'fd00:89::200-fd00:89::210']
  autoAssign: false
  quarantine: 1h
---
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: far}
spec:
  addresses: [10.90.0.200-10.90.0.210, 'fd00:90::200-fd00:90::210']
  autoAssign: false
  quarantine: 1h
";

/// The label that scenarios select nodes by.
const LABEL: &str = "zone";
const EXCLUDE: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

pub(crate) struct Scene<'a> {
    pub(crate) cluster: &'a Cluster,
}

/// Looks every 100 ms until `enough` accepts what is seen, and returns it; panics with it after [`PATIENCE`].
pub(crate) fn eventually<T: Debug>(
    what: &str,
    mut look: impl FnMut() -> T,
    enough: impl Fn(&T) -> bool,
) -> T {
    let begun = Instant::now();
    loop {
        let seen = look();
        if enough(&seen) {
            return seen;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: still {seen:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

impl<'a> Scene<'a> {
    pub(crate) fn start(cluster: &'a Cluster) -> anyhow::Result<Self> {
        chart::apply(cluster.plane(), POOLS)?;
        cluster.start_landfall()?;
        Ok(Self { cluster })
    }

    pub(crate) fn lab(&self) -> &Lab {
        self.cluster.lab()
    }

    /// Removes what a scenario made.
    pub(crate) fn clear(&self) {
        self.cluster.block_on(async {
            let client = self.cluster.client().await.unwrap();
            let (all, gone) = (ListParams::default(), DeleteParams::default());
            let services: Api<Service> = Api::default_namespaced(client.clone());
            for service in services.list(&all).await.unwrap() {
                let name = service.metadata.name.unwrap();
                if name != "kubernetes" {
                    services.delete(&name, &gone).await.unwrap();
                }
            }
            let advertisements: Api<L2Advertisement> = Api::all(client.clone());
            advertisements.delete_collection(&gone, &all).await.unwrap();
            for node in self.lab().nodes() {
                let none = json!({LABEL: null, EXCLUDE: null});
                objects::label_node(&client, &node.name, none)
                    .await
                    .unwrap();
            }
            objects::create_pods(&client, self.lab()).await.unwrap();
        });
    }

    /// Creates or replaces the one `L2Advertisement`, for all pools.
    pub(crate) fn advertise(&self, spec: &Value) {
        let body = json!({
            "apiVersion": "landfall.dev/v1alpha1", "kind": "L2Advertisement",
            "metadata": {"name": "it"}, "spec": spec,
        });
        self.cluster.block_on(async {
            let api: Api<L2Advertisement> = Api::all(self.cluster.client().await.unwrap());
            let params = PatchParams::apply("test").force();
            api.patch("it", &params, &Patch::Apply(body)).await.unwrap();
        });
    }

    /// Labels a node `zone: <value>`, or takes the label away.
    pub(crate) fn zone(&self, node: &str, value: Option<&str>) {
        self.label(node, json!({LABEL: value}));
    }

    /// Excludes a node from load balancers, or admits it again.
    pub(crate) fn exclude(&self, node: &str, excluded: bool) {
        self.label(node, json!({EXCLUDE: excluded.then_some("")}));
    }

    fn label(&self, node: &str, labels: Value) {
        self.cluster.block_on(async {
            let client = self.cluster.client().await.unwrap();
            objects::label_node(&client, node, labels).await.unwrap();
        });
    }

    /// Reports a node's pods ready or not.
    pub(crate) fn report_pods(&self, node: &str, ready: bool) {
        self.cluster.block_on(async {
            let client = self.cluster.client().await.unwrap();
            for pod in &self.lab().node(node).unwrap().pods {
                objects::set_pod(&client, pod, ready).await.unwrap();
            }
        });
    }

    /// Creates a Service; its addresses, IPv4 first.
    pub(crate) fn create(&self, name: &str, spec: Value, annotations: Value) -> Vec<IpAddr> {
        let mut service = objects::service(name, spec);
        service.metadata.annotations = serde_json::from_value(annotations).unwrap();
        let families = service.spec.as_ref().unwrap().ip_family_policy.clone();
        let number = if families.as_deref() == Some("SingleStack") {
            1
        } else {
            2
        };
        self.cluster.block_on(async {
            let services: Api<Service> =
                Api::default_namespaced(self.cluster.client().await.unwrap());
            let params = PostParams::default();
            services.create(&params, &service).await.unwrap();
        });
        eventually(
            "the Service's addresses",
            || self.assigned(name),
            |addresses| addresses.len() == number,
        )
    }

    pub(crate) fn service(&self, name: &str) -> Service {
        self.cluster.block_on(async {
            let services: Api<Service> =
                Api::default_namespaced(self.cluster.client().await.unwrap());
            services.get_status(name).await.unwrap()
        })
    }

    pub(crate) fn assigned(&self, name: &str) -> Vec<IpAddr> {
        let mut addresses = objects::ingress(&self.service(name));
        addresses.sort();
        addresses
    }

    /// Waits until both clients are answered by each address; the pod that answered last.
    pub(crate) fn served(&self, vips: &[IpAddr]) -> String {
        let mut last = String::new();
        for vip in vips {
            for from in [self.lab().client(), self.lab().remote()] {
                let Some((pod, _)) = client::first_answer(from, *vip, PATIENCE) else {
                    panic!("{vip} does not answer {}", from.name());
                };
                last = pod;
            }
        }
        last
    }

    /// Who answers ARP or ND on the LAN.
    pub(crate) fn answers(&self, vip: IpAddr) -> BTreeMap<String, usize> {
        neighbours::who_answers(self.lab(), vip, Duration::from_millis(400)).unwrap()
    }

    /// Waits until one station alone answers, and is said to lead; its name.
    pub(crate) fn leader(&self, vip: IpAddr) -> String {
        let look = || (self.answers(vip), self.status(vip)["leader"].clone());
        let (answers, _) = eventually("one leader", look, |(answers, said)| {
            answers.len() == 1 && said.as_str() == answers.keys().next().map(String::as_str)
        });
        answers.into_keys().next().unwrap()
    }

    /// Waits until all of these are led by a node, and serves them.
    pub(crate) fn led_by(&self, vips: &[IpAddr], node: &str) {
        for vip in vips {
            let look = || (self.answers(*vip), self.status(*vip));
            eventually(&format!("{node} to lead {vip}"), look, |(answers, said)| {
                answers.len() == 1 && answers.contains_key(node) && said["leader"] == node
            });
        }
        self.served(vips);
    }

    /// Waits until every speaker sees all others take part.
    pub(crate) fn all_take_part(&self) {
        let lab = self.lab();
        let alive = |node: &str| {
            let state = lab.speaker_state(node).ok()?;
            let alive = state["peers"].as_array()?.iter().filter(|peer| {
                peer["alive"] == true && peer["gossip"] == true && peer["synced"] == true
            });
            Some(alive.count() + 1)
        };
        let look = || -> Vec<usize> {
            let nodes = lab.nodes().iter();
            nodes.map(|node| alive(&node.name).unwrap_or(0)).collect()
        };
        eventually("all speakers to take part", look, |alive| {
            alive.iter().all(|number| *number == lab.nodes().len())
        });
    }

    /// A `VirtualIP`'s status.
    pub(crate) fn status(&self, vip: IpAddr) -> Value {
        let record = self.cluster.virtual_ip(vip);
        record.map_or(Value::Null, |it| serde_json::to_value(it.status).unwrap())
    }

    /// A `VirtualIP`'s condition `Announced`, `True Reason: message`.
    pub(crate) fn condition(&self, vip: IpAddr) -> String {
        self.condition_of(vip, "Announced")
    }

    fn condition_of(&self, vip: IpAddr, kind: &str) -> String {
        let status = self.status(vip);
        let conditions = status["conditions"].as_array();
        let of_kind = conditions.and_then(|all| all.iter().find(|it| it["type"] == kind));
        let text = |key: &str| {
            let text = of_kind.and_then(|condition| condition[key].as_str());
            text.unwrap_or_default().to_owned()
        };
        format!("{} {}: {}", text("status"), text("reason"), text("message"))
    }

    /// Waits until the condition `Steered` begins so; whole.
    pub(crate) fn expect_steered(&self, vip: IpAddr, start: &str) -> String {
        self.expect_of(vip, "Steered", start)
    }

    /// Waits until the condition `Served` begins so; whole.
    pub(crate) fn expect_served(&self, vip: IpAddr, start: &str) -> String {
        self.expect_of(vip, "Served", start)
    }

    fn expect_of(&self, vip: IpAddr, kind: &str, start: &str) -> String {
        let what = format!("{kind} {start} of {vip}");
        let look = || self.condition_of(vip, kind);
        eventually(&what, look, |it| it.starts_with(start))
    }

    /// Waits until it begins so; whole.
    pub(crate) fn expect(&self, vip: IpAddr, start: &str) -> String {
        let what = format!("{start} of {vip}");
        eventually(&what, || self.condition(vip), |it| it.starts_with(start))
    }

    /// Waits until the Service's condition `landfall.dev/Announced` begins so; whole.
    pub(crate) fn expect_on_service(&self, name: &str, start: &str) -> String {
        let look = || {
            let status = self.service(name).status.unwrap_or_default();
            status
                .conditions
                .unwrap_or_default()
                .into_iter()
                .find(|condition| condition.type_ == "landfall.dev/Announced")
                .map(|it| format!("{} {}: {}", it.status, it.reason, it.message))
                .unwrap_or_default()
        };
        eventually(&format!("{start} on {name}"), look, |it| {
            it.starts_with(start)
        })
    }

    /// The notes of the Events about a Service with a reason.
    pub(crate) fn events(&self, name: &str, reason: &str) -> Vec<String> {
        self.cluster.block_on(async {
            let api: Api<Event> = Api::default_namespaced(self.cluster.client().await.unwrap());
            let list = api.list(&ListParams::default()).await.unwrap();
            list.into_iter()
                .filter(|event| {
                    event.reason.as_deref() == Some(reason)
                        && event.regarding.as_ref().and_then(|it| it.name.as_deref()) == Some(name)
                })
                .filter_map(|event| event.note)
                .collect()
        })
    }

    /// Exactly so many Events of a reason come, and no more within three seconds; the notes.
    pub(crate) fn expect_events(&self, name: &str, reason: &str, number: usize) -> Vec<String> {
        eventually(
            &format!("Event {reason} of {name}"),
            || self.events(name, reason),
            |notes| notes.len() >= number,
        );
        thread::sleep(Duration::from_secs(3));
        let notes = self.events(name, reason);
        assert_eq!(notes.len(), number, "{reason} of {name}: {notes:?}");
        notes
    }
}
