//! The maps of flows.

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use landfall_ebpf_common::{Answer, Endpoint, Flow, FlowKey, VipKey, map};

use super::super::tables::{TablesError, taken};

/// Flows and the answers to those that are translated.
pub(in super::super) struct FlowMaps {
    pub(super) flows: HashMap<MapData, FlowKey, Flow>,
    pub(super) answers: HashMap<MapData, FlowKey, Answer>,
    datagrams: HashMap<MapData, FlowKey, Flow>,
    datagram_answers: HashMap<MapData, FlowKey, Answer>,
}

impl std::fmt::Debug for FlowMaps {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("FlowMaps").finish_non_exhaustive()
    }
}

impl FlowMaps {
    /// Takes the maps.
    pub(in super::super) fn taken(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        Ok(Self {
            flows: taken(ebpf, map::FLOWS)?,
            answers: taken(ebpf, map::ANSWERS)?,
            datagrams: taken(ebpf, map::DATAGRAMS)?,
            datagram_answers: taken(ebpf, map::DATAGRAM_ANSWERS)?,
        })
    }

    /// Forgets a TCP flow; it may have gone by itself.
    pub(super) fn forget(&mut self, key: &FlowKey, endpoint: &Endpoint) {
        let _ = self.flows.remove(key);
        if endpoint.port != 0 {
            let _ = self.answers.remove(&key.answer(endpoint));
        }
    }

    /// Forgets flows without connections.
    pub(super) fn forget_datagrams(&mut self, which: impl Fn(&FlowKey, &Endpoint) -> bool) {
        let gone: Vec<(FlowKey, Endpoint)> = self
            .datagrams
            .iter()
            .flatten()
            .map(|(key, flow)| (key, flow.endpoint))
            .filter(|(key, endpoint)| which(key, endpoint))
            .collect();
        for (key, endpoint) in gone {
            let _ = self.datagrams.remove(&key);
            let _ = self.datagram_answers.remove(&key.answer(&endpoint));
        }
    }
}

/// The flow that an endpoint's answers belong to.
pub(super) fn flow_of(answer: &FlowKey, vip: &Endpoint) -> FlowKey {
    FlowKey {
        client: answer.vip.0,
        vip: VipKey(vip.address),
        client_port: answer.port,
        port: vip.port,
        protocol: answer.protocol,
    }
}
