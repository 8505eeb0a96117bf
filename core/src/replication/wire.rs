//! What a gateway and its standby say to each other: a version byte, then the message in postcard.

use serde::{Deserialize, Serialize};

use super::{Binding, Change, Position};
use crate::groups::GroupId;
use crate::model::NodeName;

/// The version of the encoding; another is refused.
const VERSION: u8 = 1;
/// The longest message, in bytes: what a Noise transport message has room for, less its tag.
pub const MAX_MESSAGE: usize = 65_535 - 16;
const MAX_NAME: usize = 253;

/// A message between a gateway and its standby.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The first word of who calls.
    Hello {
        /// The standby's node.
        node: NodeName,
    },
    /// The standby wants a group's changes from here on; all bindings, if nothing is known, or no longer of use.
    Follow {
        /// The group.
        group: GroupId,
        /// What it knows.
        known: Option<Position>,
    },
    /// It wants them no longer.
    Unfollow {
        /// The group.
        group: GroupId,
    },
    /// The gateway does not lead the group.
    NotLeader {
        /// The group.
        group: GroupId,
    },
    /// All bindings follow, and changes between them from here on.
    Begin {
        /// The group.
        group: GroupId,
        /// The number of the first change that follows.
        position: Position,
    },
    /// Some of all bindings.
    Held {
        /// The group.
        group: GroupId,
        /// The bindings.
        bindings: Vec<Binding>,
    },
    /// That were all.
    End {
        /// The group.
        group: GroupId,
    },
    /// Changes, one number each.
    Changes {
        /// The group.
        group: GroupId,
        /// The number of the first.
        position: Position,
        /// The changes.
        changes: Vec<Change>,
    },
    /// The standby has done all before this.
    Applied {
        /// The group.
        group: GroupId,
        /// How far.
        position: Position,
    },
}

/// Why a message was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Another version of Landfall speaks another language.
    #[error(
        "unknown message version {0}: this node and its peer run versions of Landfall that do not fit"
    )]
    Version(u8),
    /// It cannot be read, or says what no speaker says.
    #[error("malformed message")]
    Malformed,
}

impl Message {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![VERSION])
            .expect("writing plain data to a growing buffer cannot fail")
    }

    /// From bytes, with its sizes and addresses checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let (version, rest) = bytes.split_first().ok_or(MessageError::Malformed)?;
        if *version != VERSION {
            return Err(MessageError::Version(*version));
        }
        if rest.len() >= MAX_MESSAGE {
            return Err(MessageError::Malformed);
        }
        let (message, left): (Self, _) =
            postcard::take_from_bytes(rest).map_err(|_| MessageError::Malformed)?;
        if left.is_empty() && message.is_sound() {
            Ok(message)
        } else {
            Err(MessageError::Malformed)
        }
    }

    fn is_sound(&self) -> bool {
        let named = |group: &GroupId| !group.is_empty() && group.len() <= MAX_NAME;
        match self {
            Self::Hello { node } => named(&node.0),
            Self::Follow { group, .. }
            | Self::Unfollow { group }
            | Self::NotLeader { group }
            | Self::Begin { group, .. }
            | Self::End { group }
            | Self::Applied { group, .. } => named(group),
            Self::Held { group, bindings } => {
                named(group) && bindings.iter().all(Binding::is_sound)
            }
            Self::Changes {
                group,
                position,
                changes,
            } => {
                let count = u64::try_from(changes.len()).unwrap_or(u64::MAX);
                named(group)
                    && position.next.checked_add(count).is_some()
                    && changes.iter().all(|change| match change {
                        Change::New(binding) | Change::Closed(binding) => binding.is_sound(),
                    })
            }
        }
    }
}
