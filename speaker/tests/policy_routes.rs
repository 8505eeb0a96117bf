//! Delivery without kube-proxy on nodes with two NICs: an answer leaves by the NIC that its VIP is announced on, though
//! connection tracking never saw the VIP and the default route is the other's.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::fault::SPEAKER;
use landfall_lab::manifests::{ECHO, LINES, Manifests, Policy};
use landfall_lab::{Lab, Netns, Network, Topology};
use serde_json::json;

/// What a busy machine can promise.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long an answer may take that there may be none of.
const A_WHILE: Duration = Duration::from_secs(2);
const NODE: &str = "node1";

/// A node, its pod, and a Service at addresses of the second LAN. The node's default route is by the first.
fn mk_lab(vips: [IpAddr; 2]) -> Lab {
    let lab = Lab::build(Topology {
        nodes: 1,
        management: false,
        second_nic: true,
        ..Topology::default()
    })
    .expect("the lab needs root and Debian's iproute2 and nftables");
    lab.serve_pods().unwrap();
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_nodes(&lab).unwrap();
    write_service(&lab, "second", vips);
    lab
}

/// A Service of the pod, and a pool with its addresses.
fn write_service(lab: &Lab, name: &str, vips: [IpAddr; 2]) {
    let addresses = vips.map(|vip| format!("{vip}-{vip}"));
    let pool = json!({
        "apiVersion": "landfall.dev/v1alpha1", "kind": "IPAddressPool",
        "metadata": {"name": name}, "spec": {"addresses": addresses},
    });
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write(&format!("pool-{name}"), &pool).unwrap();
    manifests.write_service(name, vips, Policy::Local).unwrap();
    manifests.write_endpoints(name, lab.pods()).unwrap();
}

/// Starts the node's speaker.
fn speak(lab: &Lab, policy_routes: bool) {
    let state = lab.directory().join("state");
    std::fs::create_dir_all(&state).unwrap();
    let routers = Network::SecondLan.both(1);
    let routers = routers.map(|router| format!("eth1={router}")).join(",");
    let program = lab
        .speaker(NODE)
        .unwrap()
        .option("--manifests", lab.manifests_dir().display())
        .option("--state-dir", state.display())
        .option("--delivery", "native")
        .option("--uplink-gateway", routers)
        .option("--policy-routes", policy_routes);
    lab.start(NODE, SPEAKER, &program).unwrap();
}

/// The pod that answers a line over TCP.
fn line(from: &Netns, vip: IpAddr) -> Option<String> {
    from.run(|| {
        let to = SocketAddr::new(vip, LINES);
        let mut stream = TcpStream::connect_timeout(&to, A_WHILE).ok()?;
        stream.set_read_timeout(Some(A_WHILE)).ok()?;
        stream.write_all(b"hello\n").ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        pod_of(&line)
    })
}

/// The pod that answers a datagram.
fn datagram(from: &Netns, vip: IpAddr) -> Option<String> {
    from.run(|| {
        let any = if vip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect((vip, ECHO)).ok()?;
        socket.set_read_timeout(Some(A_WHILE)).ok()?;
        socket.send(b"hello").ok()?;
        let mut answer = [0; 64];
        let length = socket.recv(&mut answer).ok()?;
        pod_of(std::str::from_utf8(&answer[..length]).ok()?)
    })
}

fn pod_of(answer: &str) -> Option<String> {
    let mut words = answer.split_whitespace();
    words.next().map(str::to_owned)
}

/// Waits until the pod answers by both protocols at all addresses.
fn await_served(lab: &Lab, from: &Netns, vips: [IpAddr; 2]) {
    let begun = Instant::now();
    let pod = Some("node1-pod0".to_owned());
    for vip in vips {
        while line(from, vip) != pod || datagram(from, vip) != pod {
            if begun.elapsed() > PATIENCE {
                let netns = lab.host(NODE).unwrap();
                println!("{}", lab.log(NODE, SPEAKER).unwrap());
                println!("{}", netns.exec("nft list table inet landfall").unwrap());
                println!("{}", netns.exec("ip rule").unwrap());
                panic!("{vip} does not answer {}", from.name());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[test]
fn what_the_programs_translate_is_answered_by_the_uplink_of_the_vip() {
    let vips = Network::SecondLan.both(200);
    let lab = mk_lab(vips);
    // What leaves by the default route, eth0, is a wrong answer: the router takes none from there.
    for (family, protocol, vip) in [("ip", "ip", vips[0]), ("ip6", "ip6", vips[1])] {
        lab.router()
            .nft(&format!(
                "add table {family} strict\n\
                 add chain {family} strict pre {{ type filter hook prerouting priority raw; }}\n\
                 add rule {family} strict pre iifname eth0 {protocol} saddr {vip} counter drop\n"
            ))
            .unwrap();
    }
    speak(&lab, false);
    // The router is on the second LAN itself, and needs no route.
    await_served(&lab, lab.router(), vips);
    for vip in vips {
        let said = (line(lab.remote(), vip), datagram(lab.remote(), vip));
        assert_eq!(said, (None, None), "the test lets a wrong answer through");
    }
    lab.stop(NODE, SPEAKER);
    speak(&lab, true);
    await_served(&lab, lab.remote(), vips);
    await_served(&lab, lab.router(), vips);

    // A connection that is there outlives the table's being written anew.
    let netns = lab.host(NODE).unwrap();
    let to = SocketAddr::new(vips[0], LINES);
    let stream = lab
        .remote()
        .run(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    for turn in 0..2 {
        (&stream).write_all(b"hello\n").unwrap();
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert_eq!(line, "node1-pod0 hello\n");
        if turn == 0 {
            netns.nft("delete table inet landfall\n").unwrap();
        }
    }

    // On eth0's segment there are clients too. Their answers leave by eth0, where a program has to know them.
    write_service(&lab, "first", Network::Lan.both(200));
    await_served(&lab, lab.client(), vips);
    await_served(&lab, lab.remote(), vips);
}

/// How often the node's speaker has logged this.
fn said(lab: &Lab, words: &str) -> usize {
    lab.log(NODE, SPEAKER).unwrap().matches(words).count()
}

fn await_said(lab: &Lab, words: &str, times: usize) {
    let begun = Instant::now();
    while said(lab, words) < times {
        let log = || lab.log(NODE, SPEAKER).unwrap();
        assert!(begun.elapsed() < PATIENCE, "{words}, in {}", log());
        thread::sleep(Duration::from_millis(100));
    }
}

/// The default route leaves the uplink at run time, and leaves no router there.
#[test]
fn a_router_that_is_missed_is_named_once() {
    const MISSED: &str = "eth0 has no IPv4 router";
    const BY_ETH1: &str = "beyond it leave by eth1; add a default route with a higher metric on eth0, or --uplink-gateway";
    const AGAIN: &str = "eth0: IPv4 answers to clients beyond it leave by it again";
    let vips = Network::Lan.both(200);
    let lab = mk_lab(vips);
    speak(&lab, true);
    await_served(&lab, lab.client(), vips);
    assert_eq!(said(&lab, MISSED), 0, "it is there");
    let netns = lab.host(NODE).unwrap();
    let default = |nic: &str, router: IpAddr| {
        let route = format!("route replace default via {router} dev {nic}");
        netns.ip(&route).unwrap();
    };
    for times in 1..3 {
        default("eth1", Network::SecondLan.both(1)[0]);
        await_said(&lab, MISSED, times);
        assert_eq!(said(&lab, BY_ETH1), times);
        // Other routes come and go, and it is said already.
        netns.ip("route add 203.0.113.0/24 dev eth1").unwrap();
        thread::sleep(A_WHILE);
        netns.ip("route del 203.0.113.0/24 dev eth1").unwrap();
        thread::sleep(A_WHILE);
        assert_eq!(said(&lab, MISSED), times, "said once");
        default("eth0", Network::Lan.both(1)[0]);
        await_said(&lab, AGAIN, times);
    }
    // Another reason is news.
    default("eth1", Network::SecondLan.both(1)[0]);
    await_said(&lab, BY_ETH1, 3);
    netns.ip("route del default").unwrap();
    await_said(&lab, "leave by another interface", 1);
    assert_eq!(said(&lab, MISSED), 4);
}
