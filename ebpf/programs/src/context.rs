//! A frame as one of the kernel's hooks shows it: to the traffic classifier, or to XDP behind the driver.

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::{TcContext, XdpContext};
use landfall_ebpf_common::{Node, Verdict, node_flag, port_flag};

use crate::packet::{ETH_HEADER, Packet};
use crate::{echo, flows, maps, native, packet, tunnel};

/// What reading and choosing need of a hook. The code that is written for it is compiled once for each.
pub(crate) trait Context {
    /// Whether no program of ours looks at a frame after this one. One that is not the last leaves all that it does
    /// not send elsewhere to the last, without a trace: each packet is noted once.
    const LAST: bool;
    /// Leaves the frame alone.
    const NEXT: i32;

    /// Where the part of the frame that lies in one piece begins.
    fn data(&self) -> usize;
    /// Where it ends.
    fn data_end(&self) -> usize;
    /// The index of the interface that the frame came in by.
    fn interface(&self) -> u32;
    /// Its ethertype, in network order.
    fn ethertype(&self) -> Option<u16>;
    /// A copy of what lies at an offset, wherever it is.
    fn load<T: Copy>(&self, offset: usize) -> Option<T>;
    /// Writes at an offset.
    fn store<T: Copy>(&self, offset: usize, value: T) -> Option<()>;
    /// Changes a byte pair's value in a checksum at an offset (RFC 1624); both values in network order.
    fn replace_checksum(&self, offset: usize, from: u16, to: u16) -> Option<()>;
    /// Whether the frame can be sent to a node from here.
    fn reaches(&self, node: &Node) -> bool;
    /// Sends it out of the interface of the node with this number, as it is.
    fn send(&self, number: u16, node: &Node) -> i32;
    /// Reads a packet. False, if it cannot be read or is of another kind.
    fn read(&self, packet: &mut Packet) -> bool;
    /// Answers an echo request.
    fn echo(&self, packet: &Packet) -> i32;
    /// Whether this node delivers the TCP flow of a packet. The last one notes it as heard.
    fn knows(&self, packet: &mut Packet) -> bool;
    /// Delivers a packet here.
    fn deliver(&self, packet: &mut Packet) -> i32;

    /// What lies at an offset of the frame, if that part of it is in one piece: quicker than to have it copied.
    #[inline(always)]
    fn at<T: Copy>(&self, offset: usize) -> Option<T> {
        let start = self.data();
        if start + offset + size_of::<T>() > self.data_end() {
            return None;
        }
        // SAFETY: the line above is what the verifier asks for; it allows what the architecture does, and those that
        // run nodes read words at any address.
        Some(unsafe { *((start + offset) as *const T) })
    }

    /// Writes the frame's Ethernet addresses: to `to`, from the address that it was sent to. In place, by words: that is
    /// quicker than to have them copied.
    #[inline(always)]
    fn readdress(&self, to: [u8; 6]) -> Option<()> {
        let start = self.data();
        if start + ETH_HEADER > self.data_end() {
            return None;
        }
        let [a, b, c, d, e, f] = to;
        // SAFETY: as in `at`; both addresses are in front of the header's end.
        unsafe {
            let (first, last) = (start as *mut u32, (start + 4) as *mut u16);
            let (mine_first, mine_last) = (*first, *last);
            *first = u32::from_ne_bytes([a, b, c, d]);
            *last = u16::from_ne_bytes([e, f]);
            *((start + 6) as *mut u32) = mine_first;
            *((start + 10) as *mut u16) = mine_last;
        }
        Some(())
    }
}

/// Its larger parts are global functions to the verifier, which looks at each once, whoever calls it.
impl Context for TcContext {
    const LAST: bool = true;
    const NEXT: i32 = crate::NEXT;

    #[inline(always)]
    fn data(&self) -> usize {
        TcContext::data(self)
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        TcContext::data_end(self)
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: the context's pointer is the program's argument; the verifier checks the reads.
        unsafe { (*self.skb.skb).ifindex }
    }

    #[inline(always)]
    fn ethertype(&self) -> Option<u16> {
        // SAFETY: as above.
        Some(unsafe { (*self.skb.skb).protocol } as u16)
    }

    #[inline(always)]
    fn load<T: Copy>(&self, offset: usize) -> Option<T> {
        self.skb.load(offset).ok()
    }

    #[inline(always)]
    fn store<T: Copy>(&self, offset: usize, value: T) -> Option<()> {
        self.skb.store(offset, &value, 0).ok()
    }

    #[inline(always)]
    fn replace_checksum(&self, offset: usize, from: u16, to: u16) -> Option<()> {
        self.l3_csum_replace(offset, u64::from(from), u64::from(to), 2)
            .ok()
    }

    #[inline(always)]
    fn reaches(&self, node: &Node) -> bool {
        node.flags & (node_flag::ON_SEGMENT | node_flag::TUNNEL) != 0
    }

    #[inline(always)]
    fn send(&self, number: u16, node: &Node) -> i32 {
        if node.flags & node_flag::TUNNEL != 0
            && tunnel::landfall_enter(self.skb.skb, u32::from(number)) != 0
        {
            return Self::NEXT;
        }
        // SAFETY: it takes numbers only; the frame is sent when the program has returned.
        unsafe { bpf_redirect(node.interface, 0) as i32 }
    }

    #[inline(always)]
    fn read(&self, _packet: &mut Packet) -> bool {
        packet::landfall_read(self.skb.skb) != 0
    }

    #[inline(always)]
    fn echo(&self, _packet: &Packet) -> i32 {
        echo::landfall_echo(self.skb.skb)
    }

    #[inline(always)]
    fn knows(&self, packet: &mut Packet) -> bool {
        flows::is_established(packet) || flows::landfall_remember() != 0
    }

    #[inline(always)]
    fn deliver(&self, packet: &mut Packet) -> i32 {
        if packet.flags & port_flag::NATIVE != 0 {
            return native::landfall_deliver(self.skb.skb);
        }
        if !packet.known && packet.is_syn() {
            flows::landfall_open();
        }
        maps::note(Verdict::Delivered);
        Self::NEXT
    }
}

/// No header lies further behind a frame's beginning: without a bound the verifier does not allow the read.
const MAX_OFFSET: usize = 0x3fff;

impl Context for XdpContext {
    const LAST: bool = false;
    const NEXT: i32 = xdp_action::XDP_PASS as i32;

    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: as above. Read anew each time: a word that is kept is widened later, which the verifier takes for
        // arithmetic.
        unsafe { (&raw const (*self.ctx).data).read_volatile() as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (&raw const (*self.ctx).data_end).read_volatile() as usize }
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn ethertype(&self) -> Option<u16> {
        self.at(ETH_HEADER - 2)
    }

    #[inline(always)]
    fn load<T: Copy>(&self, offset: usize) -> Option<T> {
        if offset > MAX_OFFSET {
            return None;
        }
        self.at(offset)
    }

    #[inline(always)]
    fn store<T: Copy>(&self, offset: usize, value: T) -> Option<()> {
        let start = self.data();
        if start + offset + size_of::<T>() > self.data_end() {
            return None;
        }
        // SAFETY: as in `at`.
        unsafe { *((start + offset) as *mut T) = value };
        Some(())
    }

    #[inline(always)]
    fn replace_checksum(&self, offset: usize, from: u16, to: u16) -> Option<()> {
        let old: u16 = self.at(offset)?;
        let sum = u32::from(!old) + u32::from(!from) + u32::from(to);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        self.store(offset, !(sum as u16))
    }

    /// Back by the interface it came in by: drivers that run XDP can do that. Not all can send what came in by
    /// another, and those that cannot lose it in silence.
    #[inline(always)]
    fn reaches(&self, node: &Node) -> bool {
        node.flags & node_flag::ON_SEGMENT != 0 && node.interface == self.interface()
    }

    #[inline(always)]
    fn send(&self, _number: u16, _node: &Node) -> i32 {
        xdp_action::XDP_TX as i32
    }

    #[inline(always)]
    fn read(&self, packet: &mut Packet) -> bool {
        packet.read(self)
    }

    #[inline(always)]
    fn echo(&self, _packet: &Packet) -> i32 {
        Self::NEXT
    }

    #[inline(always)]
    fn knows(&self, packet: &mut Packet) -> bool {
        flows::is_there(packet)
    }

    #[inline(always)]
    fn deliver(&self, _packet: &mut Packet) -> i32 {
        Self::NEXT
    }
}
