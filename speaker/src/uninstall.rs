//! Taking away what a speaker leaves on its node.

use std::path::Path;

use anyhow::Context as _;

use crate::{datapath, node_rules};

/// Removes programs, maps, pins, the nftables table, the policy routes and the tunnel of this node, and says what was there.
/// Each part is tried, also if another fails. It is no error if nothing is there.
pub async fn uninstall(pin_dir: &Path) -> anyhow::Result<String> {
    let rules = node_rules::remove(&node_rules::Config::default())
        .await
        .context("the nftables table, the policy routes or the tunnel are still there");
    let removed = datapath::uninstall(pin_dir).with_context(|| {
        format!(
            "{} is still there: run this as root where the speaker ran, with its --bpf-pin-dir",
            pin_dir.display()
        )
    });
    rules?;
    let datapath::Removed {
        links,
        maps,
        filters,
        qdiscs,
    } = removed?;
    Ok(format!(
        "eBPF links: {links} removed\neBPF maps: {maps} removed\nclsact filters: {filters} removed\n\
         clsact qdiscs: {qdiscs} removed\n\
         nftables table, policy routes and tunnel: gone"
    ))
}
