//! Delivery without kube-proxy: what is for this node is given the address of one of its endpoints and handed up, so
//! that the node's own rules for forwarding hold.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::rendezvous::slot;
use landfall_ebpf_common::{SlotKey, Verdict, port_flag};

use crate::packet::{Kind, Packet, TCP};
use crate::translate::{DESTINATION, landfall_translate};
use crate::{DROP, NEXT, flows, maps};

/// How many endpoints are tried for a flow that the first could not tell from another.
const TRIES: u32 = 4;

/// Gives the packet at hand to an endpoint: that of its flow, or, if it has none yet, one of the port's. An endpoint
/// resets a TCP connection that it does not know.
///
/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_deliver(skb: *mut __sk_buff) -> i32 {
    let context = TcContext::new(skb);
    let Some(packet) = maps::packet() else {
        return NEXT;
    };
    let known = if packet.protocol == TCP {
        packet.known && packet.to.port != 0
    } else {
        flows::continues(packet)
    };
    if !known {
        if let Err(action) = pick(packet) {
            return action;
        }
        if packet.protocol == TCP {
            flows::open(packet);
        } else if packet.kind == Kind::Whole {
            // A fragment that came before its first does not tell the flow, only the client.
            flows::begin(packet);
        }
    }
    packet.from = packet.vip();
    let verdict = if landfall_translate(context.skb.skb, DESTINATION) == 0 {
        mark(&context);
        Verdict::Delivered
    } else {
        Verdict::Unserved
    };
    maps::note(verdict);
    NEXT
}

/// Connection tracking never sees the VIP: by the mark the packet filter knows that the answers are a VIP's.
#[inline(always)]
fn mark(context: &TcContext) {
    let bits = maps::settings().mark;
    if bits != 0 {
        // SAFETY: the context's pointer is the program's argument; the verifier checks the read.
        let before = unsafe { (*context.skb.skb).mark };
        context.set_mark(before | bits);
    }
}

/// Finds an endpoint for a new flow, or says what else becomes of it.
#[inline(always)]
fn pick(packet: &mut Packet) -> Result<(), i32> {
    if packet.kind == Kind::Error || packet.slots == 0 {
        maps::note(Verdict::Unserved);
        return Err(NEXT);
    }
    if packet.flags & port_flag::RANGES != 0 && !maps::in_ranges(packet.number, &packet.flow.client)
    {
        maps::note(Verdict::Refused);
        return Err(DROP);
    }
    let first = slot(packet.hash, packet.slots);
    for turn in 0..TRIES {
        let key = SlotKey {
            port: packet.number,
            slot: (first + turn).checked_rem(packet.slots).unwrap_or(0),
        };
        // Slots are being changed if there is none.
        let Some(endpoint) = maps::endpoint(&key) else {
            continue;
        };
        packet.to = endpoint;
        let told_apart = packet.kind == Kind::Whole && (packet.protocol != TCP || packet.is_syn());
        if !told_apart || !flows::collides(packet) {
            return Ok(());
        }
    }
    maps::note(Verdict::Collided);
    Err(DROP)
}
