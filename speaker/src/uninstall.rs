//! Taking away what a speaker leaves on its node.

use anyhow::Context as _;

use crate::args::{PluginArgs, UninstallArgs};
use crate::{datapath, node_rules};

/// Removes programs, maps, pins, the nftables table, the policy routes, the tunnel and the CNI plugin of this node, and
/// says what was there. Each part is tried, also if another fails. It is no error if nothing is there.
pub async fn uninstall(args: &UninstallArgs) -> anyhow::Result<String> {
    let pin_dir = &args.pins.bpf_pin_dir;
    // First, so that it does not load the table again.
    let plugin = plugin(&args.plugin).context("the CNI plugin is still there");
    let rules = node_rules::remove(&node_rules::Config::default())
        .await
        .context("the nftables table, the policy routes or the tunnel are still there");
    let removed = datapath::uninstall(pin_dir).with_context(|| {
        format!(
            "{} is still there: run this as root where the speaker ran, with its --bpf-pin-dir",
            pin_dir.display()
        )
    });
    let plugin = plugin?;
    rules?;
    let datapath::Removed {
        links,
        maps,
        filters,
        qdiscs,
    } = removed?;
    Ok(format!(
        "{plugin}eBPF links: {links} removed\neBPF maps: {maps} removed\nclsact filters: {filters} removed\n\
         clsact qdiscs: {qdiscs} removed\n\
         nftables table, policy routes and tunnel: gone"
    ))
}

/// Takes the CNI plugin away where it is said to be, and what it would load.
fn plugin(args: &PluginArgs) -> anyhow::Result<String> {
    let mut said = String::new();
    if let Some(chain) = args.chain() {
        let done = chain.remove()?;
        let program = if done.program { "removed" } else { "none" };
        let lists = done.lists.len();
        said = format!("CNI plugin: program {program}, taken out of {lists} lists\n");
    }
    if let Some(boot) = &args.egress_boot_file {
        node_rules::remove_boot(boot).with_context(|| boot.display().to_string())?;
    }
    Ok(said)
}
