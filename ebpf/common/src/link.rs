//! Pinned links of any kind: opening one, asking where it is attached, taking it off at once.
//!
//! aya keeps the descriptors of links to itself.

extern crate std;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::sys::{bpf, descriptor};

/// `BPF_OBJ_GET` of `enum bpf_cmd` (`linux/bpf.h`).
const BPF_OBJ_GET: libc::c_long = 7;
/// `BPF_OBJ_GET_INFO_BY_FD` of the same.
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
/// `BPF_LINK_DETACH` of the same.
const BPF_LINK_DETACH: libc::c_long = 34;

/// A link.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// The part of `union bpf_attr` for pinned objects.
#[repr(C)]
#[derive(Default)]
struct ObjectAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The `info` part of `union bpf_attr`.
#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// `struct bpf_link_info`, as far as links of XDP go; its beginning is that of all.
#[repr(C)]
#[derive(Default)]
struct XdpInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    ifindex: u32,
    rest: [u32; 3],
}

/// The `link_detach` part of `union bpf_attr`.
#[repr(C)]
struct DetachAttr {
    link_fd: u32,
}

impl Link {
    /// The link that is pinned at a path.
    ///
    /// # Errors
    /// `ENOENT` if nothing is there, `EPERM` without the permission.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut attr = ObjectAttr {
            pathname: path.as_ptr() as u64,
            ..ObjectAttr::default()
        };
        Ok(Self(descriptor(bpf(BPF_OBJ_GET, &mut attr)?)))
    }

    /// Of a link of XDP: the index of the interface it is attached to, 0 if it was taken off or the interface is gone.
    ///
    /// # Errors
    /// None that is expected.
    pub fn xdp_interface(&self) -> io::Result<u32> {
        Ok(self.info()?.ifindex)
    }

    /// The id of its program.
    ///
    /// # Errors
    /// None that is expected.
    pub fn program(&self) -> io::Result<u32> {
        Ok(self.info()?.program)
    }

    /// What the kernel says of it. Of a link of another kind only what comes before the kind's own is true.
    fn info(&self) -> io::Result<XdpInfo> {
        let mut info = XdpInfo::default();
        let mut attr = InfoAttr {
            bpf_fd: self.number(),
            info_len: u32::try_from(size_of::<XdpInfo>()).expect("a few bytes"),
            info: &raw mut info as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
        Ok(info)
    }

    /// Detaches its program now. Removing the last reference to a link does the same, but some time later.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for links that cannot be detached.
    pub fn detach(&self) -> io::Result<()> {
        let mut attr = DetachAttr {
            link_fd: self.number(),
        };
        bpf(BPF_LINK_DETACH, &mut attr).map(drop)
    }

    fn number(&self) -> u32 {
        u32::try_from(self.0.as_raw_fd()).expect("an open descriptor is not negative")
    }
}
