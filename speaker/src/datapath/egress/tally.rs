//! How many bindings there are, by policy and egress address: what the keeper has counted at its last look.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::{Address, Binding, Claim, Key, phase};

/// Bindings of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bindings {
    /// Of flows that live: each has a port in use.
    pub live: u64,
    /// Of flows that have ended: their ports rest.
    pub resting: u64,
}

/// Bindings by the number of their policy and their egress address.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Tally(HashMap<u16, BTreeMap<[u8; 16], Bindings>>);

impl Tally {
    /// Counts an entry of a map *in*.
    pub(super) fn count<A: Address>(&mut self, key: &Key<A>, binding: &Binding<A>) {
        let of_policy = self.0.entry(binding.policy).or_default();
        let bindings = of_policy.entry(key.local.mapped()).or_default();
        if Claim::read(binding.claim).phase == phase::CLOSED {
            bindings.resting += 1;
        } else {
            bindings.live += 1;
        }
    }

    /// Whether no flow lives.
    pub(super) fn is_idle(&self) -> bool {
        let mut bindings = self.0.values().flat_map(BTreeMap::values);
        bindings.all(|bindings| bindings.live == 0)
    }

    /// Of a policy, by egress address.
    pub(super) fn of(&self, policy: u16) -> BTreeMap<IpAddr, Bindings> {
        let all = self.0.get(&policy).into_iter().flatten();
        all.map(|(address, bindings)| (VipKey(*address).address(), *bindings))
            .collect()
    }
}
