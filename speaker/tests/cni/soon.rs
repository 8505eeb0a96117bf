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

fn at_once(first: &Value) {
    let cluster = Cluster::build(first, [20, 250]);
    let tenant = |number: usize| TENANTS[number % TENANTS.len()];
    // They are scheduled: the API server knows them, and no address.
    for number in 0..PODS {
        cluster.tell(&format!("pod{number}"), tenant(number), &[]);
    }
    cluster.write_policies();
    cluster.speak();
    cluster.await_armed();
    let mut pods: Vec<Pod<'_>> = (0..PODS)
        .map(|number| Pod::new(&cluster, format!("pod{number}"), tenant(number)))
        .collect();
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
    for tenant in TENANTS {
        let of = pods
            .iter()
            .zip(&seen)
            .filter(|(pod, _)| pod.tenant == tenant);
        let took = of
            .flat_map(|(_, seen)| seen.iter().map(|seen| seen.took))
            .collect();
        println!("first connect of {tenant}: {}", spread(took));
    }
    for (pod, seen) in pods.iter().zip(&seen) {
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
    // Nobody's first packet was lost, but of those that the machine was too slow for.
    if unjudged == 0 {
        assert_eq!(cluster.dropped(), Some(0));
    }
    with_all(&mut pods, Pod::del);
}

#[test]
fn two_hundred_pods_on_a_bridge_leave_by_nothing_else_and_at_once() {
    at_once(&bridge());
}

#[test]
fn two_hundred_pods_on_links_of_their_own_leave_by_nothing_else_and_at_once() {
    at_once(&json!({"type": "ptp", "ipMasq": false}));
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
