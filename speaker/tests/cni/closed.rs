//! Without a speaker nobody's packets leave while there are policies: neither where one was, nor after the node's start.
//! Once there is one, all are served.

use std::fs;
use std::thread;
use std::time::Duration;

use landfall_lab::Network;
use landfall_lab::fault::SPEAKER;

use super::cluster::{Cluster, NODE, PATIENCE, PLAIN};
use super::pods::{Pod, with_all};
use super::soon::bridge;
use super::wire::NOWHERE;

const TENANTS: [&str; 3] = ["red", "blue", PLAIN];
const PODS: usize = 200;
/// How many there are before the speaker goes.
const BEFORE: usize = 12;
/// The last numbers of their addresses.
const ADDRESSES: [u8; 2] = [20, 250];

fn mk_pods<'a>(cluster: &'a Cluster, prefix: &str, number: usize) -> Vec<Pod<'a>> {
    let tenants = TENANTS.into_iter().cycle().take(number).enumerate();
    tenants
        .map(|(number, tenant)| {
            let name = format!("{prefix}{number}");
            cluster.tell(&name, tenant, &[]);
            Pod::new(cluster, name, tenant)
        })
        .collect()
}

/// None of them gets anything out of the cluster in its first moments, and each what it asks for within.
fn assert_shut(cluster: &Cluster, pods: &mut [Pod<'_>]) {
    let answered: usize = with_all(pods, |pod| {
        pod.add();
        let seen = pod.connect(Duration::from_millis(300));
        seen.iter().flatten().count()
    })
    .into_iter()
    .sum();
    assert_eq!(answered, 0);
    // And what they send again, all of them at once.
    let answered: usize = thread::scope(|scope| {
        let trying: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(|| pod.connect(Duration::from_millis(1500))))
            .collect();
        let tried = trying.into_iter().flat_map(|trying| trying.join().unwrap());
        tried.flatten().count()
    });
    assert_eq!(answered, 0);
    let frames = cluster.wire.outbound();
    assert!(frames.is_empty(), "{frames:?}\n{}", cluster.state());
    let dropped = cluster.dropped().expect("there is a table");
    println!(
        "{} pods: nothing on the wire, {dropped} packets dropped",
        pods.len()
    );
    assert!(dropped >= u64::try_from(6 * pods.len()).unwrap());
    let near = cluster.lab.node("node2").unwrap();
    let near = near.addresses(Network::Management)[0];
    for pod in &*pods {
        let answer = pod.netns.exec(&format!("ping -c 1 -W 20 {near}"));
        assert!(answer.is_ok(), "{answer:?}\n{}", cluster.state());
    }
}

/// A speaker comes, and the API server has heard of the addresses.
fn assert_served(cluster: &Cluster, pods: &mut [Pod<'_>]) {
    for pod in &*pods {
        cluster.tell(&pod.name, pod.tenant, &pod.addresses);
    }
    cluster.speak_on(NODE);
    let seen = with_all(pods, |pod| pod.connect(PATIENCE));
    for (pod, seen) in pods.iter().zip(seen) {
        for (seen, by) in seen.into_iter().zip(cluster.leaves_by(pod.tenant)) {
            let seen = seen.unwrap_or_else(|error| {
                panic!(
                    "{} of {} is not served: {error}\n{}",
                    pod.name,
                    pod.tenant,
                    cluster.state()
                )
            });
            assert_eq!(seen.by, by, "{} of {}", pod.name, pod.tenant);
        }
    }
    let owners: Vec<_> = pods
        .iter()
        .map(|pod| (pod.tenant, pod.addresses.as_slice()))
        .collect();
    // The table may lead them before the guard knows them. Until then their frames are for an address that no bridge forwards.
    cluster.assert_clean_but(&owners, Some(NOWHERE));
}

/// As the node is after a power failure: nothing in the kernel, nothing of what is not on its disk.
fn reboot(cluster: &Cluster) {
    cluster.lab.stop(NODE, SPEAKER);
    let node = cluster.node();
    let mut uninstall = node.command(env!("CARGO_BIN_EXE_landfall-speaker"));
    let pins = cluster.lab.mount_pins().unwrap().join(NODE);
    let output = uninstall
        .arg("uninstall")
        .arg("--bpf-pin-dir")
        .arg(pins)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let _ = fs::remove_file(cluster.lab.cni_socket(NODE));
    node.exec("conntrack -F").unwrap();
    assert_eq!(cluster.dropped(), None, "no table is left");
    cluster.wire.clear();
}

#[test]
fn while_the_speaker_is_stopped() {
    let cluster = Cluster::armed(&bridge(), ADDRESSES);
    let mut before = mk_pods(&cluster, "before", BEFORE);
    for pod in &mut before {
        pod.add();
    }
    cluster.lab.stop(NODE, SPEAKER);
    let mut pods = mk_pods(&cluster, "pod", PODS);
    assert_shut(&cluster, &mut pods);
    for pod in &pods {
        assert!(pod.said.contains("no speaker listens"), "{}", pod.said);
    }
    // Who was judged before goes on, also with what is new.
    for pod in &before {
        for (seen, by) in pod
            .connect(PATIENCE)
            .into_iter()
            .zip(cluster.leaves_by(pod.tenant))
        {
            assert_eq!(seen.unwrap().by, by);
        }
    }
    cluster.wire.clear();
    assert_served(&cluster, &mut pods);
}

#[test]
fn after_the_nodes_start() {
    let cluster = Cluster::armed(&bridge(), ADDRESSES);
    reboot(&cluster);
    let mut pods = mk_pods(&cluster, "pod", PODS);
    assert_shut(&cluster, &mut pods);
    assert!(pods.iter().any(|pod| pod.said.contains("boot.nft: loaded")));
    assert_served(&cluster, &mut pods);
}

/// When the policies have gone, what the plugin would load goes too: the next start holds nobody up.
#[test]
fn without_policies_the_nodes_start_holds_nobody_up() {
    let cluster = Cluster::armed(&bridge(), ADDRESSES);
    cluster.remove_policies();
    cluster.until("the file goes", || !cluster.boot_file().exists());
    cluster.until("and the rules", || cluster.dropped().is_none());
    reboot(&cluster);
    let mut plain = Pod::new(&cluster, "plain".into(), PLAIN);
    plain.add();
    for (seen, by) in plain
        .connect(PATIENCE)
        .into_iter()
        .zip(cluster.leaves_by(PLAIN))
    {
        assert_eq!(seen.unwrap().by, by);
    }
}

#[test]
fn the_plugin_comes_back_when_the_cni_writes_its_list_anew_and_goes_when_all_goes() {
    let cluster = Cluster::armed(&bridge(), ADDRESSES);
    let path = cluster.lists().join("10-pods.conflist");
    let with = fs::read_to_string(&path).unwrap();
    let mut list: serde_json::Value = serde_json::from_str(&with).unwrap();
    list["plugins"].as_array_mut().unwrap().pop();
    fs::write(&path, list.to_string()).unwrap();
    assert!(!cluster.is_chained());
    cluster.until("it is chained again", || cluster.is_chained());
    assert_eq!(fs::read_to_string(&path).unwrap(), with);
    cluster.lab.stop(NODE, SPEAKER);
    thread::sleep(Duration::from_millis(100));
    assert!(cluster.is_chained(), "it stays when the speaker goes");
    let pins = cluster.lab.mount_pins().unwrap().join(NODE);
    let mut uninstall = cluster
        .node()
        .command(env!("CARGO_BIN_EXE_landfall-speaker"));
    uninstall.arg("uninstall").arg("--bpf-pin-dir").arg(pins);
    uninstall.arg("--cni-bin-dir").arg(cluster.programs());
    uninstall.arg("--cni-conf-dir").arg(cluster.lists());
    uninstall.arg("--egress-boot-file").arg(cluster.boot_file());
    let output = uninstall.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(
        said.contains("CNI plugin: program removed, taken out of 1 lists"),
        "{said}"
    );
    assert!(!cluster.is_chained() && !cluster.boot_file().exists());
    assert!(!cluster.programs().join("landfall-cni").exists());
    // The network goes on without it.
    let mut pod = Pod::new(&cluster, "pod".into(), PLAIN);
    pod.add();
    assert_eq!(pod.connect(PATIENCE).into_iter().flatten().count(), 2);
}
