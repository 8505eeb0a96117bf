//! The node's rules with real packets, in network namespaces.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use landfall_core::model::Protocol;
use landfall_lab::{Lab, Netns, Network, Topology};
use landfall_speaker::node_rules::{self, Config, HostTargets, NodeRules as _, Rules, VipPort};
use pnet_packet::tcp::{self, MutableTcpPacket};
use prometheus_client::registry::Registry;
use socket2::{Domain, Socket, Type};
use tokio::sync::oneshot;

const PATIENCE: Duration = Duration::from_secs(20);

fn mk_lab(topology: Topology) -> Lab {
    Lab::build(topology).expect("the lab needs root and Debian's iproute2 and nftables")
}

fn mk_small() -> Lab {
    mk_lab(Topology {
        nodes: 1,
        management: false,
        ..Topology::default()
    })
}

fn mk_guard() -> Rules {
    Rules {
        vips: BTreeSet::from(landfall_lab::address::vips(0)),
        ..Rules::default()
    }
}

/// The rules' task, running in a host until dropped.
struct Running {
    host: Netns,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(host: &Netns, rules: Rules, ready: &str) -> Self {
        Self::start_with(host, Config::default(), rules, ready)
    }

    fn start_with(host: &Netns, config: Config, rules: Rules, ready: &str) -> Self {
        let (stop, stopped) = oneshot::channel();
        let thread = host.spawn("rules", move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(async {
                    let handle = node_rules::start(config.clone(), &mut Registry::default());
                    handle.apply(rules);
                    let _ = stopped.await;
                    drop(handle);
                    node_rules::remove(&config).await.unwrap();
                });
        });
        let running = Self {
            host: host.share(),
            stop: Some(stop),
            thread: Some(thread),
        };
        until(host, ready);
        running
    }

    fn stop(mut self) {
        self.end();
        let printed = self.host.exec("nft list ruleset").unwrap();
        assert!(
            !printed.contains("inet landfall"),
            "removed, and still there:\n{printed}"
        );
        let rules = self.host.exec("ip rule").unwrap();
        assert!(
            !rules.contains("fwmark"),
            "removed, and still there:\n{rules}"
        );
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits until the ruleset of `host` contains `text`.
fn until(host: &Netns, text: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let printed = host.exec("nft list ruleset").unwrap();
        if printed.contains(text) {
            return;
        }
        assert!(Instant::now() < deadline, "{text:?} is not in\n{printed}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn dropped(host: &Netns, counter: &str) -> u64 {
    let counter = format!("inet landfall {counter}");
    host.counted(&counter).unwrap()
}

/// Sends a datagram each 10 ms from one socket and returns after how many the first answer came.
fn ask(
    from: &Netns,
    to: SocketAddr,
    at_most: u32,
    mut before_each: impl FnMut(u32) + Send,
) -> Option<u32> {
    from.run(|| {
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
            .parse()
            .unwrap();
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(to).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(10)))
            .unwrap();
        let mut buffer = [0; 64];
        for number in 0..at_most {
            before_each(number);
            let _ = socket.send(b"hello");
            if socket.recv(&mut buffer).is_ok() {
                return Some(number);
            }
        }
        None
    })
}

/// An echo server for datagrams on a node's own address; ends with the namespace's last datagram "end".
fn serve_datagrams(host: &Netns, address: SocketAddr) {
    let socket = host.run(|| UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

/// A TCP server that says who it is and whom it sees.
fn serve(host: &Netns, address: SocketAddr, name: &str) {
    let listener = host.run(|| TcpListener::bind(address).unwrap());
    let name = name.to_owned();
    thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            let _ = write!(stream, "{name} {}", from.ip());
        }
    });
}

fn connect(from: &Netns, to: SocketAddr) -> Option<String> {
    from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(3))).ok()?;
        let mut said = String::new();
        stream.read_to_string(&mut said).ok()?;
        Some(said)
    })
}

#[test]
fn guard_keeps_a_flow_that_began_too_early_from_being_pinned() {
    for guarded in [true, false] {
        let lab = mk_small();
        let node = &lab.nodes()[0];
        let netns = lab.host(&node.name).unwrap();
        let [vip, _] = landfall_lab::address::vips(0);
        let [own, _] = node.addresses(Network::Lan);
        serve_datagrams(netns, SocketAddr::new(own, 5300));
        lab.client()
            .ip(&format!("route add {vip}/32 via {own}"))
            .unwrap();
        // As with kube-proxy, something is translated all the time: else no connection is tracked.
        netns
            .nft(&format!(
                "add table ip late\n\
                 add chain ip late pre {{ type nat hook prerouting priority dstnat; }}\n\
                 add rule ip late pre ip daddr 10.96.0.1 udp dport 53 dnat to {own}:5300\n"
            ))
            .unwrap();
        let running = guarded.then(|| Running::start(netns, mk_guard(), &vip.to_string()));
        let served = ask(lab.client(), SocketAddr::new(vip, 53), 60, |number| {
            if number == 20 {
                // Now the Service exists.
                netns
                    .nft(&format!(
                        "add rule ip late pre ip daddr {vip} udp dport 53 dnat to {own}:5300\n"
                    ))
                    .unwrap();
            }
        });
        if guarded {
            assert!(served.is_some_and(|number| number >= 20), "{served:?}");
            assert!(dropped(netns, "guard4") >= 15);
        } else {
            assert_eq!(
                served, None,
                "without the guard the flow stays untranslated"
            );
        }
        drop(running);
    }
}

#[test]
fn guard_drops_both_families_and_leaves_the_rest() {
    let lab = mk_small();
    let node = &lab.nodes()[0];
    let netns = lab.host(&node.name).unwrap();
    let [vip4, vip6] = landfall_lab::address::vips(0);
    let [own4, own6] = node.addresses(Network::Lan);
    lab.client()
        .ip(&format!("route add {vip4}/32 via {own4}"))
        .unwrap();
    lab.client()
        .ip(&format!("-6 route add {vip6}/128 via {own6}"))
        .unwrap();
    let running = Running::start(netns, mk_guard(), &vip6.to_string());
    for vip in [vip4, vip6] {
        assert_eq!(
            ask(lab.client(), SocketAddr::new(vip, 53), 10, |_| ()),
            None
        );
    }
    assert_eq!(dropped(netns, "guard4"), 10);
    assert_eq!(dropped(netns, "guard6"), 10);
    // Pods are forwarded to as ever.
    let pod = lab.pods().next().unwrap();
    lab.client()
        .ip(&format!("route add {}/32 via {own4}", pod.addresses[0]))
        .unwrap();
    landfall_lab::ping(lab.client(), pod.addresses[0], PATIENCE).unwrap();
    running.stop();
}

#[test]
fn a_flushed_table_is_put_back() {
    let lab = mk_small();
    let netns = lab.host(&lab.nodes()[0].name).unwrap();
    let running = Running::start(netns, mk_guard(), "guard6");
    for _ in 0..2 {
        netns.nft("flush ruleset\n").unwrap();
        until(netns, "counter name \"guard6\" drop");
        until(netns, &landfall_lab::address::vips(0)[0].to_string());
        thread::sleep(Duration::from_millis(500));
    }
    running.stop();
}

#[test]
fn host_endpoints_are_delivered_on_the_leader_and_from_every_node() {
    let lab = mk_lab(Topology {
        management: false,
        ..Topology::default()
    });
    let [vip, _] = landfall_lab::address::vips(0);
    let own = |index: usize| lab.nodes()[index].addresses(Network::Lan)[0];
    let endpoints: Vec<SocketAddr> = (0..2)
        .map(|index| SocketAddr::new(own(index), 6443))
        .collect();
    // The third node has no API server of its own.
    let mut running = Vec::new();
    for (index, node) in lab.nodes().iter().enumerate() {
        let netns = lab.host(&node.name).unwrap();
        let local = endpoints.get(index).copied();
        if let Some(local) = local {
            serve(netns, local, &node.name);
        }
        let service = VipPort {
            vip,
            protocol: Protocol::Tcp,
            port: 443,
        };
        let targets = HostTargets {
            local,
            remote: endpoints
                .iter()
                .copied()
                .filter(|other| Some(*other) != local)
                .collect(),
        };
        let rules = Rules {
            host_services: BTreeMap::from([(service, targets)]),
            ..mk_guard()
        };
        running.push(Running::start(netns, rules, "dport 443 dnat"));
    }
    let to = SocketAddr::new(vip, 443);
    for (index, node) in lab.nodes().iter().enumerate() {
        let netns = lab.host(&node.name).unwrap();
        let said =
            connect(netns, to).unwrap_or_else(|| panic!("{} reaches no endpoint", node.name));
        match endpoints.get(index) {
            Some(_) => assert!(said.starts_with(&node.name), "{said}"),
            None => assert!(
                said.starts_with("node1") || said.starts_with("node2"),
                "{said}"
            ),
        }
        let addresses = netns.exec("ip -o addr").unwrap();
        assert!(
            !addresses.contains(&vip.to_string()),
            "the VIP is on an interface"
        );
    }
    // From outside, by whichever node leads: its own endpoint sees the client, another's sees the leader.
    let client: IpAddr = Network::Lan.both(100)[0];
    for (leader, sees) in [(0, client), (1, client), (2, own(2))] {
        lab.client()
            .ip(&format!("route replace {vip}/32 via {}", own(leader)))
            .unwrap();
        let said =
            connect(lab.client(), to).unwrap_or_else(|| panic!("no answer by node {leader}"));
        assert!(
            said.ends_with(&format!(" {sees}")),
            "by node {leader}: {said}"
        );
    }
    // Nobody answers for the address: that is the announcer's to do, on the leader alone.
    lab.client().ip(&format!("route del {vip}/32")).unwrap();
    assert_eq!(connect(lab.client(), to), None);
    for each in running {
        each.stop();
    }
}

#[test]
fn answers_leave_by_the_uplink_of_the_vip() {
    let lab = mk_lab(Topology {
        nodes: 1,
        management: false,
        second_nic: true,
        ..Topology::default()
    });
    let node = &lab.nodes()[0];
    let netns = lab.host(&node.name).unwrap();
    let vip: IpAddr = Network::SecondLan.both(200)[0];
    let own = node.addresses(Network::SecondLan)[0];
    let router = Network::SecondLan.both(1)[0];
    serve(netns, SocketAddr::new(own, 8080), "node1");
    lab.router()
        .ip(&format!("route add {vip}/32 via {own}"))
        .unwrap();
    // What leaves by the default route, eth0, is a wrong answer: the router takes none from there.
    lab.router()
        .nft(&format!(
            "add table ip strict\n\
             add chain ip strict pre {{ type filter hook prerouting priority raw; }}\n\
             add rule ip strict pre iifname eth0 ip saddr {vip} counter drop\n"
        ))
        .unwrap();
    let service = VipPort {
        vip,
        protocol: Protocol::Tcp,
        port: 80,
    };
    let rules = Rules {
        vips: BTreeSet::from([vip]),
        uplinks: BTreeMap::from([(vip, "eth1".into())]),
        host_services: BTreeMap::from([(
            service,
            HostTargets {
                local: Some(SocketAddr::new(own, 8080)),
                remote: Vec::new(),
            },
        )]),
        ..Rules::default()
    };
    let to = SocketAddr::new(vip, 80);
    let without = Config {
        policy_routes: false,
        ..Config::default()
    };
    let running = Running::start_with(netns, without, rules.clone(), "dport 80 dnat");
    assert_eq!(
        connect(lab.remote(), to),
        None,
        "the test's router lets a wrong answer through"
    );
    running.stop();

    let config = Config {
        gateways: vec![("eth1".to_owned(), router)],
        ..Config::default()
    };
    let running = Running::start_with(netns, config, rules, "ct direction reply");
    assert!(connect(lab.remote(), to).is_some_and(|said| said.starts_with("node1")));
    running.stop();
}

/// Waits until `seen` holds.
fn until_seen(what: &str, mut seen: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !seen() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Two NICs with routers, as a node has them: the default by eth0 is preferred by its metric.
fn mk_two_nics() -> Netns {
    let netns = Netns::create("nics").unwrap();
    netns
        .ip_batch(
            "link add eth0 type veth peer name peer0\nlink add eth1 type veth peer name peer1\n\
             link set eth0 up\nlink set peer0 up\nlink set eth1 up\nlink set peer1 up\n\
             addr add 10.88.0.11/24 dev eth0\naddr add 10.89.0.11/24 dev eth1\n\
             addr add fd00:88::11/64 dev eth0 nodad\naddr add fd00:89::11/64 dev eth1 nodad\n\
             route add default via 10.88.0.1 dev eth0 metric 100\n\
             route add default via 10.89.0.1 dev eth1 metric 200\n\
             route add default via fd00:88::1 dev eth0 metric 100\n\
             route add default via fd00:89::1 dev eth1 metric 200\n",
        )
        .unwrap();
    netns
}

fn mk_policy(vips: &[&str]) -> Rules {
    let vips = vips.iter().map(|vip| vip.parse::<IpAddr>().unwrap());
    Rules {
        vips: vips.clone().collect(),
        uplinks: vips.map(|vip| (vip, "eth1".into())).collect(),
        ..Rules::default()
    }
}

fn has_policy_routes(netns: &Netns) -> bool {
    ["-4", "-6"].iter().all(|family| {
        netns
            .ip(&format!("{family} route show table 7950"))
            .is_ok_and(|routes| routes.contains("dev eth1"))
            && netns
                .ip(&format!("{family} rule"))
                .is_ok_and(|rules| rules.matches("fwmark").count() == 2)
    })
}

/// Runs `work` beside the rules' task, in its namespace.
fn beside<T: Send>(netns: &Netns, work: impl FnOnce(&node_rules::Handle) -> T + Send) -> T {
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let handle = {
            let _inside = runtime.enter();
            node_rules::start(Config::default(), &mut Registry::default())
        };
        work(&handle)
    })
}

#[test]
fn policy_routes_outlive_other_changes_and_come_back_with_their_link() {
    let netns = mk_two_nics();
    beside(&netns, |handle| {
        handle.apply(mk_policy(&["10.89.0.200", "fd00:89::200"]));
        until_seen("the policy routes are made", || has_policy_routes(&netns));
        // Another VIP, another look at the routes: ours must not pass for the node's preferred one.
        let more = ["10.89.0.200", "10.89.0.201", "fd00:89::200"];
        handle.apply(mk_policy(&more));
        until(&netns, "10.89.0.201");
        thread::sleep(Duration::from_millis(300));
        assert!(has_policy_routes(&netns), "taken away by the second VIP");

        netns
            .ip_batch("link set eth1 down\nlink set eth1 up\n")
            .unwrap();
        // What configured the link adds its routes again.
        netns
            .ip_batch("route replace default via 10.89.0.1 dev eth1 metric 200\nroute replace default via fd00:89::1 dev eth1 metric 200\n")
            .unwrap();
        until_seen("they come back with the link", || has_policy_routes(&netns));

        netns.ip("rule flush").unwrap();
        netns
            .ip_batch("rule add lookup main priority 32766\n")
            .unwrap();
        until_seen("they come back after a flush", || has_policy_routes(&netns));

        // Now the node prefers the uplink itself: nothing of ours is needed.
        netns
            .ip_batch("route del default dev eth0\nroute del default via fd00:88::1 dev eth0\n")
            .unwrap();
        until_seen("not needed any more", || {
            netns
                .ip("-4 rule")
                .is_ok_and(|rules| !rules.contains("fwmark"))
        });
    });
}

#[test]
fn a_single_flushed_chain_or_set_is_put_back() {
    let netns = Netns::create("chain").unwrap();
    let [vip, _] = landfall_lab::address::vips(0);
    let service = VipPort {
        vip,
        protocol: Protocol::Tcp,
        port: 443,
    };
    let targets = HostTargets {
        local: Some("10.88.0.11:6443".parse().unwrap()),
        remote: Vec::new(),
    };
    let rules = Rules {
        host_services: BTreeMap::from([(service, targets)]),
        ..mk_guard()
    };
    let running = Running::start(&netns, rules, "dport 443 dnat");
    netns
        .nft("flush chain inet landfall deliver-own\n")
        .unwrap();
    until_seen("deliver-own is put back", || {
        netns
            .exec("nft list chain inet landfall deliver-own")
            .is_ok_and(|chain| chain.contains("dnat"))
    });
    netns.nft("flush set inet landfall vips4\n").unwrap();
    until_seen("the VIPs are put back", || {
        netns
            .exec("nft list set inet landfall vips4")
            .is_ok_and(|set| set.contains(&vip.to_string()))
    });
    running.stop();
}

#[test]
fn kube_proxys_map_is_followed() {
    let netns = Netns::create("kube").unwrap();
    let [vip4, vip6] = landfall_lab::address::vips(0);
    let script = |verb: &str, family: &str, vip: IpAddr| {
        format!(
            "{verb} element {family} kube-proxy service-ips {{ {vip} . tcp . 80 : goto web }}\n"
        )
    };
    let map = |family: &str, kind: &str| {
        format!(
            "add table {family} kube-proxy\nadd chain {family} kube-proxy web\n\
             add map {family} kube-proxy service-ips {{ type {kind} . inet_proto . inet_service : verdict; }}\n"
        )
    };
    beside(&netns, |handle| {
        let serves = |vip| handle.kube_proxy_serves(vip, Protocol::Tcp, 80);
        assert_eq!(serves(vip4), None);
        netns.nft(&map("ip", "ipv4_addr")).unwrap();
        until_seen("there is a map", || serves(vip4) == Some(false));
        assert_eq!(serves(vip6), None, "not for IPv6");
        netns.nft(&script("add", "ip", vip4)).unwrap();
        until_seen("it is served", || serves(vip4) == Some(true));
        netns.nft(&map("ip6", "ipv6_addr")).unwrap();
        netns.nft(&script("add", "ip6", vip6)).unwrap();
        until_seen("IPv6 is served", || serves(vip6) == Some(true));
        netns.nft(&script("delete", "ip", vip4)).unwrap();
        until_seen("it is served no more", || serves(vip4) == Some(false));
        netns.nft("flush ruleset\n").unwrap();
        until_seen("kube-proxy is gone", || serves(vip6).is_none());
    });
}

/// An address that pods leave by answers what asks for a connection, and nothing else: that may belong to a flow that is
/// not known here yet. One that only Services have answers all of it.
#[test]
fn an_address_that_pods_leave_by_refuses_a_syn_only() {
    const ACK: u8 = 16;
    const SYN: u8 = 2;
    let lab = mk_small();
    let node = &lab.node("node1").unwrap().netns;
    let client = lab.client();
    let [quiet, loud]: [Ipv4Addr; 2] = ["10.88.0.240", "10.88.0.241"].map(|it| it.parse().unwrap());
    let via = lab.node("node1").unwrap().addresses(Network::Lan)[0];
    for vip in [quiet, loud] {
        client
            .exec(&format!("ip route add {vip}/32 via {via}"))
            .unwrap();
    }
    let both = [quiet, loud].map(IpAddr::from);
    let rules = Rules {
        vips: BTreeSet::from(both),
        refusing: both.map(|vip| (vip, BTreeSet::new())).into(),
        silent: BTreeSet::from([quiet.into()]),
        ..Rules::default()
    };
    let running = Running::start(node, rules, "@silent4");
    let answer = |vip: Ipv4Addr, flags: u8| client.run(move || reset_by(vip, flags)).unwrap();
    for flags in [SYN, ACK, SYN | ACK] {
        assert!(answer(loud, flags), "{flags}");
        assert_eq!(answer(quiet, flags), flags == SYN, "{flags}");
    }
    let datagram = |vip: Ipv4Addr| {
        client
            .run(move || {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.set_read_timeout(Some(Duration::from_millis(500)))?;
                socket.connect((vip, 4000))?;
                socket.send(b"x")?;
                std::io::Result::Ok(socket.recv(&mut [0; 8]).unwrap_err().kind())
            })
            .unwrap()
    };
    assert_eq!(datagram(loud), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(datagram(quiet), std::io::ErrorKind::WouldBlock);
    running.stop();
}

/// Whether a segment with these flags, of no connection, is answered by a reset.
fn reset_by(vip: Ipv4Addr, flags: u8) -> std::io::Result<bool> {
    const OWN: u16 = 25_000;
    const RST: u8 = 4;
    let own = {
        let probe = UdpSocket::bind("0.0.0.0:0")?;
        probe.connect((vip, 1))?;
        match probe.local_addr()?.ip() {
            IpAddr::V4(own) => own,
            IpAddr::V6(_) => unreachable!("the socket is an IPv4 one"),
        }
    };
    let port = OWN + u16::from(flags);
    let mut segment = [0; 20];
    let mut tcp = MutableTcpPacket::new(&mut segment).unwrap();
    tcp.set_source(port);
    tcp.set_destination(4000);
    tcp.set_sequence(1);
    tcp.set_acknowledgement(1);
    tcp.set_data_offset(5);
    tcp.set_flags(flags);
    tcp.set_window(1000);
    tcp.set_checksum(tcp::ipv4_checksum(&tcp.to_immutable(), &own, &vip));
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::TCP))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    socket.send_to(&segment, &SocketAddr::from((vip, 0)).into())?;
    let begun = Instant::now();
    let mut socket = socket;
    let mut answer = [0; 256];
    while begun.elapsed() < Duration::from_secs(2) {
        match socket.read(&mut answer) {
            // Behind the IP header, which has no options.
            Ok(40..) => {
                let to = u16::from_be_bytes([answer[22], answer[23]]);
                if to == port && answer[33] & RST != 0 {
                    return Ok(true);
                }
            }
            Ok(_) => {}
            Err(_) => return Ok(false),
        }
    }
    Ok(false)
}
