//! What is forgotten and what is entered, with the real maps and made-up ages. They need root.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use landfall_core::model::Protocol;
use landfall_ebpf_common::Answer;

use super::super::super::uplink::object;
use super::super::super::{Native, PortId, PortState};
use super::*;
use crate::conntrack::TCP;

/// The kernel's clock in these tests: all ages are before it.
const NOW: Duration = Duration::from_hours(10_000);
const CLIENT: [u8; 4] = [198, 51, 100, 7];
const VIPS: [[u8; 4]; 2] = [[192, 0, 2, 200], [192, 0, 2, 201]];
/// An endpoint that serves, and one that is gone.
const HERE: [u8; 4] = [10, 0, 0, 1];
const GONE: [u8; 4] = [10, 0, 0, 2];
const SECOND: Duration = Duration::from_secs(1);

fn mk_maps() -> FlowMaps {
    let mut ebpf = object(None).expect("these tests make eBPF maps and need root");
    FlowMaps::taken(&mut ebpf).expect("the object holds the maps")
}

fn mk_endpoint(address: [u8; 4]) -> Endpoint {
    endpoint(SocketAddr::from((address, 8080)))
}

/// A client's flow to port 80 of a VIP.
fn mk_key(vip: [u8; 4], client_port: u16) -> FlowKey {
    FlowKey {
        client: VipKey::v4(CLIENT).0,
        vip: VipKey::v4(vip),
        client_port,
        port: 80,
        protocol: TCP,
    }
}

fn ago(age: Duration) -> u64 {
    u64::try_from(NOW.saturating_sub(age).as_nanos()).expect("it fits for centuries")
}

fn short_of(limit: Duration) -> Duration {
    limit.saturating_sub(SECOND)
}

/// Port 80 of these VIPs, which the endpoint here serves.
fn mk_known(vips: &[[u8; 4]]) -> Known {
    let vips: HashSet<IpAddr> = vips.iter().map(|vip| IpAddr::from(*vip)).collect();
    let port = PortState {
        native: Some(Native {
            endpoints: BTreeSet::from([SocketAddr::from((HERE, 8080))]),
            ranges: None,
        }),
        ..PortState::default()
    };
    let ports = vips
        .iter()
        .map(|vip| {
            let id = PortId {
                vip: *vip,
                protocol: Protocol::Tcp,
                port: 80,
            };
            (id, port.clone())
        })
        .collect();
    Known::new(&vips, &ports, true)
}

impl FlowMaps {
    fn put_flow(&mut self, key: &FlowKey, age: Duration, state: u32, to: Endpoint) {
        let flow = Flow {
            seen: ago(age),
            state,
            endpoint: to,
            ..Flow::default()
        };
        self.flows.insert(key, flow, 0).expect("the map has room");
    }

    fn put_answer(&mut self, key: &FlowKey, age: Duration, state: u32, to: Endpoint) {
        let vip = Endpoint {
            address: key.vip.0,
            port: key.port,
            zero: 0,
        };
        let answer = Answer {
            seen: ago(age),
            state,
            vip,
        };
        let key = key.answer(&to);
        self.answers
            .insert(key, answer, 0)
            .expect("the map has room");
    }

    /// The clients' ports of the flows, and of the answers, that are there.
    fn ports(&self) -> [BTreeSet<u16>; 2] {
        let flows = self.flows.keys().flatten().map(|key| key.client_port);
        let answers = self.answers.keys().flatten().map(|key| key.port);
        [flows.collect(), answers.collect()]
    }
}

#[test]
fn flows_end_by_their_idle_times_with_their_answers() {
    use flow_state::{CLOSING as ENDS, ESTABLISHED as LIVES};
    let (here, gone) = (mk_endpoint(HERE), mk_endpoint(GONE));
    let idle = established();
    let mut maps = mk_maps();
    // Client's port, what its side is like, what the endpoint's is, the endpoint, and whether the flow stays.
    let cases = [
        (
            1,
            (short_of(idle), LIVES),
            (short_of(idle), LIVES),
            here,
            true,
        ),
        (
            2,
            (idle + SECOND, LIVES),
            (idle + SECOND, LIVES),
            here,
            false,
        ),
        (3, (idle + SECOND, LIVES), (SECOND, LIVES), here, true),
        (4, (SECOND, LIVES), (idle + SECOND, LIVES), here, true),
        (
            5,
            (short_of(CLOSING), ENDS),
            (short_of(CLOSING), ENDS),
            here,
            true,
        ),
        (
            6,
            (CLOSING + SECOND, ENDS),
            (CLOSING + SECOND, ENDS),
            here,
            false,
        ),
        // Either end may be the one that closes, and either may be heard last.
        (
            7,
            (CLOSING + SECOND, ENDS),
            (CLOSING + SECOND, LIVES),
            here,
            false,
        ),
        (
            8,
            (CLOSING + SECOND, LIVES),
            (CLOSING + SECOND, ENDS),
            here,
            false,
        ),
        (9, (CLOSING + SECOND, ENDS), (SECOND, LIVES), here, true),
        (10, (SECOND, LIVES), (CLOSING + SECOND, ENDS), here, true),
        (
            11,
            (short_of(UNHEARD), LIVES),
            (short_of(UNHEARD), LIVES),
            gone,
            true,
        ),
        (
            12,
            (UNHEARD + SECOND, LIVES),
            (UNHEARD + SECOND, LIVES),
            gone,
            false,
        ),
        (13, (UNHEARD + SECOND, LIVES), (SECOND, LIVES), gone, true),
    ];
    for (port, (age, state), (answered, answers_state), to, _) in cases {
        let key = mk_key(VIPS[0], port);
        maps.put_flow(&key, age, state, to);
        maps.put_answer(&key, answered, answers_state, to);
    }
    // One whose answers fell out.
    let lone = mk_key(VIPS[0], 20);
    maps.put_flow(&lone, idle + SECOND, LIVES, here);

    let known = mk_known(&VIPS);
    let forgotten = forget(&mut maps, &known, &HashSet::new(), NOW);
    let stay: BTreeSet<u16> = cases
        .iter()
        .filter_map(|(port, .., stays)| stays.then_some(*port))
        .collect();
    assert_eq!(maps.ports(), [stay.clone(), stay]);
    assert_eq!(forgotten, cases.len() + 1 - maps.ports()[0].len());
    assert_eq!(forget(&mut maps, &known, &HashSet::new(), NOW), 0, "once");
}

#[test]
fn answers_to_no_flow_go() {
    let here = mk_endpoint(HERE);
    let mut maps = mk_maps();
    for (port, age) in [(1, short_of(UNHEARD)), (2, UNHEARD + SECOND)] {
        maps.put_answer(&mk_key(VIPS[0], port), age, flow_state::ESTABLISHED, here);
    }
    // Of another VIP than the flow that is there.
    maps.put_flow(&mk_key(VIPS[0], 3), SECOND, flow_state::ESTABLISHED, here);
    let other = mk_key(VIPS[1], 3);
    maps.put_answer(&other, UNHEARD + SECOND, flow_state::ESTABLISHED, here);
    forget(&mut maps, &mk_known(&VIPS), &HashSet::new(), NOW);
    assert_eq!(maps.ports(), [BTreeSet::from([3]), BTreeSet::from([1])]);
}

/// Where kube-proxy delivers, connection tracking knows what lives.
#[test]
fn untranslated_flows_end_with_their_connection() {
    let mut maps = mk_maps();
    let nobody = Endpoint::default();
    for (port, age) in [
        (1, 10 * established()),
        (2, short_of(UNHEARD)),
        (3, UNHEARD + SECOND),
    ] {
        let key = mk_key(VIPS[0], port);
        maps.put_flow(&key, age, flow_state::ESTABLISHED, nobody);
    }
    let connections = HashSet::from([Connection {
        flow: mk_key(VIPS[0], 1),
        translated: true,
    }]);
    let forgotten = forget(&mut maps, &mk_known(&VIPS), &connections, NOW);
    assert_eq!(forgotten, 1);
    assert_eq!(maps.ports()[0], BTreeSet::from([1, 2]));
}

/// What connection tracking knows of a client and an endpoint.
fn mk_connection(client_port: u16) -> FlowKey {
    FlowKey {
        vip: VipKey::v4(HERE),
        port: 8080,
        ..mk_key(VIPS[0], client_port)
    }
}

#[test]
fn a_connection_to_an_endpoint_is_entered_as_all_that_it_can_have_been() {
    let here = mk_endpoint(HERE);
    for vips in [&VIPS[..1], &VIPS[..]] {
        let mut maps = mk_maps();
        let known = mk_known(vips);
        let connection = mk_connection(4000);
        assert_eq!(enter(&mut maps, &known, &connection, 7), vips.len());
        for vip in vips {
            let flow = maps.flows.get(&mk_key(*vip, 4000), 0).expect("it is there");
            assert_eq!((flow.seen, flow.state), (7, flow_state::GUESSED));
            assert_eq!(flow.endpoint, here);
        }
        // It may as well be somebody's own connection to the endpoint, whose answers must stay as they are.
        assert!(maps.answers.get(&connection.answer(&here), 0).is_err());
        assert_eq!(enter(&mut maps, &known, &connection, 8), 0, "once");
    }
}

#[test]
fn what_the_programs_know_is_not_guessed_anew() {
    let here = mk_endpoint(HERE);
    let mut maps = mk_maps();
    let key = mk_key(VIPS[1], 4000);
    maps.put_flow(&key, SECOND, flow_state::CLOSING, here);
    maps.put_answer(&key, SECOND, flow_state::CLOSING, here);
    assert_eq!(
        enter(&mut maps, &mk_known(&VIPS), &mk_connection(4000), 7),
        0
    );
    let [flows, answers] = maps.ports();
    assert_eq!((flows.len(), answers.len()), (1, 1));
    let flow = maps.flows.get(&key, 0).expect("it is there");
    assert_eq!(flow.state, flow_state::CLOSING);
}

/// To an endpoint that serves no port of ours.
#[test]
fn a_connection_to_nothing_of_ours_is_not_entered() {
    let mut maps = mk_maps();
    let elsewhere = FlowKey {
        vip: VipKey::v4(GONE),
        ..mk_connection(4000)
    };
    assert_eq!(enter(&mut maps, &mk_known(&VIPS), &elsewhere, 7), 0);
    assert_eq!(maps.ports(), [BTreeSet::new(), BTreeSet::new()]);
}

/// A connection to an endpoint may have been translated before the maps were there; one that is begun later is its
/// client's own.
#[test]
fn connections_to_endpoints_concern_new_maps_only() {
    let known = mk_known(&VIPS);
    let later = Known {
        maps_are_new: false,
        ..mk_known(&VIPS)
    };
    let to_endpoint = Connection {
        flow: mk_connection(4000),
        translated: false,
    };
    let to_vip = Connection {
        flow: mk_key(VIPS[0], 4000),
        translated: true,
    };
    assert!(known.concerns(&to_endpoint) && !later.concerns(&to_endpoint));
    assert!(known.concerns(&to_vip) && later.concerns(&to_vip));
}
