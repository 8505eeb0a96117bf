//! Which addresses a policy has, and why it has none.

use std::time::{Duration, Instant};

use kube::api::ListParams;
use serde_json::json;

use crate::env::{Env, eventually};

pub(crate) async fn of_a_pool(env: &Env) {
    env.pool(
        "out",
        json!({"addresses": ["192.0.2.0/29", "2001:db8::/125"], "purpose": "Egress"}),
    )
    .await;
    let controller = env.controller(&[]);
    env.policy("none", json!({"pool": "missing"}), json!({}))
        .await;
    let message = env
        .expect_policy("none", "Ready", "False PoolNotFound")
        .await;
    assert!(message.contains("create it"), "{message}");
    env.policy("mail", json!({"pool": "out", "count": 2}), json!({}))
        .await;
    let four = ["192.0.2.0", "192.0.2.1", "2001:db8::", "2001:db8::1"];
    env.expect_egress("mail", &four).await;
    env.policy(
        "web",
        json!({"pool": "out", "ipFamilies": ["IPv4"]}),
        json!({}),
    )
    .await;
    env.expect_egress("web", &["192.0.2.2"]).await;
    // No speaker runs: nobody leads.
    env.expect_policy("web", "Ready", "False NoGateway").await;
    let records = || async {
        let all = env
            .virtual_ips()
            .list(&ListParams::default())
            .await
            .unwrap();
        let mut records: Vec<_> = all
            .items
            .into_iter()
            .map(|vip| {
                (
                    vip.spec.address,
                    vip.spec.group,
                    vip.metadata.resource_version,
                )
            })
            .collect();
        records.sort();
        records
    };
    let before = records().await;
    assert_eq!(before.len(), 5);
    let group_of = |address: &str| {
        let record = before.iter().find(|record| record.0 == address);
        record.unwrap().1.clone()
    };
    assert_eq!(group_of("192.0.2.1"), group_of("2001:db8::"));
    assert_ne!(group_of("192.0.2.1"), group_of("192.0.2.2"));
    let used = env.pools().get("out").await.unwrap().status.unwrap();
    assert_eq!((used.ipv4.assigned, used.ipv6.assigned), (3, 2));

    // A new process moves nothing, and writes nothing.
    let versions = || async {
        let policies = [
            env.policies().get("mail").await,
            env.policies().get("web").await,
        ];
        policies.map(|policy| policy.unwrap().metadata.resource_version)
    };
    let written = versions().await;
    controller.kill();
    let _controller = env.controller(&[]);
    env.policy(
        "new",
        json!({"pool": "out", "ipFamilies": ["IPv4"]}),
        json!({}),
    )
    .await;
    env.expect_egress("new", &["192.0.2.3"]).await;
    let mut after = records().await;
    after.retain(|record| record.0 != "192.0.2.3");
    assert_eq!(after, before);
    assert_eq!(versions().await, written);
}

pub(crate) async fn by_number(env: &Env) {
    env.pool(
        "out",
        json!({"addresses": ["192.0.2.0/29"], "purpose": "Both"}),
    )
    .await;
    let _controller = env.controller(&[]);
    env.policy(
        "a",
        json!({"addresses": ["192.0.2.5", "203.0.113.1"]}),
        json!({}),
    )
    .await;
    env.expect_egress("a", &["192.0.2.5"]).await;
    env.policy("b", json!({"addresses": ["192.0.2.5"]}), json!({}))
        .await;
    let message = env.expect_policy("b", "Ready", "False AddressInUse").await;
    assert!(message.contains("EgressPolicy a"), "{message}");
    env.policy("c", json!({"addresses": ["203.0.113.1"]}), json!({}))
        .await;
    env.expect_policy("c", "Ready", "False AddressNotInPool")
        .await;
    // Nor can a Service have it.
    env.service("thief", json!({}), json!({"landfall.dev/ips": "192.0.2.5"}))
        .await;
    let message = env.expect_condition("thief", "False AddressInUse").await;
    assert!(message.contains("EgressPolicy a"), "{message}");
    // And a policy not what a Service has.
    env.service("web", json!({}), json!({})).await;
    env.expect("web", &["192.0.2.0"]).await;
    env.policy("d", json!({"addresses": ["192.0.2.0"]}), json!({}))
        .await;
    let message = env.expect_policy("d", "Ready", "False AddressInUse").await;
    assert!(message.contains("fromService"), "{message}");
    eventually(
        "its one Event",
        || env.events("d"),
        |events| *events == ["AddressInUse"],
    )
    .await;
    // Changed to one that is free.
    env.policy("d", json!({"addresses": ["192.0.2.4"]}), json!({}))
        .await;
    env.expect_egress("d", &["192.0.2.4"]).await;
}

pub(crate) async fn what_pools_are_for(env: &Env) {
    env.pool("in", json!({"addresses": ["192.0.2.0/29"]})).await;
    env.pool(
        "out",
        json!({"addresses": ["198.51.100.0/29"], "purpose": "Egress", "serviceAllocation": {"priority": 1}}),
    )
    .await;
    env.pool(
        "labelled",
        json!({"addresses": ["203.0.113.0/29"], "purpose": "Both",
            "serviceAllocation": {"serviceSelectors": [{"matchLabels": {"app": "mail"}}]}}),
    )
    .await;
    let _controller = env.controller(&[]);
    env.policy("p", json!({"pool": "in"}), json!({})).await;
    env.expect_policy("p", "Ready", "False PoolNotForEgress")
        .await;
    env.policy("q", json!({"pool": "labelled"}), json!({}))
        .await;
    let message = env.expect_policy("q", "Ready", "False NotAdmitted").await;
    assert!(message.contains("fromService"), "{message}");
    // Services pass over a pool for egress, though it would be the first.
    env.service("any", json!({}), json!({})).await;
    env.expect("any", &["192.0.2.0"]).await;
    env.service("asks", json!({}), json!({"landfall.dev/pool": "out"}))
        .await;
    let message = env
        .expect_condition("asks", "False PoolNotForServices")
        .await;
    assert!(message.contains("purpose"), "{message}");
    env.service(
        "exact",
        json!({}),
        json!({"landfall.dev/ips": "198.51.100.3"}),
    )
    .await;
    env.expect_condition("exact", "False PoolNotForServices")
        .await;
    env.pool(
        "in",
        json!({"addresses": ["192.0.2.0/29"], "purpose": "Both"}),
    )
    .await;
    env.expect_egress("p", &["192.0.2.1"]).await;
    assert_eq!(env.shown("any").await, ["192.0.2.0"]);
    // Taken back when it is for Services again, with one Event for it; that it asks for such a pool was said before.
    env.pool("in", json!({"addresses": ["192.0.2.0/29"]})).await;
    env.expect_policy("p", "Ready", "False PoolNotForEgress")
        .await;
    env.expect_egress("p", &[]).await;
    eventually(
        "its Events",
        || env.events("p"),
        |events| *events == ["AddressTakenBack", "PoolNotForEgress"],
    )
    .await;
}

pub(crate) async fn of_a_service(env: &Env) {
    env.pool(
        "both",
        json!({"addresses": ["192.0.2.0/29"], "purpose": "Both"}),
    )
    .await;
    let controller = env.controller(&[]);
    let from = json!({"fromService": {"namespace": "red", "name": "mail"}});
    env.policy("mail", from, json!({})).await;
    env.expect_policy("mail", "Ready", "False ServiceNotFound")
        .await;
    env.service("red/mail", json!({}), json!({})).await;
    env.expect_egress("mail", &["192.0.2.0"]).await;
    let both = [
        vec!["mail".to_owned()],
        vec!["mail".to_owned()],
        vec![],
        vec![],
    ];
    assert_eq!(env.record("192.0.2.0").await, Some(both.clone()));
    controller.kill();
    let _controller = env.controller(&[]);
    env.service("red/other", json!({}), json!({})).await;
    env.expect("red/other", &["192.0.2.1"]).await;
    assert_eq!(env.record("192.0.2.0").await, Some(both));
    // A pool for Services alone: the Service stays.
    env.pool("both", json!({"addresses": ["192.0.2.0/29"]}))
        .await;
    env.expect_policy("mail", "Ready", "False PoolNotForEgress")
        .await;
    env.expect_egress("mail", &[]).await;
    assert_eq!(env.shown("red/mail").await, ["192.0.2.0"]);
    env.pool(
        "both",
        json!({"addresses": ["192.0.2.0/29"], "purpose": "Both"}),
    )
    .await;
    env.expect_egress("mail", &["192.0.2.0"]).await;
    // The Service goes, and the policy has nothing.
    env.delete("red/mail").await;
    env.expect_policy("mail", "Ready", "False ServiceNotFound")
        .await;
    env.expect_egress("mail", &[]).await;
}

pub(crate) async fn rest(env: &Env) {
    let pool = |quarantine: &str| json!({"addresses": ["192.0.2.0/32"], "purpose": "Egress", "quarantine": quarantine});
    env.pool("out", pool("1h")).await;
    let controller = env.controller(&[]);
    env.policy("first", json!({"pool": "out"}), json!({})).await;
    env.expect_egress("first", &["192.0.2.0"]).await;
    env.delete_policy("first").await;
    env.policy("second", json!({"pool": "out"}), json!({}))
        .await;
    env.expect_policy("second", "Ready", "False PoolExhausted")
        .await;
    let resting = [vec![], vec![], vec![], vec!["first".to_owned()]];
    eventually(
        "the rest on record",
        || env.record("192.0.2.0"),
        |seen| *seen == Some(resting.clone()),
    )
    .await;
    // A new process keeps to it; the former owner need not wait.
    controller.kill();
    let _controller = env.controller(&[]);
    env.policy("first", json!({"pool": "out"}), json!({})).await;
    env.expect_egress("first", &["192.0.2.0"]).await;
    env.pool("out", pool("10s")).await;
    let seen = async || {
        let pool = env.pools().get("out").await.unwrap();
        let ready = pool.status.and_then(|it| it.conditions.into_iter().next());
        (
            ready.and_then(|it| it.observed_generation),
            pool.metadata.generation,
        )
    };
    eventually("the shorter rest", seen, |(seen, is)| seen == is).await;
    let freed = Instant::now();
    env.delete_policy("first").await;
    env.expect_egress("second", &["192.0.2.0"]).await;
    assert!(freed.elapsed() > Duration::from_secs(10));
}
