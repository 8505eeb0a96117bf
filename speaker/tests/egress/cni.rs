//! What stands in for a CNI's masquerade: pods leave as their node.

use std::fmt::Write as _;
use std::net::SocketAddr;

use landfall_lab::Netns;

/// By what the rule is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cni {
    Nftables,
    IptablesNft,
    IptablesLegacy,
}

impl Cni {
    /// Does it beside each of them.
    pub(super) fn each(test: impl Fn(Self)) {
        for cni in [Self::Nftables, Self::IptablesNft, Self::IptablesLegacy] {
            println!("beside {cni:?}");
            test(cni);
        }
    }

    fn tables(self) -> Option<[&'static str; 2]> {
        match self {
            Self::Nftables => None,
            Self::IptablesNft => Some(["iptables-nft", "ip6tables-nft"]),
            Self::IptablesLegacy => Some(["iptables-legacy", "ip6tables-legacy"]),
        }
    }

    /// Makes the rules, for both families.
    pub(super) fn masquerade(self, node: &Netns) {
        let pods = [
            ("10.244.1.0/24", "10.244.0.0/16"),
            ("fd00:244:1::/64", "fd00:244::/32"),
        ];
        let Some(tools) = self.tables() else {
            for ((own, all), (family, word)) in pods.into_iter().zip([("ip", "ip"), ("ip6", "ip6")])
            {
                node.nft(&format!(
                    "add table {family} cni\n\
                     add chain {family} cni post {{ type nat hook postrouting priority srcnat; }}\n\
                     add rule {family} cni post {word} saddr {own} {word} daddr != {all} masquerade\n"
                ))
                .unwrap();
            }
            return;
        };
        for ((own, all), tool) in pods.into_iter().zip(tools) {
            node.exec(&format!(
                "{tool} -t nat -A POSTROUTING -s {own} ! -d {all} -j MASQUERADE"
            ))
            .unwrap();
        }
    }

    /// Takes the rules away and makes them again, as a CNI's agent does now and then.
    pub(super) fn resync(self, node: &Netns) {
        match self.tables() {
            None => node
                .nft("delete table ip cni\ndelete table ip6 cni\n")
                .unwrap(),
            Some(tools) => {
                for tool in tools {
                    node.exec(&format!("{tool} -t nat -F POSTROUTING")).unwrap();
                }
            }
        }
        self.masquerade(node);
    }

    /// Makes the rules again that a flush of all nftables rules has taken.
    pub(super) fn resync_what_is_left(self, node: &Netns) {
        match self {
            Self::Nftables | Self::IptablesNft => self.masquerade(node),
            Self::IptablesLegacy => {} // No part of nftables.
        }
    }

    /// Translates as kube-proxy does; `hide` as it does for Services whose endpoints are on other nodes too.
    pub(super) fn deliver(
        self,
        node: &Netns,
        from: [SocketAddr; 2],
        to: [SocketAddr; 2],
        hide: bool,
    ) {
        let ways = from.into_iter().zip(to);
        let Some(tools) = self.tables() else {
            let mut script = String::from(
                "add table inet proxy
                 add chain inet proxy pre { type nat hook prerouting priority dstnat; }
                 add chain inet proxy post { type nat hook postrouting priority srcnat; }
",
            );
            for ((from, to), family) in ways.zip(["ip", "ip6"]) {
                let (ip, port, endpoint) = (from.ip(), from.port(), to.ip());
                let _ = writeln!(
                    script,
                    "add rule inet proxy pre {family} daddr {ip} tcp dport {port} dnat {family} to {to}"
                );
                if hide {
                    let _ = writeln!(
                        script,
                        "add rule inet proxy post {family} daddr {endpoint} ct status dnat masquerade"
                    );
                }
            }
            return node.nft(&script).unwrap();
        };
        for ((from, to), tool) in ways.zip(tools) {
            let (ip, port, endpoint) = (from.ip(), from.port(), to.ip());
            let rule = |chain: &str, rule: &str| {
                node.exec(&format!("{tool} -t nat -A {chain} {rule}"))
                    .unwrap();
            };
            rule(
                "PREROUTING",
                &format!("-d {ip} -p tcp --dport {port} -j DNAT --to-destination {to}"),
            );
            if hide {
                rule(
                    "POSTROUTING",
                    &format!("-d {endpoint} -m conntrack --ctstate DNAT -j MASQUERADE"),
                );
            }
        }
    }

    /// Lets the forward hook drop what a port of the outside is asked by.
    pub(super) fn forbid(self, node: &Netns, port: u16) {
        let Some(tools) = self.tables() else {
            return node
                .nft(&format!(
                    "add table inet forbids\n\
                     add chain inet forbids forward {{ type filter hook forward priority filter; }}\n\
                     add rule inet forbids forward tcp dport {port} counter drop\n"
                ))
                .unwrap();
        };
        for tool in tools {
            node.exec(&format!("{tool} -I FORWARD -p tcp --dport {port} -j DROP"))
                .unwrap();
        }
    }

    /// Lets the forward hook drop what connection tracking calls invalid.
    pub(super) fn forbid_invalid(self, node: &Netns) {
        let Some(tools) = self.tables() else {
            return node
                .nft(
                    "add table inet strict\n\
                     add chain inet strict forward { type filter hook forward priority filter; }\n\
                     add rule inet strict forward ct state invalid counter drop\n",
                )
                .unwrap();
        };
        for tool in tools {
            node.exec(&format!(
                "{tool} -I FORWARD -m conntrack --ctstate INVALID -j DROP"
            ))
            .unwrap();
        }
    }
}
