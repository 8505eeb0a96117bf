//! Membership in memory: a hub that delivers at once, for tests of the loop under virtual time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use landfall_core::election::BootId;
use landfall_core::model::NodeName;
use tokio::sync::mpsc;

use super::{Expected, Membership, MembershipEvent};
use crate::keys::Keys;

type Seats = BTreeMap<NodeName, (BootId, mpsc::UnboundedSender<MembershipEvent>)>;

/// Where twins meet.
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Mutex<Seats>>);

/// One member of a [`Hub`].
#[derive(Debug)]
pub struct Twin {
    hub: Hub,
    node: NodeName,
}

impl Hub {
    fn seats(&self) -> MutexGuard<'_, Seats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a member; all learn of each other.
    pub fn join(
        &self,
        node: NodeName,
        boot: BootId,
    ) -> (Twin, mpsc::UnboundedReceiver<MembershipEvent>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut seats = self.seats();
        for (other, (run, theirs)) in seats.iter() {
            let _ = theirs.send(MembershipEvent::Alive {
                node: node.clone(),
                boot,
            });
            let _ = sender.send(MembershipEvent::Alive {
                node: other.clone(),
                boot: *run,
            });
        }
        seats.insert(node.clone(), (boot, sender));
        let hub = self.clone();
        (Twin { hub, node }, receiver)
    }

    /// A member is gone; the others are told.
    pub fn lose(&self, node: &NodeName) {
        let mut seats = self.seats();
        seats.remove(node);
        for (_, theirs) in seats.values() {
            let _ = theirs.send(MembershipEvent::Dead { node: node.clone() });
        }
    }
}

#[async_trait]
impl Membership for Twin {
    fn send(&self, to: Option<&NodeName>, frame: Bytes) {
        for (node, (_, seat)) in self.hub.seats().iter() {
            if *node != self.node && to.is_none_or(|to| to == node) {
                let _ = seat.send(MembershipEvent::Frame(frame.clone()));
            }
        }
    }

    fn expect(&self, _expected: Expected) {}

    fn rekey(&self, _keys: &Keys) {}

    async fn leave(&self, _within: Duration) {
        self.hub.lose(&self.node);
    }
}
