//! What lies between a tenant's pod and its remote: routers that count hops, a narrow way, a node that is off the segment.
//! With the real control plane, kube-proxy, controller and speakers.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use landfall_lab::measure::neighbours::who_answers;
use landfall_lab::server::PodServer;
use landfall_lab::{Fault, Lab, Network, Pod, Topology};
use landfall_tests::flows::Flow;
use landfall_tests::tenants::{self, await_egress, egress, far, outside};
use landfall_tests::{Cluster, ControlPlane, PATIENCE};

/// How long a try to connect may take.
const TRY: Duration = Duration::from_secs(3);
/// Behind the router.
const MTU: u32 = 1300;

#[test]
fn whatever_lies_in_between() {
    Cluster::run(Topology::default(), |cluster| {
        tenants::start(cluster)?;
        let lab = cluster.lab();
        let _near = PodServer::start(lab.client(), "near")?;
        let _far = PodServer::start(lab.remote(), "far")?;
        let pods: Vec<&Pod> = lab.pods().collect();
        for pod in &pods {
            await_egress(pod, outside());
        }
        let answers = who_answers(lab, egress()[0], Duration::from_secs(1))?;
        assert_eq!(answers.len(), 1, "{answers:?} for {}", egress()[0]);
        let gateway = tenants::gateway(lab, egress()[0]);
        let (own, others): (Vec<&Pod>, Vec<&Pod>) =
            pods.iter().partition(|pod| pod.node == gateway);
        println!("{gateway} is the gateway");
        stay_in_the_cluster(lab, &pods);
        for far in far() {
            let family = usize::from(far.ip().is_ipv6());
            let node = lab.node(&gateway)?.addresses(Network::Lan)[family];
            let router = Network::Lan.both(1)[family];
            // The first that is passed is the pod's own node.
            let way = [node, router, far.ip()];
            assert_eq!(trace(others[0], far.ip()), way);
            assert_eq!(trace(own[0], far.ip()), way[1..]);
        }
        narrow(lab);
        for pod in [own[0], others[0]] {
            for far in far() {
                exchange(pod, far, 2_000_000);
                let route = pod.netns.ip(&format!("route get {}", far.ip()))?;
                assert!(
                    route.contains(&format!("mtu {MTU}")),
                    "{}: {route}",
                    pod.name
                );
            }
        }
        // From now on its pods' packets come to the gateway by the tunnel.
        let off = others[0];
        println!("{} loses its uplink", off.node);
        lab.inject(&off.node, Fault::UplinkDown)?;
        await_egress(off, outside());
        for to in outside() {
            exchange(off, to, 20_000_000);
        }
        Ok(())
    });
}

/// What is the cluster's own is no business of policies: the API server, by its Service and by its own address, and those
/// addresses of nodes, too, that no Node object names.
fn stay_in_the_cluster(lab: &Lab, pods: &[&Pod]) {
    let by_service = SocketAddr::from(([10, 96, 0, 1], 443));
    let listening: Vec<TcpListener> = lab
        .nodes()
        .iter()
        .flat_map(|node| node.addresses(Network::Lan).map(|own| (node, own)))
        .map(|(node, own)| node.netns.run(|| TcpListener::bind((own, 0)).unwrap()))
        .collect();
    for pod in pods {
        for to in [by_service, ControlPlane::address()] {
            let reached = pod.netns.run(|| TcpStream::connect_timeout(&to, TRY));
            assert!(reached.is_ok(), "{} at {to}: {reached:?}", pod.name);
        }
        for listener in &listening {
            let to = listener.local_addr().unwrap();
            let reached = pod.netns.run(|| TcpStream::connect_timeout(&to, TRY));
            assert!(reached.is_ok(), "{} at {to}: {reached:?}", pod.name);
            let (_, seen) = listener.accept().unwrap();
            assert!(
                !egress().contains(&seen.ip()),
                "{} at {to}: {seen}",
                pod.name
            );
        }
    }
}

/// Who lets a pod's echo request expire, behind its own node, and who answers at last.
fn trace(pod: &Pod, to: IpAddr) -> Vec<IpAddr> {
    let mut way = Vec::new();
    for ttl in 2..8 {
        way.push(hop(pod, to, ttl));
        if way.ends_with(&[to]) {
            break;
        }
    }
    way
}

fn hop(pod: &Pod, to: IpAddr, ttl: u8) -> IpAddr {
    let begun = Instant::now();
    loop {
        let mut ping = Command::new("ping");
        ping.args(["-n", "-c", "1", "-W", "1", "-t", &ttl.to_string()])
            .arg(to.to_string());
        let output = pod.netns.run(|| ping.output()).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        // "64 bytes from A: icmp_seq=1 …", "From A icmp_seq=1 Time to live exceeded".
        let heard = text.lines().find(|line| line.contains("icmp_seq=1"));
        let from = heard.and_then(|line| {
            let mut words = line.split_whitespace();
            words.find(|word| word.eq_ignore_ascii_case("from"))?;
            words.next()?.trim_end_matches(':').parse().ok()
        });
        if let Some(from) = from {
            return from;
        }
        assert!(begun.elapsed() < PATIENCE, "{} to {to}: {text}", pod.name);
    }
}

/// The way behind the router takes shorter packets.
fn narrow(lab: &Lab) {
    let [v4, v6] = Network::Remote.both(100);
    lab.router()
        .ip_batch(&format!(
            "route add {v4}/32 dev eth1 mtu lock {MTU}\nroute add {v6}/128 dev eth1 mtu {MTU}\n"
        ))
        .unwrap();
}

/// As many bytes each way, unharmed.
fn exchange(pod: &Pod, to: SocketAddr, bytes: u64) {
    let flow = Flow::open(&pod.netns, to).unwrap();
    assert!(egress().contains(&flow.seen_from), "{}", flow.seen_from);
    let begun = Instant::now();
    flow.exchange(bytes, &AtomicU64::new(0)).unwrap();
    println!(
        "{} and {to}: {bytes} bytes each way in {:.1} s",
        pod.name,
        begun.elapsed().as_secs_f64()
    );
}
