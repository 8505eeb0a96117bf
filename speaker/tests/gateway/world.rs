//! A gateway, another node with pods, servers on the segment and behind a router.
//!
//! ```text
//!  remote 10.77.0.100 --- router .1 --+-- 10.88.0.0/24 --+-- server .100
//!                                     |                  |
//!         nowhere --eth1-- gateway .11 eth0         node .12
//!  (its default route)        |                       |  |  |  |
//!                          own pod 10.244.1.10     pods 10.244.2.10 to .13
//! ```
//!
//! The node sends what its pods send outside to the gateway, by a plain route. Nobody has a route to the pods but the two
//! nodes; whatever comes from a pod's own address anywhere else is counted.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::server::{PodServer, WHO_AM_I};
use landfall_lab::{LabId, Mac, Netns};
use landfall_speaker::datapath::egress::{
    Gateway, GatewayConfig, Peer, PeerId, State, Surroundings, Uplink,
};
use landfall_speaker::egress::{self, Egress, Pod, Policy, Tenant};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prometheus_client::registry::Registry;

/// What a busy machine can promise.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Where lines are answered, and datagrams.
pub(super) const LINES: u16 = landfall_lab::server::TCP_PORT;
pub(super) const ECHO: u16 = landfall_lab::server::UDP_PORT;

/// The egress addresses.
pub(super) const EGRESS: [&str; 2] = ["10.88.0.200", "fd00:88::200"];
/// Another tenant's.
pub(super) const SECOND: [&str; 2] = ["10.88.0.201", "fd00:88::201"];
/// The servers.
pub(super) const SERVER: [&str; 2] = ["10.88.0.100", "fd00:88::100"];
pub(super) const REMOTE: [&str; 2] = ["10.77.0.100", "fd00:77::100"];

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A bpf file system of the test's own.
pub(super) struct Bpffs(tempfile::TempDir);

impl Bpffs {
    pub(super) fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        mount(
            Some("bpf"),
            directory.path(),
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("these tests mount a bpf file system and need root");
        Self(directory)
    }

    /// Where a gateway pins.
    pub(super) fn pin_dir(&self) -> PathBuf {
        self.0.path().join("landfall")
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// All of it. What is started in the namespaces ends before they do.
pub(super) struct World {
    gateway: Option<Gateway>,
    servers: Vec<PodServer>,
    pub(super) gw: Netns,
    pub(super) node: Netns,
    pub(super) router: Netns,
    pub(super) server: Netns,
    pub(super) remote: Netns,
    /// Of the other node, four; then the gateway's own.
    pub(super) pods: Vec<Netns>,
    id: LabId,
    switch: Netns,
    bpffs: Bpffs,
    pub(super) egress: Egress,
    pub(super) around: Surroundings,
    pub(super) config: GatewayConfig,
}

/// The addresses of a pod, by its place among them.
pub(super) fn pod_addresses(place: usize) -> [IpAddr; 2] {
    let (node, host) = if place == 4 { (1, 10) } else { (2, 10 + place) };
    [
        ip(&format!("10.244.{node}.{host}")),
        ip(&format!("fd00:244:{node}::{host}")),
    ]
}

impl World {
    /// Builds it, with a gateway as it is by default.
    pub(super) fn build() -> Self {
        let mut world = Self::bare();
        world.start();
        world
    }

    /// The same without a gateway: it is to be started.
    pub(super) fn bare() -> Self {
        let id = LabId::fresh();
        let make = |role: &str| Netns::create_in(&id, role).expect("these tests need root");
        let switch = make("switch");
        switch.bridge("br0", "mcast_snooping 0").unwrap();
        let [gw, node, router, server] = ["gw", "node", "router", "server"].map(make);
        for (host, port, number) in [
            (&gw, "gw", 11),
            (&node, "node", 12),
            (&router, "router", 1),
            (&server, "server", 100),
        ] {
            plug(&switch, host, port, number);
        }
        for host in [&gw, &node, &router] {
            host.enable_forwarding().unwrap();
        }
        let remote = make("remote");
        router.veth("eth1", &remote, "eth0").unwrap();
        router
            .ip_batch("addr add 10.77.0.1/24 dev eth1\naddr add fd00:77::1/64 dev eth1 nodad\n")
            .unwrap();
        remote
            .ip_batch(
                "addr add 10.77.0.100/24 dev eth0\naddr add fd00:77::100/64 dev eth0 nodad\n\
                 route add default via 10.77.0.1\nroute add default via fd00:77::1\n",
            )
            .unwrap();
        server
            .ip_batch(
                "route add 10.77.0.0/24 via 10.88.0.1\nroute add fd00:77::/64 via fd00:88::1\n",
            )
            .unwrap();
        // The gateway's own default route leads elsewhere.
        let nowhere = &switch;
        nowhere.veth("nowhere", &gw, "eth1").unwrap();
        gw.ip_batch(
            "addr add 10.99.0.11/24 dev eth1\naddr add fd00:99::11/64 dev eth1 nodad\n\
             route add default via 10.99.0.1\nroute add default via fd00:99::1\n",
        )
        .unwrap();
        let pods = (0..5)
            .map(|place| {
                let pod = make(&format!("pod{place}"));
                let host = if place == 4 { &gw } else { &node };
                let link = format!("pod{place}");
                host.veth(&link, &pod, "eth0").unwrap();
                let [four, six] = pod_addresses(place);
                host.ip_batch(&format!(
                    "addr add 169.254.0.1/32 dev {link}\naddr add fe80::1/64 dev {link} nodad\n\
                     route add {four} dev {link}\nroute add {six} dev {link}\n"
                ))
                .unwrap();
                pod.ip_batch(&format!(
                    "addr add {four}/32 dev eth0\naddr add {six}/128 dev eth0 nodad\n\
                     route add 169.254.0.1 dev eth0\nroute add default via 169.254.0.1 dev eth0\n\
                     route add default via fe80::1 dev eth0\n"
                ))
                .unwrap();
                pod
            })
            .collect();
        // The node's pods go by the gateway, wherever they go; the gateway's own by the router.
        node.ip_batch("route add default via 10.88.0.11\nroute add default via fd00:88::11\n")
            .unwrap();
        for command in ["", "-6 "] {
            let (router, net, pods, from) = if command.is_empty() {
                (
                    "10.88.0.1",
                    "10.88.0.0/24",
                    "10.244.2.0/24",
                    "10.244.2.0/24",
                )
            } else {
                (
                    "fd00:88::1",
                    "fd00:88::/64",
                    "fd00:244:2::/64",
                    "fd00:244:2::/64",
                )
            };
            let own = if command.is_empty() {
                "10.244.1.10"
            } else {
                "fd00:244:1::10"
            };
            let via_node = if command.is_empty() {
                "10.88.0.12"
            } else {
                "fd00:88::12"
            };
            gw.ip(&format!("{command}rule add from {own} lookup 100"))
                .unwrap();
            gw.ip(&format!(
                "{command}route add default via {router} dev eth0 table 100"
            ))
            .unwrap();
            gw.ip(&format!("{command}route add {net} dev eth0 table 100"))
                .unwrap();
            gw.ip(&format!("{command}route add {pods} via {via_node}"))
                .unwrap();
            // To the node itself its packets do not go by the gateway, but to the segment they do.
            node.ip(&format!("{command}rule add from {from} lookup 100"))
                .unwrap();
            let gateway = if command.is_empty() {
                "10.88.0.11"
            } else {
                "fd00:88::11"
            };
            node.ip(&format!(
                "{command}route add default via {gateway} dev eth0 table 100"
            ))
            .unwrap();
            for place in 0..4 {
                let pod = pod_addresses(place)[usize::from(!command.is_empty())];
                node.ip(&format!(
                    "{command}route add {pod} dev pod{place} table 100"
                ))
                .unwrap();
            }
        }
        // Null translation, so that no masquerade of the host's would touch what is translated here.
        gw.nft(
            "add table inet null\n\
             add chain inet null post { type nat hook postrouting priority srcnat - 10; }\n\
             add rule inet null post ip saddr 10.244.1.10 snat ip to ip saddr\n\
             add rule inet null post ip6 saddr fd00:244:1::10 snat ip6 to ip6 saddr\n\
             add chain inet null late { type nat hook postrouting priority srcnat; }\n\
             add rule inet null late oifname eth0 masquerade\n",
        )
        .unwrap();
        for (host, name) in [(&router, "router"), (&server, "server")] {
            host.nft(
                "add table inet leaks\n\
                 add chain inet leaks pre { type filter hook prerouting priority raw; }\n\
                 add rule inet leaks pre ip saddr 10.244.0.0/16 counter drop\n\
                 add rule inet leaks pre ip6 saddr fd00:244::/32 counter drop\n",
            )
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let mac = |host: &Netns| mac_of(host, "eth0");
        for host in [&router, &server] {
            for egress in EGRESS {
                let lladdr = Mac(mac(&gw));
                host.ip(&format!(
                    "neigh replace {egress} lladdr {lladdr} dev eth0 nud permanent"
                ))
                .unwrap();
            }
        }
        let bpffs = Bpffs::mount();
        let uplink = gw.interface_index("eth0").unwrap();
        let around = Surroundings {
            node: "gw".into(),
            uplinks: BTreeMap::from([(
                uplink,
                Uplink {
                    mac: mac(&gw),
                    mtu: 1500,
                    addresses: [ip("10.88.0.11"), ip("fd00:88::11")].into(),
                    connected: ["10.88.0.0/24", "fd00:88::/64"]
                        .map(|net| net.parse().unwrap())
                        .into(),
                    router_v4: Some("10.88.0.1".parse().unwrap()),
                    router_v6: Some("fd00:88::1".parse().unwrap()),
                },
            )]),
            tunnel: None,
            peers: BTreeMap::from([(
                PeerId {
                    node: "node".into(),
                    interface: uplink,
                },
                Peer {
                    mac: mac(&node),
                    address: None,
                },
            )]),
        };
        let config = GatewayConfig::new(bpffs.pin_dir());
        let mut world = Self {
            gateway: None,
            servers: Vec::new(),
            egress: mk_egress(uplink),
            around,
            config,
            gw,
            node,
            router,
            server,
            remote,
            pods,
            id,
            switch,
            bpffs,
        };
        world.servers = vec![
            PodServer::start(&world.server, "server").unwrap(),
            PodServer::start(&world.remote, "remote").unwrap(),
        ];
        world
    }

    /// Starts the gateway, and waits until it is one.
    pub(super) fn start(&mut self) {
        self.launch();
        self.tell();
        self.await_state(|state| matches!(state, State::Armed(_)));
    }

    /// Starts it, and tells it nothing yet.
    pub(super) fn launch(&mut self) {
        let config = self.config.clone();
        let gateway = self
            .gw
            .run(|| Gateway::start(config, &mut Registry::default()));
        self.gateway = Some(gateway);
    }

    /// Tells the gateway what it is to do now.
    pub(super) fn tell(&self) {
        self.gateway()
            .set(Arc::new(self.egress.clone()), Arc::new(self.around.clone()));
    }

    pub(super) fn await_state(&self, wanted: impl Fn(&State) -> bool) {
        let begun = Instant::now();
        loop {
            let state = self.gateway().state();
            if wanted(&state) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{state:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub(super) fn gateway(&self) -> &Gateway {
        self.gateway.as_ref().unwrap()
    }

    /// Ends the process's part.
    pub(super) fn stop(&mut self) {
        self.gateway = None;
    }

    pub(super) fn count(&self, reason: &str) -> u64 {
        self.gateway().counts()[reason]
    }

    pub(super) fn used(&self) -> u64 {
        self.gateway().usage()["mail"].ports
    }

    pub(super) fn pin_dir(&self) -> PathBuf {
        self.bpffs.pin_dir()
    }

    /// One more namespace.
    pub(super) fn host(&self, role: &str) -> Netns {
        Netns::create_in(&self.id, role).unwrap()
    }

    /// One more at the segment.
    pub(super) fn neighbour(&self, role: &str, number: u8) -> Netns {
        let host = self.host(role);
        plug(&self.switch, &host, role, number);
        host
    }

    /// The policy.
    pub(super) fn policy(&mut self) -> &mut Policy {
        self.egress.policies.get_mut("mail").unwrap()
    }

    /// One pod is another tenant's, of a policy that is as the first is now.
    pub(super) fn admit_another(&mut self, place: usize) {
        let policy = self.policy().clone();
        self.egress.policies.insert("shop".into(), policy);
        let lladdr = Mac(mac_of(&self.gw, "eth0"));
        for (address, egress) in pod_addresses(place).into_iter().zip(SECOND) {
            let pod = self.egress.pods.get_mut(&address).unwrap();
            let tenant = pod.tenant.as_mut().unwrap();
            tenant.policy = "shop".into();
            tenant.egress_ip = Some(ip(egress));
            for host in [&self.router, &self.server] {
                host.ip(&format!(
                    "neigh replace {egress} lladdr {lladdr} dev eth0 nud permanent"
                ))
                .unwrap();
            }
        }
    }

    /// Nothing came from a pod's own address to anybody.
    pub(super) fn no_leak(&self) {
        for host in [&self.router, &self.server] {
            let rules = host.exec("nft list table inet leaks").unwrap();
            let counters: Vec<&str> = rules
                .lines()
                .filter(|line| line.contains("counter"))
                .collect();
            assert_eq!(counters.len(), 2);
            for counter in counters {
                assert!(counter.contains("packets 0 "), "{}: {counter}", host.name());
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.gateway = None;
        self.servers.clear();
        let _ = self
            .gw
            .run(|| landfall_speaker::datapath::uninstall(&self.pin_dir()));
    }
}

/// Connects a host to the segment.
fn plug(switch: &Netns, host: &Netns, port: &str, number: u8) {
    switch.veth(port, host, "eth0").unwrap();
    switch.ip(&format!("link set {port} master br0")).unwrap();
    host.ip_batch(&format!(
        "addr add 10.88.0.{number}/24 dev eth0\naddr add fd00:88::{number}/64 dev eth0 nodad\n"
    ))
    .unwrap();
}

fn mk_egress(uplink: u32) -> Egress {
    let policy = Policy {
        gateway: Some(egress::Gateway {
            node: "gw".into(),
            uplink: "eth0".into(),
            interface: uplink,
            mac: None,
            epoch: 1,
            settled: true,
        }),
        ..Policy::default()
    };
    let mut pods = BTreeMap::new();
    for place in 0..5 {
        for (address, egress_ip) in pod_addresses(place).into_iter().zip(EGRESS) {
            let node = if place == 4 { "gw" } else { "node" };
            let tenant = Tenant {
                policy: "mail".into(),
                egress_ip: Some(ip(egress_ip)),
            };
            pods.insert(
                address,
                Pod {
                    node: node.into(),
                    tenant: Some(tenant),
                    identity: 1,
                    former: None,
                },
            );
        }
    }
    Egress {
        policies: BTreeMap::from([("mail".into(), policy)]),
        pods,
        inside: [
            "10.244.0.0/16",
            "fd00:244::/32",
            "10.88.0.11/32",
            "10.88.0.12/32",
        ]
        .map(|net| net.parse().unwrap())
        .into(),
        ..Egress::default()
    }
    .with_addresses_of_tenants()
}

pub(super) fn mac_of(host: &Netns, interface: &str) -> [u8; 6] {
    let shown = host.ip(&format!("-o link show {interface}")).unwrap();
    let mut words = shown.split_whitespace();
    words.find(|word| *word == "link/ether").unwrap();
    let mac: Mac = words.next().unwrap().parse().unwrap();
    mac.0
}

/// A connection from a pod.
pub(super) fn connect(from: &Netns, to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Says a line, and returns what is answered, without the server's name.
pub(super) fn say(stream: &TcpStream, line: &str) -> std::io::Result<String> {
    let mut stream = stream;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    let (_, text) = answer.trim().split_once(' ').unwrap_or_default();
    Ok(text.to_owned())
}

/// Who the server thinks a TCP client is.
pub(super) fn tcp_seen_as(from: &Netns, to: IpAddr) -> IpAddr {
    let stream = connect(from, SocketAddr::new(to, LINES))
        .unwrap_or_else(|error| panic!("{} to {to}: {error}", from.name()));
    ip(&say(&stream, WHO_AM_I).unwrap())
}

/// Sends a datagram and returns the answer, without the server's name.
pub(super) fn ask(from: &Netns, to: IpAddr, data: &[u8]) -> Option<Vec<u8>> {
    from.run(|| {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let mut buffer = vec![0; 65_536];
        // The first may be lost while addresses are found out.
        for _ in 0..5 {
            socket.send_to(data, (to, ECHO)).unwrap();
            if let Ok(length) = socket.recv(&mut buffer) {
                let answer = &buffer[..length];
                let space = answer.iter().position(|byte| *byte == b' ')?;
                return Some(answer[space + 1..].to_vec());
            }
        }
        None
    })
}

/// How many TCP segments a namespace has sent again.
pub(super) fn retransmitted(netns: &Netns) -> u64 {
    let text = netns
        .run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))
        .unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names
        .split(' ')
        .position(|name| name == "RetransSegs")
        .unwrap();
    values.split(' ').nth(place).unwrap().parse().unwrap()
}
