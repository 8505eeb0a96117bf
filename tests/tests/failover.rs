//! What clients see when a leader fails, one fault after the other on one cluster; the figures are printed.
//!
//! No time is asserted but that everything is over before [`landfall_tests::PATIENCE`] ends, and of the flows that no
//! pod that lives has reset one when the leader of many VIPs died.

#[path = "failover/scene.rs"]
mod scene;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use landfall_api::VirtualIP;
use landfall_lab::{Fault, Topology, measure::neighbours};
use landfall_tests::{Cluster, PATIENCE, eventually, objects};
use scene::{Scene, report};
use serde_json::json;

#[test]
fn fail_over() {
    Cluster::run(Topology::default(), |cluster| {
        let scene = Scene::start(cluster)?;
        for fault in [
            Fault::Drain,
            Fault::Kill,
            Fault::PowerOff,
            Fault::UplinkDown,
            Fault::CarrierLost,
            Fault::OtherVlan,
            Fault::ManagementDown,
        ] {
            only(&fault.to_string(), || single_fault(&scene, fault))?;
        }
        only("api-down", || api_server_down_then_leader_dead(&scene))?;
        only("partition", || partition_and_heal(&scene))?;
        only("rotation", || key_rotation(&scene))?;
        only("many", || many_vips_on_a_dying_node(&scene))?;
        Ok(())
    });
}

/// Runs a scenario, unless `LANDFALL_SCENARIO` names others.
fn only(name: &str, scenario: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let wanted = std::env::var("LANDFALL_SCENARIO").unwrap_or_default();
    if !name.contains(&wanted) {
        return Ok(());
    }
    let begun = Instant::now();
    scenario().map_err(|error| error.context(name.to_owned()))?;
    println!(
        "      {name} took {:.1} s in all",
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The leader is struck: another serves, and keeps what it has when the first one is back.
fn single_fault(scene: &Scene<'_>, fault: Fault) -> anyhow::Result<()> {
    let moves = fault != Fault::ManagementDown;
    let begun = Instant::now();
    let outcome = scene.strike(&fault.to_string(), moves, |leader| {
        Ok(scene.lab().inject(leader, fault)?)
    })?;
    report(&outcome);
    if !moves {
        // Who knows less of the pods than the others do hands over after 2 s. TCP doubles the time between its tries: what the
        // API server could not send arrives when the network has been back for as long as it was gone.
        scene.lab().heal()?;
        thread::sleep(begun.elapsed());
    }
    scene.recover()?;
    let returned = scene.leader()?;
    assert_eq!(
        returned, outcome.leader_after,
        "{fault}: nothing moves when the node returns"
    );
    Ok(())
}

/// Without an API server everything goes on, fail-over included.
fn api_server_down_then_leader_dead(scene: &Scene<'_>) -> anyhow::Result<()> {
    let outcome = scene.strike("api server down, then power-off", true, |leader| {
        scene.cluster.plane().stop_api();
        thread::sleep(Duration::from_secs(2));
        Ok(scene.lab().inject(leader, Fault::PowerOff)?)
    });
    scene.cluster.plane().start_api()?;
    report(&outcome?);
    scene.recover()
}

/// Each side has at most one owner while they do not hear each other, and there is one soon after they do.
fn partition_and_heal(scene: &Scene<'_>) -> anyhow::Result<()> {
    let lab = scene.lab();
    let leader = scene.leader()?;
    let others: Vec<&str> = lab
        .nodes()
        .iter()
        .map(|node| node.name.as_str())
        .filter(|name| *name != leader)
        .collect();
    // The clients stay with the others: they need a new leader, and the old one must not disturb them.
    let outcome = scene.strike("partition", true, |leader| {
        Ok(lab.partition(&others, &[leader], true)?)
    })?;
    report(&outcome);
    let healed = Instant::now();
    lab.heal()?;
    let owner = scene.one_owner()?;
    println!(
        "      one owner ({owner}) for a second on end, {:.0} ms after the heal",
        (healed.elapsed().saturating_sub(scene::CALM)).as_secs_f64() * 1000.0
    );
    scene.recover()
}

/// Two keys are valid at once: changing them in three steps moves nothing.
fn key_rotation(scene: &Scene<'_>) -> anyhow::Result<()> {
    let outcome = scene.strike("key rotation", false, |_| {
        for keys in [&[1_u8, 2][..], &[2, 1], &[2]] {
            scene.cluster.write_gossip_keys(keys)?;
            // Longer than a speaker takes to read the file again.
            thread::sleep(Duration::from_secs(3));
        }
        Ok(())
    })?;
    report(&outcome);
    assert_eq!(outcome.lost, 0, "nothing is lost by it");
    scene.recover()
}

/// Every VIP of a node that dies is taken over.
fn many_vips_on_a_dying_node(scene: &Scene<'_>) -> anyhow::Result<()> {
    const VIPS: usize = 200;
    let lab = scene.lab();
    // All on one node: the others are excluded while the Services appear.
    let chosen = scene.leader()?;
    let exclude = |value: serde_json::Value| {
        scene.cluster.block_on(async {
            let client = scene.cluster.client().await?;
            for node in lab.nodes().iter().filter(|node| node.name != chosen) {
                let label =
                    json!({"node.kubernetes.io/exclude-from-external-load-balancers": value});
                objects::label_node(&client, &node.name, label).await?;
            }
            anyhow::Ok(())
        })
    };
    exclude("".into())?;
    let begun = Instant::now();
    scene.cluster.block_on(async {
        let client = scene.cluster.client().await?;
        let services: Api<Service> = Api::default_namespaced(client.clone());
        for number in 0..VIPS {
            let spec = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]});
            let service = objects::service(&format!("many-{number}"), spec);
            services.create(&PostParams::default(), &service).await?;
        }
        leads(&client, &chosen, VIPS).await;
        anyhow::Ok(())
    })?;
    println!(
        "      {VIPS} Services led by {chosen} {:.1} s after the first",
        begun.elapsed().as_secs_f64()
    );
    exclude(serde_json::Value::Null)?;
    thread::sleep(Duration::from_secs(1));

    let outcome = scene.strike("power-off with 200 VIPs", true, |leader| {
        assert_eq!(leader, chosen);
        Ok(lab.inject(leader, Fault::PowerOff)?)
    })?;
    report(&outcome);
    // A flow to a pod of the dead node stalls, if kube-proxy had not followed the slice by then. Those to others have a
    // way, late or soon.
    assert!(!outcome.flows.is_empty());
    assert_eq!(outcome.reset_elsewhere(), [""; 0], "pods that live");
    // Every one of them is answered for by somebody else.
    let addresses = scene.cluster.block_on(async {
        let api: Api<VirtualIP> = Api::all(scene.cluster.client().await?);
        let list = api.list(&kube::api::ListParams::default()).await?;
        anyhow::Ok(
            list.into_iter()
                .map(|vip| vip.spec.address)
                .collect::<Vec<_>>(),
        )
    })?;
    let mut by_node: BTreeMap<String, usize> = BTreeMap::new();
    for address in addresses.iter().filter_map(|address| address.parse().ok()) {
        let begun = Instant::now();
        let owner = loop {
            let answers = neighbours::who_answers(lab, address, Duration::from_millis(30))?;
            assert!(answers.len() <= 1, "{address}: {answers:?}");
            if let Some(owner) = answers.into_keys().next() {
                break owner;
            }
            assert!(begun.elapsed() < PATIENCE, "nobody answers for {address}");
        };
        assert_ne!(owner, chosen);
        *by_node.entry(owner).or_default() += 1;
    }
    println!("      taken over: {by_node:?}");
    scene.cluster.block_on(async {
        let services: Api<Service> = Api::default_namespaced(scene.cluster.client().await?);
        for number in 0..VIPS {
            services
                .delete(&format!("many-{number}"), &DeleteParams::default())
                .await?;
        }
        anyhow::Ok(())
    })?;
    scene.recover()
}

/// Waits until a node leads at least so many VIPs.
async fn leads(client: &kube::Client, node: &str, number: usize) {
    let api: Api<VirtualIP> = Api::all(client.clone());
    let all = kube::api::ListParams::default();
    eventually("all VIPs to be led", async || {
        let list = api.list(&all).await.ok()?;
        let led = list
            .iter()
            .filter(|vip| {
                let status = vip.status.as_ref();
                status.and_then(|status| status.leader.as_deref()) == Some(node)
            })
            .count();
        (led >= number).then_some(())
    })
    .await;
}
