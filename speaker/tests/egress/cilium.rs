//! Beside what stands in for Cilium: what pods send outside goes from their interfaces to the uplink past the packet filter,
//! with an identity in the packet mark that has both of our bits; flows are known by maps that it pins.
//!
//! It masquerades nothing: what is nobody's leaves with the pod's own address, which the router knows the way to.

use std::fmt::Write as _;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use landfall_ebpf_common::egress::judge::cilium::{
    BORROWED, FROM_OUTSIDE, MASQUERADED, key_v4, key_v6,
};
use landfall_ebpf_common::tcx;
use landfall_lab::server::{TCP_PORT, UDP_PORT};
use landfall_lab::{Mac, PodLinks};

use super::cni::Cni;
use super::flow::{A_WHILE, Datagrams, Pair, line, remote, seen_as};
use super::node::{Cluster, NODE, POLICY, Plan, until};
use super::stand_in::{self, IDENTITY, VALUE, mk_maps};

fn mk_plan() -> Plan {
    Plan {
        pod_links: PodLinks::PointToPoint,
        cilium: true,
        ..Plan::default()
    }
}

/// Makes a node's pods send past the packet filter, and the maps; where they are.
pub(super) fn pass_by(cluster: &Cluster) -> PathBuf {
    let pods = cluster.lab.node(NODE).unwrap().pods.len();
    let links: Vec<String> = (0..pods).map(|number| format!("veth{number}")).collect();
    let routers = cluster.network().both(1);
    stand_in::pass_by(
        cluster.node(),
        &links,
        cluster.nic.name(),
        routers,
        IDENTITY,
    );
    let own = cluster.lab.node(NODE).unwrap().addresses(cluster.network());
    for (net, node) in landfall_lab::address::pod_cidrs(1).iter().zip(own) {
        let router = cluster.lab.router();
        router
            .ip(&format!("route replace {net} via {node}"))
            .unwrap();
    }
    let directory = cluster.lab.mount_pins().unwrap().join("cilium");
    std::fs::create_dir(&directory).unwrap();
    mk_maps(cluster.node(), &directory);
    directory
}

/// Enters a flow of a pod's, by its addresses and ports as the pod sends them.
fn enter(cluster: &Cluster, kind: &str, pod: IpAddr, to: IpAddr, ports: [u16; 2], protocol: u8) {
    let flags = match kind {
        "snat" => MASQUERADED,
        _ => FROM_OUTSIDE,
    };
    let (family, key) = match (pod, to) {
        (IpAddr::V4(pod), IpAddr::V4(to)) => {
            let key = key_v4(&pod.octets(), &to.octets(), ports, protocol, flags);
            ("4", key.to_vec())
        }
        (IpAddr::V6(pod), IpAddr::V6(to)) => {
            let key = key_v6(&pod.octets(), &to.octets(), ports, protocol, flags);
            ("6", key.to_vec())
        }
        _ => unreachable!("one family"),
    };
    let pin = match kind {
        "snat" => format!("cilium_snat_v{family}_external"),
        kind => format!("cilium_{kind}{family}_global"),
    };
    let mut line = format!(
        "bpftool map update pinned {} key hex",
        cluster.cilium.as_ref().unwrap().join(pin).display()
    );
    for byte in key {
        let _ = write!(line, " {byte:02x}");
    }
    let _ = write!(line, " value hex{}", " 00".repeat(VALUE));
    cluster.node().exec(&line).unwrap();
}

/// The tenant's flows leave by the policy's addresses, and the other pod's as they would without.
fn assert_led(cluster: &Cluster) {
    let plain = cluster.pod(1).addresses;
    for (family, remote) in remote().into_iter().enumerate() {
        let egress = cluster.egress_ips()[family];
        let seen = seen_as(&cluster.pod(0).netns, remote);
        assert_eq!(seen, (Some(egress), Some(egress)), "{}", cluster.state());
        let other = Some(plain[family]);
        let seen = seen_as(&cluster.pod(1).netns, remote);
        assert_eq!(seen, (other, other), "{}", cluster.state());
    }
}

#[test]
fn tenants_leave_by_their_gateway_and_others_as_they_did() {
    let cluster = Cluster::armed(&mk_plan());
    assert_led(&cluster);
    // They are in their places, and go there again.
    let node = cluster.node();
    let uplink = node.interface_index("eth0").unwrap();
    let programs = || node.run(|| tcx::programs(uplink, tcx::Hook::Egress).unwrap());
    let before = programs();
    let pins = cluster.lab.mount_pins().unwrap().join(NODE);
    let links = std::fs::read_dir(&pins).unwrap().flatten().next().unwrap();
    std::fs::remove_file(links.path().join(format!("links/{uplink}-judge"))).unwrap();
    until("who judges is in front again", || programs() == before);
    assert_led(&cluster);
    cluster.assert_clean(&cluster.pod(1).addresses);
    let flows = ["led-unjudged", "forged", "unsendable", "joined"];
    for what in flows {
        assert_eq!(cluster.guarded()[what], 0, "{what}");
    }
    assert!(cluster.guarded()["led"] > 0);
}

/// Who asks the tenant from outside is answered by the address that was asked: Cilium knows the flow.
#[test]
fn who_asks_from_outside_is_answered() {
    let cluster = Cluster::armed(&mk_plan());
    for (address, outside) in cluster.pod(0).addresses.into_iter().zip(remote()) {
        let pod = &cluster.pod(0).netns;
        let listener = pod.run(|| TcpListener::bind((address, 0)).unwrap());
        let port = listener.local_addr().unwrap().port();
        let asks = |from: u16| {
            let socket = socket2::Socket::new(
                socket2::Domain::for_address((address, port).into()),
                socket2::Type::STREAM,
                None,
            )
            .unwrap();
            socket.bind(&std::net::SocketAddr::from((outside, from)).into())?;
            socket.connect_timeout(&std::net::SocketAddr::from((address, port)).into(), A_WHILE)?;
            Ok::<TcpStream, std::io::Error>(socket.into())
        };
        let from_outside = |from| cluster.lab.remote().run(|| asks(from));
        let led = || {
            let frames = cluster.wire.outbound();
            let gateway = Mac(cluster.gateway_mac());
            let mut of_pod = frames.iter().filter(|frame| frame.source == address);
            let led = of_pod.next().expect("it answers").to == gateway;
            assert!(
                of_pod.all(|frame| (frame.to == gateway) == led),
                "{frames:?}"
            );
            cluster.wire.clear();
            led
        };
        // The gateway of this lab lets through what one of ours would drop.
        drop(from_outside(4001).map(|_| listener.accept().unwrap()));
        assert!(led(), "nobody knows of it");
        enter(&cluster, "ct", address, outside, [port, 4002], 6);
        let known =
            from_outside(4002).unwrap_or_else(|error| panic!("{error}\n{}", cluster.state()));
        assert_eq!(known.peer_addr().unwrap().ip(), address);
        let (accepted, seen_as) = listener.accept().unwrap();
        assert_eq!(seen_as.ip(), outside);
        drop(accepted);
        assert!(!led(), "it is an answer");
    }
    assert_led(&cluster);
}

/// What the pod had before it was a tenant goes on as it did, and what it begins leaves by the gateway; also when the policy is
/// the first, and when the pod is a tenant no more.
#[test]
fn flows_keep_what_they_began_with() {
    let mut cluster = Cluster::build(&mk_plan());
    let (pod, outside) = (cluster.pod(0).netns.share(), cluster.lab.remote().share());
    let own = cluster.pod(0).addresses;
    // What begins while it changes whose the pod is may end at once: Cilium would remember it, and nobody is here who does.
    let try_to = || -> std::io::Result<Vec<Pair>> {
        let of = |remote| Pair::open(&pod, &outside, remote);
        remote().into_iter().map(of).collect()
    };
    let open = || try_to().unwrap();
    let mut early = open();
    for (flow, own) in early.iter().zip(own) {
        let to = flow.pod.peer_addr().unwrap();
        let ports = [flow.pod.local_addr().unwrap().port(), to.port()];
        enter(&cluster, "snat", own, to.ip(), ports, 6);
    }
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    let mut later = open();
    let speak = |flows: &mut Vec<Pair>, what: &str, cluster: &Cluster| {
        for flow in flows {
            flow.pod_speaks()
                .and_then(|()| flow.outside_speaks())
                .unwrap_or_else(|error| panic!("{what}: {error}\n{}", cluster.state()));
        }
    };
    for (family, flow) in later.iter().enumerate() {
        assert_eq!(flow.seen_as, cluster.egress_ips()[family]);
        assert_eq!(early[family].seen_as, own[family]);
    }
    speak(&mut early, "from before the policy", &cluster);
    speak(&mut later, "of the policy", &cluster);

    let tenant = cluster.egress.clone();
    let mut plain = tenant.clone();
    cluster.place(&mut plain, 0, None);
    for address in own {
        plain.pods.get_mut(&address).unwrap().former = Some(POLICY.into());
    }
    cluster.egress = plain;
    cluster.apply();
    until("new flows leave as the pod", || {
        let flows = try_to().unwrap_or_default();
        !flows.is_empty() && flows.iter().zip(own).all(|(flow, own)| flow.seen_as == own)
    });
    speak(&mut later, "of the policy that the pod has left", &cluster);
    speak(&mut early, "from before both", &cluster);

    cluster.egress = tenant;
    cluster.apply();
    until("they leave by the policy again", || {
        let flows = try_to().unwrap_or_default();
        let seen = flows.iter().map(|flow| flow.seen_as);
        seen.eq(cluster.egress_ips())
    });
    speak(
        &mut later,
        "of the policy, which has the pod again",
        &cluster,
    );
    speak(&mut early, "from before it all", &cluster);
    cluster.assert_clean(&own);
}

/// Cilium makes its maps anew when their size changes: what is in the new ones counts.
#[test]
fn maps_that_are_made_anew_are_read() {
    let cluster = Cluster::armed(&mk_plan());
    assert_led(&cluster);
    let directory = cluster.cilium.clone().unwrap();
    mk_maps(cluster.node(), &directory);
    let (tenant, outside) = (cluster.pod(0).addresses[0], remote()[0]);
    // Each is another: a flow keeps what it began with.
    let mut ports = 4000..;
    until("flows are known", || {
        let port = ports.next().unwrap();
        enter(&cluster, "ct_any", tenant, outside, [port, UDP_PORT], 17);
        let socket = Datagrams::open_at(&cluster.pod(0).netns, port, outside);
        socket.seen_as(Duration::from_millis(500)) == Some(tenant)
    });
    assert_led(&cluster);
    // Without any it goes on as well as it can: nothing is taken for an answer.
    for borrowed in BORROWED {
        std::fs::remove_file(directory.join(borrowed.pin)).unwrap();
    }
    assert_led(&cluster);
    let both = [cluster.pod(0).addresses, cluster.pod(1).addresses].concat();
    cluster.assert_clean(&both);
}

/// Who is not known does not leave, nor a tenant without a gateway.
#[test]
fn it_is_closed() {
    let mut cluster = Cluster::build(&mk_plan());
    for address in cluster.pod(1).addresses {
        cluster.egress.pods.remove(&address);
    }
    for policy in cluster.egress.policies.values_mut() {
        policy.gateway = None;
    }
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    for remote in remote() {
        for number in 0..2 {
            assert_eq!(seen_as(&cluster.pod(number).netns, remote), (None, None));
        }
    }
    cluster.assert_clean(&[]);
    let guarded = cluster.guarded();
    assert!(
        guarded["unjudged"] > 0 && guarded["no-gateway"] > 0,
        "{guarded:?}"
    );
}

/// There is a Cilium that masquerades by iptables, or none: what the program would take for the node's own is dropped.
#[test]
fn what_comes_by_the_packet_filter_and_is_masqueraded_is_dropped() {
    let mut cluster = Cluster::build(&mk_plan());
    cluster.node().nft("delete table netdev cilium\n").unwrap();
    let nodes = cluster.node_ips().map(Into::into);
    cluster.egress.inside.extend::<[ipnet::IpNet; 2]>(nodes);
    Cni::Nftables.masquerade(cluster.node());
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    for (remote, node) in remote().into_iter().zip(cluster.node_ips()) {
        assert_eq!(seen_as(&cluster.pod(0).netns, remote), (None, None));
        let node = Some(node);
        assert_eq!(seen_as(&cluster.pod(1).netns, remote), (node, node));
    }
    assert!(cluster.dropped("translated") > 0);
    cluster.assert_clean(&cluster.node_ips());
    // The other pod becomes a tenant, and the first one nobody's.
    let mut egress = cluster.egress.clone();
    cluster.place(&mut egress, 0, None);
    cluster.place(&mut egress, 1, Some(POLICY));
    cluster.egress = egress;
    cluster.apply();
    let seen =
        |cluster: &Cluster, number: usize| seen_as(&cluster.pod(number).netns, remote()[0]).1;
    until("the one leaves and the other does not", || {
        let node = Some(cluster.node_ips()[0]);
        (seen(&cluster, 0), seen(&cluster, 1)) == (node, None)
    });
}

#[test]
fn only_what_the_policy_is_for_leaves_by_it() {
    let mut cluster = Cluster::build(&mk_plan());
    let policies = cluster.egress.policies.clone();
    let change = |cluster: &mut Cluster, change: &dyn Fn(&mut landfall_speaker::egress::Policy)| {
        cluster.egress.policies.clone_from(&policies);
        cluster.egress.policies.values_mut().for_each(change);
        cluster.apply();
    };
    cluster.start();
    cluster.apply();
    cluster.await_armed();
    let nets = || remote().map(Into::into);
    let (own, egress) = (cluster.pod(0).addresses, cluster.egress_ips());
    let is_seen_as = |cluster: &Cluster, expected: [IpAddr; 2]| {
        let pod = &cluster.pod(0).netns;
        remote()
            .into_iter()
            .zip(expected)
            .all(|(remote, expected)| {
                line(pod, (remote, TCP_PORT).into(), A_WHILE).is_ok_and(|seen| seen == expected)
            })
    };
    let away = ["198.51.100.0/24", "2001:db8:99::/48"].map(|net| net.parse().unwrap());
    change(&mut cluster, &|policy| policy.destinations = nets().into());
    until("it is for that", || is_seen_as(&cluster, egress));
    change(&mut cluster, &|policy| policy.destinations = away.into());
    until("it is for others", || is_seen_as(&cluster, own));
    change(&mut cluster, &|policy| policy.excluded = away.into());
    until("it is not for others", || is_seen_as(&cluster, egress));
    change(&mut cluster, &|policy| policy.excluded = nets().into());
    until("it is not for that", || is_seen_as(&cluster, own));
    change(&mut cluster, &|policy| policy.excluded = away.into());
    until("it is for that again", || is_seen_as(&cluster, egress));
    cluster.assert_clean(&[own, cluster.pod(1).addresses].concat());
}
