use std::fmt::Write;

use proptest::prelude::*;

use super::*;

const MAC: MacAddr = MacAddr([2, 0x88, 0, 0, 0, 9]);
const ASKER: MacAddr = MacAddr([2, 0x88, 0, 0, 0, 0x64]);
const VIP: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 200);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 100);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 0x12, 0x3456);
const LOCAL6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 0, 0x100);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes any text");
        text
    })
}

#[test]
fn arp_as_on_the_wire() {
    assert_eq!(
        hex(&arp_reply(MAC, VIP, ASKER, CLIENT)),
        concat!(
            "028800000064",
            "028800000009",
            "0806",
            "0001080006040002",
            "0288000000090a5800c8",
            "0288000000640a580064",
        )
    );
    let [request, reply] = arp_gratuitous(MAC, VIP);
    assert_eq!(
        hex(&request),
        concat!(
            "ffffffffffff",
            "028800000009",
            "0806",
            "0001080006040001",
            "0288000000090a5800c8",
            "0000000000000a5800c8",
        )
    );
    assert_eq!(
        hex(&reply),
        concat!(
            "ffffffffffff",
            "028800000009",
            "0806",
            "0001080006040002",
            "0288000000090a5800c8",
            "0288000000090a5800c8",
        )
    );
    assert_eq!(
        hex(&arp_probe(MAC, VIP)),
        concat!(
            "ffffffffffff",
            "028800000009",
            "0806",
            "0001080006040001",
            "02880000000900000000",
            "0000000000000a5800c8",
        )
    );
}

#[test]
fn nd_as_on_the_wire() {
    assert_eq!(
        hex(&advertisement(MAC, LOCAL6, VIP6, ASKER, CLIENT6)),
        concat!(
            "028800000064",
            "028800000009",
            "86dd",
            "6000000000203aff",
            "fe800000000000000000000000000009",
            "fd000088000000000000000000000100",
            "8800",
            "e40e",
            "60000000",
            "fd000088000000000000000000123456",
            "0201028800000009",
        )
    );
    assert_eq!(
        hex(&advertisement(
            MAC,
            LOCAL6,
            VIP6,
            ASKER,
            Ipv6Addr::UNSPECIFIED
        )),
        concat!(
            "333300000001",
            "028800000009",
            "86dd",
            "6000000000203aff",
            "fe800000000000000000000000000009",
            "ff020000000000000000000000000001",
            "8800",
            "2394",
            "20000000",
            "fd000088000000000000000000123456",
            "0201028800000009",
        )
    );
    assert_eq!(
        hex(&nd_probe(MAC, VIP6)),
        concat!(
            "3333ff123456",
            "028800000009",
            "86dd",
            "6000000000183aff",
            "00000000000000000000000000000000",
            "ff0200000000000000000001ff123456",
            "8700",
            "144f",
            "00000000",
            "fd000088000000000000000000123456",
        )
    );
}

#[test]
fn arp_is_understood() {
    let request = arp(
        ArpOperations::Request,
        BROADCAST,
        (ASKER, CLIENT),
        (MacAddr([0; 6]), VIP),
    );
    let claim = |address: Ipv4Addr, by| {
        Some(Claim {
            address: address.into(),
            by,
        })
    };
    let question = |source: Ipv4Addr| {
        Some(Question {
            target: VIP.into(),
            asker: ASKER,
            source: source.into(),
        })
    };
    assert_eq!(
        parse_arp(&request),
        Some(Heard {
            claim: claim(CLIENT, ASKER),
            question: question(CLIENT)
        })
    );
    assert_eq!(
        parse_arp(&arp_probe(ASKER, VIP)),
        Some(Heard {
            claim: None,
            question: question(Ipv4Addr::UNSPECIFIED)
        })
    );
    for frame in arp_gratuitous(MAC, VIP) {
        assert_eq!(
            parse_arp(&frame),
            Some(Heard {
                claim: claim(VIP, MAC),
                question: None
            })
        );
    }
}

#[test]
fn arp_that_says_nothing() {
    let frame = arp_reply(MAC, VIP, ASKER, CLIENT);
    assert!(parse_arp(&frame).is_some());
    assert_eq!(parse_arp(&frame[..41]), None);
    // hardware type, protocol type, lengths, operation, a group as the sender
    for (at, value) in [
        (15, 6),
        (16, 9),
        (18, 8),
        (19, 16),
        (21, 3),
        (22, 1),
        (12, 9),
    ] {
        let mut broken = frame.clone();
        broken[at] = value;
        assert_eq!(parse_arp(&broken), None, "byte {at}");
    }
}

#[test]
fn nd_is_understood() {
    let probe = parse_nd(&nd_probe(ASKER, VIP6)).unwrap();
    assert_eq!(probe.claim, None);
    assert_eq!(
        probe.question,
        Some(Question {
            target: VIP6.into(),
            asker: ASKER,
            source: Ipv6Addr::UNSPECIFIED.into()
        })
    );
    // the second line-layer address is where the answer goes, not the frame's source
    let solicitation = nd(
        (SOLICITATION, 0),
        VIP6,
        Some((SOURCE_LINK_LAYER, ASKER)),
        (MAC, CLIENT6),
        (MAC, VIP6),
    );
    let heard = parse_nd(&solicitation).unwrap();
    assert_eq!(
        heard.claim,
        Some(Claim {
            address: CLIENT6.into(),
            by: ASKER
        })
    );
    assert_eq!(
        heard.question,
        Some(Question {
            target: VIP6.into(),
            asker: ASKER,
            source: CLIENT6.into()
        })
    );
    let heard = parse_nd(&unsolicited_advertisement(MAC, LOCAL6, VIP6)).unwrap();
    assert_eq!(
        heard,
        Heard {
            claim: Some(Claim {
                address: VIP6.into(),
                by: MAC
            }),
            question: None
        }
    );
}

#[test]
fn nd_that_says_nothing() {
    let frame = advertisement(MAC, LOCAL6, VIP6, ASKER, CLIENT6);
    assert!(parse_nd(&frame).is_some());
    for cut in 0..frame.len() {
        assert_eq!(parse_nd(&frame[..cut]), None, "cut at {cut}");
    }
    for (at, value, what) in [
        (14, 0x40, "version"),
        (20, 17, "next header"),
        (21, 254, "hop limit"),
        (56, 0, "checksum"),
        (70, 1, "target, under the checksum"),
    ] {
        let mut broken = frame.clone();
        broken[at] = value;
        assert_eq!(parse_nd(&broken), None, "{what}");
    }
    let refused = |frame: Vec<u8>, why| assert_eq!(parse_nd(&frame), None, "{why}");
    let option = Some((SOURCE_LINK_LAYER, ASKER));
    let nowhere = (ASKER, Ipv6Addr::UNSPECIFIED);
    let group = solicited_node(VIP6);
    refused(
        nd(
            (SOLICITATION, 0),
            VIP6,
            option,
            nowhere,
            (multicast(group), group),
        ),
        "a probe tells no link-layer address",
    );
    refused(
        nd((SOLICITATION, 0), VIP6, None, nowhere, (MAC, VIP6)),
        "a probe goes to the group",
    );
    refused(
        nd(
            (SOLICITATION, 0),
            group,
            None,
            (ASKER, CLIENT6),
            (MAC, VIP6),
        ),
        "a group is no target",
    );
    refused(
        nd(
            (ADVERTISEMENT, SOLICITED),
            VIP6,
            None,
            (MAC, LOCAL6),
            (multicast(ALL_NODES), ALL_NODES),
        ),
        "to a group, solicited",
    );
    refused(
        nd((133, 0), VIP6, None, (MAC, LOCAL6), (MAC, VIP6)),
        "a router solicitation",
    );
    let mut endless = frame.clone();
    endless[79] = 0;
    let sum = checksum(&endless[54..], LOCAL6, CLIENT6).to_be_bytes();
    endless[56..58].copy_from_slice(&sum);
    refused(endless, "an option without length");
}

#[test]
fn hellos_carry_what_they_were_given() {
    let frame = hello(MAC, HELLO_GROUP, b"opaque");
    assert_eq!(frame[..6], HELLO_GROUP.0);
    assert_eq!(parse_hello(&frame), Some((MAC, &b"opaque"[..])));
    assert_eq!(parse_hello(&arp_probe(MAC, VIP)), None);
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = (parse_arp(&bytes), parse_nd(&bytes), parse_hello(&bytes));
    }

    /// Bytes that pass the first checks.
    #[test]
    fn any_message_is_survived(
        kind in SOLICITATION..=ADVERTISEMENT,
        rest in proptest::collection::vec(any::<u8>(), 0..80),
        claimed in any::<u16>(),
        lie: bool,
    ) {
        let mut frame = advertisement(MAC, LOCAL6, VIP6, ASKER, CLIENT6);
        frame.truncate(54);
        let mut message = vec![kind, 0, 0, 0];
        message.extend(rest);
        let sum = checksum(&message, LOCAL6, CLIENT6).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
        let length = if lie { claimed } else { u16::try_from(message.len()).unwrap() };
        frame[18..20].copy_from_slice(&length.to_be_bytes());
        frame.extend(message);
        let _ = parse_nd(&frame);
    }
}
