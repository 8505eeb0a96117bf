//! What arrives is what was sent.

use std::io::{BufRead, Write};
use std::thread;

use landfall_lab::fault::Fault;

use super::cluster::{mk_three, vips};
use super::flow::{Flow, elsewhere};

/// Sends lines and compares what comes back, byte by byte; `midway` happens after the third part.
fn transfer(flow: Flow, midway: impl FnOnce()) {
    const LINES_SENT: usize = 600;
    const LENGTH: usize = 60_000;
    let line = |number: usize| -> Vec<u8> {
        let byte = |at: usize| b'!' + u8::try_from((at * 7 + number * 13 + at / 251) % 90).unwrap();
        let mut line: Vec<u8> = (0..LENGTH).map(byte).collect();
        line.push(b'\n');
        line
    };
    let pod = flow.pod.clone();
    let mut reader = flow.stream;
    let mut writer = reader.get_ref().try_clone().unwrap();
    let sender = thread::spawn(move || {
        for number in 0..LINES_SENT {
            writer.write_all(&line(number)).unwrap();
        }
    });
    let mut midway = Some(midway);
    for number in 0..LINES_SENT {
        let mut answer = Vec::new();
        reader.read_until(b'\n', &mut answer).unwrap();
        let expected = [pod.as_bytes(), b" ", &line(number)].concat();
        assert!(answer == expected, "line {number} is not what was sent");
        if number == LINES_SENT / 3
            && let Some(midway) = midway.take()
        {
            midway();
        }
    }
    sender.join().unwrap();
}

/// Merged by the NIC, or segment by segment: what arrives is what was sent, also past the leader's death.
#[test]
fn bytes_are_intact_with_offloads_on_and_off() {
    for offloads in [true, false] {
        let (cluster, leader) = mk_three(offloads);
        if !offloads {
            for node in cluster.lab.nodes() {
                node.netns
                    .exec("ethtool -K eth0 gro off tso off gso off tx off rx off")
                    .unwrap();
            }
        }
        let [v4, v6] = vips();
        transfer(elsewhere(&cluster, v6, &leader), || {});
        let flow = elsewhere(&cluster, v4, &leader);
        let off = cluster.await_leader(v4, |_| true);
        assert_ne!(flow.node(), off, "the leadership moved by itself");
        transfer(flow, || cluster.lab.inject(&off, Fault::PowerOff).unwrap());
        println!("offloads {offloads}: {:?}", cluster.verdicts());
    }
}
