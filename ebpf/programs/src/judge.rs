//! Whose a packet is that is about to leave, where no packet filter says so: beside Cilium, which sends what a pod sends from
//! the pod's interface to the uplink. The guard goes by the same two bits of the packet mark in either case.
//!
//! ```text
//!  no tenant's   this node's own, in from outside ──────────────> not judged: the guard knows them
//!                (but by this node from an address of pods, none that is known ─> dropped)
//!                a pod that is known, a node's address, a VIP ──> judged      else ─> not judged
//!  a tenant's    in from outside, for the cluster ──────────────> not judged, likewise
//!                (for what was not the cluster's when its flow left by a gateway ─> dropped)
//!                its flow has left by a gateway ────────────────> so it does, while that policy is its pod's or was
//!                an answer to who began it outside ─────────────> judged
//!                where the policy is not for ───────────────────> judged
//!                masqueraded, since the policy was not for it ──> judged, unless the policy cuts such flows
//!                else ──────────────────────────────────────────> judged, and leaves by the gateway
//! ```
//!
//! Cilium has a use of its own for the packet mark: what it said there waits in the packet's control block until all programs
//! of ours have seen the packet. Of what they have led away or translated Cilium is told that it has its source.

use aya_ebpf::bindings::{__sk_buff, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{HashMap, LruHashMap};
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::egress::guard::{Gateway, Guarded, Tenant, gateway_flag, tenant_flag};
use landfall_ebpf_common::egress::judge::cilium::{
    FROM_OUTSIDE, FlowV4, FlowV6, MAGIC, MASQUERADED, SNAT_DONE, key_v4, key_v6,
};
use landfall_ebpf_common::egress::judge::{
    COARSE, Destination, IDLE, Judgement, MAX_DESTINATIONS, MAX_JUDGED, MAX_PLAIN,
};
use landfall_ebpf_common::{FlowKey, VipKey};

use crate::packet::{Ends, Frame, Kind, Packet, TCP, landfall_read_any};
use crate::{NEXT, flows, guard, maps};

#[map]
static PLAIN: HashMap<VipKey, u32> = HashMap::with_max_entries(MAX_PLAIN, BPF_F_NO_PREALLOC);
#[map]
static DESTINATIONS: LpmTrie<Destination, u32> =
    LpmTrie::with_max_entries(MAX_DESTINATIONS, BPF_F_NO_PREALLOC);
#[map]
static JUDGED: LruHashMap<FlowKey, Judgement> = LruHashMap::with_max_entries(MAX_JUDGED, 0);

/// Cilium's, where it is there. Whatever its values are: they are not read.
#[map]
static CILIUM_TCP_V4: LruHashMap<FlowV4, u64> = LruHashMap::with_max_entries(1, 0);
#[map]
static CILIUM_ANY_V4: LruHashMap<FlowV4, u64> = LruHashMap::with_max_entries(1, 0);
#[map]
static CILIUM_SNAT_V4: LruHashMap<FlowV4, u64> = LruHashMap::with_max_entries(1, 0);
#[map]
static CILIUM_TCP_V6: LruHashMap<FlowV6, u64> = LruHashMap::with_max_entries(1, 0);
#[map]
static CILIUM_ANY_V6: LruHashMap<FlowV6, u64> = LruHashMap::with_max_entries(1, 0);
#[map]
static CILIUM_SNAT_V6: LruHashMap<FlowV6, u64> = LruHashMap::with_max_entries(1, 0);

/// Where in the packet's control block its mark waits, and what says that it does ("LFMK").
const WAITING: usize = 0;
const THERE: usize = 1;
const IS_THERE: u32 = 0x4c46_4d4b;

/// What is said of a packet, as bits: it is judged, it leaves by a gateway. A flow from before its pod was whose it is has the
/// second alone.
const JUDGED_BIT: u32 = 1;
const EGRESS_BIT: u32 = 2;
/// Or that it is dropped: its flow left by a gateway, and it is for the cluster by now; or nobody knows whose it is.
const DROP_BIT: u32 = 4;
const STRAY_BIT: u32 = 32;

/// The seeds of no policies: a flow left as it would without, and nothing is known of it (or it is over).
const STAYED: u64 = 0;
const UNKNOWN: u64 = u64::MAX;

/// What is known of a packet: it could be read, it is for the cluster, it is a tenant's.
const READABLE: u32 = 1;
const INSIDE: u32 = 8;
const TENANT: u32 = 16;

/// Marks a frame that is about to leave by whose it is.
#[inline(always)]
pub(crate) fn judge(context: &TcContext) -> i32 {
    let Some(marks) = guard::marks() else {
        return NEXT;
    };
    let skb = context.skb.skb;
    // SAFETY: the context's pointer is the program's argument; the verifier checks reads and writes.
    let (mark, from) = unsafe { ((*skb).mark, (*skb).ingress_ifindex) };
    // SAFETY: as above.
    unsafe {
        (*skb).cb[WAITING] = mark;
        (*skb).cb[THERE] = IS_THERE;
    }
    let said = of(context, from);
    if said & DROP_BIT != 0 {
        return guard::refuse(Guarded::Joined);
    }
    if said & STRAY_BIT != 0 {
        return guard::refuse(Guarded::Unjudged);
    }
    let mut bits = 0;
    if said & JUDGED_BIT != 0 {
        bits |= marks.judged;
    }
    if said & EGRESS_BIT != 0 {
        bits |= marks.egress;
    }
    // Nobody's word but this program's.
    context.set_mark(mark & !(marks.judged | marks.egress) | bits);
    NEXT
}

/// Gives the packet mark back as it was, and says what has its source already.
#[inline(always)]
pub(crate) fn restore(context: &TcContext) {
    let skb = context.skb.skb;
    // SAFETY: the context's pointer is the program's argument; the verifier checks reads and writes.
    let (mark, waiting, there) = unsafe { ((*skb).mark, (*skb).cb[WAITING], (*skb).cb[THERE]) };
    if there != IS_THERE {
        // Somebody has taken the one away that judges, for a moment. What the guard has let out of a tenant's it has led.
        let of_tenant = || Ends::of(context).is_some_and(|ends| guard::is_own(&ends.source));
        if Ends::has(context) && guard::marks().is_some() && of_tenant() {
            context.set_mark(mark & !MAGIC | SNAT_DONE);
        }
        return;
    }
    // SAFETY: as above.
    unsafe {
        (*skb).cb[WAITING] = 0;
        (*skb).cb[THERE] = 0;
    }
    let leaves = guard::marks().is_some_and(|marks| mark & marks.egress != 0);
    context.set_mark(if leaves {
        waiting & !MAGIC | SNAT_DONE
    } else {
        waiting
    });
}

/// What is said of a packet that has come in by an interface.
///
/// Each part is called from here, and none from another: the verifier allows 512 bytes of stack to those in a row.
#[inline(always)]
fn of(context: &TcContext, from: u32) -> u32 {
    let skb = context.skb.skb;
    let about = landfall_judge_who(skb, from);
    if about & TENANT == 0 {
        return about;
    }
    let readable = landfall_read_any(skb) & READABLE;
    landfall_judge(skb, about | readable)
}

/// What is said of a packet of nobody's tenant; or that it is a tenant's, and what is known of it. Then it is where packets are
/// read to.
///
/// A global function: verified once, and the caller's stack is its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_judge_who(skb: *mut __sk_buff, from: u32) -> u32 {
    let context = TcContext::new(skb);
    if guard::is_outside(from) || !Ends::has(&context) {
        return 0;
    }
    let Some(ends) = Ends::of(&context) else {
        return 0;
    };
    if guard::tenant(&ends.source).is_none() {
        let is_pods = guard::is_of_network(&ends.source);
        let is_known =
            PLAIN.get_ptr(&ends.source).is_some() || !is_pods && guard::is_inside(&ends.source);
        return match (from, is_known) {
            // What this node has made, or a device that does not say where from (netkit), or a proxy for a pod.
            (0, false) if is_pods && !guard::is_inside(&ends.destination) => STRAY_BIT,
            (0, _) | (_, false) => 0,
            (_, true) => JUDGED_BIT,
        };
    }
    let (Some(frame), Some(packet)) = (Frame::of(&context), maps::packet()) else {
        return 0;
    };
    packet.put(&frame);
    if guard::is_inside(&ends.destination) {
        TENANT | INSIDE
    } else {
        TENANT
    }
}

/// What is said of a tenant's packet; it is where packets are read to, if it could be.
///
/// A global function, likewise.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_judge(skb: *mut __sk_buff, about: u32) -> u32 {
    let context = TcContext::new(skb);
    let Some(ends) = Ends::of(&context) else {
        return 0;
    };
    let (Some(tenant), Some(packet)) = (guard::tenant(&ends.source), maps::packet()) else {
        return 0;
    };
    let inside = about & INSIDE != 0;
    if about & READABLE == 0 || !complete(packet) {
        return if inside {
            0
        } else {
            anew(tenant, &ends.destination)
        };
    }
    let known = known(packet, tenant);
    let has_left = known != UNKNOWN && known != STAYED;
    if inside {
        return if has_left { DROP_BIT } else { 0 };
    }
    let policy = guard::gateway(tenant.policy);
    if has_left {
        if policy.is_some_and(|policy| policy.seed == known) {
            return JUDGED_BIT | EGRESS_BIT;
        }
        if guard::gateway(tenant.former).is_some_and(|former| former.seed == known) {
            return EGRESS_BIT;
        }
    }
    // Cilium remembers flows for a while that are over.
    if !begins(packet) && is_there(&packet.flow, FROM_OUTSIDE) {
        return JUDGED_BIT;
    }
    let Some(policy) = policy else {
        return JUDGED_BIT;
    };
    // It began before the pod was a tenant, or while the policy was not for it; and Cilium has not forgotten it.
    let began = tenant.flags & tenant_flag::BEFORE != 0 || known == STAYED;
    let is_kept = began && policy.flags & gateway_flag::CUTS == 0 && !begins(packet);
    let stays = !is_for(tenant.policy, policy, &ends.destination)
        || is_kept && is_there(&packet.flow, MASQUERADED);
    let judgement = Judgement {
        seed: if stays { STAYED } else { policy.seed },
        life: tenant.life,
        seen: now(),
    };
    let _ = JUDGED.insert(&packet.flow, &judgement, 0);
    if stays {
        JUDGED_BIT
    } else {
        JUDGED_BIT | EGRESS_BIT
    }
}

/// How a packet's flow was judged: by a policy's seed, [`STAYED`], or [`UNKNOWN`]. No `Option`: the compiler reads what is not
/// there, which the verifier refuses.
#[inline(always)]
fn known(packet: &Packet, tenant: &Tenant) -> u64 {
    let Some(known) = JUDGED.get_ptr_mut(&packet.flow) else {
        return UNKNOWN;
    };
    let now = now();
    // SAFETY: the map gave the pointer. Its words may be another CPU's by now, each of them whole; an entry that is another
    // flow's meanwhile is so for one packet.
    unsafe {
        let idle = now.wrapping_sub((*known).seen);
        let is_over = packet.protocol != TCP && idle > IDLE;
        if (*known).life != tenant.life || is_over || begins(packet) {
            return UNKNOWN;
        }
        if idle > COARSE {
            (*known).seen = now;
        }
        (*known).seed
    }
}

/// Whether a packet begins a TCP connection. What is read of an echo request looks like that, and is not.
#[inline(always)]
fn begins(packet: &Packet) -> bool {
    packet.protocol == TCP && packet.is_syn()
}

/// Seconds since the system's start.
#[inline(always)]
fn now() -> u32 {
    // SAFETY: it takes nothing.
    (unsafe { bpf_ktime_get_ns() } / 1_000_000_000) as u32
}

/// What is said of a packet of which no flow is known.
#[inline(always)]
fn anew(tenant: &Tenant, destination: &VipKey) -> u32 {
    match guard::gateway(tenant.policy) {
        Some(policy) if is_for(tenant.policy, policy, destination) => JUDGED_BIT | EGRESS_BIT,
        _ => JUDGED_BIT,
    }
}

/// Fills in a fragment's ports; false, if nobody has seen them.
#[inline(always)]
fn complete(packet: &mut Packet) -> bool {
    if packet.kind == Kind::LaterFragment {
        let Some(ports) = flows::ports_of(&packet.fragment()) else {
            return false;
        };
        (packet.flow.client_port, packet.flow.port) = ports;
    } else if packet.more && packet.kind != Kind::Error {
        flows::first_fragment(packet);
    }
    true
}

/// Whether a policy is for a destination outside.
#[inline(always)]
fn is_for(number: u32, policy: &Gateway, destination: &VipKey) -> bool {
    (policy.flags & gateway_flag::NAMES == 0 || is_among(number, false, destination))
        && (policy.flags & gateway_flag::EXCLUDES == 0 || !is_among(number, true, destination))
}

#[inline(always)]
fn is_among(number: u32, excluded: bool, destination: &VipKey) -> bool {
    let address = Destination {
        set: Destination::set(number, excluded, destination.is_mapped()),
        address: destination.0,
    };
    DESTINATIONS.get(Key::new(32 + 128, address)).is_some()
}

/// Whether Cilium knows a flow as one of these.
#[inline(always)]
fn is_there(flow: &FlowKey, flags: u8) -> bool {
    let ports = [flow.client_port, flow.port];
    let protocol = flow.protocol as u8;
    if flow.vip.is_mapped() {
        let [.., a, b, c, d] = flow.client;
        let [.., e, f, g, h] = flow.vip.0;
        let key = key_v4(&[a, b, c, d], &[e, f, g, h], ports, protocol, flags);
        return match (flags, protocol) {
            (MASQUERADED, _) => CILIUM_SNAT_V4.get_ptr(&key).is_some(),
            (_, TCP) => CILIUM_TCP_V4.get_ptr(&key).is_some(),
            _ => CILIUM_ANY_V4.get_ptr(&key).is_some(),
        };
    }
    let key = key_v6(&flow.client, &flow.vip.0, ports, protocol, flags);
    match (flags, protocol) {
        (MASQUERADED, _) => CILIUM_SNAT_V6.get_ptr(&key).is_some(),
        (_, TCP) => CILIUM_TCP_V6.get_ptr(&key).is_some(),
        _ => CILIUM_ANY_V6.get_ptr(&key).is_some(),
    }
}
