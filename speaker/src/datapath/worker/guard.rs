//! Where the guard is: at the interfaces to the outside, while there are policies.

use std::collections::{BTreeMap, BTreeSet};

use super::{Task, count_restored, interface_name, lock};

impl Task {
    /// Attaches the guard where pods leave, while there are policies. Before all is known it stays where an earlier process
    /// has left it.
    pub(super) fn guard(&mut self) {
        let Some(uplink) = self.uplink.as_mut() else {
            return;
        };
        let nowhere = BTreeSet::new();
        let wanted = match &self.wanted.egress {
            Some(leaving) => &leaving.outside,
            None if self.wanted.complete => &nowhere,
            None => return,
        };
        for gone in uplink.guarded().difference(wanted) {
            uplink.unguard(*gone);
        }
        let mut unguarded = BTreeMap::new();
        for interface in wanted {
            match uplink.guard(*interface) {
                Ok(Some(restored)) => count_restored(&self.metrics, *interface, restored),
                Ok(None) => {}
                Err(error) => {
                    unguarded.insert(*interface, error.to_string());
                }
            }
        }
        let mut said = lock(&self.shared.unguarded);
        if unguarded != *said {
            for (interface, reason) in &unguarded {
                let interface = interface_name(*interface);
                if uplink.judges().is_some() {
                    tracing::error!(
                        interface,
                        reason,
                        "nobody judges what leaves by this uplink: pods leave by it as if there were no egress policies"
                    );
                } else {
                    tracing::warn!(
                        interface,
                        reason,
                        "no guard at this uplink: if the packet filter's rules are taken away, pods leave by it unjudged"
                    );
                }
            }
            *said = unguarded;
        }
    }
}
