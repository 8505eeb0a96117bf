//! All the ports of an egress address, to one remote and port: exactly so many flows, whoever begins them and however
//! soon.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use landfall_ebpf_common::egress::binding::ticks;
use landfall_ebpf_common::{LAYOUT, Port, PortKey, VipKey, map};
use landfall_lab::crowd::{Answers, Crowd, FIN, Mirror, PSH, RST, SYN};
use landfall_lab::server::WHO_AM_I;

use super::world::{EGRESS, LINES, REMOTE, SECOND, World, connect, ip, pod_addresses, say};

/// Ports 1024 to 65535.
const ALL: usize = 64_512;
/// Those that Services have on the address: nobody leaves by them.
const SERVED: [u16; 3] = [2525, 8080, 40_000];
const BUDGET: usize = ALL - SERVED.len();
/// How many flows four pods want.
const WANTED: usize = 70_000;
/// As fast as can be.
const ALL_OUT: f64 = 1e9;

/// The address has Services.
fn serve(world: &World) {
    let pins = world.pin_dir().join(format!("layout-{LAYOUT}"));
    let data = MapData::from_pin(pins.join(map::PORTS)).unwrap();
    let mut ports: HashMap<_, PortKey, Port> = Map::HashMap(data).try_into().unwrap();
    for port in SERVED {
        let key = PortKey {
            vip: VipKey::from_address(ip(EGRESS[0])),
            port,
            protocol: 6,
            zero: 0,
        };
        ports.insert(key, Port::default(), 0).unwrap();
    }
}

/// One pod's flows.
fn flows(pod: IpAddr, count: usize) -> Vec<SocketAddr> {
    let first = 20_000;
    (first..)
        .take(count)
        .map(|port| SocketAddr::new(pod, port))
        .collect()
}

/// Says one segment of each flow of each pod, of all pods at once; the flows that were answered in kind, the number of
/// those that were reset, and how many segments had to be sent again.
fn all_say(
    crowds: &[Crowd],
    flows: &[Vec<SocketAddr>],
    flags: u8,
) -> (Vec<Vec<SocketAddr>>, usize, usize) {
    let said: Vec<_> = thread::scope(|scope| {
        let saying: Vec<_> = crowds
            .iter()
            .zip(flows)
            .map(|(crowd, flows)| scope.spawn(|| crowd.say(flows, flags, ALL_OUT)))
            .collect();
        saying.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let refused = said.iter().map(Answers::refused).sum();
    let again = said.iter().map(|answers| answers.again).sum();
    let live = flows.iter().zip(&said).map(|(flows, answers)| {
        let live = flows.iter().zip(&answers.flags);
        live.filter(|(_, flags)| *flags & RST == 0)
            .map(|(flow, _)| *flow)
            .collect()
    });
    (live.collect(), refused, again)
}

#[test]
fn exactly_the_budget_succeeds() {
    let mut world = World::bare();
    // The gateway's own pod is another's tenant.
    world.admit_another(4);
    world.start();
    serve(&world);
    let remote = ip(REMOTE[0]);
    let _mirror = Mirror::hang(&world.remote, remote).unwrap();
    let talk_to = SocketAddr::new(remote, LINES);
    let talks: Vec<TcpStream> = (0..40)
        .map(|number| connect(&world.pods[number % 4], talk_to).unwrap())
        .collect();
    let crowds: Vec<Crowd> = world.pods[..4]
        .iter()
        .map(|pod| Crowd::of(pod, remote).unwrap())
        .collect();
    let wanted: Vec<_> = (0..4)
        .map(|place| flows(pod_addresses(place)[0], WANTED / 4))
        .collect();

    let begun = Instant::now();
    let (live, refused, again) = all_say(&crowds, &wanted, SYN);
    println!(
        "{refused} of {WANTED} refused, {again} SYNs sent again, {:.0} a second",
        f64::from(u32::try_from(WANTED).unwrap()) / begun.elapsed().as_secs_f64()
    );
    assert_eq!(refused, WANTED - BUDGET);
    assert!(world.count("no-port") >= refused as u64);
    assert_eq!(world.used(), (BUDGET + talks.len()) as u64);
    // All those that are there go on, by hand and otherwise, and who comes too late is still refused.
    let (_, lost, _) = all_say(&crowds, &live, PSH);
    assert_eq!(lost, 0);
    let late = crowds[0].say(
        &[SocketAddr::new(pod_addresses(0)[0], 60_000)],
        SYN,
        ALL_OUT,
    );
    assert_eq!(late.refused(), 1);
    for talk in &talks {
        assert_eq!(ip(&say(talk, WHO_AM_I).unwrap()), ip(EGRESS[0]));
    }
    // Another remote's port, and another tenant, have budgets of their own.
    for place in [0, 3] {
        let talk = connect(&world.pods[place], talk_to).unwrap();
        assert_eq!(ip(&say(&talk, WHO_AM_I).unwrap()), ip(EGRESS[0]));
    }
    let other = Crowd::of(&world.pods[4], remote).unwrap();
    let own = flows(pod_addresses(4)[0], 1_000);
    assert_eq!(other.say(&own, SYN, ALL_OUT).refused(), 0);
    assert_eq!(other.say(&own, PSH, ALL_OUT).refused(), 0);
    let talk = connect(&world.pods[4], talk_to).unwrap();
    assert_eq!(ip(&say(&talk, WHO_AM_I).unwrap()), ip(SECOND[0]));
    // What ends makes room for its own pod, for as many.
    crowds[0].say(&live[0][..60], FIN, ALL_OUT);
    let fresh: Vec<SocketAddr> = (50_000..50_090)
        .map(|port| SocketAddr::new(pod_addresses(0)[0], port))
        .collect();
    assert_eq!(crowds[0].say(&fresh, SYN, ALL_OUT).refused(), 30);
    println!("{:?}", world.gateway().counts());
    world.no_leak();
}

/// Short connections, each of a pod that has had none before. A port that one of them had rests for the others: to a
/// remote and port there are as many new ones as ports in the time of a rest, 1 075 a second with all ports and a
/// minute. Here it is a fifteenth of both: the other ports are taken.
#[test]
fn pods_that_are_all_new_share_what_has_rested() {
    const TAKEN: usize = 60_000;
    const LEFT: usize = ALL - TAKEN;
    const REST: u32 = 4;
    const RATE: f64 = 2_000.0;
    const LONG: Duration = Duration::from_secs(13);
    let mut world = World::bare();
    world.config.times.rest = ticks(REST);
    world.config.watch = Duration::from_millis(200);
    // The first of the node's pods stands for all the new ones.
    let mut new = (0x0af4_8000..0x0af5_0000_u32).map(|number| IpAddr::from(Ipv4Addr::from(number)));
    let pod = world.egress.pods[&pod_addresses(0)[0]].clone();
    world
        .egress
        .pods
        .extend(new.clone().map(|address| (address, pod.clone())));
    let [at, _] = pod_addresses(0);
    world.pods[0]
        .ip("route add local 10.244.128.0/17 dev lo")
        .unwrap();
    for table in ["main", "100"] {
        let route = format!("route add 10.244.128.0/17 via {at} dev pod0 onlink table {table}");
        world.node.ip(&route).unwrap();
    }
    world
        .node
        .ip("rule add from 10.244.128.0/17 lookup 100")
        .unwrap();
    world.start();
    let remote = ip(REMOTE[0]);
    let _mirror = Mirror::hang(&world.remote, remote).unwrap();
    let crowds: Vec<Crowd> = world.pods[1..4]
        .iter()
        .map(|pod| Crowd::of(pod, remote).unwrap())
        .collect();
    let taken: Vec<_> = (1..4)
        .map(|place| flows(pod_addresses(place)[0], TAKEN / 3))
        .collect();
    assert_eq!(all_say(&crowds, &taken, SYN).1, 0);
    let crowd = Crowd::of(&world.pods[0], remote).unwrap();
    let begun = Instant::now();
    let (mut opened, mut refused, mut again) = (0, 0, 0);
    let mut longest = Duration::ZERO;
    while begun.elapsed() < LONG {
        let some: Vec<SocketAddr> = new
            .by_ref()
            .take(100)
            .map(|pod| SocketAddr::new(pod, 30_000))
            .collect();
        assert!(!some.is_empty(), "there are pods enough");
        let answers = crowd.say(&some, SYN, RATE);
        let open: Vec<SocketAddr> = some
            .into_iter()
            .zip(&answers.flags)
            .filter_map(|(flow, flags)| (flags & RST == 0).then_some(flow))
            .collect();
        opened += open.len();
        refused += answers.refused();
        again += answers.again;
        if answers.refused() > 0 {
            longest = longest.max(answers.longest);
        }
        crowd.say(&open, FIN, ALL_OUT);
    }
    let took = begun.elapsed();
    println!(
        "{opened} opened and {refused} refused in {took:?}, at the latest after {longest:?}; {again} sent again; {} a second \
         rest",
        LEFT / REST as usize
    );
    let rests = |rest: f64| (took.as_secs_f64() / rest).floor();
    let left = f64::from(u32::try_from(LEFT).unwrap());
    let opened = f64::from(u32::try_from(opened).unwrap());
    assert!(opened <= left * (rests(f64::from(REST)) + 1.0), "{opened}");
    assert!(opened >= left * rests(f64::from(REST) + 1.5), "{opened}");
    assert!(refused > 0);
    // None of those that are there was touched.
    assert_eq!(all_say(&crowds, &taken, PSH).1, 0);
    println!("{:?}", world.gateway().counts());
    world.no_leak();
}
