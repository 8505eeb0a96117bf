//! A gateway's maps, and what is in them.
//!
//! Policies, nodes and hops have numbers, which bindings carry: an earlier process's are read from the maps and kept.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key as Prefix, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::util::nr_cpus;
use ipnet::IpNet;
use landfall_core::election::policy_id;
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::{Address as _, V6};
use landfall_ebpf_common::egress::gateway::{
    EgressState, Filter, GateNode, GateRoute, GateSettings, Hop, MAX_GATE_NODES, MAX_HOPS,
    MAX_POLICIES, Policy, PolicyCount, Reason, Source, egress_flag, map, policy_flag,
    settings_flag, source_flag,
};
use xxhash_rust::xxh64::xxh64;

use super::super::pins::Pins;
use super::super::tables::{Numbers, TablesError, forget, network, taken};
use super::attach::is_attached;
use super::keeper::{Kept, Orphaned};
use super::plan::{HopId, HopPlan, NodePlan, PeerId, Plan, PolicyPlan, SourcePlan};
use super::standing::States;
use super::tally::Tally;
use super::usage::Usage;
use crate::egress::PolicyName;

/// The maps, and what this process knows to be in them.
pub(in super::super) struct Tables {
    sources: HashMap<MapData, VipKey, Source>,
    egress: HashMap<MapData, VipKey, EgressState>,
    routes: LpmTrie<MapData, GateRoute, u32>,
    hops: Numbered<Hop>,
    nodes: Numbered<GateNode>,
    policies: Numbered<Policy>,
    used: Array<MapData, u64>,
    filter: Array<MapData, Filter>,
    /// What of it is planned.
    planned: Box<Filter>,
    /// The addresses by which pods leave here, and what this node is to addresses.
    by: BTreeSet<VipKey>,
    states: States,
    /// The numbers of the policies that addresses are of.
    of: BTreeMap<VipKey, u32>,
    settings: Array<MapData, GateSettings>,
    reasons: PerCpuArray<MapData, u64>,
    counts: PerCpuArray<MapData, PolicyCount>,
    /// The numbers of the policies that are gone with all their flows: their ports rest.
    over: BTreeSet<u16>,
    /// What of it an earlier process has left, by policies' numbers.
    earlier: BTreeMap<u32, PolicyCount>,
    /// Of pods whose gateway this node is or would be.
    pod_counts: PerCpuHashMap<MapData, [u8; 16], PolicyCount>,
    counted: BTreeSet<VipKey>,
    /// The names of the policies whose numbers this process has learnt.
    names: BTreeMap<u32, PolicyName>,
    /// Of these policies, by their numbers, each pod has a quota.
    limited: BTreeSet<u16>,
    /// What the keeper has counted last.
    tally: Tally,
    /// Which pods addresses were of when it was last said, by this process or an earlier one.
    owners: BTreeMap<VipKey, u64>,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tables").finish_non_exhaustive()
    }
}

/// An array whose places belong to names, as far as a hash tells them.
struct Numbered<T: aya::Pod> {
    map: Array<MapData, T>,
    numbers: BTreeMap<u64, u32>,
    free: Numbers,
}

impl<T: aya::Pod> Numbered<T> {
    /// Reads which places are whose.
    fn adopt(
        ebpf: &mut Ebpf,
        name: &'static str,
        below: u32,
        whose: impl Fn(&T) -> Option<u64>,
    ) -> Result<Self, TablesError> {
        let map: Array<MapData, T> = taken(ebpf, name)?;
        let mut numbers = BTreeMap::new();
        for number in 1..below {
            if let Some(hash) = whose(&map.get(&number, 0)?) {
                numbers.insert(hash, number);
            }
        }
        let free = Numbers::new(1, below, &numbers.values().copied().collect());
        Ok(Self { map, numbers, free })
    }

    fn set(&mut self, hash: u64, value: T, what: &'static str) -> Result<u32, TablesError> {
        let number = match self.numbers.get(&hash) {
            Some(number) => *number,
            None => self
                .free
                .take()
                .ok_or(TablesError::Full(self.map.len(), what))?,
        };
        self.map.set(number, value, 0)?;
        self.numbers.insert(hash, number);
        Ok(number)
    }
}

impl<T: aya::Pod + Default> Numbered<T> {
    /// Frees the numbers of what is neither planned nor in use, and returns them.
    fn forget(
        &mut self,
        planned: &BTreeSet<u64>,
        used: &BTreeSet<u16>,
    ) -> Result<Vec<u32>, TablesError> {
        let gone: Vec<(u64, u32)> = self
            .numbers
            .iter()
            .map(|(hash, number)| (*hash, *number))
            .filter(|(hash, found)| !planned.contains(hash) && !used.contains(&number(*found)))
            .collect();
        for (hash, number) in &gone {
            self.map.set(*number, T::default(), 0)?;
            self.numbers.remove(hash);
            self.free.give(*number);
        }
        Ok(gone.into_iter().map(|(_, number)| number).collect())
    }
}

/// What all CPUs have counted of the policy with this number.
fn sum_of(counts: &PerCpuArray<MapData, PolicyCount>, at: u32) -> Result<PolicyCount, TablesError> {
    let mut sum = PolicyCount::default();
    for of_cpu in counts.get(&at, 0)?.iter() {
        sum += *of_cpu;
    }
    Ok(sum)
}

/// What is put under a number.
fn number(number: u32) -> u16 {
    u16::try_from(number).expect("there are few")
}

pub(super) fn name_of_policy(name: &PolicyName) -> u64 {
    policy_id(name) | 1
}

/// The policies, by these names, of which an earlier process has left this node as the gateway: maps and programs.
pub(super) fn left(root: &Path) -> BTreeSet<u64> {
    let read = || {
        let pins = Pins::open(root).ok()?;
        if !is_attached(&pins) {
            return None;
        }
        let policies = Map::Array(MapData::from_pin(pins.map(map::POLICIES)).ok()?);
        let policies: Array<MapData, Policy> = Array::try_from(policies).ok()?;
        let here = policies.iter().flatten();
        let here = here.filter(|policy| policy.name != 0 && policy.uplink != 0);
        Some(here.map(|policy| policy.name).collect())
    };
    read().unwrap_or_default()
}

fn name_of_node(id: &PeerId) -> u64 {
    xxh64(format!("{} {}", id.node.0, id.interface).as_bytes(), 0) | 1
}

fn name_of_hop(id: HopId) -> u64 {
    u64::from(id.interface) << 1 | u64::from(id.routed)
}

impl Tables {
    /// Takes the maps, and reads what an earlier process has left in them.
    pub(in super::super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        let some = |name: u64| (name != 0).then_some(name);
        let sources: HashMap<_, VipKey, Source> = taken(ebpf, map::SOURCES)?;
        let known = sources.iter().flatten();
        let egress: HashMap<_, VipKey, EgressState> = taken(ebpf, map::EGRESS)?;
        // As long as nothing else is said, this node is what it was: copies stay, and who was silent is.
        let states = egress.iter().flatten().filter_map(|(key, state)| {
            let flags = state.flags & !egress_flag::HERE;
            let policy = 0;
            let state = EgressState {
                flags,
                policy,
                ..state
            };
            (flags != 0).then_some((key, state))
        });
        let pod_counts: PerCpuHashMap<_, [u8; 16], PolicyCount> = taken(ebpf, map::POD_COUNTS)?;
        let policies = Numbered::adopt(ebpf, map::POLICIES, MAX_POLICIES, |policy: &Policy| {
            some(policy.name)
        })?;
        let counts = taken(ebpf, map::COUNTS)?;
        let numbers = policies.numbers.values();
        let earlier = numbers.map(|number| Ok((*number, sum_of(&counts, *number)?)));
        Ok(Self {
            earlier: earlier.collect::<Result<_, TablesError>>()?,
            counted: pod_counts.keys().flatten().map(VipKey).collect(),
            pod_counts,
            states: states.collect(),
            owners: known.map(|(key, source)| (key, source.identity)).collect(),
            sources,
            egress,
            routes: taken(ebpf, map::ROUTES)?,
            hops: Numbered::adopt(ebpf, map::HOPS, MAX_HOPS, |hop: &Hop| {
                let routed = hop.via_v4 != 0 || hop.via_v6 != [0; 16];
                (hop.interface != 0).then(|| {
                    name_of_hop(HopId {
                        interface: hop.interface,
                        routed,
                    })
                })
            })?,
            nodes: Numbered::adopt(ebpf, map::NODES, MAX_GATE_NODES, |node: &GateNode| {
                some(node.name)
            })?,
            policies,
            used: taken(ebpf, map::USED)?,
            filter: taken(ebpf, map::FILTER)?,
            planned: Box::new(Filter::EMPTY),
            by: BTreeSet::new(),
            of: BTreeMap::new(),
            settings: taken(ebpf, map::SETTINGS)?,
            reasons: taken(ebpf, map::REASONS)?,
            counts,
            names: BTreeMap::new(),
            over: BTreeSet::new(),
            limited: BTreeSet::new(),
            tally: Tally::default(),
        })
    }

    /// Idle times and marks.
    pub(in super::super) fn settle(&mut self, settings: GateSettings) -> Result<(), TablesError> {
        Ok(self.settings.set(0, settings, 0)?)
    }

    /// Sets one of the settings' flags.
    fn flag(&mut self, flag: u32, on: bool) -> Result<(), TablesError> {
        let before = self.settings.get(&0, 0)?;
        let flags = if on {
            before.flags | flag
        } else {
            before.flags & !flag
        };
        if flags != before.flags {
            self.settings.set(0, GateSettings { flags, ..before }, 0)?;
        }
        Ok(())
    }

    /// User space wants to know what happens to bindings.
    pub(in super::super) fn tell(&mut self) -> Result<(), TablesError> {
        self.flag(settings_flag::TELL, true)
    }

    /// What this node is to egress addresses.
    pub(in super::super) fn stand(&mut self, states: &States) -> Result<(), TablesError> {
        if self.states != *states {
            self.states.clone_from(states);
            self.write_egress()?;
        }
        Ok(())
    }

    /// The same as it is now.
    pub(in super::super) fn states(&self) -> &States {
        &self.states
    }

    fn write_egress(&mut self) -> Result<(), TablesError> {
        let mut wanted = self.states.clone();
        for address in &self.by {
            wanted.entry(*address).or_default().flags |= egress_flag::HERE;
        }
        for (address, state) in &mut wanted {
            state.policy = self.of.get(address).copied().unwrap_or_default();
        }
        sync(&mut self.egress, &wanted)?;
        let silent = |state: &EgressState| state.flags & egress_flag::SILENT != 0;
        self.flag(settings_flag::SILENT, wanted.values().any(silent))
    }

    /// What is bound for whom, and is to end: for pods' addresses that are others' by now, or nobody's, and for policies
    /// that are gone with all their flows.
    pub(in super::super) fn orphaned(&self, plan: &Plan) -> Orphaned {
        let mut orphaned = Orphaned {
            pods: BTreeMap::new(),
            policies: self
                .gone(plan)
                .filter(|gone| !self.over.contains(gone))
                .collect(),
        };
        if plan.knows_pods() {
            let gone = self.owners.iter().filter(|(address, identity)| {
                let now = plan.owners.get(&address.address());
                now != Some(*identity)
            });
            orphaned.pods = gone.map(|(address, _)| (*address, None)).collect();
        }
        orphaned
    }

    /// The numbers of the policies that are not planned.
    fn gone(&self, plan: &Plan) -> impl Iterator<Item = u16> {
        let known = plan.policies.keys().chain(&plan.elsewhere);
        let known: BTreeSet<u64> = known.map(name_of_policy).collect();
        let numbers = self.policies.numbers.iter();
        numbers
            .filter(move |(hash, _)| !known.contains(hash))
            .map(|(_, found)| number(*found))
    }

    /// Of those whose flows have ended, who can begin more as long as nothing else is planned.
    pub(in super::super) fn busy(&self, orphaned: &Orphaned) -> Orphaned {
        let leaves = |pod: &VipKey| self.leaves_by(pod).is_some();
        let pods = orphaned.pods.keys().copied().filter(leaves);
        Orphaned {
            pods: pods.map(|pod| (pod, None)).collect(),
            policies: orphaned.policies.clone(),
        }
    }

    /// The same once something else is planned: what they begin by then is not to end.
    pub(in super::super) fn but_what_is_planned(&self, mut orphaned: Orphaned) -> Orphaned {
        for (pod, stays) in &mut orphaned.pods {
            *stays = self.leaves_by(pod);
        }
        orphaned
    }

    /// The policy, by its number, by which a pod leaves here.
    fn leaves_by(&self, pod: &VipKey) -> Option<u16> {
        let source = self.sources.get(pod, 0).ok()?;
        (source.flags & source_flag::HERE != 0).then_some(source.policy)
    }

    /// Makes the maps hold what is planned, and nothing else. What bindings name goes first, what names it after.
    pub(in super::super) fn write(&mut self, plan: &Plan, mark: u32) -> Result<(), TablesError> {
        let hops = plan
            .hops
            .iter()
            .map(|(id, hop)| {
                Ok((
                    *id,
                    self.hops.set(name_of_hop(*id), mk_hop(*id, hop), "hops")?,
                ))
            })
            .collect::<Result<BTreeMap<HopId, u32>, TablesError>>()?;
        for (id, node) in &plan.nodes {
            let entry = mk_node(id, node, mark);
            self.nodes.set(entry.name, entry, "nodes")?;
        }
        let mut limited = BTreeSet::new();
        for (name, policy) in &plan.policies {
            let entry = mk_policy(name, policy);
            let at = self.policies.set(entry.name, entry, "policies")?;
            if policy.ports_per_pod != 0 {
                limited.insert(number(at));
            }
        }
        self.limited = limited;
        self.learn_names(plan);
        self.leave_to_others(plan)?;
        self.write_routes(plan, &hops)?;
        self.widen(plan)?;
        let egress = plan.egress.iter();
        self.by = egress
            .map(|address| VipKey::from_address(*address))
            .collect();
        let of = plan.of.iter().filter_map(|(address, name)| {
            let number = self.policies.numbers.get(&name_of_policy(name))?;
            Some((VipKey::from_address(*address), *number))
        });
        self.of = of.collect();
        self.write_egress()?;
        let sources = plan
            .sources
            .iter()
            .map(|(address, source)| {
                let mut entry = self.mk_source(source);
                entry.identity = plan.owners.get(address).copied().unwrap_or_default();
                (VipKey::from_address(*address), entry)
            })
            .collect();
        let before = sync(&mut self.sources, &sources)?;
        // What was bound for those that are gone has ended, and nothing begins any more.
        self.over = self.gone(plan).collect();
        if plan.knows_pods() {
            let owners = plan.owners.iter();
            self.owners = owners
                .map(|(address, identity)| (VipKey::from_address(*address), *identity))
                .collect();
        }
        self.count_pods(&before, &sources);
        Ok(())
    }

    /// Makes room to count in for pods that leave here or would, and for no others; whoever is another than before begins
    /// with nothing. A pod that cannot be counted leaves all the same.
    fn count_pods(&mut self, before: &BTreeMap<VipKey, Source>, now: &BTreeMap<VipKey, Source>) {
        let who = |source: &Source| (source.identity, source.policy);
        let counted = |address: &VipKey| {
            let source = now.get(address).filter(|source| source.policy != 0);
            source.is_some_and(|now| before.get(address).map(who) == Some(who(now)))
        };
        let others: Vec<VipKey> = self.counted.iter().copied().collect();
        for pod in others.into_iter().filter(|pod| !counted(pod)) {
            if is_counted(forget(self.pod_counts.remove(&pod.0)).map_err(Into::into)) {
                self.counted.remove(&pod);
            }
        }
        for (pod, source) in now {
            if source.policy != 0 && !self.counted.contains(pod) && is_counted(self.zero(pod)) {
                self.counted.insert(*pod);
            }
        }
    }

    #[cfg(test)]
    pub(in super::super) fn counts_of_pods(&self) -> BTreeMap<IpAddr, PolicyCount> {
        super::list::of_pods(&self.pod_counts)
    }

    fn zero(&mut self, pod: &VipKey) -> Result<(), TablesError> {
        Ok(self.pod_counts.insert(pod.0, nothing()?, 0)?)
    }

    /// What is known of the flows of policies whose gateway is elsewhere stays, and moves no packet.
    fn leave_to_others(&mut self, plan: &Plan) -> Result<(), TablesError> {
        for name in &plan.elsewhere {
            let hash = name_of_policy(name);
            let Some(number) = self.policies.numbers.get(&hash) else {
                continue;
            };
            let known = self.policies.map.get(number, 0)?;
            if known.uplink != 0 {
                let idle = Policy { uplink: 0, ..known };
                self.policies.map.set(*number, idle, 0)?;
            }
        }
        Ok(())
    }

    fn mk_source(&self, plan: &SourcePlan) -> Source {
        let of = |id: &Option<PeerId>| {
            id.as_ref()
                .and_then(|id| self.nodes.numbers.get(&name_of_node(id)))
                .map_or(0, |found| number(*found))
        };
        let mut source = Source {
            node: of(&plan.node),
            gateway: of(&plan.gateway),
            ..Source::default()
        };
        if plan.node.is_none() {
            source.flags |= source_flag::LOCAL;
        }
        if plan.here.is_some() {
            source.flags |= source_flag::HERE;
        }
        if plan.resumes {
            source.flags |= source_flag::RESUMES;
        }
        if let Some((policy, egress)) = plan.here.as_ref().or(plan.standby.as_ref()) {
            source.egress = VipKey::from_address(*egress).0;
            source.policy = self
                .policies
                .numbers
                .get(&name_of_policy(policy))
                .map_or(0, |found| number(*found));
        }
        source
    }

    fn write_routes(
        &mut self,
        plan: &Plan,
        hops: &BTreeMap<HopId, u32>,
    ) -> Result<(), TablesError> {
        let wanted: BTreeMap<(u32, GateRoute), u32> = plan
            .routes
            .iter()
            .map(|((uplink, net), hop)| {
                let hop = hop.and_then(|id| hops.get(&id)).copied().unwrap_or(0);
                (route(*uplink, *net), hop)
            })
            .collect();
        let there: Vec<Prefix<GateRoute>> = self.routes.keys().flatten().collect();
        for ((length, data), hop) in &wanted {
            self.routes.insert(&Prefix::new(*length, *data), hop, 0)?;
        }
        for key in there {
            if !wanted.contains_key(&(key.prefix_len(), key.data())) {
                self.routes.remove(&key)?;
            }
        }
        Ok(())
    }

    /// The filter lets more through before the maps hold it.
    fn widen(&mut self, plan: &Plan) -> Result<(), TablesError> {
        *self.planned = filter(plan);
        let before = self.filter.get(&0, 0)?;
        self.let_through(&before)
    }

    /// Lets through what is planned, and what is besides; nothing else.
    fn let_through(&mut self, besides: &Filter) -> Result<(), TablesError> {
        let mut filter = self.planned.clone();
        let pods = filter.pods.iter_mut().zip(besides.pods);
        let destinations = filter.destinations.iter_mut().zip(besides.destinations);
        for (word, more) in pods.chain(destinations) {
            *word |= more;
        }
        if *filter != self.filter.get(&0, 0)? {
            self.filter.set(0, *filter, 0)?;
        }
        Ok(())
    }

    /// Forgets what is not planned any more and what no binding is about: flows go on when their pod or their policy is
    /// gone.
    pub(in super::super) fn forget(&mut self, plan: &Plan, kept: &Kept) -> Result<(), TablesError> {
        self.let_through(&kept.filter)?;
        let planned = plan.policies.keys().chain(&plan.elsewhere);
        let planned: BTreeSet<u64> = planned.map(name_of_policy).collect();
        self.tally = kept.tally.clone();
        for number in self.policies.forget(&planned, &kept.policies)? {
            // Another policy may get the number.
            self.names.remove(&number);
            self.earlier.remove(&number);
            self.over.retain(|over| u32::from(*over) != number);
            self.counts.set(number, nothing()?, 0)?;
        }
        let planned: BTreeSet<u64> = plan.nodes.keys().map(name_of_node).collect();
        self.nodes.forget(&planned, &kept.nodes)?;
        Ok(())
    }

    /// The maps hold numbers; which names these are of, only those know who name them.
    fn learn_names(&mut self, plan: &Plan) {
        for name in plan.policies.keys().chain(&plan.elsewhere) {
            if let Some(number) = self.policies.numbers.get(&name_of_policy(name)) {
                self.names.insert(*number, name.clone());
            }
        }
    }

    /// The names of policies by their numbers.
    pub(super) fn names(&self) -> &BTreeMap<u32, PolicyName> {
        &self.names
    }

    /// The policies, by their numbers, that have a quota for each pod.
    pub(in super::super) fn limited(&self) -> &BTreeSet<u16> {
        &self.limited
    }

    /// What each policy's pods use here.
    pub(in super::super) fn usage(&self) -> BTreeMap<PolicyName, Usage> {
        let of = |at: u32| -> Option<Usage> {
            let policy = self.policies.map.get(&at, 0).ok()?;
            Some(Usage {
                is_gateway: policy.uplink != 0,
                ports: self.used.get(&at, 0).ok()?,
                quota: policy.ports,
                quota_per_pod: policy.ports_per_pod,
                bindings: self.tally.of(number(at)),
                count: sum_of(&self.counts, at).ok()?,
                earlier: self.earlier.get(&at).copied().unwrap_or_default(),
            })
        };
        let named = self.names.iter();
        named
            .filter_map(|(number, name)| Some((name.clone(), of(*number)?)))
            .collect()
    }

    /// How many packets met each fate, all CPUs together, in the order of `Reason::ALL`.
    pub(in super::super) fn reasons(&self) -> Vec<u64> {
        let counts = self.reasons.iter();
        let counts = counts.map(|values| values.map_or(0, |values| values.iter().sum()));
        counts.take(Reason::ALL.len()).collect()
    }
}

/// Whether all is well; else it is said.
fn is_counted(done: Result<(), TablesError>) -> bool {
    done.inspect_err(|error| {
        tracing::warn!(%error, "packets of a pod at this gateway cannot be counted");
    })
    .is_ok()
}

/// Of each CPU.
fn nothing() -> Result<PerCpuValues<PolicyCount>, TablesError> {
    let cpus = nr_cpus().map_err(|(_, error)| error)?;
    Ok(PerCpuValues::try_from(vec![PolicyCount::default(); cpus])?)
}

/// Makes a map hold what is wanted. What is there already is left alone. Returns what was there.
fn sync<V: aya::Pod + PartialEq>(
    map: &mut HashMap<MapData, VipKey, V>,
    wanted: &BTreeMap<VipKey, V>,
) -> Result<BTreeMap<VipKey, V>, TablesError> {
    let there: BTreeMap<VipKey, V> = map.iter().flatten().collect();
    for (key, value) in wanted {
        if there.get(key) != Some(value) {
            map.insert(key, value, 0)?;
        }
    }
    for key in there.keys() {
        if !wanted.contains_key(key) {
            map.remove(key)?;
        }
    }
    Ok(there)
}

fn filter(plan: &Plan) -> Filter {
    let mut filter = Filter::EMPTY;
    let place = |address: &IpAddr| Filter::place(V6::of(&VipKey::from_address(*address).0));
    for (address, source) in &plan.sources {
        if source.here.is_none() && source.gateway.is_none() {
            continue;
        }
        let (word, bit) = place(address);
        filter.pods[word] |= bit;
        // What comes to it from its gateway is looked for.
        if source.gateway.is_some() {
            filter.destinations[word] |= bit;
        }
    }
    for address in &plan.egress {
        let (word, bit) = place(address);
        filter.destinations[word] |= bit;
    }
    filter
}

fn route(uplink: u32, net: IpNet) -> (u32, GateRoute) {
    // The interface takes the place of a node's number: as long, and in front.
    let (length, address) = network(net);
    let data = GateRoute {
        uplink: uplink.to_be_bytes(),
        address,
    };
    (length, data)
}

fn mk_hop(id: HopId, plan: &HopPlan) -> Hop {
    let v4 = |address: Option<std::net::Ipv4Addr>| {
        address.map_or(0, |address| u32::from_ne_bytes(address.octets()))
    };
    let v6 = |address: Option<std::net::Ipv6Addr>| address.map_or([0; 16], |it| it.octets());
    Hop {
        interface: id.interface,
        mtu: plan.mtu,
        via_v4: v4(plan.via_v4),
        own_v4: v4(plan.own_v4),
        via_v6: v6(plan.via_v6),
        own_v6: v6(plan.own_v6),
        mac: plan.mac,
        zero: [0; 2],
    }
}

fn mk_node(id: &PeerId, plan: &NodePlan, mark: u32) -> GateNode {
    GateNode {
        name: name_of_node(id),
        interface: plan.interface,
        mtu: plan.mtu,
        mark: if plan.is_gateway { mark } else { 0 },
        mac: plan.mac.unwrap_or_default(),
        own: plan.own,
        address: plan
            .address
            .map_or([0; 16], |address| VipKey::from_address(address).0),
    }
}

fn mk_policy(name: &PolicyName, plan: &PolicyPlan) -> Policy {
    Policy {
        name: name_of_policy(name),
        uplink: plan.uplink,
        ports: plan.ports,
        ports_per_pod: plan.ports_per_pod,
        link: plan.link,
        pace: plan.pace,
        flags: u32::from(plan.hairpin) * policy_flag::HAIRPIN,
        zero: 0,
    }
}
