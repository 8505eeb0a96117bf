//! Pods are replaced under load: an app that drains loses no request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use landfall_lab::manifests::{Condition, LINES};
use landfall_lab::{Netns, Pod};

use super::cluster::{Cluster, SERVICE, vips};
use super::flow::{Flow, await_served};

/// How many clients ask, each request on a connection of its own.
const CLIENTS: u32 = 5;
/// The time between two requests of a client: a hundred a second in all.
const INTERVAL: Duration = Duration::from_millis(50);
/// How many clients make requests that last.
const LASTING: usize = 10;
/// For how long those last.
const LAST: Duration = Duration::from_secs(1);
/// For how long a pod drains: longer than its longest request.
const DRAIN: Duration = Duration::from_secs(3);

/// What a client's requests came to.
#[derive(Default)]
struct Outcome {
    answered: usize,
    failed: Vec<String>,
    slowest: Duration,
}

impl Outcome {
    fn request(&mut self, from: &Netns, to: SocketAddr, lasts: Duration) {
        let begun = Instant::now();
        let mut pod = String::new();
        let answer = Flow::open(from, to).and_then(|mut flow| {
            pod.clone_from(&flow.pod);
            thread::sleep(lasts);
            flow.say("the end")
        });
        match answer {
            Ok(_) => self.answered += 1,
            Err(error) => self.failed.push(format!("{pod}: {error}")),
        }
        self.slowest = self.slowest.max(begun.elapsed().saturating_sub(lasts));
    }
}

/// A client that makes requests until told to stop.
fn client(
    from: &Netns,
    to: SocketAddr,
    lasts: Duration,
    stop: &Arc<AtomicBool>,
) -> JoinHandle<Outcome> {
    let (from, stop) = (from.share(), Arc::clone(stop));
    thread::spawn(move || {
        let begun = Instant::now();
        let mut outcome = Outcome::default();
        for number in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            outcome.request(&from, to, lasts);
            thread::sleep((INTERVAL * number).saturating_sub(begun.elapsed()));
        }
        outcome
    })
}

#[test]
fn pods_that_drain_lose_no_request() {
    // The new pods are on other nodes than the old ones: the tables change with each.
    let cluster = Cluster::start(6, 1);
    let pods = cluster.pods();
    let (old, new) = pods.split_at(3);
    cluster.serve(old);
    cluster.speak();
    let [v4, v6] = vips();
    cluster.await_leader(v4, |_| true);
    await_served(&cluster, v4, old);
    await_served(&cluster, v6, old);
    let stop = Arc::new(AtomicBool::new(false));
    let from = cluster.lab.client();
    let to = |number: usize| SocketAddr::new([v4, v6][number % 2], LINES);
    let quick: Vec<_> = (0..CLIENTS as usize)
        .map(|number| client(from, to(number), Duration::ZERO, &stop))
        .collect();
    let lasting: Vec<_> = (0..LASTING)
        .map(|number| client(from, to(number), LAST, &stop))
        .collect();
    thread::sleep(LAST);

    let mut serving: Vec<(&Pod, Condition)> =
        old.iter().map(|pod| (*pod, Condition::Ready)).collect();
    let say = |serving: &[(&Pod, Condition)]| {
        let manifests = &cluster.manifests;
        manifests.write_endpoints_as(SERVICE, serving).unwrap();
    };
    for (gone, come) in old.iter().zip(new) {
        serving.push((come, Condition::Ready));
        say(&serving);
        // A rollout goes on when the new pod has been ready for a moment.
        thread::sleep(Duration::from_secs(1));
        for (pod, condition) in &mut serving {
            if pod.name == gone.name {
                *condition = Condition::Draining;
            }
        }
        say(&serving);
        thread::sleep(DRAIN);
        // It has ended before its object is gone.
        cluster.lab.stop_pod(&gone.name);
        thread::sleep(Duration::from_millis(200));
        serving.retain(|(pod, _)| pod.name != gone.name);
        say(&serving);
    }
    thread::sleep(LAST);
    await_served(&cluster, v4, new);
    stop.store(true, Ordering::Relaxed);
    for (kind, clients) in [("quick", quick), ("lasting", lasting)] {
        let mut all = Outcome::default();
        for client in clients {
            let outcome = client.join().unwrap();
            all.answered += outcome.answered;
            all.failed.extend(outcome.failed);
            all.slowest = all.slowest.max(outcome.slowest);
        }
        println!(
            "{kind}: {} answered, {} failed, the slowest after {:?}",
            all.answered,
            all.failed.len(),
            all.slowest
        );
        assert!(all.answered > 0);
        assert!(
            all.failed.is_empty(),
            "{kind} requests failed: {:?}",
            all.failed
        );
    }
    println!("{:?}", cluster.verdicts());
}
