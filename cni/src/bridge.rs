//! The bridge that pods are at, if there is one: its pods are told when its Ethernet address changes.
//!
//! The first pods of a node's start are made at once. Each call of CNI's `bridge` plugin sets the bridge's address to what it
//! was when that call began, so that it changes under pods which run already, and these send to the old one until their
//! kernel asks again: half a minute. The node drops that. With `br_netfilter` it is worse (seen with Linux 6.18, without
//! Landfall too): the frame was tracked before it is dropped, as a connection that nothing translates. What is sent of it
//! later, to the right address, leaves the node with the pod's own, and gets no answer.

use std::fs;
use std::io;
use std::path::Path;

/// What makes the kernel say it: by gratuitous ARP (RFC 5227, 2.3), by unsolicited advertisements (RFC 4861, 7.2.6).
const SETTINGS: [(&str, &str); 2] = [("ipv4", "arp_notify"), ("ipv6", "ndisc_notify")];

/// Has the kernel tell everybody at an interface of the node when its Ethernet address changes.
///
/// # Errors
/// Settings of the kernel cannot be written. That there is no such interface, or not that family, is none.
pub fn announce_changes(interface: &str) -> io::Result<()> {
    if interface.contains('/') || interface.starts_with('.') {
        return Ok(()); // No interface has such a name.
    }
    for (family, key) in SETTINGS {
        let path = Path::new("/proc/sys/net").join(family).join("conf");
        match fs::write(path.join(interface).join(key), "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
