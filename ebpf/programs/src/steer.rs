//! Whose a packet to a VIP is.

use landfall_ebpf_common::handing_on::{Arrival, steered};
use landfall_ebpf_common::rendezvous::{bucket, hash};
use landfall_ebpf_common::{
    HoldersKey, MAX_HISTORY, MAX_HOLDERS, Node, PeerKey, Port, PortKey, Verdict, Vip, node_flag,
    port_flag, seeded,
};

use crate::context::Context;
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
    // Where this node serves no more, a SYN goes by the table, also if it came here before: nobody would answer it.
    packet.strays = new && !packet.here && packet.slots == 0 && packet.target != 0;
    packet.known = mine && !packet.strays && context.knows(packet);
    if packet.known {
        return context.deliver(packet);
    }
    if packet.sender == 0 && !packet.here {
        // What opens a connection is delivered, whatever it looks like.
        let as_it_is = new || packet.kind == Kind::Error;
        if !as_it_is && set_ttl(context, packet, steered(packet.ttl)).is_none() {
            return lost::<C>();
        }
        return send_away(context, packet.target);
    }
    if new && !packet.strays {
        return context.deliver(packet);
    }
    match Next::of(landfall_next()) {
        Next::Here => context.deliver(packet),
        Next::Nobody => waits::<C>(),
        Next::Node { number, ttl } => hand_on(context, packet, number, ttl),
    }
}

/// Where a packet goes next whose flow this node does not know.
enum Next {
    /// Nowhere: it is delivered here.
    Here,
    /// There is nobody yet: the client has to try again.
    Nobody,
    /// To this node, with this TTL.
    Node { number: u16, ttl: u8 },
}

impl Next {
    const HERE: u32 = 0;
    const NOBODY: u32 = 1;

    #[inline(always)]
    fn of(word: u32) -> Self {
        match word {
            Self::HERE => Self::Here,
            Self::NOBODY => Self::Nobody,
            _ => Self::Node {
                number: (word >> 16) as u16,
                ttl: (word >> 8) as u8,
            },
        }
    }
}

/// Finds the node that knows the flow of the packet at hand, which this one does not: a [`Next`].
///
/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_next() -> u32 {
    maps::packet().map_or(Next::HERE, |packet| next(packet))
}

#[inline(always)]
fn next(packet: &Packet) -> u32 {
    let seeded = maps::settings().seeded;
    let arrival = Arrival {
        ttl: packet.ttl,
        from_peer: packet.sender != 0,
        first_here: packet.here,
        settled: seeded != seeded::ENTERED,
    };
    let without = if packet.strays || !arrival.answers() {
        Next::NOBODY
    } else {
        Next::HERE
    };
    // An error's TTL is its own, and it is no more than a hint: it goes no further.
    if packet.kind == Kind::Error || (seeded == seeded::NOT && !arrival.is_asked()) {
        return without;
    }
    let Some(ttl) = arrival.ttl_after() else {
        return without;
    };
    let number = if packet.strays {
        // It is nobody's yet, and goes to whose it is; if that one thinks otherwise, no further.
        let again = arrival.is_asked() || arrival.is_back() || packet.target == packet.sender;
        if again { 0 } else { packet.target }
    } else if arrival.is_asked() {
        packet.sender
    } else {
        holder(packet, arrival)
    };
    if number == 0 {
        return without;
    }
    u32::from(number) << 16 | u32::from(ttl) << 8
}

#[inline(always)]
fn hand_on<C: Context>(context: &C, packet: &Packet, number: u16, ttl: u8) -> i32 {
    let Some(node) = maps::node(number).filter(|node| context.reaches(node)) else {
        return lost::<C>();
    };
    if set_ttl(context, packet, ttl).is_none() {
        return lost::<C>();
    }
    send(context, number, node, Verdict::HandedOn)
}

/// Writes a packet's TTL or hop limit, if it is another.
#[inline(always)]
fn set_ttl<C: Context>(context: &C, packet: &Packet, ttl: u8) -> Option<()> {
    if packet.ttl == ttl {
        Some(())
    } else if packet.v6 {
        context.store(ETH_HEADER + HOP_LIMIT, ttl)
    } else {
        echo::set_ttl(context, packet.ttl, ttl)
    }
}

#[inline(always)]
fn waits<C: Context>() -> i32 {
    if C::LAST {
        maps::note(Verdict::Waiting);
        DROP
    } else {
        C::NEXT
    }
}

/// The node that is to be asked next for the flow of a packet, 0 for none.
#[inline(always)]
fn holder(packet: &Packet, arrival: Arrival) -> u16 {
    let asked = maps::node(packet.sender).filter(|_| arrival.is_back());
    let mut next = Candidate {
        number: 0,
        above: asked.map_or(0, |node| node.seed),
        seed: u64::MAX,
    };
    let key = HoldersKey {
        port: packet.number,
        bucket: packet.bucket,
    };
    if let Some(holders) = maps::holders(&key) {
        for place in 0..MAX_HOLDERS {
            next.consider(holders.nodes[place], packet);
        }
    }
    if let Some(history) = maps::history(packet.number) {
        for place in 0..MAX_HISTORY {
            let spread = &history.spreads[place];
            if spread.count == 0 {
                break;
            }
            next.consider(choose(spread, packet.bucket, false), packet);
        }
    }
    // Who was sent it, and does not think that it is first, knows who is.
    next.consider(packet.target, packet);
    next.number
}

/// Whom to ask next: of those that may know it and were not asked yet, the one with the lowest seed.
struct Candidate {
    number: u16,
    /// Those up to this seed were asked.
    above: u64,
    seed: u64,
}

impl Candidate {
    #[inline(always)]
    fn consider(&mut self, number: u16, packet: &Packet) {
        if number == 0 || number == packet.sender {
            return;
        }
        let Some(node) = maps::node(number) else {
            return;
        };
        let wanted = node_flag::ALIVE | node_flag::STEERS;
        if node.flags & (wanted | node_flag::HERE) == wanted
            && node.seed > self.above
            && node.seed < self.seed
        {
            self.number = number;
            self.seed = node.seed;
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
        Some(node) if target != 0 => send(context, target, node, Verdict::Steered),
        _ => up::<C>(Verdict::Unserved),
    }
}

/// Sends the frame to another node, as it is but for the Ethernet addresses.
#[inline(always)]
fn send<C: Context>(context: &C, number: u16, node: &Node, verdict: Verdict) -> i32 {
    if !context.reaches(node) {
        return lost::<C>();
    }
    if context.readdress(node.mac).is_none() {
        return lost::<C>();
    }
    maps::note(verdict);
    context.send(number, node)
}

/// The node that serves it cannot be sent anything, or not yet. A pod of this node would answer a connection that it
/// does not keep, or reset one that lives elsewhere; so the client has to try again.
#[inline(always)]
fn lost<C: Context>() -> i32 {
    if C::LAST {
        maps::note(Verdict::Unreachable);
        DROP
    } else {
        C::NEXT
    }
}

#[inline(always)]
fn up<C: Context>(verdict: Verdict) -> i32 {
    if C::LAST {
        maps::note(verdict);
    }
    C::NEXT
}
