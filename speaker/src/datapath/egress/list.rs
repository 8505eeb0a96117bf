//! Bindings, one by one, for whoever asks: read from the pinned maps, beside the programs and the keeper.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData, PerCpuHashMap, PerCpuValues};
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::batch;
use landfall_ebpf_common::egress::binding::{
    Address, Binding, Claim, Key, Sides, TICK, V4, V6, heard, phase,
};
use landfall_ebpf_common::egress::gateway::{PolicyCount, map};

use super::super::pins::Pins;
use super::standing::now;
use crate::egress::PolicyName;

/// How many entries are read at a time.
const BATCH: u32 = 4096;

/// A binding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The policy; nothing if it is gone.
    pub policy: Option<PolicyName>,
    /// The pod's address and port; of an echo request its identifier.
    pub pod: SocketAddr,
    /// What it leaves by.
    pub egress: SocketAddr,
    /// Whom it is with.
    pub remote: SocketAddr,
    /// The protocol's number.
    pub protocol: u8,
    /// For how long neither side was heard; of one that has ended, since when it rests.
    pub idle: Duration,
    /// Where the flow is in its life.
    pub state: State,
}

/// Where a flow is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A TCP flow whose handshake is not over, or one of which only the pod was heard.
    Opening,
    /// Both sides have spoken.
    Established,
    /// One side of a TCP flow has ended.
    Closing,
    /// A TCP flow was reset, and ends if nobody goes on.
    Reset,
    /// It has ended, and its port rests.
    Resting,
}

impl State {
    fn of(protocol: u32, claim: Claim, sides: Sides) -> Self {
        let both = sides.ours | sides.theirs;
        if claim.phase == phase::CLOSED {
            Self::Resting
        } else if protocol != 6 {
            Self::Established
        } else if both & heard::RST != 0 {
            Self::Reset
        } else if both & heard::FIN != 0 {
            Self::Closing
        } else if sides.is_settled() {
            Self::Established
        } else {
            Self::Opening
        }
    }

    /// A word for it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Reset => "reset",
            Self::Resting => "resting",
        }
    }
}

/// All bindings that `wanted` says yes to, and how many there are more than `most` of them.
///
/// # Errors
/// The maps are there and cannot be read.
pub(super) fn read(
    root: &Path,
    names: &BTreeMap<u32, PolicyName>,
    most: usize,
    wanted: &dyn Fn(&Bound) -> bool,
) -> io::Result<(Vec<Bound>, usize)> {
    let mut found = Found {
        bound: Vec::new(),
        more: 0,
        names,
        most,
        wanted,
    };
    let pins = Pins::open(root).map_err(io::Error::other)?;
    found.family::<V4>(&pins, map::IN_V4, map::OUT_V4)?;
    found.family::<V6>(&pins, map::IN_V6, map::OUT_V6)?;
    Ok((found.bound, found.more))
}

/// What was counted of each pod that leaves here or would, by its address, all CPUs together.
///
/// # Errors
/// The map is there and cannot be read.
pub(super) fn counts(root: &Path) -> io::Result<BTreeMap<IpAddr, PolicyCount>> {
    let path = Pins::open(root)
        .map_err(io::Error::other)?
        .map(map::POD_COUNTS);
    if !path.exists() {
        return Ok(BTreeMap::new()); // It is no gateway.
    }
    let map = MapData::from_pin(path).map_err(io::Error::other)?;
    PerCpuHashMap::try_from(Map::PerCpuHashMap(map))
        .map(|counts| of_pods(&counts))
        .map_err(io::Error::other)
}

/// The same, of a map at hand.
pub(in super::super) fn of_pods(
    counts: &PerCpuHashMap<MapData, [u8; 16], PolicyCount>,
) -> BTreeMap<IpAddr, PolicyCount> {
    let sum = |of_cpus: PerCpuValues<PolicyCount>| {
        let mut count = PolicyCount::default();
        for of_cpu in of_cpus.iter() {
            count += *of_cpu;
        }
        count
    };
    let counts = counts.iter().flatten();
    counts
        .map(|(pod, of_cpus)| (VipKey(pod).address(), sum(of_cpus)))
        .collect()
}

struct Found<'a> {
    bound: Vec<Bound>,
    more: usize,
    names: &'a BTreeMap<u32, PolicyName>,
    most: usize,
    wanted: &'a dyn Fn(&Bound) -> bool,
}

impl Found<'_> {
    fn family<A: Address>(&mut self, pins: &Pins, inward: &str, out: &str) -> io::Result<()>
    where
        Key<A>: aya::Pod,
        Binding<A>: aya::Pod,
    {
        let path = pins.map(inward);
        if !path.exists() {
            return Ok(()); // It is no gateway.
        }
        let open = |path| MapData::from_pin(path).map_err(io::Error::other);
        let inward = open(path)?;
        let out = Map::HashMap(open(pins.map(out))?);
        let out: HashMap<MapData, Key<A>, Binding<A>> =
            HashMap::try_from(out).map_err(io::Error::other)?;
        batch::each(inward.fd().as_fd(), BATCH, |entries| {
            let now = now();
            for (key, binding) in entries {
                self.entry(key, binding, &out, now);
            }
            Ok(())
        })
    }

    fn entry<A: Address>(
        &mut self,
        key: &Key<A>,
        inward: &Binding<A>,
        out: &HashMap<MapData, Key<A>, Binding<A>>,
        now: u32,
    ) where
        Key<A>: aya::Pod,
        Binding<A>: aya::Pod,
    {
        let claim = Claim::read(inward.claim);
        let mut sides = Sides {
            ours: inward.ours,
            theirs: inward.theirs,
        };
        let address = |it: A| -> IpAddr { VipKey(it.mapped()).address() };
        let mut bound = Bound {
            policy: self.names.get(&inward.policy.into()).cloned(),
            pod: SocketAddr::new(address(inward.to), claim.port),
            egress: SocketAddr::new(address(key.local), key.local_port),
            remote: SocketAddr::new(address(key.remote), key.remote_port),
            protocol: u8::try_from(key.protocol).unwrap_or_default(),
            idle: Duration::ZERO,
            state: State::of(key.protocol, claim, sides),
        };
        if !(self.wanted)(&bound) {
            return;
        }
        if self.bound.len() >= self.most {
            self.more += 1;
            return;
        }
        let mut idle = since(claim.seen, now);
        // When the pod was heard is in its own entry.
        let of_pod = Key {
            local: inward.to,
            remote: key.remote,
            local_port: claim.port,
            remote_port: key.remote_port,
            protocol: key.protocol,
        };
        if claim.phase == phase::LIVE
            && let Ok(entry) = out.get(&of_pod, 0)
        {
            idle = idle.min(since(Claim::read(entry.claim).seen, now));
            sides.ours = entry.ours;
        }
        bound.idle = idle;
        bound.state = State::of(key.protocol, claim, sides);
        self.bound.push(bound);
    }
}

/// The time from one tick to another; none, if that is the later.
fn since(then: u32, now: u32) -> Duration {
    let ticks = now.wrapping_sub(then);
    if ticks > i32::MAX.unsigned_abs() {
        return Duration::ZERO;
    }
    Duration::from_nanos(u64::from(ticks) << TICK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_told() {
        let claim = Claim::new(1, 0);
        let of = |protocol, ours, theirs| State::of(protocol, claim, Sides { ours, theirs });
        assert_eq!(of(6, 0, 0), State::Opening);
        assert_eq!(of(6, 0, heard::OPEN), State::Opening);
        let open = heard::OPEN;
        assert_eq!(of(6, open, open), State::Established);
        assert_eq!(of(6, open | heard::FIN, open), State::Closing);
        assert_eq!(of(6, open, open | heard::RST), State::Reset);
        assert_eq!(of(17, 0, 0), State::Established);
        let ended = claim.turned(phase::CLOSED);
        assert_eq!(State::of(6, ended, Sides::default()), State::Resting);
    }

    #[test]
    fn ticks_wrap() {
        assert_eq!(since(u32::MAX, 0), Duration::from_nanos(1 << TICK));
        assert_eq!(since(5, 4), Duration::ZERO);
    }
}
