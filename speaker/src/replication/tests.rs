use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use landfall_core::replication::{Binding, Change};
use prometheus_client::encoding::text::encode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::twin::Twin;
use super::*;

const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
const OTHER: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=";

fn keys(text: &str) -> Keys {
    Keys::parse(text).unwrap()
}

fn egress() -> IpAddr {
    [192, 0, 2, 7].into()
}

fn binding(n: u32) -> Binding {
    let port = u16::try_from(1_024 + n % 60_000).unwrap();
    let host = u8::try_from(n / 60_000).unwrap();
    Binding {
        protocol: 6,
        pod: ([10, 244, 0, host], port).into(),
        egress: (egress(), port).into(),
        remote: ([198, 51, 100, host], 25).into(),
    }
}

fn new(range: std::ops::Range<u32>) -> Vec<Change> {
    range.map(|n| Change::New(binding(n))).collect()
}

/// A node.
struct Node {
    name: &'static str,
    twin: Arc<Twin>,
    replication: Replication,
    registry: Registry,
}

impl Node {
    async fn start(name: &'static str, key: &str) -> Self {
        let mut registry = Registry::default();
        let (twin, told) = Twin::new();
        let twin = Arc::new(twin);
        let config = Config::new(name.into(), ([127, 0, 0, 1], 0).into());
        let replication = Replication::start(config, keys(key), twin.clone(), told, &mut registry)
            .await
            .unwrap();
        Self {
            name,
            twin,
            replication,
            registry,
        }
    }

    fn role(epoch: u64, gateway: Option<&Self>) -> Roles {
        let gateway = gateway.map(|it| (it.name.into(), it.replication.address()));
        let role = Role {
            epoch,
            addresses: BTreeSet::from([egress()]),
            policies: BTreeSet::from(["mail".into(), "shop".into()]),
            gateway,
        };
        Roles::from([("g".into(), role)])
    }

    fn leads(&self, epoch: u64) {
        self.replication.take_roles(Self::role(epoch, None));
    }

    fn follows(&self, epoch: u64, gateway: &Self) {
        self.replication
            .take_roles(Self::role(epoch, Some(gateway)));
    }

    /// How many nodes have all that this gateway has of a policy, as it says itself and as Prometheus hears.
    fn covered_by(&self, policy: &str) -> Option<u64> {
        let said = self.replication.copied().get(policy)?.standbys;
        let name = |of| format!("egress_policy_{of}{{policy=\"{policy}\"}}");
        let counted = self.metric(&name("standbys"));
        let lag = self.metric(&name("replication_lag_seconds"));
        let agree = (counted - f64::from(u32::try_from(said).unwrap())).abs() < 0.5;
        (agree && lag < 10.0).then_some(said)
    }

    /// A metric's value, by the beginning of its line.
    fn metric(&self, name: &str) -> f64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().last()?.parse().ok())
            .unwrap_or(0.0)
    }
}

/// Until it holds; at most ten seconds.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(10), "{what}");
        sleep(Duration::from_millis(5)).await;
    }
}

async fn alike(one: &Node, other: &Node) {
    eventually("the copy to be complete", || {
        *one.twin.all() == *other.twin.all()
    })
    .await;
}

#[tokio::test]
async fn a_standby_has_what_its_gateway_has() {
    let (a, b) = (Node::start("a", KEY).await, Node::start("b", KEY).await);
    a.leads(3);
    a.twin.change(new(0..5_000)).await;
    eventually("nobody to follow", || a.covered_by("mail") == Some(0)).await;
    // What an earlier gateway had left.
    b.twin.all().insert(binding(70_000));
    b.follows(3, &a);
    alike(&a, &b).await;
    assert_eq!(b.twin.all().len(), 5_000);
    for policy in ["mail", "shop"] {
        eventually("it is followed", || a.covered_by(policy) == Some(1)).await;
    }
    assert!(b.replication.copied().is_empty());
    let closed = (0..2_500).map(|n| Change::Closed(binding(n))).collect();
    a.twin.change(closed).await;
    a.twin.change(new(5_000..5_010)).await;
    alike(&a, &b).await;
    assert_eq!(b.twin.all().len(), 2_510);
    assert!(b.metric("replication_copies_total") <= 1.0);
    a.twin.lose(binding(9_999)).await;
    alike(&a, &b).await;
    assert!(b.metric("replication_copies_total") > 1.0);
}

#[tokio::test]
async fn a_take_over_and_the_next_standby() {
    let [a, b, c] = [
        Node::start("a", KEY).await,
        Node::start("b", KEY).await,
        Node::start("c", KEY).await,
    ];
    a.leads(1);
    b.follows(1, &a);
    a.twin.change(new(0..100)).await;
    alike(&a, &b).await;
    drop(a);
    b.leads(2);
    c.follows(2, &b);
    b.twin.change(new(100..200)).await;
    alike(&b, &c).await;
    assert_eq!(c.twin.all().len(), 200);
    // Who is no standby any more keeps nothing.
    c.replication.take_roles(Roles::new());
    eventually("the copy to be gone", || c.twin.all().is_empty()).await;
    assert_eq!(b.twin.all().len(), 200);
}

/// Groups merge, and an address leaves one: what counts is whose addresses they are.
#[tokio::test]
async fn bindings_stay_for_as_long_as_their_address_does() {
    let a = Node::start("a", KEY).await;
    a.leads(1);
    a.twin.change(new(0..100)).await;
    let lead = |group: &str, address: IpAddr| {
        let mut roles = Node::role(1, None);
        let mut role = roles.pop_first().unwrap().1;
        role.addresses.insert([192, 0, 2, 8].into());
        role.addresses.retain(|it| *it >= address);
        a.replication.take_roles([(group.into(), role)].into());
    };
    lead("merged", egress());
    sleep(Duration::from_millis(300)).await;
    assert_eq!(a.twin.all().len(), 100);
    lead("merged", [192, 0, 2, 8].into());
    eventually("none to be there", || a.twin.all().is_empty()).await;
}

#[tokio::test]
async fn who_was_succeeded_is_not_followed() {
    let (a, b) = (Node::start("a", KEY).await, Node::start("b", KEY).await);
    a.leads(1);
    a.twin.change(new(0..10)).await;
    b.follows(2, &a);
    eventually("it to be refused", || {
        b.metric("replication_refused_total{reason=\"stale\"}") > 0.0
    })
    .await;
    assert!(b.twin.all().is_empty());
    // It is the gateway again, in an epoch of its own.
    a.leads(3);
    alike(&a, &b).await;
}

#[tokio::test]
async fn who_does_not_lead_is_asked_again() {
    let (a, b) = (Node::start("a", KEY).await, Node::start("b", KEY).await);
    b.follows(1, &a);
    sleep(Duration::from_millis(300)).await;
    a.leads(1);
    a.twin.change(new(0..10)).await;
    alike(&a, &b).await;
}

#[tokio::test]
async fn another_key_is_refused_and_a_second_one_is_taken() {
    let (a, b) = (Node::start("a", KEY).await, Node::start("b", OTHER).await);
    a.leads(1);
    a.twin.change(new(0..10)).await;
    b.follows(1, &a);
    eventually("it to be refused", || {
        a.metric("replication_refused_total{reason=\"key\"}") > 0.0
    })
    .await;
    assert!(b.twin.all().is_empty());
    a.replication.rekey(keys(&format!("{KEY}\n{OTHER}")));
    alike(&a, &b).await;
}

#[tokio::test]
async fn strangers_harm_nothing() {
    let (a, b) = (Node::start("a", KEY).await, Node::start("b", KEY).await);
    a.leads(1);
    b.follows(1, &a);
    for said in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 0],
        &vec![0xff; 70_000],
        &[0, 48],
    ] {
        let mut stranger = TcpStream::connect(a.replication.address()).await.unwrap();
        // It may be shut out while it speaks.
        let _ = stranger.write_all(said).await;
        let _ = stranger.shutdown().await;
        let mut answer = Vec::new();
        let _ = stranger.read_to_end(&mut answer).await;
        assert!(answer.is_empty(), "{answer:?}");
    }
    a.twin.change(new(0..10)).await;
    alike(&a, &b).await;
}

#[tokio::test]
async fn what_was_said_cannot_be_said_again() {
    let a = Node::start("a", KEY).await;
    let b = Node::start("b", KEY).await;
    a.leads(1);
    // A stand-in between the two, that keeps what the standby says.
    let between = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let role = Role {
        epoch: 1,
        addresses: BTreeSet::from([egress()]),
        policies: BTreeSet::new(),
        gateway: Some(("a".into(), between.local_addr().unwrap())),
    };
    b.replication.take_roles(Roles::from([("g".into(), role)]));
    let (mut standby, _) = between.accept().await.unwrap();
    let mut gateway = TcpStream::connect(a.replication.address()).await.unwrap();
    let mut said = vec![0; 50];
    standby.read_exact(&mut said).await.unwrap();
    gateway.write_all(&said).await.unwrap();
    let mut answer = vec![0; 50];
    gateway.read_exact(&mut answer).await.unwrap();
    standby.write_all(&answer).await.unwrap();
    let mut more = vec![0; 4_096];
    let length = standby.read(&mut more).await.unwrap();
    drop((standby, gateway));
    // The same bytes again: the answer is another, and what follows is refused.
    let before = a.metric("replication_refused_total{reason=\"key\"}");
    let mut thief = TcpStream::connect(a.replication.address()).await.unwrap();
    thief.write_all(&said).await.unwrap();
    let mut other = vec![0; 50];
    thief.read_exact(&mut other).await.unwrap();
    assert_ne!(answer, other);
    thief.write_all(&more[..length]).await.unwrap();
    eventually("it to be refused", || {
        a.metric("replication_refused_total{reason=\"key\"}") > before
    })
    .await;
}

/// 5 000 new and 5 000 closed bindings a second: prints what it costs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_gateway() {
    const SECONDS: u32 = 3;
    let (a, b) = (Node::start("a", KEY).await, Node::start("b", KEY).await);
    a.leads(1);
    b.follows(1, &a);
    a.twin.change(new(0..5_000)).await;
    alike(&a, &b).await;
    let bytes = a.metric("replication_sent_bytes_total");
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    for step in 0..SECONDS * 100 {
        tick.tick().await;
        let (first, last) = (5_000 + step * 50, step * 50);
        let mut changes = new(first..first + 50);
        changes.extend((last..last + 50).map(|n| Change::Closed(binding(n))));
        a.twin.change(changes).await;
    }
    alike(&a, &b).await;
    let changes = f64::from(SECONDS) * 10_000.0;
    let bytes = a.metric("replication_sent_bytes_total") - bytes;
    let (sum, count) = (
        a.metric("replication_lag_seconds_sum"),
        a.metric("replication_lag_seconds_count"),
    );
    println!(
        "{:.1} bytes a change, {:.2} Mbit/s; lag of the oldest change of a message: mean {:.1} ms; {} copies",
        bytes / changes,
        bytes * 8.0 / f64::from(SECONDS) / 1e6,
        sum / count * 1e3,
        b.metric("replication_copies_total"),
    );
    assert!(b.metric("replication_copies_total") <= 1.0);
}
