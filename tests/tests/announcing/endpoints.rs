//! How soon the tables of all nodes follow the endpoints, with the real kube-proxy delivering. Times are printed.
//!
//! A busy machine may be late now and then, so half of the times are held to a few times the goal. What clients lose
//! needs no clock: an addition that comes to the tables sooner than to kube-proxy costs them SYNs, and so does a removal
//! that comes much later.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::measure::connects;
use landfall_lab::server::TCP_PORT;
use landfall_lab::{Lab, Network, Node, Pod, speakers::http_get};
use landfall_tests::slices::{self, State};
use landfall_tests::{PATIENCE, tables};
use serde_json::json;

use crate::scene::Scene;
use crate::table::Table;

const SERVICE: &str = "followed";
const ROUNDS: usize = 10;
/// What the busiest machine does not need; the goal is 100 ms.
const GENEROUS: Duration = Duration::from_secs(5);
/// What half of the times keep to on a busy machine.
const MEDIAN: Duration = Duration::from_millis(500);
/// A SYN that is lost is sent again after so long: a connection that took less lost none (RFC 6298, 2.1).
const SYN_AGAIN: Duration = Duration::from_secs(1);
/// What half of the connections keep to on a busy machine while another endpoint is being added.
const CONNECT: Duration = Duration::from_millis(300);

/// A Service whose slice the test writes, and what belongs to it.
struct Followed<'a> {
    scene: &'a Scene<'a>,
    vip: IpAddr,
    /// By which kube-proxy says whether a node has endpoints.
    health: u16,
}

impl<'a> Followed<'a> {
    fn create(scene: &'a Scene<'a>) -> Self {
        let spec = json!({
            "externalTrafficPolicy": "Local", "ipFamilyPolicy": "SingleStack", "selector": null,
        });
        let vip = scene.create(SERVICE, spec, json!({}))[0];
        let port = scene.service(SERVICE).spec.unwrap().health_check_node_port;
        Self {
            scene,
            vip,
            health: u16::try_from(port.unwrap()).unwrap(),
        }
    }

    fn lab(&self) -> &Lab {
        self.scene.lab()
    }

    /// As the tables name it.
    fn port(&self) -> String {
        format!("{}/TCP", SocketAddr::new(self.vip, TCP_PORT))
    }

    /// Writes the slice; the moment before.
    fn write<'p>(&self, endpoints: impl IntoIterator<Item = (&'p Pod, State)>) -> Instant {
        self.scene.cluster.block_on(async {
            let client = self.scene.cluster.client().await.unwrap();
            // The connection is there before the time begins.
            client.apiserver_version().await.unwrap();
            let begun = Instant::now();
            slices::write(&client, SERVICE, endpoints).await.unwrap();
            begun
        })
    }

    /// Does something to the endpoints, and waits until all nodes' tables have this node or have it not.
    fn tables(
        &self,
        node: &str,
        there: bool,
        change: impl FnOnce() -> Instant,
    ) -> (Instant, Instant) {
        let nodes: Vec<&str> = self.lab().nodes().iter().map(|node| &*node.name).collect();
        let wanted = |table: &tables::Table| table.contains_key(node) == there;
        tables::follow(self.lab(), &nodes, &self.port(), wanted, change)
    }

    /// Waits until kube-proxy on a node says that it serves, or that it does not; when it did.
    fn kube_proxy(&self, node: &Node, serves: bool) -> Instant {
        let address = node.addresses(Network::Management)[0];
        let begun = Instant::now();
        loop {
            let answer = http_get(&node.netns, SocketAddr::new(address, self.health), "/");
            let refused = answer
                .as_ref()
                .is_err_and(|why| why.to_string().contains("503"));
            if (serves && answer.is_ok()) || (!serves && refused) {
                return Instant::now();
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "kube-proxy of {}: {answer:?}",
                node.name
            );
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The median and the longest, in words; the times are sorted after it.
fn summary(times: &mut [Duration]) -> String {
    times.sort();
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    assert!(longest < GENEROUS, "{times:?}");
    format!(
        "median {:.0} ms, longest {:.0} ms of {}",
        median.as_secs_f64() * 1e3,
        longest.as_secs_f64() * 1e3,
        times.len()
    )
}

/// An endpoint that is removed or not ready leaves all tables at once; one that comes is in them when its node's
/// kube-proxy is ready, and no sooner. Connections come meanwhile: all come about, and next to none loses a SYN. It may
/// where kube-proxy hears of a removal some milliseconds before the tables do.
pub(crate) fn removed_and_added(scene: &Scene<'_>) {
    let followed = Followed::create(scene);
    let nodes = scene.lab().nodes();
    let all = || scene.lab().pods().map(|pod| (pod, State::Ready));
    for node in nodes {
        followed.tables(&node.name, true, || followed.write(all()));
    }
    scene.served(&[followed.vip]);
    let to = SocketAddr::new(followed.vip, TCP_PORT);
    let probe = connects::Probe::start_every(scene.lab().client(), to, Duration::from_millis(10));
    let (mut removals, mut rules, mut additions) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let node = &nodes[round % nodes.len()];
        // Speakers gather what follows a change closely.
        thread::sleep(Duration::from_millis(200));
        let (written, gone) = followed.tables(&node.name, false, || {
            let theirs = |pod: &Pod| pod.node == node.name;
            if round % 2 == 0 {
                followed.write(all().filter(|(pod, _)| !theirs(pod)))
            } else {
                followed.write(all().map(|(pod, state)| {
                    let state = if theirs(pod) { State::NotReady } else { state };
                    (pod, state)
                }))
            }
        });
        removals.push(gone - written);
        followed.kube_proxy(node, false);

        let (ready, there) = followed.tables(&node.name, true, || {
            let written = followed.write(all());
            let ready = followed.kube_proxy(node, true);
            rules.push(ready - written);
            ready
        });
        additions.push(there.saturating_duration_since(ready));
    }
    let report = probe.stop();
    let connects = report.established.len();
    let sent_again = report.established.iter();
    let sent_again = sent_again.filter(|took| **took >= SYN_AGAIN).count();
    println!(
        "      {connects} connects meanwhile: {sent_again} lost a SYN, slowest {:?}",
        report.worst()
    );
    println!(
        "      slice -> removed from all tables: {}",
        summary(&mut removals)
    );
    println!("      slice -> kube-proxy ready: {}", summary(&mut rules));
    println!(
        "      kube-proxy ready -> in all tables: {}",
        summary(&mut additions)
    );
    for times in [&removals, &additions] {
        assert!(times[times.len() / 2] < MEDIAN, "{times:?}");
    }
    assert_eq!(report.failed, 0, "of {connects}");
    // Tables that follow a second later than kube-proxy cost a tenth of all and more.
    assert!(sent_again * 20 < connects, "{sent_again} of {connects}");
}

/// First segments of the client's connections to a VIP, where they begin and in the pods. What is lost in between is
/// seen so however late a busy machine makes the rest.
struct Syns<'a> {
    sent: Table<'a>,
    received: Vec<Table<'a>>,
}

impl<'a> Syns<'a> {
    fn count(lab: &'a Lab, to: SocketAddr) -> Self {
        let counted = |hook: &str, which: &str| {
            format!(
                "counter seen {{ }}
                 chain syns {{
                   type filter hook {hook} priority 0;
                   {which} tcp flags & (syn | ack) == syn counter name seen
                 }}"
            )
        };
        let there = format!("ip daddr {} tcp dport {}", to.ip(), to.port());
        let here = format!("ip saddr {}", Network::Lan.v4(100));
        Self {
            sent: Table::load(lab.client(), "syns", &counted("output", &there)),
            received: lab
                .pods()
                .map(|pod| Table::load(&pod.netns, "syns", &counted("input", &here)))
                .collect(),
        }
    }

    /// How many were sent, and how many of them no pod has received.
    fn counts(&self) -> (u64, u64) {
        let sent = self.sent.packets("seen");
        let received: u64 = self.received.iter().map(|pod| pod.packets("seen")).sum();
        (sent, sent - received)
    }
}

/// New connections come while one node after the other gets its first endpoint: each is served, and none has to
/// send its SYN again, which takes a second.
pub(crate) fn added_under_load(scene: &Scene<'_>) {
    const PACE: Duration = Duration::from_millis(5);
    let followed = Followed::create(scene);
    let nodes = scene.lab().nodes();
    let first = |number: usize| {
        let pods = nodes[..number].iter().flat_map(|node| &node.pods);
        pods.map(|pod| (pod, State::Ready))
    };
    let to = SocketAddr::new(followed.vip, TCP_PORT);
    let mut connects = Vec::new();
    let (mut sent, mut lost) = (0, 0);
    for _ in 0..3 {
        followed.tables(&nodes[0].name, true, || followed.write(first(1)));
        for node in &nodes[1..] {
            followed.tables(&node.name, false, Instant::now);
            followed.kube_proxy(node, false);
        }
        scene.served(&[followed.vip]);
        let syns = Syns::count(scene.lab(), to);
        let probe = connects::Probe::start_every(scene.lab().client(), to, PACE);
        for number in 2..=nodes.len() {
            let node = &nodes[number - 1];
            followed.tables(&node.name, true, || followed.write(first(number)));
            // What is wrong shows with the connections that come now.
            thread::sleep(Duration::from_millis(300));
        }
        let report = probe.stop();
        assert_eq!(report.failed, 0, "of {}", report.established.len());
        connects.extend(report.established);
        let counted = syns.counts();
        sent += counted.0;
        lost += counted.1;
    }
    connects.sort();
    let number = connects.len();
    let (median, slowest) = (connects[number / 2], connects[number - 1]);
    println!(
        "      {number} connects, one every {PACE:?}: {lost} of {sent} SYNs lost; median {median:?}, slowest {slowest:?}"
    );
    assert!(number > 500 && sent >= number as u64, "{sent} of {number}");
    assert_eq!(lost, 0, "of {sent}");
    assert!(median < CONNECT, "{median:?}");
}
