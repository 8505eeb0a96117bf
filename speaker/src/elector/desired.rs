//! What follows from the election for the announcer, the node's rules and the data path.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use landfall_core::groups::{Group, GroupId, GroupService};
use landfall_core::ip::{Family, IpRange};

use super::Speaker;
use super::steering::Steered;
use crate::announcer::{Announcement, Interface};
use crate::datapath::Interfaces;
use crate::node_rules::{HostTargets, PodTargets, Rules, TUNNEL, VipPort};

/// What the rules should say, and what each group adds to it, so that a change costs what it changes.
#[derive(Debug, Default)]
pub(super) struct Desired {
    rules: Rules,
    parts: BTreeMap<GroupId, Part>,
    /// How many VIPs each uplink has.
    uplinks: BTreeMap<Arc<str>, usize>,
    stale: BTreeSet<GroupId>,
    all_stale: bool,
}

/// What one group adds.
#[derive(Debug, Default)]
struct Part {
    rules: Rules,
    steered: Steered,
}

impl Desired {
    /// These groups are to be looked at again.
    pub(super) fn touch(&mut self, groups: &BTreeSet<GroupId>) {
        self.stale.extend(groups.iter().cloned());
    }

    /// All groups are.
    pub(super) fn forget(&mut self) {
        self.all_stale = true;
    }

    fn due<'a>(&mut self, all: impl Iterator<Item = &'a GroupId>) -> BTreeSet<GroupId> {
        let mut due = std::mem::take(&mut self.stale);
        if std::mem::take(&mut self.all_stale) {
            due.extend(self.parts.keys().cloned());
            due.extend(all.cloned());
        }
        due
    }

    fn remove(&mut self, id: &GroupId) -> Option<Part> {
        let removed = self.parts.remove(id)?;
        let part = &removed.rules;
        for vip in &part.vips {
            self.rules.vips.remove(vip);
            self.rules.refusing.remove(vip);
            self.rules.silent.remove(vip);
        }
        for (vip, uplink) in &part.uplinks {
            self.rules.uplinks.remove(vip);
            if let Some(count) = self.uplinks.get_mut(uplink) {
                *count -= 1;
                if *count == 0 {
                    self.uplinks.remove(uplink);
                }
            }
        }
        for service in part.host_services.keys() {
            self.rules.host_services.remove(service);
        }
        for service in part.pod_services.keys() {
            self.rules.pod_services.remove(service);
        }
        Some(removed)
    }

    fn insert(&mut self, id: GroupId, added: Part) {
        let part = &added.rules;
        self.rules.vips.extend(&part.vips);
        self.rules.silent.extend(&part.silent);
        let refusing = part.refusing.iter();
        self.rules
            .refusing
            .extend(refusing.map(|(vip, ports)| (*vip, ports.clone())));
        for (vip, uplink) in &part.uplinks {
            self.rules.uplinks.insert(*vip, uplink.clone());
            *self.uplinks.entry(uplink.clone()).or_default() += 1;
        }
        let services = part.host_services.iter();
        self.rules
            .host_services
            .extend(services.map(|(service, targets)| (service.clone(), targets.clone())));
        let services = part.pod_services.iter();
        self.rules
            .pod_services
            .extend(services.map(|(service, targets)| (service.clone(), targets.clone())));
        self.parts.insert(id, added);
    }

    /// The uplinks that have VIPs.
    fn names(&self) -> impl Iterator<Item = &str> {
        self.uplinks.keys().map(AsRef::as_ref)
    }
}

impl Speaker {
    /// What this node is to announce of a group.
    pub(super) fn announcements(&self, id: &GroupId) -> BTreeMap<IpAddr, Announcement> {
        if self.quiet {
            return BTreeMap::new();
        }
        let (Some(lead), Some(group)) = (self.election.leadership(id), self.group(id)) else {
            return BTreeMap::new();
        };
        if self.is_few(group) {
            return BTreeMap::new();
        }
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
        let mut desired = std::mem::take(&mut self.desired);
        let due = desired.due(self.index.groups().keys());
        // An address may go from one group to another: first what goes, then what comes.
        for id in &due {
            if let Some(part) = desired.remove(id) {
                self.told.remove(&part.steered);
            }
        }
        for id in due {
            if let Some(group) = self.index.groups().get(&id).cloned() {
                let group = &group;
                self.check_tunnel(group);
                let part = Part {
                    rules: self.part(group),
                    steered: self.steered(group),
                };
                self.told.insert(&part.steered);
                desired.insert(id, part);
            }
        }
        self.desired = desired;

        let mut uplinks: BTreeSet<u32> = self.likely_uplinks();
        uplinks.extend(
            self.desired
                .names()
                .filter_map(|name| Some(self.interface(name)?.index)),
        );
        let leaving = self.leaving(&uplinks);
        let judged = leaving.as_ref().map(|it| it.rules.clone());
        let rules = Rules {
            tunnel: self.tunnel_rules(),
            egress: judged.clone().filter(|_| self.identity.cilium.is_none()),
            passed_by: judged.filter(|_| self.identity.cilium.is_some()),
            ..self.desired.rules.clone()
        };
        self.parts.rules.apply(rules);
        self.tell_leaving(leaving.map(|it| it.programs));
        self.tell_roles();
        self.parts.datapath.attach(Interfaces {
            uplinks: uplinks.clone(),
            tunnel: self.tunnel(),
        });
        if uplinks != self.uplinks {
            let list: Vec<u32> = uplinks.iter().copied().collect();
            self.parts.announcer.listen(&list);
            self.uplinks = uplinks;
            self.hello_at = std::time::Duration::ZERO;
        }
        self.tell();
    }

    /// What one group adds to the rules.
    fn part(&self, group: &Group) -> Rules {
        let mut part = Rules::default();
        let places = self.election.places(group);
        for vip in &group.vips {
            part.vips.insert(vip.address);
            if vip.placement.rejects {
                // What nobody serves is refused like what nobody has.
                let family = Family::of(vip.address);
                let ports = group.services.iter().flat_map(|service| &service.served);
                let ports = ports
                    .filter(|(of, _, _)| *of == family)
                    .map(|(_, protocol, port)| (*protocol, *port))
                    .collect();
                part.refusing.insert(vip.address, ports);
                if !group.egress.is_empty() {
                    part.silent.insert(vip.address);
                }
            }
            if let Some(place) = places.get(&vip.address) {
                part.uplinks.insert(vip.address, place.name.clone());
            }
            for service in &group.services {
                self.host_services(vip.address, service, &mut part.host_services);
                if self.is_native() && service.host_endpoints.is_empty() {
                    pod_services(vip.address, service, &mut part.pod_services);
                }
            }
        }
        part
    }

    fn host_services(
        &self,
        vip: IpAddr,
        service: &GroupService,
        into: &mut BTreeMap<VipPort, HostTargets>,
    ) {
        for ((protocol, port), endpoints) in &service.host_endpoints {
            let mut targets = HostTargets::default();
            let of_family = endpoints
                .iter()
                .flat_map(|(node, endpoints)| {
                    endpoints.iter().map(move |endpoint| (node, endpoint))
                })
                .filter(|(_, endpoint)| endpoint.is_ipv4() == vip.is_ipv4());
            let mut dead = Vec::new();
            for (node, endpoint) in of_family {
                if *node != self.identity.node {
                    // Files go on naming nodes that are gone.
                    if self.election.is_alive(node) {
                        targets.remote.push(*endpoint);
                    } else {
                        dead.push(*endpoint);
                    }
                } else if self.hosts_alive.contains(endpoint) {
                    targets.local = Some(*endpoint);
                }
            }
            if targets.remote.is_empty() {
                targets.remote = dead;
            }
            let service = VipPort {
                vip,
                protocol: *protocol,
                port: *port,
            };
            into.insert(service, targets);
        }
    }

    /// What the pools have.
    fn pooled(&self) -> Vec<IpRange> {
        let pools = self.index.pools();
        pools.flat_map(|pool| pool.ranges.iter().copied()).collect()
    }

    /// The interfaces that an address may be announced on.
    fn usable(&self) -> impl Iterator<Item = &Interface> {
        let own = self.interfaces().iter().filter(|i| &*i.name != TUNNEL);
        own.filter(|i| i.up && !i.enslaved)
    }

    /// Whether there are pools, and none of their addresses is in the subnet of an interface.
    pub(super) fn is_far(&self) -> bool {
        let ranges = self.pooled();
        !ranges.is_empty()
            && !self
                .usable()
                .any(|interface| is_in_subnet(&ranges, interface))
    }

    /// Interfaces that addresses of the pools would be announced on: nodes hear each other there before there is
    /// any address to elect a leader for.
    fn likely_uplinks(&self) -> BTreeSet<u32> {
        let ranges = self.pooled();
        let owns = |interface: &Interface| is_in_subnet(&ranges, interface);
        let usable = || self.usable();
        let mut likely: BTreeSet<u32> = usable()
            .filter(|interface| owns(interface))
            .map(|interface| interface.index)
            .collect();
        // Where this node delivers itself, answers leave by the default route too.
        if (likely.is_empty() || self.is_native()) && !ranges.is_empty() {
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

/// Where this node's own processes and pods reach a Service.
fn pod_services(
    vip: IpAddr,
    service: &GroupService,
    into: &mut BTreeMap<VipPort, Arc<PodTargets>>,
) {
    for port in &service.ports {
        let endpoints = service.targets((Family::of(vip), port.protocol, port.port), None);
        if endpoints.is_empty() {
            continue; // The leader refuses it.
        }
        let targets = PodTargets {
            endpoints,
            affinity: service.affinity,
            ranges: service.source_ranges.clone(),
        };
        let port = VipPort {
            vip,
            protocol: port.protocol,
            port: port.port,
        };
        into.insert(port, Arc::new(targets));
    }
}

fn is_in_subnet(ranges: &[IpRange], interface: &Interface) -> bool {
    interface.addresses.iter().any(|net| {
        let subnet = IpRange::from(*net);
        ranges.iter().any(|range| range.overlaps(&subnet))
    })
}
