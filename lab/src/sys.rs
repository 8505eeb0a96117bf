//! The system calls that the standard library and `nix` have no safe words for.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// The size of an int, as system calls take it.
#[allow(clippy::cast_possible_truncation, reason = "it is four bytes")]
const INT: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;

/// Makes the process that `command` starts enter a network namespace before it executes. Unlike
/// `ip netns exec` it keeps the mounts, so that a pinned eBPF object is found where it was put.
pub(crate) fn enter_before_exec(command: &mut Command, netns: Arc<File>) {
    // SAFETY: the closure runs between fork and exec, and makes one async-signal-safe system call on a
    // file descriptor that the `Arc` keeps open; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || setns(&*netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
    }
}

/// A packet socket on one interface, for one ethertype (host byte order) or all of them (`ETH_P_ALL`).
pub(crate) fn packet_socket(interface: u32, ethertype: u16) -> io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    // SAFETY: `sockaddr_ll` is plain data for which all zeroes is valid, the storage is larger than it, and
    // the length given is its own.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let link = storage.cast::<libc::sockaddr_ll>();
            link.write(mem::zeroed());
            (*link).sll_family =
                u16::try_from(libc::AF_PACKET).expect("address families fit 16 bits");
            (*link).sll_protocol = ethertype.to_be();
            (*link).sll_ifindex = i32::try_from(interface)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            *length = libc::socklen_t::try_from(mem::size_of::<libc::sockaddr_ll>())
                .expect("a sockaddr is small");
            Ok(())
        })?
    };
    socket.bind(&address)?;
    Ok(socket)
}

/// Lets a packet socket's frames go to the driver at once, past the queues and whoever listens there (packet(7)).
pub(crate) fn bypass_queues(socket: &Socket) -> io::Result<()> {
    set_option(socket, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1)
}

/// Sets an option of a socket that takes an int.
fn set_option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the option takes an int, which lives through the call and whose size is told.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            INT,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The sequence number of what a TCP socket sends next. For a moment it is under repair (`TCP_REPAIR`), and hears nothing.
pub(crate) fn next_sequence(socket: &impl AsRawFd) -> io::Result<u32> {
    /// `TCP_SEND_QUEUE` and `TCP_REPAIR_OFF_NO_WP` of `linux/tcp.h`.
    const SEND_QUEUE: libc::c_int = 2;
    const WITHOUT_PROBE: libc::c_int = -1;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)?;
    set_option(
        socket,
        libc::IPPROTO_TCP,
        libc::TCP_REPAIR_QUEUE,
        SEND_QUEUE,
    )?;
    let mut sequence: u32 = 0;
    let mut size = INT;
    // SAFETY: the option gives four bytes, for which there is room, and both live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_QUEUE_SEQ,
            (&raw mut sequence).cast(),
            &raw mut size,
        )
    };
    let read = if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(sequence)
    };
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, WITHOUT_PROBE)?;
    read
}
