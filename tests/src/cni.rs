//! What a CNI does besides making networks of pods.

use landfall_lab::Netns;

/// As a CNI does it: what its pods send outside leaves with the node's address.
pub fn masquerade(node: &Netns) -> landfall_lab::Result<()> {
    for (family, pods) in [("ip", "10.244.0.0/16"), ("ip6", "fd00:244::/32")] {
        for rule in [
            format!("add table {family} cni"),
            format!(
                "add chain {family} cni post {{ type nat hook postrouting priority srcnat ; }}"
            ),
            format!(
                "add rule {family} cni post {family} saddr {pods} {family} daddr != {pods} masquerade"
            ),
        ] {
            node.exec(&format!("nft {rule}"))?;
        }
    }
    Ok(())
}
