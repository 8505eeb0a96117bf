//! Who is attached to an interface by TCX, in their order.
//!
//! aya's query opens every program it finds, which wants `CAP_SYS_ADMIN`; the numbers alone want `CAP_NET_ADMIN`.

extern crate std;

use std::io;
use std::vec::Vec;

use crate::sys::bpf;

/// `BPF_PROG_QUERY` of `enum bpf_cmd` (`linux/bpf.h`).
const BPF_PROG_QUERY: libc::c_long = 16;

/// A hook of TCX (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// `BPF_TCX_INGRESS`.
    Ingress = 46,
    /// `BPF_TCX_EGRESS`.
    Egress = 47,
}

/// The kernel's own bound on programs at one hook (`BPF_MPROG_MAX`).
const MAX_PROGRAMS: usize = 64;

/// The `query` part of `union bpf_attr`, up to what TCX uses.
#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    padding: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// The ids of the programs at a hook of an interface, the first to run first.
///
/// # Errors
/// `EINVAL` where the kernel has no TCX (below 6.6), `ENODEV` if there is no such interface in the calling
/// thread's network namespace, `EPERM` without `CAP_NET_ADMIN`.
pub fn programs(ifindex: u32, hook: Hook) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MAX_PROGRAMS];
    let mut attr = QueryAttr {
        target_ifindex: ifindex,
        attach_type: hook as u32,
        prog_ids: ids.as_mut_ptr() as u64,
        count: 64,
        ..QueryAttr::default()
    };
    // The kernel writes at most `count` ids to `prog_ids`, which has room for them.
    bpf(BPF_PROG_QUERY, &mut attr)?;
    Ok(ids.iter().copied().take(attr.count as usize).collect())
}
