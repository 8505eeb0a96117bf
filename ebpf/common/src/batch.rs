//! Reading a hash map many entries at a time: one system call for thousands, where an iterator makes two for each.

extern crate std;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::vec::Vec;

use crate::sys::bpf;

/// `BPF_MAP_LOOKUP_BATCH` of `enum bpf_cmd` (`linux/bpf.h`; kernel 5.6).
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// The `batch` part of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Where to go on in a map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place(u32);

impl Place {
    /// As a number, so that it can be carried elsewhere.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// From its number.
    pub const fn at(number: u32) -> Self {
        Self(number)
    }
}

/// Some entries of a map, and where to go on; nothing there, if these were the last.
#[derive(Debug)]
pub struct Batch<K, V> {
    /// The entries.
    pub entries: Vec<(K, V)>,
    /// Where the next begin.
    pub next: Option<Place>,
}

/// Reads a whole hash map, at most `count` entries at a time; `take` is given each lot.
///
/// # Errors
/// Those of [`read`], and those of `take`.
pub fn each<K, V>(
    map: BorrowedFd<'_>,
    count: u32,
    mut take: impl FnMut(&[(K, V)]) -> io::Result<()>,
) -> io::Result<()>
where
    K: aya::Pod,
    V: aya::Pod,
{
    let mut place = None;
    loop {
        let batch = read(map, place, count)?;
        take(&batch.entries)?;
        place = batch.next;
        if place.is_none() {
            return Ok(());
        }
    }
}

/// Reads at most `count` entries of a hash map from a place on; nothing for its beginning. What is put in or taken out
/// meanwhile may be seen or not.
///
/// # Errors
/// `ENOSPC` if a bucket of the map holds more than `count`; `EINVAL` if the sizes are not the map's.
pub fn read<K, V>(map: BorrowedFd<'_>, from: Option<Place>, count: u32) -> io::Result<Batch<K, V>>
where
    K: aya::Pod,
    V: aya::Pod,
{
    let room = count as usize;
    let mut keys: Vec<K> = Vec::with_capacity(room);
    let mut values: Vec<V> = Vec::with_capacity(room);
    let before = from.unwrap_or_default().0;
    let mut after = 0_u32;
    let mut attr = BatchAttr {
        in_batch: from.map_or(0, |_| &raw const before as u64),
        out_batch: &raw mut after as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map_fd: u32::try_from(map.as_raw_fd()).expect("an open descriptor is not negative"),
        ..BatchAttr::default()
    };
    let outcome = bpf(BPF_MAP_LOOKUP_BATCH, &mut attr);
    let last = match outcome {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    let there = (attr.count as usize).min(room);
    // SAFETY: the kernel has written so many of each, and both have room for them; any bytes are such a value.
    unsafe {
        keys.set_len(there);
        values.set_len(there);
    }
    Ok(Batch {
        entries: keys.into_iter().zip(values).collect(),
        next: (!last).then_some(Place(after)),
    })
}
