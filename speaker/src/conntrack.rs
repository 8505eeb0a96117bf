//! What the kernel's connection tracking knows, by ctnetlink. Of TCP: flows that were delivered here before the programs
//! saw them, and the proof that a flow they know is still alive.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};

use landfall_ebpf_common::{FlowKey, VipKey};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use crate::netlink::{DUMP, Requests, find};

/// nfnetlink's number of connection tracking (`NFNL_SUBSYS_CTNETLINK`), in the upper byte of a message's type.
pub(crate) const CONNTRACK: u16 = 1;
/// `IPCTNL_MSG_CT_NEW`: a change, of an entry that is there.
pub(crate) const NEW: u16 = 0;
/// `IPCTNL_MSG_CT_GET`.
pub(crate) const GET: u16 = 1;
/// `IPCTNL_MSG_CT_DELETE`.
pub(crate) const DELETE: u16 = 2;

/// Attributes of an entry (`enum ctattr_type`), and of what they nest.
pub(crate) mod attribute {
    pub(crate) const ORIGINAL: u16 = 1;
    pub(crate) const REPLY: u16 = 2;
    pub(crate) const STATUS: u16 = 3;
    pub(crate) const MARK: u16 = 8;
    pub(crate) const ID: u16 = 12;
    pub(crate) const ZONE: u16 = 18;
    pub(crate) const MARK_MASK: u16 = 21;
    pub(super) const PROTOCOL_INFO: u16 = 4;
    pub(super) const TUPLE_IP: u16 = 1;
    pub(super) const TUPLE_PROTOCOL: u16 = 2;
    pub(super) const V4_SOURCE: u16 = 1;
    pub(super) const V4_DESTINATION: u16 = 2;
    pub(super) const V6_SOURCE: u16 = 3;
    pub(super) const V6_DESTINATION: u16 = 4;
    pub(super) const NUMBER: u16 = 1;
    pub(super) const SOURCE_PORT: u16 = 2;
    pub(super) const DESTINATION_PORT: u16 = 3;
    pub(super) const TCP: u16 = 1;
    pub(super) const TCP_STATE: u16 = 1;
}

/// TCP's number.
pub(crate) const TCP: u32 = libc::IPPROTO_TCP.cast_unsigned();
/// `IPS_DST_NAT`: an entry without it was not delivered to an endpoint.
const TRANSLATED: u32 = 1 << 5;
/// `TCP_CONNTRACK_SYN_SENT` and the states in which a connection is over.
const SYN_SENT: u8 = 1;
const TIME_WAIT: u8 = 7;

/// A connection, by the addresses and ports of what its client sends when it is tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Connection {
    /// To a VIP where connection tracking translates, to an endpoint where the programs have done it before.
    pub(crate) flow: FlowKey,
    /// Connection tracking translates it.
    pub(crate) translated: bool,
}

/// Reads the connections that are established or are being closed, of those that are wanted.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub(crate) fn connections(wanted: impl Fn(&Connection) -> bool) -> io::Result<HashSet<Connection>> {
    const ANY_FAMILY: [u8; 4] = [0; 4];
    const TRIES: u32 = 5;
    let requests = Requests::open(NETLINK_NETFILTER)?;
    let mut tries = 0;
    loop {
        let mut found = HashSet::new();
        let outcome = requests.ask(CONNTRACK << 8 | GET, DUMP, &ANY_FAMILY, |payload| {
            let entry = connection(payload.get(4..).unwrap_or_default());
            found.extend(entry.filter(&wanted));
        });
        tries += 1;
        match outcome {
            // Entries came or went meanwhile: what was read is right, what is missing is found by another try.
            Err(error) if error.kind() == io::ErrorKind::Interrupted && tries < TRIES => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(found),
            Err(error) => return Err(error),
            Ok(()) => return Ok(found),
        }
    }
}

/// What an entry is about, if that is a living TCP connection.
fn connection(entry: &[u8]) -> Option<Connection> {
    use attribute as a;
    let tuple = find(entry, a::ORIGINAL)?;
    let (protocol, client) = end_of(tuple, Side::Source)?;
    let (_, to) = end_of(tuple, Side::Destination)?;
    if u32::from(protocol) != TCP {
        return None;
    }
    let status = find(entry, a::STATUS)?.try_into().ok()?;
    let info = find(entry, a::PROTOCOL_INFO)?;
    let state = *find(find(info, a::TCP)?, a::TCP_STATE)?.first()?;
    if state <= SYN_SENT || state >= TIME_WAIT {
        return None;
    }
    Some(Connection {
        flow: FlowKey {
            client: VipKey::from_address(client.ip()).0,
            vip: VipKey::from_address(to.ip()),
            client_port: client.port(),
            port: to.port(),
            protocol: TCP,
        },
        translated: u32::from_be_bytes(status) & TRANSLATED != 0,
    })
}

/// An end of a direction.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// The protocol of a direction, and the address and port at one of its ends.
pub(crate) fn end_of(tuple: &[u8], side: Side) -> Option<(u8, SocketAddr)> {
    use attribute as a;
    let port = match side {
        Side::Source => a::SOURCE_PORT,
        Side::Destination => a::DESTINATION_PORT,
    };
    let address = address_of(tuple, side)?;
    let protocol = find(tuple, a::TUPLE_PROTOCOL)?;
    let port = u16::from_be_bytes(find(protocol, port)?.try_into().ok()?);
    let number = *find(protocol, a::NUMBER)?.first()?;
    Some((number, SocketAddr::new(address, port)))
}

/// The address at one of a direction's ends.
pub(crate) fn address_of(tuple: &[u8], side: Side) -> Option<IpAddr> {
    use attribute as a;
    let (v4, v6) = match side {
        Side::Source => (a::V4_SOURCE, a::V6_SOURCE),
        Side::Destination => (a::V4_DESTINATION, a::V6_DESTINATION),
    };
    let ip = find(tuple, a::TUPLE_IP)?;
    Some(match find(ip, v4) {
        Some(octets) => <[u8; 4]>::try_from(octets).ok()?.into(),
        None => <[u8; 16]>::try_from(find(ip, v6)?).ok()?.into(),
    })
}
