//! What stands in for Cilium on a node: what pods send outside goes from their interfaces to the uplink past the packet filter,
//! with Cilium's mark; and maps with the keys that Cilium's have.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use landfall_ebpf_common::egress::judge::cilium::BORROWED;
use landfall_lab::Netns;

/// As large as Cilium's values are about.
pub(super) const VALUE: usize = 56;
/// An identity of Cilium's in the packet mark, which has both of our bits.
pub(super) const IDENTITY: u32 = 0x3fff_0f00;

/// Sends on what comes in by these interfaces of a node and is for the remote's networks: by an uplink, to its routers.
pub(super) fn pass_by(
    node: &Netns,
    links: &[String],
    uplink: &str,
    routers: [IpAddr; 2],
    mark: u32,
) {
    let mut script = String::from("add table netdev cilium\n");
    for link in links {
        let _ = writeln!(
            script,
            "add chain netdev cilium {link} {{ type filter hook ingress device {link} priority 0; }}"
        );
        for (family, net, router) in [
            ("ip", "10.77.0.0/16", routers[0]),
            ("ip6", "fd00:77::/32", routers[1]),
        ] {
            let _ = writeln!(
                script,
                "add rule netdev cilium {link} {family} daddr {net} meta mark set {mark:#x} fwd {family} to {router} device {uplink}"
            );
        }
    }
    node.nft(&script).unwrap();
}

/// Makes the maps, in a directory that is there; what they have for maps already is made anew.
pub(super) fn mk_maps(node: &Netns, directory: &Path) {
    for borrowed in BORROWED {
        let path = directory.join(borrowed.pin);
        let _ = std::fs::remove_file(&path);
        node.exec(&format!(
            "bpftool map create {} type lru_hash key {} value {VALUE} entries 1024 name cilium",
            path.display(),
            borrowed.key
        ))
        .unwrap();
    }
}
