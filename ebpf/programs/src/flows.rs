//! The TCP flows that this node delivers.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use landfall_ebpf_common::{
    FRAGMENT_LIFE, Flow, FlowKey, Fragment, FragmentKey, Verdict, flow_state,
};

use crate::context::Context;
use crate::maps::{self, FLOWS, FRAGMENTS, HALF_OPEN};
use crate::packet::{ACK, FIN, Packet, RST};

/// How often the time of a flow is written, at most: a cache line that all CPUs write is slow.
const TOUCH: u64 = 1_000_000_000;

#[inline(always)]
fn now() -> u64 {
    // SAFETY: it has no arguments and reads a clock.
    unsafe { bpf_ktime_get_ns() }
}

/// Whether this node delivers the flow of a packet, which is noted as heard.
#[inline(always)]
pub(crate) fn holds<C: Context>(packet: &Packet) -> bool {
    if !C::LAST {
        return FLOWS.get_ptr(&packet.flow).is_some() || HALF_OPEN.get_ptr(&packet.flow).is_some();
    }
    if let Some(flow) = FLOWS.get_ptr_mut(&packet.flow) {
        let now = now();
        // SAFETY: the map gave the pointer; both fields are written whole, and which of two writers is last is
        // of no matter.
        unsafe {
            if packet.tcp & (FIN | RST) != 0 {
                (*flow).state = flow_state::CLOSING;
                (*flow).seen = now;
            } else if now.wrapping_sub((*flow).seen) > TOUCH {
                (*flow).seen = now;
            }
        }
        return true;
    }
    if HALF_OPEN.get_ptr(&packet.flow).is_none() {
        return false;
    }
    if packet.tcp & (ACK | RST) == ACK {
        enter(&packet.flow);
        let _ = HALF_OPEN.remove(&packet.flow);
    }
    true
}

/// A flow that was heard from its client more than once.
#[inline(always)]
fn enter(key: &FlowKey) {
    let flow = Flow {
        seen: now(),
        state: flow_state::ESTABLISHED,
        zero: 0,
    };
    if FLOWS.insert(key, &flow, 0).is_err() {
        maps::note(Verdict::FlowsFull);
    }
}

/// A SYN is delivered here.
#[inline(always)]
pub(crate) fn open<C: Context>(key: &FlowKey) {
    if !C::LAST {
        return;
    }
    let flow = Flow {
        seen: now(),
        state: flow_state::ESTABLISHED,
        zero: 0,
    };
    let _ = HALF_OPEN.insert(key, &flow, 0);
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
