//! The system call that all of this goes through.

extern crate std;

use std::io;

/// Calls bpf(2) with an attribute, which must be the command's part of `union bpf_attr`.
///
/// What the attribute points to has to live through the call, and be as large as the attribute says: the callers, in
/// this crate, own it.
pub(crate) fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: the attribute lives through the call and its size is told; for what it points to the callers answer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            core::ptr::from_mut(attr),
            size_of::<A>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// The descriptor that a command has returned.
pub(crate) fn descriptor(returned: libc::c_long) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd;
    let number = i32::try_from(returned).expect("descriptors are small");
    // SAFETY: the descriptor is fresh and nobody else's.
    unsafe { std::os::fd::OwnedFd::from_raw_fd(number) }
}
