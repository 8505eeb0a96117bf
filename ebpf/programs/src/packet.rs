//! Reading frames.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::{Answer, Endpoint, Flow, FlowKey, FragmentKey, VipKey};

use crate::context::Context;
use crate::maps;

const ETH_SOURCE: usize = 6;
pub(crate) const ETH_HEADER: usize = 14;
const ETH_P_IP: u16 = 0x0800;
pub(crate) const ETH_P_IPV6: u16 = 0x86dd;
pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const IPV6_HEADER: usize = 40;
/// Where the addresses lie in an IPv4 header (RFC 791) and in an IPv6 header (RFC 8200).
pub(crate) const IPV4_SOURCE: usize = 12;
pub(crate) const IPV4_DESTINATION: usize = 16;
pub(crate) const IPV6_SOURCE: usize = 8;
pub(crate) const IPV6_DESTINATION: usize = 24;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;
pub(crate) const ICMPV6: u8 = 58;

/// Extension headers (RFC 8200, 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// How many extension headers are looked through; nobody sends more.
const MAX_EXTENSIONS: usize = 6;

/// TCP flags (RFC 9293, 3.1).
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// The key of an IPv4 address as it is in a frame.
#[inline(always)]
pub(crate) fn mapped(address: u32) -> VipKey {
    let [a, b, c, d] = address.to_ne_bytes();
    VipKey::v4([a, b, c, d])
}

/// What lies at an offset of the frame: in place, if that part of it is in one piece.
#[inline(always)]
pub(crate) fn load<T: Copy>(context: &impl Context, offset: usize) -> Option<T> {
    match context.at(offset) {
        Some(value) => Some(value),
        None => context.load(offset),
    }
}

/// An IP packet.
pub(crate) struct Frame {
    /// Its destination; in one that leaves, that is a client.
    pub(crate) vip: VipKey,
    /// IPv6, else IPv4.
    pub(crate) v6: bool,
}

impl Frame {
    /// Nothing, if the frame is no such thing. A tagged frame belongs to another segment: a tag that is in the frame
    /// is its ethertype.
    #[inline(always)]
    pub(crate) fn of(context: &impl Context) -> Option<Self> {
        match u16::from_be(context.ethertype()?) {
            ETH_P_IP => Some(Self {
                vip: mapped(load(context, ETH_HEADER + IPV4_DESTINATION)?),
                v6: false,
            }),
            ETH_P_IPV6 => {
                let vip = VipKey(load(context, ETH_HEADER + IPV6_DESTINATION)?);
                // An IPv4 VIP is not to be reached by its mapped form, which is never seen on a wire.
                (!vip.is_mapped()).then_some(Self { vip, v6: true })
            }
            _ => None,
        }
    }
}

/// Who sent an IP packet, and to whom.
pub(crate) struct Ends {
    pub(crate) source: VipKey,
    pub(crate) destination: VipKey,
}

impl Ends {
    /// Whether a frame is an IP packet; nothing else has them.
    #[inline(always)]
    pub(crate) fn has(context: &impl Context) -> bool {
        matches!(
            context.ethertype().map(u16::from_be),
            Some(ETH_P_IP | ETH_P_IPV6)
        )
    }

    /// Those of an IP packet; nothing, if they cannot be read.
    #[inline(always)]
    pub(crate) fn of(context: &impl Context) -> Option<Self> {
        if context.ethertype().map(u16::from_be) == Some(ETH_P_IP) {
            let [source, destination]: [u32; 2] = context.load(ETH_HEADER + IPV4_SOURCE)?;
            return Some(Self {
                source: mapped(source),
                destination: mapped(destination),
            });
        }
        let [source, destination]: [[u8; 16]; 2] = context.load(ETH_HEADER + IPV6_SOURCE)?;
        Some(Self {
            source: VipKey(source),
            destination: VipKey(destination),
        })
    }
}

/// An IPv4 header without options and the ports behind it, as in the frame.
#[repr(C)]
#[derive(Clone, Copy)]
struct Plain {
    head: u8,
    service: u8,
    length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: u32,
    destination: u32,
    client_port: u16,
    port: u16,
}

/// What a packet is, as far as steering goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It has ports, or is the first fragment of what has.
    Whole,
    /// Its ports were in an earlier fragment.
    LaterFragment,
    /// An ICMP error about a packet of the flow.
    Error,
    /// An ICMP echo request.
    Echo,
}

/// A packet to a VIP. It lies in a map: the kernel's stack is too small for it. Addresses come first, where words lie:
/// they are copied and compared by words then.
#[repr(C)]
pub(crate) struct Packet {
    /// Where the transport header lies.
    pub(crate) transport: usize,
    /// Where that of the packet inside an error lies.
    pub(crate) inner: usize,
    /// Who sent it; in an error that is not the client.
    pub(crate) source: [u8; 16],
    pub(crate) flow: FlowKey,
    /// The datagram's identification, if it is in fragments.
    pub(crate) id: u32,
    pub(crate) mac: [u8; 6],
    pub(crate) kind: Kind,
    /// The transport's protocol; in an error that of the packet inside.
    pub(crate) protocol: u8,
    /// Where the packet ends, by its IP header.
    end: u32,
    /// The TCP sequence number; none in an error, nor behind a first fragment.
    pub(crate) sequence: u32,
    /// The TCP flags; none in an error.
    pub(crate) tcp: u8,
    /// In the upper half of it how many words the TCP header has, likewise.
    offset: u8,
    pub(crate) ttl: u8,
    /// Whether more fragments follow.
    pub(crate) more: bool,
    // What is found out about it.
    pub(crate) v6: bool,
    /// The hash of its flow, and the bucket that follows from it.
    pub(crate) hash: u64,
    pub(crate) bucket: u32,
    /// The node that steered it or handed it on, 0 for none.
    pub(crate) sender: u16,
    /// Whose it is by the table.
    pub(crate) target: u16,
    /// By the table it is this node's.
    pub(crate) here: bool,
    /// Its flow is one that this node delivers.
    pub(crate) known: bool,
    /// It opens a connection that nobody here would take.
    pub(crate) strays: bool,
    /// What is known of the port that it is for: its number, its slots, its flags.
    pub(crate) number: u32,
    pub(crate) slots: u32,
    pub(crate) flags: u16,
    /// By what answers to its flow are known; written before it is used.
    pub(crate) answer: FlowKey,
    /// What goes into the maps of flows.
    pub(crate) entry: Flow,
    pub(crate) answers: Answer,
    /// What is translated, and to what. If the flow is known, that is its endpoint.
    pub(crate) from: Endpoint,
    pub(crate) to: Endpoint,
}

/// See [`Packet::read`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_read(skb: *mut __sk_buff) -> u32 {
    let context = TcContext::new(skb);
    maps::packet().map_or(0, |packet| u32::from(packet.read(&context)))
}

/// The same with echo, as [`Packet::read_any`] has it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn landfall_read_any(skb: *mut __sk_buff) -> u32 {
    let context = TcContext::new(skb);
    maps::packet().map_or(0, |packet| u32::from(packet.read_any(&context)))
}

impl Packet {
    /// Puts a frame in the place of the last.
    #[inline(always)]
    pub(crate) fn put(&mut self, frame: &Frame) {
        self.v6 = frame.v6;
        self.flow.vip = frame.vip;
    }

    /// Reads a packet into the place of the last, where its frame is already. False, if it cannot be read or is of
    /// another kind.
    #[inline(always)]
    pub(crate) fn read(&mut self, context: &impl Context) -> bool {
        let read = self.try_read::<false>(context).is_some();
        self.flow.protocol = u32::from(self.protocol);
        read
    }

    /// The same, and echo: a request's identifier stands for its sender's port, an answer's for its receiver's, and that
    /// of a request inside an error likewise. A request counts as a SYN, an answer as an ACK.
    #[inline(always)]
    fn read_any(&mut self, context: &impl Context) -> bool {
        self.protocol = 0;
        let read = self.try_read::<true>(context).is_some();
        self.flow.protocol = u32::from(self.protocol);
        read
    }

    #[inline(always)]
    fn try_read<const ANY: bool>(&mut self, context: &impl Context) -> Option<()> {
        self.kind = Kind::Whole;
        self.tcp = 0;
        self.more = false;
        self.id = 0;
        self.mac = load(context, ETH_SOURCE)?;
        self.flow.client_port = 0;
        self.flow.port = 0;
        if !self.v6 && self.plain(context).is_some() {
            return Some(());
        }
        if self.v6 {
            self.ipv6(context)?;
        } else {
            self.ipv4(context)?;
        }
        self.flow.client = self.source;
        if self.kind == Kind::LaterFragment {
            return Some(());
        }
        match self.protocol {
            TCP => {
                let header: [u8; 14] = context.load(self.transport)?;
                self.ports([header[0], header[1], header[2], header[3]]);
                self.sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                [self.offset, self.tcp] = [header[12], header[13]];
            }
            UDP | SCTP => self.ports(context.load(self.transport)?),
            ICMP if !self.v6 => self.icmp::<ANY>(context)?,
            ICMPV6 if self.v6 => self.icmpv6::<ANY>(context)?,
            _ => return None,
        }
        Some(())
    }

    /// Most packets: TCP or UDP over IPv4 without options, whole, the headers in one piece.
    #[inline(always)]
    fn plain(&mut self, context: &impl Context) -> Option<()> {
        const NO_OPTIONS: u8 = 0x45;
        const PORTS: usize = ETH_HEADER + IPV4_HEADER;
        let header: Plain = context.at(ETH_HEADER)?;
        // Flags and offset of fragments; "don't fragment" means nothing here.
        if header.head != NO_OPTIONS || u16::from_be(header.fragment) & 0x3fff != 0 {
            return None;
        }
        if header.protocol == TCP {
            self.sequence = u32::from_be(context.at(PORTS + 4)?);
            [self.offset, self.tcp] = context.at(PORTS + 12)?;
        } else if header.protocol != UDP {
            return None;
        }
        self.flow.client_port = u16::from_be(header.client_port);
        self.flow.port = u16::from_be(header.port);
        self.ttl = header.ttl;
        self.protocol = header.protocol;
        self.transport = PORTS;
        self.end = ETH_HEADER as u32 + u32::from(u16::from_be(header.length));
        self.source = mapped(header.source).0;
        self.flow.client = self.source;
        Some(())
    }

    /// How long the TCP header is.
    #[inline(always)]
    pub(crate) fn tcp_header(&self) -> u32 {
        u32::from(self.offset >> 4) * 4
    }

    /// The sequence number of what its sender sends next, if nothing was sent before.
    #[inline(always)]
    pub(crate) fn next_sequence(&self) -> u32 {
        let header = self.transport as u32 + self.tcp_header();
        let payload = self.end.saturating_sub(header);
        let fin = u32::from(self.tcp & FIN != 0);
        self.sequence.wrapping_add(payload).wrapping_add(fin)
    }

    #[inline(always)]
    fn ports(&mut self, bytes: [u8; 4]) {
        self.flow.client_port = u16::from_be_bytes([bytes[0], bytes[1]]);
        self.flow.port = u16::from_be_bytes([bytes[2], bytes[3]]);
    }

    #[inline(always)]
    fn ipv4(&mut self, context: &impl Context) -> Option<()> {
        let header: [u8; IPV4_HEADER] = context.load(ETH_HEADER)?;
        let words = header[0];
        if words >> 4 != 4 || words & 15 < 5 {
            return None;
        }
        self.transport = ETH_HEADER + ((words & 15) as usize) * 4;
        self.end = ETH_HEADER as u32 + u32::from(u16::from_be_bytes([header[2], header[3]]));
        self.ttl = header[8];
        self.protocol = header[9];
        self.source = VipKey::v4([header[12], header[13], header[14], header[15]]).0;
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        self.more = fragment & 0x2000 != 0;
        if fragment & 0x3fff != 0 {
            self.id = u32::from(u16::from_be_bytes([header[4], header[5]]));
            if fragment & 0x1fff != 0 {
                self.kind = Kind::LaterFragment;
            }
        }
        Some(())
    }

    #[inline(always)]
    fn ipv6(&mut self, context: &impl Context) -> Option<()> {
        let header: [u8; 24] = context.load(ETH_HEADER)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let payload = u32::from(u16::from_be_bytes([header[4], header[5]]));
        self.end = (ETH_HEADER + IPV6_HEADER) as u32 + payload;
        self.ttl = header[7];
        self.source.copy_from_slice(&header[8..24]);
        let mut next = header[6];
        let mut at = ETH_HEADER + IPV6_HEADER;
        for _ in 0..MAX_EXTENSIONS {
            match next {
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    let extension: [u8; 2] = context.load(at)?;
                    next = extension[0];
                    at += (extension[1] as usize + 1) * 8;
                }
                FRAGMENT => {
                    let extension: [u8; 8] = context.load(at)?;
                    next = extension[0];
                    let fragment = u16::from_be_bytes([extension[2], extension[3]]);
                    self.more = fragment & 1 != 0;
                    self.id = u32::from_be_bytes([
                        extension[4],
                        extension[5],
                        extension[6],
                        extension[7],
                    ]);
                    if fragment & 0xfff8 != 0 {
                        self.kind = Kind::LaterFragment;
                        break;
                    }
                    at += 8;
                }
                _ => break,
            }
        }
        self.protocol = next;
        self.transport = at;
        Some(())
    }

    /// Echo requests, and errors (RFC 792): those carry the header and eight bytes of what they are about, a packet
    /// that went from the VIP to the client.
    #[inline(always)]
    fn icmp<const ANY: bool>(&mut self, context: &impl Context) -> Option<()> {
        let [kind, ..]: [u8; 4] = context.load(self.transport)?;
        match kind {
            8 => self.echo::<ANY>(context, true),
            0 if ANY => self.echo::<ANY>(context, false),
            3 | 11 | 12 => {
                let inner = self.transport + 8;
                let header: [u8; IPV4_HEADER] = context.load(inner)?;
                let vip = VipKey::v4([header[12], header[13], header[14], header[15]]);
                self.flow.client = VipKey::v4([header[16], header[17], header[18], header[19]]).0;
                let later = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
                if vip != self.flow.vip || header[0] & 15 < 5 || later {
                    return None;
                }
                self.inside::<ANY>(context, header[9], inner + ((header[0] & 15) as usize) * 4)
            }
            _ => None,
        }
    }

    /// The same for IPv6 (RFC 4443). A packet inside with extension headers is not looked through.
    #[inline(always)]
    fn icmpv6<const ANY: bool>(&mut self, context: &impl Context) -> Option<()> {
        let [kind, ..]: [u8; 4] = context.load(self.transport)?;
        match kind {
            128 => self.echo::<ANY>(context, true),
            129 if ANY => self.echo::<ANY>(context, false),
            1..=4 => {
                let inner = self.transport + 8;
                let header: [u8; 8] = context.load(inner)?;
                let vip = VipKey(context.load(inner + 8)?);
                self.flow.client = context.load(inner + 24)?;
                if vip != self.flow.vip {
                    return None;
                }
                self.inside::<ANY>(context, header[6], inner + IPV6_HEADER)
            }
            _ => None,
        }
    }

    #[inline(always)]
    fn echo<const ANY: bool>(&mut self, context: &impl Context, request: bool) -> Option<()> {
        self.kind = Kind::Echo;
        if !ANY {
            return Some(());
        }
        let identifier = u16::from_be(context.load(self.transport + 4)?);
        if request {
            self.flow.client_port = identifier;
            self.tcp = SYN;
        } else {
            self.flow.port = identifier;
            self.tcp = ACK;
        }
        Some(())
    }

    #[inline(always)]
    fn inside<const ANY: bool>(
        &mut self,
        context: &impl Context,
        protocol: u8,
        at: usize,
    ) -> Option<()> {
        if ANY && protocol == if self.v6 { ICMPV6 } else { ICMP } {
            let kind: u8 = context.load(at)?;
            if kind != if self.v6 { 128 } else { 8 } {
                return None;
            }
            self.flow.port = u16::from_be(context.load(at + 4)?);
            self.kind = Kind::Error;
            self.inner = at;
            self.protocol = protocol;
            self.more = false;
            return Some(());
        }
        if protocol != TCP && protocol != UDP && protocol != SCTP {
            return None;
        }
        let ports: [u8; 4] = context.load(at)?;
        // It went the other way.
        self.ports([ports[2], ports[3], ports[0], ports[1]]);
        self.kind = Kind::Error;
        self.inner = at;
        self.protocol = protocol;
        self.more = false;
        Some(())
    }

    /// By what its fragments are known.
    #[inline(always)]
    pub(crate) fn fragment(&self) -> FragmentKey {
        FragmentKey {
            client: self.source,
            vip: self.flow.vip,
            id: self.id,
            protocol: u32::from(self.protocol),
        }
    }

    /// The VIP and the port that it is for.
    #[inline(always)]
    pub(crate) fn vip(&self) -> Endpoint {
        Endpoint {
            address: self.flow.vip.0,
            port: self.flow.port,
            zero: 0,
        }
    }

    /// Whether it asks for a new connection.
    #[inline(always)]
    pub(crate) fn is_syn(&self) -> bool {
        self.tcp & (SYN | ACK | RST | FIN) == SYN
    }
}
