//! What arrives is what was sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::fault::Fault;

use super::cluster::{Cluster, PATIENCE, mk_three, vips};
use super::flow::{Flow, elsewhere};

/// How many bytes go each way: a gigabyte, unless a variable says otherwise.
fn size() -> u64 {
    std::env::var("LANDFALL_TRANSFER_BYTES").map_or(1_000_000_000, |text| text.parse().unwrap())
}

/// A transfer both ways at once; `midway` happens when a third of it has come.
fn transfer(cluster: &Cluster, flow: Flow, midway: impl FnOnce()) {
    let bytes = size();
    let pod = flow.pod.clone();
    let received = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&received);
    let begun = Instant::now();
    let transfer = thread::spawn(move || flow.exchange(bytes, &counted));
    let mut heard = (0, Instant::now());
    let mut midway = Some(midway);
    while !transfer.is_finished() {
        thread::sleep(Duration::from_millis(10));
        let now = received.load(Ordering::Relaxed);
        if now != heard.0 {
            heard = (now, Instant::now());
        }
        if now > bytes / 3
            && let Some(midway) = midway.take()
        {
            midway();
        }
        assert!(
            heard.1.elapsed() < PATIENCE,
            "the transfer with {pod} stands still after {now} bytes: {:?}",
            cluster.verdicts()
        );
    }
    transfer.join().unwrap().unwrap();
    println!(
        "{bytes} bytes each way with {pod}: {:.1} s",
        begun.elapsed().as_secs_f64()
    );
}

/// Merged by the NIC, and past the leader's death: what arrives is what was sent.
#[test]
fn bytes_are_intact_in_super_packets() {
    let (cluster, leader) = mk_three(true);
    let [vip, _] = vips();
    let flow = elsewhere(cluster.lab.client(), vip, &leader);
    let off = cluster.await_leader(vip, |_| true);
    assert_ne!(flow.node(), off, "the leadership moved by itself");
    transfer(&cluster, flow, || {
        let verdicts = cluster.verdicts_of(&off);
        println!("{off} loses power; it has {verdicts:?}");
        let average = size() / 3 / verdicts["steered"].max(1);
        assert!(average > 3000, "packets of {average} bytes are not merged");
        cluster.lab.inject(&off, Fault::PowerOff).unwrap();
    });
    cluster.await_leader(vip, |leader| leader != off);
    println!("{:?}", cluster.verdicts());
}

/// Segment by segment, with nobody's help for segments and checksums.
#[test]
fn bytes_are_intact_without_offloads() {
    let (cluster, leader) = mk_three(false);
    for node in cluster.lab.nodes() {
        node.netns
            .exec("ethtool -K eth0 gro off tso off gso off tx off rx off")
            .unwrap();
    }
    cluster
        .lab
        .client()
        .exec("ethtool -K eth0 gro off tso off gso off tx off rx off")
        .unwrap();
    let [_, vip] = vips();
    transfer(
        &cluster,
        elsewhere(cluster.lab.client(), vip, &leader),
        || {},
    );
    println!("{:?}", cluster.verdicts());
}
