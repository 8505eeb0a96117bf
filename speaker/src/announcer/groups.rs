//! Membership in the solicited-node groups of announced VIPs, as a host that has the addresses would join them.
//!
//! The joins go through the kernel's IPv6 stack, so that MLD reports go out and are repeated when asked for: a
//! switch that snoops sends a solicitation only where a listener has reported itself.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv6Addr;

use socket2::{Domain, Protocol, Socket, Type};

use super::frame::solicited_node;

/// Groups a socket. The kernel bounds them by the memory for socket options: some 365 at older defaults.
const GROUPS_PER_SOCKET: usize = 128;

/// A group on an interface.
type Key = (u32, Ipv6Addr);

/// The groups this node is a member of.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// Which addresses want each group: those that end alike share one.
    wanted: BTreeMap<Key, BTreeSet<Ipv6Addr>>,
    /// Which of them are joined, and by which socket.
    joined: BTreeMap<Key, usize>,
    /// Never bound, so nothing is queued on them.
    sockets: Vec<(Socket, usize)>,
}

impl Groups {
    /// Joins the group of an address.
    pub(super) fn join(&mut self, interface: u32, address: Ipv6Addr) -> io::Result<()> {
        let key = (interface, solicited_node(address));
        self.wanted.entry(key).or_default().insert(address);
        if self.joined.contains_key(&key) {
            return Ok(());
        }
        self.enter(key)
    }

    /// Leaves the group of an address, unless another address still wants it.
    pub(super) fn leave(&mut self, interface: u32, address: Ipv6Addr) -> io::Result<()> {
        let key = (interface, solicited_node(address));
        let Some(addresses) = self.wanted.get_mut(&key) else {
            return Ok(());
        };
        addresses.remove(&address);
        if !addresses.is_empty() {
            return Ok(());
        }
        self.wanted.remove(&key);
        let Some(index) = self.joined.remove(&key) else {
            return Ok(());
        };
        let (socket, count) = &mut self.sockets[index];
        *count -= 1;
        socket.leave_multicast_v6(&key.1, key.0)
    }

    /// Joins what could not be joined before, for example since the interface had no IPv6.
    pub(super) fn retry(&mut self) -> io::Result<()> {
        let missing: Vec<Key> = self
            .wanted
            .keys()
            .filter(|key| !self.joined.contains_key(key))
            .copied()
            .collect();
        let mut result = Ok(());
        for key in missing {
            let entered = self.enter(key);
            result = result.and(entered);
        }
        result
    }

    /// Forgets the memberships of an interface that is gone: the kernel has ended them.
    pub(super) fn forget(&mut self, interface: u32) {
        let gone: Vec<Key> = self
            .joined
            .keys()
            .filter(|key| key.0 == interface)
            .copied()
            .collect();
        for key in gone {
            if let Some(index) = self.joined.remove(&key) {
                let (socket, count) = &mut self.sockets[index];
                *count -= 1;
                // The socket's own list still has the entry; it is an error on some kernels that the link is gone.
                let _ = socket.leave_multicast_v6(&key.1, key.0);
            }
        }
    }

    fn enter(&mut self, key: Key) -> io::Result<()> {
        for (index, (socket, count)) in self.sockets.iter_mut().enumerate() {
            if *count >= GROUPS_PER_SOCKET {
                continue;
            }
            match socket.join_multicast_v6(&key.1, key.0) {
                Ok(()) => {
                    *count += 1;
                    self.joined.insert(key, index);
                    return Ok(());
                }
                // This socket's memory for options is used up: try another.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM)) => {}
                Err(error) => return Err(error),
            }
        }
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
        socket.join_multicast_v6(&key.1, key.0)?;
        self.sockets.push((socket, 1));
        self.joined.insert(key, self.sockets.len() - 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use landfall_lab::Netns;

    use super::*;

    fn mk_address(number: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 1, number)
    }

    fn mk_link(netns: &Netns) -> u32 {
        netns
            .ip_batch(
                "link add eth0 type veth peer name peer0\nlink set eth0 up\nlink set peer0 up\n",
            )
            .expect("veth links exist");
        netns.interface_index("eth0").expect("just made")
    }

    fn solicited(netns: &Netns) -> usize {
        netns
            .ip("-6 maddress show dev eth0")
            .expect("the link is there")
            .matches("ff02::1:ff01:")
            .count()
    }

    #[test]
    fn a_thousand_groups_are_joined_and_left() {
        let netns = Netns::create("groups").expect("namespaces need root");
        let interface = mk_link(&netns);
        let mut groups = Groups::default();
        netns.run(|| {
            for number in 0..1000 {
                groups.join(interface, mk_address(number)).expect("joined");
            }
        });
        assert_eq!(solicited(&netns), 1000);
        assert!(groups.sockets.len() >= 8);
        for number in 0..1000 {
            groups.leave(interface, mk_address(number)).expect("left");
        }
        assert_eq!(solicited(&netns), 0);
    }

    #[test]
    fn addresses_that_end_alike_share_a_group() {
        let netns = Netns::create("shared").expect("namespaces need root");
        let interface = mk_link(&netns);
        let other = Ipv6Addr::new(0xfd00, 0x89, 0, 0, 0, 0, 1, 7);
        let mut groups = Groups::default();
        netns.run(|| {
            groups.join(interface, mk_address(7)).expect("joined");
            groups.join(interface, other).expect("joined");
        });
        groups.leave(interface, mk_address(7)).expect("left");
        assert_eq!(solicited(&netns), 1);
        groups.leave(interface, other).expect("left");
        assert_eq!(solicited(&netns), 0);
    }
}
