//! What the task does with what it hears: answers questions, notes claims.

use std::net::IpAddr;
use std::time::Duration;

use super::super::frame::{self, Claim, Heard, Question};
use super::super::metrics::FamilyLabel;
use super::super::packets::Inbound;
use super::super::{AnnouncerEvent, ProbeOutcome};
use super::Task;

/// An address's conflicts are reported at most once in this time.
const CONFLICT_PAUSE: Duration = Duration::from_secs(10);

impl Task {
    pub(super) fn hear(&mut self, inbound: Inbound) {
        match inbound {
            Inbound::Heard(interface, Heard { claim, question }) => {
                if let Some(claim) = claim {
                    self.claimed(interface, claim);
                }
                if let Some(question) = question {
                    self.asked(interface, question);
                }
            }
            Inbound::Hello(interface, from, payload) => {
                if !self.macs.contains(&from) && self.listening.contains(&interface) {
                    self.tell(AnnouncerEvent::Hello {
                        interface,
                        from,
                        payload,
                    });
                }
            }
            Inbound::Broken(interface, opening) => {
                let ours = self.sockets.get(&interface);
                if ours.is_some_and(|sockets| sockets.opening == opening) {
                    self.sockets.remove(&interface);
                    self.retry = Some(self.now() + super::RETRY);
                }
            }
        }
    }

    /// Answers, if the address is announced on this interface.
    fn asked(&mut self, interface: u32, question: Question) {
        if self.announced_on(question.target) != Some(interface) {
            return;
        }
        let label = FamilyLabel::of(question.target);
        self.metrics.asked.get_or_create(&label).inc();
        let Some(link) = self.links.get(&interface) else {
            return;
        };
        let (mac, to) = (link.interface.mac, question.asker);
        let answer = match (question.target, question.source) {
            (IpAddr::V4(vip), IpAddr::V4(source)) => frame::arp_reply(mac, vip, to, source),
            (IpAddr::V6(vip), IpAddr::V6(source)) => {
                let from = link.link_local.unwrap_or(vip);
                frame::advertisement(mac, from, vip, to, source)
            }
            _ => return, // no frame asks across the families
        };
        if self.send(interface, &answer) {
            self.metrics.answered.get_or_create(&label).inc();
        }
    }

    /// Somebody says to have an address: a conflict if it is ours, an answer if we probe for it.
    fn claimed(&mut self, interface: u32, Claim { address, by }: Claim) {
        if self.vips.get(&address) != Some(&interface) || self.macs.contains(&by) {
            return;
        }
        let now = self.now();
        if self.probes.contains(address) {
            if self.probes.claimed(address, by, now) {
                self.outbox.push_back(AnnouncerEvent::Probed {
                    vip: address,
                    outcome: ProbeOutcome::Taken { by },
                });
            }
            return;
        }
        self.metrics
            .conflicts
            .get_or_create(&FamilyLabel::of(address))
            .inc();
        let recent = self
            .conflicts
            .get(&address)
            .is_some_and(|at| now < *at + CONFLICT_PAUSE);
        if recent {
            return;
        }
        let Some(link) = self.links.get(&interface) else {
            return;
        };
        let event = AnnouncerEvent::Conflict {
            vip: address,
            by,
            interface: link.interface.name.clone(),
        };
        if self.tell(event) {
            self.conflicts.insert(address, now);
        }
    }

    /// Tells the loop what may get lost when it is busy: it will be told again.
    fn tell(&self, event: AnnouncerEvent) -> bool {
        self.events.try_send(event).is_ok()
    }
}
