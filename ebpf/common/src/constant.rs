//! Programs that answer every frame alike, for benchmarks: what a frame costs that goes no further.

extern crate std;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys::{bpf, descriptor};

/// `BPF_PROG_LOAD` of `enum bpf_cmd` (`linux/bpf.h`).
const BPF_PROG_LOAD: libc::c_long = 5;
/// `BPF_LINK_CREATE` of the same.
const BPF_LINK_CREATE: libc::c_long = 28;
/// `XDP_FLAGS_DRV_MODE` (`linux/if_link.h`).
const DRIVER_MODE: u32 = 1 << 2;

/// A hook, with what the kernel calls its programs and its attachments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `BPF_PROG_TYPE_SCHED_CLS` at `BPF_TCX_INGRESS`.
    Tcx,
    /// `BPF_PROG_TYPE_XDP` at `BPF_XDP`, in the driver.
    Xdp,
}

/// The first part of `union bpf_attr` for programs.
#[repr(C)]
#[derive(Default)]
struct ProgramAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The first part of `union bpf_attr` for links.
#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    rest: [u64; 4],
}

/// Attaches a program that drops every frame, until what this returns is dropped itself.
///
/// # Errors
/// As attaching: `EBUSY` if there is a program already, `EOPNOTSUPP` if the driver has no native XDP.
pub fn drop_all(hook: Hook, interface: u32) -> io::Result<OwnedFd> {
    // TC_ACT_SHOT, XDP_DROP.
    let answer = match hook {
        Hook::Tcx => 2,
        Hook::Xdp => 1_u64,
    };
    // r0 = answer; exit.
    attach(hook, interface, &[0xb7 | answer << 32, EXIT])
}

/// Attaches a program that sends every frame back out of the interface that it came in by, as it is.
///
/// # Errors
/// As attaching.
pub fn bounce_all(interface: u32) -> io::Result<OwnedFd> {
    // r1 = __sk_buff.ifindex; r2 = 0; r0 = bpf_redirect(r1, r2); exit.
    let program = [
        0x61 | 0x11 << 8 | 40 << 16,
        0xb7 | 2 << 8,
        0x85 | 23 << 32,
        EXIT,
    ];
    attach(Hook::Tcx, interface, &program)
}

const EXIT: u64 = 0x95;

fn attach(hook: Hook, interface: u32, program: &[u64]) -> io::Result<OwnedFd> {
    let (prog_type, attach_type, flags) = match hook {
        Hook::Tcx => (3, 46, 0),
        Hook::Xdp => (6, 37, DRIVER_MODE),
    };
    let mut attr = ProgramAttr {
        prog_type,
        insn_cnt: u32::try_from(program.len()).expect("it is short"),
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        expected_attach_type: attach_type,
        ..ProgramAttr::default()
    };
    let program = descriptor(bpf(BPF_PROG_LOAD, &mut attr)?);
    let mut attr = LinkAttr {
        prog_fd: u32::try_from(program.as_raw_fd()).expect("not negative"),
        target_ifindex: interface,
        attach_type,
        flags,
        ..LinkAttr::default()
    };
    bpf(BPF_LINK_CREATE, &mut attr).map(descriptor)
}
