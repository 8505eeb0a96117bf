//! Words of maps that several CPUs change at once. BPF has the instructions (kernel 5.12), `core` has no types for the
//! target.

use core::intrinsics::{AtomicOrdering, atomic_and, atomic_cxchg, atomic_or, atomic_xadd};

const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
/// What the instruction does in any case.
const ORDERED: AtomicOrdering = AtomicOrdering::SeqCst;

/// How often a word is tried that others change at the same time.
pub(super) const TRIES: u32 = 16;

/// Adds. The maps that the callers take pointers from are aligned, and everybody changes these words as is done here.
#[inline(always)]
pub(super) fn add(word: *mut u64, by: u64) {
    // SAFETY: as above.
    unsafe { atomic_xadd::<u64, u64, { RELAXED }>(word, by) };
}

/// What a word is now.
#[inline(always)]
pub(super) fn read(word: *const u64) -> u64 {
    // SAFETY: as above.
    unsafe { word.read_volatile() }
}

/// Adds one to a word that is less than so much; otherwise, what it is.
#[inline(always)]
pub(super) fn add_below(word: *mut u64, most: u64) -> Result<(), u64> {
    let mut before = read(word);
    for _ in 0..TRIES {
        if before >= most {
            return Err(before);
        }
        if exchange(word, before, before + 1) {
            return Ok(());
        }
        before = read(word);
    }
    Err(before)
}

/// Changes a word if it is what it is taken for.
#[inline(always)]
pub(super) fn exchange(word: *mut u64, from: u64, to: u64) -> bool {
    // SAFETY: as above.
    unsafe { atomic_cxchg::<u64, { ORDERED }, { ORDERED }>(word, from, to) }.1
}

/// Sets bits.
#[inline(always)]
pub(super) fn set(word: *mut u64, bits: u64) {
    // SAFETY: as above.
    unsafe { atomic_or::<u64, u64, { RELAXED }>(word, bits) };
}

/// Clears all bits but these.
#[inline(always)]
pub(super) fn keep(word: *mut u64, bits: u64) {
    // SAFETY: as above.
    unsafe { atomic_and::<u64, u64, { RELAXED }>(word, bits) };
}
