//! Packet sockets (packet(7)), which neither the standard library nor `nix` has safe words for.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, socklen_t};
use tokio::io::unix::AsyncFd;

/// A filter the kernel runs on each frame before it is queued: classic BPF.
pub(crate) type Filter = [libc::sock_filter];

/// A raw packet socket of one interface and ethertype, that does not block and does not make it promiscuous.
#[derive(Debug)]
pub(crate) struct PacketSocket(OwnedFd);

/// How a received frame came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Its length in bytes, no longer than the buffer.
    pub(crate) length: usize,
    /// It was meant for this station: not sent by it, and not for another that the NIC let through.
    pub(crate) for_us: bool,
    /// It carried a VLAN tag, which the kernel or the NIC has taken off: it is not of this segment.
    pub(crate) tagged: bool,
}

/// A statement of classic BPF without jumps.
pub(crate) const fn statement(code: u32, operand: u32) -> libc::sock_filter {
    jump(code, operand, 0, 0)
}

/// A jump of classic BPF.
#[allow(clippy::cast_possible_truncation)] // opcodes of classic BPF fit 8 bits
pub(crate) const fn jump(code: u32, operand: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: yes,
        jf: no,
        k: operand,
    }
}

impl PacketSocket {
    /// Opens it. The filter is in place before the first frame can arrive. `group` is an Ethernet group to
    /// receive.
    pub(crate) fn open(
        interface: u32,
        ethertype: u16,
        filter: Option<&Filter>,
        group: Option<[u8; 6]>,
    ) -> io::Result<Self> {
        let interface =
            c_int::try_from(interface).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // Protocol 0: nothing is received until the socket is bound.
        // SAFETY: no pointers are passed.
        let fd = check(unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                0,
            )
        })?;
        // SAFETY: the descriptor is fresh and nobody else's.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        if let Some(filter) = filter {
            let program = libc::sock_fprog {
                len: u16::try_from(filter.len()).expect("filters are a few statements"),
                filter: filter.as_ptr().cast_mut(), // the kernel only reads it
            };
            socket.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        }
        let on: c_int = 1;
        socket.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, &on)?;
        if let Some(group) = group {
            let mut address = [0; 8];
            address[..6].copy_from_slice(&group);
            let membership = libc::packet_mreq {
                mr_ifindex: interface,
                mr_type: u16::try_from(libc::PACKET_MR_MULTICAST).expect("a small constant"),
                mr_alen: 6,
                mr_address: address,
            };
            socket.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
        }
        // SAFETY: all zeroes is a valid value of this plain struct.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).expect("a small constant");
        address.sll_protocol = ethertype.to_be();
        address.sll_ifindex = interface;
        // SAFETY: the address is a live `sockaddr_ll`, and the length is its own.
        check(unsafe {
            libc::bind(
                socket.0.as_raw_fd(),
                (&raw const address).cast(),
                length::<libc::sockaddr_ll>(),
            )
        })?;
        Ok(socket)
    }

    /// Has the runtime watch it.
    pub(crate) fn watch(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the socket owns its descriptor, always yields this one, and closes it when it is dropped, which
        // the `AsyncFd` that owns it does after the end of its registration.
        unsafe { AsyncFd::register(self) }.map_err(io::Error::from)
    }

    /// Sends a whole frame out of the interface.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the pointer and the length are those of a live slice.
        let sent = unsafe {
            libc::send(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                libc::MSG_NOSIGNAL,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Receives the next frame; what is longer than the buffer is cut off.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        // A buffer for the one control message asked for, aligned as the kernel writes it.
        let mut control = [0_u64; 16];
        let mut vector = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: all zeroes is a valid value of these plain structs.
        let (mut from, mut message): (libc::sockaddr_ll, libc::msghdr) =
            unsafe { (mem::zeroed(), mem::zeroed()) };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = length::<libc::sockaddr_ll>();
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = mem::size_of_val(&control);
        // SAFETY: all pointers in the message point to live buffers of the lengths given beside them.
        let received = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) };
        let length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        Ok(Received {
            length,
            for_us: matches!(
                from.sll_pkttype,
                libc::PACKET_HOST | libc::PACKET_BROADCAST | libc::PACKET_MULTICAST
            ),
            tagged: tagged(&message),
        })
    }

    fn set<T>(&self, level: c_int, option: c_int, value: &T) -> io::Result<()> {
        // SAFETY: the pointer is to a live `T`, and the length is its own.
        check(unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast(),
                length::<T>(),
            )
        })?;
        Ok(())
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Whether the metadata of a received message tell of a VLAN tag.
fn tagged(message: &libc::msghdr) -> bool {
    // SAFETY: the kernel has filled the control buffer, which is still alive, and `CMSG_FIRSTHDR` yields null or
    // a header within it. The data are bytes, asked for no alignment; that they are there was checked.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(message);
        if header.is_null()
            || (*header).cmsg_level != libc::SOL_PACKET
            || (*header).cmsg_type != libc::PACKET_AUXDATA
            || (*header).cmsg_len < libc::CMSG_LEN(length::<libc::tpacket_auxdata>()) as usize
        {
            return false;
        }
        // `tp_status` is the first field.
        let status = libc::CMSG_DATA(header).cast::<[u8; 4]>().read();
        u32::from_ne_bytes(status) & libc::TP_STATUS_VLAN_VALID != 0
    }
}

fn length<T>() -> socklen_t {
    socklen_t::try_from(mem::size_of::<T>()).expect("these structs are small")
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
