//! The gossip keys: one or two of 32 bytes, the first of which encrypts and signs. With two, either is accepted,
//! so a rotation changes no membership: add the new key as second everywhere, swap them, remove the old one.

use std::path::PathBuf;

use anyhow::{Context, bail};
use base64::Engine;
use sha2::{Digest, Sha256};

/// A key's length in bytes: AES-256.
pub const KEY_LENGTH: usize = 32;

/// One key.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(pub [u8; KEY_LENGTH]);

impl Key {
    /// A short name of the key that tells nothing of it.
    pub fn id(&self) -> String {
        let digest: [u8; 32] = Sha256::digest(self.0).into();
        let number = digest[..4]
            .iter()
            .fold(0, |n, byte| n << 8 | u32::from(*byte));
        format!("{number:08x}")
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({})", self.id())
    }
}

/// The keys in force, the primary first. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys(Vec<Key>);

impl Keys {
    /// From the text of a key file: one or two keys in base64, one a line.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let keys = text
            .split_whitespace()
            .enumerate()
            .map(|(at, word)| {
                let bytes = base64::engine::general_purpose::STANDARD
                    .decode(word)
                    .with_context(|| format!("gossip key {} is no base64", at + 1))?;
                let bytes: [u8; KEY_LENGTH] = bytes.try_into().map_err(|bytes: Vec<u8>| {
                    anyhow::anyhow!(
                        "gossip key {} has {} bytes, not {KEY_LENGTH}: make one with `head -c 32 /dev/urandom | base64`",
                        at + 1,
                        bytes.len()
                    )
                })?;
                Ok(Key(bytes))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        if keys.is_empty() || keys.len() > 2 {
            bail!(
                "{} gossip keys given: one, or two during a rotation, one a line",
                keys.len()
            );
        }
        Ok(Self(keys))
    }

    /// The key that encrypts and signs.
    pub fn primary(&self) -> &Key {
        &self.0[0]
    }

    /// All keys that are accepted, the primary first.
    pub fn all(&self) -> &[Key] {
        &self.0
    }
}

/// Where the keys come from.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// A file, read again when it changes.
    File(PathBuf),
    /// Given once.
    Text(String),
}

impl KeySource {
    /// Reads the keys.
    pub fn read(&self) -> anyhow::Result<Keys> {
        match self {
            Self::File(path) => {
                let text = std::fs::read_to_string(path).with_context(|| {
                    format!("cannot read the gossip keys in {}", path.display())
                })?;
                Keys::parse(&text).with_context(|| format!("in {}", path.display()))
            }
            Self::Text(text) => Keys::parse(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

    #[test]
    fn one_or_two_keys_of_the_right_length() {
        assert_eq!(Keys::parse(A).unwrap().all().len(), 1);
        assert_eq!(Keys::parse(&format!("{A}\n{A}\n")).unwrap().all().len(), 2);
        for text in ["", "AAAA", "not base64!", &[A, A, A].join("\n")] {
            assert!(Keys::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nothing_prints_a_key() {
        let keys = Keys::parse(A).unwrap();
        assert!(!format!("{keys:?}").contains("AAAA"));
    }
}
