//! Which address a Service gets, and why it gets none.

use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::env::{Env, eventually};

pub(crate) async fn families(env: &Env) {
    env.pool(
        "main",
        json!({ "addresses": ["192.0.2.0/28", "2001:db8::/124"] }),
    )
    .await;
    let _controller = env.controller(&[]);
    env.service("v4", json!({ "ipFamilies": ["IPv4"] }), json!({}))
        .await;
    env.expect("v4", &["192.0.2.0"]).await;
    let local = json!({ "ipFamilies": ["IPv6"], "externalTrafficPolicy": "Local" });
    env.service("v6", local, json!({})).await;
    env.expect("v6", &["2001:db8::"]).await;
    env.service(
        "dual",
        json!({ "ipFamilyPolicy": "RequireDualStack" }),
        json!({}),
    )
    .await;
    env.expect("dual", &["192.0.2.1", "2001:db8::1"]).await;
    env.expect_condition("dual", "True Assigned: 192.0.2.1 from IPAddressPool main")
        .await;
    let v4 = env.virtual_ips().get("192.0.2.1").await.unwrap();
    let v6 = env
        .virtual_ips()
        .get("2001-0db8-0000-0000-0000-0000-0000-0001")
        .await
        .unwrap();
    assert_eq!(v4.spec.group, "192.0.2.1");
    assert_eq!(v6.spec.group, v4.spec.group);
    assert_eq!(v4.spec.services[0].name, "dual");
    let used = |pool: landfall_api::IPAddressPool| {
        let status = pool.status.unwrap_or_default();
        (
            status.ipv4.assigned,
            status.ipv4.available,
            status.ipv6.assigned,
        )
    };
    eventually(
        "the pool's status",
        || async { used(env.pools().get("main").await.unwrap()) },
        |used| *used == (2, 14, 2),
    )
    .await;
    for name in ["v4", "v6", "dual"] {
        eventually(
            name,
            || env.events(name),
            |events| *events == ["AddressAssigned"],
        )
        .await;
    }
}

pub(crate) async fn prefer_dual_stack_goes_up_and_down(env: &Env) {
    env.pool("four", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    let _controller = env.controller(&[]);
    env.service(
        "web",
        json!({ "ipFamilyPolicy": "PreferDualStack" }),
        json!({}),
    )
    .await;
    env.expect("web", &["192.0.2.0"]).await;
    env.pool("six", json!({ "addresses": ["2001:db8::/124"] }))
        .await;
    env.expect("web", &["192.0.2.0", "2001:db8::"]).await;
    env.delete_pool("six").await;
    env.expect("web", &["192.0.2.0"]).await;
    env.pool("six", json!({ "addresses": ["2001:db8:1::/124"] }))
        .await;
    env.expect("web", &["192.0.2.0", "2001:db8:1::"]).await;
    // The Service itself goes back to one family.
    env.edit(
        "web",
        json!({ "spec": {
        "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"],
        "clusterIPs": null,
    } }),
    )
    .await;
    env.expect("web", &["192.0.2.0"]).await;
}

pub(crate) async fn sharing(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    let _controller = env.controller(&[]);
    let port = |port: u16| json!({ "ports": [{ "name": "p", "port": port }] });
    let key = json!({ "landfall.dev/sharing-key": "k" });
    env.service("s1", port(80), key.clone()).await;
    env.expect("s1", &["192.0.2.0"]).await;
    env.service("s2", port(443), key.clone()).await;
    env.expect("s2", &["192.0.2.0"]).await;
    env.service("s3", port(443), key.clone()).await;
    env.expect("s3", &["192.0.2.1"]).await;
    // MetalLB's name for the same.
    env.service("s4", port(25), json!({ "metallb.io/allow-shared-ip": "k" }))
        .await;
    env.expect("s4", &["192.0.2.0"]).await;
    env.service(
        "s5",
        port(80),
        json!({ "landfall.dev/sharing-key": "k", "landfall.dev/ips": "192.0.2.0" }),
    )
    .await;
    let condition = env.expect_condition("s5", "False SharingConflict").await;
    assert!(condition.contains("80/TCP"), "{condition}");
    eventually(
        "the shared record",
        || async {
            env.virtual_ips()
                .get("192.0.2.0")
                .await
                .unwrap()
                .spec
                .services
                .len()
        },
        |&count| count == 3,
    )
    .await;
    // The port is free: whoever waits for it gets it.
    env.delete("s1").await;
    env.expect("s5", &["192.0.2.0"]).await;
}

pub(crate) async fn explicit_requests(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    env.pool(
        "aside",
        json!({ "addresses": ["198.51.100.0/28"], "autoAssign": false }),
    )
    .await;
    let _controller = env.controller(&[]);
    env.service("ip", json!({}), json!({ "landfall.dev/ips": "192.0.2.7" }))
        .await;
    env.service("field", json!({ "loadBalancerIP": "192.0.2.8" }), json!({}))
        .await;
    env.service(
        "alias",
        json!({}),
        json!({ "metallb.universe.tf/loadBalancerIPs": "192.0.2.9" }),
    )
    .await;
    env.service("pool", json!({}), json!({ "landfall.dev/pool": "aside" }))
        .await;
    env.service(
        "taken",
        json!({}),
        json!({ "landfall.dev/ips": "192.0.2.7" }),
    )
    .await;
    env.service(
        "outside",
        json!({}),
        json!({ "landfall.dev/ips": "203.0.113.1" }),
    )
    .await;
    env.expect("ip", &["192.0.2.7"]).await;
    env.expect("field", &["192.0.2.8"]).await;
    env.expect("alias", &["192.0.2.9"]).await;
    env.expect("pool", &["198.51.100.0"]).await;
    env.expect_condition("taken", "False AddressInUse").await;
    env.expect_condition("outside", "False AddressNotInPool")
        .await;
    eventually(
        "its Event",
        || env.events("taken"),
        |events| *events == ["AddressInUse"],
    )
    .await;
    // A wish that cannot be granted costs nothing; one that can is.
    env.edit(
        "pool",
        json!({ "metadata": { "annotations": { "landfall.dev/ips": "198.51.100.5" } } }),
    )
    .await;
    env.expect("pool", &["198.51.100.5"]).await;
    env.edit(
        "pool",
        json!({ "metadata": { "annotations": { "landfall.dev/ips": "203.0.113.9" } } }),
    )
    .await;
    env.expect_condition("pool", "True AddressNotInPool").await;
    env.expect("pool", &["198.51.100.5"]).await;
}

pub(crate) async fn tenancy(env: &Env) {
    env.pool(
        "red",
        json!({ "addresses": ["192.0.2.0/28"], "serviceAllocation": { "namespaces": ["red"] } }),
    )
    .await;
    env.pool(
        "labelled",
        json!({
            "addresses": ["198.51.100.0/28"],
            "serviceAllocation": {
                "namespaceSelectors": [{ "matchLabels": { "tenant": "blue" } }],
                "serviceSelectors": [{ "matchLabels": { "tier": "front" } }],
            },
        }),
    )
    .await;
    let _controller = env.controller(&[]);
    env.service("red/web", json!({}), json!({})).await;
    env.service("blue/web", json!({}), json!({})).await;
    env.service(
        "blue/thief",
        json!({}),
        json!({ "landfall.dev/ips": "192.0.2.5" }),
    )
    .await;
    env.service(
        "blue/picker",
        json!({}),
        json!({ "landfall.dev/pool": "red" }),
    )
    .await;
    env.expect("red/web", &["192.0.2.0"]).await;
    for name in ["blue/web", "blue/thief", "blue/picker"] {
        env.expect_condition(name, "False NotAdmitted").await;
    }
    env.namespace("blue", &json!({ "tenant": "blue" })).await;
    env.edit(
        "blue/web",
        json!({ "metadata": { "labels": { "tier": "front" } } }),
    )
    .await;
    env.expect("blue/web", &["198.51.100.0"]).await;
    // The tenant leaves: its address is taken back.
    env.namespace("blue", &json!({})).await;
    env.expect_condition("blue/web", "False NotAdmitted").await;
    env.expect("blue/web", &[]).await;
}

pub(crate) async fn priorities(env: &Env) {
    let rules = |priority: u32| json!({ "priority": priority, "namespaces": ["default"] });
    env.pool("a-open", json!({ "addresses": ["192.0.2.0/32"] }))
        .await;
    env.pool(
        "b-late",
        json!({ "addresses": ["192.0.2.1/32"], "serviceAllocation": rules(20) }),
    )
    .await;
    env.pool(
        "c-early",
        json!({ "addresses": ["192.0.2.2/32"], "serviceAllocation": rules(10) }),
    )
    .await;
    let _controller = env.controller(&[]);
    for (name, address) in [
        ("s1", "192.0.2.2"),
        ("s2", "192.0.2.1"),
        ("s3", "192.0.2.0"),
    ] {
        env.service(name, json!({}), json!({})).await;
        env.expect(name, &[address]).await;
    }
    env.service("s4", json!({}), json!({})).await;
    env.expect_condition("s4", "False PoolExhausted").await;
}

pub(crate) async fn classes(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    let controller = env.controller(&["--class-less=false"]);
    env.service("none", json!({}), json!({})).await;
    env.service(
        "other",
        json!({ "loadBalancerClass": "example.com/lb" }),
        json!({}),
    )
    .await;
    env.service(
        "ours",
        json!({ "loadBalancerClass": "landfall.dev/l2" }),
        json!({}),
    )
    .await;
    env.expect("ours", &["192.0.2.0"]).await;
    assert_eq!(env.condition("none").await, "");
    drop(controller);
    let _controller = env.controller(&[]);
    env.expect("none", &["192.0.2.1"]).await;
    assert_eq!(env.condition("other").await, "");
    env.expect("ours", &["192.0.2.0"]).await;
}

pub(crate) async fn foreign_ingress(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    let theirs =
        json!({ "loadBalancer": { "ingress": [{ "ip": "203.0.113.9", "ipMode": "VIP" }] } });
    env.service("web", json!({}), json!({})).await;
    env.edit_status("web", theirs.clone()).await;
    let _controller = env.controller(&[]);
    env.expect_condition("web", "False ForeignIngress").await;
    env.expect("web", &["203.0.113.9"]).await;
    env.edit_status("web", json!({ "loadBalancer": { "ingress": null } }))
        .await;
    env.expect("web", &["192.0.2.0"]).await;
    // What is merely wiped is written again; what is taken over is left.
    env.edit_status("web", json!({ "loadBalancer": { "ingress": null } }))
        .await;
    env.expect("web", &["192.0.2.0"]).await;
    env.edit_status("web", theirs).await;
    env.expect_condition("web", "False ForeignIngress").await;
    env.expect("web", &["203.0.113.9"]).await;
}

pub(crate) async fn pool_edits(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    let _controller = env.controller(&[]);
    env.service("web", json!({}), json!({})).await;
    env.expect("web", &["192.0.2.0"]).await;
    env.pool("main", json!({ "addresses": ["198.51.100.0/28"] }))
        .await;
    env.expect("web", &["198.51.100.0"]).await;
    eventually(
        "its Events",
        || env.events("web"),
        |events| *events == ["AddressAssigned", "AddressReplaced"],
    )
    .await;
    env.delete_pool("main").await;
    env.expect("web", &[]).await;
    env.expect_condition("web", "False NoPool").await;
    eventually(
        "its Events",
        || env.events("web"),
        |events| *events == ["AddressAssigned", "AddressReplaced", "AddressTakenBack"],
    )
    .await;
}

pub(crate) async fn retained(env: &Env) {
    env.pool(
        "main",
        json!({ "addresses": ["192.0.2.0/28"], "retainAssigned": true }),
    )
    .await;
    let controller = env.controller(&[]);
    env.service("web", json!({}), json!({})).await;
    env.expect("web", &["192.0.2.0"]).await;
    env.pool(
        "main",
        json!({ "addresses": ["198.51.100.0/28"], "retainAssigned": true }),
    )
    .await;
    env.service("new", json!({}), json!({})).await;
    env.expect("new", &["198.51.100.0"]).await;
    env.delete_pool("main").await;
    env.service("late", json!({}), json!({})).await;
    env.expect_condition("late", "False NoPool").await;
    drop(controller);
    let _controller = env.controller(&[]);
    env.service("later", json!({}), json!({})).await;
    env.expect_condition("later", "False NoPool").await;
    env.expect("web", &["192.0.2.0"]).await;
    env.expect("new", &["198.51.100.0"]).await;
}

/// Status and reason of a pool's condition `Ready`.
async fn ready(env: &Env, pool: &str) -> String {
    let pool = env.pools().get(pool).await.unwrap();
    let conditions = pool.status.unwrap_or_default().conditions;
    let ready = conditions
        .into_iter()
        .find(|condition| condition.type_ == "Ready");
    ready
        .map(|ready| format!("{} {} {}", ready.status, ready.reason, ready.message))
        .unwrap_or_default()
}

pub(crate) async fn overlaps(env: &Env) {
    env.pool("a", json!({ "addresses": ["192.0.2.0/31"] }))
        .await;
    env.pool("b", json!({ "addresses": ["192.0.2.1-192.0.2.2"] }))
        .await;
    let _controller = env.controller(&[]);
    let ready = |pool: &'static str| ready(env, pool);
    for pool in ["a", "b"] {
        eventually(
            pool,
            || ready(pool),
            |ready| ready.starts_with("False OverlapsPool"),
        )
        .await;
    }
    for (name, address) in [
        ("s1", "192.0.2.0"),
        ("s2", "192.0.2.1"),
        ("s3", "192.0.2.2"),
    ] {
        env.service(name, json!({}), json!({})).await;
        env.expect(name, &[address]).await;
    }
    env.pools()
        .patch(
            "b",
            &PatchParams::default(),
            &Patch::Merge(json!({ "spec": { "addresses": ["192.0.2.2/32"] } })),
        )
        .await
        .unwrap();
    for pool in ["a", "b"] {
        eventually(
            pool,
            || ready(pool),
            |ready| ready.starts_with("True NoOverlap"),
        )
        .await;
    }
    assert_eq!(env.assignments().await.len(), 3);
}

pub(crate) async fn malformed(env: &Env) {
    env.pool("main", json!({ "addresses": ["192.0.2.0/28"] }))
        .await;
    let _controller = env.controller(&[]);
    env.service(
        "web",
        json!({}),
        json!({ "landfall.dev/ips": "192.0.2.300" }),
    )
    .await;
    let condition = env.expect_condition("web", "False MalformedRequest").await;
    assert!(condition.contains("192.0.2.300"), "{condition}");
    env.edit(
        "web",
        json!({ "metadata": { "annotations": { "landfall.dev/ips": null } } }),
    )
    .await;
    env.expect("web", &["192.0.2.0"]).await;
}

/// What the API server cannot see (IPv6 ends in the wrong order) is said on the pool, and takes nothing away.
pub(crate) async fn unreadable(env: &Env) {
    let patch = |addresses: serde_json::Value| async move {
        let patch = Patch::Merge(json!({ "spec": { "addresses": addresses } }));
        env.pools()
            .patch("a", &PatchParams::default(), &patch)
            .await
            .unwrap();
    };
    env.pool("a", json!({ "addresses": ["192.0.2.0/31"] }))
        .await;
    let _controller = env.controller(&[]);
    env.service("s1", json!({}), json!({})).await;
    env.expect("s1", &["192.0.2.0"]).await;
    patch(json!(["fd00:88::20-fd00:88::10"])).await;
    let said = eventually("a", || ready(env, "a"), |ready| ready.starts_with("False")).await;
    assert!(said.contains("MalformedAddresses"), "{said}");
    assert!(said.contains("spec.addresses"), "{said}");
    assert!(said.contains("fd00:88::20-fd00:88::10"), "{said}");
    env.expect("s1", &["192.0.2.0"]).await;
    patch(json!(["192.0.2.0/31"])).await;
    eventually("a", || ready(env, "a"), |ready| ready.starts_with("True")).await;
    env.expect("s1", &["192.0.2.0"]).await;
}
