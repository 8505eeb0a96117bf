//! What it costs to leave by a policy's address, beside nftables: `make bench-egress`.
//!
//! ```text
//!             ┌─drop──────eth0─ drops at the traffic classifier
//!             ├─bounce────eth1─ sends back by the same interface, as it is
//!             ├─ours──────eth0─┐ a gateway of ours: its programs, the guard, the node's rules
//!  generator ─┼─ours-pods─pods─┘
//!             ├─nft───────eth0─┐ forwards; connection tracking and one rule: snat to ip saddr map @tenants
//!             └─nft-pods──pods─┘
//! ```
//!
//! All in one run, a piece of each way in turn, from one thread on one core: the frame's whole way, to where the generator
//! drops what comes back, is in the sender's time. What a gateway itself costs is its way's time less that of a frame that
//! only bounces. Both nodes know the same pods, and have as many flows, each of which has
//! sent and was answered, before a round begins. Frames are of 60 bytes, UDP over IPv4; of new connections SYNs. The other
//! node's pods' frames come by the uplink and leave by it; the node's own pods' come by a link of theirs.
//!
//! As long as it runs, the machine's connection tracking has the room that it needs (`nf_conntrack_max` and its buckets).
//!
//! Options: `--rounds N` (default 15), `--quick` (without a million flows). Prints tables, and writes them with what
//! `cost` found (`target/bench/egress-test-run.json`) to `target/bench/egress.json`.

mod frames;
mod report;
mod world;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use landfall_lab::raw::flood;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use serde_json::{Value, json};

use frames::{Flow, What};
use world::World;

/// How many frames of a way a round sends; of new connections.
const FRAMES: usize = 32 * 1024;
const NEW: usize = 8 * 1024;
/// How many flows own pods have at most.
const OWN_FLOWS: u32 = 1000;
/// The first number of flows that are new.
const FIRST_NEW: u32 = 2_000_000;

/// A way: its name, the link that its frames are sent to, the one that they come back by, whose they are, and what.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// Its name.
    pub name: &'static str,
    link: usize,
    back: usize,
    own: bool,
    what: What,
}

const fn way(name: &'static str, link: usize, back: usize, own: bool, what: What) -> Way {
    Way {
        name,
        link,
        back,
        own,
        what,
    }
}

/// The ways of flows that are known; ours and nftables' by turns.
pub const WAYS: [Way; 10] = [
    way("drop", 0, 0, false, What::Out),
    way("bounce", 5, 5, false, What::Out),
    way("remote out, ours", 1, 1, false, What::Out),
    way("remote out, nft", 3, 3, false, What::Out),
    way("remote in, ours", 1, 1, false, What::In),
    way("remote in, nft", 3, 3, false, What::In),
    way("own out, ours", 2, 1, true, What::Out),
    way("own out, nft", 4, 3, true, What::Out),
    way("own in, ours", 1, 2, true, What::In),
    way("own in, nft", 3, 4, true, What::In),
];

/// The ways of new connections.
pub const NEW_WAYS: [Way; 3] = [
    way("bounce", 5, 5, false, What::Syn),
    way("new, ours", 1, 1, false, What::Syn),
    way("new, nft", 3, 3, false, What::Syn),
];

/// What a round found: of each way nanoseconds a frame, and which share of the frames came out.
pub type Round<const N: usize> = [(f64, f64); N];

/// A case: how many policies, how many flows both have, and how many of them are heard.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Policies.
    pub policies: u32,
    /// Flows that both know.
    pub entries: u32,
    /// How many of them send.
    pub heard: u32,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let after = |flag: &str| {
        let place = arguments.iter().position(|word| word == flag)?;
        arguments.get(place + 1)?.parse().ok()
    };
    let rounds: usize = after("--rounds").unwrap_or(15);
    let quick = arguments.iter().any(|word| word == "--quick");
    let sizes: &[u32] = if quick {
        &[1, 1000]
    } else {
        &[1, 1000, 1_000_000]
    };
    let mut results = Vec::new();
    let mut new = Vec::new();
    for (policies, sizes) in [(1_u32, sizes), (100, &[1000][..]), (1000, &[1000][..])] {
        let world = World::build(policies)?;
        let mut bench = Bench {
            world,
            entries: 0,
            own: 0,
            made: FIRST_NEW,
        };
        bench.prove()?;
        for entries in sizes {
            bench.fill(*entries)?;
            let heard: &[u32] = if *entries == 1 { &[1] } else { &[1, *entries] };
            for heard in heard {
                let case = Case {
                    policies,
                    entries: *entries,
                    heard: *heard,
                };
                let found = bench.known(case, rounds)?;
                let programs = bench.programs(case)?;
                results.push(report::known(case, &found, &programs));
            }
            if *entries != 1 {
                let case = Case {
                    policies,
                    entries: *entries,
                    heard: 0,
                };
                let found = bench.begin(rounds)?;
                new.push(report::new(case, &found));
            }
        }
    }
    report::goals(&results, &new);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench/egress.json");
    let test_run: Value = match std::fs::read(file.with_file_name("egress-test-run.json")) {
        Ok(text) => serde_json::from_slice(&text)?,
        Err(_) => Value::Null,
    };
    std::fs::create_dir_all(file.parent().context("it has one")?)?;
    let whole = json!({"test_run": test_run, "known_flows": results, "new_flows": new});
    std::fs::write(&file, serde_json::to_string_pretty(&whole)?)?;
    println!("written to {}", file.canonicalize()?.display());
    Ok(())
}

struct Bench {
    world: World,
    /// How many flows the other node's pods have, and the own.
    entries: u32,
    own: u32,
    /// The number of the next new one.
    made: u32,
}

impl Bench {
    /// Makes flows, each heard from both sides, until both have so many.
    fn fill(&mut self, entries: u32) -> anyhow::Result<()> {
        eprintln!("{} policies: making {entries} flows …", self.world.policies);
        let own = entries.min(OWN_FLOWS);
        for (links, back, own, numbers) in [
            ([1, 3], [1, 3], false, self.entries..entries),
            ([2, 4], [1, 3], true, self.own..own),
        ] {
            let numbers: Vec<u32> = numbers.collect();
            for some in numbers.chunks(FRAMES) {
                for what in [What::Out, What::In] {
                    let frames = self.frames(some.iter().copied(), own, what);
                    let ways = if what == What::Out { links } else { back };
                    for link in ways {
                        self.send(link, &frames, frames.len())?;
                    }
                }
            }
        }
        (self.entries, self.own) = (entries, own);
        let (bound, tracked) = (self.world.counts()["bound"], self.world.tracked()?);
        let wanted = u64::from(entries + own) + u64::from(self.made - FIRST_NEW);
        ensure!(
            bound >= wanted && tracked >= wanted,
            "of {wanted} flows ours has {bound}, and nftables {tracked}"
        );
        Ok(())
    }

    /// Both translate, both ways, and the own pods' too; nothing leaks.
    fn prove(&mut self) -> anyhow::Result<()> {
        self.world.watch()?;
        self.fill(1)?;
        let counted = self.world.watched()?;
        let of = |what: String| counted.get(&what).copied().unwrap_or(0);
        for link in ["ours", "nft"] {
            let pods = format!("{link}-pods in");
            for what in [format!("{link} out"), format!("{link} in"), pods] {
                ensure!(of(what.clone()) > 0, "no frame was `{what}`: {counted:?}");
            }
            let leaked = of(format!("{link} leaked"));
            ensure!(leaked == 0, "a pod's own address got out: {counted:?}");
        }
        println!("what came out once, by link and kind: {counted:?}");
        Ok(())
    }

    fn frames(&self, numbers: impl Iterator<Item = u32>, own: bool, what: What) -> Vec<Vec<u8>> {
        numbers
            .map(|number| Flow { own, number }.frame(what, self.world.policies))
            .collect()
    }

    /// Sends frames to a link from one core, before all others' work there; nanoseconds a frame.
    fn send(&self, link: usize, frames: &[Vec<u8>], count: usize) -> anyhow::Result<f64> {
        let interface = self.world.links[link];
        let took = self.world.generator.run(|| -> anyhow::Result<Duration> {
            let mut core = nix::sched::CpuSet::new();
            core.set(1.min(thread::available_parallelism()?.get() - 1))?;
            let this = nix::unistd::gettid();
            nix::sched::sched_setaffinity(this, &core)?;
            let first = Command::new("chrt")
                .args(["--fifo", "--pid", "1", &this.to_string()])
                .status()?;
            ensure!(first.success(), "the generator has no core to itself");
            Ok(flood(interface, frames, count)?)
        })?;
        // Others have waited meanwhile.
        thread::sleep(Duration::from_millis(5));
        Ok(took.as_secs_f64() * 1e9 / f64::from(u32::try_from(count)?))
    }

    /// A piece of a way.
    fn piece(&self, way: Way, frames: &[Vec<u8>], count: usize) -> anyhow::Result<(f64, f64)> {
        let before = self.world.arrived(way.back)?;
        let took = self.send(way.link, frames, count)?;
        let arrived = self.world.arrived(way.back)? - before;
        let share = f64::from(u32::try_from(arrived)?) / f64::from(u32::try_from(count)?);
        Ok((took, share))
    }

    /// Rounds with frames of flows that both know.
    fn known(&self, case: Case, rounds: usize) -> anyhow::Result<Vec<Round<10>>> {
        let mut random = SmallRng::seed_from_u64(u64::from(case.entries));
        let mut order: Vec<u32> = (0..case.heard).collect();
        let mut own: Vec<u32> = (0..case.heard.min(OWN_FLOWS)).collect();
        order.shuffle(&mut random);
        own.shuffle(&mut random);
        let mut found = Vec::new();
        let each = FRAMES.min(order.len());
        let mut from = 0;
        for round in 0..=rounds {
            if from + each > order.len() {
                from = 0;
            }
            let some = &order[from..from + each];
            from += each;
            let mut times = [(0.0, 0.0); WAYS.len()];
            let mut turn: Vec<usize> = (0..WAYS.len()).collect();
            turn.shuffle(&mut random);
            for place in turn {
                let way = WAYS[place];
                let numbers = if way.own { &own[..] } else { some };
                let frames = self.frames(numbers.iter().copied(), way.own, way.what);
                times[place] = self.piece(way, &frames, FRAMES)?;
                ensure!(
                    times[place].1 > 0.999,
                    "{}: {:.3} of the frames came out: {:?}",
                    way.name,
                    times[place].1,
                    self.world.counts()
                );
            }
            // The first round warms up.
            if round > 0 {
                found.push(times);
            }
        }
        Ok(found)
    }

    /// Rounds with SYNs of flows that nobody knows.
    fn begin(&mut self, rounds: usize) -> anyhow::Result<Vec<Round<3>>> {
        let mut random = SmallRng::seed_from_u64(u64::from(self.made));
        let mut found = Vec::new();
        for round in 0..=rounds {
            let next = self.made + u32::try_from(NEW)?;
            let mut numbers: Vec<u32> = (self.made..next).collect();
            numbers.shuffle(&mut random);
            let frames = self.frames(numbers.into_iter(), false, What::Syn);
            self.made = next;
            let mut times = [(0.0, 0.0); NEW_WAYS.len()];
            let mut turn: Vec<usize> = (0..NEW_WAYS.len()).collect();
            turn.shuffle(&mut random);
            for place in turn {
                times[place] = self.piece(NEW_WAYS[place], &frames, NEW)?;
            }
            if round > 0 {
                found.push(times);
            }
        }
        Ok(found)
    }

    /// What each of our programs takes itself, by the kernel's own clock: nanoseconds a run, out and in.
    fn programs(&self, case: Case) -> anyhow::Result<BTreeMap<String, f64>> {
        let mut random = SmallRng::seed_from_u64(1);
        let mut order: Vec<u32> = (0..case.heard).collect();
        order.shuffle(&mut random);
        order.truncate(FRAMES);
        let mine = self.world.programs()?;
        let mut found = BTreeMap::new();
        let _enabled = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
        let read = || -> BTreeMap<String, (Duration, u64)> {
            aya::programs::loaded_programs()
                .flatten()
                .filter_map(|program| {
                    let hook = mine.get(&program.id())?;
                    let name = format!("{} at {hook}", program.name_as_str()?);
                    Some((name, (program.run_time(), program.run_count())))
                })
                .collect()
        };
        for (direction, what) in [("out", What::Out), ("in", What::In)] {
            let frames = self.frames(order.iter().copied(), false, what);
            let before = read();
            self.send(1, &frames, FRAMES)?;
            for (name, (time, count)) in read() {
                let (time_before, count_before) = before.get(&name).copied().unwrap_or_default();
                let runs = u32::try_from(count - count_before)?;
                if usize::try_from(runs)? >= FRAMES {
                    let took =
                        time.saturating_sub(time_before).as_secs_f64() * 1e9 / f64::from(runs);
                    found.insert(format!("{direction}: {name}"), took);
                }
            }
        }
        Ok(found)
    }
}
