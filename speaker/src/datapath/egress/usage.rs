//! What a policy's pods use of this node as their gateway, and what was refused them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use landfall_ebpf_common::egress::gateway::PolicyCount;

use super::tally::Bindings;

/// Of one policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// This node is its gateway; else it has flows from before.
    pub is_gateway: bool,
    /// Ports in use now.
    pub ports: u64,
    /// Most ports of all pods together; 0 for no limit.
    pub quota: u32,
    /// Most ports of a pod to one remote address, port and protocol; 0 for no limit.
    pub quota_per_pod: u32,
    /// Bindings by egress address, as they were a moment ago.
    pub bindings: BTreeMap<IpAddr, Bindings>,
    /// Packets, all CPUs together, since the maps were made.
    pub count: PolicyCount,
    /// What of it was there when this process began.
    pub earlier: PolicyCount,
}

impl Usage {
    /// Bindings to all egress addresses.
    pub fn total(&self) -> Bindings {
        let sum = |part: fn(&Bindings) -> u64| self.bindings.values().map(part).sum();
        Bindings {
            live: sum(|bindings| bindings.live),
            resting: sum(|bindings| bindings.resting),
        }
    }

    /// Packets that were refused or dropped, by a word for the reason.
    pub fn drops(&self) -> [(&'static str, u64); 5] {
        drops(&self.count)
    }
}

/// What of it was refused or dropped, by a word for the reason.
pub fn drops(count: &PolicyCount) -> [(&'static str, u64); 5] {
    [
        ("quota", count.quota),
        ("no-port", count.no_port),
        ("no-room", count.no_room),
        ("bandwidth", count.bandwidth),
        ("others", count.others),
    ]
}
