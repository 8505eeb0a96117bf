//! What a node has put on its wires, seen from the switch: who sent it to whom, every frame. And what of anybody's has
//! arrived outside.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use landfall_lab::{Lab, Mac, Netns, Nic};
use serde_json::Value;

/// The destination of frames that no bridge forwards.
pub(super) const NOWHERE: Mac = Mac([1, 0x80, 0xc2, 0, 0, 0x0e]);

/// A frame's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Frame {
    pub(super) to: Mac,
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
}

/// A tap at the switch's ports of a node.
pub(super) struct Wire {
    switch: Netns,
    remote: Netns,
}

impl Wire {
    pub(super) fn tap(lab: &Lab, node: &str) -> Self {
        let mut script = String::from("add table netdev wire\n");
        for (suffix, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
            let _ = writeln!(
                script,
                "add set netdev wire seen{suffix} {{ type ether_addr . {kind} . {kind}; flags dynamic; size 65535; }}"
            );
        }
        for nic in lab.topology().nics().filter(|nic| *nic != Nic::Mgmt0) {
            let port = format!("{node}-{}", nic.name());
            let _ = write!(
                script,
                "add chain netdev wire {port} {{ type filter hook ingress device {port} priority -500; }}\n\
                 add rule netdev wire {port} add @seen4 {{ ether daddr . ip saddr . ip daddr }}\n\
                 add rule netdev wire {port} add @seen6 {{ ether daddr . ip6 saddr . ip6 daddr }}\n"
            );
        }
        lab.switch().nft(&script).unwrap();
        lab.remote()
            .nft(
                "add table inet wire
                 add set inet wire seen4 { type ipv4_addr; flags dynamic; size 65535; }
                 add set inet wire seen6 { type ipv6_addr; flags dynamic; size 65535; }
                 add chain inet wire in { type filter hook prerouting priority raw; }
                 add rule inet wire in meta l4proto { tcp, udp } add @seen4 { ip saddr }
                 add rule inet wire in meta l4proto { tcp, udp } add @seen6 { ip6 saddr }
",
            )
            .unwrap();
        Self {
            switch: lab.switch().share(),
            remote: lab.remote().share(),
        }
    }

    /// All frames so far that went beyond the segments, each once.
    pub(super) fn outbound(&self) -> BTreeSet<Frame> {
        let mut frames = BTreeSet::new();
        for element in elements(&self.switch, "netdev") {
            let parts = element["concat"].as_array().unwrap();
            let text = |at: usize| parts[at].as_str().unwrap();
            frames.insert(Frame {
                to: text(0).parse().unwrap(),
                source: text(1).parse().unwrap(),
                destination: text(2).parse().unwrap(),
            });
        }
        frames.retain(|frame| is_remote(frame.destination));
        frames
    }

    /// By which addresses packets have arrived outside.
    pub(super) fn arrived(&self) -> BTreeSet<IpAddr> {
        let elements = elements(&self.remote, "inet");
        elements
            .iter()
            .map(|element| element.as_str().unwrap().parse().unwrap())
            .collect()
    }

    /// Forgets what it has seen.
    pub(super) fn clear(&self) {
        for (netns, family) in [(&self.switch, "netdev"), (&self.remote, "inet")] {
            let script = ["seen4", "seen6"].map(|set| format!("flush set {family} wire {set}\n"));
            netns.nft(&script.concat()).unwrap();
        }
    }
}

/// What is in both sets of a table.
fn elements(netns: &Netns, family: &str) -> Vec<Value> {
    let of = |set| {
        let printed = netns
            .exec(&format!("nft -j list set {family} wire {set}"))
            .unwrap();
        let listed: Value = serde_json::from_str(&printed).unwrap();
        let elements = listed["nftables"][1]["set"]["elem"].as_array();
        elements.cloned().unwrap_or_default()
    };
    [of("seen4"), of("seen6")].concat()
}

/// Whether an address is beyond the router.
fn is_remote(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[..2] == [10, 77],
        IpAddr::V6(v6) => v6.segments()[..2] == [0xfd00, 0x77],
    }
}
