//! Answers of the gateway's own.

use super::*;

/// An ICMP error's type, code and the word behind its checksum; what it quotes.
fn error(frame: &[u8]) -> (u8, u8, u32, &[u8]) {
    let at = transport(frame);
    let word = u32::from_be_bytes(frame[at + 4..at + 8].try_into().expect("four"));
    // The padding.
    (
        frame[at],
        frame[at + 1],
        word,
        &frame[at + 8..frame.len() - 2],
    )
}

/// The frame without what is behind its packet.
pub(super) fn unpadded(frame: &[u8]) -> Vec<u8> {
    frame[..frame.len() - 2].to_vec()
}

fn is_an_answer(out: &[u8], to: &[u8], from: IpAddr) {
    assert_eq!((&out[..6], &out[6..12]), (&to[6..12], &to[..6]));
    assert_eq!((source(out), destination(out)), (from, source(to)));
    assert!(is_right(&unpadded(out)));
}

#[test]
fn an_expired_packet_is_answered() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let kind = if world.pod.is_ipv4() { 11 } else { 3 };
        for payload in [
            mk_udp(40_000, 33_434, &[7; 20]),
            mk_udp(40_001, 33_434, &[]),
        ] {
            // With a binding and without: it makes none.
            for _ in 0..2 {
                let probe = mk(OTHER, world.pod, world.remote, 17, 1, &payload);
                let before = gate.count(Reason::Bound);
                let (action, out) = gate.comes(&probe);
                assert_eq!((action, gate.count(Reason::Bound)), (SENT, before));
                is_an_answer(&out, &probe, world.own);
                let (is, code, word, quoted) = error(&out);
                assert_eq!((is, code, word), (kind, 0, 0));
                assert_eq!(*quoted, probe[14..14 + quoted.len()]);
                let next = mk(OTHER, world.pod, world.remote, 17, 2, &payload);
                let (action, out) = gate.comes(&next);
                assert_eq!((action, ttl(&out), source(&out)), (SENT, 1, world.egress));
            }
        }
        // On its way in.
        let back = mk(
            STRANGER,
            world.remote,
            world.egress,
            17,
            1,
            &mk_udp(33_434, 40_000, b""),
        );
        let (action, out) = gate.comes(&back);
        assert_eq!(action, SENT);
        is_an_answer(&out, &back, world.egress);
        assert_eq!(error(&out).0, kind);
    }
}

#[test]
fn a_packet_that_is_too_big_is_answered() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let header = if world.pod.is_ipv4() { 20 } else { 40 };
        let (kind, code) = if world.pod.is_ipv4() { (3, 4) } else { (2, 0) };
        let room = usize::try_from(MTU).expect("small") - header - 8;
        let ways = [
            (OTHER, world.pod, world.remote, 40_000, 53, world.own),
            (
                STRANGER,
                world.remote,
                world.egress,
                53,
                40_000,
                world.egress,
            ),
        ];
        for (mac, from, to, source_port, port, signer) in ways {
            let fits = mk(
                mac,
                from,
                to,
                17,
                64,
                &mk_udp(source_port, port, &vec![1; room]),
            );
            assert_ne!(source(&gate.comes(&fits).1), signer);
            let big = mk(
                mac,
                from,
                to,
                17,
                64,
                &mk_udp(source_port, port, &vec![1; room + 1]),
            );
            let (action, out) = gate.comes(&big);
            assert_eq!(action, SENT);
            is_an_answer(&out, &big, signer);
            let (is, of, word, quoted) = error(&out);
            assert_eq!((is, of, word), (kind, code, MTU));
            assert_eq!(*quoted, big[14..14 + quoted.len()]);
        }
    }
}

/// Whoever asks for more than the policy allows is told so at once.
#[test]
fn what_is_past_a_quota_fails_fast() {
    for world in WORLDS {
        let mut egress = mk_egress();
        for policy in egress.policies.values_mut() {
            policy.ports = Some(1);
        }
        let mut gate = Gate::with(&egress, Times::default(), 0);
        assert!(gate.port_of(world, world.pod, 40_000).is_some());
        let before = gate.count(Reason::Quota);

        let syn = mk(
            OTHER,
            world.friend,
            world.remote,
            6,
            64,
            &mk_tcp(40_001, 443, SYN),
        );
        let (action, out) = gate.comes(&syn);
        assert_eq!(action, SENT);
        is_an_answer(&out, &syn, world.remote);
        let at = transport(&out);
        assert_eq!(ports(&out), (443, 40_001));
        assert_eq!(out[at + 13], RST | ACK);
        // The SYN's number is 7.
        assert_eq!(out[at + 8..at + 12], [0, 0, 0, 8]);

        let datagram = mk(
            OTHER,
            world.friend,
            world.remote,
            17,
            64,
            &mk_udp(40_001, 53, b"x"),
        );
        let (action, out) = gate.comes(&datagram);
        assert_eq!(action, SENT);
        is_an_answer(&out, &datagram, world.own);
        let prohibited = if world.pod.is_ipv4() { (3, 13) } else { (1, 1) };
        assert_eq!((error(&out).0, error(&out).1), prohibited);
        assert_eq!(gate.count(Reason::Quota), before + 2);

        // This node's own pods are told from below.
        let syn = mk(
            OWN,
            world.local,
            world.remote,
            6,
            63,
            &mk_tcp(40_002, 443, SYN),
        );
        let (action, out, mark) = gate.run(GATEWAY_EGRESS, &syn, 0x3000_0000);
        assert_eq!((action, mark), (SENT, 0));
        is_an_answer(&out, &syn, world.remote);
        // The other policy is not concerned.
        let syn = mk(
            OTHER,
            world.stranger,
            world.remote,
            6,
            64,
            &mk_tcp(40_000, 443, SYN),
        );
        assert_eq!(source(&gate.comes(&syn).1), world.second);
    }
}

/// Neither errors nor fragments are answered by errors, and not more of them are sent than is allowed.
#[test]
fn errors_are_limited() {
    let mut gate = Gate::load();
    let [world, _] = WORLDS;
    let begin = mk(
        OTHER,
        world.pod,
        world.remote,
        17,
        64,
        &mk_udp(40_000, 53, b"x"),
    );
    assert_eq!(gate.comes(&begin).0, SENT);
    let mut inner = mk_ip(world.remote, world.pod, 17, 60, &mk_udp(53, 40_000, b"x"));
    inner.truncate(28);
    let mut message = vec![3, 3, 0, 0, 0, 0, 0, 0];
    message.extend(inner);
    let expired = mk(OTHER, world.pod, world.remote, 1, 1, &message);
    assert_eq!(gate.comes(&expired).0, DROPPED);

    gate.settle(Times::default(), 0, 5);
    let probe = mk(
        OTHER,
        world.pod,
        world.remote,
        17,
        1,
        &mk_udp(40_000, 53, b"x"),
    );
    let fates: Vec<u32> = (0..200).map(|_| gate.comes(&probe).0).collect();
    let sent = fates.iter().filter(|fate| **fate == SENT).count();
    // The second may have turned, and the CPU.
    assert!((5..=30).contains(&sent), "{sent}");
    assert!(gate.count(Reason::Limited) >= 170);
}
