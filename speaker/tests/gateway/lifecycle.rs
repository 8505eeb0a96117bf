//! What is in the kernel, and for how long.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use landfall_ebpf_common::tcx;
use landfall_lab::Netns;
use landfall_lab::server::WHO_AM_I;
use landfall_speaker::datapath::egress::{FlowState, State};
use landfall_speaker::datapath::{self, Change, DataPath as _, Hook};
use landfall_speaker::egress::Policy;
use prometheus_client::registry::Registry;

use super::world::{EGRESS, LINES, PATIENCE, REMOTE, SERVER, World, connect, ip, say, tcp_seen_as};

/// How many programs there are at the gateway's uplink, on either side.
fn programs(gw: &Netns) -> usize {
    let uplink = gw.interface_index("eth0").unwrap();
    gw.run(|| {
        [tcx::Hook::Ingress, tcx::Hook::Egress]
            .map(|hook| tcx::programs(uplink, hook).unwrap().len())
            .iter()
            .sum()
    })
}

/// Where a map of the gateway's is pinned.
fn map_of(world: &World) -> PathBuf {
    let layout = format!("layout-{}", landfall_ebpf_common::LAYOUT);
    world.pin_dir().join(layout).join("GATE_OUT_V4")
}

/// Without a policy there is nothing; with one there is; one that is gone has its flows, and when nobody knows of it any more
/// they end, and everything goes.
#[test]
fn it_is_there_while_there_is_a_policy() {
    let mut world = World::bare();
    world.config.times.rest = 0;
    let policies = std::mem::take(&mut world.egress.policies);
    world.launch();
    world.tell();
    world.await_state(|state| *state == State::Idle);
    assert_eq!(programs(&world.gw), 0);
    assert!(!map_of(&world).exists());

    world.egress.policies = policies;
    world.tell();
    world.await_state(|state| matches!(state, State::Armed(_)));
    assert_eq!(programs(&world.gw), 2);
    let stream = connect(&world.pods[0], SocketAddr::new(ip(SERVER[0]), LINES)).unwrap();

    for policy in world.egress.policies.values_mut() {
        *policy = Policy::gone(policy.addresses.clone(), policy.gateway.clone());
    }
    for pod in world.egress.pods.values_mut() {
        pod.former = pod.tenant.take().map(|tenant| tenant.policy);
    }
    world.tell();
    // The flow goes on as it was.
    for _ in 0..20 {
        assert_eq!(ip(&say(&stream, WHO_AM_I).unwrap()), ip(EGRESS[0]));
        thread::sleep(Duration::from_millis(100));
    }
    world.egress.policies.clear();
    world.egress.pods.clear();
    world.tell();
    let begun = Instant::now();
    while say(&stream, WHO_AM_I).is_ok() {
        assert!(begun.elapsed() < PATIENCE, "it does not end");
        thread::sleep(Duration::from_millis(100));
    }
    world.await_state(|state| *state == State::Idle);
    assert_eq!(programs(&world.gw), 0);
    assert!(!map_of(&world).exists());
}

/// Disarmed, it is out of the kernel at once, living flows or not, also for the next process that is told so; armed again, it
/// begins anew.
#[test]
fn disarmed_it_is_gone_at_once() {
    let mut world = World::build();
    let remote = SocketAddr::new(ip(SERVER[0]), LINES);
    let stream = connect(&world.pods[0], remote).unwrap();
    assert_eq!(ip(&say(&stream, WHO_AM_I).unwrap()), ip(EGRESS[0]));
    let of_pod = |world: &World| {
        let own = stream.local_addr().unwrap();
        let found = world.gateway().bindings(10, &|bound| bound.pod == own);
        found.unwrap()
    };
    let (bound, more) = of_pod(&world);
    assert_eq!((bound.len(), more), (1, 0));
    assert_eq!(
        (bound[0].remote, bound[0].egress.ip()),
        (remote, ip(EGRESS[0]))
    );
    assert_eq!(bound[0].state, FlowState::Established);
    assert_eq!(bound[0].policy.as_deref(), Some("mail"));

    world.gateway().disarm(true);
    world.await_state(|state| *state == State::Idle);
    assert_eq!(programs(&world.gw), 0);
    assert!(!map_of(&world).exists());
    assert_eq!(of_pod(&world), (Vec::new(), 0));
    // Whatever it is told meanwhile.
    world.tell();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(programs(&world.gw), 0);

    world.gateway().disarm(false);
    world.await_state(|state| matches!(state, State::Armed(_)));
    assert_eq!(tcp_seen_as(&world.pods[0], ip(SERVER[0])), ip(EGRESS[0]));

    // What a process has left goes, too.
    world.stop();
    assert_eq!(programs(&world.gw), 2);
    world.launch();
    world.gateway().disarm(true);
    let begun = Instant::now();
    while programs(&world.gw) > 0 || map_of(&world).exists() {
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(20));
    }
}

/// On kernels without TCX: as filters. They outlive the process, come back when somebody takes them away, and go with the
/// gateway.
#[test]
fn by_clsact_too() {
    let filters = |world: &World| {
        let shown = ["ingress", "egress"].map(|side| {
            let line = format!("tc filter show dev eth0 {side}");
            world.gw.exec(&line).expect("iproute2 has it")
        });
        shown.map(|shown| shown.contains("landfall_gateway"))
    };
    let eventually = |world: &World, wanted: [bool; 2]| {
        let begun = Instant::now();
        while filters(world) != wanted {
            assert!(begun.elapsed() < PATIENCE, "{:?}", filters(world));
            thread::sleep(Duration::from_millis(20));
        }
    };
    let mut world = World::bare();
    world.config.hook = Hook::Clsact;
    world.start();
    assert_eq!((filters(&world), programs(&world.gw)), ([true; 2], 0));
    let stream = connect(&world.pods[0], SocketAddr::new(ip(SERVER[0]), LINES)).unwrap();
    let seen_as = || ip(&say(&stream, WHO_AM_I).unwrap());
    assert_eq!(seen_as(), ip(EGRESS[0]));
    world.stop();
    assert_eq!(seen_as(), ip(EGRESS[0]));
    world.start();
    assert_eq!(seen_as(), ip(EGRESS[0]));
    for (side, preference) in [("ingress", 1), ("egress", 3)] {
        let line = format!("tc filter del dev eth0 {side} pref {preference}");
        world.gw.exec(&line).expect("it is there");
        eventually(&world, [true; 2]);
        assert_eq!(seen_as(), ip(EGRESS[0]));
    }
    // A process that is told so takes them away that another has left.
    world.stop();
    world.launch();
    world.gateway().disarm(true);
    eventually(&world, [false; 2]);
}

/// There is room for as many bindings as is said; what is pinned keeps its room, and its flows.
#[test]
fn it_has_the_room_that_is_said() {
    const ROOM: u32 = 50;
    let mut world = World::bare();
    world.config.bindings = ROOM;
    world.start();
    let room = |world: &World| {
        let map = aya::maps::MapData::from_pin(map_of(world)).unwrap();
        map.info().unwrap().max_entries()
    };
    assert_eq!(room(&world), ROOM);
    let to = SocketAddr::new(ip(REMOTE[0]), LINES);
    let streams: Vec<_> = (0..ROOM)
        .map(|number| connect(&world.pods[number as usize % 4], to).unwrap())
        .collect();
    assert_eq!(world.count("no-room"), 0);
    connect(&world.pods[0], to).unwrap_err();
    assert_ne!(world.count("no-room"), 0);
    world.stop();
    world.config.bindings = 2 * ROOM;
    world.start();
    assert_eq!(room(&world), ROOM);
    for stream in &streams {
        assert_eq!(ip(&say(stream, WHO_AM_I).unwrap()), ip(EGRESS[0]));
    }
    world.no_leak();
}

/// The process dies: flows go on, new ones begin, and the next process takes over what is there.
#[test]
fn it_outlives_its_process() {
    let mut world = World::build();
    let streams: Vec<_> = (0..2)
        .flat_map(|family| {
            let to = SocketAddr::new(ip(REMOTE[family]), LINES);
            [0, 4].map(|place| (family, connect(&world.pods[place], to).unwrap()))
        })
        .collect();
    let used = world.used();
    world.stop();
    for family in 0..2 {
        for place in [0, 4] {
            let seen = tcp_seen_as(&world.pods[place], ip(REMOTE[family]));
            assert_eq!(seen, ip(EGRESS[family]), "a new flow, with nobody there");
        }
    }
    for (family, stream) in &streams {
        assert_eq!(ip(&say(stream, WHO_AM_I).unwrap()), ip(EGRESS[*family]));
    }
    world.start();
    for (family, stream) in &streams {
        assert_eq!(ip(&say(stream, WHO_AM_I).unwrap()), ip(EGRESS[*family]));
    }
    assert!(world.used() >= used);
    assert_eq!(tcp_seen_as(&world.pods[1], ip(SERVER[0])), ip(EGRESS[0]));
    world.no_leak();
}

/// The programs for VIPs are at the same hook, and each sees to it that it goes first: but for the gateway's.
#[test]
fn it_goes_before_the_programs_for_vips() {
    let world = World::build();
    let uplink = world.gw.interface_index("eth0").unwrap();
    let order = || {
        world
            .gw
            .run(|| tcx::programs(uplink, tcx::Hook::Ingress).unwrap())
    };
    let gateway = order();
    assert_eq!(gateway.len(), 1);
    let data_path = world.gw.run(|| {
        datapath::start(
            datapath::Config::new(world.pin_dir()),
            &mut Registry::default(),
        )
    });
    data_path.attach(BTreeSet::from([uplink]).into());
    data_path.change(vec![Change::Complete]);
    let begun = Instant::now();
    while order().len() < 2 || order().first() != gateway.first() {
        assert!(begun.elapsed() < PATIENCE, "{:?}", data_path.attachments());
        thread::sleep(Duration::from_millis(50));
    }
    // Neither puts itself in front again.
    let settled = order();
    thread::sleep(Duration::from_secs(4));
    assert_eq!(order(), settled);
    assert_eq!(tcp_seen_as(&world.pods[0], ip(SERVER[0])), ip(EGRESS[0]));
    drop(data_path);
}
