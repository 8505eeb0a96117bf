//! Hello frames: what a speaker says on each announcing interface, so that others know that it hears the segment.
//!
//! ```text
//!  version 1 B | boot id 8 B | sequence 8 B | length of name 1 B | name | HMAC-SHA256 of all before 32 B
//! ```
//! They are signed with the gossip keys. A sequence that was seen in the same run is refused; a run that is
//! known to be over is refused by the election.

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use landfall_core::election::BootId;
use landfall_core::model::NodeName;
use sha2::Sha256;

use crate::keys::{Key, Keys};

const VERSION: u8 = 1;
const TAG: usize = 32;
const FIXED: usize = 1 + 8 + 8 + 1;
/// Keeps a signature for this purpose from meaning anything elsewhere.
const CONTEXT: &[u8] = b"landfall hello 1";

/// Who said hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Its node.
    pub node: NodeName,
    /// Its run.
    pub boot: BootId,
    /// Grows with each hello of a run.
    pub sequence: u64,
}

/// Why a hello was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// It is too short, of another version, or its name cannot be read.
    #[error("malformed")]
    Malformed,
    /// It is signed with a key that is not in force here.
    #[error("signed with another key")]
    Key,
    /// It was heard before.
    #[error("replayed")]
    Replayed,
}

fn mac(key: &Key) -> Hmac<Sha256> {
    let mut mac =
        <Hmac<Sha256> as Mac>::new_from_slice(&key.0).expect("HMAC takes keys of any length");
    mac.update(CONTEXT);
    mac
}

/// Writes and signs a hello.
pub fn seal(hello: &Hello, keys: &Keys) -> Vec<u8> {
    let name = hello.node.0.as_bytes();
    let mut bytes = Vec::with_capacity(FIXED + name.len() + TAG);
    bytes.push(VERSION);
    bytes.extend_from_slice(&hello.boot.0.to_be_bytes());
    bytes.extend_from_slice(&hello.sequence.to_be_bytes());
    bytes.push(u8::try_from(name.len()).expect("a node's name has at most 253 characters"));
    bytes.extend_from_slice(name);
    let mut mac = mac(keys.primary());
    mac.update(&bytes);
    bytes.extend_from_slice(&mac.finalize().into_bytes());
    bytes
}

/// Reads hellos and refuses forged and repeated ones.
#[derive(Debug, Default)]
pub struct Opener {
    /// The last sequence of each node's run, on each interface: one hello goes out of several.
    seen: BTreeMap<(NodeName, u32), (BootId, u64)>,
}

impl Opener {
    /// Checks and reads what arrived on an interface; padding after the signature is ignored.
    pub fn open(&mut self, bytes: &[u8], interface: u32, keys: &Keys) -> Result<Hello, HelloError> {
        let fixed = bytes.get(..FIXED).ok_or(HelloError::Malformed)?;
        if fixed[0] != VERSION {
            return Err(HelloError::Malformed);
        }
        let number = |at: usize| {
            let bytes: [u8; 8] = fixed[at..at + 8].try_into().expect("eight bytes");
            u64::from_be_bytes(bytes)
        };
        let end = FIXED + usize::from(fixed[17]);
        let name = bytes.get(FIXED..end).ok_or(HelloError::Malformed)?;
        let tag = bytes.get(end..end + TAG).ok_or(HelloError::Malformed)?;
        let signed = keys.all().iter().any(|key| {
            let mut mac = mac(key);
            mac.update(&bytes[..end]);
            mac.verify_slice(tag).is_ok()
        });
        if !signed {
            return Err(HelloError::Key);
        }
        let name = std::str::from_utf8(name).map_err(|_| HelloError::Malformed)?;
        let hello = Hello {
            node: name.into(),
            boot: BootId(number(1)),
            sequence: number(9),
        };
        let seat = self
            .seen
            .entry((hello.node.clone(), interface))
            .or_insert((hello.boot, 0));
        if seat.0 == hello.boot && hello.sequence <= seat.1 {
            return Err(HelloError::Replayed);
        }
        *seat = (hello.boot, hello.sequence);
        Ok(hello)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_keys(bytes: &[u8]) -> Keys {
        use base64::Engine;
        let lines: Vec<String> = bytes
            .iter()
            .map(|byte| base64::engine::general_purpose::STANDARD.encode([*byte; 32]))
            .collect();
        Keys::parse(&lines.join("\n")).unwrap()
    }

    fn mk_hello(sequence: u64) -> Hello {
        Hello {
            node: "node-1".into(),
            boot: BootId(9),
            sequence,
        }
    }

    #[test]
    fn round_trip_with_padding_and_either_key() {
        let mut opener = Opener::default();
        let mut bytes = seal(&mk_hello(1), &mk_keys(&[1]));
        bytes.extend_from_slice(&[0; 20]);
        assert_eq!(opener.open(&bytes, 3, &mk_keys(&[2, 1])), Ok(mk_hello(1)));
    }

    #[test]
    fn forged_and_repeated_ones_are_refused() {
        let keys = mk_keys(&[1]);
        let mut opener = Opener::default();
        let bytes = seal(&mk_hello(5), &keys);
        assert_eq!(opener.open(&bytes, 3, &mk_keys(&[2])), Err(HelloError::Key));
        assert!(opener.open(&bytes, 3, &keys).is_ok());
        assert_eq!(opener.open(&bytes, 3, &keys), Err(HelloError::Replayed));
        assert!(
            opener.open(&bytes, 4, &keys).is_ok(),
            "the same hello on another interface"
        );
        for cut in 0..bytes.len() {
            assert!(opener.open(&bytes[..cut], 3, &keys).is_err());
        }
        for at in 0..bytes.len() {
            let mut bad = seal(&mk_hello(7), &keys);
            bad[at] ^= 1;
            assert!(opener.open(&bad, 3, &keys).is_err(), "byte {at}");
        }
    }
}
