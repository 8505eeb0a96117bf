//! What policies' pods use of this node, looked at now and then; and this node taken out of it all, by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use landfall_core::groups::GroupId;
use landfall_ebpf_common::egress::gateway::PolicyCount;

use super::super::Speaker;
use crate::datapath::egress::{Bound, Usage};
use crate::egress::PolicyName;

/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How long no flow is to be found before none is left: nodes hear of a policy's end one after the other, and who has taken
/// over may have copies to place.
const QUIET: Duration = Duration::from_secs(10);

/// What was found at the last look.
#[derive(Debug, Default)]
pub(in super::super) struct Uses {
    due: Duration,
    /// What each policy's pods use of this node as their gateway.
    usage: BTreeMap<PolicyName, Usage>,
    /// Packets of this node's pods that were dropped for want of a gateway.
    dropped: BTreeMap<PolicyName, u64>,
    /// Since when this node has found no flow of a policy on an address that it leads, where none begins any more.
    quiet: BTreeMap<(IpAddr, PolicyName), Duration>,
    /// When it was looked last.
    looked: Duration,
    /// Somebody wants this node out of it: it hands over what it is the gateway of.
    handing_over: bool,
    /// It is out of it.
    disarmed: bool,
}

impl Speaker {
    /// Looks what is used, if it is time; the groups that this node leads of which something is said.
    pub(in super::super) fn look_at_usage(&mut self, now: Duration) -> BTreeSet<GroupId> {
        if now < self.uses.due {
            return BTreeSet::new();
        }
        self.uses.due = now + LOOK_EVERY;
        self.uses.usage = self.parts.datapath.usage();
        self.uses.dropped = self.parts.rules.egress_dropped();
        for (policy, packets) in self.parts.datapath.egress_dropped() {
            *self.uses.dropped.entry(policy).or_default() += packets;
        }
        self.look_what_drains(now);
        let led = self.election.leaderships();
        led.filter(|(id, _)| self.group(id).is_some_and(|group| !group.egress.is_empty()))
            .map(|(id, _)| id.clone())
            .collect()
    }

    fn look_what_drains(&mut self, now: Duration) {
        self.uses.looked = now;
        let mut quiet = BTreeMap::new();
        for policy in self.gateway_of() {
            // Who cannot look cannot say.
            let usage = self.uses.usage.get(&policy);
            let looks = usage.is_some() || !self.treats_egress();
            // Who is waited for is on record by then: what was said before that would not be heard.
            let on_record = |address: &IpAddr| {
                let vip = self.index.virtual_ip(*address);
                vip.is_some_and(|vip| vip.drains(&policy))
            };
            for address in self.egress.draining(&policy).into_iter().filter(on_record) {
                let live = usage.and_then(|usage| usage.bindings.get(&address));
                if looks && live.is_none_or(|it| it.live == 0) {
                    let at = (address, policy.clone());
                    let since = self.uses.quiet.get(&at).copied().unwrap_or(now);
                    quiet.insert(at, since);
                }
            }
        }
        self.uses.quiet = quiet;
    }

    /// The policies whose flows on an address go on and none begins, and whether all have ended.
    pub fn draining_on(&self, address: IpAddr) -> BTreeMap<PolicyName, bool> {
        let vip = self.index.virtual_ip(address);
        let named = vip.into_iter().flat_map(|vip| &vip.egress_policies);
        let drains = |policy: &&PolicyName| self.egress.draining(policy).contains(&address);
        let is_over = |policy: &PolicyName| {
            let since = self.uses.quiet.get(&(address, policy.clone()));
            since.is_some_and(|since| self.uses.looked.saturating_sub(*since) >= QUIET)
        };
        named
            .filter(drains)
            .map(|policy| (policy.clone(), is_over(policy)))
            .collect()
    }

    /// What each policy's pods use of this node as their gateway, as it was seconds ago.
    pub fn usage(&self) -> &BTreeMap<PolicyName, Usage> {
        &self.uses.usage
    }

    /// Packets of this node's pods that its rules have dropped for want of a gateway, by policy, likewise.
    pub fn dropped_for_no_gateway(&self) -> &BTreeMap<PolicyName, u64> {
        &self.uses.dropped
    }

    /// The ports that flows of each policy's pods have on an address here.
    pub fn ports_of(&self, address: IpAddr) -> BTreeMap<PolicyName, u64> {
        let of = |usage: &Usage| usage.bindings.get(&address).map(|it| it.live);
        self.uses
            .usage
            .iter()
            .filter_map(|(policy, usage)| Some((policy.clone(), of(usage)?)))
            .collect()
    }

    /// The data path, for those who list bindings: that takes long, and needs nothing of what is here.
    pub fn bindings(&self) -> Bindings {
        Bindings(self.parts.datapath.clone())
    }

    /// The policies that are known, gone ones whose flows go on among them.
    pub fn policies(&self) -> impl Iterator<Item = &PolicyName> {
        self.plan.policies()
    }

    /// The policies that this node is the gateway of, as the election has it.
    pub fn gateway_of(&self) -> BTreeSet<PolicyName> {
        let led = self.election.leaderships();
        led.filter_map(|(id, _)| self.group(id))
            .flat_map(|group| group.egress.iter().cloned())
            .collect()
    }

    /// The addresses of these, and those where flows of policies that are gone go on.
    pub fn led_egress(&self) -> BTreeSet<IpAddr> {
        let led = self.election.leaderships();
        led.filter_map(|(id, _)| self.group(id))
            .flat_map(|group| group.vips.iter().map(|vip| vip.address))
            .collect()
    }

    /// Whether packets of egress policies' pods are treated on this node at all.
    pub fn treats_egress(&self) -> bool {
        self.identity.egress_mark.is_some()
    }

    /// Whether this node was taken out of it.
    pub fn is_disarmed(&self) -> bool {
        self.uses.disarmed
    }

    /// This node hands over what it is the gateway of, where another can be; or it may be the gateway again.
    pub fn hand_over_egress(&mut self, over: bool) {
        self.uses.handing_over = over;
    }

    /// Whether it does.
    pub(in super::super) fn hands_egress_over(&self) -> bool {
        self.uses.handing_over
    }

    /// Takes this node's rules, guard and gateway away, or puts them back. Pods then leave as without policies, with
    /// whatever source the node gives them.
    pub fn disarm(&mut self, disarmed: bool, now: Duration) {
        self.uses.disarmed = disarmed;
        self.gates.look_again();
        self.uses.handing_over = false;
        self.election.set_disarmed(disarmed);
        self.parts.datapath.disarm(disarmed);
        self.metrics.egress_disarmed.set(i64::from(disarmed));
        if disarmed {
            tracing::warn!(
                "egress is disarmed on this node: its pods leave as if there were no egress policies, until somebody arms it or the speaker restarts"
            );
        } else {
            tracing::info!("egress is armed on this node again");
        }
        self.apply_soon(now);
    }
}

/// Reads bindings.
#[derive(Clone)]
pub struct Bindings(std::sync::Arc<dyn crate::datapath::DataPath>);

impl Bindings {
    /// Those that `wanted` says yes to, and how many there are more than `most` of them. It reads all there are.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn list(
        &self,
        most: usize,
        wanted: &dyn Fn(&Bound) -> bool,
    ) -> std::io::Result<(Vec<Bound>, usize)> {
        self.0.bindings(most, wanted)
    }

    /// What was counted of each pod, by its address.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn counts(&self) -> std::io::Result<BTreeMap<IpAddr, PolicyCount>> {
        self.0.pod_counts()
    }
}
