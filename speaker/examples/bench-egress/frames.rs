//! The frames of the benchmark: flows by their number.

use std::net::{Ipv4Addr, SocketAddr};

use landfall_lab::packets;

/// The Ethernet address of the node that is measured.
pub(crate) const NODE: [u8; 6] = [2, 0, 0, 9, 0, 1];
/// That of the other node, whose pods are remote.
pub(crate) const OTHER: [u8; 6] = [2, 0, 0, 9, 0, 2];
/// The router's.
pub(crate) const ROUTER: [u8; 6] = [2, 0, 0, 9, 0, 3];
/// That of the node's end of the own pods' link.
pub(crate) const POD_LINK: [u8; 6] = [2, 0, 0, 9, 0, 4];
/// Of all own pods.
pub(crate) const PODS: [u8; 6] = [2, 0, 0, 9, 0, 5];

/// How many pods the other node has.
pub(crate) const REMOTE_PODS: u32 = 1000;
/// How many the node itself has.
pub(crate) const OWN_PODS: u32 = 16;

/// Where a number's addresses begin.
const FIRST_REMOTE_POD: u32 = 0x0af4_0400;
const FIRST_OWN_POD: u32 = 0x0af4_010a;
const FIRST_EGRESS: u32 = 0x0a58_1000;
/// Outside: 198.18.0.0/15 (RFC 2544) for the pods of the other node, 203.0.113.0/24 (RFC 5737) for the own.
const OUTSIDE: u32 = 0xc612_0000;
const OUTSIDE_OF_OWN: u32 = 0xcb00_7100;
const MANY: u32 = 0x2_0000;
/// Where port numbers begin, and the port of all servers.
const FIRST_PORT: u32 = 20_000;
const SERVED: u16 = 443;

/// A pod of the other node.
pub(crate) fn remote_pod(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST_REMOTE_POD + number)
}

/// A pod of the node that is measured.
pub(crate) fn own_pod(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST_OWN_POD + number)
}

/// The address of a policy.
pub(crate) fn egress(policy: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST_EGRESS + policy)
}

/// A flow of a pod's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flow {
    /// Of the node's own pods.
    pub(crate) own: bool,
    /// Its number among those, or among the other node's.
    pub(crate) number: u32,
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A pod's datagram.
    Out,
    /// A server's, to the address of the pod's policy.
    In,
    /// A pod's SYN.
    Syn,
}

impl Flow {
    fn pod(self) -> (u32, Ipv4Addr) {
        if self.own {
            let place = self.number % OWN_PODS;
            (place, own_pod(place))
        } else {
            let place = self.number % REMOTE_PODS;
            (place, remote_pod(place))
        }
    }

    fn server(self) -> SocketAddr {
        let address = if self.own {
            OUTSIDE_OF_OWN + self.number % 256
        } else {
            OUTSIDE + self.number % MANY
        };
        SocketAddr::new(Ipv4Addr::from(address).into(), SERVED)
    }

    /// No two flows to a server have the same, so that both gateways leave ports as they are.
    fn port(self) -> u16 {
        let each = if self.own { 256 } else { MANY };
        u16::try_from(FIRST_PORT + self.number / each).expect("there are fewer flows")
    }

    /// The flow's frame, where there are so many policies.
    pub(crate) fn frame(self, what: What, policies: u32) -> Vec<u8> {
        let (place, pod) = self.pod();
        let pod = SocketAddr::new(pod.into(), self.port());
        let mut packet = match what {
            What::Out => packets::datagram(pod, self.server(), &[0; 18]),
            What::In => {
                let egress = SocketAddr::new(egress(place % policies).into(), self.port());
                packets::datagram(self.server(), egress, &[0; 18])
            }
            What::Syn => packets::syn(pod, self.server(), 1),
        };
        seal(&mut packet);
        let (to, from) = match (what, self.own) {
            (What::In, _) => (NODE, ROUTER),
            (_, false) => (NODE, OTHER),
            (_, true) => (POD_LINK, PODS),
        };
        [&to[..], &from, &[8, 0], &packet].concat()
    }
}

/// Writes the checksum of an IPv4 header (RFC 1071), which raw sockets leave to the kernel.
fn seal(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let sum: u32 = packet[..20]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("folded");
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}
