//! What the switch sees.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use landfall_lab::{Lab, Mac};
use nix::errno::Errno;
use nix::net::if_::if_nameindex;
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt,
    socket,
};
use nix::sys::time::{TimeVal, TimeValLike};
use pnet_packet::Packet as _;
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv4::{self, Ipv4Packet};
use pnet_packet::ipv6::Ipv6Packet;
use pnet_packet::tcp::TcpPacket;
use pnet_packet::udp::UdpPacket;

const ETH_HEADER: usize = 14;
/// So long after the last frame to a VIP there is none under way.
const QUIET: Duration = Duration::from_secs(1);

/// By what a packet is known wherever it is seen. No client port is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Identity {
    pub(super) vip: IpAddr,
    pub(super) protocol: u8,
    pub(super) client_port: u16,
}

/// A frame to a VIP as the switch saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) from: Mac,
    pub(super) to: Mac,
    pub(super) ttl: u8,
    /// The IPv4 header's checksum is right.
    pub(super) sound: bool,
}

fn parse(frame: &[u8]) -> Option<(Identity, Seen)> {
    let mac = |at: usize| Some(Mac(frame.get(at..at + 6)?.try_into().ok()?));
    let inside = frame.get(ETH_HEADER..)?;
    let (vip, protocol, payload, ttl, sound) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let packet = Ipv4Packet::new(inside)?;
            (
                IpAddr::from(packet.get_destination()),
                packet.get_next_level_protocol(),
                packet.payload().to_vec(),
                packet.get_ttl(),
                packet.get_checksum() == ipv4::checksum(&packet),
            )
        }
        [0x86, 0xdd] => {
            let packet = Ipv6Packet::new(inside)?;
            (
                IpAddr::from(packet.get_destination()),
                packet.get_next_header(),
                packet.payload().to_vec(),
                packet.get_hop_limit(),
                true,
            )
        }
        _ => return None,
    };
    let client_port = match protocol {
        IpNextHeaderProtocols::Tcp => TcpPacket::new(&payload)?.get_source(),
        IpNextHeaderProtocols::Udp => UdpPacket::new(&payload)?.get_source(),
        _ => return None,
    };
    let identity = Identity {
        vip,
        protocol: protocol.0,
        client_port,
    };
    let seen = Seen {
        from: mac(6)?,
        to: mac(0)?,
        ttl,
        sound,
    };
    Some((identity, seen))
}

/// Hears every frame that comes into the switch, in turn.
pub(super) struct Tap {
    socket: OwnedFd,
    /// The ports' interfaces: what a bridge gives to its own host is not heard again.
    ports: BTreeSet<usize>,
}

impl Tap {
    pub(super) fn open(lab: &Lab) -> Self {
        lab.switch().run(|| {
            let all = SockProtocol::EthAll;
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, all).unwrap();
            setsockopt(&socket, RcvBufForce, &(16 << 20)).unwrap();
            setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(50)).unwrap();
            let ports = if_nameindex()
                .unwrap()
                .iter()
                .filter(|interface| !interface.name().to_string_lossy().starts_with("br-"))
                .map(|interface| interface.index() as usize)
                .collect();
            Self { socket, ports }
        })
    }

    /// What came, until nothing has for [`QUIET`].
    pub(super) fn drain(&self) -> BTreeMap<Identity, Vec<Seen>> {
        let mut seen = BTreeMap::<Identity, Vec<Seen>>::new();
        let mut buffer = [0; 2048];
        let mut last = Instant::now();
        while last.elapsed() < QUIET {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let got =
                recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut parts, None, MsgFlags::empty());
            let (length, address) = match got {
                Ok(message) => (message.bytes, message.address.unwrap()),
                Err(Errno::EAGAIN) => continue,
                Err(error) => panic!("the switch cannot be listened at: {error}"),
            };
            let comes_in = address.pkttype() != libc::PACKET_OUTGOING;
            if comes_in
                && self.ports.contains(&address.ifindex())
                && let Some((identity, frame)) = parse(&buffer[..length])
            {
                seen.entry(identity).or_default().push(frame);
                last = Instant::now();
            }
        }
        seen
    }
}
