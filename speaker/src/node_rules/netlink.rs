//! The wire format that all netlink families share: sockets, messages, attributes.

use std::io;

use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};

/// Room for what arrives while somebody loads a large ruleset.
const RECEIVE_BUFFER: usize = 4 << 20;
/// As long as the largest message the kernel sends.
pub(super) const MESSAGE: usize = 64 << 10;

/// A netlink message.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    /// Who asked for what it tells: the process id, where one process has one socket.
    pub(super) port: u32,
    pub(super) payload: &'a [u8],
}

/// A socket that listens to multicast groups, in the network namespace of the thread that opened it.
pub(super) struct Listener {
    socket: TokioSocket,
    buffer: Vec<u8>,
}

impl Listener {
    /// `groups` is a mask.
    pub(super) fn open(protocol: isize, groups: u32) -> io::Result<Self> {
        let mut socket = TokioSocket::new(protocol)?;
        // Best effort: it takes CAP_NET_ADMIN in the first user namespace; with less, messages are lost sooner.
        let _ = setsockopt(socket.socket_ref(), sockopt::RcvBufForce, &RECEIVE_BUFFER);
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Self {
            socket,
            buffer: Vec::with_capacity(MESSAGE),
        })
    }

    /// What came next; `None` when messages were lost. Can be dropped at any time without losing one.
    pub(super) async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer).await {
            Ok(()) => Ok(Some(&self.buffer)),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The messages of one datagram.
pub(super) fn messages(mut buffer: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*buffer.first_chunk()?);
        let length = usize::try_from(length).ok()?;
        let message = buffer.get(..length).filter(|message| message.len() >= 16)?;
        buffer = buffer.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            flags: u16::from_ne_bytes([message[6], message[7]]),
            port: u32::from_ne_bytes([message[12], message[13], message[14], message[15]]),
            payload: &message[16..],
        })
    })
}

/// The attributes of a message or of a nested attribute.
pub(super) fn split(mut attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const KIND: u16 = 0x3fff; // without the flags for nesting and byte order
    std::iter::from_fn(move || {
        let (header, _) = attributes.split_first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & KIND;
        let value = attributes.get(4..length)?;
        attributes = attributes
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of this kind.
pub(super) fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    split(attributes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// Appends an attribute.
pub(super) fn put(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("names are short");
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The text of an attribute, without the zero that ends it.
pub(super) fn text(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).into_owned()
}
