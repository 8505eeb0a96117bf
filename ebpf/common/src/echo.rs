//! An echo between the nodes of a segment, which the kernel answers: the witness that packets for a node are taken.

/// The ethertype: that of the speakers' hellos (IEEE 802's local experimental one), whose first byte is 1.
pub const ETHERTYPE: u16 = 0x88b5;
/// The first byte of a question.
pub const REQUEST: u8 = 2;
/// The first byte of an answer, which is otherwise the question.
pub const ANSWER: u8 = 3;
/// How long both are.
pub const LENGTH: usize = 9;

/// A question or an answer.
#[allow(clippy::many_single_char_names)] // Eight bytes.
pub const fn message(kind: u8, token: u64) -> [u8; LENGTH] {
    let [a, b, c, d, e, f, g, h] = token.to_be_bytes();
    [kind, a, b, c, d, e, f, g, h]
}

/// Reads either; padding after it is ignored.
pub fn read(payload: &[u8]) -> Option<(u8, u64)> {
    let (message, _) = payload.split_first_chunk::<LENGTH>()?;
    let [kind, token @ ..] = *message;
    let known = kind == REQUEST || kind == ANSWER;
    known.then_some((kind, u64::from_be_bytes(token)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_they_are_written() {
        let mut padded = [0; 46];
        padded[..LENGTH].copy_from_slice(&message(ANSWER, 0x0102_0304_0506_0708));
        assert_eq!(read(&padded), Some((ANSWER, 0x0102_0304_0506_0708)));
        assert_eq!(read(&padded[..8]), None);
        padded[0] = 1;
        assert_eq!(read(&padded), None, "a hello");
    }
}
