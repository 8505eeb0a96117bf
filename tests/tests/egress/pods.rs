//! Whose tenants pods are.

use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::{Value, json};

use crate::env::Env;

fn mail() -> Value {
    json!({"app": "mail"})
}

async fn pool(env: &Env, rules: Value) {
    let mut spec = json!({"addresses": ["192.0.2.0/28"], "purpose": "Both"});
    if !rules.is_null() {
        spec["serviceAllocation"] = rules;
    }
    env.pool("out", spec).await;
}

pub(crate) async fn counted(env: &Env) {
    pool(env, Value::Null).await;
    let _controller = env.controller(&[]);
    env.pod("red/before", mail(), "10.244.1.1").await;
    env.policy("mail", json!({"pool": "out"}), json!({})).await;
    env.expect_pods("mail", (1, 0)).await;
    env.pod("red/after", mail(), "10.244.1.2").await;
    env.pod("red/other", json!({"app": "web"}), "10.244.1.3")
        .await;
    env.host_pod("blue/host", mail()).await;
    env.expect_pods("mail", (2, 1)).await;
    let message = env
        .expect_policy("mail", "HostNetworkPods", "True NotMatched: 1 pod")
        .await;
    assert!(message.contains("the node's"), "{message}");
    env.end_pod("red/before").await;
    env.end_pod("blue/host").await;
    env.expect_pods("mail", (1, 0)).await;
    env.expect_policy("mail", "HostNetworkPods", "").await;
    // Pods are followed only while there is a policy; the next one sees what is there then.
    env.delete_policy("mail").await;
    env.end_pod("red/after").await;
    env.pod("blue/meanwhile", mail(), "10.244.1.4").await;
    env.pod("blue/too", mail(), "10.244.1.5").await;
    let in_blue =
        json!({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "blue"}}});
    env.policy("mail", json!({"pool": "out"}), in_blue).await;
    env.expect_pods("mail", (2, 0)).await;
}

pub(crate) async fn overlap(env: &Env) {
    pool(env, Value::Null).await;
    let _controller = env.controller(&[]);
    env.namespace("red", &json!({"tenant": "red"})).await;
    env.pod("red/one", mail(), "10.244.1.1").await;
    env.pod("red/two", mail(), "10.244.1.2").await;
    env.pod("blue/one", mail(), "10.244.1.3").await;
    env.policy("wide", json!({"pool": "out"}), json!({})).await;
    env.expect_pods("wide", (3, 0)).await;
    env.expect_policy("wide", "Overlapping", "").await;
    let of_red = json!({"namespaceSelector": {"matchLabels": {"tenant": "red"}}});
    env.policy("narrow", json!({"pool": "out"}), of_red).await;
    env.expect_pods("narrow", (2, 0)).await;
    env.expect_pods("wide", (1, 0)).await;
    let message = env
        .expect_policy("wide", "Overlapping", "True MoreSpecificPolicy: 2 pods")
        .await;
    for part in ["narrow (2 pods)", "red/one", "by wide and by narrow"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    env.expect_policy("narrow", "Overlapping", "").await;
    // The namespace is relabelled, and its pods are the other's again.
    env.namespace("red", &json!({})).await;
    env.expect_pods("wide", (3, 0)).await;
    env.expect_pods("narrow", (0, 0)).await;
    env.expect_policy("wide", "Overlapping", "").await;
}

pub(crate) async fn tenancy(env: &Env) {
    pool(env, json!({"namespaces": ["red"]})).await;
    let _controller = env.controller(&[]);
    env.pod("red/one", mail(), "10.244.1.1").await;
    env.pod("blue/one", mail(), "10.244.1.2").await;
    env.policy("mail", json!({"pool": "out"}), json!({})).await;
    env.expect_egress("mail", &["192.0.2.0"]).await;
    env.expect_pods("mail", (2, 0)).await;
    let message = env
        .expect_policy("mail", "NamespacesNotAdmitted", "True PoolDoesNotAdmit")
        .await;
    assert!(
        message.contains("blue (1 pod)") && !message.contains("red ("),
        "{message}"
    );
    // By label of the namespace, as for Services.
    pool(
        env,
        json!({"namespaceSelectors": [{"matchLabels": {"tenant": "yes"}}]}),
    )
    .await;
    env.expect_policy(
        "mail",
        "NamespacesNotAdmitted",
        "True PoolDoesNotAdmit: the IPAddressPool does not admit blue (1 pod), red (1 pod)",
    )
    .await;
    for namespace in ["red", "blue"] {
        env.namespace(namespace, &json!({"tenant": "yes"})).await;
    }
    env.expect_policy("mail", "NamespacesNotAdmitted", "").await;
    env.expect_pods("mail", (2, 0)).await;
}

pub(crate) async fn of_a_services_namespace(env: &Env) {
    pool(env, Value::Null).await;
    let _controller = env.controller(&[]);
    env.service("red/mail", json!({}), json!({})).await;
    env.pod("red/own", mail(), "10.244.1.1").await;
    env.pod("blue/thief", mail(), "10.244.1.2").await;
    let from = json!({"fromService": {"namespace": "red", "name": "mail"}});
    env.policy("mail", from, json!({})).await;
    env.expect_egress("mail", &["192.0.2.0"]).await;
    let message = env
        .expect_policy(
            "mail",
            "NamespacesNotAdmitted",
            "True NotNamespaceOfService",
        )
        .await;
    assert!(message.contains("blue (1 pod)"), "{message}");
}

/// Pods come and go faster than the status is written.
pub(crate) async fn churn(env: &Env) {
    const PODS: u8 = 60;
    pool(env, Value::Null).await;
    let _controller = env.controller(&[]);
    env.policy("mail", json!({"pool": "out"}), json!({})).await;
    env.expect_egress("mail", &["192.0.2.0"]).await;
    let one = watcher::Config::default().fields("metadata.name=mail");
    let changes = watcher(env.policies(), one).applied_objects();
    let begun = Instant::now();
    let work = async {
        for number in 0..PODS {
            let address = format!("10.244.1.{number}");
            env.pod(&format!("red/p{number}"), mail(), &address).await;
        }
        env.expect_pods("mail", (i64::from(PODS), 0)).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    let mut seen = 0u64;
    let count = changes.try_for_each(|_| {
        seen += 1;
        futures::future::ok(())
    });
    tokio::select! {
        () = work => {}
        ended = count => panic!("the watch ended: {ended:?}"),
    }
    let took = begun.elapsed();
    println!("       {PODS} pods in {took:.1?}: {seen} writes of the status");
    // The first is the object as it was found; what was due before may come at once.
    assert!(seen <= took.as_secs() + 4, "{seen} in {took:?}");
}
