//! A policy that is deleted: what its pods have open goes on by its address to its end, or is cut; the real control plane,
//! controller and speakers.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use kube::Api;
use kube::api::{Patch, PatchParams};
use landfall_api::EgressPolicy;
use landfall_lab::fault::SPEAKER;
use landfall_lab::server::PodServer;
use landfall_lab::{Fault, Lab, Network, Pod, Topology};
use landfall_tests::flows::{self, Flow};
use landfall_tests::tenants::{self, await_egress, await_seen, egress, outside, seen_from};
use landfall_tests::{CONTROL_HOST, Cluster, PATIENCE, chart, objects, until, until_within};
use serde_json::json;

/// How long a try to connect may take.
const TRY: Duration = Duration::from_secs(3);
/// How old news has to be to be known at another gateway in any case.
const AGE: Duration = Duration::from_secs(1);

#[test]
fn flows_outlive_their_policy_and_their_gateway() {
    with_flows(|cluster, mut flows| {
        let lab = cluster.lab();
        let gateway = leader(cluster);
        // Nobody is there to see it go.
        lab.stop(CONTROL_HOST, "controller");
        tenants::delete(cluster, "mail")?;
        leave_as_the_nodes(lab, &all(lab));
        go_on(&mut flows);
        cluster.start_controller("controller", &[])?;
        let draining = "flows of EgressPolicy mail";
        eventually("said to drain", || says(cluster, draining).then_some(()));
        // A speaker that begins anew finds pods that are nobody's tenants, and a policy that is gone.
        let other = lab.nodes().iter().find(|node| node.name != gateway);
        let other = &other.unwrap().name;
        lab.inject(other, Fault::Kill).unwrap();
        lab.heal_node(other).unwrap();
        go_on(&mut flows);
        // Its own pods' would not end for a day: nobody says so.
        flows.retain(|pod, _| !pod.starts_with(&gateway));
        thread::sleep(AGE);
        go_on(&mut flows);
        lose_power(cluster, &gateway);
        go_on(&mut flows);
        let left: Vec<&Pod> = lab.pods().filter(|pod| pod.node != gateway).collect();
        leave_as_the_nodes(lab, &left);
        assert!(egress().iter().all(|it| is_held(cluster, *it)));
        drop(flows);
        let begun = Instant::now();
        await_free(cluster);
        println!(
            "the addresses rest {:?} after the last flow",
            begun.elapsed()
        );
        Ok(())
    });
}

#[test]
fn flows_end_with_a_policy_that_cuts() {
    with_flows(|cluster, flows| {
        patch(cluster, &json!({"onDelete": "Cut"}));
        eventually("on record", || {
            let terms = cluster.virtual_ip(egress()[0])?.spec.egress_terms;
            let cuts = |terms: &landfall_api::virtual_ip::EgressTerms| {
                terms.on_delete == landfall_api::egress::OnDelete::Cut
            };
            terms.iter().any(cuts).then_some(())
        });
        tenants::delete(cluster, "mail")?;
        let begun = Instant::now();
        leave_as_the_nodes(cluster.lab(), &all(cluster.lab()));
        await_free(cluster);
        println!("free after {:?}", begun.elapsed());
        for (pod, mut flows) in flows {
            let number = flows.len();
            let lost = flows::ask(&mut flows).expect_err("they have ended");
            assert_eq!(lost.len(), number, "{pod}: {lost:?}");
        }
        Ok(())
    });
}

/// What a policy's pods began goes on by the addresses that the policy had then; what they begin leaves by those that it has.
#[test]
fn flows_keep_their_address_when_their_policy_gets_others() {
    with_flows(|cluster, mut flows| {
        let lab = cluster.lab();
        let others = Network::Lan.both(235);
        let egress_ips = json!({"addresses": others, "pool": null, "ipFamilies": null});
        patch(cluster, &json!({"egressIPs": egress_ips}));
        let follow = |pods: &[&Pod]| {
            let begun = Instant::now();
            for pod in pods {
                for server in outside() {
                    await_seen(pod, server, |seen| {
                        let known = others.contains(&seen) || egress().contains(&seen);
                        assert!(known, "{}: {seen}", pod.name);
                        others.contains(&seen)
                    });
                }
            }
            println!("all leave by the new addresses after {:?}", begun.elapsed());
        };
        follow(&all(lab));
        go_on(&mut flows);
        let gateway = leader(cluster);
        let next = tenants::gateway(lab, others[0]);
        println!("{gateway}, which loses its power, leads the old addresses, {next} the new ones");
        flows.retain(|pod, _| !pod.starts_with(&gateway));
        thread::sleep(AGE);
        lose_power(cluster, &gateway);
        go_on(&mut flows);
        let left: Vec<&Pod> = lab.pods().filter(|pod| pod.node != gateway).collect();
        follow(&left);
        assert!(egress().iter().all(|it| is_held(cluster, *it)));
        drop(flows);
        await_free(cluster);
        assert!(others.iter().all(|it| is_held(cluster, *it)));
        Ok(())
    });
}

/// Where flows only end, and which no node can announce any more, is no reason to leave the policy's pods without the
/// addresses that it has now.
#[test]
fn an_address_that_is_left_behind_keeps_nobody_from_the_next() {
    with_flows(|cluster, flows| {
        let lab = cluster.lab();
        let others = Network::Lan.both(245);
        let objects = format!(
            "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {{name: next}}
spec:
  purpose: Egress
  addresses: [{}/32, '{}/128']
---
apiVersion: landfall.dev/v1alpha1
kind: L2Advertisement
metadata: {{name: next}}
spec: {{ipAddressPools: [next]}}
---
apiVersion: landfall.dev/v1alpha1
kind: L2Advertisement
metadata: {{name: nowhere}}
spec: {{ipAddressPools: [out], interfaces: [gone0]}}
",
            others[0], others[1]
        );
        chart::apply(cluster.plane(), &objects)?;
        let nobody = "no interface that is up is named gone0";
        eventually("nobody's", || says(cluster, nobody).then_some(()));
        patch(
            cluster,
            &json!({"egressIPs": {"pool": "next", "ipFamilies": ["IPv4", "IPv6"]}}),
        );
        let begun = Instant::now();
        for pod in lab.pods() {
            for server in outside() {
                await_seen(pod, server, |seen| others.contains(&seen));
            }
        }
        println!(
            "all leave by the next addresses after {:?}",
            begun.elapsed()
        );
        // Who would ask why flows do not go on is told.
        let why = format!(
            "cannot announce it ({nobody} (interfaces)): flows that go on there have no way back"
        );
        until("it to say why", || {
            let said = said(cluster);
            let tells = said.iter().any(|message| message.contains(&why));
            if tells { Ok(()) } else { Err(said) }
        });
        // A FIN would be waited for an answer to for four minutes, and none comes.
        for flow in flows.into_values().flatten() {
            flow.reset()?;
        }
        await_free(cluster);
        Ok(())
    });
}

/// Nobody on its node sees how a pod becomes another policy's: what it has open keeps its address all the same.
#[test]
fn pods_become_anothers_while_their_speaker_is_away() {
    with_flows(|cluster, mut flows| {
        let lab = cluster.lab();
        let others = Network::Lan.both(235);
        let policy = format!(
            "
apiVersion: landfall.dev/v1alpha1
kind: EgressPolicy
metadata: {{name: news}}
spec:
  podSelector: {{matchLabels: {{app: echo, sends: news}}}}
  egressIPs: {{addresses: [{}, '{}']}}
",
            others[0], others[1]
        );
        chart::apply(cluster.plane(), &policy)?;
        for other in others {
            println!(
                "{other} is answered for by {}",
                tenants::gateway(lab, other)
            );
        }
        println!("recorded: {} leads the old addresses", leader(cluster));
        for node in lab.nodes() {
            lab.inject(&node.name, Fault::Kill)?;
        }
        cluster.block_on(async {
            let client = cluster.client().await?;
            for pod in lab.pods() {
                objects::label_pod(&client, &pod.name, json!({"sends": "news"})).await?;
            }
            anyhow::Ok(())
        })?;
        go_on(&mut flows);
        for node in lab.nodes() {
            lab.restart(&node.name, SPEAKER)?;
        }
        for pod in lab.pods() {
            for server in outside() {
                await_seen(pod, server, |seen| {
                    let known = others.contains(&seen) || egress().contains(&seen);
                    assert!(known, "{}: {seen}", pod.name);
                    others.contains(&seen)
                });
            }
        }
        for _ in 0..3 {
            go_on(&mut flows);
            thread::sleep(AGE);
        }
        Ok(())
    });
}

/// Changes the policy's spec.
fn patch(cluster: &Cluster, spec: &serde_json::Value) {
    cluster.block_on(async {
        let policies: Api<EgressPolicy> = Api::all(cluster.client().await.unwrap());
        let patch = json!({"spec": spec});
        let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
        policies.patch("mail", &params, &patch).await.unwrap();
    });
}

/// Runs a cluster whose pods leave by the policy's addresses and have something open, by pod.
fn with_flows(work: impl FnOnce(&Cluster, BTreeMap<String, Vec<Flow>>) -> anyhow::Result<()>) {
    let topology = Topology {
        nodes: 3,
        pods_per_node: 2,
        ..Topology::default()
    };
    Cluster::run(topology, |cluster| {
        tenants::start(cluster)?;
        let lab = cluster.lab();
        let _near = PodServer::start(lab.client(), "near")?;
        let _far = PodServer::start(lab.remote(), "far")?;
        for pod in lab.pods() {
            await_egress(pod, outside());
        }
        let open = |pod: &Pod| {
            let servers = outside();
            let flows = servers.map(|server| Flow::open_within(&pod.netns, server, TRY).unwrap());
            (pod.name.clone(), flows.collect())
        };
        let flows: BTreeMap<String, Vec<Flow>> = lab.pods().map(open).collect();
        let seen = flows.values().flatten().map(|flow| flow.seen_from);
        assert!(seen.into_iter().all(|from| egress().contains(&from)));
        eventually("reported", || says(cluster, "").then_some(()));
        work(cluster, flows)
    });
}

fn all(lab: &Lab) -> Vec<&Pod> {
    lab.pods().collect()
}

/// Waits until what pods begin leaves by their nodes; until then it leaves by the policy, or not at all.
fn leave_as_the_nodes(lab: &Lab, pods: &[&Pod]) {
    let begun = Instant::now();
    for pod in pods {
        let node = lab.node(&pod.node).unwrap().addresses(Network::Lan);
        for server in outside() {
            eventually("all leave by their nodes", || {
                let seen = seen_from(pod, server).ok()?;
                let by_node = node.contains(&seen);
                assert!(by_node || egress().contains(&seen), "{}: {seen}", pod.name);
                by_node.then_some(())
            });
        }
    }
    println!("all leave by their nodes after {:?}", begun.elapsed());
}

/// Each flow is answered, by who answered it before.
fn go_on(flows: &mut BTreeMap<String, Vec<Flow>>) {
    for (pod, flows) in flows {
        let asked = flows::ask(flows);
        assert!(asked.is_ok(), "{pod}: {asked:?}");
    }
}

fn is_held(cluster: &Cluster, address: IpAddr) -> bool {
    cluster
        .virtual_ip(address)
        .is_some_and(|it| !it.spec.egress_policies.is_empty())
}

/// Waits until the policy's addresses are nobody's.
fn await_free(cluster: &Cluster) {
    eventually("free", || {
        let held = egress().iter().any(|it| is_held(cluster, *it));
        (!held).then_some(())
    });
}

/// The gateway's node loses its power, and another is the gateway.
fn lose_power(cluster: &Cluster, gateway: &str) {
    cluster.lab().inject(gateway, Fault::PowerOff).unwrap();
    eventually("another gateway", || {
        let leader = leader(cluster);
        (!leader.is_empty() && leader != gateway).then_some(())
    });
}

/// Who leads the policy's address, as it is said on record.
fn leader(cluster: &Cluster) -> String {
    let status = cluster.virtual_ip(egress()[0]).and_then(|it| it.status);
    status.and_then(|status| status.leader).unwrap_or_default()
}

/// Whether a condition of the address says so.
fn says(cluster: &Cluster, words: &str) -> bool {
    said(cluster).iter().any(|message| message.contains(words))
}

/// What the conditions of the address say.
fn said(cluster: &Cluster) -> Vec<String> {
    let status = cluster.virtual_ip(egress()[0]).and_then(|it| it.status);
    let conditions = status.map(|status| status.conditions).unwrap_or_default();
    conditions.into_iter().map(|it| it.message).collect()
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    until_within(2 * PATIENCE, what, || look().ok_or("nothing yet"))
}
