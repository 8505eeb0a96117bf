//! The clsact qdisc: where programs are attached on kernels below 6.6.
//!
//! It may be there already, and others may come to use one that this program has made. So it is remembered beside the pins
//! which it has made, and those go with it that nobody else has a filter on.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::tc::qdisc_add_clsact;
use landfall_ebpf_common::tcx;
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use super::pins::entries;
use crate::netlink::{DUMP, Requests};

/// `linux/rtnetlink.h`.
const DELETE_QDISC: u16 = 37;
const GET_FILTER: u16 = 46;
/// Parents (`linux/pkt_sched.h`): of the qdisc, of the filters for what comes in, of those for what leaves.
const CLSACT: u32 = 0xffff_fff1;
const SIDES: [u32; 2] = [0xffff_fff2, 0xffff_fff3];

/// Where an interface's qdisc is remembered as ours.
fn marks(root: &Path) -> PathBuf {
    root.join("clsact")
}

/// Makes the interface's qdisc, if there is none.
pub(super) fn ensure(root: &Path, interface: u32, name: &str) {
    if qdisc_add_clsact(name).is_err() {
        // It is there, ours or another's, or the filter will fail and say why.
        return;
    }
    let mark = marks(root).join(interface.to_string());
    if let Err(error) = fs::create_dir_all(&mark) {
        tracing::debug!(mark = %mark.display(), %error, "the clsact qdisc will not be removed");
    }
}

/// The filters at a hook, by preference and handle.
pub(super) fn filters(interface: u32, hook: tcx::Hook) -> io::Result<BTreeSet<(u16, u32)>> {
    let parent = match hook {
        tcx::Hook::Ingress => SIDES[0],
        tcx::Hook::Egress => SIDES[1],
    };
    let mut filters = BTreeSet::new();
    ask(
        GET_FILTER,
        DUMP,
        interface.cast_signed(),
        parent,
        |filter| {
            let word = |at: usize| {
                let bytes = filter.get(at..at + 4)?;
                bytes.try_into().ok().map(u32::from_ne_bytes)
            };
            // `struct tcmsg`: handle and info; the upper half of that is the preference.
            if let (Some(handle), Some(info)) = (word(8), word(16)) {
                filters.insert(((info >> 16) as u16, handle));
            }
        },
    )?;
    Ok(filters)
}

/// Removes the qdiscs that [`ensure`] has made and nobody uses; how many that were. It forgets the others.
pub(super) fn remove_unused(root: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for mark in entries(&marks(root)) {
        let name = mark.file_name().and_then(|name| name.to_str());
        if let Some(interface) = name.and_then(|name| name.parse().ok())
            && !is_used(interface)?
        {
            // It is no error if it is gone, with its interface or without.
            removed += usize::from(delete(interface).is_ok());
        }
        fs::remove_dir(&mark)?;
    }
    match fs::remove_dir(marks(root)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error)?,
        _ => Ok(removed),
    }
}

/// Whether there is a filter on either side.
fn is_used(interface: i32) -> io::Result<bool> {
    let mut used = false;
    for side in SIDES {
        match ask(GET_FILTER, DUMP, interface, side, |_| used = true) {
            // There is no qdisc, or no such interface.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => {}
            outcome => outcome?,
        }
    }
    Ok(used)
}

fn delete(interface: i32) -> io::Result<()> {
    ask(DELETE_QDISC, 0, interface, CLSACT, |_| {})
}

fn ask(
    kind: u16,
    flags: u16,
    interface: i32,
    parent: u32,
    each: impl FnMut(&[u8]),
) -> io::Result<()> {
    // `struct tcmsg`: family and padding, interface, handle, parent, info.
    let mut body = vec![0; 4];
    body.extend(interface.to_ne_bytes());
    body.extend([0; 4]);
    body.extend(parent.to_ne_bytes());
    body.extend([0; 4]);
    let requests = Requests::open(NETLINK_ROUTE)?;
    requests.ask(kind, flags, &body, each)
}
