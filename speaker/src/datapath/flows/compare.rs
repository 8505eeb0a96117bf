//! Comparing the TCP flows with connection tracking.
//!
//! Where kube-proxy delivers, connection tracking translates, and knows which flows there are. Where the programs deliver,
//! it sees packets that are translated already: it tells which of them were there before the programs' tables, and the
//! flows end by idle times of their own, which are its.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;
use std::{fs, io};

use landfall_ebpf_common::{Endpoint, Flow, FlowKey, VipKey, flow_state};
use nix::time::{ClockId, clock_gettime};

use crate::conntrack::{self, Connection};

use super::super::tables::{endpoint, port_key};
use super::super::{PortId, PortState};
use super::maps::{FlowMaps, flow_of};

/// A flow that connection tracking does not know, or whose endpoint is gone, is forgotten when it was not heard for this
/// long: a new one may be here before it is there.
const UNHEARD: Duration = Duration::from_secs(60);
/// A flow that is being closed is forgotten after this long: `nf_conntrack_tcp_timeout_time_wait`.
const CLOSING: Duration = Duration::from_secs(120);
/// `nf_conntrack_tcp_timeout_established`, where it cannot be read.
const ESTABLISHED: Duration = Duration::from_hours(120);
/// `BPF_NOEXIST`: an entry that is there is newer.
const IF_NEW: u64 = 1;

/// A port of a VIP as flows have it: address, protocol, port.
type FlowPort = (VipKey, u32, u16);

/// What this node's endpoints serve.
pub(super) type Endpoints = BTreeMap<Endpoint, Vec<FlowPort>>;

/// What flows can be about.
#[derive(Debug)]
pub(super) struct Known {
    vips: HashSet<IpAddr>,
    endpoints: Endpoints,
    /// Of maps that no earlier process has filled.
    maps_are_new: bool,
}

impl Known {
    pub(super) fn new(
        vips: &HashSet<IpAddr>,
        ports: &BTreeMap<PortId, PortState>,
        maps_are_new: bool,
    ) -> Self {
        Self {
            vips: vips.clone(),
            endpoints: endpoints_of(ports),
            maps_are_new,
        }
    }

    /// Whether a connection may be a flow of ours. One to an endpoint may be one that was translated before the maps were
    /// there; a later one is somebody's own, who knows the endpoint's address.
    fn concerns(&self, connection: &Connection) -> bool {
        let flow = &connection.flow;
        if connection.translated {
            self.vips.contains(&flow.vip.address())
        } else {
            self.maps_are_new && self.endpoints.contains_key(&destination(flow))
        }
    }
}

/// The endpoints of these ports that are this node's.
pub(super) fn endpoints_of(ports: &BTreeMap<PortId, PortState>) -> Endpoints {
    let mut endpoints = Endpoints::new();
    for (id, state) in ports {
        let key = port_key(*id);
        for address in state.native.iter().flat_map(|native| &native.endpoints) {
            let serves = endpoints.entry(endpoint(*address)).or_default();
            serves.push((key.vip, u32::from(key.protocol), key.port));
        }
    }
    endpoints
}

fn destination(flow: &FlowKey) -> Endpoint {
    Endpoint {
        address: flow.vip.0,
        port: flow.port,
        zero: 0,
    }
}

/// What a comparison changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reconciled {
    entered: usize,
    forgotten: usize,
}

/// Enters the flows that are delivered here already, and forgets those that are not any more.
pub(super) fn reconcile(maps: &mut FlowMaps, known: &Known) -> io::Result<Reconciled> {
    let connections = conntrack::connections(|connection| known.concerns(connection))?;
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    let forgotten = forget(maps, known, &connections, now);
    let seen = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    let mut entered = 0;
    for connection in connections {
        entered += if connection.translated {
            let flow = Flow {
                seen,
                state: flow_state::ESTABLISHED,
                ..Flow::default()
            };
            // Otherwise it is there already, or the table is full.
            usize::from(maps.flows.insert(connection.flow, flow, IF_NEW).is_ok())
        } else {
            enter(maps, known, &connection.flow, seen)
        };
    }
    Ok(Reconciled { entered, forgotten })
}

/// Enters a connection to an endpoint as all the flows to VIPs that it can have been. Its client's next packet tells
/// which it is, if any: until then the endpoint's answers leave as they are.
fn enter(maps: &mut FlowMaps, known: &Known, connection: &FlowKey, seen: u64) -> usize {
    let to = destination(connection);
    if maps.answers.get(&connection.answer(&to), 0).is_ok() {
        return 0;
    }
    let ports = known.endpoints.get(&to).map_or(&[][..], Vec::as_slice);
    let mut entered = 0;
    for (vip, protocol, port) in ports {
        if *protocol != connection.protocol {
            continue;
        }
        let key = FlowKey {
            vip: *vip,
            port: *port,
            ..*connection
        };
        let flow = Flow {
            seen,
            state: flow_state::GUESSED,
            endpoint: to,
            ..Flow::default()
        };
        entered += usize::from(maps.flows.insert(key, flow, IF_NEW).is_ok());
    }
    entered
}

fn forget(
    maps: &mut FlowMaps,
    known: &Known,
    connections: &HashSet<Connection>,
    now: Duration,
) -> usize {
    let unheard = |seen: u64| now.saturating_sub(Duration::from_nanos(seen));
    let established = established();
    let mut there = HashSet::new();
    let mut gone = Vec::new();
    for (key, flow) in maps.flows.iter().flatten() {
        let over = if flow.endpoint.port == 0 {
            let connection = Connection {
                flow: key,
                translated: true,
            };
            !connections.contains(&connection) && unheard(flow.seen) > UNHEARD
        } else {
            let answers = maps.answers.get(&key.answer(&flow.endpoint), 0);
            let answers = answers.unwrap_or_default();
            let idle = unheard(flow.seen.max(answers.seen));
            let closing = [flow.state, answers.state].contains(&flow_state::CLOSING);
            let limit = if closing { CLOSING } else { established };
            let serves = known.endpoints.contains_key(&flow.endpoint);
            idle > limit || (!serves && idle > UNHEARD)
        };
        if over {
            gone.push((key, flow.endpoint));
        } else {
            there.insert(key);
        }
    }
    for (key, endpoint) in &gone {
        maps.forget(key, endpoint);
    }
    let orphans: Vec<FlowKey> = maps
        .answers
        .iter()
        .flatten()
        .filter(|(key, answer)| {
            !there.contains(&flow_of(key, &answer.vip)) && unheard(answer.seen) > UNHEARD
        })
        .map(|(key, _)| key)
        .collect();
    for key in orphans {
        let _ = maps.answers.remove(&key);
    }
    gone.len()
}

/// For how long an idle connection is remembered, here as by connection tracking.
fn established() -> Duration {
    fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .map_or(ESTABLISHED, Duration::from_secs)
}

#[cfg(test)]
mod tests;
