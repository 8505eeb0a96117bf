//! The few frames the lab sends and reads itself: who-has questions in ARP and ND, and their answers.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&bytes.join(":"))
    }
}

impl FromStr for Mac {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut mac = [0; 6];
        for (byte, part) in mac.iter_mut().zip(text.trim().split(':')) {
            *byte = u8::from_str_radix(part, 16)?;
        }
        Ok(Self(mac))
    }
}

/// The ethertype of ARP.
pub(crate) const ARP: u16 = 0x0806;
/// The ethertype of IPv6.
pub(crate) const IPV6: u16 = 0x86dd;

const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ICMPV6: u8 = 58;

/// The ones' complement sum of RFC 1071 over `bytes`, beginning with `sum`, complemented.
pub(crate) fn checksum(bytes: &[u8], sum: u32) -> u16 {
    let mut sum = sum;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}

/// "Who has `target`?", broadcast (RFC 826) or to the solicited-node group (RFC 4861).
pub(crate) fn who_has(target: IpAddr, source: IpAddr, mac: Mac) -> Option<Vec<u8>> {
    match (target, source) {
        (IpAddr::V4(target), IpAddr::V4(source)) => Some(arp_request(target, source, mac)),
        (IpAddr::V6(target), IpAddr::V6(source)) => Some(solicitation(target, source, mac)),
        _ => None,
    }
}

fn arp_request(target: Ipv4Addr, source: Ipv4Addr, mac: Mac) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]);
    frame.extend(mac.0);
    frame.extend(ARP.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac.0);
    frame.extend(source.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

fn solicitation(target: Ipv6Addr, source: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let [.., a, b, c] = target.octets();
    let group = Ipv6Addr::new(
        0xff02,
        0,
        0,
        0,
        0,
        1,
        0xff00 | u16::from(a),
        u16::from(b) << 8 | u16::from(c),
    );
    let mut message = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    message.extend([1, 1]);
    message.extend(mac.0);
    let mut pseudo = Vec::new();
    pseudo.extend(source.octets());
    pseudo.extend(group.octets());
    pseudo.extend([0, 0, 0, 32, 0, 0, 0, ICMPV6]);
    pseudo.extend(&message);
    let sum = checksum(&pseudo, 0).to_be_bytes();
    message[2..4].copy_from_slice(&sum);

    let mut frame = vec![0x33, 0x33, 0xff, a, b, c];
    frame.extend(mac.0);
    frame.extend(IPV6.to_be_bytes());
    frame.extend([0x60, 0, 0, 0, 0, 32, ICMPV6, 255]);
    frame.extend(source.octets());
    frame.extend(group.octets());
    frame.extend(message);
    frame
}

/// An answer, asked for or not: `sender` says that `address` is at `mac`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The address.
    pub(crate) address: IpAddr,
    /// The Ethernet address it is said to be at.
    pub(crate) mac: Mac,
    /// Who sent the frame.
    pub(crate) sender: Mac,
    /// Whether it was asked for: a reply to one station, or an advertisement with the solicited flag.
    pub(crate) solicited: bool,
}

/// The ARP reply, gratuitous ARP or neighbour advertisement in `frame`, if it is one.
pub(crate) fn parse_answer(frame: &[u8]) -> Option<Answer> {
    let sender = mac_at(frame, 6)?;
    match u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]) {
        ARP => {
            let operation = *frame.get(21)?;
            let address = Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(28..32)?).ok()?);
            let target = Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(38..42)?).ok()?);
            let gratuitous = address == target;
            (operation == 2 || gratuitous).then_some(Answer {
                address: address.into(),
                mac: mac_at(frame, 22)?,
                sender,
                solicited: operation == 2 && !gratuitous,
            })
        }
        IPV6 => {
            if *frame.get(20)? != ICMPV6 || *frame.get(54)? != NEIGHBOUR_ADVERTISEMENT {
                return None;
            }
            let address = Ipv6Addr::from(<[u8; 16]>::try_from(frame.get(62..78)?).ok()?);
            // The target link-layer address option, when it is the first, as it always is in practice.
            let mac = match frame.get(78..80) {
                Some([2, 1]) => mac_at(frame, 80)?,
                _ => sender,
            };
            Some(Answer {
                address: address.into(),
                mac,
                sender,
                solicited: *frame.get(58)? & 0x40 != 0,
            })
        }
        _ => None,
    }
}

fn mac_at(frame: &[u8], offset: usize) -> Option<Mac> {
    Some(Mac(frame.get(offset..offset + 6)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0x88, 0, 0, 0, 9]);

    #[test]
    fn a_request_is_no_answer() {
        for (target, source) in [("10.88.0.1", "10.88.0.9"), ("fd00:88::1", "fd00:88::9")] {
            let frame = who_has(target.parse().unwrap(), source.parse().unwrap(), MAC).unwrap();
            assert_eq!(parse_answer(&frame), None);
        }
    }

    #[test]
    fn gratuitous_arp_is_an_answer_nobody_asked_for() {
        let vip: IpAddr = "10.88.0.200".parse().unwrap();
        let frame = who_has(vip, vip, MAC).unwrap();
        let answer = parse_answer(&frame).unwrap();
        assert_eq!(
            (answer.address, answer.mac, answer.solicited),
            (vip, MAC, false)
        );
    }

    #[test]
    fn a_reply_names_its_sender() {
        let mut frame = who_has(
            "10.88.0.9".parse().unwrap(),
            "10.88.0.200".parse().unwrap(),
            MAC,
        )
        .unwrap();
        frame[21] = 2;
        let answer = parse_answer(&frame).unwrap();
        assert_eq!(answer.address.to_string(), "10.88.0.200");
        assert!(answer.solicited);
    }

    #[test]
    fn checksum_of_rfc_1071() {
        assert_eq!(
            checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0),
            !0xddf2
        );
    }

    #[test]
    fn macs_read_as_they_print() {
        assert_eq!(MAC.to_string().parse::<Mac>().unwrap(), MAC);
    }
}
