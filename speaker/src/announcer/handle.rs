//! The announcer as the loop holds it: every call is a message to the task that does the work.

use std::net::IpAddr;

use tokio::sync::mpsc;

use super::{Announcement, Announcer, MacAddr};

/// What the loop asks of the task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Announce(Announcement),
    Withdraw(IpAddr),
    Reannounce(IpAddr),
    Listen(Vec<u32>),
    Hello(u32, Option<MacAddr>, Vec<u8>),
}

/// The announcer of this node. The task ends, and is silent, when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) commands: mpsc::UnboundedSender<Command>,
}

impl Handle {
    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::error!("the announcer has ended: nothing is announced by this node");
        }
    }
}

impl Announcer for Handle {
    fn announce(&self, announcement: Announcement) {
        self.send(Command::Announce(announcement));
    }

    fn withdraw(&self, vip: IpAddr) {
        self.send(Command::Withdraw(vip));
    }

    fn reannounce(&self, vip: IpAddr) {
        self.send(Command::Reannounce(vip));
    }

    fn listen(&self, interfaces: &[u32]) {
        self.send(Command::Listen(interfaces.to_vec()));
    }

    fn hello(&self, interface: u32, to: Option<MacAddr>, payload: &[u8]) {
        self.send(Command::Hello(interface, to, payload.to_vec()));
    }
}
