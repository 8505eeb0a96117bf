//! The wire format that all netlink families share: sockets, messages, attributes.

use std::io;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, Socket, SocketAddr, TokioSocket};

/// Room for what arrives while somebody loads a large ruleset.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Asks for all there are (`NLM_F_DUMP`).
pub(crate) const DUMP: u16 = 0x300;
/// Marks an attribute that holds others (`NLA_F_NESTED`).
pub(crate) const NESTED: u16 = 0x8000;
/// As long as the largest message the kernel sends.
const MESSAGE: usize = 64 << 10;

/// A netlink message.
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    /// Who asked for what it tells: the process id, where one process has one socket.
    pub(crate) port: u32,
    pub(crate) payload: &'a [u8],
}

/// A socket that listens to multicast groups, in the network namespace of the thread that opened it.
pub(crate) struct Listener {
    socket: TokioSocket,
    buffer: Vec<u8>,
}

impl Listener {
    /// `groups` is a mask.
    pub(crate) fn open(protocol: isize, groups: u32) -> io::Result<Self> {
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
    pub(crate) async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer).await {
            Ok(()) => Ok(Some(&self.buffer)),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A socket to ask with. It belongs to the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Requests(Socket);

impl Requests {
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        // The kernel answers at once or not at all.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
        Ok(Self(socket))
    }

    /// The same; the kernel takes a routing request's attributes at their word (`NETLINK_GET_STRICT_CHK`).
    pub(crate) fn strict(self) -> io::Result<Self> {
        self.0.set_netlink_get_strict_chk(true)?;
        Ok(self)
    }

    /// Sends a request, whose body begins with the header of its family, and shows the payload of each answer.
    pub(crate) fn ask(
        &self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        const REQUEST_AND_ACK: u16 = 0x1 | 0x4; // NLM_F_REQUEST, NLM_F_ACK
        const INTERRUPTED: u16 = 0x10; // NLM_F_DUMP_INTR
        let mut request = Vec::with_capacity(16 + body.len());
        let length = u32::try_from(16 + body.len()).expect("a request is a few names");
        request.extend(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend((REQUEST_AND_ACK | flags).to_ne_bytes());
        request.extend([0; 8]); // sequence number, port
        request.extend(body);
        self.0.send(&request, 0)?;
        let mut buffer = Vec::with_capacity(MESSAGE);
        let mut interrupted = false;
        loop {
            buffer.clear();
            self.0.recv(&mut buffer, 0)?;
            for part in messages(&buffer) {
                interrupted |= part.flags & INTERRUPTED != 0;
                match i32::from(part.kind) {
                    libc::NLMSG_ERROR => {
                        let code = part.payload.first_chunk().copied().map(i32::from_ne_bytes);
                        return match code {
                            Some(0) => Ok(()),
                            Some(code) => Err(io::Error::from_raw_os_error(-code)),
                            None => Err(io::ErrorKind::InvalidData.into()),
                        };
                    }
                    libc::NLMSG_DONE if interrupted => {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                    libc::NLMSG_DONE => return Ok(()),
                    _ => each(part.payload),
                }
            }
        }
    }
}

/// The messages of one datagram.
pub(crate) fn messages(mut buffer: &[u8]) -> impl Iterator<Item = Message<'_>> {
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
pub(crate) fn split(mut attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
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
pub(crate) fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    split(attributes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// Appends an attribute.
pub(crate) fn put(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("names are short");
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The text of an attribute, without the zero that ends it.
pub(crate) fn text(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).into_owned()
}
