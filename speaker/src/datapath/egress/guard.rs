//! What the guard knows: tenants, their policies' gateways, the cluster's networks, the interfaces to the outside.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use ipnet::IpNet;
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::guard::{
    Gateway, MAX_GATEWAYS, Marks, NOBODY, Tenant, gateway_flag, map, tenant_flag,
};
use landfall_ebpf_common::egress::judge::life_of;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use xxhash_rust::xxh64::xxh64;

use super::super::pins::Pins;
use super::super::tables::{Nodes, Numbers, TablesError, forget, taken};
use super::Leaving;
use super::judge::{self, Judge};
use crate::egress::{Policy, PolicyName, marks};
use crate::node_rules::TUNNEL;

type Network = (u32, [u8; 16]);

/// What a policy is known by in the maps.
pub fn seed_of(policy: &str) -> u64 {
    xxh64(policy.as_bytes(), 0).max(1)
}

/// The policies whose tenant a pod's address is and was, by their [`seed_of`]; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Was {
    /// Whose it is.
    pub policy: u64,
    /// Whose it was before.
    pub former: u64,
}

/// What an earlier process has left of tenants and of the cluster's own networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Earlier {
    /// Whose tenants pods were, by address.
    pub tenants: BTreeMap<IpAddr, Was>,
    /// The networks.
    pub inside: BTreeSet<IpNet>,
}

/// Reads it from what is pinned in `pin_dir`; nothing, if nothing is.
pub fn earlier(pin_dir: &Path) -> Earlier {
    let read = || -> Option<Earlier> {
        let pins = Pins::open(pin_dir).ok()?;
        let tenants = MapData::from_pin(pins.map(map::TENANTS)).ok()?;
        let tenants: HashMap<_, VipKey, Tenant> = Map::HashMap(tenants).try_into().ok()?;
        let gateways = MapData::from_pin(pins.map(map::GATEWAYS)).ok()?;
        let gateways: Array<_, Gateway> = Map::Array(gateways).try_into().ok()?;
        let seed = |number: u32| {
            let known = (number != NOBODY).then(|| gateways.get(&number, 0).ok());
            known.flatten().map_or(0, |gateway| gateway.seed)
        };
        let was = |tenant: Tenant| Was {
            policy: seed(tenant.policy),
            former: seed(tenant.former),
        };
        let inside = MapData::from_pin(pins.map(map::INSIDE)).ok()?;
        let inside: LpmTrie<_, [u8; 16], u32> = Map::LpmTrie(inside).try_into().ok()?;
        let known = tenants.iter().flatten();
        let nets = inside.iter().flatten();
        Some(Earlier {
            tenants: known
                .map(|(key, tenant)| (key.address(), was(tenant)))
                .collect(),
            inside: nets
                .filter_map(|(key, _)| named((key.prefix_len(), key.data())))
                .collect(),
        })
    };
    read().unwrap_or_default()
}

/// The guard's maps, and what this process knows to be in them.
pub(in super::super) struct Guard {
    tenants: HashMap<MapData, VipKey, Tenant>,
    gateways: Array<MapData, Gateway>,
    inside: LpmTrie<MapData, [u8; 16], u32>,
    outside: HashMap<MapData, u32, u32>,
    marks: Array<MapData, Marks>,
    guarded: PerCpuArray<MapData, u64>,
    unled: PerCpuArray<MapData, u64>,
    known: Known,
    numbers: Numbers,
    /// What it goes by who judges, where that is no packet filter.
    judge: Option<Judge>,
    /// The policies whose destinations are not all known to it: there was no room.
    unsaid: BTreeSet<PolicyName>,
    /// What was said last.
    leaving: Option<Leaving>,
}

#[derive(Debug, Default)]
struct Known {
    tenants: BTreeMap<IpAddr, Tenant>,
    gateways: BTreeMap<u32, Gateway>,
    inside: BTreeSet<Network>,
    outside: BTreeSet<u32>,
}

impl Guard {
    /// Takes the maps, and reads what an earlier process has left in them.
    pub(in super::super) fn adopt(ebpf: &mut Ebpf, judges: bool) -> Result<Self, TablesError> {
        let tenants: HashMap<_, VipKey, Tenant> = taken(ebpf, map::TENANTS)?;
        let gateways: Array<_, Gateway> = taken(ebpf, map::GATEWAYS)?;
        let inside: LpmTrie<_, [u8; 16], u32> = taken(ebpf, map::INSIDE)?;
        let outside: HashMap<_, u32, u32> = taken(ebpf, map::OUTSIDE)?;
        let mut known = Known::default();
        for entry in &tenants {
            let (key, tenant) = entry?;
            known.tenants.insert(key.address(), tenant);
        }
        for (number, gateway) in (0..).zip(gateways.iter()) {
            let gateway = gateway?;
            if gateway.seed != 0 {
                known.gateways.insert(number, gateway);
            }
        }
        for entry in &inside {
            let (key, _) = entry?;
            known.inside.insert((key.prefix_len(), key.data()));
        }
        for entry in &outside {
            known.outside.insert(entry?.0);
        }
        let used = known.gateways.keys().copied().collect();
        Ok(Self {
            tenants,
            gateways,
            inside,
            outside,
            marks: taken(ebpf, map::MARKS)?,
            guarded: taken(ebpf, map::GUARDED)?,
            unled: taken(ebpf, map::UNLED)?,
            numbers: Numbers::new(0, MAX_GATEWAYS, &used),
            known,
            judge: judges.then(|| Judge::adopt(ebpf)).transpose()?,
            unsaid: BTreeSet::new(),
            leaving: None,
        })
    }

    #[cfg(test)]
    pub(in super::super) const fn judge(&mut self) -> Option<&mut Judge> {
        self.judge.as_mut()
    }

    /// Makes the maps say this and nothing else. A tenant is told after its policy's gateway, and a network of the
    /// cluster goes last: whatever comes between is dropped and not let out.
    pub(in super::super) fn set(
        &mut self,
        leaving: Option<&Leaving>,
        nodes: &mut Nodes,
    ) -> Result<(), TablesError> {
        self.leaving = leaving.cloned();
        let Some(leaving) = leaving else {
            return self.clear();
        };
        let (judged, egress) = marks(leaving.mark);
        let is_gateway = leaving.egress.policies.values().any(|policy| {
            let gateway = policy.gateway.as_ref();
            gateway.is_some_and(|gateway| gateway.node == leaving.node)
        });
        let marks = Marks {
            judged,
            egress,
            is_gateway: u32::from(is_gateway),
        };
        let before = self.marks.get(&0, 0)?;
        let is_off = before == Marks::default();
        let begins = is_off || self.judge.as_ref().is_some_and(Judge::is_new);
        if !is_off && before != marks {
            self.marks.set(0, marks, 0)?;
        }
        if let Some(judge) = self.judge.as_mut().filter(|_| is_off) {
            judge.forget_flows()?;
        }
        for index in leaving.outside.difference(&self.known.outside) {
            self.outside.insert(*index, 1, 0)?;
        }
        for index in self.known.outside.difference(&leaving.outside) {
            forget(self.outside.remove(index))?;
        }
        self.known.outside.clone_from(&leaving.outside);
        let numbers = self.numbers(leaving)?;
        let destinations = judge::destinations(leaving, &numbers);
        let plain = judge::plain(leaving);
        // What there is no room for keeps nothing else from being said: whose destinations are not all known is for all, and
        // closed.
        let mut outcome = Ok(());
        if let Some(judge) = &mut self.judge {
            (self.unsaid, outcome) = judge.name(&destinations);
        }
        self.lead(leaving, &numbers, nodes)?;
        // Whoever is about to be in one of the two is not taken out of the other before.
        let wanted = self.tenants(leaving, &numbers, begins);
        if let Some(judge) = &mut self.judge {
            outcome = outcome.and(judge.admit(&plain));
        }
        outcome = outcome.and(self.tell_tenants(&wanted));
        if let Some(judge) = &mut self.judge {
            judge.end(&destinations, &plain)?;
        }
        self.forget_gateways(&numbers.values().copied().collect())?;
        self.tell_inside(leaving.egress.inside.iter().map(network).collect())?;
        if is_off {
            // Nothing goes by the tables before.
            self.marks.set(0, marks, 0)?;
        }
        outcome
    }

    /// Takes in what may have changed without a word: this node's own Ethernet addresses.
    pub(in super::super) fn refresh(&mut self, nodes: &mut Nodes) -> Result<(), TablesError> {
        match self.leaving.take() {
            None => Ok(()),
            Some(leaving) => {
                let numbers = self.numbers(&leaving);
                let led = numbers.and_then(|numbers| self.lead(&leaving, &numbers, nodes));
                self.leaving = Some(leaving);
                led
            }
        }
    }

    /// How many packets met each fate, all CPUs together, in the order of `Guarded::ALL`.
    pub(in super::super) fn counts(&self) -> Vec<u64> {
        self.guarded
            .iter()
            .map(|values| values.map_or(0, |values| values.iter().sum()))
            .collect()
    }

    /// How many packets of each policy's pods were dropped since there is no gateway, or no address for them; of those of
    /// which there were any.
    pub(in super::super) fn unled(&self) -> BTreeMap<PolicyName, u64> {
        let Some(leaving) = &self.leaving else {
            return BTreeMap::new();
        };
        let numbers = self.by_seed();
        let names = leaving.egress.policies.keys();
        let count = |name: &PolicyName| {
            let number = numbers.get(&seed_of(name))?;
            let count: u64 = self.unled.get(number, 0).ok()?.iter().sum();
            (count > 0).then(|| (name.clone(), count))
        };
        names.filter_map(count).collect()
    }

    fn by_seed(&self) -> BTreeMap<u64, u32> {
        let gateways = self.known.gateways.iter();
        gateways
            .map(|(number, gateway)| (gateway.seed, *number))
            .collect()
    }

    /// The numbers of the policies. A new one's is its own as soon as its place is written.
    fn numbers(&mut self, leaving: &Leaving) -> Result<BTreeMap<PolicyName, u32>, TablesError> {
        let by_seed = self.by_seed();
        let mut numbers = BTreeMap::new();
        for name in leaving.egress.policies.keys() {
            let seed = seed_of(name);
            let number = match by_seed.get(&seed) {
                Some(number) => *number,
                None => self.take(seed)?,
            };
            numbers.insert(name.clone(), number);
        }
        Ok(numbers)
    }

    fn take(&mut self, seed: u64) -> Result<u32, TablesError> {
        let taken = self.numbers.take();
        let number = taken.ok_or(TablesError::Full(MAX_GATEWAYS, "policies"))?;
        let gateway = Gateway {
            seed,
            ..Gateway::default()
        };
        if let Err(error) = self.gateways.set(number, gateway, 0) {
            self.numbers.give(number);
            return Err(error.into());
        }
        self.known.gateways.insert(number, gateway);
        Ok(number)
    }

    /// Writes the gateways.
    fn lead(
        &mut self,
        leaving: &Leaving,
        numbers: &BTreeMap<PolicyName, u32>,
        nodes: &mut Nodes,
    ) -> Result<(), TablesError> {
        let macs = own_macs();
        for (name, policy) in &leaving.egress.policies {
            let Some(number) = numbers.get(name) else {
                continue;
            };
            let mut gateway = gateway(seed_of(name), policy, leaving, &macs, nodes)?;
            if self.judge.is_some() && !self.unsaid.contains(name) {
                gateway.flags |= is_for(policy);
            }
            if self.known.gateways.get(number) != Some(&gateway) {
                self.gateways.set(*number, gateway, 0)?;
                self.known.gateways.insert(*number, gateway);
            }
        }
        Ok(())
    }

    /// The tenants, as the maps say them. Of none of them anything was known if the guard `begins` with this.
    fn tenants(
        &self,
        leaving: &Leaving,
        numbers: &BTreeMap<PolicyName, u32>,
        begins: bool,
    ) -> BTreeMap<IpAddr, Tenant> {
        let mut wanted = BTreeMap::new();
        for (address, pod) in &leaving.egress.pods {
            let number = |policy: &PolicyName| numbers.get(policy).copied();
            let former = pod.former.as_ref().and_then(number);
            if pod.tenant.is_none() && former.is_none() {
                continue;
            }
            let egress_ip = pod.tenant.as_ref().and_then(|tenant| tenant.egress_ip);
            let policy = pod.policy().and_then(number);
            let life = life_of(pod.identity);
            let mut flags = 0;
            if pod.node == leaving.node {
                flags |= tenant_flag::HERE;
            }
            let is_said = pod.policy().is_some_and(|it| !self.unsaid.contains(it));
            if egress_ip.is_some() && policy.is_some() && is_said {
                flags |= tenant_flag::OPEN;
            }
            if self.was_before(address, life, begins) {
                flags |= tenant_flag::BEFORE;
            }
            let tenant = Tenant {
                policy: policy.unwrap_or(NOBODY),
                former: former.unwrap_or(NOBODY),
                flags,
                life,
                address: egress_ip.map_or(VipKey([0; 16]), VipKey::from_address),
            };
            wanted.insert(*address, tenant);
        }
        wanted
    }

    /// Whether a pod was there before it was a tenant, as far as it matters.
    fn was_before(&self, address: &IpAddr, life: u32, begins: bool) -> bool {
        let Some(judge) = &self.judge else {
            return false;
        };
        let known = self.known.tenants.get(address);
        begins
            || judge.was_plain(address, life)
            || known.is_some_and(|known| {
                let began = known.flags & tenant_flag::BEFORE != 0 || known.policy == NOBODY;
                known.life == life && began
            })
    }

    fn tell_tenants(&mut self, wanted: &BTreeMap<IpAddr, Tenant>) -> Result<(), TablesError> {
        let mut outcome = Ok(());
        // Who goes makes room.
        let known = self.known.tenants.keys().copied();
        let gone: Vec<IpAddr> = known.filter(|it| !wanted.contains_key(it)).collect();
        for address in gone {
            forget(self.tenants.remove(&VipKey::from_address(address)))?;
            self.known.tenants.remove(&address);
        }
        for (address, tenant) in wanted {
            if self.known.tenants.get(address) != Some(tenant) {
                match self
                    .tenants
                    .insert(VipKey::from_address(*address), tenant, 0)
                {
                    Ok(()) => {
                        self.known.tenants.insert(*address, *tenant);
                    }
                    Err(error) => outcome = Err(error.into()),
                }
            }
        }
        outcome
    }

    fn forget_gateways(&mut self, used: &BTreeSet<u32>) -> Result<(), TablesError> {
        for (number, _) in self
            .known
            .gateways
            .extract_if(.., |number, _| !used.contains(number))
        {
            self.gateways.set(number, Gateway::default(), 0)?;
            self.unled.set(number, none()?, 0)?;
            self.numbers.give(number);
        }
        Ok(())
    }

    fn tell_inside(&mut self, wanted: BTreeSet<Network>) -> Result<(), TablesError> {
        for (length, address) in wanted.difference(&self.known.inside) {
            let whole = u32::from(*length < 128);
            self.inside.insert(&Key::new(*length, *address), whole, 0)?;
        }
        for (length, address) in self.known.inside.difference(&wanted) {
            forget(self.inside.remove(&Key::new(*length, *address)))?;
        }
        self.known.inside = wanted;
        Ok(())
    }

    fn clear(&mut self) -> Result<(), TablesError> {
        for address in std::mem::take(&mut self.known.tenants).into_keys() {
            forget(self.tenants.remove(&VipKey::from_address(address)))?;
        }
        self.forget_gateways(&BTreeSet::new())?;
        for index in std::mem::take(&mut self.known.outside) {
            forget(self.outside.remove(&index))?;
        }
        self.tell_inside(BTreeSet::new())?;
        self.marks.set(0, Marks::default(), 0)?;
        // Who judges does nothing any more: those that nobody was to lead pass all the while.
        match &mut self.judge {
            Some(judge) => {
                judge.end(&BTreeMap::new(), &BTreeMap::new())?;
                judge.forget_flows()
            }
            None => Ok(()),
        }
    }
}

/// Nothing, by CPU.
fn none() -> Result<PerCpuValues<u64>, TablesError> {
    let cpus = nr_cpus().map_err(|(_, error)| error)?;
    Ok(PerCpuValues::try_from(vec![0; cpus])?)
}

/// A policy's gateway, as the maps say it.
fn gateway(
    seed: u64,
    policy: &Policy,
    leaving: &Leaving,
    macs: &BTreeMap<u32, [u8; 6]>,
    nodes: &mut Nodes,
) -> Result<Gateway, TablesError> {
    let unknown = Gateway {
        seed,
        ..Gateway::default()
    };
    let Some(known) = policy.led_to() else {
        return Ok(unknown);
    };
    if known.node == leaving.node {
        return Ok(Gateway {
            interface: known.interface,
            flags: gateway_flag::KNOWN | gateway_flag::HERE,
            ..unknown
        });
    }
    let (Some(mac), Some(source)) = (known.mac, macs.get(&known.interface)) else {
        return Ok(unknown);
    };
    let is_tunnel = *known.uplink == *TUNNEL;
    Ok(Gateway {
        interface: known.interface,
        flags: gateway_flag::KNOWN | if is_tunnel { gateway_flag::TUNNEL } else { 0 },
        node: if is_tunnel {
            u32::from(nodes.place(&known.node, known.interface)?)
        } else {
            0
        },
        mac,
        source: *source,
        ..unknown
    })
}

/// What a policy's flags say of what it is for.
fn is_for(policy: &Policy) -> u32 {
    let mut flags = 0;
    if !policy.destinations.is_empty() {
        flags |= gateway_flag::NAMES;
    }
    if !policy.excluded.is_empty() {
        flags |= gateway_flag::EXCLUDES;
    }
    if policy.cuts {
        flags |= gateway_flag::CUTS;
    }
    flags
}

/// A network as in a longest-prefix match: its prefix's length in bits, and its address.
pub(super) fn network(net: &IpNet) -> Network {
    let mapped = if net.addr().is_ipv4() { 96 } else { 0 };
    let length = mapped + u32::from(net.prefix_len());
    (length, VipKey::from_address(net.network()).0)
}

/// A network by its key.
fn named((length, address): Network) -> Option<IpNet> {
    let address = VipKey(address).address();
    let mapped = if address.is_ipv4() { 96 } else { 0 };
    let length = u8::try_from(length.checked_sub(mapped)?).ok()?;
    IpNet::new(address, length).ok()
}

/// The Ethernet addresses of this node's interfaces, by index.
fn own_macs() -> BTreeMap<u32, [u8; 6]> {
    let Ok(all) = getifaddrs() else {
        return BTreeMap::new();
    };
    all.filter_map(|it| {
        let mac = it.address.as_ref()?.as_link_addr()?.addr()?;
        Some((if_nametoindex(&*it.interface_name).ok()?, mac))
    })
    .collect()
}
