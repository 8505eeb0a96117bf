//! Two kernels' worth of bindings, and the real channel between them.

use std::time::{Duration, Instant};

use landfall_ebpf_common::egress::binding::Times;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use super::super::super::egress::{Changes, Licence, Seam};
use super::*;
use crate::keys::Keys;
use crate::replication::{Config, Copying as _, Happened, Replication, Role, Roles};

const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/// A node's replication, on threads of this name.
struct Speaks {
    replication: Replication,
    runtime: Runtime,
    registry: Registry,
}

impl Speaks {
    fn start(name: &'static str, gate: &Gate, happened: mpsc::Receiver<Happened>) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(name)
            .enable_all()
            .build()
            .expect("a runtime needs but a few descriptors");
        let mut registry = Registry::default();
        let config = Config::new(name.into(), ([127, 0, 0, 1], 0).into());
        let keys = Keys::parse(KEY).expect("it is one");
        let bindings = Arc::new(Seam(Arc::clone(&gate.copies)));
        let started = Replication::start(config, keys, bindings, happened, &mut registry);
        let replication = runtime.block_on(started).expect("a port is free");
        Self {
            replication,
            runtime,
            registry,
        }
    }

    fn is(&self, gateway: Option<&Self>) {
        let gateway = gateway.map(|it| ("gateway".into(), it.replication.address()));
        let role = Role {
            epoch: 1,
            addresses: WORLDS.map(|world| world.egress).into(),
            policies: BTreeSet::from(["mail".into()]),
            gateway,
        };
        self.replication
            .take_roles(Roles::from([("mail".into(), role)]));
    }

    /// The sum of a metric's lines that begin so.
    fn metric(&self, name: &str) -> f64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("it is text");
        let lines = text.lines().filter_map(|line| line.strip_prefix(name));
        lines
            .filter_map(|rest| rest.split_whitespace().last()?.parse::<f64>().ok())
            .sum()
    }

    /// The bound that so many of a hundred lags are below, in seconds.
    fn lag(&self, of_hundred: f64) -> f64 {
        let all = self.metric("replication_lag_seconds_count");
        (0..14)
            .map(|power| 0.001 * 2_f64.powi(power))
            .find(|bound| {
                let below =
                    self.metric(&format!("replication_lag_seconds_bucket{{le=\"{bound}\"}}"));
                below >= all * of_hundred / 100.0
            })
            .unwrap_or(f64::INFINITY)
    }
}

/// For how long the threads of this name have run.
fn ran(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("it is there");
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let of = |file: &str| std::fs::read_to_string(task.path().join(file)).ok();
        let is_it = of("comm")?.trim() == name;
        let ran = of("schedstat")?.split(' ').next()?.parse::<u64>().ok()?;
        is_it.then_some(ran)
    });
    Duration::from_nanos(nanoseconds.sum())
}

/// 5 000 new and 5 000 closed bindings a second: prints what it costs, and how far behind the standby is.
#[test]
fn a_busy_gateway_is_followed() {
    const SECONDS: u32 = 3;
    const STEP: Duration = Duration::from_millis(10);
    let [world, _] = WORLDS;
    let mut gate = Gate::with(&mk_egress(), Times::default(), 0);
    gate.leads(&mk_egress(), Licence::Full);
    gate.maps.tell().expect("the map takes it");
    let standby = Gate::standby(mk_egress(), Times::default());
    let (to, told) = mpsc::channel(16);
    let source = gate.changes.take().expect("nobody else reads it");
    let reader = Changes::start(source, move || Some(to.clone()));
    let first = Speaks::start("gateway", &gate, told);
    let (_nobody, nothing) = mpsc::channel(1);
    let second = Speaks::start("standby", &standby, nothing);
    first.is(None);
    second.is(Some(&first));
    while first.metric("replication_standbys") < 1.0 {
        std::thread::sleep(STEP);
    }
    let flow = |number: u32| {
        let own = u16::try_from(2_000 + number % 60_000).expect("a port");
        let remote = u16::try_from(443 + number / 60_000).expect("a port");
        (own, remote)
    };
    let before = ["bindings", "gateway", "standby"].map(ran);
    let begun = Instant::now();
    for step in 0..SECONDS * 100 {
        for number in step * 50..step * 50 + 50 {
            let (own, to) = flow(number);
            let syn = mk(OTHER, world.pod, world.remote, 6, 64, &mk_tcp(own, to, SYN));
            assert_eq!(gate.comes(&syn).0, SENT);
            // The one of a second ago ends.
            let Some(earlier) = number.checked_sub(5_000) else {
                continue;
            };
            let (own, to) = flow(earlier);
            let out = mk_tcp(own, to, FIN | ACK);
            assert_eq!(
                gate.comes(&mk(OTHER, world.pod, world.remote, 6, 64, &out))
                    .0,
                SENT
            );
            let back = mk_tcp(to, own, FIN | ACK);
            let back = mk(STRANGER, world.remote, world.egress, 6, 64, &back);
            assert_eq!(gate.comes(&back).0, SENT);
        }
        std::thread::sleep((begun + STEP * (step + 1)).saturating_duration_since(Instant::now()));
    }
    let took = begun.elapsed().as_secs_f64();
    let held = gate.held(world.egress);
    assert_eq!(held.len(), 5_000);
    let waited = Instant::now();
    while standby.held(world.egress) != held {
        assert!(
            waited.elapsed() < Duration::from_secs(30),
            "it does not get all"
        );
        std::thread::sleep(STEP);
    }
    let after = ["bindings", "gateway", "standby"].map(ran);
    let [reads, sends, applies] = std::array::from_fn(|at| {
        100.0 * (after[at].saturating_sub(before[at])).as_secs_f64() / took
    });
    let changes = second.metric("replication_changes_total");
    let bytes = first.metric("replication_sent_bytes_total");
    println!(
        "{changes} changes in {took:.1} s: {:.1} bytes each, {:.2} Mbit/s; lag of the oldest of a message: mean {:.1} ms, \
         99 of 100 below {:.0} ms; of a CPU: {reads:.1} % to read them, {sends:.1} % to send them, {applies:.1} % to apply \
         them at the standby (development build); {} full copies, {} untold",
        bytes / changes,
        bytes * 8.0 / took / 1e6,
        1e3 * first.metric("replication_lag_seconds_sum")
            / first.metric("replication_lag_seconds_count"),
        1e3 * first.lag(99.0),
        second.metric("replication_copies_total"),
        gate.count(Reason::Untold),
    );
    assert_eq!(standby.used("mail"), 5_000);
    assert_eq!(standby.count(Reason::Cut), 0);
    drop(reader);
    for one in [first, second] {
        let inside = one.runtime.enter();
        drop(one.replication);
        drop(inside);
        one.runtime.shutdown_timeout(Duration::from_secs(5));
    }
}
