//! A tenant that receives mail at the address by which it sends: a Service's, which its pods leave by. With the real control
//! plane, kube-proxy, controller and speakers.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::{Patch, PatchParams};
use landfall_lab::packets::{Raw, segment};
use landfall_lab::server::{PodServer, TCP_PORT, WHO_AM_I};
use landfall_lab::{Fault, Lab, Netns, Network, Pod, Topology};
use landfall_tests::flows::{self, Flow};
use landfall_tests::tenants::{self, await_seen};
use landfall_tests::{Cluster, PATIENCE, objects, until};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

/// Where mail comes in, and a port that nobody serves.
const SMTP: u16 = 25;
const NOBODY: u16 = 26;
/// A pod's own port, which becomes a Service's while a flow leaves by it.
const SHARED: u16 = 24_567;
/// How long silence is.
const SILENCE: Duration = Duration::from_millis(1500);
/// How many connections each pod has outside, and each client to the tenant.
const EACH: usize = 8;

#[test]
fn comes_in_and_goes_out_by_one_address() {
    let topology = Topology {
        nodes: 4,
        ..Topology::default()
    };
    Cluster::run(topology, |cluster| {
        tenants::start_with_service(cluster, &service())?;
        let lab = cluster.lab();
        let _near = PodServer::start(lab.client(), "near")?;
        let _far = PodServer::start(lab.remote(), "far")?;
        serve_mail(lab.remote())?;
        let vips = addresses(cluster);
        println!("the Service's addresses: {vips:?}");
        await_both_ways(lab, vips);
        for vip in vips {
            unknown(lab, vip);
        }
        a_port_becomes_a_services(cluster, vips);
        one_fail_over(lab, vips);
        Ok(())
    });
}

fn service() -> Service {
    objects::service(
        "mail",
        json!({
            "externalTrafficPolicy": "Local",
            "ports": [{"name": "smtp", "protocol": "TCP", "port": SMTP, "targetPort": TCP_PORT}],
        }),
    )
}

async fn services(cluster: &Cluster) -> Api<Service> {
    Api::default_namespaced(cluster.client().await.unwrap())
}

/// The Service's, once it has them.
fn addresses(cluster: &Cluster) -> [IpAddr; 2] {
    until("the Service's addresses", || {
        let service = cluster.block_on(async { services(cluster).await.get("mail").await });
        let service = service.unwrap();
        match objects::ingress(&service)[..] {
            [first, second] if first.is_ipv4() => Ok([first, second]),
            [first, second] => Ok([second, first]),
            _ => Err(service.status),
        }
    })
}

/// A server outside, of the family.
fn outside(v6: bool) -> SocketAddr {
    SocketAddr::new(Network::Remote.both(100)[usize::from(v6)], SMTP)
}

/// A host's server is where mail servers are.
fn serve_mail(host: &Netns) -> landfall_lab::Result<()> {
    host.nft(&format!(
        "add table inet mail
         add chain inet mail in {{ type nat hook prerouting priority dstnat; }}
         add rule inet mail in tcp dport {SMTP} redirect to :{TCP_PORT}"
    ))
}

/// Until mail comes in to each pod, and each pod leaves by the Service's addresses.
fn await_both_ways(lab: &Lab, vips: [IpAddr; 2]) {
    for vip in vips {
        until_served(lab.remote(), SocketAddr::new(vip, SMTP));
        for pod in lab.pods() {
            await_seen(pod, outside(vip.is_ipv6()), |seen| seen == vip);
        }
    }
}

/// Until a server is reached.
fn until_served(from: &Netns, to: SocketAddr) {
    let what = format!("{to} to be served");
    until(&what, || {
        Flow::open_within(from, to, Duration::from_secs(2))
    });
}

/// What belongs to no Service and to no flow: a SYN is refused; all else may be a flow's that is not known here yet, and meets
/// silence.
fn unknown(lab: &Lab, vip: IpAddr) {
    let client = lab.client();
    let to = SocketAddr::new(vip, NOBODY);
    let refused = client.run(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap_err());
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{to}");

    let from = SocketAddr::new(Network::Lan.both(100)[usize::from(vip.is_ipv6())], 20_000);
    let domain = Domain::for_address(to);
    let mut ear = client.run(|| Socket::new(domain, Type::RAW, Some(Protocol::TCP)).unwrap());
    ear.set_read_timeout(Some(SILENCE)).unwrap();
    let raw = Raw::open(client, vip);
    let answers = |ear: &mut Socket| {
        let begun = Instant::now();
        let mut bytes = [0; 256];
        while begun.elapsed() < SILENCE {
            if let Ok(length) = ear.read(&mut bytes) {
                // The kernel gives no IPv6 headers to raw sockets.
                let header = if vip.is_ipv4() { 20 } else { 0 };
                let ports = bytes[..length].get(header..header + 4);
                let expected = [to.port().to_be_bytes(), from.port().to_be_bytes()].concat();
                if ports == Some(&expected[..]) {
                    return true;
                }
            }
        }
        false
    };
    for (flags, answered) in [(0x02, true), (0x10, false), (0x12, false), (0x11, false)] {
        raw.send(vip, &segment(from, to, [1, 0], flags)).unwrap();
        assert_eq!(answers(&mut ear), answered, "{to}: flags {flags:#x}");
    }

    let asked = client.run(|| {
        let any = if vip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        socket.send(b"x").unwrap();
        socket.recv(&mut [0; 16]).unwrap_err()
    });
    assert_eq!(asked.kind(), ErrorKind::WouldBlock, "{to}: UDP");
}

/// A connection from a port of one's own.
fn from_port(from: &Netns, own: SocketAddr, to: SocketAddr) -> BufReader<TcpStream> {
    let stream = from.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
        socket.bind(&own.into()).unwrap();
        socket.connect_timeout(&to.into(), PATIENCE).unwrap();
        TcpStream::from(socket)
    });
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

/// From where a server sees the other end.
fn who_am_i(stream: &mut BufReader<TcpStream>) -> IpAddr {
    writeln!(stream.get_mut(), "{WHO_AM_I}").unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Flows leave by a port that then becomes a Service's: they go on, and everybody else reaches the Service.
fn a_port_becomes_a_services(cluster: &Cluster, vips: [IpAddr; 2]) {
    let lab = cluster.lab();
    let pod = lab.pods().next().unwrap();
    let mut streams = vips.map(|vip| {
        let own = SocketAddr::new(pod.addresses[usize::from(vip.is_ipv6())], SHARED);
        from_port(&pod.netns, own, outside(vip.is_ipv6()))
    });
    let mut go_on = || {
        for (stream, vip) in streams.iter_mut().zip(vips) {
            assert_eq!(who_am_i(stream), vip);
        }
    };
    go_on();
    let patch = json!({"spec": {"ports": [
        {"name": "smtp", "protocol": "TCP", "port": SMTP, "targetPort": TCP_PORT},
        {"name": "shared", "protocol": "TCP", "port": SHARED, "targetPort": TCP_PORT},
    ]}});
    let patched = cluster.block_on(async {
        let (params, patch) = (PatchParams::default(), Patch::Strategic(patch));
        services(cluster).await.patch("mail", &params, &patch).await
    });
    patched.unwrap();
    for vip in vips {
        for from in [lab.client(), lab.remote()] {
            let begun = Instant::now();
            let to = SocketAddr::new(vip, SHARED);
            while let Err(error) = Flow::open_within(from, to, Duration::from_secs(2)) {
                assert!(begun.elapsed() < PATIENCE, "{to}: {error}");
                go_on();
            }
        }
    }
    go_on();
}

/// The node loses its power by which mail comes in and goes out: one other node leads both ways, and what is not that node's
/// own goes on.
fn one_fail_over(lab: &Lab, vips: [IpAddr; 2]) {
    let was = tenants::gateway(lab, vips[0]);
    assert_eq!(tenants::gateway(lab, vips[1]), was);
    let mut inbound = Vec::new();
    let mut outbound = Vec::new();
    let pods: Vec<&Pod> = lab.pods().filter(|pod| pod.node != was).collect();
    for vip in vips {
        let to = SocketAddr::new(vip, SMTP);
        for from in [lab.client(), lab.remote()] {
            inbound.extend(flows::open(from, to, EACH).unwrap());
        }
        for pod in &pods {
            let some = flows::open(&pod.netns, outside(vip.is_ipv6()), EACH).unwrap();
            assert!(some.iter().all(|flow| flow.seen_from == vip));
            outbound.extend(some);
        }
    }
    inbound.retain(|flow| flow.node() != was);
    assert!(!inbound.is_empty());
    // What is younger than the copies' lag may be lost.
    thread::sleep(Duration::from_secs(1));
    println!(
        "{was} loses its power: {} flows in, {} out",
        inbound.len(),
        outbound.len()
    );
    lab.inject(&was, Fault::PowerOff).unwrap();
    let came_in = flows::ask(&mut inbound);
    let went_out = flows::ask(&mut outbound);
    println!("in {came_in:?}, out {went_out:?}");
    assert!(came_in.is_ok() && went_out.is_ok());
    let leads = vips.map(|vip| tenants::gateway(lab, vip));
    assert_eq!(leads[0], leads[1]);
    assert_ne!(leads[0], was);
    for vip in vips {
        let flow = Flow::open(lab.remote(), SocketAddr::new(vip, SMTP)).unwrap();
        assert_ne!(flow.node(), was);
        let flow = Flow::open(&pods[0].netns, outside(vip.is_ipv6())).unwrap();
        assert_eq!(flow.seen_from, vip);
    }
}
