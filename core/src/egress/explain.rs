//! What becomes of a packet that a pod sends, and why: the answer of the same index that the data path follows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::choice::Rank;
use super::inside::{Networks, Place, holding};
use super::{EgressIndex, PodState, shadows};
use crate::ip::Family;
use crate::model::{Condition, EgressPolicy, NodeName, ObjectKey, VirtualIp, bits};

/// What the answer depends on beside the index.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// The nodes.
    pub nodes: BTreeSet<NodeName>,
    /// Those that are not ready, as the API has it.
    pub not_ready: BTreeSet<NodeName>,
    /// All VIPs.
    pub vips: BTreeMap<IpAddr, VirtualIp>,
    /// The Services' cluster addresses.
    pub cluster_ips: BTreeMap<IpAddr, ObjectKey>,
    /// The networks that are its own.
    pub networks: Networks,
}

/// What a step is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// The pod.
    Pod,
    /// Where the packet goes.
    Destination,
    /// The policy that has the pod.
    Policy,
    /// Another that selects it.
    OtherPolicy,
    /// What it leaves by.
    Address,
    /// Where it leaves.
    Gateway,
    /// How many flows it may have.
    Quota,
    /// How fast it may be.
    Bandwidth,
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Destination => "destination",
            Self::Policy => "policy",
            Self::OtherPolicy => "other policy",
            Self::Address => "egress address",
            Self::Gateway => "gateway",
            Self::Quota => "quota",
            Self::Bandwidth => "bandwidth",
        })
    }
}

/// What becomes of a packet that begins a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It leaves by an address of its policy's, at a node.
    Leaves {
        /// The policy.
        policy: Arc<str>,
        /// The address.
        address: IpAddr,
        /// The node.
        gateway: NodeName,
    },
    /// It stays in the cluster: no policy is asked.
    Stays,
    /// No policy is for it: it leaves as if there were none, as a rule with its node's address.
    Plain,
    /// It is dropped, or refused at the gateway.
    Dropped {
        /// The policy that it is dropped for, if it is for one.
        policy: Option<Arc<str>>,
        /// Why, and what to do.
        why: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaves {
                policy,
                address,
                gateway,
            } => write!(
                f,
                "it leaves by {address} at node {gateway}, as EgressPolicy {policy} says"
            ),
            Self::Stays => f.write_str("it stays in the cluster: egress policies do not apply"),
            Self::Plain => f.write_str(
                "it leaves as if there were no egress policies, as a rule with the address of its node",
            ),
            Self::Dropped { why, .. } => write!(f, "it is dropped: {why}"),
        }
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What was found, in order.
    pub steps: Vec<(Topic, String)>,
    /// What follows.
    pub outcome: Outcome,
}

impl EgressIndex {
    /// What becomes of a flow that a pod begins to an address, if all nodes do as they should; nothing, if no such pod is
    /// known. Call [`EgressIndex::reconcile`] first.
    pub fn explain(&self, pod: &ObjectKey, to: IpAddr, cluster: &Cluster) -> Option<Explanation> {
        let state = self.pods.get(pod)?;
        let mut steps = Vec::new();
        let outcome = self.follow(state, to, cluster, &mut steps);
        Some(Explanation { steps, outcome })
    }

    fn follow(
        &self,
        state: &PodState,
        to: IpAddr,
        cluster: &Cluster,
        steps: &mut Vec<(Topic, String)>,
    ) -> Outcome {
        let pod = &state.pod;
        let mut step = |topic, text: String| steps.push((topic, text));
        let node = pod.node.as_ref().map_or("no node", |node| &node.0);
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        let addresses = addresses.join(", ");
        step(Topic::Pod, format!("{} on {node}: {addresses}", pod.key));
        if pod.host_network {
            let text =
                "it is on the host's network: its packets are the node's, and no policy matches it";
            step(Topic::Pod, text.to_owned());
            return Outcome::Plain;
        }
        let family = Family::of(to);
        let own = pod.addresses.iter().find(|own| Family::of(**own) == family);
        let Some(own) = own else {
            let why = format!("the pod has no {family} address");
            return Outcome::Dropped { policy: None, why };
        };
        let (place, is_inside) = self.place(to, cluster);
        step(Topic::Destination, format!("{to} is {place}"));
        let mut claims = state.claims.iter().filter_map(|name| self.policy(name));
        let Some(policy) = claims.next() else {
            step(Topic::Policy, "none selects the pod".to_owned());
            return if is_inside {
                Outcome::Stays
            } else {
                Outcome::Plain
            };
        };
        let name = &policy.name;
        step(Topic::Policy, format!("{name} has the pod"));
        for other in claims {
            let why = if Rank::of(other).is_as_specific_as(&Rank::of(policy)) {
                "is as specific: the first by name has it"
            } else {
                "is less specific"
            };
            let text = format!("{} selects it too, and {why}", other.name);
            step(Topic::OtherPolicy, text);
        }
        let vip = cluster.vips.get(&to).filter(|_| policy.spec.hairpin);
        let is_own = vip.is_some_and(|vip| vip.egress_policies.contains(name));
        if is_own {
            let text = format!("spec.hairpin of {name} is not for its own addresses");
            step(Topic::Policy, text);
        }
        let shadows = vip.map(|_| {
            let pods = self.judged.keys().copied();
            shadows(cluster.vips.keys(), &cluster.networks.with(pods))
        });
        let has_none = shadows.is_some_and(|shadows| !shadows.contains_key(&to));
        if has_none {
            let text = format!(
                "spec.hairpin of {name} cannot be for {to}: another VIP, or pods' addresses, differ from it in the first \
                 four bits only; give its Service another address"
            );
            step(Topic::Policy, text);
        }
        if is_inside && (vip.is_none() || is_own || has_none) {
            return Outcome::Stays;
        }
        let plain = if vip.is_some() {
            let text = format!("spec.hairpin of {name}: to VIPs, too, by the gateway");
            step(Topic::Policy, text);
            Outcome::Stays
        } else {
            Outcome::Plain
        };
        if let Some(net) = holding(&policy.spec.excluded, to) {
            let text = format!("{net} is among spec.excludedCIDRs of {name}");
            step(Topic::Destination, text);
            return plain;
        }
        match holding(&policy.spec.destinations, to) {
            Some(net) if net.prefix_len() > 0 => {
                let text = format!("{net} is among spec.destinationCIDRs of {name}");
                step(Topic::Destination, text);
            }
            None if !policy.spec.destinations.is_empty() => {
                let text = format!("spec.destinationCIDRs of {name} do not hold it");
                step(Topic::Destination, text);
                return plain;
            }
            Some(_) | None => {}
        }
        let dropped = |why: String| Outcome::Dropped {
            policy: Some(name.clone()),
            why,
        };
        let tenant = self.judged.get(own).filter(|judged| judged.pod == pod.key);
        let address = tenant.and_then(|judged| judged.tenant.as_ref()?.egress_ip);
        let Some(address) = address else {
            return dropped(self.why_no_address(policy, &pod.key, family));
        };
        step(Topic::Address, format!("{address}"));
        let vip = cluster.vips.get(&address);
        let Some(gateway) = vip.and_then(|vip| vip.leader.clone()) else {
            let said = vip.and_then(|vip| vip.condition("Announced"));
            let said = said.map_or("no node has said that it leads it".to_owned(), |said| {
                said.message.clone()
            });
            return dropped(format!("there is no gateway: {address}: {said}"));
        };
        let mut at = format!("{gateway}");
        if let Some(standby) = vip.and_then(|vip| vip.standby.as_ref()) {
            at.push_str(", standby ");
            at.push_str(&standby.0);
        }
        if Some(&gateway) == pod.node.as_ref() {
            at += ", the pod's own node";
        }
        step(Topic::Gateway, at);
        let said = vip.and_then(|vip| vip.condition("Announced"));
        if let Some(said) = said.filter(|said| said.status == "False") {
            return dropped(format!("{address}: {}", said.message));
        }
        if !cluster.nodes.contains(&gateway) {
            let text = format!("there is no node {gateway} any more: its successor is being found");
            step(Topic::Gateway, text);
        } else if cluster.not_ready.contains(&gateway) {
            let text = format!("node {gateway} is not ready, as the API server has it");
            step(Topic::Gateway, text);
        }
        let said = vip.and_then(|vip| vip.condition("GatewayReady"));
        if let Some(said) = said.filter(|said| said.status == "False") {
            return dropped(said.message.clone());
        }
        let used = policy.status.ports_in_use;
        match policy.spec.ports.map(u64::from) {
            Some(ports) if used >= ports => {
                return dropped(format!(
                    "all {ports} ports of {name}'s spec.quota.ports are in use: flows that there are go on, new ones are \
                     refused; raise it, or have the pods close what they do not need"
                ));
            }
            Some(ports) => {
                let text = format!("{used} of {ports} ports in use, {} left", ports - used);
                step(Topic::Quota, text);
            }
            None => step(Topic::Quota, format!("{used} ports in use, no limit")),
        }
        if let Some(ports) = policy.spec.ports_per_pod {
            let text = format!(
                "{ports} ports of the pod to one remote address, port and protocol (`landfall egress bindings --by-pod` \
                 shows what it has)"
            );
            step(Topic::Quota, text);
        }
        if let Some(bandwidth) = policy.spec.bandwidth {
            let (rate, burst) = (bits(bandwidth.rate), bits(bandwidth.burst()));
            let text = format!(
                "{rate} bits a second in each direction, {burst} at once after a pause, for all pods of {name} together"
            );
            step(Topic::Bandwidth, text);
        }
        Outcome::Leaves {
            policy: name.clone(),
            address,
            gateway,
        }
    }

    /// What an address is, and whether it is the cluster's own.
    fn place(&self, to: IpAddr, cluster: &Cluster) -> (String, bool) {
        if let Some(vip) = cluster.vips.get(&to) {
            let holders: Vec<String> = vip.holders().iter().map(ToString::to_string).collect();
            let of = if holders.is_empty() {
                "nobody at present".to_owned()
            } else {
                holders.join(", ")
            };
            return (format!("a VIP of this cluster, of {of}"), true);
        }
        if let Some(service) = cluster.cluster_ips.get(&to) {
            let text = format!(
                "the cluster address of Service {service}: the endpoint that kube-proxy picks is judged in its place, ask \
                 about that one"
            );
            return (text, true);
        }
        if let Some(judged) = self.judged.get(&to) {
            return (format!("pod {}", judged.pod), true);
        }
        let text = match cluster.networks.place(to) {
            Some(Place::Node(node)) => format!("node {node}"),
            Some(Place::ApiServer) => "the API server".to_owned(),
            Some(Place::Service(net)) => {
                format!(
                    "in {net}, the network of Services' cluster addresses, and no Service has it"
                )
            }
            Some(Place::Network(net)) => format!("in {net}, which is the cluster's own"),
            None => return ("outside the cluster".to_owned(), false),
        };
        (text, true)
    }

    fn why_no_address(&self, policy: &EgressPolicy, pod: &ObjectKey, family: Family) -> String {
        let name = &policy.name;
        let report = self.report(name).unwrap_or_default();
        if self.offered(name).next().is_none() {
            let said = condition(&policy.status.conditions, "Ready");
            let said = said.map_or(String::new(), |said| format!(": {}", said.message));
            return format!("EgressPolicy {name} has no address{said}");
        }
        if report.lacking.contains(&family) {
            return format!(
                "EgressPolicy {name} has no {family} address: give it one, or none of the pods an {family} address"
            );
        }
        format!(
            "EgressPolicy {name} has no address for pods of namespace {}: its condition NamespacesNotAdmitted says what to do",
            pod.namespace
        )
    }
}

fn condition<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.kind == kind)
}

#[cfg(test)]
mod tests;
