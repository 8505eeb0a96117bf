//! A gateway beside what stands in for Cilium: its own pods' packets go from their interface to the uplink past the packet
//! filter, and are judged and translated there.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use landfall_ebpf_common::tcx;
use landfall_speaker::datapath::egress::State;
use landfall_speaker::datapath::{self, Change, DataPath};
use landfall_speaker::egress;
use prometheus_client::registry::Registry;

use super::stand_in::{IDENTITY, mk_maps, pass_by};
use super::world::{EGRESS, PATIENCE, REMOTE, World, ask, ip, tcp_seen_as};

/// In place of Cilium: the own pod's packets go from its interface to the uplink, marked.
fn go_past(world: &World, mark: u32) {
    world.gw.nft("delete table inet null\n").unwrap();
    let routers = ["10.88.0.1", "fd00:88::1"].map(ip);
    pass_by(&world.gw, &["pod4".to_owned()], "eth0", routers, mark);
}

fn maps(world: &World) -> PathBuf {
    let directory = world.pin_dir().parent().unwrap().join("cilium");
    std::fs::create_dir(&directory).unwrap();
    mk_maps(&world.gw, &directory);
    directory
}

/// Starts the data path and waits until it has so many programs where packets leave.
fn start(world: &World, cilium: Option<PathBuf>, programs: usize) -> impl DataPath + use<> {
    let mut config = datapath::Config {
        watch: Duration::from_millis(200),
        cilium,
        ..datapath::Config::new(world.pin_dir())
    };
    config.gateway = world.config.clone();
    config.gateway.mark = egress::marks(egress::MARK).1;
    let datapath = world
        .gw
        .run(|| datapath::start(config, &mut Registry::default()));
    let uplinks = ["eth0", "eth1"].map(|name| world.gw.interface_index(name).unwrap());
    datapath.attach(BTreeSet::from([uplinks[0]]).into());
    datapath.change(vec![
        Change::Egress(Some(Arc::new(datapath::Leaving {
            node: "gw".into(),
            egress: Arc::new(world.egress.clone()),
            outside: uplinks.into(),
            mark: egress::MARK,
            around: Arc::new(world.around.clone()),
        }))),
        Change::Complete,
    ]);
    let begun = Instant::now();
    let there = || {
        let there = || tcx::programs(uplinks[0], tcx::Hook::Egress).unwrap();
        world.gw.run(there).len()
    };
    while !matches!(datapath.gateway(), State::Armed(_)) || there() != programs {
        let state = datapath.gateway();
        assert!(begun.elapsed() < PATIENCE, "{state:?}, {}", there());
        thread::sleep(Duration::from_millis(20));
    }
    datapath
}

/// The gateway's own pod, and another node's, leave by the policy's addresses and by no others.
fn assert_leave(world: &World, datapath: &impl DataPath) {
    for (remote, egress) in REMOTE.into_iter().zip(EGRESS) {
        for place in [4, 0] {
            assert_eq!(tcp_seen_as(&world.pods[place], ip(remote)), ip(egress));
            let long = [b'x'; 1200];
            let answer = ask(&world.pods[place], ip(remote), &long);
            assert_eq!(answer.as_deref(), Some(&long[..]));
        }
    }
    world.no_leak();
    assert!(datapath.gateway_counts()["out"] > 0);
}

#[test]
fn a_gateways_own_pods_leave_by_its_address_beside_cilium() {
    // An identity of Cilium's has both of our bits, or none.
    for mark in [IDENTITY, 0x0fff_0f00] {
        let world = World::bare();
        go_past(&world, mark);
        // In their order: who judges, the guard, the gateway, and who gives the mark back.
        let datapath = start(&world, Some(maps(&world)), 4);
        assert_leave(&world, &datapath);
    }
}

/// The table of the packet filter is gone, and nobody masquerades.
#[test]
fn what_nobody_has_judged_leaves_a_gateway_by_its_address_all_the_same() {
    let world = World::bare();
    go_past(&world, 0);
    let datapath = start(&world, None, 2);
    assert_leave(&world, &datapath);
}
