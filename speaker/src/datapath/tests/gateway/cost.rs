//! What a packet costs at the gateway, by how many bindings there are, and what a binding costs. For people: nothing is
//! asserted about time. Prints tables, and writes `target/bench/egress-test-run.json` for `make bench-egress`.

use std::sync::Arc;
use std::time::Instant;

use aya::EbpfLoader;
use landfall_ebpf_common::egress::gateway::map;
use serde_json::{Value, json};

use super::super::super::egress::Leaving;
use super::super::super::uplink::OBJECT;
use super::super::cost::write_to;
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

fn write(key: &str, value: &Value) {
    write_to("egress-test-run.json", key, value);
}

/// Nanoseconds a run of a frame of no interest, of one that goes out, and of one that comes in, of one flow.
fn cost_of_a_flow(gate: &mut Gate, world: World) -> [u128; 3] {
    let of = |flags: u8| {
        let segment = mk_tcp(40_000, 443, flags);
        mk(OWN, world.local, world.remote, 6, 63, &segment)
    };
    let back = |flags: u8| {
        let segment = mk_tcp(443, 40_000, flags);
        mk(STRANGER, world.remote, world.local, 6, 63, &segment)
    };
    assert_eq!(gate.leaves(&of(SYN)), (NEXT, of(SYN)));
    assert_eq!(gate.comes(&back(SYN | ACK)), (NEXT, back(SYN | ACK)));
    assert_eq!(gate.leaves(&of(ACK)), (NEXT, of(ACK)));
    let before = (gate.count(Reason::Out), gate.count(Reason::In));
    let segment = mk_tcp(1, 2, ACK);
    let unknown = mk(OTHER, v4(10, 1, 0, 99), v4(10, 1, 0, 98), 6, 64, &segment);
    let costs = [
        gate.cost(GATEWAY_INGRESS, &unknown),
        gate.cost(GATEWAY_EGRESS, &of(ACK)),
        gate.cost(GATEWAY_INGRESS, &back(ACK)),
    ];
    // All of them were translated.
    let runs = u64::from(REPEAT) * 5;
    let after = (gate.count(Reason::Out), gate.count(Reason::In));
    assert_eq!(after, (before.0 + runs, before.1 + runs));
    costs
}

#[test]
fn cost() {
    println!(
        "{:>9} {:>3} {:>12} {:>12} {:>12} {:>14}",
        "bindings", "IP", "not ours", "out", "in", "new flow"
    );
    let mut rows = Vec::new();
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
        let [idle, out, inward] = cost_of_a_flow(&mut gate, world);
        let family = if world.pod.is_ipv4() { 4 } else { 6 };
        println!(
            "{bindings:>9} {family:>3} {idle:>9} ns {out:>9} ns {inward:>9} ns {new:>11} ns (with the system call)"
        );
        rows.push(json!({
            "bindings": bindings, "family": family, "not_ours_ns": idle, "out_ns": out, "in_ns": inward,
            "new_ns_with_system_call": new,
        }));
    }
    write("by_bindings", &rows.into());
}

/// Pods of this node and of the other, so many under so many policies.
fn mk_many(pods: u32, policies: u32) -> Egress {
    let mut egress = mk_own();
    for policy in 0..policies {
        egress
            .policies
            .insert(format!("policy-{policy}").into(), mk_policy("here"));
    }
    for pod in 0..pods {
        let node = if pod % 2 == 0 { "here" } else { "other" };
        let policy = format!("policy-{}", pod % policies);
        let address = Ipv4Addr::from(0x0a02_0000 + pod).into();
        let egress_ip = Ipv4Addr::from(0xc612_0000 + pod % policies).into();
        egress
            .pods
            .insert(address, mk_pod(node, &policy, egress_ip));
    }
    egress
}

/// A packet costs the same under any number of policies.
#[test]
fn cost_by_policies() {
    println!(
        "{:>9} {:>9} {:>12} {:>12} {:>12}",
        "policies", "pods", "not ours", "out", "in"
    );
    let mut rows = Vec::new();
    for policies in [1_u32, 100, 1_000] {
        let pods = policies * 10;
        let mut gate = Gate::sized(1 << 16);
        gate.set(&mk_many(pods, policies));
        let [idle, out, inward] = cost_of_a_flow(&mut gate, WORLDS[0]);
        println!("{policies:>9} {pods:>9} {idle:>9} ns {out:>9} ns {inward:>9} ns");
        rows.push(json!({
            "policies": policies, "pods": pods, "not_ours_ns": idle, "out_ns": out, "in_ns": inward,
        }));
    }
    write("by_policies", &rows.into());
}

/// What it takes to tell the kernel of many pods under many policies, and of one more.
#[test]
fn cost_of_tables() {
    const PODS: u32 = 10_000;
    const POLICIES: u32 = 1_000;
    let mut gate = Gate::sized(1 << 16);
    let mut egress = mk_many(PODS, POLICIES);
    let mut tell = |egress: &Egress| {
        let begun = Instant::now();
        gate.set(egress);
        let gateway = begun.elapsed();
        let leaving = Leaving {
            node: "here".into(),
            egress: Arc::new(egress.clone()),
            outside: [INTERFACE].into(),
            mark: crate::egress::MARK,
            around: Arc::new(Surroundings::nowhere()),
        };
        let begun = Instant::now();
        gate.change(&Change::Egress(Some(Arc::new(leaving))));
        [gateway, begun.elapsed()]
    };
    let milliseconds = |took: std::time::Duration| took.as_secs_f64() * 1e3;
    let mut rows = serde_json::Map::new();
    let mut say = |what: &str, [gateway, guard]: [std::time::Duration; 2]| {
        let (gateway, guard) = (milliseconds(gateway), milliseconds(guard));
        println!("{what:<24} gateway {gateway:>8.1} ms, guard {guard:>8.1} ms");
        rows.insert(
            what.to_owned(),
            json!({"gateway_ms": gateway, "guard_ms": guard}),
        );
    };
    say("all of them", tell(&egress));
    say("nothing new", tell(&egress));
    egress.pods.insert(
        v4(10, 3, 0, 1),
        mk_pod("here", "policy-0", v4(198, 18, 0, 0)),
    );
    say("one pod more", tell(&egress));
    egress.policies.remove("policy-1");
    egress.pods.retain(|_, pod| {
        pod.tenant
            .as_ref()
            .is_none_or(|it| &*it.policy != "policy-1")
    });
    say("one policy less", tell(&egress));
    write("tables", &rows.into());
}

/// What the kernel holds for the maps of bindings: each of the two.
#[test]
fn cost_in_memory() {
    const MANY: u32 = 1_000_000;
    // Of maps with a name like that, this process has one open.
    let held = |name: &str| -> u64 {
        aya::maps::loaded_maps()
            .flatten()
            .filter(|map| map.name_as_str() == Some(name))
            .filter_map(|map| memlock(map.id()))
            .sum()
    };
    let mut rows = Vec::new();
    for (world, names) in WORLDS
        .into_iter()
        .zip([[map::OUT_V4, map::IN_V4], [map::OUT_V6, map::IN_V6]])
    {
        let mut gate = Gate::sized(MANY);
        let empty = names.map(held);
        for number in 0..MANY {
            gate.comes(&mk_flow(world, number, SYN));
        }
        for (name, empty) in names.into_iter().zip(empty) {
            let full = held(name);
            println!(
                "{name}: with room for {MANY} bindings {} MB empty, {} MB full",
                empty / 1_000_000,
                full / 1_000_000,
            );
            rows.push(
                json!({"map": name, "entries": MANY, "empty_bytes": empty, "full_bytes": full}),
            );
        }
    }
    write("memory", &rows.into());
}

/// What the kernel holds for a map, if this process has it open.
fn memlock(id: u32) -> Option<u64> {
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
}
