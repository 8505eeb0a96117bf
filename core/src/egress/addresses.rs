//! The addresses that policies use, and the pools that they come from.

use std::net::IpAddr;
use std::sync::Arc;

use super::{EgressIndex, Vip};
use crate::model::{EgressSource, VirtualIp};

impl EgressIndex {
    pub(super) fn touch_pool(&mut self, name: &Arc<str>) {
        for vip in self.vips.values().filter(|vip| vip.pool == *name) {
            self.readdressed.extend(vip.policies.iter().cloned());
        }
        let asking = self
            .policies
            .values()
            .filter(|state| match &state.policy.spec.source {
                EgressSource::Pool { name: asked, .. } => asked == name,
                EgressSource::Addresses(_) | EgressSource::Service(_) => false,
            });
        let asking: Vec<_> = asking.map(|state| state.policy.name.clone()).collect();
        self.readdressed.extend(asking);
    }

    pub(super) fn apply_virtual_ip(&mut self, vip: VirtualIp) {
        let same = self
            .vips
            .get(&vip.address)
            .map_or(vip.egress_policies.is_empty(), |known| {
                known.pool == vip.pool
                    && known.policies == vip.egress_policies
                    && known.terms == vip.terms
            });
        if same {
            return;
        }
        self.forget_virtual_ip(vip.address);
        if vip.egress_policies.is_empty() {
            return;
        }
        for policy in &vip.egress_policies {
            let addresses = self.addresses_of.entry(policy.clone()).or_default();
            addresses.insert(vip.address);
            self.readdressed.insert(policy.clone());
        }
        let known = Vip {
            pool: vip.pool,
            policies: vip.egress_policies,
            terms: vip.terms,
        };
        self.vips.insert(vip.address, known);
    }

    pub(super) fn forget_virtual_ip(&mut self, address: IpAddr) {
        let Some(vip) = self.vips.remove(&address) else {
            return;
        };
        for policy in vip.policies {
            if let Some(addresses) = self.addresses_of.get_mut(&policy) {
                addresses.remove(&address);
                if addresses.is_empty() {
                    self.addresses_of.remove(&policy);
                }
            }
            self.readdressed.insert(policy);
        }
    }
}
