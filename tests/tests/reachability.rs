//! A Service gets an address, and clients reach it there.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use landfall_lab::{Netns, Topology, measure::neighbours};
use landfall_tests::{Cluster, PATIENCE, chart, client, eventually, objects};
use serde_json::{Value, json};

const POOL: &str = "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
# Each Service has addresses that no client has heard of.
metadata: {name: lan}
spec:
  addresses: [10.88.0.200-10.88.0.240, 'fd00:88::200-fd00:88::240']
  quarantine: 1h
";

#[test]
fn services_are_reached() {
    Cluster::run(Topology::default(), |cluster| {
        chart::apply(cluster.plane(), POOL)?;
        cluster.start_landfall()?;
        for (name, spec) in [
            ("dual", json!({})),
            (
                "v4",
                json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}),
            ),
            (
                "v6",
                json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]}),
            ),
        ] {
            is_reached(cluster, name, spec.clone())?;
            let mut local = spec;
            local["externalTrafficPolicy"] = "Local".into();
            is_reached(cluster, &format!("{name}-local"), local)?;
        }
        Ok(())
    });
}

/// Creates the Service, asks it from the segment and from beyond the router, and removes it again.
fn is_reached(cluster: &Cluster, name: &str, spec: Value) -> anyhow::Result<()> {
    let local = spec["externalTrafficPolicy"] == "Local";
    let families = match spec["ipFamilies"].as_array() {
        Some(families) => families.len(),
        None => 2,
    };
    let created = Instant::now();
    let vips = cluster.block_on(async {
        let services = services(&cluster.client().await?);
        services
            .create(&PostParams::default(), &objects::service(name, spec))
            .await?;
        let addresses = eventually("the Service's addresses", async || {
            let service = services.get_status(name).await.ok()?;
            Some(objects::ingress(&service)).filter(|addresses| addresses.len() == families)
        });
        anyhow::Ok(addresses.await)
    })?;
    let assigned = created.elapsed();
    for vip in &vips {
        let (pod, took) = answered(cluster.lab().client(), *vip);
        println!(
            "{name:<12} {vip:<14} address after {:>4} ms, first answer after {:>5} ms ({pod}, asked for {} ms)",
            assigned.as_millis(),
            created.elapsed().as_millis(),
            took.as_millis(),
        );
        answered(cluster.lab().remote(), *vip);
        for client in [cluster.lab().client(), cluster.lab().remote()] {
            let (pod, address) = client::seen_as(client, *vip, Duration::from_secs(10))?;
            // With the policy Local the client's address is kept, whichever node's pod it is.
            assert_eq!(
                local,
                client::addresses(client).contains(&address),
                "{pod} sees {address}"
            );
        }
        leader_of(cluster, *vip)?;
    }
    cluster.block_on(async {
        services(&cluster.client().await?)
            .delete(name, &DeleteParams::default())
            .await?;
        anyhow::Ok(())
    })?;
    for vip in &vips {
        silent(cluster, *vip)?;
    }
    Ok(())
}

fn answered(from: &Netns, vip: IpAddr) -> (String, Duration) {
    client::first_answer(from, vip, PATIENCE)
        .unwrap_or_else(|| panic!("{vip} does not answer {}", from.name()))
}

/// Who answers ARP or ND for an address: one node, and at once.
fn leader_of(cluster: &Cluster, vip: IpAddr) -> anyhow::Result<String> {
    let begun = Instant::now();
    loop {
        let answers = neighbours::who_answers(cluster.lab(), vip, Duration::from_millis(300))?;
        assert!(
            answers.len() <= 1,
            "one node answers for {vip}: {answers:?}"
        );
        if let Some(leader) = answers.into_keys().next() {
            return Ok(leader);
        }
        println!("nobody has answered for {vip} for {:?}", begun.elapsed());
        assert!(begun.elapsed() < PATIENCE, "nobody answers for {vip}");
    }
}

/// Waits until nobody answers for an address any more.
fn silent(cluster: &Cluster, vip: IpAddr) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let leaders = neighbours::who_answers(cluster.lab(), vip, Duration::from_millis(200))?;
        if leaders.is_empty() {
            return Ok(());
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{vip} is still announced by {leaders:?}"
        );
    }
}

fn services(client: &Client) -> Api<Service> {
    Api::default_namespaced(client.clone())
}
