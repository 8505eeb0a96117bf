//! The ways by which tenants' packets leave this node, and the marks by which these find their routes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use landfall_core::model::NodeName;

use super::super::{Config, Leaving};
use crate::egress::Gateway;

/// An uplink, and whether its packets go to another node or leave from here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) struct Way {
    pub(in super::super) uplink: Arc<str>,
    /// This node is the gateway.
    pub(in super::super) here: bool,
}

/// The ways, each with its value in the bits of the uplinks' mark.
pub(in super::super) type Ways = BTreeMap<Way, u32>;

impl Way {
    /// The way to a gateway, seen from a node; nothing, if it is not known how to reach it.
    pub(in super::super) fn to(gateway: &Gateway, from: &NodeName) -> Option<Self> {
        let here = gateway.node == *from;
        (here || gateway.mac.is_some()).then(|| Self {
            uplink: gateway.uplink.clone(),
            here,
        })
    }
}

/// The ways to all policies' gateways.
pub(in super::super) fn wanted(leaving: &Leaving) -> BTreeSet<Way> {
    let policies = leaving.egress.policies.values();
    policies
        .filter_map(|policy| Way::to(policy.gateway.as_ref()?, &leaving.node))
        .collect()
}

/// Gives each a value; those that have one keep it, so that a packet on its way goes where it was meant to. Those for
/// which none is left have none, and a word is said on each.
pub(in super::super) fn assigned(
    wanted: &BTreeSet<Way>,
    known: &Ways,
    config: &Config,
) -> (Ways, Vec<String>) {
    let mut ways: Ways = known
        .iter()
        .filter(|(way, _)| wanted.contains(*way))
        .map(|(way, value)| (way.clone(), *value))
        .collect();
    let mut missing = Vec::new();
    for way in wanted {
        if ways.contains_key(way) {
            continue;
        }
        let used: BTreeSet<u32> = ways.values().copied().collect();
        match config.ways().find(|value| !used.contains(value)) {
            Some(value) => {
                ways.insert(way.clone(), value);
            }
            None => missing.push(format!(
                "{}: no mark is left for what leaves by it: its tenants' packets are dropped; widen the mark's mask \
                 {:#x}",
                way.uplink, config.mark_mask
            )),
        }
    }
    (ways, missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_way(uplink: &str, here: bool) -> Way {
        Way {
            uplink: uplink.into(),
            here,
        }
    }

    #[test]
    fn a_way_keeps_its_value_and_the_last_has_none() {
        let config = Config::default();
        let first = BTreeSet::from([mk_way("eth1", false)]);
        let (ways, missing) = assigned(&first, &Ways::new(), &config);
        assert_eq!(missing, [""; 0]);
        let value = ways[&mk_way("eth1", false)];
        let more = [
            ("eth0", false),
            ("eth0", true),
            ("eth1", false),
            ("eth1", true),
            ("eth2", true),
        ];
        let more = more.map(|(uplink, here)| mk_way(uplink, here));
        let (ways, missing) = assigned(&more.clone().into(), &ways, &config);
        assert_eq!(ways[&mk_way("eth1", false)], value);
        let values: BTreeSet<u32> = ways.values().copied().collect();
        assert_eq!(values, [0, 0x1000, 0x2000, 0x3000].into());
        assert_eq!((ways.len(), missing.len()), (4, 1));
        assert!(!ways.contains_key(&more[4]), "{ways:?}");
        assert!(missing[0].starts_with("eth2: "), "{missing:?}");
    }
}
