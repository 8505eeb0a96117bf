//! Which nodes a set of `L2Advertisement`s admits, and on which interfaces.

use std::collections::BTreeMap;
use std::fmt;

use globset::{Glob, GlobSet, GlobSetBuilder};
use xxhash_rust::xxh64::Xxh64;

use crate::model::{Advertisement, CrossSegment, Node, NodeName, Pool, Steering, UnknownPort};
use crate::selector::{LabelSelector, Labels};

/// The label that takes a node out of load balancing.
pub const EXCLUDE_LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

/// On which terms a node is admitted.
#[derive(Clone, Debug)]
pub struct Admission {
    /// 1 and the preferences that match.
    pub weight: u32,
    /// On the interface that owns the address's subnet.
    pub by_subnet: bool,
    /// On interfaces with these names, whatever their subnets.
    pub patterns: Vec<String>,
    globs: GlobSet,
}

impl PartialEq for Admission {
    fn eq(&self, other: &Self) -> bool {
        (self.weight, self.by_subnet, &self.patterns)
            == (other.weight, other.by_subnet, &other.patterns)
    }
}

impl Admission {
    /// Whether an interface of this name was asked for by name.
    pub fn names(&self, interface: &str) -> bool {
        self.globs.is_match(interface)
    }
}

/// Why the sources alone rule a node out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// `L2Advertisement`s select the pool, but none of them the Service.
    NoAdvertisement,
    /// No advertisement's node selectors match.
    NotSelected,
    /// It carries the exclude label.
    Excluded,
    /// Its network is reported unavailable.
    NetworkUnavailable,
    /// The node selector of an egress policy that uses the address does not match.
    NotGateway,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoAdvertisement => {
                "no L2Advertisement of its pool selects the Service (serviceSelectors)"
            }
            Self::NotSelected => "not selected by any L2Advertisement (nodeSelectors)",
            Self::NotGateway => "not selected by the EgressPolicy's gateways.nodeSelector",
            Self::Excluded => {
                "labelled node.kubernetes.io/exclude-from-external-load-balancers (ignoreExcludeLB overrides)"
            }
            Self::NetworkUnavailable => "its condition NetworkUnavailable is True",
        })
    }
}

/// What a set of advertisements says about every node.
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent switches, as they are written"
)]
#[derive(Clone, Debug)]
pub struct Placement {
    /// A better node takes the address back.
    pub failback: bool,
    /// An overloaded node may give the address away.
    pub rebalance: bool,
    /// Packets may be steered.
    pub steering: bool,
    /// Packets to unknown ports are answered.
    pub rejects: bool,
    /// Nodes off the segment serve like those on it.
    pub cross_segment: bool,
    /// Digest of all of it.
    pub digest: u64,
    verdicts: BTreeMap<NodeName, Result<Admission, Refused>>,
    /// Of a node that the source does not know (yet), which counts as one without labels.
    unknown: Result<Admission, Refused>,
}

impl PartialEq for Placement {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Placement {
    /// Of a pool that no advertisement selects: every node, by subnet.
    pub fn everywhere(nodes: &BTreeMap<NodeName, Node>, gateways: &[LabelSelector]) -> Self {
        Self::new(&[&Advertisement::plain("")], nodes, gateways)
    }

    /// Of these advertisements together, on nodes that all of `gateways` match.
    pub fn new(
        advertisements: &[&Advertisement],
        nodes: &BTreeMap<NodeName, Node>,
        gateways: &[LabelSelector],
    ) -> Self {
        let verdicts: BTreeMap<_, _> = nodes
            .values()
            .map(|node| {
                let verdict = judge(
                    advertisements,
                    gateways,
                    &node.labels,
                    node.network_unavailable,
                );
                (node.name.clone(), verdict)
            })
            .collect();
        let failback = advertisements.iter().any(|a| a.failback);
        let rebalance = advertisements.iter().all(|a| a.rebalance);
        let unknown = judge(advertisements, gateways, &Labels::new(), false);
        let steering = advertisements.iter().all(|a| a.steering == Steering::Auto);
        let rejects = advertisements
            .iter()
            .all(|a| a.unknown_port == UnknownPort::Reject);
        let cross_segment = advertisements
            .iter()
            .any(|a| a.cross_segment == CrossSegment::Always);
        let digest = digest(
            [failback, rebalance, steering, rejects, cross_segment],
            &verdicts,
            &unknown,
        );
        Self {
            failback,
            rebalance,
            steering,
            rejects,
            cross_segment,
            digest,
            verdicts,
            unknown,
        }
    }

    /// Whether and how `node` is admitted.
    pub fn admission(&self, node: &NodeName) -> Result<&Admission, Refused> {
        self.verdicts
            .get(node)
            .unwrap_or(&self.unknown)
            .as_ref()
            .map_err(|refused| *refused)
    }
}

/// Whether an advertisement is for addresses of this pool.
pub(super) fn selects_pool(advertisement: &Advertisement, name: &str, pool: Option<&Pool>) -> bool {
    if advertisement.pools.is_empty() && advertisement.pool_selectors.is_empty() {
        return true;
    }
    advertisement.pools.iter().any(|wanted| wanted == name)
        || pool.is_some_and(|pool| {
            advertisement
                .pool_selectors
                .iter()
                .any(|selector| selector.matches(&pool.labels))
        })
}

fn judge(
    advertisements: &[&Advertisement],
    gateways: &[LabelSelector],
    labels: &Labels,
    network_unavailable: bool,
) -> Result<Admission, Refused> {
    if advertisements.is_empty() {
        return Err(Refused::NoAdvertisement);
    }
    if network_unavailable {
        return Err(Refused::NetworkUnavailable);
    }
    let selecting: Vec<_> = advertisements
        .iter()
        .filter(|a| {
            a.node_selectors.is_empty() || a.node_selectors.iter().any(|s| s.matches(labels))
        })
        .collect();
    if selecting.is_empty() {
        return Err(Refused::NotSelected);
    }
    if !gateways.iter().all(|selector| selector.matches(labels)) {
        return Err(Refused::NotGateway);
    }
    let excluded = labels.contains_key(EXCLUDE_LABEL);
    let admitting: Vec<_> = selecting
        .into_iter()
        .filter(|a| !excluded || a.ignore_exclude_lb)
        .collect();
    if admitting.is_empty() {
        return Err(Refused::Excluded);
    }
    let preference = |advertisement: &Advertisement| -> u32 {
        advertisement
            .preferred_nodes
            .iter()
            .filter(|preferred| preferred.selector.matches(labels))
            .map(|preferred| preferred.weight)
            .sum()
    };
    let mut patterns: Vec<String> = admitting
        .iter()
        .flat_map(|a| a.interfaces.iter().cloned())
        .collect();
    patterns.sort();
    patterns.dedup();
    let mut globs = GlobSetBuilder::new();
    for glob in patterns
        .iter()
        .filter_map(|pattern| Glob::new(pattern).ok())
    {
        globs.add(glob);
    }
    Ok(Admission {
        weight: 1 + admitting.iter().map(|a| preference(a)).max().unwrap_or(0),
        by_subnet: admitting.iter().any(|a| a.interfaces.is_empty()),
        patterns,
        globs: globs.build().unwrap_or_else(|_| GlobSet::empty()),
    })
}

fn digest(
    switches: [bool; 5],
    verdicts: &BTreeMap<NodeName, Result<Admission, Refused>>,
    unknown: &Result<Admission, Refused>,
) -> u64 {
    let mut hash = Xxh64::new(0);
    hash.update(&switches.map(u8::from));
    let named = verdicts.iter().map(|(node, verdict)| (&*node.0, verdict));
    for (node, verdict) in named.chain([("", unknown)]) {
        hash.update(node.as_bytes());
        match verdict {
            Ok(admission) => {
                hash.update(&[0, 1, u8::from(admission.by_subnet)]);
                hash.update(&admission.weight.to_be_bytes());
                for pattern in &admission.patterns {
                    hash.update(pattern.as_bytes());
                    hash.update(&[0]);
                }
            }
            Err(refused) => hash.update(&[0, 2, *refused as u8]),
        }
    }
    hash.digest()
}
