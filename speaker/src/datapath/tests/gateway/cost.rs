//! What a packet costs at the gateway, by how many bindings there are, and what a binding costs. For people: nothing is
//! asserted about time.

use std::time::Instant;

use aya::EbpfLoader;
use landfall_ebpf_common::egress::gateway::map;

use super::super::super::uplink::OBJECT;
use super::*;

const REPEAT: u32 = 200_000;

impl Gate {
    /// With room for so many bindings of each family.
    fn sized(bindings: u32) -> Self {
        let mut loader = EbpfLoader::new();
        for name in [map::OUT_V4, map::IN_V4, map::OUT_V6, map::IN_V6] {
            loader.map_max_entries(name, bindings);
        }
        let ebpf = loader.load(OBJECT).expect("the object is one");
        Self::of(ebpf, &mk_egress(), Times::default(), 0)
    }

    /// Nanoseconds a run of one frame, the best of five times many.
    fn cost(&mut self, program: &'static str, frame: &[u8]) -> u128 {
        let mut once = || {
            self.program(program)
                .test_run(TestRunOptions {
                    data_in: Some(frame),
                    repeat: REPEAT,
                    ..TestRunOptions::default()
                })
                .expect("the kernel runs it")
                .duration
                .as_nanos()
        };
        (0..5).map(|_| once()).min().expect("five times")
    }
}

/// A segment of the flow with this number: a remote of its own for each 60 000.
fn mk_flow(world: World, number: u32, flags: u8) -> Vec<u8> {
    let [_, _, high, low] = (number / 60_000).to_be_bytes();
    let remote = if world.pod.is_ipv4() {
        v4(198, 51, high, low)
    } else {
        v6(0x2001, 0xdb9, u16::from_be_bytes([high, low]))
    };
    let port = u16::try_from(2000 + number % 60_000).expect("a port");
    mk(OTHER, world.pod, remote, 6, 64, &mk_tcp(port, 443, flags))
}

/// Pods of this node whose egress address is their own: a frame stays what it is when it is translated, and can be run
/// again and again. What another node's costs besides (TTL, the next hop) is not in it.
fn mk_own() -> Egress {
    let mut egress = mk_egress();
    for world in WORLDS {
        egress
            .pods
            .insert(world.local, mk_pod("here", "mail", world.local));
    }
    egress
}

#[test]
fn cost() {
    println!(
        "{:>9} {:>3} {:>12} {:>12} {:>12} {:>14}",
        "bindings", "IP", "not ours", "out", "in", "new flow"
    );
    for (world, bindings) in WORLDS
        .into_iter()
        .flat_map(|world| [(world, 1_u32), (world, 1_000), (world, 1_000_000)])
    {
        let mut gate = Gate::sized(1 << 20);
        gate.set(&mk_own());
        let begun = Instant::now();
        for number in 0..bindings {
            let (action, out) = gate.comes(&mk_flow(world, number, SYN));
            assert_eq!((action, source(&out)), (SENT, world.egress));
        }
        let new = begun.elapsed().as_nanos() / u128::from(bindings);
        let of = |flags: u8| {
            mk(
                OWN,
                world.local,
                world.remote,
                6,
                63,
                &mk_tcp(40_000, 443, flags),
            )
        };
        let back = |flags: u8| {
            mk(
                STRANGER,
                world.remote,
                world.local,
                6,
                63,
                &mk_tcp(443, 40_000, flags),
            )
        };
        assert_eq!(gate.leaves(&of(SYN)), (NEXT, of(SYN)));
        assert_eq!(gate.comes(&back(SYN | ACK)), (NEXT, back(SYN | ACK)));
        assert_eq!(gate.leaves(&of(ACK)), (NEXT, of(ACK)));
        let before = (gate.count(Reason::Out), gate.count(Reason::In));
        let unknown = mk(
            OTHER,
            v4(10, 1, 0, 99),
            v4(10, 1, 0, 98),
            6,
            64,
            &mk_tcp(1, 2, ACK),
        );
        let idle = gate.cost(GATEWAY_INGRESS, &unknown);
        let out = gate.cost(GATEWAY_EGRESS, &of(ACK));
        let inward = gate.cost(GATEWAY_INGRESS, &back(ACK));
        // All of them were translated.
        let runs = u64::from(REPEAT) * 5;
        let after = (gate.count(Reason::Out), gate.count(Reason::In));
        assert_eq!(after, (before.0 + runs, before.1 + runs));
        let family = if world.pod.is_ipv4() { 4 } else { 6 };
        println!(
            "{bindings:>9} {family:>3} {idle:>9} ns {out:>9} ns {inward:>9} ns {new:>11} ns (with the system call)"
        );
    }
}

/// What the kernel holds for the maps of bindings.
#[test]
fn cost_in_memory() {
    const MANY: u32 = 200_000;
    let held = |ebpf: &Ebpf, names: &[&str]| -> u64 {
        names
            .iter()
            .map(|name| {
                let id = match ebpf.map(name).expect("the object holds it") {
                    aya::maps::Map::HashMap(data) => data.info().expect("it is open").id(),
                    _ => panic!("a hash map"),
                };
                memlock(id)
            })
            .sum()
    };
    let mut gate = Gate::sized(1 << 20);
    let before = held(&gate.ebpf, &[map::OUT_V4]);
    for number in 0..MANY {
        gate.comes(&mk_flow(WORLDS[0], number, SYN));
    }
    let after = held(&gate.ebpf, &[map::OUT_V4]);
    println!(
        "the map of what goes out, IPv4: {} KiB empty, with {MANY} bindings {} KiB, {} bytes each",
        before / 1024,
        after / 1024,
        (after - before) / u64::from(MANY)
    );
}

/// What the kernel holds for a map that this process has open.
fn memlock(id: u32) -> u64 {
    let wanted = format!("map_id:\t{id}");
    std::fs::read_dir("/proc/self/fdinfo")
        .expect("proc is mounted")
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
        .find(|text| text.lines().any(|line| line == wanted))
        .and_then(|text| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("memlock:"))?;
            line.trim().parse().ok()
        })
        .expect("the kernel says so")
}
