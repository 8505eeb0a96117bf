//! SCTP's checksum after a change of ports (RFC 9260, appendix A): a `CRC32c` of the whole packet.
//!
//! A CRC is linear: what a change of the first four bytes does to it depends on the change and on how many bytes
//! follow, not on what they are. So the packet need not be read.

/// The polynomial of `CRC32c`, its bits reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// How many bits a packet's length has.
const LENGTH_BITS: usize = 16;

/// `x` to the power of `8 * 2^i`, modulo the polynomial: what `2^i` zero bytes do.
static ZEROS: [u32; LENGTH_BITS] = zeros();

const fn zeros() -> [u32; LENGTH_BITS] {
    let mut table = [0; LENGTH_BITS];
    // Bit 31 is x^0, so this is x^8.
    table[0] = 1 << (31 - 8);
    let mut place = 1;
    while place < LENGTH_BITS {
        table[place] = times(table[place - 1], table[place - 1]);
        place += 1;
    }
    table
}

/// The product of two polynomials.
#[inline(always)]
#[allow(clippy::inline_always)] // The verifier sees straight code.
const fn times(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        if a & (1 << (31 - bit)) != 0 {
            product ^= b;
        }
        b = (b >> 1) ^ if b & 1 == 0 { 0 } else { POLYNOMIAL };
        bit += 1;
    }
    product
}

/// The checksum of a packet of this many bytes whose first four, its ports, have been changed: both as they lie in
/// the packet.
#[inline(always)]
#[allow(clippy::inline_always)] // As above.
#[must_use]
pub fn checksum_after(checksum: [u8; 4], from: [u8; 4], to: [u8; 4], length: u32) -> [u8; 4] {
    let mut change = u32::from_le_bytes(from) ^ u32::from_le_bytes(to);
    // The four bytes themselves are followed by the rest: as many zero bytes, as far as the change goes.
    let mut place = 0;
    while place < LENGTH_BITS {
        if length & (1 << place) != 0 {
            change = times(change, ZEROS[place]);
        }
        place += 1;
    }
    (u32::from_le_bytes(checksum) ^ change).to_le_bytes()
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::vec::Vec;

    /// Bit by bit, as the RFC has it.
    fn checksum(packet: &[u8]) -> [u8; 4] {
        let mut crc = u32::MAX;
        for byte in packet {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ if crc & 1 == 0 { 0 } else { POLYNOMIAL };
            }
        }
        (!crc).to_le_bytes()
    }

    /// The check value of `CRC32c`.
    #[test]
    fn the_reference_is_right() {
        assert_eq!(checksum(b"123456789"), 0xe306_9283_u32.to_le_bytes());
    }

    #[test]
    fn a_change_of_ports_changes_the_checksum_as_if_it_were_computed_anew() {
        for length in [12, 13, 64, 1_480, 9_000, 65_535_u32] {
            let mut packet: Vec<u8> = (0..length)
                .map(|at| u8::try_from(at % 251).unwrap())
                .collect();
            packet[8..12].fill(0);
            let before = checksum(&packet);
            let (from, to) = (
                [packet[0], packet[1], packet[2], packet[3]],
                [0x9c, 0x40, 0x1f, 0x90],
            );
            packet[..4].copy_from_slice(&to);
            assert_eq!(
                checksum_after(before, from, to, length),
                checksum(&packet),
                "{length}"
            );
        }
    }
}
