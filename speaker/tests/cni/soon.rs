//! Pods that connect in their first moment, with the plugin and a speaker that judges.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{Cluster, PATIENCE, PLAIN};
use super::pods::{Pod, Seen, spread, with_all};

/// How many there are.
const PODS: usize = 200;
const TENANTS: [&str; 3] = ["red", "blue", PLAIN];

pub(super) fn bridge() -> Value {
    json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false})
}

fn links() -> Value {
    json!({"type": "ptp", "ipMasq": false})
}

/// A cluster with policies, and pods that are scheduled: the API server knows them, and no address.
fn mk_scheduled(first: &Value) -> Cluster {
    let cluster = Cluster::build(first, [20, 250]);
    for number in 0..PODS {
        cluster.tell(&format!("pod{number}"), tenant(number), &[]);
    }
    cluster.write_policies();
    cluster
}

fn tenant(number: usize) -> &'static str {
    TENANTS[number % TENANTS.len()]
}

fn mk_pods(cluster: &Cluster) -> Vec<Pod<'_>> {
    (0..PODS)
        .map(|number| Pod::new(cluster, format!("pod{number}"), tenant(number)))
        .collect()
}

/// How long it took until each tenant's pods were connected.
fn show(pods: &[Pod<'_>], seen: &[Vec<Seen>]) {
    for tenant in TENANTS {
        let of = pods
            .iter()
            .zip(seen)
            .filter(|(pod, _)| pod.tenant == tenant);
        let took = of
            .flat_map(|(_, seen)| seen.iter().map(|seen| seen.took))
            .collect();
        println!("first connect of {tenant}: {}", spread(took));
    }
}

/// Nobody was seen as anything but what its tenant's pods leave by.
fn assert_right(cluster: &Cluster, pods: &[Pod<'_>], seen: &[Vec<Seen>]) {
    for (pod, seen) in pods.iter().zip(seen) {
        let by: Vec<IpAddr> = seen.iter().map(|seen| seen.by).collect();
        assert_eq!(by, cluster.leaves_by(pod.tenant), "{}", pod.name);
    }
    let owners: Vec<(&str, &[IpAddr])> = pods
        .iter()
        .map(|pod| (pod.tenant, pod.addresses.as_slice()))
        .collect();
    let frames = cluster.assert_clean(&owners);
    println!("{frames} kinds of frames on the wire, 0 of them with another source");
    assert!(frames > PODS, "the tap sees too little");
}

fn at_once(first: &Value) {
    let cluster = mk_scheduled(first);
    cluster.speak();
    cluster.await_armed();
    let mut pods = mk_pods(&cluster);
    let begun = Instant::now();
    let seen: Vec<Vec<Seen>> = with_all(&mut pods, |pod| {
        pod.add();
        let seen = pod.connect(PATIENCE).into_iter();
        seen.map(|seen| seen.unwrap()).collect()
    });
    println!(
        "{PODS} pods by {}, in {:.1} s; dropped as unknown: {}",
        first["type"],
        begun.elapsed().as_secs_f64(),
        cluster.dropped().unwrap()
    );
    let unjudged = pods.iter().filter(|pod| !pod.said.is_empty()).count();
    println!("pods that were not judged within the plugin's wait: {unjudged}");
    println!(
        "ADD, all plugins: {}",
        spread(pods.iter().map(|pod| pod.took).collect())
    );
    show(&pods, &seen);
    assert_right(&cluster, &pods, &seen);
    // Nobody's first packet was lost, but of those that the machine was too slow for: they sent it again, after 1, 3, 7 s.
    let sent = unjudged * cluster.leaves_by(PLAIN).len() * 4;
    let dropped = cluster.dropped().unwrap();
    assert!(
        dropped <= sent as u64,
        "{dropped} packets of {unjudged} pods"
    );
    with_all(&mut pods, Pod::del);
}

#[test]
fn two_hundred_pods_on_a_bridge_leave_by_nothing_else_and_at_once() {
    at_once(&bridge());
}

#[test]
fn two_hundred_pods_on_links_of_their_own_leave_by_nothing_else_and_at_once() {
    at_once(&links());
}

/// The API server is late: the plugin waits, for as long as it waits for anybody.
#[test]
fn a_pod_that_is_told_of_late_is_waited_for() {
    const LATE: Duration = Duration::from_millis(200);
    let cluster = Cluster::armed(&bridge(), [20, 30]);
    let mut pod = Pod::new(&cluster, "late".into(), "red");
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(LATE);
            cluster.tell("late", "red", &[]);
        });
        pod.add();
    });
    println!(
        "told after {LATE:?}, ADD took {:?}; {:?}",
        pod.took, pod.said
    );
    for (seen, by) in pod
        .connect(PATIENCE)
        .into_iter()
        .zip(cluster.leaves_by("red"))
    {
        assert_eq!(seen.unwrap().by, by);
    }
    // Of another it never hears while the plugin waits: the pod starts, and sends nothing until it does.
    let mut other = Pod::new(&cluster, "later".into(), "blue");
    other.add();
    println!("never told, ADD took {:?}; {:?}", other.took, other.said);
    assert!(other.said.contains("default/later"), "{}", other.said);
    assert_eq!(
        other
            .connect(Duration::from_millis(300))
            .iter()
            .flatten()
            .count(),
        0
    );
    let waiting = thread::scope(|scope| {
        let connecting = scope.spawn(|| other.connect(PATIENCE));
        thread::sleep(LATE);
        cluster.tell("later", "blue", &[]);
        connecting.join().unwrap()
    });
    for (seen, by) in waiting.into_iter().zip(cluster.leaves_by("blue")) {
        assert_eq!(seen.unwrap().by, by);
    }
    cluster.assert_clean(&[("red", &pod.addresses), ("blue", &other.addresses)]);
}

/// Without the plugin their first packets are dropped until their node has judged them, and no other source is seen. (On a
/// bridge pods would lose their router while it gets its address: that is CNI's, and what the plugin is for, too.)
#[test]
fn two_hundred_pods_without_the_plugin_leave_by_nothing_else() {
    let cluster = mk_scheduled(&links());
    cluster.speak_without_plugin();
    let mut pods = mk_pods(&cluster);
    let seen: Vec<Vec<Seen>> = with_all(&mut pods, |pod| {
        pod.add();
        let seen = thread::scope(|scope| {
            let connecting = scope.spawn(|| pod.connect(PATIENCE));
            // The API server hears of the address while the pod connects.
            cluster.tell(&pod.name, pod.tenant, &pod.addresses);
            connecting.join().unwrap()
        });
        seen.into_iter().map(|seen| seen.unwrap()).collect()
    });
    println!("dropped as unknown: {}", cluster.dropped().unwrap());
    show(&pods, &seen);
    assert_right(&cluster, &pods, &seen);
    assert!(cluster.dropped() > Some(0), "nobody was too early");
    with_all(&mut pods, Pod::del);
}
