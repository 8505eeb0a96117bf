//! What leaves by an uplink and is a pod's: the second line behind the packet filter's, which may be taken away.
//!
//! ```text
//!  tenant    judged, and not for its gateway ─> leaves      for the cluster ─> leaves
//!            (but what was led while nobody judged goes on so: connection tracking may take it for an answer)
//!            else ─> its gateway's Ethernet address, out of the interface to it; without a gateway ─> dropped
//!            (if that is this node: to the program behind, with the mark by which it knows what it is to translate)
//!            (a flow from before it was this policy's tenant: that one's)
//!  another   for its gateway ─> dropped: a tenant's, who is not known here yet
//!            this node's own, or what came from outside ─> leaves      judged, or for the cluster ─> leaves
//!            else ─> dropped
//! ```

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::guard::{
    Gateway, Guarded, LED_FOR, MAX_GATEWAYS, MAX_INSIDE, MAX_LED, MAX_OUTSIDE, MAX_TENANTS, Marks,
    NOBODY, Pair, Tenant, gateway_flag, tenant_flag,
};

use crate::packet::Ends;
use crate::{DROP, NEXT, maps, tunnel};

#[map]
static TENANTS: HashMap<VipKey, Tenant> = HashMap::with_max_entries(MAX_TENANTS, BPF_F_NO_PREALLOC);
#[map]
static GATEWAYS: Array<Gateway> = Array::with_max_entries(MAX_GATEWAYS, 0);
#[map]
static INSIDE: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(MAX_INSIDE, BPF_F_NO_PREALLOC);
#[map]
static OUTSIDE: HashMap<u32, u32> = HashMap::with_max_entries(MAX_OUTSIDE, BPF_F_NO_PREALLOC);
#[map]
static MARKS: Array<Marks> = Array::with_max_entries(1, 0);
#[map]
static LED: LruHashMap<Pair, u64> = LruHashMap::with_max_entries(MAX_LED, 0);
#[map]
static GUARDED: PerCpuArray<u64> = PerCpuArray::with_max_entries(Guarded::COUNT, 0);
#[map]
static UNLED: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_GATEWAYS, 0);

/// What the kernel says of a frame beside what is in it.
struct Told {
    mark: u32,
    /// The interface it came in by; 0 for what this node has made.
    from: u32,
    /// The one it leaves by.
    here: u32,
}

/// Whether an address is that of a pod of this node which is a policy's tenant, or was when flows began.
#[inline(always)]
pub(crate) fn is_own(address: &VipKey) -> bool {
    tenant(address).is_some()
}

/// Whether a packet of a pod's that is about to leave was led to another node: it is of a flow from before the pod was whose
/// it is, and that policy's gateway is not this node.
#[inline(always)]
pub(crate) fn is_led_away(mark: u32, source: &VipKey) -> bool {
    let Some(marks) = marks() else {
        return false;
    };
    if mark & marks.egress == 0 || mark & marks.judged != 0 {
        return false;
    }
    // SAFETY: entries are replaced whole; a reader may at worst see the one before.
    let tenant = unsafe { TENANTS.get(source) };
    let gateway = tenant.and_then(|tenant| GATEWAYS.get(tenant.former));
    gateway.is_some_and(|gateway| gateway.flags & gateway_flag::HERE == 0)
}

/// The bits of the packet mark, while there are policies.
#[inline(always)]
pub(crate) fn marks() -> Option<&'static Marks> {
    MARKS.get(0).filter(|marks| marks.egress != 0)
}

/// What is known of a pod of this node that is a policy's tenant, or was when flows began.
#[inline(always)]
pub(crate) fn tenant(address: &VipKey) -> Option<&'static Tenant> {
    // SAFETY: entries are replaced whole; a reader may at worst see the one before.
    let tenant = unsafe { TENANTS.get(address) };
    tenant.filter(|tenant| tenant.flags & tenant_flag::HERE != 0)
}

/// Where the policy with a number leaves; nothing for `NOBODY`, who is behind them all.
#[inline(always)]
pub(crate) fn gateway(policy: u32) -> Option<&'static Gateway> {
    GATEWAYS.get(policy)
}

/// What becomes of a frame that is about to leave.
#[inline(always)]
pub(crate) fn guard(context: &TcContext) -> i32 {
    let Some(marks) = marks() else {
        return NEXT;
    };
    if !Ends::has(context) {
        return NEXT;
    }
    let Some(ends) = Ends::of(context) else {
        return refuse(Guarded::Unjudged);
    };
    let skb = context.skb.skb;
    // SAFETY: the context's pointer is the program's argument; the verifier checks the reads.
    let told = unsafe {
        Told {
            mark: (*skb).mark,
            from: (*skb).ingress_ifindex,
            here: (*skb).ifindex,
        }
    };
    match tenant(&ends.source) {
        Some(tenant) => of_tenant(context, &told, marks, &ends, tenant),
        None => of_another(&told, marks, &ends),
    }
}

#[inline(always)]
fn of_another(told: &Told, marks: &Marks, ends: &Ends) -> i32 {
    let led = told.from != 0 && told.mark & marks.egress != 0;
    let is_ours = told.from == 0 || told.mark & marks.judged != 0;
    if is_ours && !led || is_inside(&ends.destination) {
        return NEXT;
    }
    // The packet filter takes it for a tenant's, of whom this has not heard yet: nobody would lead it, nor translate it.
    if led {
        return refuse(Guarded::NoGateway);
    }
    // Another node's pod, which that node takes for a tenant of a gateway here: this one has not heard of it yet, or it
    // would be translated by now.
    if is_outside(told.from) && !(marks.is_gateway != 0 && is_of_network(&ends.source)) {
        return NEXT;
    }
    refuse(Guarded::Unjudged)
}

#[inline(always)]
fn of_tenant(context: &TcContext, told: &Told, marks: &Marks, ends: &Ends, tenant: &Tenant) -> i32 {
    let leaves = told.mark & marks.egress != 0;
    let judged = told.mark & marks.judged != 0;
    if !leaves && (judged && !was_led(ends) || is_inside(&ends.destination)) {
        return NEXT;
    }
    if !leaves && is_outside(told.from) {
        return refuse(Guarded::Forged);
    }
    // What the packet filter takes for a flow from before the pod was this policy's tenant it does not say to have judged.
    let from_before = leaves && !judged;
    // What nobody has judged may be either.
    let either = !leaves && tenant.former != NOBODY;
    if !from_before && (tenant.flags & tenant_flag::OPEN == 0 || either) {
        return refuse_unled(tenant.policy);
    }
    let place = if from_before {
        tenant.former
    } else {
        tenant.policy
    };
    let Some(gateway) = gateway(place) else {
        return refuse(Guarded::NoGateway);
    };
    let at_it = gateway.interface == told.here;
    match gateway.flags & (gateway_flag::KNOWN | gateway_flag::HERE) {
        gateway_flag::KNOWN => {}
        flags if flags & gateway_flag::KNOWN == 0 => return refuse_unled(place),
        _ if at_it => {
            if !leaves {
                // The gateway's program behind this one goes by the mark.
                context.set_mark(told.mark | marks.judged | marks.egress);
                remember_unjudged(ends, judged);
            }
            return NEXT;
        }
        _ => return refuse(Guarded::Unsendable),
    }
    if lead(context, gateway, at_it).is_none() {
        return refuse(Guarded::Unsendable);
    }
    if leaves {
        note(Guarded::Led);
    } else {
        remember_unjudged(ends, judged);
    }
    if at_it {
        // Who comes behind is told that it is led.
        context.set_mark(told.mark | marks.egress);
        return NEXT;
    }
    // SAFETY: it takes numbers only; the frame is sent when the program has returned. There it comes by here again.
    unsafe { bpf_redirect(gateway.interface, 0) as i32 }
}

/// Addresses a frame to a gateway.
#[inline(always)]
fn lead(context: &TcContext, gateway: &Gateway, at_it: bool) -> Option<()> {
    if at_it && gateway.flags & gateway_flag::TUNNEL != 0 {
        context.store(0, &gateway.mac, 0).ok()?;
        return (tunnel::landfall_enter(context.skb.skb, gateway.node) == 0).then_some(());
    }
    context.store(0, &gateway.mac, 0).ok()?;
    context.store(6, &gateway.source, 0).ok()
}

/// Counts a tenant's packet that was led though it had no mark to say so, and keeps it in mind if nobody had judged it.
#[inline(always)]
fn remember_unjudged(ends: &Ends, judged: bool) {
    note(Guarded::LedUnjudged);
    if judged {
        return;
    }
    // SAFETY: it takes nothing.
    let now = unsafe { bpf_ktime_get_ns() };
    // The least recently used goes if there is no room.
    let _ = LED.insert(&pair(ends), &now, 0);
}

/// Whether one was, not long ago.
#[inline(always)]
fn was_led(ends: &Ends) -> bool {
    // SAFETY: entries are replaced whole; a reader may at worst see the one before.
    let Some(at) = (unsafe { LED.get(&pair(ends)) }) else {
        return false;
    };
    // SAFETY: it takes nothing.
    unsafe { bpf_ktime_get_ns() }.wrapping_sub(*at) < LED_FOR
}

#[inline(always)]
fn pair(ends: &Ends) -> Pair {
    Pair {
        tenant: ends.source,
        peer: ends.destination,
    }
}

#[inline(always)]
pub(crate) fn is_outside(interface: u32) -> bool {
    OUTSIDE.get_ptr(&interface).is_some()
}

/// Whether an address lies in a network of the cluster's, as pods' do: nodes and stray pods are named one by one.
#[inline(always)]
pub(crate) fn is_of_network(address: &VipKey) -> bool {
    INSIDE
        .get(Key::new(128, address.0))
        .is_some_and(|whole| *whole != 0)
}

/// Whether an address is the cluster's own.
#[inline(always)]
pub(crate) fn is_inside(address: &VipKey) -> bool {
    maps::vip(address).is_some() || INSIDE.get(Key::new(128, address.0)).is_some()
}

#[inline(always)]
pub(crate) fn refuse(why: Guarded) -> i32 {
    note(why);
    DROP
}

/// Drops what has nowhere to go, and counts it for its policy too.
#[inline(always)]
fn refuse_unled(policy: u32) -> i32 {
    add_one(UNLED.get_ptr_mut(policy));
    refuse(Guarded::NoGateway)
}

#[inline(always)]
fn note(what: Guarded) {
    add_one(GUARDED.get_ptr_mut(what as u32));
}

#[inline(always)]
fn add_one(count: Option<*mut u64>) {
    if let Some(count) = count {
        // SAFETY: a map gave the pointer, to this CPU's value, and nothing else runs on it meanwhile.
        unsafe { *count += 1 };
    }
}
