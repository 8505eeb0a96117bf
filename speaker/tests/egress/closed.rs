//! What is not known does not leave, nor what has no gateway, nor what claims to be another's, nor anything of a tenant's
//! where the guard is missing.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use landfall_lab::packets::datagram;
use landfall_lab::raw::send_frame;
use landfall_lab::server::{TCP_PORT, UDP_PORT};
use landfall_lab::{Mac, Netns, Network, Nic, PodLinks};
use landfall_speaker::node_rules::NodeRules as _;
use pnet_packet::ipv4::{self, MutableIpv4Packet};

use super::cni::Cni;
use super::flow::{A_WHILE, Datagrams, line, remote, seen_as};
use super::node::{Cluster, PATIENCE, POLICY, Plan, until};
use super::wire::NOWHERE;

/// How many connections each pod begins in its first moment, to each of the remote's addresses.
const EAGER: usize = 25;
const PODS: u8 = 4;

/// Begins connections; the addresses by which they are seen in the end.
fn begin(pod: &Netns, remote: IpAddr) -> Vec<JoinHandle<IpAddr>> {
    let to = SocketAddr::new(remote, TCP_PORT);
    (0..EAGER)
        .map(|_| {
            let pod = pod.share();
            thread::spawn(move || line(&pod, to, PATIENCE).unwrap())
        })
        .collect()
}

#[test]
fn pods_that_nobody_knows_yet_are_served_once_they_are_known_and_leave_by_nothing_else() {
    let mut cluster = Cluster::build(&Plan {
        pods: PODS,
        ..Plan::default()
    });
    let known = cluster.egress.clone();
    cluster.egress.pods.clear();
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    let begun = Instant::now();
    let mut connections = Vec::new();
    for number in 0..usize::from(PODS) {
        for remote in remote() {
            connections.extend(begin(&cluster.pod(number).netns, remote));
        }
    }
    let all = u64::try_from(connections.len()).unwrap();
    until("all have begun", || cluster.dropped("unknown") >= all);
    assert_eq!(
        cluster.wire.outbound().len(),
        0,
        "{:?}",
        cluster.wire.outbound()
    );
    cluster.egress = known;
    for number in 0..usize::from(PODS) {
        let mut egress = cluster.egress.clone();
        cluster.place(&mut egress, number, Some(POLICY));
        cluster.egress = egress;
    }
    cluster.apply();
    for connection in connections {
        let seen = connection.join().unwrap();
        assert!(cluster.egress_ips().contains(&seen), "{seen}");
    }
    println!(
        "{all} connections, dropped {} times, are served after {:.2} s",
        cluster.dropped("unknown"),
        begun.elapsed().as_secs_f64()
    );
    for source in cluster.wire.arrived() {
        assert!(cluster.egress_ips().contains(&source), "{source}");
    }
}

/// Another node takes its pod for a tenant of a gateway here, of which this node has not heard: the pod is not to leave
/// by this node's address.
#[test]
fn what_another_nodes_pod_sends_is_not_translated_to_this_nodes_address() {
    let cluster = Cluster::armed(&Plan::default());
    let lan = Network::Lan;
    let interface = cluster.lab.client().interface_index("eth0").unwrap();
    let pods = landfall_lab::address::pod(2, 0);
    let before = cluster.dropped("unknown");
    for (pod, remote) in pods.into_iter().zip(remote()) {
        let ethertype: [u8; 2] = if pod.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
        let mut packet = datagram(
            SocketAddr::new(pod, 4000),
            SocketAddr::new(remote, UDP_PORT),
            b"who am I?",
        );
        if pod.is_ipv4() {
            let mut header = MutableIpv4Packet::new(&mut packet).unwrap();
            let sum = ipv4::checksum(&header.to_immutable());
            header.set_checksum(sum);
        }
        let to = cluster.lab.node("node1").unwrap().mac(Nic::Eth0);
        let frame = [&to.0[..], &lan.mac(12).0, &ethertype, &packet].concat();
        cluster
            .lab
            .client()
            .run(|| send_frame(interface, &frame))
            .unwrap();
    }
    until("they are counted", || {
        cluster.dropped("unknown") == before + 2
    });
    cluster.assert_clean(&[]);
}

#[test]
fn without_the_table_the_guard_lets_nobody_out_that_is_not_known() {
    let mut cluster = Cluster::build(&Plan::default());
    cluster.start();
    let tenant = cluster.pod(0).addresses;
    let pods = &mut cluster.egress.pods;
    pods.retain(|address, _| tenant.contains(address));
    cluster.apply();
    cluster.await_armed();
    // Nobody puts it back.
    cluster.stop();
    cluster.node().nft("flush ruleset\n").unwrap();
    cluster.cni.masquerade(cluster.node());
    for remote in remote() {
        assert_eq!(seen_as(&cluster.pod(1).netns, remote), (None, None));
    }
    cluster.assert_clean(&[]);
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    until("the next process tells what was counted", || {
        cluster
            .guarded()
            .get("unjudged")
            .is_some_and(|count| *count > 0)
    });
    for (remote, egress) in remote().into_iter().zip(cluster.egress_ips()) {
        let tenant = &cluster.pod(0).netns;
        assert_eq!(seen_as(tenant, remote), (Some(egress), Some(egress)));
    }
}

/// Without the guard nobody gets a tenant's frames: their Ethernet address is one that bridges keep to themselves.
#[test]
fn without_the_guard_a_tenant_reaches_nobody() {
    let mut cluster = Cluster::build(&Plan::default());
    cluster.start();
    let parts = cluster.parts.as_ref().unwrap();
    parts.rules.apply(cluster.rules());
    until("the table judges", || {
        cluster.table().contains("egress-judge")
    });
    for remote in remote() {
        assert_eq!(seen_as(&cluster.pod(0).netns, remote), (None, None));
    }
    let sent = cluster.wire.outbound();
    assert!(!sent.is_empty(), "the test sees no frames");
    for frame in sent {
        assert_eq!(frame.to, NOWHERE, "{frame:?}");
    }
    assert_eq!(cluster.wire.arrived(), [].into());
}

#[test]
fn without_a_gateway_a_tenant_waits_for_one() {
    let mut cluster = Cluster::armed(&Plan::default());
    let gateway = cluster.egress.policies[POLICY].gateway.clone();
    let policy = |cluster: &mut Cluster, gateway| {
        let policies = &mut cluster.egress.policies;
        policies.get_mut(POLICY).unwrap().gateway = gateway;
        cluster.apply();
    };
    policy(&mut cluster, None);
    until("it is known", || {
        !cluster.node().exec("ip rule").unwrap().contains("fwmark")
    });
    let before = cluster.dropped("no-gateway");
    for remote in remote() {
        assert_eq!(seen_as(&cluster.pod(0).netns, remote), (None, None));
    }
    assert!(cluster.dropped("no-gateway") > before, "they are counted");
    assert_eq!(cluster.wire.outbound(), [].into());
    // The others' packets leave as ever.
    let others = cluster.node_ips();
    assert_eq!(
        seen_as(&cluster.pod(1).netns, remote()[0]).0,
        Some(others[0])
    );
    policy(&mut cluster, gateway);
    for (remote, egress) in remote().into_iter().zip(cluster.egress_ips()) {
        let datagrams = Datagrams::open(&cluster.pod(0).netns, remote);
        let mut seen = None;
        until("it goes on by itself", || {
            seen = datagrams.seen_as(Duration::from_millis(200));
            seen.is_some()
        });
        assert_eq!(seen, Some(egress));
    }
    // A tenant for which there is no address is dropped; another of the same policy is not.
    let mut egress = cluster.egress.clone();
    cluster.place(&mut egress, 1, Some(POLICY));
    for address in cluster.pod(1).addresses {
        let pod = egress.pods.get_mut(&address).unwrap();
        pod.tenant.as_mut().unwrap().egress_ip = None;
    }
    cluster.egress = egress;
    cluster.apply();
    let to = cluster.pod(1).addresses[0].to_string();
    until("it is told", || {
        let closed = "nft list set inet landfall egress-closed4";
        cluster.node().exec(closed).unwrap().contains(&to)
    });
    cluster.wire.clear();
    assert_eq!(seen_as(&cluster.pod(1).netns, remote()[0]), (None, None));
    let egress = Some(cluster.egress_ips()[0]);
    assert_eq!(
        seen_as(&cluster.pod(0).netns, remote()[0]),
        (egress, egress)
    );
    cluster.assert_clean(&[]);
}

/// A pod with the address of another. On a bridge that is not seen here, where both come in by the bridge.
fn gets_nothing_by_anothers_address(cni: Cni, pod_links: PodLinks) {
    let cluster = Cluster::armed(&Plan {
        cni,
        pod_links,
        ..Plan::default()
    });
    for (remote, tenant) in remote().into_iter().zip(cluster.pod(0).addresses) {
        forge(&cluster, tenant);
        let forger = &cluster.pod(1).netns;
        let before = cluster.dropped("forged");
        forger.run(|| {
            let socket = UdpSocket::bind((tenant, 0)).unwrap();
            for _ in 0..5 {
                socket.send_to(b"forged", (remote, UDP_PORT)).unwrap();
            }
        });
        // On a bridge already what asks for the router.
        until("it is counted", || cluster.dropped("forged") >= before + 3);
    }
    assert_eq!(cluster.wire.outbound(), [].into(), "{pod_links:?}");
    assert_eq!(cluster.wire.arrived(), [].into(), "{pod_links:?}");
}

#[test]
fn a_forged_source_on_a_bridge_gets_nothing() {
    Cni::each(|cni| gets_nothing_by_anothers_address(cni, PodLinks::Bridge));
}

#[test]
fn a_forged_source_on_a_link_of_its_own_gets_nothing() {
    Cni::each(|cni| gets_nothing_by_anothers_address(cni, PodLinks::PointToPoint));
}

/// The first pod's address is at the second, too.
fn forge(cluster: &Cluster, address: IpAddr) {
    let nodad = if address.is_ipv6() { "nodad" } else { "" };
    let forger = &cluster.pod(1).netns;
    forger
        .ip(&format!("address add {address} dev eth0 {nodad}"))
        .unwrap();
}

/// On a bridge an address is the pod's that had it first; if nobody has seen who that was, it is nobody's until one of them
/// has lost it.
#[test]
fn an_address_at_two_ports_of_a_bridge_is_the_firsts_or_nobodys() {
    let mut cluster = Cluster::armed(&Plan::default());
    let [address, _] = cluster.pod(0).addresses;
    let [remote, _] = remote();
    let is_served = |cluster: &Cluster| seen_as(&cluster.pod(0).netns, remote).0.is_some();
    let forger = cluster.pod(1).netns.share();
    // Whose neighbours take it for whom is another question.
    forger.sysctl("net.ipv4.conf.eth0.arp_ignore", "8").unwrap();
    forge(&cluster, address);
    cluster
        .node()
        .ip("link add looked-at type veth peer name other-end")
        .unwrap();
    thread::sleep(A_WHILE);
    assert!(is_served(&cluster), "another has taken it");
    cluster.stop();
    cluster.start();
    cluster.apply();
    until("it is nobody's", || !is_served(&cluster));
    forger
        .ip(&format!("address del {address} dev eth0"))
        .unwrap();
    until("it is the pod's again", || is_served(&cluster));
}

/// From a bridge no address leaves that is not of the bridge.
#[test]
fn a_source_that_is_nobodys_gets_nothing() {
    Cni::each(|cni| {
        let cluster = Cluster::armed(&Plan {
            cni,
            ..Plan::default()
        });
        let forger = &cluster.pod(1).netns;
        forger.ip("address add 10.244.9.9/32 dev eth0").unwrap();
        forger.ip("address add 198.51.100.9/32 dev eth0").unwrap();
        for from in ["10.244.9.9", "198.51.100.9"] {
            let from: IpAddr = from.parse().unwrap();
            forger.run(|| {
                let socket = UdpSocket::bind((from, 0)).unwrap();
                socket.send_to(b"forged", (remote()[0], UDP_PORT)).unwrap();
            });
        }
        until("both are counted", || cluster.dropped("forged") >= 2);
        assert_eq!(cluster.wire.outbound(), [].into());
    });
}

/// What stays in the cluster is nobody's business, with a gateway or without.
#[test]
fn in_the_cluster_all_is_as_ever() {
    let mut cluster = Cluster::build(&Plan {
        management: true,
        ..Plan::default()
    });
    cluster.egress.policies.get_mut(POLICY).unwrap().gateway = None;
    cluster.egress.pods.clear();
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    cluster.lab.serve_pods().unwrap();
    let from = &cluster.pod(0).netns;
    let mut reached = cluster.pod(1).addresses.to_vec();
    reached.extend(cluster.lab.node("node2").unwrap().pods[0].addresses);
    for (address, own) in reached
        .into_iter()
        .zip(cluster.pod(0).addresses.into_iter().cycle())
    {
        assert_eq!(
            line(from, (address, TCP_PORT).into(), A_WHILE).unwrap(),
            own,
            "{address}"
        );
    }
    // And the node itself.
    let node = cluster.node_ips()[0];
    let listener = cluster.node().run(|| TcpListener::bind((node, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    from.run(|| TcpStream::connect_timeout(&to, A_WHILE))
        .expect("the node is there");
    for reason in ["unknown", "forged", "invalid", "no-gateway"] {
        assert_eq!(cluster.dropped(reason), 0, "{reason}");
    }
}

/// An IPv4 packet with a TCP header that nobody takes: connection tracking calls it invalid, and then it has no connection
/// and is not translated.
fn mk_invalid(source: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0];
    packet.extend(source.octets());
    packet.extend(to.octets());
    let words = packet
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&u16::try_from(sum ^ 0xffff).unwrap().to_be_bytes());
    // From port 4000 to 25, without a flag, and with a checksum that is wrong.
    packet.extend([
        0x0f, 0xa0, 0, 25, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0, 0xff, 0xff, 0xab, 0xcd, 0, 0,
    ]);
    packet
}

#[test]
fn what_is_invalid_does_not_leave_with_a_tenants_address() {
    let cluster = Cluster::armed(&Plan::default());
    let shown = cluster.node().ip("-o link show cni0").unwrap();
    let mut words = shown.split_whitespace();
    assert!(words.any(|word| word == "link/ether"), "{shown}");
    let bridge: Mac = words.next().unwrap().parse().unwrap();
    let [IpAddr::V4(to), _] = remote() else {
        panic!("the first is of IPv4")
    };
    let send = |number: usize| {
        let pod = cluster.pod(number);
        let IpAddr::V4(source) = pod.addresses[0] else {
            panic!("the first is of IPv4")
        };
        let mut frame = bridge.0.to_vec();
        frame.extend([2, 0, 0, 0, 0, 9, 8, 0]);
        frame.extend(mk_invalid(source, to));
        let interface = pod.netns.interface_index("eth0").unwrap();
        pod.netns.run(|| send_frame(interface, &frame).unwrap());
        IpAddr::V4(source)
    };
    send(0);
    until("it is counted", || cluster.dropped("invalid") == 1);
    assert_eq!(cluster.wire.outbound(), [].into());
    // Nobody's tenant's leaves, and shows what a tenant's would be.
    let source = send(1);
    until("it has left", || {
        cluster
            .wire
            .outbound()
            .iter()
            .any(|frame| frame.source == source)
    });
}
