//! Connections that are tracked already when it changes whose tenant a pod is. Connection tracking goes on with the source
//! that a connection got with its first packet, whatever the rules say now.
//!
//! - A pod becomes a tenant: what was translated before stays so until it ends, and is marked to be known for that; or is
//!   ended, if it goes where the policy is for, and the policy says so.
//! - A tenant's policy is for other destinations: what the policy was not for when it began stays likewise, by the rules'
//!   mark, and what left by the policy goes on so.
//! - A pod is a tenant no more, or another policy's: what kept the pod's address by our word would leave with it, or by the
//!   other's gateway. It is marked to be known for what began before, and goes on by the gateway of that; or is ended, if
//!   the policy that is gone says so.
//! - A remote has become the cluster's own: what left by a policy would reach it with the pod's address, and is ended.
//! - The table was gone for a while, or an address is a new pod's: what somebody else translated is ended.
//!
//! What is ended begins anew with its next packet. Meanwhile the rules drop it.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use super::super::{Config, Leaving, Rules};
use super::{merged, own, tenants};
use crate::conntrack::{CONNTRACK, DELETE, GET, NEW, Side, address_of, attribute};
use crate::egress::{Egress, Pod};
use crate::netlink::{DUMP, NESTED, Requests, find, put};

/// `IPS_SRC_NAT` (`linux/netfilter/nf_conntrack_common.h`): it has another source than its pod.
const OTHER_SOURCE: u32 = 1 << 4;

/// What the rules said before they were written anew.
#[derive(Clone, Debug)]
pub(in super::super) enum Before {
    /// An earlier process's word. The connections of these pods have changed sides already, by a table that could not be
    /// written.
    Earlier(BTreeSet<IpAddr>),
    /// This process's or somebody else's, who has changed them.
    Unknown,
    /// Nothing was there.
    Unarmed,
    /// This.
    Armed(Arc<Leaving>),
}

/// What is to be done with connections of pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Settling {
    /// What was translated before stays.
    keep: BTreeSet<IpAddr>,
    /// Whose policies say what is cut.
    egress_now: Arc<Egress>,
    /// What was translated before ends where their policies are for, if these say so.
    cut: BTreeSet<IpAddr>,
    /// What was translated by others ends.
    end: BTreeSet<IpAddr>,
    /// They are new pods': what was translated for who had them before ends, whatever it was.
    fresh: BTreeSet<IpAddr>,
    /// What kept its address is from before now.
    part: BTreeSet<IpAddr>,
    /// The same, and what was from before is not.
    swap: BTreeSet<IpAddr>,
    /// What kept its address, and is not from before, ends.
    free: BTreeSet<IpAddr>,
    /// What is from before ends.
    free_former: BTreeSet<IpAddr>,
    /// All that kept its address ends, of all pods.
    free_all: bool,
    /// The same of what is between two of the cluster's own.
    free_inside: bool,
    inside: Vec<IpNet>,
    vips: BTreeSet<IpAddr>,
    judged: u32,
    egress: u32,
}

/// What follows from a change: what is to be done before the rules say so, and what after.
pub(in super::super) fn settling(
    before: Option<&Before>,
    now: &Rules,
    config: &Config,
) -> (Settling, Settling) {
    let (judged, egress) = config.egress_marks();
    let mut first = Settling {
        judged,
        egress,
        vips: now.vips.clone(),
        ..Settling::default()
    };
    let Some(leaving) = &now.egress else {
        let mut then = first.clone();
        then.free_all = !matches!(before, Some(Before::Unarmed));
        return (first, then);
    };
    first.inside = merged(&leaving.egress.inside);
    first.egress_now = leaving.egress.clone();
    let mut then = first.clone();
    match before {
        None | Some(Before::Earlier(_) | Before::Unknown) => {
            then.free_inside = true;
            then.end = tenants(leaving);
            let swapped = match before {
                Some(Before::Earlier(swapped)) => Some(swapped),
                _ => None,
            };
            for (address, pod) in own(leaving) {
                let was = leaving.egress.earlier.get(&address);
                if let Some(was) = was.filter(|_| swapped.is_some()) {
                    moved(address, was, pod, &mut first, &mut then);
                } else if pod.tenant.is_none() && pod.former.is_some() {
                    first.part.insert(address);
                } else if pod.tenant.is_none() {
                    then.free.insert(address);
                    then.free_former.insert(address);
                }
            }
            first
                .swap
                .retain(|address| !swapped.is_some_and(|swapped| swapped.contains(address)));
        }
        Some(Before::Unarmed) => then.keep = tenants(leaving),
        Some(Before::Armed(old)) if Arc::ptr_eq(old, leaving) => {}
        Some(Before::Armed(old)) => {
            then.free_inside = !leaving.egress.inside.is_subset(&old.egress.inside);
            for (address, pod) in own(leaving) {
                let was = old.egress.pods.get(&address);
                match was.filter(|was| was.node == old.node) {
                    Some(was) => {
                        moved(address, was, pod, &mut first, &mut then);
                        if was.tenant.is_some() && cuts_more(address, &old.egress, &leaving.egress)
                        {
                            then.cut.insert(address);
                        }
                    }
                    None if pod.tenant.is_some() => {
                        then.fresh.insert(address);
                    }
                    None => {
                        then.free.insert(address);
                        then.free_former.insert(address);
                    }
                }
            }
        }
    }
    (first, then)
}

/// What follows from a change of whose a pod is.
fn moved(address: IpAddr, was: &Pod, is: &Pod, first: &mut Settling, then: &mut Settling) {
    if was.tenant.is_none() && is.tenant.is_some() {
        then.keep.insert(address);
    }
    if was.former.is_some() && is.former.is_none() {
        then.free_former.insert(address);
    }
    let left = was.policy().filter(|left| is.policy() != Some(*left));
    let Some(left) = left else { return };
    if is.former.as_ref() != Some(left) {
        then.free.insert(address);
        return;
    }
    if was.former.is_some() && was.former.as_ref() == is.policy() {
        first.swap.insert(address);
        return;
    }
    // What began in between is not told from what begins now, and begins anew.
    first.part.insert(address);
    then.free.insert(address);
    // There is room for one policy's flows from before.
    if was.former.as_ref().is_some_and(|former| former != left) {
        first.free_former.insert(address);
    }
}

/// Whether a tenant's policy cuts what was there before, and is another one or for other destinations than it was.
fn cuts_more(address: IpAddr, old: &Egress, new: &Egress) -> bool {
    match (old.policy_of(address), new.policy_of(address)) {
        (Some(old), Some(new)) => {
            let same = (&old.destinations, &old.excluded) == (&new.destinations, &new.excluded);
            new.cuts && !same
        }
        (None, Some(new)) => new.cuts,
        (_, None) => false,
    }
}

/// What is to be done with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The mark of what was judged is set, or taken.
    Marked(bool),
    Ended,
}

/// A connection, as far as it matters.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Who began it, with whom.
    from: IpAddr,
    to: IpAddr,
    /// Who answers.
    peer: IpAddr,
    status: u32,
    mark: u32,
}

impl Settling {
    /// Whether a connection goes where its pod's policy is for, and that cuts what was there before.
    fn is_cut(&self, known: &Known) -> bool {
        let policy = self.egress_now.policy_of(known.from);
        policy.is_some_and(|policy| policy.cuts && policy.is_for(known.peer))
    }

    /// Whose connections change sides: once more, and they are where they were.
    pub(in super::super) fn swapped(&self) -> impl Iterator<Item = IpAddr> {
        self.swap.iter().copied()
    }

    fn is_empty(&self) -> bool {
        let sets = [
            &self.keep,
            &self.cut,
            &self.end,
            &self.fresh,
            &self.part,
            &self.swap,
            &self.free,
            &self.free_former,
        ];
        sets.iter().all(|set| set.is_empty()) && !self.free_all && !self.free_inside
    }

    fn fate(&self, known: &Known) -> Option<Fate> {
        let ours = known.mark & self.egress != 0;
        let is_former = known.mark & self.judged != 0;
        let of = |set: &BTreeSet<IpAddr>| set.contains(&known.from) || set.contains(&known.to);
        if ours {
            let freed = if is_former {
                &self.free_former
            } else {
                &self.free
            };
            let joined = self.free_inside && self.is_own(known.from) && self.is_own(known.peer);
            return if self.free_all || joined || of(freed) {
                Some(Fate::Ended)
            } else if of(&self.swap) || of(&self.part) && !is_former {
                Some(Fate::Marked(!is_former))
            } else {
                None
            };
        }
        if known.status & OTHER_SOURCE == 0 || self.is_inside(known.peer) {
            return None;
        }
        let is_of = |pods: &BTreeSet<IpAddr>| pods.contains(&known.from);
        let is_kept = known.mark & self.judged != 0;
        let was_before = is_of(&self.keep) || is_of(&self.cut);
        let ends =
            is_of(&self.fresh) || is_of(&self.end) && !is_kept || was_before && self.is_cut(known);
        if ends {
            return Some(Fate::Ended);
        }
        (is_of(&self.keep) && !is_kept).then_some(Fate::Marked(true))
    }

    fn is_inside(&self, address: IpAddr) -> bool {
        self.vips.contains(&address) || self.is_own(address)
    }

    /// Whether an address is of the cluster's own networks, and no VIP.
    fn is_own(&self, address: IpAddr) -> bool {
        self.inside.iter().any(|net| net.contains(&address))
    }

    /// Does it; how many connections were ended.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub(in super::super) fn settle(&self) -> io::Result<usize> {
        const ANY_FAMILY: [u8; 4] = [0; 4];
        if self.is_empty() {
            return Ok(0);
        }
        let requests = Requests::open(NETLINK_NETFILTER)?;
        let mut orders = Vec::new();
        let read = requests.ask(CONNTRACK << 8 | GET, DUMP, &ANY_FAMILY, |entry| {
            orders.extend(self.order(entry));
        });
        match read {
            // Entries came or went meanwhile; those that were read are right.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => read?,
        }
        let mut ended = 0;
        for (fate, body) in orders {
            let kind = match fate {
                Fate::Marked(_) => NEW,
                Fate::Ended => DELETE,
            };
            match requests.ask(CONNTRACK << 8 | kind, 0, &body, |_| {}) {
                Ok(()) => ended += usize::from(fate == Fate::Ended),
                // It has ended by itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(ended)
    }

    /// The request that an entry calls for.
    fn order(&self, entry: &[u8]) -> Option<(Fate, Vec<u8>)> {
        let (header, attributes) = entry.split_first_chunk::<4>()?;
        let original = find(attributes, attribute::ORIGINAL)?;
        let number = |kind| {
            let bytes = find(attributes, kind).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_be_bytes)
        };
        let fate = self.fate(&Known {
            from: address_of(original, Side::Source)?,
            to: address_of(original, Side::Destination)?,
            peer: address_of(find(attributes, attribute::REPLY)?, Side::Source)?,
            status: number(attribute::STATUS),
            mark: number(attribute::MARK),
        })?;
        let mut body = header.to_vec();
        put(&mut body, attribute::ORIGINAL | NESTED, original);
        if let Some(zone) = find(attributes, attribute::ZONE) {
            put(&mut body, attribute::ZONE, zone);
        }
        match fate {
            Fate::Marked(set) => {
                let mark = if set { self.judged } else { 0 };
                put(&mut body, attribute::MARK, &mark.to_be_bytes());
                put(&mut body, attribute::MARK_MASK, &self.judged.to_be_bytes());
            }
            Fate::Ended => {
                if let Some(id) = find(attributes, attribute::ID) {
                    put(&mut body, attribute::ID, id);
                }
            }
        }
        Some((fate, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::egress::{Policy, Tenant};

    const JUDGED: u32 = 0x1000_0000;
    const EGRESS: u32 = 0x2000_0000;

    fn mk_address(last: u8) -> IpAddr {
        [10, 244, 1, last].into()
    }

    /// Pods by the last number of their address, and whether they are tenants.
    fn mk_rules(pods: &[(u8, bool)]) -> Rules {
        let pod = |(last, tenant): &(u8, bool)| {
            let tenant = tenant.then(|| Tenant {
                policy: "mail".into(),
                egress_ip: Some([192, 0, 2, 250].into()),
            });
            let node = "here".into();
            let identity = 1;
            (
                mk_address(*last),
                Pod {
                    node,
                    tenant,
                    identity,
                    former: None,
                },
            )
        };
        Rules {
            egress: Some(Arc::new(Leaving {
                node: "here".into(),
                egress: Arc::new(Egress {
                    pods: pods.iter().map(pod).collect(),
                    inside: ["10.0.0.0/8".parse().unwrap()].into(),
                    ..Egress::default()
                }),
                uplinks: BTreeSet::new(),
            })),
            ..Rules::default()
        }
    }

    fn mk_known(from: u8, peer: [u8; 4], status: u32, mark: u32) -> Known {
        Known {
            from: mk_address(from),
            to: peer.into(),
            peer: peer.into(),
            status,
            mark,
        }
    }

    fn set(of: &[u8]) -> BTreeSet<IpAddr> {
        of.iter().map(|last| mk_address(*last)).collect()
    }

    #[test]
    fn what_is_done_follows_from_who_was_whose() {
        let config = Config::default();
        let old = mk_rules(&[(1, true), (2, false), (3, true), (4, false)]);
        let new = mk_rules(&[(1, true), (2, true), (3, false), (5, true), (6, false)]);
        let before = Before::Armed(old.egress.clone().unwrap());
        let (_, change) = settling(Some(&before), &new, &config);
        assert_eq!(
            (change.keep, change.fresh, change.free),
            (set(&[2]), set(&[5]), set(&[3, 6]))
        );
        let (_, first) = settling(Some(&Before::Unarmed), &new, &config);
        assert_eq!((first.keep, first.end), (set(&[1, 2, 5]), set(&[])));
        let (_, again) = settling(Some(&Before::Unknown), &new, &config);
        assert_eq!((again.keep, again.end), (set(&[]), set(&[1, 2, 5])));
        let (_, last) = settling(Some(&before), &Rules::default(), &config);
        assert!(last.free_all);
        let (first, then) = settling(Some(&before), &old, &config);
        assert!(first.is_empty() && then.is_empty());
    }

    /// Pods become other policies' while no process looks: what they were is known from before it. Once a process has seen
    /// that, its flows are not from before.
    #[test]
    fn what_pods_were_when_a_process_ended_is_as_good_as_seen() {
        let config = Config::default();
        let mut rules = mk_rules(&[(1, true), (2, true), (3, true), (4, false), (5, true)]);
        let leaving = Arc::make_mut(rules.egress.as_mut().unwrap());
        let egress = Arc::make_mut(&mut leaving.egress);
        let mut earlier = |last, was: &str, former: Option<&str>| {
            let pod = egress.pods.get_mut(&mk_address(last)).unwrap();
            let was = Pod {
                tenant: Some(Tenant {
                    policy: was.into(),
                    egress_ip: None,
                }),
                former: former.map(Into::into),
                ..pod.clone()
            };
            pod.former = was.policy().cloned();
            egress.earlier.insert(mk_address(last), was);
        };
        earlier(1, "web", None);
        earlier(2, "web", Some("mail"));
        earlier(3, "web", Some("other"));
        earlier(4, "web", None);
        let seen = |first: &Settling, then: &Settling| {
            let of = |settling: &Settling| {
                let sets = [&settling.part, &settling.swap, &settling.free];
                let [part, swap, free] = sets.map(Clone::clone);
                (part, swap, free, settling.free_former.clone())
            };
            (of(first), of(then))
        };
        let none = || set(&[]);
        for (swapped, swap) in [(none(), set(&[2])), (set(&[2]), none())] {
            let (first, then) = settling(Some(&Before::Earlier(swapped)), &rules, &config);
            let expected = (
                (set(&[1, 3, 4]), swap, none(), set(&[3])),
                (none(), none(), set(&[1, 3, 4]), none()),
            );
            assert_eq!(seen(&first, &then), expected);
        }
        let (first, then) = settling(Some(&Before::Unknown), &rules, &config);
        let expected = (
            (set(&[4]), none(), none(), none()),
            (none(), none(), none(), none()),
        );
        assert_eq!(seen(&first, &then), expected);
    }

    #[test]
    fn what_was_there_before_is_cut_where_the_policy_is_for_if_it_says_so() {
        let config = Config::default();
        let mut rules = mk_rules(&[(1, true), (2, false)]);
        let leaving = Arc::get_mut(rules.egress.as_mut().unwrap()).unwrap();
        let policy = Policy {
            destinations: ["198.51.100.0/24".parse().unwrap()].into(),
            excluded: ["198.51.100.9/32".parse().unwrap()].into(),
            cuts: true,
            ..Policy::default()
        };
        let egress = Arc::get_mut(&mut leaving.egress).unwrap();
        egress.policies.insert("mail".into(), policy);
        let (_, appears) = settling(Some(&Before::Unarmed), &rules, &config);
        for (to, fate) in [
            ([198, 51, 100, 7], Fate::Ended),
            ([198, 51, 100, 9], Fate::Marked(true)),
            ([203, 0, 113, 7], Fate::Marked(true)),
        ] {
            let known = mk_known(1, to, OTHER_SOURCE, 0);
            assert_eq!(appears.fate(&known), Some(fate), "{to:?}");
        }
        let others = mk_known(2, [198, 51, 100, 7], OTHER_SOURCE, 0);
        assert_eq!(appears.fate(&others), None);
    }

    #[test]
    fn what_a_policy_was_not_for_is_cut_once_it_is_if_it_says_so() {
        let config = Config::default();
        let mk = |destination: &str, cuts| {
            let mut rules = mk_rules(&[(1, true)]);
            let leaving = Arc::get_mut(rules.egress.as_mut().unwrap()).unwrap();
            let policy = Policy {
                destinations: [destination.parse().unwrap()].into(),
                cuts,
                ..Policy::default()
            };
            let egress = Arc::get_mut(&mut leaving.egress).unwrap();
            egress.policies.insert("mail".into(), policy);
            rules
        };
        let (narrow, wide) = ("198.51.100.0/25", "198.51.100.0/24");
        let before = Before::Armed(mk(narrow, true).egress.unwrap());
        let to = |last| mk_known(1, [198, 51, 100, last], OTHER_SOURCE, JUDGED);
        let (_, wider) = settling(Some(&before), &mk(wide, true), &config);
        assert_eq!(wider.fate(&to(200)), Some(Fate::Ended));
        assert_eq!(
            wider.fate(&mk_known(1, [203, 0, 113, 7], OTHER_SOURCE, JUDGED)),
            None
        );
        let own = mk_known(1, [198, 51, 100, 200], 0, EGRESS);
        assert_eq!(wider.fate(&own), None, "what left by it goes on");
        for (net, cuts) in [(wide, false), (narrow, true)] {
            let (first, then) = settling(Some(&before), &mk(net, cuts), &config);
            assert!(first.is_empty() && then.is_empty());
        }
    }

    /// Flows of who had the address before are not the new pod's, also those that were to stay.
    #[test]
    fn nothing_stays_for_a_new_pod() {
        let config = Config::default();
        let before = Before::Armed(mk_rules(&[]).egress.unwrap());
        let (_, new) = settling(Some(&before), &mk_rules(&[(1, true)]), &config);
        for mark in [0, JUDGED] {
            let known = mk_known(1, [198, 51, 100, 7], OTHER_SOURCE, mark);
            assert_eq!(new.fate(&known), Some(Fate::Ended));
        }
    }

    #[test]
    fn connections_within_the_cluster_and_those_of_their_own_source_go_on() {
        let outside = [198, 51, 100, 7];
        let config = Config::default();
        let new = mk_rules(&[(1, true)]);
        let (_, kept) = settling(Some(&Before::Unarmed), &new, &config);
        let (_, ended) = settling(Some(&Before::Unknown), &new, &config);
        for (known, if_kept, if_ended) in [
            (
                mk_known(1, outside, OTHER_SOURCE, 0),
                Some(Fate::Marked(true)),
                Some(Fate::Ended),
            ),
            (mk_known(1, outside, OTHER_SOURCE, JUDGED), None, None),
            (mk_known(1, outside, 0, EGRESS), None, None),
            (mk_known(1, [10, 96, 0, 1], OTHER_SOURCE, 0), None, None),
            (mk_known(2, outside, OTHER_SOURCE, 0), None, None),
        ] {
            assert_eq!(kept.fate(&known), if_kept, "{known:?}");
            assert_eq!(ended.fate(&known), if_ended, "{known:?}");
        }
        let before = Before::Armed(new.egress.unwrap());
        let (_, freed) = settling(Some(&before), &Rules::default(), &config);
        assert_eq!(
            freed.fate(&mk_known(1, outside, 0, EGRESS)),
            Some(Fate::Ended)
        );
        assert_eq!(freed.fate(&mk_known(1, outside, OTHER_SOURCE, 0)), None);
    }
}
