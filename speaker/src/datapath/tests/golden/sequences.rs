//! TCP flows of the same addresses and ports, told apart by their sequence numbers.

use landfall_ebpf_common::handing_on::FIRST_TTL;

use super::native::{endpoint, mk_native, mk_sound};
use super::*;

/// Somewhere, so that what follows goes past the end of the numbers.
const AT: u32 = 4_294_000_000;
/// Further than any window.
const FAR: u32 = 2_000_000_000;
/// Not known here.
const BACK: Fate = Fate::HandedOn("third", FIRST_TTL - 1);

/// A segment of a client whose flow is this node's.
fn mk_segment(vip: IpAddr, port: u16, flags: u8, sequence: u32) -> Vec<u8> {
    mk(vip, 6, &mk_tcp_at(port, 80, flags, sequence))
}

/// The same as a question from another node.
fn mk_question(vip: IpAddr, port: u16, sequence: u32) -> Vec<u8> {
    let packet = mk_tcp_at(port, 80, ACK, sequence);
    mk_from("third", FIRST_TTL, vip, 6, &packet)
}

/// A connection that its client has closed is not taken for the next one from the same port, which another node delivers;
/// but one that is closed from one side alone goes on.
#[test]
fn a_port_that_is_used_again_may_be_another_nodes() {
    let mut program = Program::load();
    for vip in VIPS {
        let port = port_of(vip, &[("here", &NODES)]);
        let of = |flags, sequence| mk_segment(vip, port, flags, sequence);
        let asks = |sequence| mk_question(vip, port, sequence);
        // As far on as Linux takes the next connection's from the last one's, and as random as may be.
        for (end, further) in [
            (FIN | ACK, 65_538),
            (FIN | ACK, 2_000_000_000),
            (RST, 2_000_000_000),
        ] {
            program.port(vip, Protocol::Tcp, 80, mk_port(&NODES));
            program.tables.forget_history().expect("the maps take it");
            for frame in [of(SYN, AT), of(ACK, AT + 1), of(end, AT + 500)] {
                assert_eq!(program.fate(&frame), Fate::Next);
            }
            // What is left of it: acknowledgements, the FIN again, with data that came before it.
            let after = AT + 500 + u32::from(end & FIN);
            for sequence in [after, AT + 500, AT - 1_000_000] {
                assert_eq!(program.fate(&of(ACK, sequence)), Fate::Next);
                assert_eq!(program.fate(&asks(sequence)), Fate::Next, "asked");
            }
            // Another began elsewhere: this node says that it does not know it, and asks when it is sent it.
            let next = (AT + 500).wrapping_add(further);
            assert_eq!(program.fate(&asks(next)), BACK);
            program.port(vip, Protocol::Tcp, 80, mk_port(&["other"]));
            program.port(vip, Protocol::Tcp, 80, mk_port(&["here"]));
            assert_eq!(
                program.fate(&of(ACK, next)),
                Fate::HandedOn("other", FIRST_TTL)
            );
            // One that begins here is this node's.
            for frame in [of(SYN, next), of(ACK, next.wrapping_add(1))] {
                assert_eq!(program.fate(&frame), Fate::Next);
            }
            assert_eq!(program.fate(&asks(next.wrapping_add(2))), Fate::Next);
            assert_eq!(program.fate(&of(RST, next.wrapping_add(2))), Fate::Next);
        }
    }
}

/// A flow of which this is the client's last sequence number, and which that node asks for.
fn mk_flow(program: &mut Program, vip: IpAddr, at: u32) -> u16 {
    let port = port_of(vip, &[("here", &NODES)]);
    program.port(vip, Protocol::Tcp, 80, mk_port(&NODES));
    for (flags, sequence) in [(SYN, at.wrapping_sub(1)), (ACK, at)] {
        let frame = mk_segment(vip, port, flags, sequence);
        assert_eq!(program.fate(&frame), Fate::Next);
    }
    port
}

/// What is sent for another flow, or by somebody who guesses, ends none: not where it is far, and where it is near the
/// client goes on. An endpoint takes only the one right number.
#[test]
fn what_is_none_of_a_flows_does_not_end_it() {
    const MANY: u32 = 1 << 20;
    let mut program = Program::load();
    for vip in VIPS {
        for end in [RST, RST | ACK, FIN | ACK] {
            for away in [
                FAR,
                1 << 30,
                8 * MANY,
                3 * MANY,
                200_000,
                1,
                0_u32.wrapping_sub(100_000),
                0_u32.wrapping_sub(3 * MANY),
                0_u32.wrapping_sub(8 * MANY),
            ] {
                // As one connection's: what comes before its end is as far from this one.
                for before in [&[][..], &[ACK], &[ACK, ACK]] {
                    let port = mk_flow(&mut program, vip, AT);
                    for flags in before.iter().chain([&end]) {
                        let frame = mk_segment(vip, port, *flags, AT.wrapping_add(away));
                        assert_eq!(program.fate(&frame), Fate::Next, "the endpoint judges");
                    }
                    let mut at = AT;
                    for step in 0..80 {
                        let what = format!("{vip} {end:x} {away} {before:?} {step}");
                        let question = mk_question(vip, port, at);
                        assert_eq!(program.fate(&question), Fate::Next, "{what}");
                        at = at.wrapping_add(60_000);
                    }
                    // It has an end all the same, with data in front of it.
                    let mut last = mk_tcp_at(port, 80, FIN | ACK, at);
                    last.extend([0; 1000]);
                    assert_eq!(program.fate(&mk(vip, 6, &last)), Fate::Next);
                    let end = at.wrapping_add(1001);
                    for sequence in [end, at, end.wrapping_sub(MANY)] {
                        let question = mk_question(vip, port, sequence);
                        assert_eq!(program.fate(&question), Fate::Next);
                    }
                    let next = mk_question(vip, port, end.wrapping_add(65_537));
                    assert_eq!(program.fate(&next), BACK, "{end:x} {away}: it has ended");
                }
            }
        }
    }
}

/// However much a client has sent, and however fast.
#[test]
fn a_flow_ends_where_its_client_is() {
    let mut program = Program::load();
    for vip in VIPS {
        let port = mk_flow(&mut program, vip, AT);
        let place = |step: u32| AT.wrapping_add(step * (3 << 20));
        for sequence in (0..40).map(place) {
            let frame = mk_segment(vip, port, ACK, sequence);
            assert_eq!(program.fate(&frame), Fate::Next);
        }
        let end = place(39).wrapping_add(1 << 20);
        let frame = mk_segment(vip, port, FIN | ACK, end);
        assert_eq!(program.fate(&frame), Fate::Next);
        let question = mk_question(vip, port, end.wrapping_add(100_000));
        assert_eq!(program.fate(&question), BACK, "it has ended");
    }
}

/// How a connection ended of which no more than its SYN was heard nobody sees: what is far from it is another's.
#[test]
fn a_syn_does_not_hold_its_port_for_others() {
    let mut program = Program::load();
    for vip in VIPS {
        let port = port_of(vip, &[("here", &NODES)]);
        program.port(vip, Protocol::Tcp, 80, mk_port(&NODES));
        let frame = mk_segment(vip, port, SYN, AT);
        assert_eq!(program.fate(&frame), Fate::Next);
        let near = mk_question(vip, port, AT.wrapping_add(1));
        let far = mk_question(vip, port, AT.wrapping_add(FAR));
        assert_eq!(program.fate(&far), BACK);
        assert_eq!(program.fate(&near), Fate::Next);
        // Its client does not know it, or ends it with its first word.
        for end in [RST, FIN | ACK] {
            for (flags, sequence) in [(SYN, AT), (end, AT.wrapping_add(1))] {
                let frame = mk_segment(vip, port, flags, sequence);
                assert_eq!(program.fate(&frame), Fate::Next);
            }
            assert_eq!(program.fate(&far), BACK, "{end:x}");
        }
    }
}

/// An endpoint resets what it does not know: the next connection from the same port may be another node's.
#[test]
fn what_an_endpoint_resets_leaves_nothing() {
    let mut program = Program::load();
    for vip in VIPS {
        let state = PortState {
            nodes: mk_spread(&NODES),
            ..mk_native([endpoint(vip, 1)])
        };
        program.port(vip, Protocol::Tcp, 80, state);
        let port = port_of(vip, &[("here", &NODES)]);
        for flags in [&[ACK][..], &[SYN], &[ACK, ACK], &[SYN, ACK]] {
            for (sequence, flags) in (AT..).zip(flags) {
                let packet = mk_tcp_at(port, 80, *flags, sequence);
                program.handed_up(&mk_sound(vip, 6, &packet));
            }
            program.resets(vip, port);
            if flags.len() == 1 {
                let same = mk_question(vip, port, AT + 1);
                assert_eq!(program.fate(&same), BACK, "{flags:?}");
            }
            let next = mk_question(vip, port, AT.wrapping_add(FAR));
            assert_eq!(program.fate(&next), BACK, "{flags:?}");
        }
    }
}
