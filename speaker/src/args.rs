//! The speaker's flags. Each that `--help` shows is also a `LANDFALL_…` variable.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use landfall_cni::chain::Chain;
use landfall_ebpf_common::egress::gateway::MAX_BINDINGS;
use landfall_runtime::args::KubeArgs;
use landfall_runtime::control;
use landfall_runtime::telemetry::LogArgs;

use crate::datapath::{COMPARE, Delivery};
use crate::keys::KeySource;
use crate::node_rules;

/// What `--help` shows after the flags.
const EXAMPLES: &str = "\
Examples:
  In a pod of the host's network, with its ServiceAccount:
    landfall-speaker --node-name \"$NODE_NAME\" --gossip-key-file /etc/landfall/gossip/keys

  Before there is a cluster, from a directory of the same YAML (the control plane's own address):
    landfall-speaker --manifests /etc/landfall/manifests --node-name cp-1 \\
      --gossip-address 192.0.2.11 --peers 192.0.2.12,192.0.2.13 --gossip-key-file /etc/landfall/keys

  A key for the gossip:
    head -c 32 /dev/urandom | base64

Look at it:
  curl -s localhost:7951/metrics
  curl -s localhost:7951/debug/state | jq .groups";

const UNINSTALL_EXAMPLES: &str = "\
Example, on each node, once the DaemonSet is gone:
  landfall-speaker uninstall

With the CNI plugin, in a container that sees the node's files at /host:
  landfall-speaker uninstall --cni-bin-dir /host/opt/cni/bin --cni-conf-dir /host/etc/cni/net.d \
    --egress-boot-file /host/var/lib/landfall/boot.nft

Exit codes: 0 nothing is left, 1 something could not be removed (the message says what), 2 usage.";

/// Landfall's speaker: elects who announces each virtual IP, and announces it.
#[derive(Clone, Debug, Parser)]
#[command(name = "landfall-speaker", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Args {
    /// How to reach the API server.
    #[command(flatten)]
    pub kube: KubeArgs,

    /// How to log.
    #[command(flatten)]
    pub log: LogArgs,

    /// The name of this node. [default: the host name]
    #[arg(long, env = "LANDFALL_NODE_NAME")]
    pub node_name: Option<String>,

    /// The namespace this speaker runs in. Nothing that it writes is there; taken so that both programs are
    /// started alike.
    #[arg(long, env = "LANDFALL_NAMESPACE", default_value = "landfall-system")]
    pub namespace: String,

    /// Take objects from the YAML files of this directory instead of an API server, and hand out addresses
    /// in this process.
    #[arg(
        long,
        env = "LANDFALL_MANIFESTS",
        value_name = "DIR",
        conflicts_with = "kubeconfig"
    )]
    pub manifests: Option<PathBuf>,

    /// With --manifests: where to remember which Service holds which address. Without it they are handed out
    /// anew at each start, in a fixed order.
    #[arg(
        long,
        env = "LANDFALL_STATE_DIR",
        value_name = "DIR",
        requires = "manifests"
    )]
    pub state_dir: Option<PathBuf>,

    /// With --manifests: whether Services without spec.loadBalancerClass are ours, besides those of class
    /// landfall.dev/l2.
    #[arg(
        long,
        env = "LANDFALL_CLASS_LESS",
        default_value_t = true,
        num_args = 0..=1,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub class_less: bool,

    /// The address to gossip at. [default: the `InternalIP` of this Node object]
    #[arg(long, env = "LANDFALL_GOSSIP_ADDRESS")]
    pub gossip_address: Option<IpAddr>,

    /// The port to gossip at, TCP and UDP; the same on every node.
    #[arg(long, env = "LANDFALL_GOSSIP_PORT", default_value_t = 7950)]
    pub gossip_port: u16,

    /// Other speakers, besides those on Node objects: addresses, with a port where it differs.
    #[arg(
        long,
        env = "LANDFALL_PEERS",
        value_delimiter = ',',
        value_name = "ADDRESS"
    )]
    pub peers: Vec<String>,

    /// A file with the gossip key: 32 bytes in base64. Two lines during a rotation: the first encrypts, both are
    /// accepted. Read again when it changes.
    #[arg(long, env = "LANDFALL_GOSSIP_KEY_FILE", value_name = "FILE")]
    pub gossip_key_file: Option<PathBuf>,

    /// The gossip key itself, if not from a file; better given as a variable than as a flag.
    #[arg(
        long,
        env = "LANDFALL_GOSSIP_KEY",
        hide_env_values = true,
        conflicts_with = "gossip_key_file"
    )]
    pub gossip_key: Option<String>,

    /// Where /metrics, /healthz, /readyz and /debug/state are served.
    #[arg(long, env = "LANDFALL_ADMIN_ADDRESS", default_value = "127.0.0.1:7951")]
    pub admin_address: SocketAddr,

    /// Where `landfall egress` reaches this speaker: a Unix socket that only root can open. Nowhere, if empty.
    #[arg(
        long,
        env = "LANDFALL_CONTROL_SOCKET",
        value_name = "FILE",
        default_value = control::SOCKET
    )]
    pub control_socket: PathBuf,

    /// Who gives packets that reached this node to its pods: kube-proxy, or this program itself (eBPF on the uplinks;
    /// clients' addresses are kept whatever externalTrafficPolicy says). The same on every node.
    #[arg(
        long,
        env = "LANDFALL_DELIVERY",
        value_enum,
        default_value_t = Delivery::KubeProxy
    )]
    pub delivery: Delivery,

    /// The UDP port of the tunnel to nodes that are not on a VIP's segment (VXLAN); the same on every node.
    #[arg(long, env = "LANDFALL_TUNNEL_PORT", default_value_t = 7952)]
    pub tunnel_port: u16,

    /// The TCP port at which a gateway of egress policies' pods hands copies of their flows to the node that would take
    /// over, on the gossip's address; the same on every node.
    #[arg(long, env = "LANDFALL_REPLICATION_PORT", default_value_t = 7953)]
    pub replication_port: u16,

    /// Whether answers from a VIP leave by the interface it is announced on, even if the route to the client is
    /// another one.
    #[arg(
        long,
        env = "LANDFALL_POLICY_ROUTES",
        default_value_t = true,
        num_args = 0..=1,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub policy_routes: bool,

    /// The router on an interface that carries no default route of its own, for those answers.
    #[arg(
        long,
        env = "LANDFALL_UPLINK_GATEWAY",
        value_delimiter = ',',
        value_name = "INTERFACE=ADDRESS",
        value_parser = parse_gateway
    )]
    pub uplink_gateway: Vec<(String, IpAddr)>,

    /// Two neighbouring bits of the packet mark that no CNI of the node uses: what pods send outside under an
    /// egress policy bears the low one once it was judged, and the high one if it goes to a gateway. The high one is
    /// used in the connection mark too.
    #[arg(
        long,
        env = "LANDFALL_EGRESS_MARK",
        default_value = "0x30000000",
        value_name = "BITS",
        value_parser = parse_mark
    )]
    pub egress_mark: u32,

    /// How many flows of egress policies' pods this node has room for at once as their gateway, of each family. A
    /// million take 225 MB for IPv4 and 290 MB for IPv6, as they come. Where an earlier process has made the room it
    /// stays as it is until the last policy goes.
    #[arg(
        long,
        env = "LANDFALL_EGRESS_BINDINGS",
        default_value_t = MAX_BINDINGS,
        value_name = "NUMBER",
        value_parser = clap::value_parser!(u32).range(1024..=16_777_216)
    )]
    pub egress_bindings: u32,

    /// An interface whose driver is to send on by itself what belongs to other nodes, where it can (native XDP);
    /// may be repeated.
    #[arg(
        long,
        env = "LANDFALL_XDP",
        value_delimiter = ',',
        value_name = "INTERFACE"
    )]
    pub xdp: Vec<String>,

    /// Have egress policies in effect on this node: its pods leave by their addresses, and it can be their gateway.
    #[arg(long, env = "LANDFALL_EGRESS")]
    pub egress: bool,

    /// With --egress, on nodes with Cilium that masquerades by eBPF (`bpf.masquerade=true`): the directory where it pins its
    /// maps. What pods send is judged by a program then, at the uplinks, and no packet filter.
    #[arg(
        long,
        env = "LANDFALL_CILIUM",
        requires = "egress",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "/sys/fs/bpf/tc/globals",
        value_name = "DIRECTORY"
    )]
    pub cilium: Option<PathBuf>,

    /// With --egress: where the CNI plugin calls.
    #[arg(
        long,
        env = "LANDFALL_CNI_SOCKET",
        value_name = "SOCKET",
        default_value = landfall_cni::call::SOCKET
    )]
    pub cni_socket: PathBuf,

    /// With --egress: the CNI plugin.
    #[command(flatten)]
    pub plugin: PluginArgs,

    /// How often the flows are compared with connection tracking, in seconds. Hidden: only tests are in a hurry.
    #[arg(
        long,
        hide = true,
        value_name = "SECONDS",
        default_value_t = COMPARE.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub compare_every: u64,

    /// Where it pins.
    #[command(flatten)]
    pub pins: PinArgs,

    /// Something else to do than to run.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What a speaker does besides running.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Remove what a speaker leaves on this node when it stops: eBPF programs, maps and pins, the nftables table
    /// `inet landfall`, policy routes, the tunnel. Stop the speaker first: one that runs puts it all back. A clsact
    /// qdisc (kernels below 6.6) that was there before, or that others use, stays.
    #[command(after_help = UNINSTALL_EXAMPLES)]
    Uninstall(UninstallArgs),
}

/// What there may be to remove.
#[derive(Clone, Debug, clap::Args)]
pub struct UninstallArgs {
    /// Where it pinned.
    #[command(flatten)]
    pub pins: PinArgs,

    /// Where it put the CNI plugin.
    #[command(flatten)]
    pub plugin: PluginArgs,
}

/// The CNI plugin on the node.
#[derive(Clone, Debug, clap::Args)]
pub struct PluginArgs {
    /// Where the container runtime looks for programs of CNI plugins (/opt/cni/bin): the plugin is kept there.
    #[arg(
        long,
        env = "LANDFALL_CNI_BIN_DIR",
        value_name = "DIR",
        requires_all = ["cni_conf_dir", "egress_boot_file"]
    )]
    pub cni_bin_dir: Option<PathBuf>,

    /// Where it looks for lists of plugins (/etc/cni/net.d): the plugin is kept at the end of the one that it uses.
    #[arg(
        long,
        env = "LANDFALL_CNI_CONF_DIR",
        value_name = "DIR",
        requires = "cni_bin_dir"
    )]
    pub cni_conf_dir: Option<PathBuf>,

    /// Where the nftables script is left that the CNI plugin loads after this node's start, while no speaker judges pods;
    /// the same path for both.
    #[arg(long, env = "LANDFALL_EGRESS_BOOT_FILE", value_name = "FILE")]
    pub egress_boot_file: Option<PathBuf>,
}

impl PluginArgs {
    /// Where to keep the plugin, if it is to be kept.
    pub fn chain(&self) -> Option<Chain> {
        Some(Chain {
            programs: self.cni_bin_dir.clone()?,
            lists: self.cni_conf_dir.clone()?,
        })
    }
}

/// Where things outlive the process.
#[derive(Clone, Debug, clap::Args)]
pub struct PinArgs {
    /// Where eBPF programs and maps are pinned.
    #[arg(
        long,
        env = "LANDFALL_BPF_PIN_DIR",
        default_value = "/sys/fs/bpf/landfall",
        value_name = "DIR"
    )]
    pub bpf_pin_dir: PathBuf,
}

fn parse_gateway(text: &str) -> Result<(String, IpAddr), String> {
    let (interface, address) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not INTERFACE=ADDRESS, such as eth1=192.0.2.1"))?;
    let address = address
        .parse()
        .map_err(|_| format!("{address:?} is no IP address"))?;
    Ok((interface.to_owned(), address))
}

/// Two bits beside each other that are not those of the answers' routes.
fn parse_mark(text: &str) -> Result<u32, String> {
    let answers = node_rules::Config::default().mark_mask;
    let mark = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    mark.ok()
        .filter(|mark| *mark != 0 && mark >> mark.trailing_zeros() == 3 && mark & answers == 0)
        .ok_or_else(|| {
            format!("{text:?} is not two bits beside each other outside of {answers:#x}, such as 0x30000000")
        })
}

impl Args {
    /// Where the gossip keys come from.
    pub fn key_source(&self) -> anyhow::Result<KeySource> {
        match (&self.gossip_key_file, &self.gossip_key) {
            (Some(path), _) => Ok(KeySource::File(path.clone())),
            (None, Some(text)) => Ok(KeySource::Text(text.clone())),
            (None, None) => anyhow::bail!(
                "gossip must be encrypted: give a key with --gossip-key-file or in LANDFALL_GOSSIP_KEY; \
                 make one with `head -c 32 /dev/urandom | base64`"
            ),
        }
    }

    /// This node's name.
    pub fn node(&self) -> anyhow::Result<String> {
        if let Some(name) = &self.node_name {
            anyhow::ensure!(
                !name.is_empty() && name.len() <= 253,
                "--node-name must have 1 to 253 characters"
            );
            return Ok(name.clone());
        }
        nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .ok_or_else(|| anyhow::anyhow!("this host has no readable name: give --node-name"))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_are_well_formed_and_each_has_a_variable() {
        let command = Args::command();
        command.clone().debug_assert();
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
            let name = arg.get_long().expect("every flag has a long name");
            let variable = arg.get_env().and_then(|variable| variable.to_str());
            let expected = format!("LANDFALL_{}", name.replace('-', "_").to_uppercase());
            assert_eq!(variable, Some(expected.as_str()), "--{name}");
        }
    }

    #[test]
    fn a_mark_is_two_neighbours_of_its_own() {
        assert_eq!(parse_mark("0x30000000"), Ok(0x3000_0000));
        assert_eq!(parse_mark("0xc0000000"), Ok(0xc000_0000));
        assert_eq!(parse_mark("3"), Ok(3));
        for wrong in [
            "0",
            "0x10000000",
            "0x70000000",
            "0x3000",
            "0x1800",
            "0x50000000",
            "x",
        ] {
            assert!(parse_mark(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn gateways_are_interface_and_address() {
        assert!(parse_gateway("eth1=192.0.2.1").is_ok());
        assert!(
            parse_gateway("eth1")
                .unwrap_err()
                .contains("INTERFACE=ADDRESS")
        );
        assert!(
            parse_gateway("eth1=x")
                .unwrap_err()
                .contains("no IP address")
        );
    }
}
