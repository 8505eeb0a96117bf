//! The chart's RBAC, asked at a real API server: what Landfall needs is allowed, and nothing beside it.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};
use kube::api::PostParams;
use kube::{Api, Client};
use landfall_lab::{Lab, Topology};
use landfall_tests::chart::NAMESPACE;
use landfall_tests::{ControlPlane, chart};

/// What a component asks of the API server: group, resource, name where the rule is for one, verb, namespace
/// ("" for all), and the code that asks. Rules that no line here needs fail the test.
type Need = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
);

const LANDFALL: &str = "landfall.dev";
const EVENTS: &str = "events.k8s.io";
const NETWORKING: &str = "networking.k8s.io";
const LEASES: &str = "coordination.k8s.io";
const LEASE: &str = "landfall-controller";

const CONTROLLER: &[Need] = &[
    ("", "services", "", "list", "", "runtime source: watcher"),
    ("", "services", "", "watch", "", "runtime source: watcher"),
    (
        "",
        "services",
        "",
        "get",
        "",
        "controller writer: is a Service that left us still there",
    ),
    ("", "namespaces", "", "list", "", "runtime source: watcher"),
    ("", "namespaces", "", "watch", "", "runtime source: watcher"),
    (
        NETWORKING,
        "servicecidrs",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        NETWORKING,
        "servicecidrs",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    ("", "nodes", "", "list", "", "runtime source: watcher"),
    ("", "nodes", "", "watch", "", "runtime source: watcher"),
    (
        "",
        "pods",
        "",
        "list",
        "",
        "runtime source: watcher, while there is an EgressPolicy",
    ),
    (
        "",
        "pods",
        "",
        "watch",
        "",
        "runtime source: watcher, while there is an EgressPolicy",
    ),
    (
        LANDFALL,
        "egresspolicies",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "egresspolicies",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "egresspolicies/status",
        "",
        "patch",
        "",
        "controller writer: Write::Policy",
    ),
    (
        "",
        "services/status",
        "",
        "patch",
        "",
        "controller writer: Write::Service",
    ),
    (
        LANDFALL,
        "ipaddresspools",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "ipaddresspools",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "ipaddresspools/status",
        "",
        "patch",
        "",
        "controller writer: Write::Pool",
    ),
    (
        LANDFALL,
        "virtualips",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "virtualips",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "virtualips",
        "",
        "patch",
        "",
        "controller writer: Write::Record, by server-side apply",
    ),
    (
        LANDFALL,
        "virtualips",
        "",
        "create",
        "",
        "controller writer: an apply that creates needs it too",
    ),
    (
        LANDFALL,
        "virtualips",
        "",
        "delete",
        "",
        "controller writer: RecordChange::Remove",
    ),
    (
        EVENTS,
        "events",
        "",
        "create",
        "default",
        "controller writer: Write::Event",
    ),
    (
        LEASES,
        "leases",
        "",
        "create",
        NAMESPACE,
        "controller lease: Step::Create",
    ),
    (
        LEASES,
        "leases",
        LEASE,
        "get",
        NAMESPACE,
        "controller lease: each round",
    ),
    (
        LEASES,
        "leases",
        LEASE,
        "update",
        NAMESPACE,
        "controller lease: renew and hand over",
    ),
];

const SPEAKER: &[Need] = &[
    ("", "services", "", "list", "", "runtime source: watcher"),
    ("", "services", "", "watch", "", "runtime source: watcher"),
    ("", "nodes", "", "list", "", "runtime source: watcher"),
    ("", "nodes", "", "watch", "", "runtime source: watcher"),
    ("", "namespaces", "", "list", "", "runtime source: watcher"),
    ("", "namespaces", "", "watch", "", "runtime source: watcher"),
    (
        "",
        "pods",
        "",
        "list",
        "",
        "runtime source: watcher, while there is an EgressPolicy",
    ),
    (
        "",
        "pods",
        "",
        "watch",
        "",
        "runtime source: watcher, while there is an EgressPolicy",
    ),
    (
        LANDFALL,
        "egresspolicies",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "egresspolicies",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        NETWORKING,
        "servicecidrs",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        NETWORKING,
        "servicecidrs",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        "discovery.k8s.io",
        "endpointslices",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        "discovery.k8s.io",
        "endpointslices",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "ipaddresspools",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "ipaddresspools",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "l2advertisements",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "l2advertisements",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "virtualips",
        "",
        "list",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "virtualips",
        "",
        "watch",
        "",
        "runtime source: watcher",
    ),
    (
        LANDFALL,
        "virtualips/status",
        "",
        "patch",
        "",
        "speaker status writer: statuses",
    ),
    (
        EVENTS,
        "events",
        "",
        "create",
        "default",
        "speaker status writer: conflicts",
    ),
];

/// What neither may: group, resource, verb, namespace.
const NEVER: &[(&str, &str, &str, &str)] = &[
    ("*", "*", "*", ""),
    ("", "*", "get", ""),
    (LANDFALL, "*", "*", ""),
    ("", "secrets", "get", ""),
    ("", "secrets", "list", ""),
    ("", "secrets", "get", NAMESPACE),
    ("", "secrets", "watch", NAMESPACE),
    ("", "configmaps", "get", "kube-system"),
    ("", "pods", "get", ""),
    ("", "pods", "patch", "default"),
    ("", "pods", "delete", "default"),
    ("", "pods/status", "patch", "default"),
    (LANDFALL, "egresspolicies", "patch", ""),
    (LANDFALL, "egresspolicies", "delete", ""),
    ("", "pods", "create", "default"),
    ("", "pods", "create", NAMESPACE),
    ("", "pods/exec", "create", NAMESPACE),
    ("", "serviceaccounts/token", "create", NAMESPACE),
    ("", "services", "create", "default"),
    ("", "services", "update", "default"),
    ("", "services", "patch", "default"),
    ("", "services", "delete", "default"),
    ("", "services", "deletecollection", "default"),
    ("", "services/status", "update", "default"),
    ("", "nodes", "patch", ""),
    ("", "nodes", "delete", ""),
    ("", "nodes/status", "patch", ""),
    ("", "nodes/proxy", "get", ""),
    ("", "namespaces", "delete", ""),
    ("apps", "deployments", "patch", NAMESPACE),
    ("apps", "daemonsets", "patch", NAMESPACE),
    ("discovery.k8s.io", "endpointslices", "patch", "default"),
    (LANDFALL, "ipaddresspools", "patch", ""),
    (LANDFALL, "ipaddresspools", "delete", ""),
    (LANDFALL, "l2advertisements", "patch", ""),
    (LANDFALL, "virtualips", "deletecollection", ""),
    (EVENTS, "events", "delete", "default"),
    (LEASES, "leases", "update", "kube-system"),
    (LEASES, "leases", "delete", NAMESPACE),
    ("rbac.authorization.k8s.io", "clusterroles", "escalate", ""),
    (
        "rbac.authorization.k8s.io",
        "clusterrolebindings",
        "create",
        "",
    ),
    (
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        "patch",
        "",
    ),
    ("", "users", "impersonate", ""),
];

/// What the speaker, which runs on every node, may not either.
const NEVER_SPEAKER: &[(&str, &str, &str, &str)] = &[
    ("", "services/status", "patch", "default"),
    (LANDFALL, "egresspolicies/status", "patch", ""),
    (LANDFALL, "virtualips", "create", ""),
    (LANDFALL, "virtualips", "patch", ""),
    (LANDFALL, "virtualips", "delete", ""),
    (LANDFALL, "ipaddresspools/status", "patch", ""),
    (LEASES, "leases", "get", NAMESPACE),
    (LEASES, "leases", "create", NAMESPACE),
];

#[test]
fn the_chart_grants_what_is_needed_and_no_more() {
    let topology = Topology {
        nodes: 1,
        pods_per_node: 0,
        ..Topology::default()
    };
    let lab = Arc::new(Lab::build(topology).unwrap());
    let plane = ControlPlane::start(&lab).unwrap();
    chart::install(&plane, &[]).unwrap();
    plane.block_on(async {
        let client = plane.client().await.unwrap();
        let mut wrong = Vec::new();
        for (component, needs) in [("controller", CONTROLLER), ("speaker", SPEAKER)] {
            for (group, resource, name, verb, namespace, who) in needs {
                if !allowed(&client, component, [group, resource, verb, namespace, name]).await {
                    wrong.push(format!(
                        "{component} may not {verb} {resource}.{group}: {who}"
                    ));
                }
            }
            let never = if component == "speaker" {
                NEVER_SPEAKER
            } else {
                &[]
            };
            for (group, resource, verb, namespace) in NEVER.iter().chain(never) {
                if allowed(&client, component, [group, resource, verb, namespace, ""]).await {
                    wrong.push(format!(
                        "{component} may {verb} {resource}.{group} in {namespace:?}"
                    ));
                }
            }
            let (granted, needed) = (granted(&client, component).await, needed(needs));
            println!(
                "{component}: {} grants, {} needed",
                granted.len(),
                needed.len()
            );
            for one in granted.symmetric_difference(&needed) {
                wrong.push(format!(
                    "{component}: {one:?} is granted without need, or needed without grant"
                ));
            }
        }
        // Nobody else's Lease, not even beside ours.
        let other = [LEASES, "leases", "update", NAMESPACE, "another"];
        if allowed(&client, "controller", other).await {
            wrong.push("controller may update another Lease".to_owned());
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}

/// Group, resource, name and verb of a grant.
type Grant = (String, String, String, String);

fn needed(needs: &[Need]) -> BTreeSet<Grant> {
    needs
        .iter()
        .map(|(group, resource, name, verb, ..)| {
            (
                (*group).into(),
                (*resource).into(),
                (*name).into(),
                (*verb).into(),
            )
        })
        .collect()
}

/// All that the chart's roles of a component grant, one by one.
async fn granted(client: &Client, component: &str) -> BTreeSet<Grant> {
    let name = format!("landfall-{component}");
    let cluster: Api<ClusterRole> = Api::all(client.clone());
    let mut rules = cluster.get(&name).await.unwrap().rules.unwrap_or_default();
    let roles: Api<Role> = Api::namespaced(client.clone(), NAMESPACE);
    if let Some(role) = roles.get_opt(&name).await.unwrap() {
        rules.extend(role.rules.unwrap_or_default());
    }
    rules.into_iter().flat_map(expand).collect()
}

fn expand(rule: PolicyRule) -> Vec<Grant> {
    let names = rule
        .resource_names
        .filter(|names| !names.is_empty())
        .unwrap_or_else(|| vec![String::new()]);
    let mut grants = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for name in &names {
                for verb in &rule.verbs {
                    grants.push((group.clone(), resource.clone(), name.clone(), verb.clone()));
                }
            }
        }
    }
    grants
}

/// The API server's own answer for the component's `ServiceAccount`.
async fn allowed(
    client: &Client,
    component: &str,
    [group, resource, verb, namespace, name]: [&str; 5],
) -> bool {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!(
                "system:serviceaccount:{NAMESPACE}:landfall-{component}"
            )),
            groups: Some(vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{NAMESPACE}"),
                "system:authenticated".into(),
            ]),
            resource_attributes: Some(ResourceAttributes {
                group: text(group),
                resource: text(resource),
                subresource: text(subresource),
                verb: text(verb),
                namespace: text(namespace),
                name: text(name),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
    let answer = reviews
        .create(&PostParams::default(), &review)
        .await
        .unwrap();
    answer.status.unwrap().allowed
}
