//! What is counted of each policy: packets and bytes both ways, and what was refused, to nobody else's account.

use landfall_ebpf_common::egress::gateway::PolicyCount;

use super::errors::mk_error;
use super::*;
use crate::datapath::egress::Usage;

impl Gate {
    pub(super) fn usage(&self, policy: &str) -> Usage {
        self.maps.usage()[policy].clone()
    }

    /// A packet of the pod's, its answer, and one in the middle of a connection that nobody knows; how they count.
    fn exchange(&mut self, world: World) -> PolicyCount {
        let syn = segment(world, world.pod, 4000, SYN);
        let (action, out) = self.comes(&syn);
        assert_eq!(action, SENT);
        let ack = mk_tcp(443, ports(&out).0, SYN | ACK);
        let back = mk(STRANGER, world.remote, world.egress, 6, 64, &ack);
        assert_eq!(self.comes(&back).0, SENT);
        let stray = mk_tcp(4001, 443, ACK);
        let stray = mk(OTHER, world.pod, world.remote, 6, 64, &stray);
        self.drops(&stray, Reason::Unknown);
        PolicyCount {
            out_packets: 1,
            out_bytes: syn.len() as u64,
            in_packets: 1,
            in_bytes: back.len() as u64,
            others: 1,
            ..PolicyCount::default()
        }
    }
}

#[test]
fn packets_are_counted_for_their_policy() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let before = (gate.usage("mail").count, gate.usage("shop").count);
        let expected = gate.exchange(world);
        let mut after = gate.usage("mail").count;
        after.out_packets -= before.0.out_packets;
        after.out_bytes -= before.0.out_bytes;
        after.in_packets -= before.0.in_packets;
        after.in_bytes -= before.0.in_bytes;
        after.others -= before.0.others;
        assert_eq!(after, expected);
        assert_eq!(gate.usage("shop").count, before.1, "another's");
    }
}

/// Of each pod, too, and of no other; a pod that is nobody's tenant any more is not counted.
#[test]
fn packets_are_counted_for_their_pod() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let of = |gate: &Gate, pod: IpAddr| gate.maps.counts_of_pods().get(&pod).copied();
        let expected = gate.exchange(world);
        assert_eq!(of(&gate, world.pod), Some(expected));
        assert_eq!(of(&gate, world.friend), Some(PolicyCount::default()));
        let mut egress = mk_egress();
        egress.pods.remove(&world.pod);
        gate.set(&egress);
        assert_eq!(of(&gate, world.pod), None);
        gate.set(&mk_egress());
        assert_eq!(of(&gate, world.pod), Some(PolicyCount::default()));
        // Whose an error is tells its sender, not what it is about.
        let of_friend = mk_tcp(443, 4000, SYN | ACK);
        let about = mk_ip(world.remote, world.friend, 6, 60, &of_friend);
        let error = mk_error(OTHER, world.pod, world.remote, &about);
        gate.drops(&error, Reason::Unreadable);
        let dropped = PolicyCount {
            others: 1,
            ..PolicyCount::default()
        };
        assert_eq!(of(&gate, world.pod), Some(dropped));
        assert_eq!(of(&gate, world.friend), Some(PolicyCount::default()));
        // Another's tenant begins with nothing.
        let mut egress = mk_egress();
        let other = egress.pods[&world.stranger].clone();
        egress.pods.insert(world.pod, other);
        gate.set(&egress);
        assert_eq!(of(&gate, world.pod), Some(PolicyCount::default()));
        gate.set(&mk_egress());
    }
}

#[test]
fn refusals_are_counted_by_reason() {
    let mut egress = mk_egress();
    if let Some(policy) = egress.policies.get_mut("mail") {
        policy.ports = Some(2);
    }
    let mut gate = Gate::with(&egress, Times::default(), 0);
    for world in WORLDS {
        let before = gate.usage("mail");
        assert_eq!((before.quota, before.is_gateway), (2, true));
        let free = 2 - before.ports;
        for port in 5000..5004 {
            gate.port_of(world, world.pod, port);
        }
        let after = gate.usage("mail");
        assert_eq!(after.ports, 2);
        assert_eq!(after.count.quota - before.count.quota, 4 - free);
        assert_eq!(gate.usage("shop").drops(), Usage::default().drops());
    }
}

/// The keeper counts what is there; what has ended is apart.
#[test]
fn bindings_are_tallied() {
    let mut gate = Gate::load();
    for world in WORLDS {
        let first = gate.port_of(world, world.pod, 6000).expect("a port");
        gate.port_of(world, world.friend, 6001).expect("a port");
        for (from, to, tcp) in [
            (world.remote, world.egress, mk_tcp(443, first, SYN | ACK)),
            (world.pod, world.remote, mk_tcp(6000, 443, FIN | ACK)),
            (world.remote, world.egress, mk_tcp(443, first, FIN | ACK)),
        ] {
            gate.comes(&mk(OTHER, from, to, 6, 64, &tcp));
        }
        gate.keep();
        let bindings = gate.usage("mail").bindings[&world.egress];
        assert_eq!((bindings.live, bindings.resting), (1, 1));
    }
    let total = gate.usage("mail").total();
    assert_eq!((total.live, total.resting), (2, 2));
    assert_eq!(gate.used("mail"), 2, "what rests is not in use");
}

/// A policy that is gone is not counted on, and its number's next owner begins at nothing.
#[test]
fn counts_end_with_their_policy() {
    let mut gate = Gate::load();
    let world = WORLDS[0];
    let stray = mk_tcp(4001, 443, ACK);
    let frame = mk(OTHER, world.stranger, world.remote, 6, 64, &stray);
    gate.drops(&frame, Reason::Unknown);
    assert_eq!(gate.usage("shop").count.others, 1);
    let mut egress = mk_egress();
    egress.policies.remove("shop");
    for world in WORLDS {
        egress.pods.remove(&world.stranger);
    }
    gate.set(&egress);
    gate.keep();
    assert!(!gate.maps.usage().contains_key("shop"));
    egress.policies.insert("next".into(), mk_policy("here"));
    gate.set(&egress);
    assert_eq!(gate.usage("next").count, Usage::default().count);
}
