//! Two gateways side by side, and the generator that both of them serve.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use landfall_ebpf_common::constant::{self, Hook};
use landfall_ebpf_common::egress::binding::ticks;
use landfall_ebpf_common::tcx;
use landfall_lab::{LabId, Mac, Netns};
use landfall_speaker::datapath::egress::{Peer, PeerId, State, Surroundings, Uplink};
use landfall_speaker::datapath::{self, Change, DataPath};
use landfall_speaker::egress::{self, Egress, Pod, Policy, PolicyName, Tenant};
use landfall_speaker::node_rules::{self, NodeRules as _, Rules};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio::sync::oneshot;

use super::frames::{
    self, NODE, OTHER, OWN_PODS, POD_LINK, PODS, REMOTE_PODS, ROUTER, own_pod, remote_pod,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Room for bindings, and buckets and room for connection tracking.
pub(crate) const ROOM: u32 = 1 << 21;

/// The links of the generator, at whose other ends are: who drops, ours and its own pods, nftables and its own pods, who
/// sends back.
pub(crate) const LINKS: [&str; 6] = ["drop", "ours", "ours-pods", "nft", "nft-pods", "bounce"];

/// Settings of the whole machine's connection tracking, raised as long as this lives.
struct Tracking([(PathBuf, String); 2]);

impl Tracking {
    fn raise() -> anyhow::Result<Self> {
        let files = [
            "/sys/module/nf_conntrack/parameters/hashsize",
            "/proc/sys/net/netfilter/nf_conntrack_max",
        ];
        let before = files.map(|file| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            (PathBuf::from(file), text)
        });
        for file in files {
            std::fs::write(file, ROOM.to_string())
                .with_context(|| format!("raising {file}: connection tracking needs the room"))?;
        }
        Ok(Self(before))
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        for (file, text) in &self.0 {
            let _ = std::fs::write(file, text.trim());
        }
    }
}

/// A bpf file system of this program's own.
struct Bpffs(tempfile::TempDir);

impl Bpffs {
    fn mount() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let none = None::<&str>;
        mount(
            Some("bpf"),
            directory.path(),
            Some("bpf"),
            MsFlags::empty(),
            none,
        )?;
        Ok(Self(directory))
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// What runs on the node that is ours: the gateway, the data path with the guard, the node's rules.
struct Parts {
    datapath: Box<dyn DataPath>,
    _rules: Arc<node_rules::Handle>,
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

/// All of it.
pub(crate) struct World {
    /// How many policies there are.
    pub(crate) policies: u32,
    parts: Option<Parts>,
    /// Who sends, and drops what comes back.
    pub(crate) generator: Netns,
    ours: Netns,
    nft: Netns,
    dropper: Netns,
    /// The indexes of the generator's ends.
    pub(crate) links: [u32; 6],
    /// What drops, as long as it is here.
    drops: Vec<OwnedFd>,
    bpffs: Bpffs,
    _tracking: Tracking,
}

impl World {
    /// Builds it, with so many policies, and waits until they are in force.
    pub(crate) fn build(policies: u32) -> anyhow::Result<Self> {
        let id = LabId::fresh();
        let make = |role: &str| Netns::create_in(&id, role);
        let (generator, ours, nft, dropper) = (
            make("generator")?,
            make("ours")?,
            make("nft")?,
            make("drop")?,
        );
        let ends = [&dropper, &ours, &ours, &nft, &nft, &dropper];
        let mut links = [0; 6];
        for (place, (link, end)) in LINKS.into_iter().zip(ends).enumerate() {
            let name = match link {
                "ours-pods" | "nft-pods" => "pods",
                "bounce" => "eth1",
                _ => "eth0",
            };
            generator.veth(link, end, name)?;
            let (here, there) = if name == "pods" {
                (PODS, POD_LINK)
            } else {
                (ROUTER, NODE)
            };
            generator.ip(&format!("link set {link} address {}", Mac(here)))?;
            end.ip(&format!("link set {name} address {}", Mac(there)))?;
            end.exec(&format!("ethtool -K {name} gro off rxvlan off"))?;
            generator.exec(&format!("ethtool -K {link} gro off tx off"))?;
            links[place] = generator.interface_index(link)?;
        }
        let [first, second] = ["eth0", "eth1"].map(|name| dropper.interface_index(name));
        let (first, second) = (first?, second?);
        let drops = vec![
            dropper.run(|| constant::drop_all(Hook::Tcx, first))?,
            dropper.run(|| constant::bounce_all(second))?,
        ];
        for node in [&ours, &nft] {
            wire(node)?;
        }
        let mut world = Self {
            policies,
            parts: None,
            generator,
            ours,
            nft,
            dropper,
            links,
            drops,
            bpffs: Bpffs::mount()?,
            _tracking: Tracking::raise()?,
        };
        world.translate()?;
        world.start()?;
        Ok(world)
    }

    /// Source addresses by nftables: the one rule that it takes, and a map of the pods.
    fn translate(&self) -> anyhow::Result<()> {
        let mut text = "add table ip bench
add map ip bench tenants { type ipv4_addr : ipv4_addr; }
add chain ip bench out { type nat hook postrouting priority srcnat; }
add rule ip bench out oifname eth0 snat to ip saddr map @tenants
"
        .to_owned();
        for (pod, policy, _) in self.pods() {
            let egress = frames::egress(policy);
            writeln!(text, "add element ip bench tenants {{ {pod} : {egress} }}")?;
        }
        self.nft.nft(&text)?;
        for key in ["udp_timeout", "udp_timeout_stream", "tcp_timeout_syn_sent"] {
            let key = format!("net.netfilter.nf_conntrack_{key}");
            for node in [&self.nft, &self.ours] {
                node.sysctl(&key, "3600")?;
            }
        }
        Ok(())
    }

    /// All pods: the address, the number of the policy, and the node.
    fn pods(&self) -> impl Iterator<Item = (IpAddr, u32, &'static str)> {
        let policies = self.policies;
        let remote =
            (0..REMOTE_PODS).map(move |it| (remote_pod(it).into(), it % policies, "other"));
        let own = (0..OWN_PODS).map(move |it| (own_pod(it).into(), it % policies, "here"));
        remote.chain(own)
    }

    fn egress(&self, interface: u32) -> Egress {
        let name = |policy: u32| PolicyName::from(format!("policy-{policy}"));
        let policy = Policy {
            destinations: [ipnet::Ipv4Net::default().into()].into(),
            gateway: Some(egress::Gateway {
                node: "here".into(),
                uplink: "eth0".into(),
                interface,
                mac: None,
                epoch: 1,
                settled: true,
            }),
            ..Policy::default()
        };
        Egress {
            policies: (0..self.policies)
                .map(|it| (name(it), policy.clone()))
                .collect(),
            pods: self
                .pods()
                .map(|(pod, policy, node)| {
                    let tenant = Some(Tenant {
                        policy: name(policy),
                        egress_ip: Some(frames::egress(policy).into()),
                    });
                    let node = node.into();
                    (
                        pod,
                        Pod {
                            node,
                            tenant,
                            identity: 1,
                            former: None,
                        },
                    )
                })
                .collect(),
            inside: ["10.244.0.0/16", "10.88.0.0/24"]
                .map(|net| net.parse().expect("a literal"))
                .into(),
            ..Egress::default()
        }
    }

    /// Starts what a node of ours runs, and waits until it is in force.
    fn start(&mut self) -> anyhow::Result<()> {
        let interface = self.ours.interface_index("eth0")?;
        let egress = Arc::new(self.egress(interface));
        let around = around(interface)?;
        let pins = self.pins();
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = mpsc::channel();
        let thread = self.ours.spawn("parts", move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime needs but a few descriptors");
            runtime.block_on(async {
                let mut registry = Registry::default();
                let mut config = datapath::Config::new(pins);
                config.gateway.bindings = ROOM;
                config.gateway.times.datagram = ticks(3600);
                config.gateway.mark = egress::marks(egress::MARK).1;
                let datapath: Box<dyn DataPath> = Box::new(datapath::start(config, &mut registry));
                let rules = node_rules::start(node_rules::Config::default(), &mut registry);
                let _ = tell.send((datapath, Arc::new(rules)));
                let _ = stopped.await;
            });
        });
        let (datapath, rules) = told.recv()?;
        rules.apply(Rules {
            egress: Some(Arc::new(node_rules::Leaving {
                node: "here".into(),
                egress: Arc::clone(&egress),
                uplinks: ["eth0".into()].into(),
            })),
            ..Rules::default()
        });
        datapath.attach(BTreeSet::from([interface]).into());
        datapath.change(vec![
            Change::Egress(Some(Arc::new(datapath::Leaving {
                node: "here".into(),
                egress: Arc::clone(&egress),
                outside: [interface].into(),
                mark: egress::MARK,
                around: Arc::new(around),
            }))),
            Change::Complete,
        ]);
        let parts = Parts {
            datapath,
            _rules: rules,
            stop: Some(stop),
            thread: Some(thread),
        };
        let parts = self.parts.insert(parts);
        let begun = Instant::now();
        loop {
            let state = parts.datapath.gateway();
            let at = parts.datapath.attachments();
            let table = self.ours.exec("nft list table inet landfall");
            let judges = table.is_ok_and(|text| text.contains("egress-judge"));
            if matches!(state, State::Armed(_)) && at.contains_key(&interface) && judges {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "{state:?} {at:?} {judges}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn pins(&self) -> PathBuf {
        self.bpffs.0.path().join("landfall")
    }

    /// What our gateway has counted.
    pub(crate) fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.parts
            .as_ref()
            .map(|parts| parts.datapath.gateway_counts())
            .unwrap_or_default()
    }

    /// How many frames have arrived at the generator's end of a link, or where they are dropped.
    pub(crate) fn arrived(&self, link: usize) -> anyhow::Result<u64> {
        let (at, name) = if link == 0 {
            (&self.dropper, "eth0")
        } else {
            (&self.generator, LINKS[link])
        };
        let text = at.ip(&format!("-j -s link show {name}"))?;
        let shown: Value = serde_json::from_str(&text)?;
        shown[0]["stats64"]["rx"]["packets"]
            .as_u64()
            .context("ip counts packets")
    }

    /// How many connections nftables' node tracks.
    pub(crate) fn tracked(&self) -> anyhow::Result<u64> {
        let text = self.nft.read_sysctl("net.netfilter.nf_conntrack_count")?;
        Ok(text.parse()?)
    }

    /// Counts what comes back to the generator: from an address of a policy, from a pod's own, or for a pod.
    pub(crate) fn watch(&self) -> anyhow::Result<()> {
        let mut text = "add table netdev watch\n".to_owned();
        for link in &LINKS[1..] {
            writeln!(
                text,
                "add chain netdev watch {link} {{ type filter hook ingress device {link} priority 0; policy drop; }}"
            )?;
            for (what, rule) in [
                ("out", "ip saddr 10.88.16.0/20"),
                ("leaked", "ip saddr 10.244.0.0/16"),
                ("in", "ip daddr 10.244.0.0/16"),
            ] {
                writeln!(
                    text,
                    "add rule netdev watch {link} {rule} counter comment \"{link} {what}\""
                )?;
            }
        }
        Ok(self.generator.nft(&text)?)
    }

    /// What was counted, by link and kind. From now on what comes back is dropped at once.
    pub(crate) fn watched(&mut self) -> anyhow::Result<BTreeMap<String, u64>> {
        let text = self.generator.exec("nft list table netdev watch")?;
        self.generator.nft("delete table netdev watch\n")?;
        for index in &self.links[1..] {
            let drop = self
                .generator
                .run(|| constant::drop_all(Hook::Tcx, *index))?;
            self.drops.push(drop);
        }
        let rules = text.lines().filter_map(|line| {
            let (_, rest) = line.split_once("counter packets ")?;
            let (count, _) = rest.split_once(' ')?;
            let name = line.split('"').nth(1)?;
            Some((name.to_owned(), count.parse().ok()?))
        });
        Ok(rules.collect())
    }

    /// Our programs at the uplink: the numbers, and where they are.
    pub(crate) fn programs(&self) -> anyhow::Result<BTreeMap<u32, &'static str>> {
        let interface = self.ours.interface_index("eth0")?;
        let mut ids = BTreeMap::new();
        for (hook, word) in [
            (tcx::Hook::Ingress, "ingress"),
            (tcx::Hook::Egress, "egress"),
        ] {
            let programs = self.ours.run(|| tcx::programs(interface, hook))?;
            ids.extend(programs.into_iter().map(|id| (id, word)));
        }
        Ok(ids)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.parts = None;
        let pins = self.pins();
        let path: &Path = &pins;
        let _ = self.ours.run(|| datapath::uninstall(path));
    }
}

/// Addresses, routes and neighbours of a node.
fn wire(node: &Netns) -> anyhow::Result<()> {
    node.enable_forwarding()?;
    let mut lines = format!(
        "address add 10.88.0.11/24 dev eth0
neigh replace 10.88.0.1 lladdr {} dev eth0 nud permanent
neigh replace 10.88.0.12 lladdr {} dev eth0 nud permanent
route add default via 10.88.0.1 dev eth0
route add 10.244.4.0/22 via 10.88.0.12 dev eth0
address add 10.244.1.1/24 dev pods
",
        Mac(ROUTER),
        Mac(OTHER)
    );
    for pod in 0..OWN_PODS {
        writeln!(
            lines,
            "neigh replace {} lladdr {} dev pods nud permanent",
            own_pod(pod),
            Mac(PODS)
        )?;
    }
    node.ip_batch(&lines)?;
    for interface in ["all", "eth0", "pods"] {
        node.sysctl(&format!("net.ipv4.conf.{interface}.send_redirects"), "0")?;
        node.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "0")?;
    }
    Ok(())
}

/// Where our gateway is: at one segment, with the other node and a router.
fn around(interface: u32) -> anyhow::Result<Surroundings> {
    Ok(Surroundings {
        node: "here".into(),
        uplinks: BTreeMap::from([(
            interface,
            Uplink {
                mac: NODE,
                mtu: 1500,
                addresses: ["10.88.0.11".parse()?].into(),
                connected: ["10.88.0.0/24".parse()?].into(),
                router_v4: Some("10.88.0.1".parse()?),
                router_v6: None,
            },
        )]),
        tunnel: None,
        peers: BTreeMap::from([(
            PeerId {
                node: "other".into(),
                interface,
            },
            Peer {
                mac: OTHER,
                address: None,
            },
        )]),
    })
}
