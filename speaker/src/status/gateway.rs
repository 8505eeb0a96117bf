//! The condition `GatewayReady`: whether who leads an address that pods leave by is their gateway already.

use landfall_api::conditions::gateway_ready;
use landfall_core::groups::Group;

use super::{Condition, bounded};
use crate::elector::Speaker;

/// Of an address that this node leads; nothing if no pods leave by it.
pub(super) fn ready(speaker: &Speaker, group: &Group) -> Option<Condition> {
    if group.egress.is_empty() {
        return None;
    }
    let unsettled = speaker.unsettled(group);
    let policies = bounded(unsettled.map(ToString::to_string).collect());
    Some(match policies {
        None => Condition {
            holds: true,
            reason: gateway_ready::IN_FORCE,
            message: String::new(),
        },
        Some(policies) => Condition {
            holds: false,
            reason: gateway_ready::NOT_IN_FORCE,
            message: format!(
                "gateway {} is not ready yet: {}; packets of these policies' pods are dropped meanwhile: {policies}",
                speaker.election().me(),
                speaker.why_unsettled(),
            ),
        },
    })
}
