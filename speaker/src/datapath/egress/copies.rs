//! The bindings of this node's kernel, as replication reads and writes them.
//!
//! A program puts copies in and takes them out (`BPF_PROG_TEST_RUN`, some dozens in one run), by the same steps as packets
//! make and end bindings: so nobody comes in between, and the counts are exact. What cannot be placed, since its pod or the
//! way to its remote is not known here yet, is kept aside and tried again.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use aya::maps::{Map, MapData};
use aya::programs::SchedClassifier;
use aya::{Ebpf, TestRun, TestRunOptions};
use landfall_core::replication::Binding;
use landfall_ebpf_common::batch::{self, Place};
use landfall_ebpf_common::egress::binding::{
    self as kernel, Address, Claim, Key, Sides, V4, V6, phase,
};
use landfall_ebpf_common::egress::copies::{Named, message, outcome};
use landfall_ebpf_common::egress::gateway::map;
use landfall_ebpf_common::{GATEWAY_COPY, VipKey};

use super::super::tables::TablesError;
use super::super::uplink::{UplinkError, classifier};
use super::super::worker::lock;
use super::keeper::{at_work, bytes};
use crate::conntrack::TCP;
use crate::replication::{Bindings, CHUNK, Chunk, Cursor};

/// How many entries are read at a time where all are.
const BATCH: u32 = 4096;
/// How many times as many entries are read, of other addresses, for one answer.
const LOOKS: usize = 16;
/// How often a binding is taken out that somebody else is in the middle of.
const TRIES: usize = 3;

/// The program, and the maps *in*.
#[derive(Debug)]
pub(in super::super) struct Kernel {
    program: SchedClassifier,
    v4: MapData,
    v6: MapData,
}

/// One more handle of a map.
pub(super) fn reopened(ebpf: &Ebpf, name: &'static str) -> Result<MapData, TablesError> {
    match ebpf.map(name) {
        Some(Map::HashMap(data) | Map::PerCpuArray(data)) => {
            Ok(MapData::from_id(data.info()?.id())?)
        }
        _ => Err(TablesError::Missing(name)),
    }
}

impl Kernel {
    /// Loads the program. The maps are still to be there.
    pub(in super::super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, UplinkError> {
        let (v4, v6) = (reopened(ebpf, map::IN_V4)?, reopened(ebpf, map::IN_V6)?);
        let program = classifier(ebpf, GATEWAY_COPY)?;
        if program.fd().is_err() {
            program.load()?;
        }
        let info = program.info()?;
        let program = SchedClassifier::from_program_info(info, Cow::Borrowed(GATEWAY_COPY))?;
        Ok(Self { program, v4, v6 })
    }

    /// Asks the program for one thing about each; what it has done, in their order.
    fn run(&self, bindings: &[Binding], remove: bool) -> Vec<u32> {
        let mut done = vec![outcome::NONE; bindings.len()];
        for v4 in [true, false] {
            let places = (0..bindings.len()).filter(|place| bindings[*place].pod.is_ipv4() == v4);
            let places: Vec<usize> = places.collect();
            for some in places.chunks(message::MOST) {
                let named: Vec<Binding> = some.iter().map(|place| bindings[*place]).collect();
                let answers = if v4 {
                    self.ask::<V4>(&named, 4, remove)
                } else {
                    self.ask::<V6>(&named, 6, remove)
                };
                match answers {
                    Ok(answers) => {
                        for (place, answer) in some.iter().zip(answers) {
                            done[*place] = answer;
                        }
                    }
                    Err(error) => tracing::warn!(%error, "copies of bindings"),
                }
            }
        }
        done
    }

    fn ask<A: Address>(
        &self,
        named: &[Binding],
        family: u8,
        remove: bool,
    ) -> Result<Vec<u32>, aya::programs::ProgramError> {
        let mut told = vec![0; message::HEAD];
        told.push(u8::try_from(named.len()).expect("few"));
        told.push(family | if remove { message::REMOVE } else { 0 });
        for binding in named {
            told.extend(record::<A>(binding));
        }
        // The kernel's least: an Ethernet frame.
        told.resize(told.len().max(64), 0);
        let mut answer = vec![0; told.len()];
        let _alone = at_work();
        self.program.test_run(TestRunOptions {
            data_in: Some(&told),
            data_out: Some(&mut answer),
            repeat: 1,
            ..TestRunOptions::default()
        })?;
        let size = size_of::<Named<A>>();
        let outcomes = answer[message::NAMED..].chunks_exact(size);
        Ok(outcomes
            .take(named.len())
            .map(|named| {
                let last = named[size - 4..].try_into().expect("four");
                u32::from_ne_bytes(last)
            })
            .collect())
    }

    /// Puts them in; those for which it is too early.
    fn insert(&self, bindings: Vec<Binding>) -> Vec<Binding> {
        let done = self.run(&bindings, false);
        let early = bindings.into_iter().zip(done);
        let early = early.filter(|(_, done)| !matches!(*done, outcome::DONE | outcome::REFUSED));
        early.map(|(binding, _)| binding).collect()
    }

    fn remove(&self, mut bindings: Vec<Binding>) {
        for _ in 0..TRIES {
            let done = self.run(&bindings, true);
            let left = bindings.into_iter().zip(done);
            let left = left.filter(|(_, done)| *done == outcome::LATER);
            bindings = left.map(|(binding, _)| binding).collect();
            if bindings.is_empty() {
                return;
            }
        }
    }

    /// Takes out what is not to be kept, of some addresses.
    fn keep_all(&self, addresses: &BTreeSet<IpAddr>, kept: &HashSet<Binding>) {
        let done = self
            .keep::<V4>(&self.v4, addresses, kept)
            .and_then(|()| self.keep::<V6>(&self.v6, addresses, kept));
        if let Err(error) = done {
            tracing::warn!(%error, "copies of bindings that have ended may be left");
        }
    }

    /// The same of a family.
    fn keep<A: Address>(
        &self,
        map: &MapData,
        addresses: &BTreeSet<IpAddr>,
        kept: &HashSet<Binding>,
    ) -> io::Result<()>
    where
        Key<A>: aya::Pod,
        kernel::Binding<A>: aya::Pod,
    {
        batch::each(map.fd().as_fd(), BATCH, |entries: &[(Key<A>, _)]| {
            let there = entries.iter().filter_map(binding);
            let gone = there.filter(|it| addresses.contains(&it.egress_ip()) && !kept.contains(it));
            self.remove(gone.collect());
            Ok(())
        })
    }

    /// Some from a place on, of some addresses, and where to go on.
    fn some<A: Address>(
        map: &MapData,
        addresses: &BTreeSet<IpAddr>,
        from: Option<Place>,
    ) -> io::Result<(Vec<Binding>, Option<Place>)>
    where
        Key<A>: aya::Pod,
        kernel::Binding<A>: aya::Pod,
    {
        let most = u32::try_from(CHUNK).expect("few");
        let mut place = from;
        for _ in 0..LOOKS {
            let batch = batch::read::<Key<A>, kernel::Binding<A>>(map.fd().as_fd(), place, most)?;
            let told = batch.entries.iter().filter(|entry| !is_reset(entry));
            let there = told.filter_map(binding);
            let some: Vec<Binding> = there
                .filter(|it| addresses.contains(&it.egress_ip()))
                .collect();
            place = batch.next;
            if !some.is_empty() || place.is_none() {
                return Ok((some, place));
            }
        }
        Ok((Vec::new(), place))
    }

    /// What is there now and not what was there a moment ago: each answer is read when it is asked for.
    fn held(&self, addresses: &BTreeSet<IpAddr>, from: Option<Cursor>) -> io::Result<Chunk> {
        let (v6, place) = match from {
            None | Some(START) => (false, None),
            Some(Cursor(SECOND)) => (true, None),
            Some(Cursor(at)) => {
                let number = u32::try_from(at & u64::from(u32::MAX)).expect("it is masked");
                (at & SECOND != 0, Some(Place::at(number)))
            }
        };
        let (bindings, next) = if v6 {
            Self::some::<V6>(&self.v6, addresses, place)?
        } else {
            Self::some::<V4>(&self.v4, addresses, place)?
        };
        let next = match (next, v6) {
            (Some(place), false) => Some(u64::from(place.number())),
            (Some(place), true) => Some(SECOND | INSIDE | u64::from(place.number())),
            (None, false) => Some(SECOND),
            (None, true) => None,
        };
        Ok(Chunk {
            bindings,
            next: next.map(Cursor),
        })
    }
}

/// The beginning, once more: nobody could look.
const START: Cursor = Cursor(u64::MAX);
/// In a cursor: the IPv6 ones, which come second, and not from their beginning.
const SECOND: u64 = 1 << 32;
const INSIDE: u64 = 1 << 33;

/// As the program is told.
fn record<A: Address>(binding: &Binding) -> Vec<u8> {
    let address = |address: SocketAddr| A::of(&VipKey::from_address(address.ip()).0);
    let key = Key {
        local: address(binding.egress),
        remote: address(binding.remote),
        local_port: binding.egress.port(),
        remote_port: binding.remote.port(),
        protocol: u32::from(binding.protocol),
    };
    // The pod lies where another key's address would.
    let pod = Key {
        local: address(binding.pod),
        ..key
    };
    let mut record = bytes(&key);
    record.extend(&bytes(&pod)[..size_of::<A>()]);
    record.extend(binding.pod.port().to_ne_bytes());
    record.extend([0; 6]);
    record
}

/// Whether a flow was reset: then it was told as one that has ended.
fn is_reset<A: Address>((key, value): &(Key<A>, kernel::Binding<A>)) -> bool {
    let sides = Sides {
        ours: value.ours,
        theirs: value.theirs,
    };
    key.protocol == TCP && sides.is_reset()
}

/// An entry of a map *in*, if a flow has it.
fn binding<A: Address>((key, value): &(Key<A>, kernel::Binding<A>)) -> Option<Binding> {
    let claim = Claim::read(value.claim);
    let address = |address: A| VipKey(address.mapped()).address();
    (claim.phase == phase::LIVE).then(|| Binding {
        protocol: u8::try_from(key.protocol).unwrap_or_default(),
        pod: (address(value.to), claim.port).into(),
        egress: (address(key.local), key.local_port).into(),
        remote: (address(key.remote), key.remote_port).into(),
    })
}

/// What is in the kernel, and what is to be.
#[derive(Debug)]
pub(in super::super) struct Copies {
    inner: Mutex<Inner>,
    /// How many are kept aside at most.
    most: usize,
}

#[derive(Debug, Default)]
struct Inner {
    kernel: Option<Kernel>,
    /// What could not be placed yet.
    aside: BTreeSet<Binding>,
    /// The last of them that was tried again.
    tried: Option<Binding>,
    /// The addresses of which, while there was no kernel to be asked, all was to go but what is kept aside.
    swept: BTreeSet<IpAddr>,
}

impl Inner {
    /// Tries so many again; whether any could be placed.
    fn try_some(&mut self, most: usize) -> bool {
        let Some(kernel) = &self.kernel else {
            return false;
        };
        let after = self.tried.map_or(Bound::Unbounded, Bound::Excluded);
        let some = self.aside.range((after, Bound::Unbounded)).take(most);
        let some: Vec<Binding> = some.copied().collect();
        let count = some.len();
        self.tried = some.last().copied().filter(|_| count == most);
        for binding in &some {
            self.aside.remove(binding);
        }
        let early = kernel.insert(some);
        let placed = early.len() < count;
        self.aside.extend(early);
        placed
    }
}

impl Copies {
    pub(in super::super) fn new(most: u32) -> Self {
        Self {
            inner: Mutex::default(),
            most: usize::try_from(most).unwrap_or(usize::MAX),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// The program and its maps are there; nothing: they are gone.
    pub(in super::super) fn adopt(&self, kernel: Option<Kernel>) {
        let mut inner = self.inner();
        if let Some(kernel) = &kernel {
            let swept = std::mem::take(&mut inner.swept);
            if !swept.is_empty() {
                let kept: HashSet<Binding> = inner.aside.iter().copied().collect();
                kernel.keep_all(&swept, &kept);
            }
        }
        inner.kernel = kernel;
    }

    /// How many bindings wait to be placed.
    #[cfg(test)]
    pub(in super::super) fn aside(&self) -> usize {
        self.inner().aside.len()
    }

    pub(in super::super) fn insert(&self, mut bindings: Vec<Binding>) {
        bindings.retain(Binding::is_sound);
        let mut inner = self.inner();
        for binding in &bindings {
            inner.aside.remove(binding);
        }
        let early = match &inner.kernel {
            Some(kernel) => kernel.insert(bindings),
            None => bindings,
        };
        self.put_aside(&mut inner, early);
    }

    fn put_aside(&self, inner: &mut Inner, bindings: Vec<Binding>) {
        let room = self.most.saturating_sub(inner.aside.len());
        if let Some(lost) = bindings.len().checked_sub(room).filter(|lost| *lost > 0) {
            tracing::warn!(
                lost,
                "bindings of other gateways cannot be placed here: their flows would end with their gateway"
            );
        }
        inner.aside.extend(bindings.into_iter().take(room));
    }

    /// Tries again what could not be placed: so many, and more for as long as some of them can be.
    pub(in super::super) fn try_again(&self, most: usize) {
        let mut inner = self.inner();
        let mut left = inner.aside.len();
        while left > 0 && inner.try_some(most) {
            left = left.saturating_sub(most);
        }
    }

    pub(in super::super) fn remove(&self, mut bindings: Vec<Binding>) {
        bindings.retain(Binding::is_sound);
        let mut inner = self.inner();
        for binding in &bindings {
            inner.aside.remove(binding);
        }
        if let Some(kernel) = &inner.kernel {
            kernel.remove(bindings);
        }
    }

    pub(in super::super) fn keep(&self, addresses: &BTreeSet<IpAddr>, kept: &HashSet<Binding>) {
        let mut inner = self.inner();
        inner
            .aside
            .retain(|it| !addresses.contains(&it.egress_ip()) || kept.contains(it));
        match &inner.kernel {
            Some(kernel) => kernel.keep_all(addresses, kept),
            None => inner.swept.extend(addresses),
        }
    }

    /// What is kept aside is not held: nobody could go on by it.
    pub(in super::super) fn held(
        &self,
        addresses: &BTreeSet<IpAddr>,
        from: Option<Cursor>,
    ) -> Chunk {
        let inner = self.inner();
        let chunk = inner
            .kernel
            .as_ref()
            .map(|kernel| kernel.held(addresses, from));
        match chunk {
            Some(Ok(chunk)) => chunk,
            // Not that there is nothing: whoever asks is to ask again.
            failed => {
                if let Some(Err(error)) = failed {
                    tracing::debug!(%error, "the bindings cannot be read");
                }
                Chunk {
                    bindings: Vec::new(),
                    next: from.or(Some(START)),
                }
            }
        }
    }
}

/// The copies, for replication: no call keeps its task's thread.
#[derive(Debug)]
pub(in super::super) struct Seam(pub(in super::super) Arc<Copies>);

impl Seam {
    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Copies) -> T + Send + 'static) -> T {
        let copies = Arc::clone(&self.0);
        match tokio::task::spawn_blocking(move || work(&copies)).await {
            Ok(done) => done,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // The runtime ends, and the caller with it.
            Err(_) => std::future::pending().await,
        }
    }
}

#[async_trait]
impl Bindings for Seam {
    async fn insert(&self, bindings: Vec<Binding>) {
        self.run(|copies| copies.insert(bindings)).await;
    }

    async fn remove(&self, bindings: Vec<Binding>) {
        self.run(|copies| copies.remove(bindings)).await;
    }

    async fn keep(&self, addresses: &BTreeSet<IpAddr>, bindings: HashSet<Binding>) {
        let addresses = addresses.clone();
        self.run(move |copies| copies.keep(&addresses, &bindings))
            .await;
    }

    async fn held(&self, addresses: &BTreeSet<IpAddr>, from: Option<Cursor>) -> Chunk {
        let addresses = addresses.clone();
        self.run(move |copies| copies.held(&addresses, from)).await
    }
}
