//! What follows from the election for the announcer, the node's rules and the data path.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use landfall_core::groups::{GroupId, GroupService};
use landfall_core::ip::IpRange;

use super::Speaker;
use crate::announcer::{Announcement, Interface};
use crate::datapath::DataPathState;
use crate::node_rules::{HostService, HostTargets, Rules};

impl Speaker {
    /// What this node is to announce of a group.
    pub(super) fn announcements(&self, id: &GroupId) -> BTreeMap<IpAddr, Announcement> {
        if self.quiet {
            return BTreeMap::new();
        }
        let (Some(lead), Some(group)) = (self.election.leadership(id), self.group(id)) else {
            return BTreeMap::new();
        };
        group
            .vips
            .iter()
            .filter_map(|vip| {
                let place = lead.interfaces.get(&vip.address)?;
                let interface = self.interface(&place.name)?;
                let announcement = Announcement {
                    vip: vip.address,
                    interface: interface.index,
                    probe: lead.first,
                };
                Some((vip.address, announcement))
            })
            .collect()
    }

    /// Brings rules, data path and listening up to date.
    pub(super) fn apply(&mut self) {
        let mut rules = Rules::default();
        let mut uplinks: BTreeSet<u32> = self.likely_uplinks();
        for group in self.index.groups().values() {
            let places = self.election.places(group);
            for vip in &group.vips {
                rules.vips.insert(vip.address);
                if let Some(place) = places.get(&vip.address) {
                    uplinks.extend(self.interface(&place.name).map(|known| known.index));
                    rules.uplinks.insert(vip.address, place.name.to_string());
                }
                for service in &group.services {
                    self.host_services(vip.address, service, &mut rules.host_services);
                }
            }
        }
        let state = DataPathState {
            uplinks: uplinks.clone(),
            vips: rules.vips.clone(),
        };
        self.parts.rules.apply(rules);
        self.parts.datapath.apply(state);
        if uplinks != self.uplinks {
            let list: Vec<u32> = uplinks.iter().copied().collect();
            self.parts.announcer.listen(&list);
            self.uplinks = uplinks;
            self.hello_at = std::time::Duration::ZERO;
        }
    }

    fn host_services(
        &self,
        vip: IpAddr,
        service: &GroupService,
        into: &mut BTreeMap<HostService, HostTargets>,
    ) {
        for ((protocol, port), endpoints) in &service.host_endpoints {
            let mut targets = HostTargets::default();
            let of_family = endpoints
                .iter()
                .filter(|(_, endpoint)| endpoint.is_ipv4() == vip.is_ipv4());
            for (node, endpoint) in of_family {
                if *node != self.identity.node {
                    targets.remote.push(*endpoint);
                } else if self.hosts_alive.contains(endpoint) {
                    targets.local = Some(*endpoint);
                }
            }
            let service = HostService {
                vip,
                protocol: *protocol,
                port: *port,
            };
            into.insert(service, targets);
        }
    }

    /// Interfaces that addresses of the pools would be announced on: nodes hear each other there before there is
    /// any address to elect a leader for.
    fn likely_uplinks(&self) -> BTreeSet<u32> {
        let ranges: Vec<IpRange> = self
            .index
            .pools()
            .flat_map(|pool| pool.ranges.iter().copied())
            .collect();
        let owns = |interface: &Interface| {
            interface.addresses.iter().any(|net| {
                let subnet = IpRange::from(*net);
                ranges.iter().any(|range| range.overlaps(&subnet))
            })
        };
        let usable = || self.interfaces.iter().filter(|i| i.up && !i.enslaved);
        let mut likely: BTreeSet<u32> = usable()
            .filter(|interface| owns(interface))
            .map(|interface| interface.index)
            .collect();
        if likely.is_empty() && !ranges.is_empty() {
            likely.extend(
                usable()
                    .filter(|interface| interface.default_route.0 || interface.default_route.1)
                    .map(|interface| interface.index),
            );
        }
        for advertisement in self.index.advertisements() {
            for pattern in &advertisement.interfaces {
                if let Ok(glob) = globset::Glob::new(pattern) {
                    let matcher = glob.compile_matcher();
                    likely.extend(
                        usable()
                            .filter(|interface| matcher.is_match(&*interface.name))
                            .map(|interface| interface.index),
                    );
                }
            }
        }
        likely
    }
}
