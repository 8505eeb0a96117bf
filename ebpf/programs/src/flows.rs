//! The flows that this node delivers, and the answers to those that it translates.
//!
//! TCP flows whose SYN was delivered, and no more, live apart from those that were heard since: a flood of the one evicts
//! none of the other. So do the flows of protocols without connections.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use landfall_ebpf_common::{
    Answer, DATAGRAM_LIFE, Endpoint, FRAGMENT_LIFE, Flow, FlowKey, Fragment, FragmentKey, Verdict,
    VipKey, flow_state,
};

use crate::maps::{
    self, ANSWERS, DATAGRAM_ANSWERS, DATAGRAMS, FLOWS, FRAGMENTS, HALF_ANSWERS, HALF_OPEN,
};
use crate::packet::{ACK, FIN, Kind, Packet, RST, SYN, TCP};

/// How often the time of a flow is written, at most: a cache line that all CPUs write is slow.
const TOUCH: u64 = 1_000_000_000;

#[inline(always)]
fn now() -> u64 {
    // SAFETY: it has no arguments and reads a clock.
    unsafe { bpf_ktime_get_ns() }
}

/// Whether this node delivers the TCP flow of a packet.
#[inline(always)]
pub(crate) fn is_there(packet: &mut Packet) -> bool {
    if let Some(flow) = FLOWS.get_ptr(&packet.flow) {
        // SAFETY: the map gave the pointer.
        return !is_anothers(packet, unsafe { &*flow });
    }
    HALF_OPEN
        .get_ptr(&packet.flow)
        // SAFETY: as above.
        .is_some_and(|flow| !is_far(packet, unsafe { &*flow }))
}

/// Whether a packet tells by its sequence number whose it is: what opens a connection begins anew.
#[inline(always)]
fn has_sequence(packet: &Packet) -> bool {
    packet.kind == Kind::Whole && !packet.is_syn()
}

/// Whether a packet is of another flow than this one, which has its addresses and ports: of a later one that does not
/// begin with it, so that another node delivers it, or of another than was guessed.
#[inline(always)]
fn is_anothers(packet: &mut Packet, flow: &Flow) -> bool {
    match flow.state {
        flow_state::CLOSING => has_sequence(packet) && !flow.may_end_with(packet.sequence),
        flow_state::GUESSED => {
            packet.answer = packet.flow.answer(&flow.endpoint);
            ANSWERS.get_ptr(&packet.answer).is_some()
        }
        _ => false,
    }
}

/// Whether a packet is of another flow than this one, which has begun and was not heard since: nobody saw how it ended.
#[inline(always)]
fn is_far(packet: &Packet, flow: &Flow) -> bool {
    has_sequence(packet) && !flow.is_near(packet.sequence)
}

/// Notes a flow as heard, and where its client is; whether that has gone on.
#[inline(always)]
fn hear(packet: &Packet, flow: &mut Flow) -> bool {
    let now = now();
    if now.wrapping_sub(flow.seen) > TOUCH {
        flow.seen = now;
    }
    let goes_on = has_sequence(packet) && flow.is_ahead(packet.sequence);
    if goes_on {
        flow.sequence = packet.sequence;
        flow.heard = 1;
    }
    goes_on
}

/// Takes in a FIN or RST. An endpoint may know better than this node that it is none of the flow's: then the client goes on.
#[inline(always)]
fn close(packet: &Packet, flow: &mut Flow) {
    if !flow.is_near(packet.sequence) {
        return;
    }
    flow.state = flow_state::CLOSING;
    flow.seen = now();
    let end = packet.next_sequence();
    if flow.is_ahead(end) {
        flow.sequence = end;
        flow.heard = 1;
    }
}

/// Whether this node delivers the TCP flow of a packet, and has for a while; it is noted as heard. Its endpoint is what
/// the packet is to be translated to.
#[inline(always)]
pub(crate) fn is_established(packet: &mut Packet) -> bool {
    let Some(flow) = FLOWS.get_ptr_mut(&packet.flow) else {
        return false;
    };
    // SAFETY: the map gave the pointer; each field is written whole, and which of two writers is last is of no matter.
    let flow = unsafe { &mut *flow };
    if flow.state != flow_state::ESTABLISHED || packet.tcp & (SYN | FIN | RST) != 0 {
        return false;
    }
    hear(packet, flow);
    packet.to = flow.endpoint;
    true
}

/// The same for flows that begin or end, and for those that were there before. Verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_remember() -> u32 {
    let Some(packet) = maps::packet() else {
        return 0;
    };
    u32::from(remember(packet).is_some())
}

#[inline(always)]
fn remember(packet: &mut Packet) -> Option<()> {
    if let Some(flow) = FLOWS.get_ptr_mut(&packet.flow) {
        // SAFETY: as above.
        let flow = unsafe { &mut *flow };
        packet.to = flow.endpoint;
        if packet.is_syn() && has_ended(packet, flow.state) {
            // The same addresses and ports, for a connection of its own.
            let _ = FLOWS.remove(&packet.flow);
            return None;
        }
        let guessed = flow.state == flow_state::GUESSED;
        if is_anothers(packet, flow) {
            if guessed {
                let _ = FLOWS.remove(&packet.flow);
            }
            return None;
        }
        if guessed {
            enter(packet);
        } else if packet.tcp & (FIN | RST) != 0 {
            close(packet, flow);
        } else if hear(packet, flow) {
            // Nobody sends anything behind the end.
            flow.state = flow_state::ESTABLISHED;
        }
        return Some(());
    }
    let half = HALF_OPEN.get_ptr_mut(&packet.flow)?;
    // SAFETY: as above.
    let half = unsafe { &mut *half };
    if is_far(packet, half) {
        return None;
    }
    hear(packet, half);
    packet.to = half.endpoint;
    if packet.tcp & RST != 0 {
        // Its client knows nothing of it.
        let _ = HALF_OPEN.remove(&packet.flow);
    } else if packet.tcp & ACK != 0 {
        if enter(packet) {
            let _ = HALF_OPEN.remove(&packet.flow);
            if packet.to.port != 0 {
                let _ = HALF_ANSWERS.remove(&packet.answer);
            }
        }
    } else if packet.is_syn() {
        // One may have fallen out before the other.
        open(packet);
    }
    Some(())
}

/// Whether one of a flow's ends has closed it, as far as that is seen, or its endpoint knows it for another's; answers to
/// what has been closed are forgotten.
#[inline(always)]
fn has_ended(packet: &mut Packet, state: u32) -> bool {
    if packet.to.port == 0 {
        return state == flow_state::CLOSING;
    }
    packet.answer = packet.flow.answer(&packet.to);
    let Some(answer) = ANSWERS.get_ptr(&packet.answer) else {
        return true;
    };
    // SAFETY: as above.
    let (of_endpoint, vip) = unsafe { ((*answer).state, (*answer).vip) };
    if vip != packet.vip() {
        return true;
    }
    let closed = [state, of_endpoint].contains(&flow_state::CLOSING);
    if closed {
        let _ = ANSWERS.remove(&packet.answer);
    }
    closed
}

/// A flow that was heard from its client more than once; not so if there is no room.
#[inline(always)]
fn enter(packet: &mut Packet) -> bool {
    prepare(packet);
    if packet.tcp & (FIN | RST) != 0 {
        packet.entry.state = flow_state::CLOSING;
        packet.entry.sequence = packet.next_sequence();
    }
    let mut entered = FLOWS.insert(&packet.flow, &packet.entry, 0).is_ok();
    if entered && packet.to.port != 0 {
        entered = ANSWERS.insert(&packet.answer, &packet.answers, 0).is_ok();
    }
    if !entered {
        maps::note(Verdict::FlowsFull);
    }
    entered
}

/// Writes what goes into the maps, and by what the answers are known.
#[inline(always)]
fn prepare(packet: &mut Packet) {
    let (seen, state) = (now(), flow_state::ESTABLISHED);
    packet.entry = Flow {
        seen,
        state,
        endpoint: packet.to,
        sequence: packet.sequence,
        heard: u32::from(packet.kind == Kind::Whole),
    };
    packet.answers = Answer {
        seen,
        state,
        vip: packet.vip(),
    };
    packet.answer = packet.flow.answer(&packet.to);
}

/// A SYN is delivered here by kube-proxy.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_open() -> u32 {
    if let Some(packet) = maps::packet() {
        packet.to = Endpoint::default();
        open(packet);
    }
    0
}

/// A SYN is delivered here, to an endpoint if it is translated; or what nobody knows, which takes no flow's place.
#[inline(always)]
pub(crate) fn open(packet: &mut Packet) {
    prepare(packet);
    let flags = if packet.is_syn() {
        0
    } else {
        u64::from(BPF_NOEXIST)
    };
    let _ = HALF_OPEN.insert(&packet.flow, &packet.entry, flags);
    if packet.to.port != 0 {
        let _ = HALF_ANSWERS.insert(&packet.answer, &packet.answers, flags);
    }
}

/// Whether an endpoint could not tell a flow from another of the same client, to another port or VIP.
#[inline(always)]
pub(crate) fn collides(packet: &mut Packet) -> bool {
    packet.answer = packet.flow.answer(&packet.to);
    // SAFETY: an entry that is replaced meanwhile is another flow's, and a clash as well.
    let other = unsafe {
        if packet.protocol == TCP {
            ANSWERS
                .get(&packet.answer)
                .filter(|answer| answer.state != flow_state::CLOSING)
        } else {
            DATAGRAM_ANSWERS
                .get(&packet.answer)
                .filter(|answer| now().wrapping_sub(answer.seen) <= DATAGRAM_LIFE)
        }
    };
    other.is_some_and(|answer| answer.vip != packet.vip())
}

/// Whether a flow of a protocol without connections is known; it is noted as heard, and its endpoint is what the packet
/// is to be translated to.
#[inline(always)]
pub(crate) fn continues(packet: &mut Packet) -> bool {
    let Some(flow) = DATAGRAMS.get_ptr_mut(&packet.flow) else {
        return false;
    };
    // SAFETY: as in `is_established`.
    let flow = unsafe { &mut *flow };
    let now = now();
    let unheard = now.wrapping_sub(flow.seen);
    if unheard > DATAGRAM_LIFE {
        return false;
    }
    if unheard > TOUCH {
        flow.seen = now;
    }
    packet.to = flow.endpoint;
    packet.answer = packet.flow.answer(&packet.to);
    if DATAGRAM_ANSWERS.get_ptr(&packet.answer).is_none() {
        // It fell out before the other.
        prepare(packet);
        let _ = DATAGRAM_ANSWERS.insert(&packet.answer, &packet.answers, 0);
    }
    true
}

/// A flow of such a protocol begins.
#[inline(always)]
pub(crate) fn begin(packet: &mut Packet) {
    prepare(packet);
    let _ = DATAGRAMS.insert(&packet.flow, &packet.entry, 0);
    let _ = DATAGRAM_ANSWERS.insert(&packet.answer, &packet.answers, 0);
}

/// Who ends a connection and then accepts one from the same port accepts another: one that its client has made to the
/// endpoint's own address, or a flow that is known apart.
#[inline(always)]
fn is_over(packet: &Packet, answer: *mut Answer) -> bool {
    // SAFETY: a map gave the pointer.
    packet.tcp & SYN != 0 && unsafe { (*answer).state } == flow_state::CLOSING
}

/// The VIP and port that a packet answers for, if it is an answer; its endpoint is noted as heard.
#[inline(always)]
pub(crate) fn answered(packet: &mut Packet) -> Option<Endpoint> {
    let answer = if packet.protocol == TCP {
        match ANSWERS.get_ptr_mut(&packet.flow) {
            Some(answer) if !is_over(packet, answer) => answer,
            over => {
                if over.is_some() {
                    let _ = ANSWERS.remove(&packet.flow);
                }
                let answer = HALF_ANSWERS.get_ptr_mut(&packet.flow)?;
                if is_over(packet, answer) {
                    let _ = HALF_ANSWERS.remove(&packet.flow);
                    return None;
                }
                answer
            }
        }
    } else {
        DATAGRAM_ANSWERS.get_ptr_mut(&packet.flow)?
    };
    // SAFETY: as in `is_established`.
    let answer = unsafe { &mut *answer };
    let now = now();
    if packet.tcp & (FIN | RST) != 0 {
        answer.state = flow_state::CLOSING;
        answer.seen = now;
    } else if now.wrapping_sub(answer.seen) > TOUCH {
        answer.seen = now;
    }
    let vip = answer.vip;
    if packet.tcp & RST != 0 {
        has_reset(packet, &vip);
    }
    Some(vip)
}

/// The endpoint has reset the flow that a packet answers: what comes from the same port now is of another, which may be
/// another node's.
#[inline(always)]
fn has_reset(packet: &mut Packet, vip: &Endpoint) {
    packet.answer = FlowKey {
        client: packet.flow.vip.0,
        vip: VipKey(vip.address),
        client_port: packet.flow.port,
        port: vip.port,
        protocol: packet.flow.protocol,
    };
    if let Some(flow) = FLOWS.get_ptr_mut(&packet.answer) {
        // SAFETY: as in `is_established`.
        unsafe { (*flow).state = flow_state::CLOSING };
    } else {
        let _ = HALF_OPEN.remove(&packet.answer);
    }
}

/// Whether answers to a TCP flow are translated, and its endpoint has not closed it.
#[inline(always)]
pub(crate) fn is_answered(key: &FlowKey) -> bool {
    // SAFETY: an entry that is replaced meanwhile is another flow's of the same addresses and ports.
    let answer = unsafe { ANSWERS.get(key).or_else(|| HALF_ANSWERS.get(key)) };
    answer.is_some_and(|answer| answer.state != flow_state::CLOSING)
}

/// A first fragment tells the ports of those that follow.
#[inline(always)]
pub(crate) fn first_fragment(packet: &Packet) {
    let fragment = Fragment {
        seen: now(),
        client_port: packet.flow.client_port,
        port: packet.flow.port,
        zero: 0,
    };
    let _ = FRAGMENTS.insert(&packet.fragment(), &fragment, 0);
}

/// The ports of a later fragment, the client's first.
#[inline(always)]
pub(crate) fn ports_of(key: &FragmentKey) -> Option<(u16, u16)> {
    // SAFETY: an entry that is replaced meanwhile is another datagram's, which a stray fragment has to expect.
    let fragment = unsafe { FRAGMENTS.get(key) }?;
    if now().wrapping_sub(fragment.seen) > FRAGMENT_LIFE {
        return None;
    }
    Some((fragment.client_port, fragment.port))
}
