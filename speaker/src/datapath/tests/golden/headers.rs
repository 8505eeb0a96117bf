//! What stands between the IP header and the ports: what is looked through, and what is left alone.

use super::*;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
const TCP: u8 = 6;

/// TCP to the VIP behind these extension headers, each with as many units of 8 bytes, for a flow that is this node's.
fn mk_behind(headers: &[(u8, u8)]) -> Vec<u8> {
    let port = port_of(V6.into(), &[("third", &NODES)]);
    let mut payload = Vec::new();
    let following = headers[1..].iter().map(|(header, _)| *header).chain([TCP]);
    for ((header, units), next) in headers.iter().zip(following) {
        // A fragment's: an atomic one's (RFC 6946). Of the others all is padding (PadN).
        let length = if *header == FRAGMENT { 0 } else { units - 1 };
        let mut bytes = vec![0; usize::from(*units) * 8];
        bytes[..2].copy_from_slice(&[next, length]);
        payload.extend(bytes);
    }
    payload.extend(mk_tcp(port, 80, SYN));
    mk(V6.into(), headers[0].0, &payload)
}

#[test]
fn ipv4_options_are_looked_through() {
    let mut program = Program::load();
    let port = port_of(V4.into(), &[("other", &NODES)]);
    // No-operation (RFC 791), as many as there is room for.
    for words in 1..=10_u8 {
        let options = vec![1; usize::from(words) * 4];
        let payload = [options, mk_tcp(port, 80, SYN)].concat();
        let mut packet = mk_ip(client(V4.into()), V4.into(), TCP, 64, &payload);
        packet[0] = 0x45 + words;
        repair(&mut packet);
        assert_eq!(
            program.fate(&mk_frame(0x0800, &packet)),
            Fate::Sent("other"),
            "{words} words"
        );
    }
}

#[test]
fn four_kinds_of_extension_headers_are_looked_through_six_of_them() {
    let mut program = Program::load();
    for headers in [
        &[(HOP_BY_HOP, 1)][..],
        &[(ROUTING, 3)],
        &[(FRAGMENT, 1)],
        &[(DESTINATION, 2)],
        &[(HOP_BY_HOP, 1), (DESTINATION, 1), (ROUTING, 2)],
        &[
            (HOP_BY_HOP, 2),
            (DESTINATION, 1),
            (ROUTING, 5),
            (FRAGMENT, 1),
            (DESTINATION, 32),
            (DESTINATION, 1),
        ],
    ] {
        let fate = program.fate(&mk_behind(headers));
        assert_eq!(fate, Fate::Sent("third"), "{headers:?}");
    }
}

/// It goes up as it is, and is counted.
#[test]
fn behind_other_headers_nothing_is_looked_for() {
    let mut program = Program::load();
    let before = program.verdict(Verdict::Unserved);
    let seven = [(DESTINATION, 1); 7];
    // ESP, authentication (RFC 4302, its length is in words), no next header, mobility, HIP, Shim6, experiments.
    let others = [50, 51, 59, 135, 139, 140, 253, 254].map(|header| [(header, 2)]);
    let mut count = 0;
    for headers in others.iter().map(|it| &it[..]).chain([&seven[..]]) {
        let fate = program.fate(&mk_behind(headers));
        assert_eq!(fate, Fate::Next, "{headers:?}");
        count += 1;
    }
    assert_eq!(program.verdict(Verdict::Unserved) - before, count);
}
