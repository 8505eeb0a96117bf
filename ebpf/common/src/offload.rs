//! What a NIC does to frames before anybody sees them.

extern crate std;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `SIOCETHTOOL` (`linux/sockios.h`).
const SIOCETHTOOL: u64 = 0x8946;
/// `ETHTOOL_GFLAGS` (`linux/ethtool.h`).
const ETHTOOL_GFLAGS: u32 = 0x25;
/// `ETH_FLAG_RXVLAN` of the same.
const ETH_FLAG_RXVLAN: u32 = 1 << 8;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether an interface takes VLAN tags out of the frames it receives, so that XDP does not see which have one.
///
/// # Errors
/// `ENODEV` if there is no such interface in the calling thread's network namespace.
pub fn strips_tags(interface: &str) -> io::Result<bool> {
    // SAFETY: no pointers are passed.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut value = Value {
        command: ETHTOOL_GFLAGS,
        data: 0,
    };
    // SAFETY: zeroes are a valid value of it.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and what it points to live through the call, and are what this one takes.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
    if result < 0 {
        let error = io::Error::last_os_error();
        // Drivers without any such word do nothing of the kind.
        return match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Ok(false),
            _ => Err(error),
        };
    }
    Ok(value.data & ETH_FLAG_RXVLAN != 0)
}
