//! A node whose pods' networks are made by CNI's plugins, and two others, each the gateway of a policy. All three have real
//! speakers, from manifests.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::fault::SPEAKER;
use landfall_lab::manifests::Manifests;
use landfall_lab::server::PodServer;
use landfall_lab::tool::cni_plugins;
use landfall_lab::{Lab, Mac, Netns, Network, Nic, Topology};
use serde_json::{Value, json};

use super::masquerade::Cni;
use super::wire::{Frame, Wire};

/// What a busy machine can promise.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
pub(super) const NODE: &str = "node1";
/// Whose tenant a pod is: it is its label.
pub(super) const PLAIN: &str = "plain";
/// Policies, each with the node that is its gateway and the number of its addresses.
pub(super) const POLICIES: [(&str, &str, u8); 2] = [("red", "node2", 240), ("blue", "node3", 241)];

/// The cluster.
pub(super) struct Cluster {
    pub(super) lab: Lab,
    pub(super) manifests: Manifests,
    pub(super) wire: Wire,
    _server: PodServer,
}

impl Cluster {
    /// `first` is the plugin that makes interfaces; `addresses` are the last numbers of those that it may give.
    pub(super) fn build(first: &Value, addresses: [u8; 2]) -> Self {
        let lab = Lab::build(Topology {
            pods_per_node: 0,
            ..Topology::default()
        })
        .expect("the lab needs root and Debian's iproute2 and nftables");
        let server = PodServer::start(lab.remote(), "remote").unwrap();
        let manifests = Manifests::new(lab.manifests_dir());
        manifests.write_nodes(&lab).unwrap();
        manifests.write_pool().unwrap();
        let cluster = Self {
            wire: Wire::tap(&lab, NODE),
            lab,
            manifests,
            _server: server,
        };
        Cni::Nftables.masquerade(cluster.node());
        cluster.mk_network(first, addresses);
        cluster
    }

    /// The same, with policies, and with speakers that have put all of it in force.
    pub(super) fn armed(first: &Value, addresses: [u8; 2]) -> Self {
        let cluster = Self::build(first, addresses);
        cluster.write_policies();
        cluster.speak();
        cluster.await_armed();
        cluster
    }

    pub(super) fn node(&self) -> &Netns {
        &self.lab.node(NODE).unwrap().netns
    }

    fn path(&self, name: &str) -> PathBuf {
        self.lab.directory().join(name)
    }

    /// Where the container runtime looks for plugins' programs.
    pub(super) fn programs(&self) -> PathBuf {
        self.path("bin")
    }

    /// Where it looks for lists of plugins.
    pub(super) fn lists(&self) -> PathBuf {
        self.path("net.d")
    }

    /// What the plugin loads while no speaker judges.
    pub(super) fn boot_file(&self) -> PathBuf {
        self.path("persistent/boot.nft")
    }

    /// What a CNI leaves on its node: its programs and its list.
    fn mk_network(&self, first: &Value, [from, to]: [u8; 2]) {
        fs::create_dir(self.programs()).unwrap();
        fs::create_dir(self.lists()).unwrap();
        let plugins = cni_plugins().unwrap();
        for program in ["bridge", "ptp", "host-local"] {
            symlink(plugins.join(program), self.programs().join(program)).unwrap();
        }
        let mut first = first.clone();
        first["ipam"] = json!({
            "type": "host-local", "dataDir": self.path("ipam"),
            "ranges": [
                [{"subnet": "10.244.1.0/24", "gateway": "10.244.1.1",
                  "rangeStart": format!("10.244.1.{from}"), "rangeEnd": format!("10.244.1.{to}")}],
                [{"subnet": "fd00:244:1::/64", "gateway": "fd00:244:1::1",
                  "rangeStart": format!("fd00:244:1::{from:x}"), "rangeEnd": format!("fd00:244:1::{to:x}")}],
            ],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        });
        let list = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [first]});
        fs::write(self.lists().join("10-pods.conflist"), list.to_string()).unwrap();
    }

    pub(super) fn write_policies(&self) {
        let all = POLICIES.map(|(_, _, number)| Network::Lan.both(number));
        let ranges: Vec<String> = all
            .iter()
            .flatten()
            .map(|it| format!("{it}-{it}"))
            .collect();
        let object = |kind: &str, name: &str, spec: Value| {
            json!({
                "apiVersion": "landfall.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec,
            })
        };
        let pool = json!({"addresses": ranges, "purpose": "Egress", "autoAssign": false});
        let pool = object("IPAddressPool", "out", pool);
        self.tell_of("pool-out", &pool);
        for (name, gateway, number) in POLICIES {
            let spec = json!({
                "podSelector": {"matchLabels": {"tenant": name}},
                "egressIPs": {"addresses": Network::Lan.both(number)},
                "gateways": {"nodeSelector": {"matchLabels": {"kubernetes.io/hostname": gateway}}},
            });
            let policy = object("EgressPolicy", name, spec);
            self.tell_of(&format!("policy-{name}"), &policy);
        }
    }

    fn tell_of(&self, name: &str, object: &Value) {
        self.manifests.write(name, object).unwrap();
    }

    pub(super) fn remove_policies(&self) {
        for (name, _, _) in POLICIES {
            self.manifests.remove(&format!("policy-{name}")).unwrap();
        }
    }

    /// What the API server says of a pod: before it has an address, or with it.
    pub(super) fn tell(&self, pod: &str, tenant: &str, addresses: &[IpAddr]) {
        let object = mk_pod(pod, tenant, addresses);
        self.manifests
            .write(&format!("pod-{pod}"), &object)
            .unwrap();
    }

    /// Starts a speaker on every node.
    pub(super) fn speak(&self) {
        for node in self.lab.nodes() {
            self.speak_on(&node.name);
        }
    }

    pub(super) fn speak_on(&self, node: &str) {
        self.speak_as(node, true);
    }

    /// The same, with or without treating packets by egress policies.
    pub(super) fn speak_as(&self, node: &str, egress: bool) {
        self.speak_so(node, egress, node == NODE);
    }

    /// The same on all nodes, without the plugin.
    pub(super) fn speak_without_plugin(&self) {
        for node in self.lab.nodes() {
            self.speak_so(&node.name, true, false);
        }
        self.await_policies();
    }

    fn speak_so(&self, node: &str, egress: bool, plugin: bool) {
        let mut program = self
            .lab
            .speaker(node)
            .unwrap()
            .option("--manifests", self.manifests.directory().display());
        if egress {
            program = program.arg("--egress");
        }
        if plugin {
            program = program
                .option("--egress-boot-file", self.boot_file().display())
                .option("--cni-bin-dir", self.programs().display())
                .option("--cni-conf-dir", self.lists().display());
        }
        self.lab.start(node, SPEAKER, &program).unwrap();
    }

    /// Waits until the node's table leads each policy's pods to their gateway, and the plugin is in its place.
    pub(super) fn await_armed(&self) {
        self.await_policies();
        self.until("the plugin is chained", || self.is_chained());
        self.until("what it would load is there", || self.boot_file().exists());
    }

    fn await_policies(&self) {
        for (policy, _, _) in POLICIES {
            let chain = format!("nft list chain inet landfall egress-of-{policy}");
            self.until("policies are in force", || {
                let printed = self.node().exec(&chain).unwrap_or_default();
                printed.contains("ct mark set")
            });
        }
    }

    pub(super) fn is_chained(&self) -> bool {
        let list = fs::read_to_string(self.lists().join("10-pods.conflist")).unwrap();
        list.contains("landfall-cni")
    }

    pub(super) fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < PATIENCE, "{what}\n{}", self.state());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What to look at when a test fails.
    pub(super) fn state(&self) -> String {
        let shown = ["nft list ruleset", "ip rule", "ip route", "conntrack -L"];
        let mut text: String = shown
            .map(|line| {
                let printed = self.node().exec(line).unwrap_or_default();
                format!("# {line}\n{printed}\n")
            })
            .concat();
        for node in self.lab.nodes() {
            let log = self.lab.log(&node.name, SPEAKER).unwrap_or_default();
            let _ = write!(text, "# {}\n{log}\n", node.name);
        }
        text
    }

    /// What a policy's pods leave by; the node's own, if it is none.
    pub(super) fn leaves_by(&self, tenant: &str) -> [IpAddr; 2] {
        let of = POLICIES.into_iter().find(|(name, _, _)| *name == tenant);
        let node = || self.lab.node(NODE).unwrap().addresses(Network::Lan);
        of.map_or_else(node, |(_, _, number)| Network::Lan.both(number))
    }

    /// To whom the node may send what has a pod's address.
    pub(super) fn gateway(&self, tenant: &str) -> Option<Mac> {
        let of = POLICIES.into_iter().find(|(name, _, _)| *name == tenant);
        of.map(|(_, gateway, _)| self.lab.node(gateway).unwrap().mac(Nic::Eth0))
    }

    /// All that the node has sent outside was a tenant's, to its gateway, or the node's own; these pods are whose. And
    /// nothing else has arrived. Returns how many kinds of frames there were.
    pub(super) fn assert_clean(&self, pods: &[(&str, &[IpAddr])]) -> usize {
        self.assert_clean_but(pods, None)
    }

    /// The same, but that a tenant's frames may have gone to this Ethernet address, too.
    pub(super) fn assert_clean_but(&self, pods: &[(&str, &[IpAddr])], too: Option<Mac>) -> usize {
        let node = self.leaves_by(PLAIN);
        let frames = self.wire.outbound();
        let is_right = |frame: &Frame| {
            let owner = pods
                .iter()
                .find(|(_, addresses)| addresses.contains(&frame.source));
            match owner {
                Some((tenant, _)) => {
                    let gateway = self.gateway(tenant);
                    gateway.is_some_and(|gateway| frame.to == gateway || Some(frame.to) == too)
                }
                None => node.contains(&frame.source),
            }
        };
        let wrong: Vec<&Frame> = frames.iter().filter(|frame| !is_right(frame)).collect();
        assert!(wrong.is_empty(), "{wrong:?}\n{}", self.state());
        let mut known: BTreeSet<IpAddr> = node.into();
        known.extend(
            POLICIES
                .iter()
                .flat_map(|(name, _, _)| self.leaves_by(name)),
        );
        let others: Vec<IpAddr> = self.wire.arrived().difference(&known).copied().collect();
        assert!(others.is_empty(), "{others:?} have arrived");
        frames.len()
    }

    /// How many packets the node's table has dropped of sources that are not judged; nothing if there is no table.
    pub(super) fn dropped(&self) -> Option<u64> {
        self.dropped_at(NODE)
    }

    /// The same of a node's.
    pub(super) fn dropped_at(&self, node: &str) -> Option<u64> {
        let host = self.lab.host(node).unwrap();
        host.counted("inet landfall egress-unknown").ok()
    }
}

fn mk_pod(name: &str, tenant: &str, addresses: &[IpAddr]) -> Value {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"tenant": tenant}},
        "spec": {"nodeName": NODE, "containers": []},
        "status": {"podIPs": ips},
    })
}
