//! Packets to VIPs of this cluster: of a policy that is for them they leave by its address, and come in as clients' do.

use landfall_ebpf_common::egress::gateway::NOWHERE;

use super::answers::unpadded;
use super::errors::mk_error;
use super::*;

const SMTP: u16 = 25;

/// A VIP at the uplink's segment.
fn vip(world: World) -> IpAddr {
    match world.egress {
        IpAddr::V4(_) => v4(192, 0, 2, 220),
        IpAddr::V6(_) => v6(0x2001, 0xdb8, 0x220),
    }
}

/// The policies of these names are for VIPs, and there are VIPs; whether those are steered.
fn load(hairpin: &[&str], steer: bool) -> Gate {
    let mut egress = mk_egress();
    for name in hairpin {
        let policy = egress.policies.get_mut(*name).expect("it is there");
        policy.hairpin = true;
    }
    let mut gate = Gate::with(&egress, Times::default(), 0);
    let state = VipState {
        steer,
        udp_port: None,
    };
    for world in WORLDS {
        gate.change(&Change::Vip(vip(world), Some(state)));
    }
    gate
}

/// What stands for it between a pod and its gateway.
fn shade(world: World) -> IpAddr {
    match world.egress {
        IpAddr::V4(_) => v4(240, 0, 2, 220),
        IpAddr::V6(_) => v6(0x4001, 0xdb8, 0x220),
    }
}

fn syn(mac: [u8; 6], from: IpAddr, to: IpAddr, ttl: u8) -> Vec<u8> {
    mk(mac, from, to, 6, ttl, &mk_tcp(40_000, SMTP, SYN))
}

/// How the pod begins one more flow to the VIP.
fn second(world: World) -> Vec<u8> {
    let segment = mk_tcp(40_001, SMTP, SYN);
    mk(OTHER, world.pod, shade(world), 6, 64, &segment)
}

/// As it is when nobody else has its address.
fn to_nowhere(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&NOWHERE);
    frame
}

#[test]
fn without_it_vips_are_the_clusters_own() {
    let mut gate = load(&[], true);
    for world in WORLDS {
        gate.passes(&syn(OTHER, world.pod, vip(world), 64));
        let own = syn(OWN, world.local, vip(world), 63);
        assert_eq!(gate.leaves(&own), (NEXT, own));
        // Their nodes may not have heard yet that the policy is not for them any more.
        gate.drops(&syn(OTHER, world.pod, shade(world), 64), Reason::NotGateway);
        let own = to_nowhere(syn(OWN, world.local, shade(world), 63));
        assert_eq!(gate.leaves(&own), (NEXT, own), "to nowhere");
        // Its gateway is another node.
        let away = syn(OWN, world.away, shade(world), 63);
        assert_eq!(gate.leaves(&away), (NEXT, away));
    }
    assert_eq!(gate.count(Reason::Bound), 0);
}

/// What is no VIP's shadow is an address outside.
fn leaves_as_it_is(gate: &mut Gate, world: World, to: IpAddr) {
    let (action, out) = gate.comes(&syn(OTHER, world.pod, to, 64));
    let seen = (action, source(&out), destination(&out));
    assert_eq!(seen, (SENT, world.egress, to));
    assert_eq!(out[..6], [0; 6], "to a router");
}

/// A gateway that does not know yet what a pod's node knows lets nothing by to the VIP, and nothing under the pod's own address.
#[test]
fn what_is_not_known_here_goes_no_further() {
    let mut gate = load(&["mail"], true);
    for world in WORLDS {
        // Its gateway is another node, as far as is known here.
        gate.drops(
            &syn(OTHER, world.away, shade(world), 64),
            Reason::NotGateway,
        );
        gate.change(&Change::Vip(vip(world), None));
        leaves_as_it_is(&mut gate, world, shade(world));
    }
}

/// Two VIPs that differ in the first four bits only have no shadow.
#[test]
fn what_two_vips_would_share_is_neithers() {
    let mut gate = load(&["mail"], true);
    let [four, _] = WORLDS;
    let double = v4(208, 0, 2, 220);
    let state = VipState {
        steer: true,
        udp_port: None,
    };
    gate.change(&Change::Vip(double, Some(state)));
    leaves_as_it_is(&mut gate, four, shade(four));
    gate.change(&Change::Vip(double, None));
    let begun = second(four);
    let (action, out) = gate.comes(&begun);
    assert_eq!((action, destination(&out)), (SENT, vip(four)));
}

/// Past a quota a connection fails fast: what says so comes from whom the pod's node has sent it to.
#[test]
fn what_is_refused_is_refused_by_the_shadow() {
    let mut egress = mk_egress();
    let policy = egress.policies.get_mut("mail").expect("it is there");
    (policy.hairpin, policy.ports) = (true, Some(1));
    for world in WORLDS {
        let mut gate = load(&["mail"], true);
        gate.set(&egress);
        let (action, _) = gate.comes(&syn(OTHER, world.pod, shade(world), 64));
        let more = second(world);
        assert_eq!(action, SENT);
        let (action, out) = gate.comes(&more);
        let told = (action, source(&out), destination(&out));
        assert_eq!(told, (SENT, shade(world), world.pod));
        assert!(is_right(&unpadded(&out)), "{out:02x?}");
    }
}

/// The policy is not for VIPs any more: what began goes on.
#[test]
fn flows_outlive_what_they_began_with() {
    let mut gate = load(&["mail"], true);
    let begin = |gate: &mut Gate| {
        for world in WORLDS {
            let (action, _) = gate.comes(&syn(OTHER, world.pod, shade(world), 64));
            assert_eq!(action, SENT);
        }
    };
    begin(&mut gate);
    gate.set(&mk_egress());
    begin(&mut gate);
    for world in WORLDS {
        let answer = mk_tcp(SMTP, 40_000, SYN | ACK);
        let (action, out) = gate.comes(&mk(STRANGER, vip(world), world.egress, 6, 64, &answer));
        assert_eq!((action, source(&out)), (SENT, shade(world)));
        let begun = second(world);
        gate.drops(&begun, Reason::NotGateway);
    }
    assert_eq!(gate.count(Reason::Bound), 2);
}

/// A router on the way, and a server, say what is wrong; the pod knows the VIP by its shadow.
#[test]
fn errors_are_about_what_the_pod_sent() {
    let mut gate = load(&["mail"], true);
    for world in WORLDS {
        let sent = syn(OTHER, world.pod, shade(world), 64);
        let (_, out) = gate.comes(&sent);
        for from in [vip(world), world.remote] {
            let error = mk_error(STRANGER, from, world.egress, &out[14..]);
            let (action, told) = gate.comes(&error);
            let from = if from == vip(world) {
                shade(world)
            } else {
                from
            };
            assert_eq!(
                (action, source(&told), destination(&told)),
                (SENT, from, world.pod)
            );
            assert!(is_right(&told), "{told:02x?}");
            // On its way it had lost one.
            let quoted = syn(OTHER, world.pod, shade(world), 63);
            assert_eq!(told[transport(&told) + 8..], quoted[14..], "{world:?}");
        }
        // The pod's own, about what came to it.
        let answer = mk_tcp(SMTP, 40_000, SYN | ACK);
        let (_, came) = gate.comes(&mk(STRANGER, vip(world), world.egress, 6, 64, &answer));
        let error = mk_error(OTHER, world.pod, shade(world), &came[14..]);
        let (action, told) = gate.comes(&error);
        assert_eq!(action, SENT);
        assert_eq!(
            (source(&told), destination(&told)),
            (world.egress, vip(world))
        );
        assert!(is_right(&told), "{told:02x?}");
    }
}

#[test]
fn of_another_nodes_pod_it_comes_in_as_a_clients() {
    let mut gate = load(&["mail"], true);
    for world in WORLDS {
        let sent = syn(OTHER, world.pod, shade(world), 64);
        let (action, out) = gate.comes(&sent);
        assert_eq!(
            (action, out),
            (SENT, syn(OWN, world.egress, vip(world), 63)),
            "{world:?}"
        );
        let answer = mk_tcp(SMTP, 40_000, SYN | ACK);
        let (action, out) = gate.comes(&mk(STRANGER, vip(world), world.egress, 6, 64, &answer));
        let mut back = mk(OWN, shade(world), world.pod, 6, 63, &answer);
        back[..6].copy_from_slice(&OTHER);
        assert_eq!((action, out), (SENT, back), "{world:?}");
        let count = gate.maps.counts_of_pods()[&world.pod];
        assert_eq!((count.out_packets, count.in_packets), (1, 1), "{world:?}");
        // Another policy's pods go as ever, and so does what came by the VIP's own address.
        gate.passes(&syn(OTHER, world.stranger, vip(world), 64));
        gate.passes(&syn(OTHER, world.friend, vip(world), 64));
    }
    assert_eq!(gate.count(Reason::Bound), 2);
}

#[test]
fn of_this_nodes_pod_it_comes_in_instead_of_leaving() {
    let mut gate = load(&["mail"], true);
    for world in WORLDS {
        let sent = to_nowhere(syn(OWN, world.local, shade(world), 63));
        let mut context = vec![0; 192];
        context[8..12].copy_from_slice(&0x77_u32.to_ne_bytes());
        let (action, out, mark) = gate.run_in(GATEWAY_EGRESS, &sent, &context);
        let expected = syn(OWN, world.egress, vip(world), 63);
        assert_eq!((action, out), (SENT, expected), "{world:?}");
        assert_eq!(mark, 0, "it is of no way any more");
        let answer = mk_tcp(SMTP, 40_000, SYN | ACK);
        let back = mk(OWN, vip(world), world.egress, 6, 63, &answer);
        let (action, out) = gate.comes(&back);
        let expected = mk(OWN, shade(world), world.local, 6, 63, &answer);
        assert_eq!((action, out), (NEXT, expected), "{world:?}");
    }
}

/// The VIP's pod is on the gateway's node, which asks in vain who has the egress address.
#[test]
fn an_answer_to_an_address_of_this_node_comes_in() {
    let mut gate = load(&["mail"], true);
    for world in WORLDS {
        let answer = mk(
            OWN,
            vip(world),
            world.egress,
            6,
            63,
            &mk_tcp(SMTP, 40_000, SYN | ACK),
        );
        // To whom it may concern elsewhere.
        assert_eq!(gate.leaves(&answer), (NEXT, answer.clone()));
        let (action, out) = gate.leaves(&to_nowhere(answer.clone()));
        assert_eq!((action, out), (SENT, answer), "{world:?}");
        // No egress address: nobody's.
        let other = to_nowhere(syn(OWN, vip(world), world.remote, 63));
        assert_eq!(gate.leaves(&other), (NEXT, other));
        // A pod's own address does not go round.
        let raw = to_nowhere(mk(
            OWN,
            world.local,
            world.egress,
            6,
            63,
            &mk_tcp(40_000, SMTP, ACK),
        ));
        assert_eq!(gate.leaves(&raw).1, raw);
        assert_ne!(gate.leaves(&raw).0, SENT);
    }
}

/// Who leads such a VIP delivers it: it has to come there.
#[test]
fn to_a_vip_that_is_not_steered_it_leaves() {
    let mut gate = load(&["mail"], false);
    for world in WORLDS {
        let (action, out) = gate.comes(&syn(OTHER, world.pod, shade(world), 64));
        let expected = syn(OTHER, world.egress, vip(world), 63);
        assert_eq!((action, out), (SENT, expected), "by the neighbour");
        let (action, out) = gate.leaves(&to_nowhere(syn(OWN, world.local, shade(world), 63)));
        let segment = mk_tcp(ports(&out).0, SMTP, SYN);
        let expected = to_nowhere(mk(OWN, world.egress, vip(world), 6, 63, &segment));
        assert_eq!((action, out), (SENT, expected), "by the neighbour");
    }
}
