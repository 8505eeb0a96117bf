//! What is said between speakers, and how it is written: a version byte, then the frame in postcard.

use serde::{Deserialize, Serialize};

use landfall_ebpf_common::rendezvous::BUCKETS;

use super::peer::{BootId, HELD_PAGE, MAX_HINDRANCE, NodeRegister, Topic, Word};
use crate::model::NodeName;

/// The version of the encoding; another is refused and counted.
const VERSION: u8 = 2;
/// The longest frame that is taken, in bytes.
pub const MAX_FRAME: usize = 64 * 1024;
const MAX_NAME: usize = 253;
const MAX_WORDS: usize = 4096;
const MAX_INTERFACES: usize = 256;

/// How far somebody's registers are known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Whose.
    pub node: NodeName,
    /// Of which run.
    pub boot: BootId,
    /// Every change up to this version.
    pub version: u64,
}

/// A message between speakers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frame {
    /// All registers of a node that changed after version `from`, up to that of `mark`.
    Update {
        /// Whose registers, and the last version covered.
        mark: Mark,
        /// The version after which they changed.
        from: u64,
        /// The node's own register with its version, if it changed.
        node: Option<(u64, NodeRegister)>,
        /// The registers with their versions; nothing for one that is gone.
        words: Vec<(Topic, u64, Option<Word>)>,
    },
    /// Asks for what changed after these marks.
    Want {
        /// Who asks.
        from: NodeName,
        /// What it knows so far.
        marks: Vec<Mark>,
    },
    /// Tells what is known, so that the receiver may ask for what it lacks and send what it has.
    Known {
        /// Who tells.
        from: NodeName,
        /// What it knows.
        marks: Vec<Mark>,
    },
}

/// Why a frame was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another version of Landfall speaks another language.
    #[error("unknown frame version {0}")]
    Version(u8),
    /// It cannot be read, or is longer than anything a speaker sends.
    #[error("malformed frame")]
    Malformed,
}

impl Frame {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![VERSION])
            .expect("writing plain data to a growing buffer cannot fail")
    }

    /// From bytes, with its sizes checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let (version, rest) = bytes.split_first().ok_or(FrameError::Malformed)?;
        if *version != VERSION {
            return Err(FrameError::Version(*version));
        }
        if bytes.len() > MAX_FRAME {
            return Err(FrameError::Malformed);
        }
        let (frame, rest) =
            postcard::take_from_bytes::<Self>(rest).map_err(|_| FrameError::Malformed)?;
        if rest.is_empty() && frame.is_bounded() {
            Ok(frame)
        } else {
            Err(FrameError::Malformed)
        }
    }

    fn is_bounded(&self) -> bool {
        let name = |mark: &Mark| mark.node.0.len() <= MAX_NAME;
        match self {
            Self::Update {
                mark, node, words, ..
            } => {
                name(mark)
                    && words.len() <= MAX_WORDS
                    && words.iter().all(|(topic, _, word)| {
                        let named = match topic {
                            Topic::Group(id) => id.len() <= MAX_NAME,
                            Topic::Held(_, page) => u32::from(*page) < BUCKETS / HELD_PAGE,
                            Topic::Pod(key) => {
                                key.namespace.len() <= MAX_NAME && key.name.len() <= MAX_NAME
                            }
                        };
                        let sound = match word {
                            Some(Word::Held(page)) => page.0.keys().all(|word| *word < 16),
                            Some(Word::Pod(pod)) => pod.is_bounded(),
                            Some(Word::Group(_) | Word::Knows(_)) | None => true,
                        };
                        named && sound && word.as_ref().is_none_or(|word| word.suits(topic))
                    })
                    && node.as_ref().is_none_or(|(_, node)| {
                        let hindrance = node.hindrance.as_ref().map_or(0, |text| text.len());
                        node.interfaces.len() <= MAX_INTERFACES && hindrance <= MAX_HINDRANCE
                    })
            }
            Self::Want { from, marks } | Self::Known { from, marks } => {
                from.0.len() <= MAX_NAME && marks.len() <= MAX_WORDS && marks.iter().all(name)
            }
        }
    }
}
