//! What one object alone can say wrong is refused by a real API server, with the field and the cure.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::fmt::Debug;
use std::sync::Arc;

use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use landfall_api::{EgressPolicy, IPAddressPool, L2Advertisement, VirtualIP};
use landfall_lab::{Lab, Topology};
use landfall_tests::{ControlPlane, chart};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

#[test]
fn the_api_server_refuses_what_is_wrong() {
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
        wrong.extend(pools(&client).await);
        wrong.extend(advertisements(&client).await);
        wrong.extend(virtual_ips(&client).await);
        wrong.extend(egress_policies(&client).await);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        immutable(&client).await;
    });
}

/// A bad object: what is merged into the good one's spec, and the field and the cure its refusal must name.
type Bad = (Value, &'static str, &'static str);

async fn pools(client: &Client) -> Vec<String> {
    let sixty_four: Vec<_> = (0..64)
        .map(|n| format!("fd00:{n:x}::1-fd00:{n:x}::ffff"))
        .collect();
    let good = [
        json!({"addresses": ["192.0.2.0/28", "2001:db8::/120"]}),
        json!({"addresses": ["192.0.2.10 - 192.0.2.20", "fd00::10-fd00::1:0"]}),
        json!({"addresses": ["192.0.2.7-192.0.2.7", "fd00::7-fd00:0::7"]}),
        json!({"addresses": ["::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]}),
        json!({"addresses": sixty_four}),
        json!({"addresses": ["192.0.2.0/28", "192.0.2.16-192.0.2.20"], "quarantine": "1m30s"}),
        json!({"addresses": ["192.0.2.0/28"], "serviceAllocation": {"priority": 5}}),
        json!({"addresses": ["192.0.2.0/28"], "purpose": "Both"}),
        json!({"addresses": ["192.0.2.0/28"], "serviceAllocation": {"namespaces": ["a"], "serviceSelectors": [
            {"matchExpressions": [{"key": "a", "operator": "Exists"}]}]}}),
    ];
    let allocation = |rules: Value| json!({"serviceAllocation": rules});
    let addresses = |entries: &[&str]| json!({"addresses": entries});
    let bad: Vec<Bad> = vec![
        (addresses(&[]), "spec.addresses", "name at least one"),
        (
            addresses(&["192.0.2.300/28"]),
            "spec.addresses",
            "must be a CIDR",
        ),
        (
            addresses(&["192.0.2.7"]),
            "spec.addresses",
            "write a single address as",
        ),
        (
            addresses(&["192.0.2.7-fd00::1"]),
            "spec.addresses",
            "one range per family",
        ),
        (
            addresses(&["192.0.2.20-192.0.2.10"]),
            "spec.addresses",
            "swap",
        ),
        (
            addresses(&["192.0.2.0/28", "192.0.2.0/28"]),
            "spec.addresses",
            "remove one",
        ),
        (
            addresses(&["192.0.2.0/24", "192.0.2.16/28"]),
            "spec.addresses",
            "remove the smaller",
        ),
        (
            addresses(&["192.0.2.0/28", "192.0.2.10-192.0.2.20"]),
            "spec.addresses",
            "remove or shorten",
        ),
        (
            addresses(&["fd00::/120", "fd00::f0-fd00::1ff"]),
            "spec.addresses",
            "remove or shorten",
        ),
        (
            json!({"quarantine": "60"}),
            "spec.quarantine",
            "such as 60s",
        ),
        (
            json!({"purpose": "Outgress"}),
            "spec.purpose",
            "supported values: \"Ingress\", \"Egress\", \"Both\"",
        ),
        (
            allocation(json!({})),
            "spec.serviceAllocation",
            "leave serviceAllocation out",
        ),
        (
            allocation(json!({"namespaces": []})),
            "spec.serviceAllocation.namespaces",
            "leave the field out",
        ),
        (
            allocation(json!({"priority": 1, "namespaces": []})),
            "spec.serviceAllocation.namespaces",
            "leave the field out",
        ),
        (
            allocation(json!({"namespaceSelectors": []})),
            "spec.serviceAllocation.namespaceSelectors",
            "leave the field out",
        ),
        (
            allocation(json!({"namespaceSelectors": [{}]})),
            "spec.serviceAllocation.namespaceSelectors",
            "give it matchLabels",
        ),
        (
            allocation(json!({"serviceSelectors": []})),
            "spec.serviceAllocation.serviceSelectors",
            "leave the field out",
        ),
        (
            allocation(json!({"serviceSelectors": [{"matchLabels": {}}]})),
            "spec.serviceAllocation.serviceSelectors",
            "give it matchLabels",
        ),
        (
            allocation(json!({"priority": -1})),
            "spec.serviceAllocation.priority",
            "0 to 1000000",
        ),
        (
            allocation(json!({"priority": 1_000_001})),
            "spec.serviceAllocation.priority",
            "0 to 1000000",
        ),
    ];
    let base = json!({"addresses": ["192.0.2.0/28"]});
    check::<IPAddressPool>(client, "table", &base, &good, bad).await
}

async fn advertisements(client: &Client) -> Vec<String> {
    let preferred = |weight: i64, preference: Value| json!({"preferredNodeSelectors": [{"weight": weight, "preference": preference}]});
    let labels = json!({"matchLabels": {"a": "b"}});
    let good = [
        json!({}),
        json!({"ipAddressPools": ["a", "b"], "nodeSelectors": [labels], "interfaces": ["bond0", "eth*"]}),
        preferred(1, labels.clone()),
        preferred(100, labels.clone()),
    ];
    let bad: Vec<Bad> = vec![
        (
            json!({"ipAddressPools": ["a", "a"]}),
            "spec.ipAddressPools",
            "remove one",
        ),
        (
            json!({"ipAddressPoolSelectors": [{}]}),
            "spec.ipAddressPoolSelectors",
            "give it matchLabels",
        ),
        (
            json!({"serviceSelectors": [labels, {}]}),
            "spec.serviceSelectors",
            "give it matchLabels",
        ),
        (
            json!({"nodeSelectors": [{"matchExpressions": []}]}),
            "spec.nodeSelectors",
            "give it matchLabels",
        ),
        (
            json!({"interfaces": ["eth0:1"]}),
            "spec.interfaces",
            "no slash, colon or space",
        ),
        (
            preferred(0, labels.clone()),
            "spec.preferredNodeSelectors",
            "weight must be 1 to 100",
        ),
        (
            preferred(101, labels),
            "spec.preferredNodeSelectors",
            "weight must be 1 to 100",
        ),
        (
            preferred(5, json!({})),
            "spec.preferredNodeSelectors",
            "give it matchLabels",
        ),
        (
            json!({"steering": "On"}),
            "spec.steering",
            "supported values: \"Auto\", \"Off\"",
        ),
    ];
    check::<L2Advertisement>(client, "table", &json!({}), &good, bad).await
}

async fn egress_policies(client: &Client) -> Vec<String> {
    let labels = json!({"matchLabels": {"app": "mail"}});
    let from = |egress_ips: Value| json!({"egressIPs": egress_ips});
    let many: Vec<_> = (0..256).map(|n| format!("fd00:{n:x}::/48")).collect();
    let service = json!({"namespace": "shop", "name": "mail"});
    let good = [
        json!({}),
        json!({"namespaceSelector": labels}),
        json!({"podSelector": null, "namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}),
        from(json!({"pool": "lan", "count": 16, "ipFamilies": ["IPv6", "IPv4"]})),
        from(json!({"addresses": ["192.0.2.7", "fd00::7"]})),
        from(json!({"fromService": service})),
        json!({"destinationCIDRs": many, "excludedCIDRs": many}),
        json!({"destinationCIDRs": ["0.0.0.0/0", "::/0"], "gateways": {"nodeSelector": labels}}),
        json!({"quota": {"portsPerPod": 64512, "ports": 64512}}),
        json!({"quota": {"ports": 1}, "bandwidth": {"rate": "8k"}}),
        json!({"bandwidth": {"rate": "10T", "burst": "12k"}}),
        json!({"onAppear": "Cut", "onDelete": "Cut", "hairpin": true}),
    ];
    let quota = |quota: Value| json!({"quota": quota});
    let bandwidth = |rate: &str, burst: &str| json!({"bandwidth": {"rate": rate, "burst": burst}});
    let (ips, one_of) = ("spec.egressIPs", "exactly one of");
    let bad: Vec<Bad> = vec![
        (
            json!({"podSelector": null}),
            "spec selects no pods",
            "write a podSelector",
        ),
        (
            json!({"podSelector": {}}),
            "spec.podSelector",
            "give it matchLabels",
        ),
        (
            json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Like", "values": ["b"]}]}}),
            "spec.podSelector.matchExpressions",
            "write operator In",
        ),
        (
            json!({"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": []}]}}),
            "spec.namespaceSelector.matchExpressions",
            "with values",
        ),
        (
            json!({"gateways": {"nodeSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}}}),
            "spec.gateways.nodeSelector.matchExpressions",
            "without",
        ),
        (
            json!({"namespaceSelector": {"matchLabels": {}}}),
            "spec.namespaceSelector",
            "give it matchLabels",
        ),
        (json!({"egressIPs": null}), ips, "Required"),
        (from(json!({})), ips, one_of),
        (
            from(json!({"pool": "lan", "addresses": ["192.0.2.7"]})),
            ips,
            one_of,
        ),
        (
            from(json!({"pool": "lan", "fromService": service})),
            ips,
            one_of,
        ),
        (
            from(json!({"addresses": ["192.0.2.7"], "count": 2})),
            ips,
            "name a pool",
        ),
        (
            from(json!({"fromService": service, "ipFamilies": ["IPv4"]})),
            ips,
            "name a pool",
        ),
        (
            from(json!({"pool": "lan", "count": 0})),
            "spec.egressIPs.count",
            "1 to 16",
        ),
        (
            from(json!({"pool": "lan", "count": 17})),
            "spec.egressIPs.count",
            "1 to 16",
        ),
        (
            from(json!({"pool": "lan", "ipFamilies": []})),
            "spec.egressIPs.ipFamilies",
            "leave the field out",
        ),
        (
            from(json!({"pool": "lan", "ipFamilies": ["IPv4", "IPv4"]})),
            "spec.egressIPs.ipFamilies",
            "each once",
        ),
        (
            from(json!({"pool": "lan", "ipFamilies": ["IPv5"]})),
            "spec.egressIPs.ipFamilies",
            "supported values",
        ),
        (
            from(json!({"addresses": []})),
            "spec.egressIPs.addresses",
            "name an address",
        ),
        (
            from(json!({"addresses": ["192.0.2.0/28"]})),
            "spec.egressIPs.addresses",
            "name a pool",
        ),
        (
            from(json!({"addresses": ["fd00:0::7"]})),
            "spec.egressIPs.addresses",
            "canonical form",
        ),
        (
            from(json!({"addresses": ["192.0.2.7", "192.0.2.7"]})),
            "spec.egressIPs.addresses",
            "remove one",
        ),
        (
            from(json!({"fromService": {"namespace": "shop"}})),
            "spec.egressIPs.fromService.name",
            "Required",
        ),
        (
            json!({"destinationCIDRs": []}),
            "spec.destinationCIDRs",
            "leave the field out",
        ),
        (
            json!({"destinationCIDRs": ["198.51.100.7"]}),
            "spec.destinationCIDRs",
            "such as 198.51.100.0/24",
        ),
        (
            json!({"destinationCIDRs": ["198.51.100.7/24"]}),
            "spec.destinationCIDRs",
            "without host bits",
        ),
        (
            json!({"excludedCIDRs": ["fd00::/129"]}),
            "spec.excludedCIDRs",
            "such as 198.51.100.0/24",
        ),
        (
            json!({"gateways": {"nodeSelector": {}}}),
            "spec.gateways.nodeSelector",
            "leave gateways out",
        ),
        (
            json!({"gateways": {}}),
            "spec.gateways.nodeSelector",
            "Required",
        ),
        (quota(json!({})), "spec.quota", "leave quota out"),
        (
            quota(json!({"portsPerPod": 0})),
            "spec.quota.portsPerPod",
            "1 to 64512",
        ),
        (
            quota(json!({"portsPerPod": 64513})),
            "spec.quota.portsPerPod",
            "1 to 64512",
        ),
        (
            quota(json!({"ports": 16_777_217})),
            "spec.quota.ports",
            "1 to 16777216",
        ),
        (
            quota(json!({"portsPerPod": 100, "ports": 99})),
            "spec.quota",
            "raise ports",
        ),
        (
            bandwidth("fast", "10M"),
            "spec.bandwidth.rate",
            "such as 100M",
        ),
        (bandwidth("7999", "10M"), "spec.bandwidth.rate", "8k to 10T"),
        (bandwidth("11T", "10M"), "spec.bandwidth.rate", "8k to 10T"),
        (
            bandwidth("1M", "1.5M"),
            "spec.bandwidth.burst",
            "such as 10M",
        ),
        (
            bandwidth("1M", "11k"),
            "spec.bandwidth.burst",
            "leave it out",
        ),
        (
            json!({"onAppear": "Drain"}),
            "spec.onAppear",
            "supported values: \"Keep\", \"Cut\"",
        ),
        (
            json!({"onDelete": "Keep"}),
            "spec.onDelete",
            "supported values: \"Drain\", \"Cut\"",
        ),
    ];
    let base = json!({"podSelector": labels, "egressIPs": {"pool": "lan"}});
    check::<EgressPolicy>(client, "table", &base, &good, bad).await
}

fn mk_virtual_ip(address: &str) -> Value {
    json!({"address": address, "pool": "lan", "group": "default/web",
        "services": [{"namespace": "default", "name": "web"}]})
}

async fn virtual_ips(client: &Client) -> Vec<String> {
    let base = mk_virtual_ip("192.0.2.7");
    let bad: Vec<Bad> = vec![
        (
            json!({"address": "192.0.2.8"}),
            "metadata.name",
            "must be spec.address",
        ),
        (
            json!({"address": "fd00::1"}),
            "metadata.name",
            "joined by dashes",
        ),
        (
            json!({"address": "192.0.2.007"}),
            "spec.address",
            "canonical form",
        ),
    ];
    let mut wrong = check::<VirtualIP>(client, "192.0.2.7", &base, &[json!({})], bad).await;
    let name = "fd00-0088-0000-0000-0000-0000-0000-0200";
    let six = mk_virtual_ip("fd00:88::200");
    let bad: Vec<Bad> = vec![(
        json!({"address": "fd00:88:0::200"}),
        "spec.address",
        "canonical form",
    )];
    wrong.extend(check::<VirtualIP>(client, name, &six, &[json!({})], bad).await);
    wrong
}

async fn immutable(client: &Client) {
    let api: Api<VirtualIP> = Api::all(client.clone());
    let object = mk_object::<VirtualIP>("192.0.2.7", &mk_virtual_ip("192.0.2.7"));
    api.create(
        &PostParams::default(),
        &serde_json::from_value(object).unwrap(),
    )
    .await
    .unwrap();
    let patch = json!({"spec": {"address": "192.0.2.8"}});
    let refusal = api
        .patch("192.0.2.7", &PatchParams::default(), &Patch::Merge(patch))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refusal.contains("spec.address cannot be changed; make another VirtualIP"),
        "{refusal}"
    );
    let patch = json!({"spec": {"pool": "other"}});
    api.patch("192.0.2.7", &PatchParams::default(), &Patch::Merge(patch))
        .await
        .unwrap();
}

fn mk_object<K: Resource<DynamicType = ()>>(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": K::api_version(&()), "kind": K::kind(&()), "metadata": {"name": name}, "spec": spec})
}

/// What of the table did not come out as it says. Nothing is kept: the requests are dry runs.
async fn check<K>(
    client: &Client,
    name: &str,
    base: &Value,
    good: &[Value],
    bad: Vec<Bad>,
) -> Vec<String>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned,
{
    let mut wrong = Vec::new();
    let mut counts = (0, 0);
    for spec in good {
        counts.0 += 1;
        if let Err(refusal) = create::<K>(client, name, base, spec).await {
            wrong.push(format!("{} {spec} was refused: {refusal}", K::kind(&())));
        }
    }
    for (spec, field, cure) in bad {
        counts.1 += 1;
        match create::<K>(client, name, base, &spec).await {
            Ok(()) => wrong.push(format!("{} {spec} was accepted", K::kind(&()))),
            Err(refusal) if refusal.contains(field) && refusal.contains(cure) => {}
            Err(refusal) => wrong.push(format!(
                "{} {spec} was refused without {field:?} or {cure:?}: {refusal}",
                K::kind(&())
            )),
        }
    }
    println!(
        "{}: {} accepted, {} refused",
        K::kind(&()),
        counts.0,
        counts.1
    );
    wrong
}

async fn create<K>(client: &Client, name: &str, base: &Value, spec: &Value) -> Result<(), String>
where
    K: Resource<DynamicType = ()>,
{
    let mut whole = base.clone();
    whole
        .as_object_mut()
        .unwrap()
        .extend(spec.as_object().unwrap().clone());
    // As a user's YAML comes: what the types would leave out, such as an empty list, must reach the server.
    let body = serde_json::to_vec(&mk_object::<K>(name, &whole)).unwrap();
    let path = K::url_path(&(), None) + "?dryRun=All&fieldValidation=Strict";
    let request = http::Request::post(path)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body)
        .unwrap();
    match client.request::<Value>(request).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) => Err(status.message.clone()),
        Err(other) => panic!("{other}"),
    }
}
