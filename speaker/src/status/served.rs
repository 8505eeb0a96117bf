//! The condition `Served`: whether clients find somebody behind every port.

use std::net::IpAddr;

use landfall_api::conditions::served;
use landfall_core::groups::Group;
use landfall_core::ip::Family;

use super::{Condition, bounded};

/// Of an address that somebody leads.
pub(super) fn served(vip: IpAddr, group: &Group) -> Condition {
    let family = Family::of(vip);
    let mut lacking = Vec::new();
    for service in &group.services {
        let ports = service.ports.iter();
        let lacks = ports.filter(|port| {
            let port = (family, port.protocol, port.port);
            !service.served.contains(&port)
        });
        lacking
            .extend(lacks.map(|port| format!("{} {}/{}", service.key, port.port, port.protocol)));
    }
    let Some(ports) = bounded(lacking) else {
        return Condition {
            holds: true,
            reason: served::ENDPOINTS,
            message: String::new(),
        };
    };
    let met = if group.vips.iter().all(|vip| vip.placement.rejects) {
        "refused"
    } else {
        "met with silence (unknownPort: Drop)"
    };
    Condition {
        holds: false,
        reason: served::NO_ENDPOINTS,
        message: format!(
            "no endpoint is ready, nor serving while it terminates: clients are {met}; look at the Service's selector and \
             its pods: {ports}"
        ),
    }
}
