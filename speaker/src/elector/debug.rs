//! What `/debug/state` shows, for people, `landfall lab` and `landfall status`.
//!
//! ```json
//! {"node": "n1", "boot": "…", "listening": false, "reporter": true,
//!  "groups": [{"group": "10.88.0.200", "vips": ["10.88.0.200"], "services": ["default/web"], "leader": "n1",
//!              "standby": "n2", "epoch": 3, "since": 1700000000000, "interface": "eth0", "ready": true,
//!              "reason": null, "nodes": {"n3": "no sign of life from its speaker"}}],
//!  "peers": [{"name": "n2", "alive": true, "gossip": true, "heard": ["eth0"], "synced": true, "leaving": false}],
//!  "interfaces": [{"name": "eth0", "index": 2, "mac": "…", "up": true, "hello": true}],
//!  "steering": {"nodes": [{"name": "n2", "interface": 2, "alive": true, "suspected": false, "steers": true,
//!                           "mac": "…"}],
//!               "ports": {"10.88.0.200:80/TCP": {"n1": 1, "n2": 3}},
//!               "tables": {"10.88.0.200:80/TCP": {"generation": 7, "digest": "7b4db4129cec6df2"}}},
//!  "egress": {"synced": true, "judged": 2, "policies": {"mail": {"10.244.1.7": "10.88.0.230"}},
//!             "gateways": {"mail": {"node": "n2", "settled": true}}, "settled": ["mail"]}}
//! ```
//! `since` is in milliseconds since the Unix epoch; `reason` says why nobody leads; `nodes` holds those that
//! could not lead, with why. `steering` is what the data path was told: a port's nodes with their weights.
//! The `digest` of these is the same on all nodes whose tables are; the `generation` is this node's own count, which grows
//! with every change of the table, and begins anew with the speaker. `egress` has the tenants of each policy with the
//! address that each leaves by, of `judged` pods' addresses; each policy's gateway, which packets are led to once it is
//! `settled`; and the policies of which this node says that of itself.

use std::collections::BTreeMap;
use std::net::IpAddr;

use landfall_core::groups::Group;
use serde_json::{Value, json};

use super::Speaker;

impl Speaker {
    /// Everything worth seeing.
    pub fn debug(&self) -> Value {
        let groups: Vec<Value> = self
            .index
            .groups()
            .values()
            .map(|group| self.debug_group(group))
            .collect();
        let peers: Vec<Value> = self
            .election
            .peers()
            .map(|peer| {
                json!({
                    "name": peer.name, "alive": peer.alive, "gossip": peer.gossip,
                    "heard": peer.heard, "synced": peer.synced, "leaving": peer.leaving,
                })
            })
            .collect();
        let interfaces: Vec<Value> = self
            .interfaces()
            .iter()
            .map(|interface| {
                json!({
                    "name": interface.name, "index": interface.index,
                    "mac": interface.mac.to_string(), "up": interface.up,
                    "hello": self.uplinks.contains(&interface.index),
                })
            })
            .collect();
        json!({
            "node": self.identity.node,
            "boot": self.identity.boot.to_string(),
            "listening": self.election.is_listening(),
            "reporter": self.election.is_reporter(),
            "groups": groups,
            "peers": peers,
            "interfaces": interfaces,
            "steering": self.told.debug(),
            "egress": self.debug_egress(),
        })
    }

    /// Each policy with the pods' addresses that are its tenants, and what they leave by.
    fn debug_egress(&self) -> Value {
        let mut policies: BTreeMap<&str, BTreeMap<String, Option<IpAddr>>> = BTreeMap::new();
        for policy in self.egress.policies() {
            policies.entry(&policy.name).or_default();
        }
        for (address, judged) in self.egress.judged() {
            if let Some(tenant) = &judged.tenant {
                let tenants = policies.entry(&tenant.policy).or_default();
                tenants.insert(address.to_string(), tenant.egress_ip);
            }
        }
        let gateways: BTreeMap<&str, Value> = self
            .plan
            .wanted()
            .policies
            .iter()
            .map(|(name, policy)| {
                let gateway = policy.gateway.as_ref();
                let gateway = gateway.map(|it| json!({"node": it.node, "settled": it.settled}));
                (&**name, gateway.unwrap_or_default())
            })
            .collect();
        json!({
            "synced": self.egress.is_synced(),
            "judged": self.egress.judged().len(),
            "policies": policies,
            "gateways": gateways,
            "settled": self.settled(),
        })
    }

    fn debug_group(&self, group: &Group) -> Value {
        let view = self.election.view(&group.id).cloned().unwrap_or_default();
        let verdicts = self.election.explain(group, &self.index);
        let refused: BTreeMap<String, String> = verdicts
            .iter()
            .filter_map(|(node, verdict)| {
                Some((node.to_string(), verdict.as_ref().err()?.to_string()))
            })
            .collect();
        let interface = view
            .leader
            .as_ref()
            .and_then(|leader| verdicts.get(leader)?.as_ref().ok())
            .and_then(|places| places.values().next())
            .map(|place| place.name.clone());
        let reason = view.leader.is_none().then_some(if view.eligible == 0 {
            "no eligible node"
        } else {
            "being elected"
        });
        let conflicts: BTreeMap<String, String> = group
            .vips
            .iter()
            .filter_map(|vip| {
                let conflict = self.conflicts.get(&vip.address)?;
                Some((vip.address.to_string(), conflict.by.to_string()))
            })
            .collect();
        let vips: Vec<String> = group
            .vips
            .iter()
            .map(|vip| vip.address.to_string())
            .collect();
        let services: Vec<String> = group.services.iter().map(|s| s.key.to_string()).collect();
        json!({
            "group": group.id,
            "vips": vips,
            "services": services,
            "egressPolicies": group.egress,
            "leader": view.leader,
            "standby": view.standby,
            "epoch": view.epoch,
            "since": view.since,
            "interface": interface,
            "ready": self.election.is_ready(&group.id),
            "reason": reason,
            "nodes": refused,
            "conflicts": conflicts,
        })
    }
}
