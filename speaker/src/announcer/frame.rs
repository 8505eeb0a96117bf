//! ARP (RFC 826, 5227) and neighbour discovery (RFC 4861) frames: what they say, and how to make them.
//!
//! Reading is strict: a frame that a host would have to discard says nothing here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use pnet_packet::Packet;
use pnet_packet::arp::{
    ArpHardwareTypes, ArpOperation, ArpOperations, ArpPacket, MutableArpPacket,
};
use pnet_packet::ethernet::{EtherType, EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv6::{Ipv6Packet, MutableIpv6Packet};

use super::MacAddr;

/// The ethertype of hellos: IEEE 802's local experimental one.
pub(super) const HELLO: u16 = 0x88b5;
/// The group that hellos are sent to, locally administered.
pub(super) const HELLO_GROUP: MacAddr = MacAddr([0x03, 0x4c, 0x46, 0, 0, 1]);

const BROADCAST: MacAddr = MacAddr([0xff; 6]);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ETHERNET: usize = 14;
const ARP: usize = 28;
const IPV6: usize = 40;
/// A solicitation or advertisement without options: type, code, checksum, flags, target.
const ND: usize = 24;
const LINK_LAYER_OPTION: usize = 8;

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// What a frame says. One frame may ask and claim: an ARP request tells of its sender too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) claim: Option<Claim>,
    pub(super) question: Option<Question>,
}

/// "`address` is at `by`."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) address: IpAddr,
    pub(super) by: MacAddr,
}

/// "Who has `target`?"
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) target: IpAddr,
    /// Where an answer goes.
    pub(super) asker: MacAddr,
    /// Who asks; unspecified when it is a probe: the asker wants the address for itself.
    pub(super) source: IpAddr,
}

/// Reads an ARP frame.
pub(super) fn parse_arp(frame: &[u8]) -> Option<Heard> {
    let ethernet = EthernetPacket::new(frame)?;
    if ethernet.get_ethertype() != EtherTypes::Arp || frame.len() < ETHERNET + ARP {
        return None;
    }
    let arp = ArpPacket::new(ethernet.payload())?;
    let sane = arp.get_hardware_type() == ArpHardwareTypes::Ethernet
        && arp.get_protocol_type() == EtherTypes::Ipv4
        && arp.get_hw_addr_len() == 6
        && arp.get_proto_addr_len() == 4;
    let operation = arp.get_operation();
    if !sane || (operation != ArpOperations::Request && operation != ArpOperations::Reply) {
        return None;
    }
    let sender = station(arp.get_sender_hw_addr().octets())?;
    let source = arp.get_sender_proto_addr();
    let target = arp.get_target_proto_addr();
    Some(Heard {
        claim: (!source.is_unspecified()).then_some(Claim {
            address: source.into(),
            by: sender,
        }),
        // A gratuitous request asks nothing.
        question: (operation == ArpOperations::Request && source != target).then_some(Question {
            target: target.into(),
            asker: sender,
            source: source.into(),
        }),
    })
}

/// Reads a neighbour solicitation or advertisement (RFC 4861 section 7.1).
pub(super) fn parse_nd(frame: &[u8]) -> Option<Heard> {
    let ethernet = EthernetPacket::new(frame)?;
    if ethernet.get_ethertype() != EtherTypes::Ipv6 {
        return None;
    }
    let from = station(ethernet.get_source().octets())?;
    let ip = Ipv6Packet::new(ethernet.payload())?;
    if ip.get_version() != 6
        || ip.get_next_header() != IpNextHeaderProtocols::Icmpv6
        || ip.get_hop_limit() != 255
    {
        return None;
    }
    let length = usize::from(ip.get_payload_length());
    let message = ethernet.payload().get(IPV6..IPV6 + length)?;
    let (source, destination) = (ip.get_source(), ip.get_destination());
    if message.len() < ND
        || message[1] != 0
        || source.is_multicast()
        || checksum(message, source, destination) != u16::from_be_bytes([message[2], message[3]])
    {
        return None;
    }
    let target = Ipv6Addr::from(<[u8; 16]>::try_from(&message[8..ND]).ok()?);
    if target.is_multicast() || target.is_unspecified() {
        return None;
    }
    let options = options(&message[ND..])?;
    match message[0] {
        SOLICITATION => {
            let probe = source.is_unspecified();
            if probe && (destination != solicited_node(target) || options.source.is_some()) {
                return None;
            }
            let asker = options.source.unwrap_or(from);
            Some(Heard {
                claim: (!probe).then_some(Claim {
                    address: source.into(),
                    by: asker,
                }),
                question: Some(Question {
                    target: target.into(),
                    asker,
                    source: source.into(),
                }),
            })
        }
        ADVERTISEMENT => {
            if source.is_unspecified()
                || (destination.is_multicast() && message[4] & SOLICITED != 0)
            {
                return None;
            }
            Some(Heard {
                claim: Some(Claim {
                    address: target.into(),
                    by: options.target.unwrap_or(from),
                }),
                question: None,
            })
        }
        _ => None,
    }
}

#[derive(Default)]
struct Options {
    source: Option<MacAddr>,
    target: Option<MacAddr>,
}

/// The link-layer addresses among the options; nothing if the options are malformed.
fn options(mut bytes: &[u8]) -> Option<Options> {
    let mut found = Options::default();
    while !bytes.is_empty() {
        let length = usize::from(*bytes.get(1)?) * 8;
        if length == 0 {
            return None;
        }
        let option = bytes.get(..length)?;
        if option.len() == LINK_LAYER_OPTION {
            let mac = MacAddr(option[2..8].try_into().ok()?);
            match option[0] {
                SOURCE_LINK_LAYER => found.source = Some(mac),
                TARGET_LINK_LAYER => found.target = Some(mac),
                _ => {} // a host ignores what it does not know
            }
        }
        bytes = &bytes[length..];
    }
    let unicast = |mac: Option<MacAddr>| mac.is_none_or(|mac| mac.0[0] & 1 == 0);
    (unicast(found.source) && unicast(found.target)).then_some(found)
}

/// The payload of a hello frame.
pub(super) fn parse_hello(frame: &[u8]) -> Option<(MacAddr, &[u8])> {
    let ethernet = EthernetPacket::new(frame)?;
    if ethernet.get_ethertype() != EtherType(HELLO) {
        return None;
    }
    Some((station(ethernet.get_source().octets())?, &frame[ETHERNET..]))
}

/// The address, if it can be one station's.
fn station(mac: [u8; 6]) -> Option<MacAddr> {
    let mac = MacAddr(mac);
    (mac.0[0] & 1 == 0 && mac.0 != [0; 6]).then_some(mac)
}

/// Answers an ARP request.
pub(super) fn arp_reply(mac: MacAddr, vip: Ipv4Addr, to: MacAddr, source: Ipv4Addr) -> Vec<u8> {
    arp(ArpOperations::Reply, to, (mac, vip), (to, source))
}

/// An unasked ARP request and reply, since some stations heed only one of them.
pub(super) fn arp_gratuitous(mac: MacAddr, vip: Ipv4Addr) -> [Vec<u8>; 2] {
    [
        arp(
            ArpOperations::Request,
            BROADCAST,
            (mac, vip),
            (MacAddr([0; 6]), vip),
        ),
        arp(ArpOperations::Reply, BROADCAST, (mac, vip), (mac, vip)),
    ]
}

/// An ARP probe (RFC 5227 section 2.1.1).
pub(super) fn arp_probe(mac: MacAddr, vip: Ipv4Addr) -> Vec<u8> {
    arp(
        ArpOperations::Request,
        BROADCAST,
        (mac, Ipv4Addr::UNSPECIFIED),
        (MacAddr([0; 6]), vip),
    )
}

/// Answers a solicitation: to the asker with the solicited flag, or to all nodes without if it was a probe.
pub(super) fn advertisement(
    mac: MacAddr,
    from: Ipv6Addr,
    vip: Ipv6Addr,
    to: MacAddr,
    source: Ipv6Addr,
) -> Vec<u8> {
    if source.is_unspecified() {
        return unsolicited_advertisement(mac, from, vip);
    }
    let flags = SOLICITED | OVERRIDE;
    let option = Some((TARGET_LINK_LAYER, mac));
    nd(
        (ADVERTISEMENT, flags),
        vip,
        option,
        (mac, from),
        (to, source),
    )
}

/// An unasked advertisement to all nodes.
pub(super) fn unsolicited_advertisement(mac: MacAddr, from: Ipv6Addr, vip: Ipv6Addr) -> Vec<u8> {
    nd(
        (ADVERTISEMENT, OVERRIDE),
        vip,
        Some((TARGET_LINK_LAYER, mac)),
        (mac, from),
        (multicast(ALL_NODES), ALL_NODES),
    )
}

/// A probe as in duplicate address detection (RFC 4862 section 5.4.2).
pub(super) fn nd_probe(mac: MacAddr, vip: Ipv6Addr) -> Vec<u8> {
    let group = solicited_node(vip);
    nd(
        (SOLICITATION, 0),
        vip,
        None,
        (mac, Ipv6Addr::UNSPECIFIED),
        (multicast(group), group),
    )
}

/// A hello frame.
pub(super) fn hello(mac: MacAddr, to: MacAddr, payload: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(to, mac, EtherType(HELLO), payload.len());
    frame[ETHERNET..].copy_from_slice(payload);
    frame
}

/// The group in which solicitations for `address` are sent.
pub(super) fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// The Ethernet group of an IPv6 group (RFC 2464 section 7).
fn multicast(group: Ipv6Addr) -> MacAddr {
    let [.., a, b, c, d] = group.octets();
    MacAddr([0x33, 0x33, a, b, c, d])
}

fn arp(
    operation: ArpOperation,
    to: MacAddr,
    sender: (MacAddr, Ipv4Addr),
    target: (MacAddr, Ipv4Addr),
) -> Vec<u8> {
    let mut frame = ethernet(to, sender.0, EtherTypes::Arp, ARP);
    let mut arp =
        MutableArpPacket::new(&mut frame[ETHERNET..]).expect("the buffer is as long as ARP");
    arp.set_hardware_type(ArpHardwareTypes::Ethernet);
    arp.set_protocol_type(EtherTypes::Ipv4);
    arp.set_hw_addr_len(6);
    arp.set_proto_addr_len(4);
    arp.set_operation(operation);
    arp.set_sender_hw_addr(sender.0.0.into());
    arp.set_sender_proto_addr(sender.1);
    arp.set_target_hw_addr(target.0.0.into());
    arp.set_target_proto_addr(target.1);
    frame
}

fn nd(
    (kind, flags): (u8, u8),
    target: Ipv6Addr,
    option: Option<(u8, MacAddr)>,
    from: (MacAddr, Ipv6Addr),
    to: (MacAddr, Ipv6Addr),
) -> Vec<u8> {
    let mut message = vec![0; ND];
    message[0] = kind;
    message[4] = flags;
    message[8..].copy_from_slice(&target.octets());
    if let Some((option, mac)) = option {
        message.extend([option, 1]);
        message.extend(mac.0);
    }
    let sum = checksum(&message, from.1, to.1).to_be_bytes();
    message[2..4].copy_from_slice(&sum);

    let mut frame = ethernet(to.0, from.0, EtherTypes::Ipv6, IPV6 + message.len());
    let mut ip = MutableIpv6Packet::new(&mut frame[ETHERNET..])
        .expect("the buffer is longer than an IPv6 header");
    ip.set_version(6);
    ip.set_payload_length(u16::try_from(message.len()).expect("at most 32 bytes"));
    ip.set_next_header(IpNextHeaderProtocols::Icmpv6);
    ip.set_hop_limit(255);
    ip.set_source(from.1);
    ip.set_destination(to.1);
    ip.set_payload(&message);
    frame
}

/// The checksum that the message should carry, whatever it carries now.
fn checksum(message: &[u8], source: Ipv6Addr, destination: Ipv6Addr) -> u16 {
    pnet_packet::util::ipv6_checksum(
        message,
        1, // its own place, in words
        &[],
        &source,
        &destination,
        IpNextHeaderProtocols::Icmpv6,
    )
}

fn ethernet(to: MacAddr, from: MacAddr, kind: EtherType, payload: usize) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + payload];
    let mut header =
        MutableEthernetPacket::new(&mut frame).expect("the buffer is longer than a header");
    header.set_destination(to.0.into());
    header.set_source(from.0.into());
    header.set_ethertype(kind);
    frame
}

#[cfg(test)]
mod tests;
