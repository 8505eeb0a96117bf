//! The gateway: packets of pods leave by an address of the pod's policy, and their answers come back (DESIGN's *binding*).
//!
//! ```text
//!  in by an uplink ─> enter ─┬─ to an egress address ─> read ─> flow (in) ──> translate ─> the pod's node, or the stack
//!                            └─ a pod's, of another node ─> read ─> flow (out) ─> translate ─> the next hop
//!  out by an uplink ─> leave ─ a pod's of this node ──────> read ─> flow (out) ─> translate ─> on its way
//!  flow ─ none ─> claim a port ─ none to be had ─> answer
//!  keep ─ what user space names ─> end
//!  copies ─ another gateway's bindings ─> place, displace
//!  tell ─ what begins and ends ─> user space
//! ```
//!
//! All of it is attached only while there is a policy.

mod answer;
mod claim;
mod copies;
mod flow;
mod keep;
mod maps;
mod pace;
mod tell;
mod word;

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, bpf_redir_neigh};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh};
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::egress::binding::{V6, ticks};
use landfall_ebpf_common::egress::gateway::{
    Filter, Hop, NOWHERE, Policy, RESUME, Reason, egress_flag, policy_flag, source_flag,
};
use landfall_ebpf_common::{PortKey, VipKey, vip_flag};

use crate::context::Context as _;
use crate::packet::{
    ETH_HEADER, Frame, ICMPV6, Kind, Packet, RST, SYN, TCP, UDP, landfall_read_any,
};
use crate::translate::{DESTINATION, SOURCE, landfall_translate};
use crate::{DROP, NEXT, echo, flows, guard, tunnel};
use answer::{landfall_gateway_answer, say};
use flow::Found;
use maps::{Family, Four, Six};

/// `AF_INET` and `AF_INET6` (`linux/socket.h`).
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
/// Where the hop limit lies in an IPv6 header.
const HOP_LIMIT: usize = 7;

/// A frame that came in by an uplink.
#[inline(always)]
pub(crate) fn enter(context: &TcContext) -> i32 {
    let of_interest = landfall_gateway_look(context.skb.skb);
    if of_interest == 0 {
        return NEXT;
    }
    let mut action = NOT_OURS;
    if of_interest & TO_US != 0 {
        action = landfall_gateway_inward(context.skb.skb);
    }
    if action == NOT_OURS && of_interest & OF_POD != 0 {
        // What was read before is about the other direction.
        landfall_gateway_look(context.skb.skb);
        action = landfall_gateway_outward(context.skb.skb, ARRIVES);
    }
    if action == NOT_OURS { NEXT } else { action }
}

/// A frame that leaves by an uplink: what of it is a pod's of this node, and this node is its gateway, is translated. The
/// packets that are to be are told by their mark, where there is one. What is to one of the addresses that pods leave by
/// here comes in: nobody else would answer for it.
#[inline(always)]
pub(crate) fn leave(context: &TcContext) -> i32 {
    let mark = maps::mark();
    // SAFETY: the context's pointer is the program's argument; the verifier checks the read.
    let may_be_pods = mark == 0 || unsafe { (*context.skb.skb).mark } & mark == mark;
    let nowhere = context.at(0) == Some(NOWHERE);
    if !may_be_pods && !nowhere {
        return NEXT;
    }
    let of_interest = landfall_gateway_look(context.skb.skb);
    if may_be_pods && of_interest & OF_POD != 0 {
        let action = landfall_gateway_outward(context.skb.skb, LEAVES);
        if action != NOT_OURS {
            return action;
        }
    }
    if nowhere && of_interest & TO_US != 0 {
        return landfall_gateway_return(context.skb.skb);
    }
    NEXT
}

/// Lets a frame come in that would leave, unless a pod of this node has sent it under its own address.
///
/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_return(skb: *mut __sk_buff) -> i32 {
    // What was read before may have been another packet: an error's inner one.
    landfall_gateway_look(skb);
    let of_pod =
        crate::maps::packet().is_none_or(|packet| maps::source(&VipKey(packet.source)).is_some());
    if of_pod {
        return NEXT;
    }
    // SAFETY: the context's pointer is the program's argument; the verifier checks the read.
    let here = unsafe { (*skb).ifindex };
    come_in(&TcContext::new(skb), here, None)
}

/// Lets a frame come in by an interface with this Ethernet address, as from a client; by the one that it would leave by, if
/// none is said.
#[inline(always)]
fn come_in(context: &TcContext, interface: u32, mac: Option<&[u8; 6]>) -> i32 {
    let own = match mac {
        Some(mac) => Some(*mac),
        None => context.load(6).ok(),
    };
    let Some(own) = own else { return DROP };
    let stored = context.skb.store(0, &own, 0).is_ok() && context.skb.store(6, &own, 0).is_ok();
    if !stored {
        return DROP;
    }
    // It was of the way that ends here.
    context.set_mark(0);
    // SAFETY: it takes numbers only.
    unsafe { bpf_redirect(interface, u64::from(BPF_F_INGRESS)) as i32 }
}

/// Whether a VIP is at the uplink of this hop: what is for it comes in there, and is steered, whoever leads the VIP.
#[inline(always)]
fn is_at(packet: &Packet, hop: &Hop) -> bool {
    let near = if packet.v6 {
        words(&hop.via_v6) == [0; 4]
    } else {
        hop.via_v4 == 0
    };
    let vip = crate::maps::vip(&packet.flow.vip);
    near && vip.is_some_and(|vip| vip.flags & vip_flag::STEER != 0)
}

/// What [`landfall_gateway_look`] finds: its destination may be an egress address, or a pod of this node.
const TO_US: u32 = 1;
/// Its source may be a pod.
const OF_POD: u32 = 2;

/// Whether a frame may be of interest, by its addresses. If so, it is put where the packet at hand is.
///
/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_look(skb: *mut __sk_buff) -> u32 {
    look(&TcContext::new(skb)).unwrap_or(0)
}

#[inline(always)]
fn look(context: &TcContext) -> Option<u32> {
    let frame = Frame::of(context)?;
    let filter = maps::filter()?;
    let packet = crate::maps::packet()?;
    packet.put(&frame);
    packet.source = source_of(context, frame.v6)?.0;
    let (word, bit) = Filter::place(words(&packet.flow.vip.0));
    let to_us = filter.destinations[word] & bit != 0;
    let (word, bit) = Filter::place(words(&packet.source));
    let of_pod = filter.pods[word] & bit != 0;
    Some(u32::from(to_us) * TO_US + u32::from(of_pod) * OF_POD)
}

/// An address of the packet at hand, by words: that is quicker than by bytes.
#[inline(always)]
fn words(address: &[u8; 16]) -> V6 {
    // SAFETY: it lies at a multiple of four in the packet.
    unsafe { *address.as_ptr().cast() }
}

/// Writes one.
#[inline(always)]
fn set_words(address: &mut [u8; 16], words: V6) {
    // SAFETY: as above.
    unsafe { *address.as_mut_ptr().cast() = words };
}

/// Ends what is due.
#[inline(always)]
pub(crate) fn keep(context: &TcContext) -> i32 {
    keep::keep(context)
}

/// Puts copies in, or takes them out.
#[inline(always)]
pub(crate) fn copy(context: &TcContext) -> i32 {
    copies::copy(context)
}

/// No action: the frame is not the gateway's.
const NOT_OURS: i32 = -2;
/// The frame came in by an uplink.
const ARRIVES: u32 = 0;
/// It leaves by one.
const LEAVES: u32 = 1;

/// A frame's source, as a key.
#[inline(always)]
fn source_of(context: &TcContext, v6: bool) -> Option<VipKey> {
    if v6 {
        let address: [u8; 16] = match context.at(ETH_HEADER + crate::packet::IPV6_SOURCE) {
            Some(address) => address,
            None => context.load(ETH_HEADER + crate::packet::IPV6_SOURCE).ok()?,
        };
        return Some(VipKey(address));
    }
    let address: [u8; 4] = match context.at(ETH_HEADER + crate::packet::IPV4_SOURCE) {
        Some(address) => address,
        None => context.load(ETH_HEADER + crate::packet::IPV4_SOURCE).ok()?,
    };
    Some(VipKey::v4(address))
}

/// A packet of a pod, whose frame was put.
///
/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_outward(skb: *mut __sk_buff, leaves: u32) -> i32 {
    let context = TcContext::new(skb);
    let readable = landfall_read_any(skb) != 0;
    let leaves = leaves == LEAVES;
    if crate::maps::packet().is_some_and(|packet| packet.v6) {
        outward::<Six>(&context, readable, leaves)
    } else {
        outward::<Four>(&context, readable, leaves)
    }
}

/// A packet to an egress address or to a pod of this node, whose frame was put.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_inward(skb: *mut __sk_buff) -> i32 {
    let context = TcContext::new(skb);
    let readable = landfall_read_any(skb) != 0;
    if crate::maps::packet().is_some_and(|packet| packet.v6) {
        inward::<Six>(&context, readable)
    } else {
        inward::<Four>(&context, readable)
    }
}

/// Whose address signs an answer, and to which node it goes, as [`landfall_gateway_answer`] has it.
#[inline(always)]
fn signed(hop: u16, node: u16) -> u32 {
    u32::from(hop) | u32::from(node) << 16
}

#[inline(always)]
fn drop(reason: Reason) -> i32 {
    maps::note(reason);
    DROP
}

/// The same of a packet of a policy's.
#[inline(always)]
fn drop_of(policy: u16, pod: &[u8; 16], reason: Reason) -> i32 {
    maps::note_of(policy, pod, reason as u32, 0);
    DROP
}

/// A packet of a policy's goes on.
#[inline(always)]
fn passed(context: &TcContext, policy: u16, pod: &[u8; 16], reason: Reason) {
    // SAFETY: the context's pointer is the program's argument; the verifier checks the read.
    let bytes = unsafe { (*context.skb.skb).len };
    maps::note_of(policy, pod, reason as u32, bytes);
}

/// Finds a later fragment's ports, and notes a first one's. False, if they are not known.
#[inline(always)]
fn complete(packet: &mut Packet) -> bool {
    if packet.kind == Kind::LaterFragment {
        let Some((client_port, port)) = flows::ports_of(&packet.fragment()) else {
            return false;
        };
        (packet.flow.client_port, packet.flow.port) = (client_port, port);
    } else if packet.more && packet.kind != Kind::Error {
        flows::first_fragment(packet);
    }
    true
}

#[inline(always)]
fn outward<F: Family>(context: &TcContext, readable: bool, leaves: bool) -> i32 {
    // Not as an argument: other functions that are called from here write there.
    let Some(packet) = crate::maps::packet() else {
        return NOT_OURS;
    };
    let mut hairpin = false;
    if packet.flow.vip.may_be_shadow(packet.v6)
        && let Some(vip) = crate::maps::shadowed(&packet.flow.vip)
    {
        set_words(&mut packet.flow.vip.0, words(&vip.0));
        hairpin = true;
    }
    let readable = readable && complete(packet);
    // An error's own sender has to be the pod that it is about.
    let readable = readable && words(&packet.flow.client) == words(&packet.source);
    let found = if readable {
        flow::find_out::<F>(packet)
    } else {
        None
    };
    let found = match found {
        Some(found) => found,
        None => match begin::<F>(context, packet, leaves, readable, hairpin) {
            Ok(found) => found,
            Err(action) => return action,
        },
    };
    if maps::is_silent(&packet.to.address) {
        return drop_of(found.policy, &packet.source, Reason::Silent);
    }
    let Some(policy) = policy_of(&found) else {
        // The guard has sent on what is a pod's of this node.
        return if leaves {
            NOT_OURS
        } else {
            drop_of(found.policy, &packet.source, Reason::NotGateway)
        };
    };
    if leaves != (found.node == 0) {
        return if leaves {
            NOT_OURS
        } else {
            drop(Reason::Forged)
        };
    }
    if !leaves && maps::node(found.node).is_none_or(|node| node.mac != packet.mac) {
        return drop(Reason::Forged);
    }
    if pace::is_over(context, policy, found.policy, maps::OUT) {
        return drop_of(found.policy, &packet.source, Reason::Bandwidth);
    }
    if leaves {
        if translate_out(context, packet, hairpin).is_none() {
            return drop_of(found.policy, &packet.source, Reason::Unreadable);
        }
        passed(context, found.policy, &packet.source, Reason::Out);
        if !hairpin {
            return NEXT;
        }
        // The kernel knows no way to a shadow.
        let hop = maps::route(policy.uplink, &packet.flow.vip.0).and_then(maps::hop);
        return match hop {
            Some(hop) if is_at(packet, hop) => come_in(context, policy.uplink, None),
            Some(hop) => forward(packet, hop),
            None => drop_of(found.policy, &packet.source, Reason::NoWay),
        };
    }
    let Some(hop) = maps::hop(found.hop).filter(|hop| hop.interface != 0) else {
        return drop_of(found.policy, &packet.source, Reason::NoWay);
    };
    let own = signed(found.hop, found.node);
    if packet.ttl <= 1 {
        maps::note_of(found.policy, &packet.source, Reason::Expired as u32, 0);
        return landfall_gateway_answer(context.skb.skb, say::EXPIRED, own);
    }
    if pace::lengths(context, packet).0 > hop.mtu {
        maps::note_of(found.policy, &packet.source, Reason::TooBig as u32, 0);
        return landfall_gateway_answer(context.skb.skb, say::TOO_BIG | hop.mtu << 16, own);
    }
    if translate_out(context, packet, hairpin).is_none() || lower(context, packet).is_none() {
        return drop_of(found.policy, &packet.source, Reason::Unreadable);
    }
    passed(context, found.policy, &packet.source, Reason::Out);
    if hairpin && is_at(packet, hop) {
        return come_in(context, hop.interface, Some(&hop.mac));
    }
    forward(packet, hop)
}

/// Translates a pod's packet to what was found, one to a shadow to its VIP too.
#[inline(always)]
fn translate_out(context: &TcContext, packet: &mut Packet, hairpin: bool) -> Option<()> {
    if hairpin {
        let (address, port) = (words(&packet.to.address), packet.to.port);
        let vip = words(&packet.flow.vip.0);
        let shadow = packet.flow.vip.shadow(packet.v6);
        readdress(context, packet, DESTINATION, words(&shadow.0), vip)?;
        set_words(&mut packet.to.address, address);
        packet.to.port = port;
    }
    set_words(&mut packet.from.address, words(&packet.flow.client));
    packet.from.port = packet.flow.client_port;
    (landfall_translate(context.skb.skb, SOURCE) == 0).then_some(())
}

/// Translates an address of the packet at hand, and no port.
#[inline(always)]
fn readdress(context: &TcContext, packet: &mut Packet, side: u32, from: V6, to: V6) -> Option<()> {
    set_words(&mut packet.from.address, from);
    set_words(&mut packet.to.address, to);
    (packet.from.port, packet.to.port) = (0, 0);
    (landfall_translate(context.skb.skb, side) == 0).then_some(())
}

/// Translates a remote's packet to what was found; a VIP becomes its shadow, which the pod's node knows it by.
#[inline(always)]
fn translate_in(context: &TcContext, packet: &mut Packet, hairpin: bool) -> Option<()> {
    set_words(&mut packet.from.address, words(&packet.flow.vip.0));
    packet.from.port = packet.flow.port;
    if landfall_translate(context.skb.skb, DESTINATION) != 0 {
        return None;
    }
    if hairpin {
        let (address, port) = (words(&packet.to.address), packet.to.port);
        let shadow = VipKey(packet.flow.client).shadow(packet.v6);
        let vip = words(&packet.flow.client);
        readdress(context, packet, SOURCE, vip, words(&shadow.0))?;
        set_words(&mut packet.to.address, address);
        packet.to.port = port;
    }
    Some(())
}

/// A flow's policy, if this node is its gateway.
#[inline(always)]
fn policy_of(found: &Found) -> Option<&'static Policy> {
    maps::policy(found.policy).filter(|policy| policy.uplink != 0)
}

/// A pod's packet whose flow is not known: a flow begins, or an action says what becomes of the packet.
#[inline(always)]
fn begin<F: Family>(
    context: &TcContext,
    packet: &mut Packet,
    leaves: bool,
    readable: bool,
    hairpin: bool,
) -> Result<Found, i32> {
    // Of what comes nobody else knows what to do with a packet to a shadow. What leaves the guard has sent on.
    let refused = || {
        if hairpin && !leaves {
            drop(Reason::NotGateway)
        } else {
            NOT_OURS
        }
    };
    let Some(source) = maps::source(&VipKey(packet.source)) else {
        return Err(refused());
    };
    if source.flags & source_flag::HERE == 0 || leaves != (source.node == 0) {
        // One that claims to come from here, and comes from outside, is nobody's.
        let forged = source.flags & source_flag::HERE != 0 && !leaves;
        return Err(if forged {
            drop(Reason::Forged)
        } else {
            refused()
        });
    }
    // SAFETY: the context's pointer is the program's argument; the verifier checks the read.
    let mark = unsafe { (*context.skb.skb).mark };
    if leaves && guard::is_led_away(mark, &VipKey(packet.source)) {
        return Err(NOT_OURS);
    }
    let policy = maps::policy(source.policy);
    let uplink = policy.map_or(0, |policy| policy.uplink);
    let destination = packet.flow.vip.0;
    // To a VIP a pod comes by the shadow that its node has given that; by its address it goes on as if there were no policy.
    let is_own = if hairpin {
        let is_for_vips = policy.is_some_and(|policy| policy.flags & policy_flag::HAIRPIN != 0);
        !is_for_vips || words(&packet.flow.vip.0) == words(&source.egress)
    } else {
        crate::maps::vip(&VipKey(destination)).is_some()
    };
    if is_own || maps::route(uplink, &destination) == Some(0) {
        return Err(refused());
    }
    if !leaves && maps::node(source.node).is_none_or(|node| node.mac != packet.mac) {
        return Err(drop(Reason::Forged));
    }
    if !readable {
        let stray = packet.kind == Kind::LaterFragment;
        let reason = if stray {
            Reason::StrayFragment
        } else {
            Reason::Unreadable
        };
        return Err(drop_of(source.policy, &packet.source, reason));
    }
    let begins = match packet.kind {
        Kind::Whole if packet.protocol == TCP => packet.is_syn(),
        Kind::Whole => packet.protocol == UDP,
        Kind::Echo => packet.tcp == SYN,
        Kind::LaterFragment | Kind::Error => false,
    };
    let state = maps::egress(&VipKey(source.egress));
    if state.flags & egress_flag::SILENT != 0 {
        return Err(drop_of(source.policy, &packet.source, Reason::Silent));
    }
    // The connection may be one whose binding was not copied in time.
    let goes_on = !begins
        && packet.kind == Kind::Whole
        && packet.protocol == TCP
        && packet.tcp & (SYN | RST) == 0
        && state.flags & egress_flag::LED != 0
        && source.flags & source_flag::RESUMES != 0
        && flow::now().wrapping_sub(state.since) < ticks(RESUME);
    if !begins && !goes_on {
        return Err(drop_of(source.policy, &packet.source, Reason::Unknown));
    }
    if state.flags & egress_flag::FROZEN != 0 {
        return Err(drop_of(source.policy, &packet.source, Reason::Frozen));
    }
    let Some(hop) = maps::route(uplink, &destination) else {
        return Err(drop_of(source.policy, &packet.source, Reason::NoWay));
    };
    if packet.ttl <= 1 && !leaves {
        maps::note_of(source.policy, &packet.source, Reason::Expired as u32, 0);
        return Err(landfall_gateway_answer(
            context.skb.skb,
            say::EXPIRED,
            signed(hop, source.node),
        ));
    }
    if let Some(room) = F::room() {
        room.source = source;
        room.own_only = u32::from(goes_on);
    }
    let made = F::make();
    if made == flow::BOUND {
        if goes_on {
            maps::note(Reason::Resumed);
        }
        return flow::find_out::<F>(packet).ok_or(DROP);
    }
    let refused = made == Reason::Quota as u32 || made == Reason::NoPort as u32;
    maps::note_of(source.policy, &packet.source, made, 0);
    if !refused && made != Reason::NoRoom as u32 {
        return Err(DROP);
    }
    let up = if leaves { say::UP } else { 0 };
    Err(landfall_gateway_answer(
        context.skb.skb,
        say::PROHIBITED | up,
        signed(hop, source.node),
    ))
}

/// Takes one from the TTL.
#[inline(always)]
fn lower(context: &TcContext, packet: &Packet) -> Option<()> {
    if packet.v6 {
        context
            .store(ETH_HEADER + HOP_LIMIT, &(packet.ttl - 1), 0)
            .ok()
    } else {
        echo::set_ttl(context, packet.ttl, packet.ttl - 1)
    }
}

/// Sends the packet to its remote, or to the router on the way there. The kernel finds the Ethernet address.
#[inline(always)]
fn forward(packet: &Packet, hop: &Hop) -> i32 {
    // SAFETY: all of it may be zero.
    let mut next: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    if packet.v6 {
        next.nh_family = AF_INET6;
        next.__bindgen_anon_1.ipv6_nh = if words(&hop.via_v6) == [0; 4] {
            words(&packet.flow.vip.0)
        } else {
            words(&hop.via_v6)
        };
    } else {
        next.nh_family = AF_INET;
        next.__bindgen_anon_1.ipv4_nh = if hop.via_v4 == 0 {
            words(&packet.flow.vip.0)[3]
        } else {
            hop.via_v4
        };
    }
    // SAFETY: the parameters are as long as is said.
    unsafe {
        bpf_redirect_neigh(
            hop.interface,
            &raw mut next,
            size_of::<bpf_redir_neigh>() as i32,
            0,
        ) as i32
    }
}

#[inline(always)]
fn inward<F: Family>(context: &TcContext, readable: bool) -> i32 {
    let Some(packet) = crate::maps::packet() else {
        return NOT_OURS;
    };
    let readable = readable && complete(packet);
    let found = if readable {
        flow::find_in::<F>(packet)
    } else {
        None
    };
    let Some(found) = found else {
        return unbound(context, packet, readable);
    };
    if maps::is_silent(&packet.flow.vip.0) {
        return drop_of(found.policy, &packet.to.address, Reason::Silent);
    }
    let Some(policy) = policy_of(&found) else {
        return drop_of(found.policy, &packet.to.address, Reason::NotGateway);
    };
    if pace::is_over(context, policy, found.policy, maps::IN) {
        return drop_of(found.policy, &packet.to.address, Reason::Bandwidth);
    }
    // A copy may have been here before it was known that its remote is a VIP.
    let hairpin = found.node != 0
        || policy.flags & policy_flag::HAIRPIN != 0
            && crate::maps::vip(&VipKey(packet.flow.client)).is_some();
    if found.hop == 0 {
        if translate_in(context, packet, hairpin).is_none() {
            return drop_of(found.policy, &packet.to.address, Reason::Unreadable);
        }
        // So that the check of its way back finds the way that the pod's packets go.
        // SAFETY: the context's pointer is the program's argument; the verifier checks the read.
        let before = unsafe { (*context.skb.skb).mark };
        context.set_mark(before | maps::mark());
        passed(context, found.policy, &packet.to.address, Reason::In);
        return NEXT;
    }
    let Some(node) = maps::node(found.hop).filter(|node| node.interface != 0) else {
        return drop_of(found.policy, &packet.to.address, Reason::NoWay);
    };
    if packet.ttl <= 1 {
        maps::note_of(found.policy, &packet.to.address, Reason::Expired as u32, 0);
        return landfall_gateway_answer(context.skb.skb, say::EXPIRED, 0);
    }
    if pace::lengths(context, packet).0 > node.mtu {
        maps::note_of(found.policy, &packet.to.address, Reason::TooBig as u32, 0);
        return landfall_gateway_answer(context.skb.skb, say::TOO_BIG | node.mtu << 16, 0);
    }
    let translated = translate_in(context, packet, hairpin).is_some()
        && lower(context, packet).is_some()
        && context.skb.store(0, &node.mac, 0).is_ok()
        && context.skb.store(6, &node.own, 0).is_ok();
    if !translated {
        return drop_of(found.policy, &packet.to.address, Reason::Unreadable);
    }
    if tunnelled(context.skb.skb, found.hop).is_none() {
        return drop_of(found.policy, &packet.to.address, Reason::NoWay);
    }
    passed(context, found.policy, &packet.to.address, Reason::In);
    // SAFETY: it takes numbers only.
    unsafe { bpf_redirect(node.interface, 0) as i32 }
}

/// If a node is reached by the tunnel, says that the frame at hand goes to it.
#[inline(always)]
fn tunnelled(skb: *mut __sk_buff, number: u16) -> Option<()> {
    let node = maps::node(number)?;
    let near = words(&node.address) == [0; 4];
    (near || landfall_gateway_tunnel(skb, u32::from(number)) == 0).then_some(())
}

/// Says to which node the frame at hand goes, which is about to be sent by the tunnel; 0 if that is said.
///
/// A global function: verified once, with a stack of its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_gateway_tunnel(skb: *mut __sk_buff, number: u32) -> u32 {
    let said = maps::node(number as u16).and_then(|node| tunnel::lead(skb, &node.address));
    u32::from(said.is_none())
}

/// A packet of no flow that is known: a Service's, a gateway's answer to a pod of this node, or nobody's.
#[inline(always)]
fn unbound(context: &TcContext, packet: &mut Packet, readable: bool) -> i32 {
    if !maps::is_egress(&packet.flow.vip) {
        return answered(context, packet);
    }
    if readable {
        let key = PortKey {
            vip: packet.flow.vip,
            port: packet.flow.port,
            protocol: packet.protocol,
            zero: 0,
        };
        // An echo request is answered, or not, as that to any VIP.
        let asks = packet.kind == Kind::Echo && packet.tcp == SYN;
        if asks || crate::maps::port(&key).is_some() {
            return NOT_OURS;
        }
    }
    if asks_for_neighbour(context, packet) {
        return NOT_OURS;
    }
    // A SYN to a port that no Service has is refused.
    let refusable =
        readable && packet.kind == Kind::Whole && packet.protocol == TCP && packet.is_syn();
    // Whether a fragment is a Service's is known there.
    let stray = packet.kind == Kind::LaterFragment;
    // Whether it is steered or not: the packet filter refuses it, where the address answers for such ports at all.
    let vip = crate::maps::vip(&packet.flow.vip);
    let serves = vip.is_some_and(|vip| vip.flags & vip_flag::STEER != 0);
    if vip.is_some() && refusable || serves && stray {
        return NOT_OURS;
    }
    drop(if stray {
        Reason::StrayFragment
    } else {
        Reason::Unbound
    })
}

/// Neighbour discovery is the announcer's (RFC 4861, 4: types 133 to 137).
#[inline(always)]
fn asks_for_neighbour(context: &TcContext, packet: &Packet) -> bool {
    packet.protocol == ICMPV6
        && packet.v6
        && packet.kind != Kind::LaterFragment
        && context
            .load::<u8>(packet.transport)
            .is_ok_and(|kind| (133..=137).contains(&kind))
}

/// What a gateway sends to a pod of this node is marked, so that the check of its way back knows it.
#[inline(always)]
fn answered(context: &TcContext, packet: &Packet) -> i32 {
    let Some(source) = maps::source(&packet.flow.vip) else {
        return NOT_OURS;
    };
    if source.flags & source_flag::LOCAL == 0 || source.gateway == 0 {
        return NOT_OURS;
    }
    let mac: Option<[u8; 6]> = context.load(6).ok();
    if let Some(node) = maps::node(source.gateway)
        && Some(node.mac) == mac
        && node.mark != 0
    {
        // SAFETY: the context's pointer is the program's argument; the verifier checks the read.
        let before = unsafe { (*context.skb.skb).mark };
        context.set_mark(before | node.mark);
    }
    NOT_OURS
}
