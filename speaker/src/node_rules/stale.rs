//! Flows without connections that rules translate: nothing ends them but silence, and until then they are translated as
//! their first packet was. So the flows of an endpoint that goes are ended when it goes, and the next packet is another's.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;

use landfall_core::egress::shadow;
use landfall_core::model::Protocol;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use super::{Rules, VipPort};
use crate::conntrack::{CONNTRACK, DELETE, GET, Side, attribute, end_of};
use crate::netlink::{DUMP, NESTED, Requests, find, put};

/// Ports, and the endpoints whose flows stay.
pub(super) type Kept = BTreeMap<VipPort, BTreeSet<SocketAddr>>;

/// The ports that have lost endpoints, and what they have left. Without `old`, what was before is unknown: all ports.
pub(super) fn shrunk(old: Option<&Rules>, new: &Rules) -> Kept {
    let mut new = targets(new);
    let Some(old) = old else {
        return new;
    };
    let mut shrunk = Kept::new();
    for (port, before) in targets(old) {
        let left = new.remove(&port).unwrap_or_default();
        if !before.is_subset(&left) {
            shrunk.insert(port, left);
        }
    }
    shrunk
}

/// What rules translate to, but for TCP, whose flows end by themselves.
fn targets(rules: &Rules) -> Kept {
    let pods = rules
        .pod_services
        .iter()
        .map(|(port, targets)| (port, targets.endpoints.clone()));
    let hosts = rules.host_services.iter().map(|(port, targets)| {
        let all = targets.local.iter().chain(&targets.remote);
        (port, all.copied().collect())
    });
    pods.chain(hosts)
        .filter(|(port, _)| port.protocol == Protocol::Udp)
        .map(|(port, endpoints)| (port.clone(), endpoints))
        .collect()
}

/// Ends the flows to these ports that are translated to other endpoints; how many.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub(super) fn end(kept: &Kept) -> io::Result<usize> {
    const ANY_FAMILY: [u8; 4] = [0; 4];
    if kept.is_empty() {
        return Ok(0);
    }
    let requests = Requests::open(NETLINK_NETFILTER)?;
    let mut stale = Vec::new();
    let read = requests.ask(CONNTRACK << 8 | GET, DUMP, &ANY_FAMILY, |entry| {
        stale.extend(removal(entry, kept));
    });
    match read {
        // Entries came or went meanwhile; those that were read are right.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
        read => read?,
    }
    let mut ended = 0;
    for body in stale {
        match requests.ask(CONNTRACK << 8 | DELETE, 0, &body, |_| {}) {
            Ok(()) => ended += 1,
            // It has ended by itself.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ended)
}

/// The request that removes an entry, if its endpoint is not one of those that stay.
fn removal(entry: &[u8], kept: &Kept) -> Option<Vec<u8>> {
    let (header, attributes) = entry.split_first_chunk::<4>()?;
    let original = find(attributes, attribute::ORIGINAL)?;
    let (protocol, to) = end_of(original, Side::Destination)?;
    if i32::from(protocol) != libc::IPPROTO_UDP {
        return None;
    }
    let port = VipPort {
        vip: to.ip(),
        protocol: Protocol::Udp,
        port: to.port(),
    };
    let (_, endpoint) = end_of(find(attributes, attribute::REPLY)?, Side::Source)?;
    // What is not translated goes to whoever has the VIP; so does what goes to its shadow.
    let by_gateway = endpoint.ip() == shadow(to.ip());
    if endpoint == to || by_gateway || kept.get(&port)?.contains(&endpoint) {
        return None;
    }
    let mut body = header.to_vec();
    put(&mut body, attribute::ORIGINAL | NESTED, original);
    for exact in [attribute::ZONE, attribute::ID] {
        if let Some(value) = find(attributes, exact) {
            put(&mut body, exact, value);
        }
    }
    Some(body)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;

    use super::super::PodTargets;
    use super::*;

    fn mk_port(protocol: Protocol, port: u16) -> VipPort {
        VipPort {
            vip: IpAddr::from([192, 0, 2, 200]),
            protocol,
            port,
        }
    }

    fn mk_endpoints(last: &[u8]) -> BTreeSet<SocketAddr> {
        let address = |last: &u8| SocketAddr::from(([10, 0, 0, *last], 8080));
        last.iter().map(address).collect()
    }

    fn mk_rules(ports: &[(Protocol, u16, &[u8])]) -> Rules {
        let targets = |last| PodTargets {
            endpoints: mk_endpoints(last),
            ..PodTargets::default()
        };
        Rules {
            pod_services: ports
                .iter()
                .map(|(protocol, port, last)| (mk_port(*protocol, *port), Arc::new(targets(last))))
                .collect(),
            ..Rules::default()
        }
    }

    #[test]
    fn ports_that_lose_endpoints_are_looked_at_and_no_others() {
        use Protocol::{Tcp, Udp};
        let old = mk_rules(&[
            (Udp, 1, &[1, 2]),
            (Udp, 2, &[1]),
            (Udp, 3, &[1]),
            (Udp, 4, &[1]),
            (Tcp, 1, &[1, 2]),
        ]);
        let new = mk_rules(&[
            (Udp, 1, &[2, 3]),
            (Udp, 2, &[1, 2]),
            (Udp, 4, &[1]),
            (Udp, 5, &[1]),
            (Tcp, 1, &[2]),
        ]);
        let expected = Kept::from([
            (mk_port(Udp, 1), mk_endpoints(&[2, 3])),
            (mk_port(Udp, 3), mk_endpoints(&[])),
        ]);
        assert_eq!(shrunk(Some(&old), &new), expected);
        let all: Vec<VipPort> = shrunk(None, &new).into_keys().collect();
        assert_eq!(all, [1, 2, 4, 5].map(|port| mk_port(Udp, port)));
    }
}
