//! The tunnel to nodes that are not on the segment (VXLAN, RFC 7348).

use aya_ebpf::bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key};
use aya_ebpf::helpers::bpf_skb_set_tunnel_key;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::{PeerKey, TUNNEL_ID, Verdict, VipKey, tunnel_mac, vip_flag};

use crate::context::Context;
use crate::packet::Frame;
use crate::{DROP, NEXT, guard, is_ours, maps, steer};

/// The tunnel's TTL, or hop limit.
const TTL: u8 = 64;

/// Says to which node the frame at hand goes, which is about to be sent by the tunnel; 0 if that is said. What becomes
/// larger than the path allows is fragmented outside: nobody has to know of the tunnel.
///
/// A global function: verified once, whoever calls it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_enter(skb: *mut __sk_buff, number: u32) -> u32 {
    let Some(node) = maps::node(number as u16) else {
        return 1;
    };
    // Nobody on the way looks at the addresses inside.
    let source = tunnel_mac(maps::settings().seed);
    if Context::store(&TcContext::new(skb), 6, source).is_none() {
        return 1;
    }
    u32::from(lead(skb, &node.address).is_none())
}

/// Says to which address the frame goes, as in a [`VipKey`].
#[inline(always)]
pub(crate) fn lead(skb: *mut __sk_buff, address: &[u8; 16]) -> Option<()> {
    // SAFETY: all of it may be zero.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = TUNNEL_ID;
    key.tunnel_ttl = TTL;
    // SAFETY: in the maps it lies at a multiple of four.
    let words: [u32; 4] = unsafe { *address.as_ptr().cast() };
    let flags = if VipKey(*address).is_mapped() {
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be(words[3]);
        BPF_F_ZERO_CSUM_TX
    } else {
        key.__bindgen_anon_1.remote_ipv6 = words;
        BPF_F_TUNINFO_IPV6
    };
    // SAFETY: the key is as long as is said.
    let outcome = unsafe {
        bpf_skb_set_tunnel_key(
            skb,
            &raw mut key,
            size_of::<bpf_tunnel_key>() as u32,
            u64::from(flags),
        )
    };
    (outcome == 0).then_some(())
}

/// What comes out of the tunnel: packets to VIPs, and what a gateway hands back to this node's tenants, from nodes that are
/// known, and nothing else.
#[inline(always)]
pub(crate) fn leave(context: &TcContext) -> i32 {
    enters(context).unwrap_or_else(|| {
        maps::note(Verdict::Refused);
        DROP
    })
}

#[inline(always)]
fn enters(context: &TcContext) -> Option<i32> {
    if !is_ours(context) {
        return None;
    }
    let frame = Frame::of(context)?;
    let from = PeerKey {
        interface: context.interface(),
        mac: context.at(6)?,
        zero: [0; 2],
    };
    if !maps::is_peer(&from) {
        return None;
    }
    match maps::vip(&frame.vip) {
        Some(vip) if vip.flags & vip_flag::STEER != 0 => Some(steer::steer(context, &frame, &vip)),
        None if guard::is_own(&frame.vip) => Some(NEXT),
        _ => None,
    }
}
