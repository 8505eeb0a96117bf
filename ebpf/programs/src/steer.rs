//! Whose a packet to a VIP is.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::handing_on::Arrival;
use landfall_ebpf_common::rendezvous::{bucket, hash};
use landfall_ebpf_common::{
    HoldersKey, MAX_HISTORY, MAX_HOLDERS, Node, PeerKey, Port, PortKey, Verdict, Vip, node_flag,
    port_flag,
};

use crate::context::{Context, HERE};
use crate::packet::{ETH_HEADER, Frame, Kind, Packet, TCP, UDP};
use crate::spread::choose;
use crate::{DROP, echo, flows, maps};

/// Where the hop limit lies in an IPv6 header.
const HOP_LIMIT: usize = 7;

#[inline(always)]
pub(crate) fn steer<C: Context>(context: &C, frame: &Frame, vip: &Vip) -> i32 {
    let Some(packet) = maps::packet() else {
        return C::NEXT;
    };
    packet.put(frame);
    if !context.read(packet) {
        return up::<C>(Verdict::Unserved);
    }
    match packet.kind {
        Kind::Echo => return context.echo(packet),
        Kind::LaterFragment => match flows::ports_of(&packet.fragment()) {
            Some((client_port, port)) => {
                packet.flow.client_port = client_port;
                packet.flow.port = port;
            }
            None if packet.protocol == UDP && vip.udp_port != 0 => packet.flow.port = vip.udp_port,
            None => return up::<C>(Verdict::StrayFragment),
        },
        Kind::Whole if packet.more => flows::first_fragment(packet),
        Kind::Whole | Kind::Error => {}
    }
    let key = PortKey {
        vip: packet.flow.vip,
        port: packet.flow.port,
        protocol: packet.protocol,
        zero: 0,
    };
    let Some(port) = maps::port(&key) else {
        return up::<C>(Verdict::Unserved);
    };
    if port.spread.flags & port_flag::HOST != 0 {
        return C::NEXT;
    }
    let from = PeerKey {
        interface: context.interface(),
        mac: packet.mac,
        zero: [0; 2],
    };
    packet.sender = maps::sender(&from, &packet.source) as u16;
    packet.known = false;
    (packet.number, packet.slots, packet.flags) = (port.number, port.slots, port.spread.flags);
    packet.hash = hash_of(packet, port);
    packet.bucket = bucket(packet.hash);
    if packet.protocol == TCP {
        return connection(context, packet, port);
    }
    // Whoever sent it chose this node; to choose again would be to send it round.
    if packet.sender == 0 {
        packet.target = choose(&port.spread, packet.bucket, true);
        if !is_here(packet.target) {
            return send_away(context, packet.target);
        }
    }
    context.deliver(packet)
}

#[inline(always)]
fn is_here(node: u16) -> bool {
    maps::node(node).is_some_and(|node| node.flags & node_flag::HERE != 0)
}

/// A packet of a TCP flow, or an error about one.
#[inline(always)]
fn connection<C: Context>(context: &C, packet: &mut Packet, port: &Port) -> i32 {
    let new = packet.is_syn() && packet.kind == Kind::Whole;
    packet.target = choose(&port.spread, packet.bucket, new);
    packet.here = is_here(packet.target);
    // What is another's by the tables is not looked for here, unless someone holds flows of earlier tables.
    let mine = packet.here || packet.sender != 0 || port.spread.flags & port_flag::HELD != 0;
    packet.known = mine && context.knows(packet);
    if packet.known {
        return context.deliver(packet);
    }
    if packet.sender == 0 && !packet.here {
        return send_away(context, packet.target);
    }
    if new {
        return context.deliver(packet);
    }
    context
        .hand_on(packet)
        .unwrap_or_else(|| context.deliver(packet))
}

/// See [`hand_on`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_hand_on(skb: *mut __sk_buff) -> i32 {
    let context = TcContext::new(skb);
    maps::packet()
        .and_then(|packet| hand_on(&context, packet))
        .unwrap_or(HERE)
}

/// Looks for the node that knows the flow of a packet which this one does not. Nothing: it is to be delivered here.
#[inline(always)]
pub(crate) fn hand_on<C: Context>(context: &C, packet: &mut Packet) -> Option<i32> {
    let settings = maps::settings();
    let arrival = Arrival {
        ttl: packet.ttl,
        from_peer: packet.sender != 0,
        first_here: packet.here,
        seed: settings.seed,
    };
    // An error's TTL is its own, and it is no more than a hint: it goes no further.
    let after = if settings.seeded == 0 || packet.kind == Kind::Error {
        None
    } else {
        arrival.ttl_after()
    };
    let Some(ttl) = after else {
        return stay::<C>(arrival.waits() && settings.seeded != 0);
    };
    let mut next = Candidate {
        number: 0,
        seed: u64::MAX,
    };
    let key = HoldersKey {
        port: packet.number,
        bucket: packet.bucket,
    };
    if let Some(holders) = maps::holders(&key) {
        for place in 0..MAX_HOLDERS {
            next.consider(holders.nodes[place], packet, arrival);
        }
    }
    // Where the holders have spoken, only what changed last is older than their word.
    let known = next.number != 0;
    if let Some(history) = maps::history(packet.number) {
        for place in 0..MAX_HISTORY {
            if known && place > 0 {
                break;
            }
            let spread = &history.spreads[place];
            if spread.count == 0 {
                break;
            }
            next.consider(choose(spread, packet.bucket, false), packet, arrival);
        }
    }
    if next.number == 0 && arrival.waits() {
        next.consider(packet.target, packet, arrival);
    }
    if next.number == 0 {
        return stay::<C>(arrival.waits() && settings.seeded != 0);
    }
    let Some(node) = maps::node(next.number) else {
        return Some(up::<C>(Verdict::Unreachable));
    };
    if !context.reaches(node) {
        return Some(up::<C>(Verdict::Unreachable));
    }
    let lowered = if packet.v6 {
        context.store(ETH_HEADER + HOP_LIMIT, ttl)
    } else {
        echo::set_ttl(context, packet.ttl, ttl)
    };
    if lowered.is_none() {
        return Some(up::<C>(Verdict::Unreachable));
    }
    Some(send(context, node, Verdict::HandedOn))
}

/// Nobody is there to hand it on to.
#[inline(always)]
fn stay<C: Context>(waits: bool) -> Option<i32> {
    if C::LAST && waits {
        maps::note(Verdict::Waiting);
        return Some(DROP);
    }
    None
}

/// To whom to hand on next: of those that may, the one with the lowest seed.
struct Candidate {
    number: u16,
    seed: u64,
}

impl Candidate {
    #[inline(always)]
    fn consider(&mut self, number: u16, packet: &Packet, arrival: Arrival) {
        if number == 0 || number == packet.sender {
            return;
        }
        let Some(node) = maps::node(number) else {
            return;
        };
        let wanted = node_flag::ALIVE | node_flag::STEERS;
        if node.flags & (wanted | node_flag::HERE) == wanted
            && arrival.may_go_to(node.seed)
            && node.seed < self.seed
        {
            *self = Self {
                number,
                seed: node.seed,
            };
        }
    }
}

/// The hash of a packet's flow.
#[inline(always)]
fn hash_of(packet: &Packet, port: &Port) -> u64 {
    let flags = port.spread.flags;
    let by_client = flags & port_flag::AFFINITY != 0
        || (packet.protocol == UDP && flags & port_flag::UDP_PORTS == 0);
    let rest = if by_client {
        0
    } else {
        u32::from(packet.flow.client_port) << 16 | u32::from(packet.flow.port)
    };
    hash(&packet.flow.client, &packet.flow.vip.0, rest)
}

/// Sends a frame to the node that serves it, which is not this one.
#[inline(always)]
fn send_away<C: Context>(context: &C, target: u16) -> i32 {
    match maps::node(target) {
        Some(node) if target != 0 => send(context, node, Verdict::Steered),
        _ => up::<C>(Verdict::Unserved),
    }
}

/// Sends the frame to another node on the segment, as it is but for the Ethernet addresses.
#[inline(always)]
fn send<C: Context>(context: &C, node: &Node, verdict: Verdict) -> i32 {
    if !context.reaches(node) {
        return up::<C>(Verdict::Unreachable);
    }
    let Some(mine) = context.at::<[u8; 6]>(0) else {
        return up::<C>(Verdict::Unreachable);
    };
    let mut macs = [0_u8; 12];
    macs[..6].copy_from_slice(&node.mac);
    macs[6..].copy_from_slice(&mine);
    if context.store(0, macs).is_none() {
        return up::<C>(Verdict::Unreachable);
    }
    maps::note(verdict);
    context.send(node)
}

#[inline(always)]
fn up<C: Context>(verdict: Verdict) -> i32 {
    if C::LAST {
        maps::note(verdict);
    }
    C::NEXT
}
