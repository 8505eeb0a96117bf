//! The tunnel to nodes that are not on the segment.

use landfall_core::steering::seed;
use landfall_ebpf_common::tunnel_mac;

use super::guard::{ELSEWHERE, NOBODYS, TENANT, mk_gateway, mk_leaving, pod};
use super::*;

/// The tunnel's interface; the test device stands for it where frames come out.
const TUNNEL: u32 = 7;

fn mk_far(node: &str, interface: u32) -> Change {
    let id = NodeId {
        interface,
        ..mk_id(node)
    };
    let state = NodeState {
        mac: Some(tunnel_mac(seed(&node.into()))),
        address: Some("203.0.113.9".parse().unwrap()),
        routed: BTreeSet::new(),
        ..mk_node(node)
    };
    Change::Node(id, Some(state))
}

#[test]
fn what_is_for_a_node_off_the_segment_goes_into_the_tunnel() {
    let mut program = Program::load();
    program.change(&mk_far("third", TUNNEL));
    let reach = Reach {
        uplink: INTERFACE,
        tunnel: TUNNEL,
        far: [NodeName::from("third")]
            .into_iter()
            .collect::<BTreeSet<_>>()
            .into(),
    };
    for vip in VIPS {
        let state = PortState {
            reach: reach.clone(),
            ..mk_port(&["third"])
        };
        program.port(vip, Protocol::Tcp, 80, state);
        let frame = mk(vip, 6, &mk_tcp(4000, 80, SYN));
        let (action, out) = program.raw(&frame);
        assert_eq!(action, 7, "redirected");
        assert_eq!(out[..6], tunnel_mac(seed(&"third".into())));
        assert_eq!(out[6..12], tunnel_mac(seed(&"here".into())));
        assert_eq!(out[12..], frame[12..]);
        assert_eq!(
            program.driven(&frame),
            (XDP_PASS, frame),
            "no driver's business"
        );
    }
}

#[test]
fn only_known_nodes_packets_to_vips_come_out_of_it() {
    let mut program = Program::load();
    program.change(&mk_far("third", INTERFACE));
    for vip in VIPS {
        program.port(vip, Protocol::Tcp, 80, mk_port(&["here"]));
        let payload = mk_ip(client(vip), vip, 6, 64, &mk_tcp(4000, 80, SYN));
        let from = |mac| mk_frame_from(mac, ethertype(vip), &payload);
        let known = from(tunnel_mac(seed(&"third".into())));
        assert_eq!(
            program.run(TUNNEL_INGRESS, &known),
            (u32::MAX, known),
            "delivered"
        );
        let stranger = from([2, 0, 0, 0, 0, 99]);
        assert_eq!(program.run(TUNNEL_INGRESS, &stranger).0, 2, "dropped");
        let other: IpAddr = if vip.is_ipv4() {
            "192.0.2.222".parse().unwrap()
        } else {
            "2001:db8::222".parse().unwrap()
        };
        let elsewhere = mk_ip(client(vip), other, 6, 64, &mk_tcp(4000, 80, SYN));
        let elsewhere = mk_frame_from(
            tunnel_mac(seed(&"third".into())),
            ethertype(vip),
            &elsewhere,
        );
        assert_eq!(program.run(TUNNEL_INGRESS, &elsewhere).0, 2, "to no VIP");
    }
    let arp = mk_frame(0x0806, &[0; 28]);
    assert_eq!(program.run(TUNNEL_INGRESS, &arp).0, 2, "no IP");
}

/// A gateway hands back to the nodes of its pods what is for them, by the tunnel too.
#[test]
fn what_is_for_this_nodes_tenants_comes_out_of_it() {
    let mut program = Program::load();
    program.change(&mk_far("third", INTERFACE));
    program.change(&mk_leaving(Some(mk_gateway())));
    for (family, remote) in VIPS.map(client).into_iter().enumerate() {
        for (last, action) in [(TENANT, u32::MAX), (ELSEWHERE, 2), (NOBODYS, 2)] {
            let to = pod(family, last);
            let answer = mk_ip(remote, to, 6, 63, &mk_tcp(25, 4000, SYN | ACK));
            let from = |mac| mk_frame_from(mac, ethertype(remote), &answer);
            let known = from(tunnel_mac(seed(&"third".into())));
            assert_eq!(program.run(TUNNEL_INGRESS, &known), (action, known), "{to}");
            let stranger = from([2, 0, 0, 0, 0, 99]);
            assert_eq!(program.run(TUNNEL_INGRESS, &stranger).0, 2, "{to}: dropped");
        }
    }
}
