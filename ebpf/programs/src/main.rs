//! What Landfall runs at the uplinks.
//!
//! The program looks at every frame that comes in by an uplink, in front of all other programs, and takes none:
//! it always says "next", so that what others have attached behind it runs as if it were not there.
#![no_std]
#![no_main]

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuHashMap;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::{MAX_VIPS, VipCount, VipKey};

/// `TCX_NEXT`, which is `TC_ACT_UNSPEC` too: the next program of the chain decides.
const NEXT: i32 = -1;

/// `PACKET_HOST` (`linux/if_packet.h`): the frame carries our MAC.
const PACKET_HOST: u32 = 0;

const ETH_HEADER: usize = 14;
const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86dd;
/// Where the destination address lies in an IPv4 header (RFC 791) and in an IPv6 header (RFC 8200).
const IPV4_DESTINATION: usize = 16;
const IPV6_DESTINATION: usize = 24;

/// The VIPs, entered by the speaker with counts of zero.
#[map]
static VIP_COUNTS: PerCpuHashMap<VipKey, VipCount> =
    PerCpuHashMap::with_max_entries(MAX_VIPS, BPF_F_NO_PREALLOC);

#[classifier]
pub fn landfall_uplink(context: TcContext) -> i32 {
    if let Some(vip) = destination(&context) {
        count(&context, &vip);
    }
    NEXT
}

/// The destination of an IP packet that is for this host and carries no VLAN tag. A tagged frame belongs to
/// another segment, whether the tag is still in the frame (then its ethertype is not IP's) or beside it.
#[inline(always)]
fn destination(context: &TcContext) -> Option<VipKey> {
    // SAFETY: the context's pointer is the program's argument; the verifier checks the reads.
    let (protocol, tagged, packet_type) = unsafe {
        let skb = context.skb.skb;
        ((*skb).protocol, (*skb).vlan_present, (*skb).pkt_type)
    };
    if tagged != 0 || packet_type != PACKET_HOST {
        return None;
    }
    match u32::from(u16::from_be(protocol as u16)) {
        ETH_P_IP => {
            let octets: [u8; 4] = context.load(ETH_HEADER + IPV4_DESTINATION).ok()?;
            Some(VipKey::v4(octets))
        }
        ETH_P_IPV6 => {
            let octets: [u8; 16] = context.load(ETH_HEADER + IPV6_DESTINATION).ok()?;
            // An IPv4 VIP is not to be reached by its mapped form, which is never seen on a wire.
            let vip = VipKey(octets);
            (!vip.is_mapped()).then_some(vip)
        }
        _ => None,
    }
}

#[inline(always)]
fn count(context: &TcContext, vip: &VipKey) {
    let Some(count) = VIP_COUNTS.get_ptr_mut(vip) else {
        return;
    };
    // SAFETY: the map gave the pointer, to this CPU's value, and nothing else runs on it meanwhile.
    unsafe {
        let segments = (*context.skb.skb).gso_segs;
        (*count).packets += if segments == 0 {
            1
        } else {
            u64::from(segments)
        };
        (*count).bytes += u64::from(context.len());
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// What the kernel is told. It keeps some helpers for licences compatible with GPLv2; none of them is used.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
