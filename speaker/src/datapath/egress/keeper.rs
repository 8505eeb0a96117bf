//! Ends bindings that nobody has used for long, and gives back ports that have rested.
//!
//! It reads the maps in batches and names what may be due; the program decides, so that nobody comes in between. It also has
//! those counted for their pods' quotas that are older than these.
//!
//! Of remotes that many flows went to it forgets the bit maps of ports ([`Crowd`]) once there is nothing of them, if there is no
//! room for many more.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::Hash;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard};

use aya::maps::{HashMap, Map, MapData, MapError};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, TestRun, TestRunOptions};
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::batch;
use landfall_ebpf_common::egress::binding::{
    Address, Binding, Claim, Key, Sides, Times, V4, V6, phase,
};
use landfall_ebpf_common::egress::gateway::{Filter, MAX_CROWDS, egress_flag, keep, map};
use landfall_ebpf_common::egress::ports::Crowd;

use super::super::tables::{TablesError, forget, taken};
use super::super::worker::lock;
use super::standing::{States, now};
use super::tally::Tally;

/// How many entries are read at a time.
const BATCH: u32 = 4096;

/// What a look goes by.
#[derive(Debug)]
pub(in super::super) struct Known<'a> {
    /// What this node is to egress addresses.
    pub(in super::super) states: &'a States,
    /// The policies, by their numbers, that have a quota for each pod.
    pub(in super::super) limited: &'a BTreeSet<u16>,
}

/// What a look through the maps has found.
#[derive(Clone, Debug)]
pub(in super::super) struct Kept {
    /// Bindings that were read.
    pub(in super::super) read: usize,
    /// Bindings named to the program.
    pub(in super::super) named: usize,
    /// The addresses that they are about.
    pub(in super::super) filter: Box<Filter>,
    /// The numbers of the policies and of the pods' nodes that they are about.
    pub(in super::super) policies: BTreeSet<u16>,
    pub(in super::super) nodes: BTreeSet<u16>,
    /// How many there are of each policy.
    pub(in super::super) tally: Tally,
}

/// The maps that it goes through.
#[derive(Debug)]
pub(in super::super) struct Keeper {
    v4: Family<V4>,
    v6: Family<V6>,
    times: Times,
}

/// Those of a family.
#[derive(Debug)]
struct Family<A: Address> {
    /// The map *in*.
    bindings: MapData,
    crowds: HashMap<MapData, Key<A>, Crowd>,
}

/// So many crowds may stay that nobody is in.
const IDLE_CROWDS: usize = MAX_CROWDS as usize / 2;

impl<A: Address + Eq + Hash> Family<A>
where
    Key<A>: aya::Pod,
{
    fn adopt(
        ebpf: &mut Ebpf,
        bindings: &'static str,
        crowds: &'static str,
    ) -> Result<Self, TablesError> {
        Ok(Self {
            bindings: data(ebpf, bindings)?,
            crowds: taken(ebpf, crowds)?,
        })
    }

    /// The crowds, if there are many.
    fn many_crowds(&self) -> io::Result<HashSet<Key<A>>> {
        let keys: Result<HashSet<Key<A>>, MapError> = self.crowds.keys().collect();
        let keys = keys.map_err(io::Error::other)?;
        Ok(if keys.len() > IDLE_CROWDS {
            keys
        } else {
            HashSet::new()
        })
    }

    /// Takes these out. Who comes meanwhile makes one anew, and what it does not know is found out when it is tried.
    fn disperse(&mut self, idle: HashSet<Key<A>>) -> io::Result<()> {
        for crowd in idle {
            forget(self.crowds.remove(&crowd)).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

fn data(ebpf: &mut Ebpf, name: &'static str) -> Result<MapData, TablesError> {
    match ebpf.take_map(name) {
        Some(Map::HashMap(data)) => Ok(data),
        _ => Err(TablesError::Missing(name)),
    }
}

impl Keeper {
    /// Takes the maps.
    pub(in super::super) fn adopt(ebpf: &mut Ebpf, times: Times) -> Result<Self, TablesError> {
        Ok(Self {
            v4: Family::adopt(ebpf, map::IN_V4, map::CROWDS_V4)?,
            v6: Family::adopt(ebpf, map::IN_V6, map::CROWDS_V6)?,
            times,
        })
    }

    /// Looks through both maps once.
    pub(in super::super) fn look(
        &mut self,
        program: &SchedClassifier,
        known: &Known<'_>,
    ) -> io::Result<Kept> {
        let mut kept = Kept {
            read: 0,
            named: 0,
            filter: Box::new(Filter::EMPTY),
            policies: BTreeSet::new(),
            nodes: BTreeSet::new(),
            tally: Tally::default(),
        };
        let idle = look_at(&self.v4, 4, &self.times, program, known, &mut kept)?;
        self.v4.disperse(idle)?;
        let idle = look_at(&self.v6, 6, &self.times, program, known, &mut kept)?;
        self.v6.disperse(idle)?;
        Ok(kept)
    }

    /// How many crowds there are of each family.
    #[cfg(test)]
    pub(in super::super) fn crowds(&self) -> [usize; 2] {
        [self.v4.crowds.keys().count(), self.v6.crowds.keys().count()]
    }

    /// Ends what is bound for these, in use or not; how many bindings that were.
    pub(in super::super) fn end_all(
        &self,
        program: &SchedClassifier,
        orphaned: &Orphaned,
    ) -> io::Result<usize> {
        let v4 = end_of::<V4>(&self.v4.bindings, 4, &self.times, program, orphaned)?;
        Ok(v4 + end_of::<V6>(&self.v6.bindings, 6, &self.times, program, orphaned)?)
    }
}

/// Looks through the bindings of a family; the crowds that none of them is in, if there are many.
fn look_at<A: Address + Eq + Hash>(
    maps: &Family<A>,
    family: u8,
    times: &Times,
    program: &SchedClassifier,
    known: &Known<'_>,
    kept: &mut Kept,
) -> io::Result<HashSet<Key<A>>>
where
    Key<A>: aya::Pod,
    Binding<A>: aya::Pod,
{
    let mut idle = maps.many_crowds()?;
    batch::each(
        maps.bindings.fd().as_fd(),
        BATCH,
        |entries: &[(Key<A>, Binding<A>)]| {
            let now = now();
            kept.read += entries.len();
            for (key, binding) in entries {
                let (word, bit) = Filter::place(binding.to.words());
                kept.filter.pods[word] |= bit;
                let (word, bit) = Filter::place(key.local.words());
                kept.filter.destinations[word] |= bit;
                kept.policies.insert(binding.policy);
                kept.nodes.insert(binding.hop);
                kept.tally.count(key, binding);
                if !idle.is_empty() {
                    idle.remove(&key.target());
                }
            }
            let due: Vec<Key<A>> = entries
                .iter()
                .filter(|(key, binding)| is_due(known.states, times, key, binding, now))
                .map(|(key, _)| *key)
                .collect();
            for some in due.chunks(keep::MOST) {
                name(program, family, some)?;
            }
            let uncounted: Vec<Key<A>> = entries
                .iter()
                .filter(|(_, binding)| is_uncounted(known.limited, binding))
                .map(|(key, _)| *key)
                .collect();
            for some in uncounted.chunks(keep::MOST) {
                name(program, family | keep::COUNT, some)?;
            }
            kept.named += due.len() + uncounted.len();
            Ok(())
        },
    )?;
    Ok(idle)
}

/// Whose bindings are to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Orphaned {
    /// Pods' addresses, and the policies whose flows stay.
    pub(super) pods: BTreeMap<VipKey, Option<u16>>,
    /// Policies, by their numbers.
    pub(super) policies: BTreeSet<u16>,
}

impl Orphaned {
    /// Whether nothing is to end.
    pub(in super::super) fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.policies.is_empty()
    }
}

fn end_of<A: Address>(
    map: &MapData,
    family: u8,
    times: &Times,
    program: &SchedClassifier,
    orphaned: &Orphaned,
) -> io::Result<usize>
where
    Key<A>: aya::Pod,
    Binding<A>: aya::Pod,
{
    let mut ended = 0;
    batch::each(
        map.fd().as_fd(),
        BATCH,
        |entries: &[(Key<A>, Binding<A>)]| {
            let ending = entries.iter().filter(|(_, binding)| {
                let pod = VipKey(binding.to.mapped());
                let goes = |stays: &Option<u16>| *stays != Some(binding.policy);
                orphaned.policies.contains(&binding.policy)
                    || orphaned.pods.get(&pod).is_some_and(goes)
            });
            let now = now();
            let has_rested = |binding: &Binding<A>| {
                let claim = Claim::read(binding.claim);
                claim.phase == phase::CLOSED && now.wrapping_sub(claim.seen) >= times.rest
            };
            let (rested, ending): (Vec<_>, Vec<_>) =
                ending.partition(|(_, binding)| has_rested(binding));
            let keys = |some: &[&(Key<A>, Binding<A>)]| -> Vec<Key<A>> {
                some.iter().map(|(key, _)| *key).collect()
            };
            for some in keys(&ending).chunks(keep::MOST) {
                // What is in use ends, and then is nobody's: nothing that is late reaches the next pod. Once more for those
                // that were heard in between.
                for _ in 0..3 {
                    name(program, family | keep::AT_ONCE, some)?;
                }
            }
            // These may be another pod's by now.
            for some in keys(&rested).chunks(keep::MOST) {
                name(program, family, some)?;
            }
            ended += ending.len() + rested.len();
            Ok(())
        },
    )?;
    Ok(ended)
}

/// Whether a binding has not been heard for so long, by what its remote has sent: what the pod has, the program looks at.
fn is_idle<A: Address>(
    times: &Times,
    key: &Key<A>,
    binding: &Binding<A>,
    seen: u32,
    now: u32,
) -> bool {
    let sides = Sides {
        ours: binding.ours,
        theirs: binding.theirs,
    };
    let limit = times.limit(key.protocol, Claim::read(binding.claim).phase, sides);
    // What was heard after `now` was asked for is not.
    now.wrapping_sub(seen) >= limit && seen.wrapping_sub(now) > i32::MAX.unsigned_abs()
}

/// Whether it may be due, by what this node is to its address besides: a copy stays, and what was one is idle since the
/// take-over.
fn is_due<A: Address>(
    states: &States,
    times: &Times,
    key: &Key<A>,
    binding: &Binding<A>,
    now: u32,
) -> bool {
    let claim = Claim::read(binding.claim);
    // Most are not, by no measure.
    if !is_idle(&times.of_unheard(), key, binding, claim.seen, now) {
        return false;
    }
    let state = states.get(&VipKey(key.local.mapped()));
    match state.filter(|_| claim.phase == phase::LIVE) {
        Some(state) if state.flags & egress_flag::LED != 0 => {
            if now.wrapping_sub(state.since) < now.wrapping_sub(claim.seen) {
                is_idle(&times.of_unheard(), key, binding, state.since, now)
            } else {
                is_idle(times, key, binding, claim.seen, now)
            }
        }
        Some(state) if state.flags & egress_flag::STANDBY != 0 => false,
        _ => is_idle(times, key, binding, claim.seen, now),
    }
}

/// Whether a flow is to be counted for its pod, and is not: it is older than the quota.
fn is_uncounted<A: Address>(limited: &BTreeSet<u16>, binding: &Binding<A>) -> bool {
    let claim = Claim::read(binding.claim);
    claim.phase == phase::LIVE && !claim.counted && limited.contains(&binding.policy)
}

/// Whoever runs a program that has the room of such programs: one at a time.
pub(super) fn at_work() -> MutexGuard<'static, ()> {
    static WORK: Mutex<()> = Mutex::new(());
    lock(&WORK)
}

/// Names bindings to the program.
fn name<A>(program: &SchedClassifier, family: u8, keys: &[Key<A>]) -> io::Result<()>
where
    A: Address,
    Key<A>: aya::Pod,
{
    let mut message = vec![0; keep::HEAD];
    message.push(u8::try_from(keys.len()).expect("few"));
    message.push(family);
    for key in keys {
        message.extend(bytes(key));
    }
    // The kernel's least: an Ethernet frame.
    message.resize(message.len().max(64), 0);
    let options = TestRunOptions {
        data_in: Some(&message),
        repeat: 1,
        ..TestRunOptions::default()
    };
    let _alone = at_work();
    program
        .test_run(options)
        .map(drop)
        .map_err(|error: ProgramError| io::Error::other(error))
}

/// A key as it lies in memory.
pub(super) fn bytes<A: Address>(key: &Key<A>) -> Vec<u8> {
    let address = |address: A| {
        let mapped = address.mapped();
        if size_of::<A>() == 4 {
            mapped[12..].to_vec()
        } else {
            mapped.to_vec()
        }
    };
    let mut bytes = address(key.local);
    bytes.extend(address(key.remote));
    bytes.extend(key.local_port.to_ne_bytes());
    bytes.extend(key.remote_port.to_ne_bytes());
    bytes.extend(key.protocol.to_ne_bytes());
    bytes
}
