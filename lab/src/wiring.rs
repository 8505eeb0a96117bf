//! Links, addresses and routes.

use std::fmt::Write;

use crate::address::{self, CLIENT, Network, OBSERVER, ROUTER};
use crate::error::Result;
use crate::lab::{Lab, Node};
use crate::netns::Netns;
use crate::topology::{Nic, PodLinks};

/// The bridge of the LAN.
pub(crate) const LAN: &str = "br-lan";
/// A bridge nobody else is on: where a port in the wrong VLAN ends.
pub(crate) const ISOLATED: &str = "br-iso";
/// The bridge of the second LAN.
pub(crate) const SECOND_LAN: &str = "br-lan2";
/// The bridge of the management network.
pub(crate) const MANAGEMENT: &str = "br-mgmt";

/// Snooping with a querier, IGMP and MLD, at the shortest times the kernel takes: a switch as in a rack, which
/// sends a multicast frame only where a listener has reported itself.
const SNOOPING: &str = "mcast_snooping 1 mcast_querier 1 mcast_mld_version 2 \
    mcast_query_response_interval 100 mcast_query_interval 1000 mcast_startup_query_interval 100";

impl Nic {
    /// The network it is on.
    pub(crate) fn network(self) -> Network {
        match self {
            Self::Eth0 => Network::Lan,
            Self::Eth1 => Network::SecondLan,
            Self::Mgmt0 => Network::Management,
        }
    }

    /// The switch's bridge it is plugged into.
    pub(crate) fn bridge(self) -> &'static str {
        match self {
            Self::Eth0 => LAN,
            Self::Eth1 => SECOND_LAN,
            Self::Mgmt0 => MANAGEMENT,
        }
    }
}

/// The name of the switch's port that a node's NIC is plugged into.
pub(crate) fn port(node: &str, nic: Nic) -> String {
    format!("{node}-{}", nic.name())
}

/// A cable from a host to the switch.
pub(crate) struct Plug<'a> {
    /// The switch's port.
    pub(crate) port: &'a str,
    /// The bridge it belongs to.
    pub(crate) bridge: &'a str,
    /// The host's interface.
    pub(crate) nic: &'a str,
    /// The network the host gets its addresses in.
    pub(crate) network: Network,
    /// Its number there.
    pub(crate) host: u8,
}

/// Lays a cable and gives the host's end its addresses.
pub(crate) fn plug(lab: &Lab, host: &Netns, plug: &Plug<'_>) -> Result<()> {
    let Plug {
        port, bridge, nic, ..
    } = plug;
    let mtu = lab.topology.mtu;
    lab.switch.ip_batch(&format!(
        "link add name {port} mtu {mtu} type veth peer name {nic} mtu {mtu} address {mac} netns {netns}\n\
         link set {port} master {bridge} up\n",
        mac = plug.network.mac(plug.host),
        netns = host.name(),
    ))?;
    host.ip_batch(&addresses(nic, plug.network, plug.host))
}

/// Commands that bring a NIC up with its addresses; they may be repeated.
fn addresses(nic: &str, network: Network, host: u8) -> String {
    format!(
        "link set {nic} up\naddress replace {v4}/24 brd + dev {nic}\naddress replace {v6}/64 dev {nic} nodad\n",
        v4 = network.v4(host),
        v6 = network.v6(host),
    )
}

/// Builds everything but the namespaces.
pub(crate) fn wire(lab: &Lab) -> Result<()> {
    lab.switch.bridge(LAN, SNOOPING)?;
    lab.switch.bridge(ISOLATED, "")?;
    lab.switch.bridge(SECOND_LAN, SNOOPING)?;
    lab.switch.bridge(MANAGEMENT, SNOOPING)?;
    for (host, port, bridge, nic, network, number) in [
        (&lab.client, "client", LAN, "eth0", Network::Lan, CLIENT),
        (
            &lab.observer,
            "observer",
            LAN,
            "eth0",
            Network::Lan,
            OBSERVER,
        ),
        (&lab.router, "router", LAN, "eth0", Network::Lan, ROUTER),
        (
            &lab.router,
            "router-lan2",
            SECOND_LAN,
            "eth2",
            Network::SecondLan,
            ROUTER,
        ),
    ] {
        let cable = Plug {
            port,
            bridge,
            nic,
            network,
            host: number,
        };
        plug(lab, host, &cable)?;
    }
    lab.router.enable_forwarding()?;
    let mtu = lab.topology.mtu;
    lab.router.ip(&format!(
        "link add name eth1 mtu {mtu} address {} type veth peer name eth0 mtu {mtu} address {} netns {}",
        Network::Remote.mac(ROUTER),
        Network::Remote.mac(CLIENT),
        lab.remote.name(),
    ))?;
    lab.router
        .ip_batch(&addresses("eth1", Network::Remote, ROUTER))?;
    lab.remote
        .ip_batch(&addresses("eth0", Network::Remote, CLIENT))?;
    for (host, network) in [
        (&lab.client, Network::Lan),
        (&lab.observer, Network::Lan),
        (&lab.remote, Network::Remote),
    ] {
        host.ip_batch(&default_route(network, "eth0"))?;
    }
    for node in &lab.nodes {
        node.netns.enable_forwarding()?;
        for nic in lab.topology.nics() {
            let cable = Plug {
                port: &port(&node.name, nic),
                bridge: nic.bridge(),
                nic: nic.name(),
                network: nic.network(),
                host: address::node_host(node.index),
            };
            plug(lab, &node.netns, &cable)?;
        }
        match lab.topology.pod_links {
            PodLinks::Bridge => pods_on_bridge(lab, node)?,
            PodLinks::PointToPoint => pods_on_links(lab, node)?,
        }
        if lab.topology.offloads {
            offloads(lab, node)?;
        }
    }
    for node in &lab.nodes {
        node.netns.ip_batch(&routes(lab, node))?;
    }
    Ok(())
}

fn default_route(network: Network, nic: &str) -> String {
    format!(
        "route replace default via {} dev {nic}\nroute replace default via {} dev {nic}\n",
        network.v4(ROUTER),
        network.v6(ROUTER),
    )
}

/// A node's bridge `cni0` and its pods behind it. Each may reach itself by way of the bridge (kubelet's
/// `hairpin-veth`), as one does that is a client of its own Service.
fn pods_on_bridge(lab: &Lab, node: &Node) -> Result<()> {
    let mtu = lab.topology.mtu;
    let [v4, v6] = address::pod_gateway(node.index);
    node.netns.bridge("cni0", "mcast_snooping 0")?;
    let mut inside =
        format!("address replace {v4}/24 brd + dev cni0\naddress replace {v6}/64 dev cni0 nodad\n");
    for (number, pod) in node.pods.iter().enumerate() {
        let _ = write!(
            inside,
            "link add name veth{number} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}\n\
             link set veth{number} master cni0 up\n\
             link set veth{number} type bridge_slave hairpin on\n",
            pod.netns.name()
        );
    }
    node.netns.ip_batch(&inside)?;
    for pod in &node.pods {
        let [pod_v4, pod_v6] = pod.addresses;
        pod.netns.ip_batch(&format!(
            "link set eth0 up\naddress add {pod_v4}/24 brd + dev eth0\naddress add {pod_v6}/64 dev eth0 nodad\n\
             route add default via {v4} dev eth0\nroute add default via {v6} dev eth0\n"
        ))?;
    }
    Ok(())
}

/// A node's pods, each on a link of its own: the gateways are nobody's address in IPv4, whose owner every node says it
/// is, and the link's own in IPv6.
fn pods_on_links(lab: &Lab, node: &Node) -> Result<()> {
    let mtu = lab.topology.mtu;
    for (number, pod) in node.pods.iter().enumerate() {
        let [pod_v4, pod_v6] = pod.addresses;
        let link = format!("veth{number}");
        node.netns.ip_batch(&format!(
            "link add name {link} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}\n\
             link set {link} up\n\
             address add fe80::1/64 dev {link} nodad\n\
             route add {pod_v4}/32 dev {link} scope link\n\
             route add {pod_v6}/128 dev {link}\n",
            pod.netns.name()
        ))?;
        let of_link = |kind: &str, key: &str| format!("net.ipv4.{kind}.{link}.{key}");
        node.netns.sysctl(&of_link("conf", "proxy_arp"), "1")?;
        node.netns.sysctl(&of_link("neigh", "proxy_delay"), "0")?;
        pod.netns.ip_batch(&format!(
            "link set eth0 up\naddress add {pod_v4}/32 dev eth0\naddress add {pod_v6}/128 dev eth0 nodad\n\
             route add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1 dev eth0\n\
             route add default via fe80::1 dev eth0\n"
        ))?;
    }
    Ok(())
}

/// Commands for all routes of a node; they may be repeated.
fn routes(lab: &Lab, node: &Node) -> String {
    let nic = lab.topology.default_route;
    let mut lines = default_route(nic.network(), nic.name());
    let internal = lab.topology.internal_nic();
    for peer in lab.nodes.iter().filter(|peer| peer.index != node.index) {
        for (cidr, via) in address::pod_cidrs(peer.index)
            .into_iter()
            .zip(peer.addresses(internal.network()))
        {
            let _ = writeln!(
                lines,
                "route replace {cidr} via {via} dev {}",
                internal.name()
            );
        }
    }
    lines
}

/// Brings a node's links back to how [`wire`] made them.
pub(crate) fn rewire(lab: &Lab, node: &Node) -> Result<()> {
    let mut inside = String::new();
    let mut switch = String::new();
    for nic in lab.topology.nics() {
        let host = address::node_host(node.index);
        let _ = writeln!(
            switch,
            "link set {} master {} up",
            port(&node.name, nic),
            nic.bridge()
        );
        inside += &addresses(nic.name(), nic.network(), host);
    }
    lab.switch.ip_batch(&switch)?;
    node.netns.ip_batch(&inside)?;
    node.netns.ip_batch(&routes(lab, node))
}

/// Makes the node's links aggregate as NICs do.
fn offloads(lab: &Lab, node: &Node) -> Result<()> {
    for nic in lab.topology.nics() {
        lab.switch
            .exec(&format!("ethtool -K {} tso off", port(&node.name, nic)))?;
        node.netns
            .exec(&format!("ethtool -K {} gro on", nic.name()))?;
        // The timeout is in sysfs only, and sysfs shows the namespace it was mounted in.
        crate::tool::run(std::process::Command::new("ip").args([
            "netns",
            "exec",
            node.netns.name(),
            "sh",
            "-c",
            &format!(
                "echo 20000 > /sys/class/net/{}/gro_flush_timeout",
                nic.name()
            ),
        ]))?;
    }
    Ok(())
}
