//! Flows of pods, wherever they run, to servers wherever they are.

use landfall_lab::ping;
use landfall_lab::server::WHO_AM_I;

use super::world::{EGRESS, PATIENCE, REMOTE, SERVER, World, ask, ip, retransmitted, tcp_seen_as};

#[test]
fn pods_leave_by_their_egress_address() {
    let world = World::build();
    for (family, egress) in EGRESS.into_iter().enumerate() {
        for pod in &world.pods {
            for to in [SERVER[family], REMOTE[family]].map(ip) {
                assert_eq!(tcp_seen_as(pod, to), ip(egress), "{} to {to}", pod.name());
                let answer = ask(pod, to, WHO_AM_I.as_bytes());
                let text = String::from_utf8(answer.expect("an answer")).unwrap();
                assert_eq!(ip(&text), ip(egress), "{} to {to}", pod.name());
                ping(pod, to, PATIENCE).unwrap();
            }
        }
    }
    println!("{:?}", world.gateway().counts());
    world.no_leak();
    assert_eq!(world.count("forged"), 0);
}

/// Nobody's Ethernet address is known: the first packet waits for it, and is not lost.
#[test]
fn a_next_hop_that_is_not_known_yet_loses_nothing() {
    let world = World::build();
    for family in 0..2 {
        for to in [SERVER[family], REMOTE[family]] {
            // What the pods' own nodes have to find out is not the question.
            let _ = ask(&world.pods[0], ip(REMOTE[1 - family]), b"x");
            let pod = &world.pods[0];
            tcp_seen_as(pod, ip(to));
            for place in [0, 1] {
                world.gw.ip("neigh flush dev eth0").unwrap();
                let before = retransmitted(&world.pods[place]);
                assert_eq!(tcp_seen_as(&world.pods[place], ip(to)), ip(EGRESS[family]));
                assert_eq!(retransmitted(&world.pods[place]), before, "{to}");
            }
        }
    }
    world.no_leak();
}

/// Datagrams longer than the MTU, both ways.
#[test]
fn fragments_go_both_ways() {
    let world = World::build();
    let data: Vec<u8> = (0..4000_u32)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    for family in 0..2 {
        for pod in [&world.pods[0], &world.pods[4]] {
            for to in [SERVER[family], REMOTE[family]] {
                let answer = ask(pod, ip(to), &data);
                assert_eq!(answer.as_ref(), Some(&data), "{} to {to}", pod.name());
            }
        }
    }
    assert_eq!(world.count("stray-fragment"), 0);
    world.no_leak();
}
