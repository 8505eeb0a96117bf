//! Who could lead a group, on which interfaces, and why not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::peer::{InterfaceFact, NodeRegister};
use crate::groups::{Group, GroupVip, Refused};
use crate::ip::Family;
use crate::model::{NodeName, ObjectKey};

#[cfg(test)]
mod tests;

/// The interface an address is announced on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InterfaceChoice {
    /// Its name.
    pub name: Arc<str>,
    /// No node has a subnet with the address: it is announced on the interface of the default route.
    pub default_route: bool,
}

/// Why a node cannot lead a group now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ineligible {
    /// Neither gossip nor a hello says that it lives.
    NotAlive,
    /// It lives, but its speaker has not said anything about itself yet, or is still listing.
    NotSynced,
    /// Its speaker is stopping.
    Leaving,
    /// Pods leave by the address, and somebody has disarmed this node.
    Disarmed,
    /// Pods leave by the address, this node cannot be their gateway, and another can.
    Gateless,
    /// The sources rule it out.
    Refused(Refused),
    /// None of its interfaces is up in the address's subnet.
    NoSubnet(IpAddr),
    /// None of its interfaces that are up has one of these names.
    NoInterface(Vec<String>),
    /// It neither has the address's subnet nor a default route.
    NoDefaultRoute(IpAddr),
    /// The other nodes do not hear it on the address's segment.
    NotHeard(Arc<str>),
    /// It has no servable endpoint of a Service with `externalTrafficPolicy: Local`.
    NoEndpoint(ObjectKey),
    /// What it knows differs from what the majority knows.
    Odd,
}

impl Ineligible {
    /// Whether its announcements still reach clients and serve them, so that it may wait for a successor.
    pub fn is_soft(&self) -> bool {
        match self {
            Self::Leaving
            | Self::Disarmed
            | Self::Gateless
            | Self::Refused(_)
            | Self::NoEndpoint(_)
            | Self::Odd => true,
            Self::NotAlive
            | Self::NotSynced
            | Self::NoSubnet(_)
            | Self::NoInterface(_)
            | Self::NoDefaultRoute(_)
            | Self::NotHeard(_) => false,
        }
    }
}

impl fmt::Display for Ineligible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAlive => f.write_str("no sign of life from its speaker"),
            Self::NotSynced => f.write_str("its speaker is starting"),
            Self::Leaving => f.write_str("its speaker is stopping"),
            Self::Disarmed => {
                f.write_str("its egress is disarmed (`landfall egress arm` ends that)")
            }
            Self::Gateless => f.write_str(
                "it cannot be the gateway of pods that leave by the address, as its speaker's log says, and another node can",
            ),
            Self::Refused(refused) => refused.fmt(f),
            Self::NoSubnet(vip) => write!(f, "no interface that is up has {vip} in its subnet"),
            Self::NoInterface(patterns) => write!(
                f,
                "no interface that is up is named {} (interfaces)",
                patterns.join(" or ")
            ),
            Self::NoDefaultRoute(vip) => {
                write!(
                    f,
                    "no subnet with {vip} and no interface with a default route"
                )
            }
            Self::NotHeard(interface) => {
                write!(
                    f,
                    "not heard by the other nodes on the segment of {interface}"
                )
            }
            Self::NoEndpoint(service) => write!(
                f,
                "no servable endpoint of {service}, which has externalTrafficPolicy: Local"
            ),
            Self::Odd => f.write_str("its view of the cluster differs from the majority's"),
        }
    }
}

/// Whether a node could lead a group, and on which interface each address would be.
pub type Verdict = Result<BTreeMap<IpAddr, InterfaceChoice>, Ineligible>;

/// A living node, as the rules see it.
pub(super) struct Subject<'a> {
    pub(super) node: &'a NodeName,
    pub(super) register: Option<&'a NodeRegister>,
    pub(super) odd: bool,
}

/// Judges every living node. `leader` is the present one, whose part of a split segment wins a tie.
///
/// Addresses where flows only go on to their end keep nobody from leading the others: if no node could lead all, and the
/// present leader does not go on with all of them either, they count no more.
pub(super) fn judge(
    group: &Group,
    subjects: &[Subject<'_>],
    leader: Option<&NodeName>,
    segments: &mut Segments,
) -> Vec<Verdict> {
    let vips: Vec<&GroupVip> = group.vips.iter().collect();
    let verdicts = judge_for(&vips, group, subjects, leader, segments);
    let goes_on = |(subject, verdict): (&Subject<'_>, &Verdict)| match verdict {
        Ok(_) => true,
        Err(Ineligible::Refused(_)) => Some(subject.node) == leader,
        Err(_) => false,
    };
    if subjects.iter().zip(&verdicts).any(goes_on) {
        return verdicts;
    }
    let needed: Vec<&GroupVip> = group.vips.iter().filter(|vip| !vip.drains).collect();
    if needed.is_empty() || needed.len() == vips.len() {
        return verdicts;
    }
    judge_for(&needed, group, subjects, leader, segments)
}

/// Judges them as leaders of these addresses of the group.
pub(super) fn judge_for(
    vips: &[&GroupVip],
    group: &Group,
    subjects: &[Subject<'_>],
    leader: Option<&NodeName>,
    segments: &mut Segments,
) -> Vec<Verdict> {
    // Per address: whether any living node has it in a subnet. If not, the default route's interface is taken.
    let owned: Vec<bool> = vips
        .iter()
        .map(|vip| is_owned(subjects, vip.address))
        .collect();
    let mut verdicts: Vec<Verdict> = subjects
        .iter()
        .map(|subject| {
            let register = subject.register.ok_or(Ineligible::NotSynced)?;
            if !register.synced {
                return Err(Ineligible::NotSynced);
            }
            let mut choices = BTreeMap::new();
            for (vip, owned) in vips.iter().zip(&owned) {
                let choice = choose(vip, subject.node, register, *owned)?;
                choices.insert(vip.address, choice);
            }
            Ok(choices)
        })
        .collect();
    for vip in vips {
        let seats: Vec<(usize, Arc<str>)> = verdicts
            .iter()
            .enumerate()
            .filter_map(|(at, verdict)| {
                let choice = verdict.as_ref().ok()?.get(&vip.address)?;
                Some((at, choice.name.clone()))
            })
            .collect();
        let deaf = segments.deaf(subjects, &seats, leader);
        for (at, name) in &seats {
            if deaf.contains(subjects[*at].node) {
                verdicts[*at] = Err(Ineligible::NotHeard(name.clone()));
            }
        }
    }
    // What does not keep an announcement from working comes last: these nodes may hand over in peace.
    let can = |subject: &Subject<'_>| subject.register.is_some_and(|it| !it.gateless);
    let has_gateway = !group.egress.is_empty()
        && subjects.iter().zip(&verdicts).any(|(subject, verdict)| {
            verdict.is_ok() && can(subject) && soft(vips, group, subject).is_none()
        });
    for (subject, verdict) in subjects.iter().zip(&mut verdicts) {
        let gateless = (has_gateway && !can(subject)).then_some(Ineligible::Gateless);
        if verdict.is_ok()
            && let Some(reason) = gateless.or_else(|| soft(vips, group, subject))
        {
            *verdict = Err(reason);
        }
    }
    verdicts
}

/// Whether any living node has the address in the subnet of an interface that is up.
fn is_owned(subjects: &[Subject<'_>], address: IpAddr) -> bool {
    subjects.iter().any(|subject| {
        subject.register.is_some_and(|register| {
            register
                .interfaces
                .iter()
                .any(|interface| prefix(interface, address).is_some())
        })
    })
}

/// The interface that each address has at a node.
pub(super) fn places(
    group: &Group,
    subjects: &[Subject<'_>],
    node: &NodeName,
) -> BTreeMap<IpAddr, InterfaceChoice> {
    let own = subjects.iter().find(|subject| subject.node == node);
    let Some(register) = own.and_then(|own| own.register) else {
        return BTreeMap::new();
    };
    group
        .vips
        .iter()
        .filter_map(|vip| {
            let owned = is_owned(subjects, vip.address);
            let choice = choose(vip, node, register, owned).ok()?;
            Some((vip.address, choice))
        })
        .collect()
}

/// The nodes that have an interface for each address, of those that are asked about.
pub(super) fn on_segment(
    group: &Group,
    subjects: &[Subject<'_>],
    asked: impl Fn(&NodeName) -> bool,
) -> BTreeMap<IpAddr, BTreeSet<NodeName>> {
    let nodes_of = |vip: &GroupVip| {
        let owned = is_owned(subjects, vip.address);
        let has_place = |subject: &&Subject<'_>| {
            subject
                .register
                .is_some_and(|register| choose(vip, subject.node, register, owned).is_ok())
        };
        let asked = subjects.iter().filter(|subject| asked(subject.node));
        let nodes = asked.filter(has_place);
        nodes.map(|subject| subject.node.clone()).collect()
    };
    group
        .vips
        .iter()
        .map(|vip| (vip.address, nodes_of(vip)))
        .collect()
}

fn soft(vips: &[&GroupVip], group: &Group, subject: &Subject<'_>) -> Option<Ineligible> {
    let register = subject.register?;
    if register.leaving {
        return Some(Ineligible::Leaving);
    }
    if register.disarmed && !group.egress.is_empty() {
        return Some(Ineligible::Disarmed);
    }
    for vip in vips {
        if let Err(refused) = vip.placement.admission(subject.node) {
            return Some(Ineligible::Refused(refused));
        }
    }
    if !(register.capabilities.steers && group.steers()) {
        for service in &group.services {
            if let Some(nodes) = &service.local_nodes
                && !nodes.contains(subject.node)
            {
                return Some(Ineligible::NoEndpoint(service.key.clone()));
            }
        }
    }
    subject.odd.then_some(Ineligible::Odd)
}

/// The length of the prefix by which an interface that is up owns the address.
fn prefix(interface: &InterfaceFact, address: IpAddr) -> Option<u8> {
    interface
        .up
        .then(|| {
            interface
                .subnets
                .iter()
                .filter(|subnet| subnet.contains(&address))
                .map(ipnet::IpNet::prefix_len)
                .max()
        })
        .flatten()
}

fn choose(
    vip: &GroupVip,
    node: &NodeName,
    register: &NodeRegister,
    owned: bool,
) -> Result<InterfaceChoice, Ineligible> {
    let address = vip.address;
    let up = || register.interfaces.iter().filter(|interface| interface.up);
    let best = |wanted: &dyn Fn(&InterfaceFact) -> bool| {
        up().filter(|interface| wanted(interface))
            .max_by_key(|interface| {
                (
                    prefix(interface, address),
                    std::cmp::Reverse(interface.name.clone()),
                )
            })
            .map(|interface| InterfaceChoice {
                name: interface.name.clone(),
                default_route: false,
            })
    };
    // A node that is not admitted may still hold the address from before: it keeps the interface by subnet.
    let admission = vip.placement.admission(node).ok();
    if let Some(admission) = admission.filter(|admission| !admission.patterns.is_empty()) {
        if let Some(choice) = best(&|interface| admission.names(&interface.name)) {
            return Ok(choice);
        }
        if !admission.by_subnet {
            return Err(Ineligible::NoInterface(admission.patterns.clone()));
        }
    }
    if let Some(choice) = best(&|interface| prefix(interface, address).is_some()) {
        return Ok(choice);
    }
    if owned {
        return Err(Ineligible::NoSubnet(address));
    }
    up().find(|interface| match Family::of(address) {
        Family::V4 => interface.default_route.0,
        Family::V6 => interface.default_route.1,
    })
    .map(|interface| InterfaceChoice {
        name: interface.name.clone(),
        default_route: true,
    })
    .ok_or(Ineligible::NoDefaultRoute(address))
}

/// Who sits where, and whose part of a split wins a tie.
type Seating = (Vec<(NodeName, Arc<str>)>, Option<NodeName>);

/// Which nodes hear each other, kept until anything about nodes changes.
#[derive(Debug, Default)]
pub(super) struct Segments {
    known: BTreeMap<Seating, Arc<BTreeSet<NodeName>>>,
}

impl Segments {
    pub(super) fn forget(&mut self) {
        self.known.clear();
    }

    /// The nodes that sit outside the largest set of nodes that hear each other, directly or by others.
    fn deaf(
        &mut self,
        subjects: &[Subject<'_>],
        seats: &[(usize, Arc<str>)],
        leader: Option<&NodeName>,
    ) -> Arc<BTreeSet<NodeName>> {
        let key: Seating = (
            seats
                .iter()
                .map(|(at, name)| (subjects[*at].node.clone(), name.clone()))
                .collect(),
            leader.cloned(),
        );
        self.known
            .entry(key)
            .or_insert_with(|| Arc::new(outside_largest(subjects, seats, leader)))
            .clone()
    }
}

fn outside_largest(
    subjects: &[Subject<'_>],
    seats: &[(usize, Arc<str>)],
    leader: Option<&NodeName>,
) -> BTreeSet<NodeName> {
    let hears = |(at, name): &(usize, Arc<str>), other: &NodeName| {
        subjects[*at].register.is_some_and(|register| {
            register
                .interfaces
                .iter()
                .any(|interface| interface.name == *name && interface.heard.contains(other))
        })
    };
    let mut component: Vec<usize> = (0..seats.len()).collect();
    for left in 0..seats.len() {
        for right in left + 1..seats.len() {
            let (a, b) = (&seats[left], &seats[right]);
            if component[left] != component[right]
                && hears(a, subjects[b.0].node)
                && hears(b, subjects[a.0].node)
            {
                let (from, to) = (component[right], component[left]);
                for member in &mut component {
                    if *member == from {
                        *member = to;
                    }
                }
            }
        }
    }
    let mut members: BTreeMap<usize, BTreeSet<&NodeName>> = BTreeMap::new();
    for (seat, root) in seats.iter().zip(&component) {
        members
            .entry(*root)
            .or_default()
            .insert(subjects[seat.0].node);
    }
    let largest = members
        .iter()
        .max_by_key(|(_, nodes)| {
            (
                nodes.len(),
                leader.is_some_and(|leader| nodes.contains(leader)),
                std::cmp::Reverse(nodes.first().copied()),
            )
        })
        .map(|(root, _)| *root);
    members
        .into_iter()
        .filter(|(root, _)| Some(*root) != largest)
        .flat_map(|(_, nodes)| nodes.into_iter().cloned())
        .collect()
}
