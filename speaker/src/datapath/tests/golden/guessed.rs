//! Flows that connection tracking knew by their endpoint alone, which serves several ports: their client tells which.

use std::net::SocketAddr;

use aya::maps::HashMap;
use landfall_ebpf_common::handing_on::FIRST_TTL;
use landfall_ebpf_common::{Endpoint, Flow, FlowKey, VipKey, flow_state, map};

use super::native::{destination, endpoint, mk_answer, mk_native, mk_sound, mk_transport};
use super::*;

const PORTS: [u16; 2] = [80, 81];
const CLIENTS_PORT: u16 = 4000;

impl Program {
    fn table<V: aya::Pod>(&mut self, name: &str) -> HashMap<&mut aya::maps::MapData, FlowKey, V> {
        let map = self.ebpf.map_mut(name).expect("the object holds it");
        map.try_into().expect("of this kind")
    }

    /// Enters a flow of either port.
    fn guess(&mut self, vip: IpAddr) {
        let address = endpoint(vip, 1);
        let to = Endpoint {
            address: VipKey::from_address(address.ip()).0,
            port: address.port(),
            zero: 0,
        };
        let state = flow_state::GUESSED;
        for port in PORTS {
            let key = FlowKey {
                client: VipKey::from_address(client(vip)).0,
                vip: VipKey::from_address(vip),
                client_port: CLIENTS_PORT,
                port,
                protocol: 6,
            };
            let flow = Flow {
                seen: 0,
                state,
                endpoint: to,
                ..Flow::default()
            };
            self.table::<Flow>(map::FLOWS)
                .insert(key, flow, 0)
                .expect("the map has room");
        }
    }
}

fn mk_guessing(vip: IpAddr) -> Program {
    let mut program = Program::load();
    for port in PORTS {
        // Nobody would choose the one that the flow is with.
        program.port(vip, Protocol::Tcp, port, mk_native([endpoint(vip, 2)]));
    }
    program.guess(vip);
    program
}

#[test]
fn the_clients_next_packet_settles_a_guess() {
    for vip in VIPS {
        for settled in PORTS {
            let mut program = mk_guessing(vip);
            let answer = mk_answer(vip, 6, endpoint(vip, 1), CLIENTS_PORT);
            let of = |port| mk_answer(vip, 6, SocketAddr::new(vip, port), CLIENTS_PORT);
            assert_eq!(program.leaves(&answer), answer, "no guess is acted on");
            let mut payload = mk_transport(6, CLIENTS_PORT, settled);
            payload[13] = ACK;
            let out = program.handed_up(&mk_sound(vip, 6, &payload));
            assert_eq!(destination(&out), endpoint(vip, 1).ip(), "{vip} {settled}");
            assert_eq!(program.leaves(&answer), of(settled), "{vip}: known");
            let states: Vec<u32> = PORTS
                .iter()
                .map(|port| {
                    let flows = program.table::<Flow>(map::FLOWS);
                    let key = flows.keys().flatten().find(|key| key.port == *port);
                    flows.get(&key.expect("it is there"), 0).unwrap().state
                })
                .collect();
            for (port, state) in PORTS.into_iter().zip(states) {
                let expected = if port == settled {
                    flow_state::ESTABLISHED
                } else {
                    flow_state::GUESSED
                };
                assert_eq!(state, expected, "{vip} {port}");
            }
            // What it was not may be another node's.
            let other = PORTS.into_iter().find(|port| *port != settled);
            let packet = mk_tcp(CLIENTS_PORT, other.expect("two"), ACK);
            let question = mk_from("third", FIRST_TTL, vip, 6, &packet);
            let back = Fate::HandedOn("third", FIRST_TTL - 1);
            assert_eq!(program.fate(&question), back, "{vip} {settled}");
        }
    }
}

/// The endpoint has a connection of that client's port already: another is another endpoint's.
#[test]
fn a_new_connection_to_what_the_guess_was_not_is_none_of_it() {
    for vip in VIPS {
        let mut program = mk_guessing(vip);
        let send = |program: &mut Program, port, flags| {
            let mut payload = mk_transport(6, CLIENTS_PORT, port);
            payload[13] = flags;
            destination(&program.handed_up(&mk_sound(vip, 6, &payload)))
        };
        assert_eq!(send(&mut program, PORTS[0], ACK), endpoint(vip, 1).ip());
        assert_eq!(send(&mut program, PORTS[1], SYN), endpoint(vip, 2).ip());
        assert_eq!(send(&mut program, PORTS[1], ACK), endpoint(vip, 2).ip());
        assert_eq!(send(&mut program, PORTS[0], ACK), endpoint(vip, 1).ip());
        for (last, port) in [(1, PORTS[0]), (2, PORTS[1])] {
            let answer = mk_answer(vip, 6, endpoint(vip, last), CLIENTS_PORT);
            let expected = mk_answer(vip, 6, SocketAddr::new(vip, port), CLIENTS_PORT);
            assert_eq!(program.leaves(&answer), expected, "{vip} {port}");
        }
    }
}
