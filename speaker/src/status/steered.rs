//! The condition `Steered`: whether every node passes packets on, and what to do where one does not.

use landfall_api::conditions::steered;
use landfall_core::groups::Group;

use super::{Condition, bounded};
use crate::elector::Speaker;

/// Of an address that somebody leads.
pub(super) fn steered(speaker: &Speaker, group: &Group) -> Condition {
    if !group.steers() {
        return Condition {
            holds: false,
            reason: steered::STEERING_OFF,
            message:
                "an L2Advertisement says `steering: Off`: the leader takes all packets, and connections end with it"
                    .to_owned(),
        };
    }
    let hindered = speaker.hindered().iter();
    let nodes = bounded(
        hindered
            .map(|(node, why)| format!("{node}: {why}"))
            .collect(),
    );
    match nodes {
        Some(nodes) => Condition {
            holds: false,
            reason: steered::NODES_CANNOT_STEER,
            message: format!(
                "some nodes only announce, and lead only where no other node can: mend what is said of each, its \
                 speaker tries again by itself; {nodes}"
            ),
        },
        None => Condition {
            holds: true,
            reason: steered::ALL_NODES_STEER,
            message: String::new(),
        },
    }
}
