//! Release and rest, processes that die, processes that take turns.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;

use crate::env::{Env, eventually};

pub(crate) async fn quarantine(env: &Env) {
    env.pool(
        "main",
        json!({ "addresses": ["192.0.2.0/32"], "quarantine": "15s" }),
    )
    .await;
    let controller = env.controller(&[]);
    env.service("first", json!({}), json!({})).await;
    env.expect("first", &["192.0.2.0"]).await;
    env.delete("first").await;
    let freed = std::time::Instant::now();
    env.service("second", json!({}), json!({})).await;
    env.expect_condition("second", "False PoolExhausted").await;
    // The rest is on record, so a new process keeps to it; the former owner need not wait.
    controller.kill();
    let _controller = env.controller(&[]);
    env.service("first", json!({}), json!({})).await;
    env.expect("first", &["192.0.2.0"]).await;
    assert!(env.shown("second").await.is_empty());
    env.delete("first").await;
    env.expect("second", &["192.0.2.0"]).await;
    assert!(freed.elapsed() > Duration::from_secs(15));
}

pub(crate) async fn type_change(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    let _controller = env.controller(&[]);
    env.service("web", json!({}), json!({})).await;
    env.expect("web", &["192.0.2.0"]).await;
    env.edit(
        "web",
        json!({ "spec": { "type": "ClusterIP", "allocateLoadBalancerNodePorts": null } }),
    )
    .await;
    eventually("its condition", || env.condition("web"), String::is_empty).await;
    eventually(
        "its record",
        || async {
            env.virtual_ips()
                .list(&ListParams::default())
                .await
                .unwrap()
                .items
                .len()
        },
        |&count| count == 0,
    )
    .await;
}

pub(crate) async fn killed_in_a_burst(env: &Env) {
    const COUNT: usize = 120;
    env.pool("main", json!({ "addresses": ["10.88.0.0/16"] }))
        .await;
    let mut settled: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut controller = Some(env.controller(&["--identity", "burst"]));
    let check = |settled: &BTreeMap<String, Vec<String>>, now: &BTreeMap<String, Vec<String>>| {
        let all: Vec<_> = now.values().flatten().collect();
        assert_eq!(
            all.len(),
            all.iter().collect::<BTreeSet<_>>().len(),
            "two owners"
        );
        for (name, addresses) in settled {
            assert_eq!(&now[name], addresses, "{name} moved");
        }
    };
    let create = async {
        for number in 0..COUNT {
            env.service(&format!("s{number:03}"), json!({}), json!({}))
                .await;
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    };
    let kill = async {
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(400)).await;
            if let Some(controller) = controller.take() {
                controller.kill();
            }
            let now = env.assignments().await;
            check(&settled, &now);
            settled = now
                .into_iter()
                .filter(|(_, addresses)| !addresses.is_empty())
                .collect();
            controller = Some(env.controller(&["--identity", "burst"]));
        }
        controller
    };
    let ((), _controller) = futures::join!(create, kill);
    let now = eventually(
        "all addresses",
        || env.assignments(),
        |now| now.len() == COUNT && now.values().all(|addresses| addresses.len() == 1),
    )
    .await;
    check(&settled, &now);
    let records = env
        .virtual_ips()
        .list(&ListParams::default())
        .await
        .unwrap();
    assert_eq!(records.items.len(), COUNT);
    // An Event may be lost with its process, but is never told twice.
    for number in 0..COUNT {
        let events = env.events(&format!("s{number:03}")).await;
        assert!(events.len() <= 1, "s{number:03}: {events:?}");
    }
}

pub(crate) async fn two_replicas(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/24"] }))
        .await;
    let first = env.controller(&["--identity", "one"]);
    env.service("s1", json!({}), json!({})).await;
    env.expect("s1", &["192.0.2.0"]).await;
    let second = env.controller(&["--identity", "two"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    // A clean stop hands over at once.
    let begun = std::time::Instant::now();
    first.terminate();
    env.service("s2", json!({}), json!({})).await;
    env.expect("s2", &["192.0.2.1"]).await;
    println!(
        "       hand-over after SIGTERM: {:.2} s",
        begun.elapsed().as_secs_f32()
    );
    // A killed one is replaced when its Lease is over.
    let _third = env.controller(&["--identity", "three"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = std::time::Instant::now();
    second.kill();
    env.service("s3", json!({}), json!({})).await;
    env.expect("s3", &["192.0.2.2"]).await;
    println!(
        "       hand-over after SIGKILL: {:.2} s",
        begun.elapsed().as_secs_f32()
    );
    for name in ["s1", "s2", "s3"] {
        eventually(
            name,
            || env.events(name),
            |events| *events == ["AddressAssigned"],
        )
        .await;
    }
}

pub(crate) async fn announced_is_mirrored(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    let _controller = env.controller(&[]);
    env.service("web", json!({}), json!({})).await;
    env.expect("web", &["192.0.2.0"]).await;
    let report = |status: &'static str, reason: &'static str| async move {
        let status = json!({ "status": { "conditions": [{
            "type": "Announced", "status": status, "reason": reason, "message": "n1: link down",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }] } });
        env.virtual_ips()
            .patch_status("192.0.2.0", &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap();
    };
    let announced = || env.condition_of("web", "landfall.dev/Announced");
    report("True", "LeaderElected").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(
        announced().await,
        "",
        "a healthy Service costs no further write"
    );
    report("False", "NoEligibleNode").await;
    eventually("Announced", announced, |it| {
        it == "False NoEligibleNode: 192.0.2.0: n1: link down"
    })
    .await;
    report("True", "LeaderElected").await;
    eventually("Announced", announced, |it| {
        it.starts_with("True Announced")
    })
    .await;
}
