//! A node with pods under a policy, run by its own handles, and another node that is the gateway: a plain router that
//! translates to the policy's addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use landfall_core::model::NodeName;
use landfall_lab::server::PodServer;
use landfall_lab::{Lab, Mac, Netns, Network, Nic, Pod, PodLinks, Topology};
use landfall_speaker::datapath::{self, Change, DataPath, VipState};
use landfall_speaker::egress::{self, Egress, Gateway, PolicyName, Tenant};
use landfall_speaker::node_rules::{self, NodeRules as _, Rules};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::sync::oneshot;

use super::cilium;
use super::cni::Cni;
use super::wire::{NOWHERE, Wire};

/// What a busy machine can promise.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
pub(super) const NODE: &str = "node1";
pub(super) const GATEWAY: &str = "node2";
pub(super) const POLICY: &str = "mail";
/// The number of the addresses that the policy's pods leave by.
const EGRESS: u8 = 250;

/// What a lab is made of.
#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
pub(super) struct Plan {
    pub(super) cni: Cni,
    pub(super) pod_links: PodLinks,
    /// The policy's addresses are on the second LAN, and the default route is by the first.
    pub(super) second_nic: bool,
    /// Nodes reach each other's pods by an interface that is no uplink.
    pub(super) management: bool,
    /// The programs deliver what comes in, and not the packet filter.
    pub(super) native: bool,
    /// What pods send goes past the packet filter, as beside Cilium.
    pub(super) cilium: bool,
    pub(super) pods: u8,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            cni: Cni::Nftables,
            pod_links: PodLinks::Bridge,
            second_nic: false,
            management: false,
            native: false,
            cilium: false,
            pods: 2,
        }
    }
}

/// The lab, and this node's parts.
pub(super) struct Cluster {
    pub(super) lab: Lab,
    pub(super) nic: Nic,
    pub(super) cni: Cni,
    native: bool,
    /// Where Cilium has its maps.
    pub(super) cilium: Option<PathBuf>,
    pub(super) wire: Wire,
    pub(super) parts: Option<Parts>,
    pub(super) egress: Egress,
    _server: PodServer,
}

/// The node's rules and its data path.
pub(super) struct Parts {
    pub(super) rules: Arc<node_rules::Handle>,
    pub(super) datapath: Box<dyn DataPath>,
    pub(super) registries: [Arc<Registry>; 1],
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Parts {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Cluster {
    /// The first pod of the node is the policy's, the others are nobody's.
    pub(super) fn build(plan: &Plan) -> Self {
        let lab = Lab::build(Topology {
            nodes: 2,
            pods_per_node: plan.pods,
            pod_links: plan.pod_links,
            management: plan.management,
            second_nic: plan.second_nic,
            ..Topology::default()
        })
        .expect("the lab needs root and Debian's iproute2 and nftables");
        let nic = if plan.second_nic {
            Nic::Eth1
        } else {
            Nic::Eth0
        };
        let server = PodServer::start(lab.remote(), "remote").unwrap();
        let mut cluster = Self {
            wire: Wire::tap(&lab, NODE),
            egress: Egress::default(),
            parts: None,
            nic,
            cni: plan.cni,
            native: plan.native,
            cilium: None,
            lab,
            _server: server,
        };
        if plan.cilium {
            cluster.cilium = Some(cilium::pass_by(&cluster));
        } else {
            cluster.cni.masquerade(cluster.node());
        }
        cluster.mk_gateway();
        cluster.egress = cluster.mk_egress();
        cluster
    }

    /// The same, with the node's parts, once they are in force.
    pub(super) fn armed(plan: &Plan) -> Self {
        let mut cluster = Self::build(plan);
        cluster.start();
        cluster.apply();
        cluster.await_armed();
        cluster
    }

    pub(super) fn node(&self) -> &Netns {
        self.lab.host(NODE).unwrap()
    }

    pub(super) fn gateway(&self) -> &Netns {
        self.lab.host(GATEWAY).unwrap()
    }

    pub(super) fn pod(&self, number: usize) -> &Pod {
        &self.lab.node(NODE).unwrap().pods[number]
    }

    /// The addresses of the segment of the policy's.
    pub(super) fn network(&self) -> Network {
        match self.nic {
            Nic::Eth1 => Network::SecondLan,
            _ => Network::Lan,
        }
    }

    pub(super) fn egress_ips(&self) -> [IpAddr; 2] {
        self.network().both(EGRESS)
    }

    /// What a pod without a policy leaves as.
    pub(super) fn node_ips(&self) -> [IpAddr; 2] {
        self.lab.node(NODE).unwrap().addresses(Network::Lan)
    }

    pub(super) fn gateway_mac(&self) -> [u8; 6] {
        self.lab.node(GATEWAY).unwrap().mac(self.nic).0
    }

    /// A router that has the policy's addresses and knows nothing of us.
    fn mk_gateway(&self) {
        let host = self.gateway();
        let nic = self.nic.name();
        let network = self.network();
        let [v4, v6] = self.egress_ips();
        let [own4, own6] = landfall_lab::address::pod_cidrs(1);
        let to = self.lab.node(NODE).unwrap().addresses(network);
        let router = network.both(1);
        host.ip_batch(&format!(
            "address add {v4}/32 dev {nic}\naddress add {v6}/128 dev {nic} nodad\n\
             route replace {own4} via {} dev {nic}\nroute replace {own6} via {} dev {nic}\n",
            to[0], to[1],
        ))
        .unwrap();
        for (family, net, router) in [("-4", &own4, router[0]), ("-6", &own6, router[1])] {
            host.ip(&format!(
                "{family} rule add from {net} iif {nic} lookup 100"
            ))
            .unwrap();
            host.ip(&format!(
                "{family} route add default via {router} dev {nic} table 100"
            ))
            .unwrap();
        }
        host.sysctl("net.ipv4.conf.all.send_redirects", "0")
            .unwrap();
        host.sysctl(&format!("net.ipv4.conf.{nic}.send_redirects"), "0")
            .unwrap();
        host.nft(&format!(
            "add table inet plain\n\
             add chain inet plain out {{ type nat hook postrouting priority srcnat; }}\n\
             add rule inet plain out iifname {nic} oifname {nic} ip saddr {own4} snat ip to {v4}\n\
             add rule inet plain out iifname {nic} oifname {nic} ip6 saddr {own6} snat ip6 to {v6}\n"
        ))
        .unwrap();
    }

    fn mk_egress(&self) -> Egress {
        let mut egress = Egress {
            inside: [
                "10.244.0.0/16",
                "10.96.0.0/16",
                "10.88.0.0/24",
                "10.89.0.0/24",
                "169.254.0.0/16",
                "224.0.0.0/4",
                "fd00:244::/32",
                "fd00:96::/64",
                "fd00:88::/64",
                "fd00:89::/64",
                "fe80::/10",
                "ff00::/8",
            ]
            .map(|net| net.parse().unwrap())
            .into(),
            ..Egress::default()
        };
        egress.policies.insert(POLICY.into(), self.mk_policy());
        for number in 0..self.lab.node(NODE).unwrap().pods.len() {
            let tenant = (number == 0).then_some(POLICY);
            self.place(&mut egress, number, tenant);
        }
        egress
    }

    pub(super) fn mk_policy(&self) -> egress::Policy {
        egress::Policy {
            destinations: ["0.0.0.0/0", "::/0"].map(|net| net.parse().unwrap()).into(),
            gateway: Some(Gateway {
                node: GATEWAY.into(),
                uplink: self.nic.name().into(),
                interface: self.node().interface_index(self.nic.name()).unwrap(),
                mac: Some(self.gateway_mac()),
                epoch: 1,
                settled: true,
            }),
            ..egress::Policy::default()
        }
    }

    /// Puts a pod in its place: a policy's tenant, or nobody's.
    pub(super) fn place(&self, egress: &mut Egress, number: usize, policy: Option<&str>) {
        for (address, egress_ip) in self
            .pod(number)
            .addresses
            .into_iter()
            .zip(self.egress_ips())
        {
            let tenant = policy.map(|policy| Tenant {
                policy: PolicyName::from(policy),
                egress_ip: Some(egress_ip),
            });
            let node = NodeName::from(NODE);
            let pod = egress::Pod {
                node,
                tenant,
                identity: 1,
                former: None,
            };
            egress.pods.insert(address, pod);
        }
    }

    /// Starts the node's rules and data path, which know nothing yet.
    pub(super) fn start(&mut self) {
        let pins = self.lab.mount_pins().unwrap().join(NODE);
        let cilium = self.cilium.clone();
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let config = node_rules::Config {
            translated: self.native,
            ..node_rules::Config::default()
        };
        let thread = self.node().spawn("rules", move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let mut registry = Registry::default();
                let path = datapath::Config {
                    watch: Duration::from_millis(200),
                    cilium,
                    ..datapath::Config::new(pins)
                };
                let path: Box<dyn DataPath> = Box::new(datapath::start(path, &mut registry));
                let rules = node_rules::start(config, &mut registry);
                let rules = Arc::new(rules);
                tell.send((rules.clone(), path, Arc::new(registry)))
                    .unwrap();
                drop(rules);
                let _ = stopped.await;
            });
        });
        let (rules, datapath, registry) = told.recv().unwrap();
        self.parts = Some(Parts {
            rules,
            datapath,
            registries: [registry],
            stop: Some(stop),
            thread: Some(thread),
        });
    }

    /// Ends them, as a process ends that is killed.
    pub(super) fn stop(&mut self) {
        self.parts = None;
    }

    /// The names of the interfaces to the outside.
    fn uplinks(&self) -> BTreeSet<Arc<str>> {
        let nics = self.lab.topology().nics();
        nics.filter(|nic| *nic != Nic::Mgmt0)
            .map(|nic| nic.name().into())
            .collect()
    }

    /// The rules as an elector would say them.
    pub(super) fn rules(&self) -> Rules {
        let armed = !self.egress.policies.is_empty();
        let leaving = armed.then(|| {
            Arc::new(node_rules::Leaving {
                node: NODE.into(),
                egress: Arc::new(self.egress.clone()),
                uplinks: self.uplinks(),
            })
        });
        let vips = landfall_lab::address::vips(0);
        Rules {
            vips: vips.into(),
            uplinks: vips
                .into_iter()
                .map(|vip| (vip, Arc::from("eth0")))
                .collect(),
            egress: leaving.clone().filter(|_| self.cilium.is_none()),
            passed_by: leaving.filter(|_| self.cilium.is_some()),
            ..Rules::default()
        }
    }

    /// Says to both parts what is to be.
    pub(super) fn apply(&self) {
        let parts = self.parts.as_ref().unwrap();
        parts.rules.apply(self.rules());
        let node = self.node();
        let outside: BTreeSet<u32> = self
            .uplinks()
            .iter()
            .map(|name| node.interface_index(name).unwrap())
            .collect();
        let armed = !self.egress.policies.is_empty();
        let leaving = armed.then(|| {
            Arc::new(datapath::Leaving {
                node: NODE.into(),
                egress: Arc::new(self.egress.clone()),
                outside: outside.clone(),
                mark: egress::MARK,
                around: Arc::new(datapath::egress::Surroundings::nowhere()),
            })
        });
        let mut changes: Vec<Change> = landfall_lab::address::vips(0)
            .map(|vip| Change::Vip(vip, Some(VipState::default())))
            .into();
        changes.extend([Change::Egress(leaving), Change::Complete]);
        parts.datapath.attach(outside.into());
        parts.datapath.change(changes);
    }

    /// Waits until the tenant's packets are led.
    pub(super) fn await_armed(&self) {
        let programs = if self.cilium.is_some() { 3 } else { 1 };
        let chain = match self.cilium {
            Some(_) => "egress-masqueraded",
            None => "egress-judge",
        };
        until("the table is armed", || self.table().contains(chain));
        let begun = Instant::now();
        while self.guards() != programs * self.uplinks().len() {
            assert!(
                begun.elapsed() < PATIENCE,
                "no guard
{}",
                self.state()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Our table, as `nft` prints it.
    pub(super) fn table(&self) -> String {
        self.node()
            .exec("nft list table inet landfall")
            .unwrap_or_default()
    }

    /// How many uplinks carry a program that looks at what leaves.
    pub(super) fn guards(&self) -> usize {
        let node = self.node();
        let at = |name: &Arc<str>| {
            let index = node.interface_index(name).unwrap();
            let egress = landfall_ebpf_common::tcx::Hook::Egress;
            node.run(|| {
                landfall_ebpf_common::tcx::programs(index, egress)
                    .unwrap()
                    .len()
            })
        };
        self.uplinks().iter().map(at).sum()
    }

    /// All that this node has sent beyond the segments was a tenant's, to its gateway, or is among these sources; and
    /// outside nothing arrived but from the policy's addresses and these.
    pub(super) fn assert_clean(&self, others: &[IpAddr]) {
        let gateway = Mac(self.gateway_mac());
        let pod = self.pod(0).addresses;
        for frame in self.wire.outbound() {
            let by_gateway = pod.contains(&frame.source) && frame.to == gateway;
            if frame.to == NOWHERE && self.egress.policies.is_empty() {
                continue; // The guard may go before the rules do: until then nobody gets them.
            }
            assert!(
                by_gateway || others.contains(&frame.source),
                "{frame:?}\n{}",
                self.state()
            );
        }
        for source in self.wire.arrived() {
            let known = self.egress_ips().contains(&source) || others.contains(&source);
            assert!(known, "{source} has arrived\n{}", self.state());
        }
    }

    /// How many packets the tables have dropped for a reason.
    pub(super) fn dropped(&self, reason: &str) -> u64 {
        let count = |family: &str| {
            let counter = format!("{family} landfall egress-{reason}");
            self.node().counted(&counter)
        };
        count("inet").expect("the table has it") + count("bridge").unwrap_or(0)
    }

    /// What the guard has counted, by verdict.
    pub(super) fn guarded(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for line in self.metrics().lines() {
            if let Some(rest) = line.strip_prefix("egress_guarded_packets_total{verdict=\"")
                && let Some((verdict, count)) = rest.split_once("\"} ")
            {
                counts.insert(verdict.to_owned(), count.parse().unwrap());
            }
        }
        counts
    }

    /// How often rules or routes could not be written at the first try.
    pub(super) fn failures(&self) -> u64 {
        let metrics = self.metrics();
        let mut lines = metrics.lines();
        let failures = lines.find_map(|line| line.strip_prefix("node_rules_failures_total "));
        failures.expect("it is counted").parse().unwrap()
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        for registry in &self.parts.as_ref().unwrap().registries {
            encode(&mut text, registry).unwrap();
        }
        text
    }

    /// What to look at when a test fails.
    pub(super) fn state(&self) -> String {
        let node = self.node();
        let shown = [
            "nft list ruleset",
            "ip rule",
            "ip -6 rule",
            "ip route show table 7934",
            "ip -6 route show table 7934",
            "ip neigh",
            "conntrack -L",
        ];
        let mut text = String::new();
        for line in shown {
            let printed = node.exec(line).unwrap_or_default();
            let _ = write!(text, "# {line}\n{printed}\n");
        }
        let attachments = self.parts.as_ref().unwrap().datapath.attachments();
        let _ = write!(text, "# guard\n{:?}\n{attachments:?}\n", self.guarded());
        text
    }
}

pub(super) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(
            begun.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        thread::sleep(Duration::from_millis(20));
    }
}
