//! Tenants that mail each other: what a pod sends to a VIP of its own cluster leaves by its policy's address, wherever gateway,
//! the VIP's leader and the server are. With the real control plane, kube-proxy, controller and speakers.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use landfall_api::EgressPolicy;
use landfall_lab::server::{NEWS_PORT, TCP_PORT, UDP_PORT, WHO_AM_I};
use landfall_lab::{Fault, Lab, Pod, Topology};
use landfall_tests::flows::{self, Flow};
use landfall_tests::tenants::{self, await_seen, egress, gateway};
use landfall_tests::{Cluster, PATIENCE, ProxyMode, chart, eventually, objects, until_some};
use serde_json::{Value, json};

const SMTP: u16 = 25;
/// How long a try to connect may take.
const TRY: Duration = Duration::from_secs(3);
/// So many VIPs of each family: they have leaders on several nodes.
const SERVICES: usize = 4;
/// So many connections of each pod to each VIP.
const EACH: usize = 6;
/// How old news has to be to be known at another gateway in any case.
const AGE: Duration = Duration::from_secs(1);

const POOL: &str = "
apiVersion: landfall.dev/v1alpha1
kind: IPAddressPool
metadata: {name: in}
spec:
  purpose: Both
  addresses: [10.88.0.200-10.88.0.219, 'fd00:88::200-fd00:88::219']
";

/// The second tenant's, who sends by the address at which it receives.
const SHOP: &str = "
apiVersion: landfall.dev/v1alpha1
kind: EgressPolicy
metadata: {name: shop}
spec:
  podSelector: {matchLabels: {app: echo, tenant: shop}}
  egressIPs: {fromService: {namespace: default, name: in-0}}
";

/// The pod that is a Service's only one.
const ONLY: &str = "only";

/// Who may send, and by which addresses.
struct Tenants {
    shop: Vec<String>,
    /// The addresses at which the shop receives, and of other Services: the last of one that a single pod serves, and of one
    /// that only egress addresses may come to.
    vips: Vec<IpAddr>,
}

impl Tenants {
    fn addresses(&self, pod: &Pod) -> Vec<IpAddr> {
        if self.shop.contains(&pod.name) {
            self.own().to_vec()
        } else {
            egress().to_vec()
        }
    }

    fn own(&self) -> &[IpAddr] {
        &self.vips[..2]
    }

    /// The VIPs that a pod comes to from outside: to its own a tenant does not go round.
    fn vips(&self, pod: &Pod) -> &[IpAddr] {
        if self.shop.contains(&pod.name) {
            &self.vips[2..]
        } else {
            &self.vips
        }
    }
}

#[test]
fn the_receiver_sees_the_senders_egress_address() {
    let topology = Topology {
        nodes: 4,
        ..Topology::default()
    };
    Cluster::run(topology, |cluster| {
        chart::apply(cluster.plane(), POOL)?;
        tenants::start(cluster)?;
        let lab = cluster.lab();
        let mut tenants = Tenants {
            shop: lab.pods().take(2).map(|pod| pod.name.clone()).collect(),
            vips: Vec::new(),
        };
        for number in 0..SERVICES {
            tenants
                .vips
                .extend(serve(cluster, &format!("in-{number}"), json!({}))?);
        }
        let last = lab.pods().last().map(|pod| pod.name.clone()).unwrap();
        cluster.block_on(async {
            let client = cluster.client().await?;
            for pod in &tenants.shop {
                objects::label_pod(&client, pod, json!({"tenant": "shop"})).await?;
            }
            objects::label_pod(&client, &last, json!({"single": ONLY})).await?;
            anyhow::Ok(())
        })?;
        let single = json!({"selector": {"app": "echo", "single": ONLY}});
        tenants.vips.extend(serve(cluster, ONLY, single)?);
        let open_to_all = tenants.vips.clone();
        let vips = &open_to_all;
        chart::apply(cluster.plane(), SHOP)?;
        let by: Vec<IpAddr> = egress()
            .into_iter()
            .chain(tenants.own().iter().copied())
            .collect();
        let is_egress = |seen: IpAddr| by.contains(&seen);
        for pod in lab.pods() {
            for vip in vips {
                await_seen(pod, SocketAddr::new(*vip, SMTP), |seen| !is_egress(seen));
            }
        }
        println!("without hairpin nobody sees the egress address");
        hairpin(cluster, true);
        let whole = |ip: &IpAddr| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 });
        let ranges: Vec<String> = by.iter().map(whole).collect();
        let named = json!({"loadBalancerSourceRanges": ranges});
        tenants.vips.extend(serve(cluster, "named", named)?);
        let sender = gateway(lab, egress()[0]);
        let leaders: BTreeMap<IpAddr, String> = tenants
            .vips
            .iter()
            .map(|vip| (*vip, gateway(lab, *vip)))
            .collect();
        println!("{sender} is the gateway; VIPs are led by {leaders:?}");
        all_see(lab, &tenants);
        for pod in &tenants.shop {
            let pod = lab.pods().find(|it| it.name == *pod).unwrap();
            for vip in tenants.own() {
                await_seen(pod, SocketAddr::new(*vip, SMTP), |seen| !is_egress(seen));
            }
        }
        forgotten(lab, &tenants);
        let mut flows = open(lab, &tenants);
        ways(&flows, &sender);
        by_iptables(cluster);
        all_see(lab, &tenants);
        let again = open(lab, &tenants);
        let number = again.values().map(Vec::len).sum::<usize>();
        println!("kube-proxy by iptables: {number} flows more are all seen right");
        drop(again);
        thread::sleep(AGE);
        outlive(lab, &mut flows, &sender);
        hairpin(cluster, false);
        let left = lab.pods().filter(|pod| pod.node != sender);
        for pod in left {
            // The only pod of the last may have lost its power.
            for vip in &vips[..2 * SERVICES] {
                await_seen(pod, SocketAddr::new(*vip, SMTP), |seen| !is_egress(seen));
            }
        }
        Ok(())
    });
}

/// A Service's addresses.
fn serve(cluster: &Cluster, name: &str, spec: Value) -> anyhow::Result<Vec<IpAddr>> {
    cluster.block_on(async {
        let services: Api<Service> = Api::default_namespaced(cluster.client().await?);
        let ports = json!([
            {"name": "smtp", "protocol": "TCP", "port": SMTP, "targetPort": TCP_PORT},
            {"name": "news", "protocol": "TCP", "port": NEWS_PORT, "targetPort": NEWS_PORT},
            {"name": "udp", "protocol": "UDP", "port": UDP_PORT, "targetPort": UDP_PORT},
        ]);
        let mut whole = json!({"externalTrafficPolicy": "Local", "ports": ports});
        if let (Value::Object(whole), Value::Object(spec)) = (&mut whole, spec) {
            whole.extend(spec);
        }
        let service = objects::service(name, whole);
        services.create(&PostParams::default(), &service).await?;
        let addresses = eventually("the Service's addresses", async || {
            let service = services.get_status(name).await.ok()?;
            Some(objects::ingress(&service)).filter(|addresses| addresses.len() == 2)
        });
        Ok(addresses.await)
    })
}

fn hairpin(cluster: &Cluster, is: bool) {
    cluster.block_on(async {
        let policies: Api<EgressPolicy> = Api::all(cluster.client().await.unwrap());
        let patch = Patch::Merge(json!({"spec": {"hairpin": is}}));
        let params = PatchParams::default();
        for policy in ["mail", "shop"] {
            policies.patch(policy, &params, &patch).await.unwrap();
        }
    });
}

/// Until each pod is seen as its policy's by each VIP.
fn all_see(lab: &Lab, tenants: &Tenants) {
    for pod in lab.pods() {
        let addresses = tenants.addresses(pod);
        for vip in tenants.vips(pod) {
            await_seen(pod, SocketAddr::new(*vip, SMTP), |seen| {
                addresses.contains(&seen)
            });
        }
    }
}

/// kube-proxies that deliver by iptables in place of those by nftables.
fn by_iptables(cluster: &Cluster) {
    cluster.start_kube_proxies(ProxyMode::Iptables).unwrap();
    for node in cluster.lab().nodes() {
        until_some("the nftables mode's rules to go", || {
            let listed = node.netns.exec("nft list table ip kube-proxy");
            listed.is_err().then_some(())
        });
    }
}

/// By the sender's pod. Each is seen as its policy's.
fn open(lab: &Lab, tenants: &Tenants) -> BTreeMap<String, Vec<Flow>> {
    let of_pod = |pod: &Pod| {
        let to = tenants
            .vips(pod)
            .iter()
            .flat_map(|vip| [SocketAddr::new(*vip, SMTP); EACH]);
        let flows: Vec<Flow> = to
            .map(|to| Flow::open_within(&pod.netns, to, TRY).unwrap())
            .collect();
        for flow in &flows {
            let seen = flow.seen_from;
            let by = tenants.addresses(pod);
            assert!(by.contains(&seen), "{}: {seen}", pod.name);
        }
        (pod.name.clone(), flows)
    };
    lab.pods().map(of_pod).collect()
}

/// Connection tracking of the pod's node forgets its flows: they go on, also if the server is the next to speak, and the server
/// sees nobody else.
fn forgotten(lab: &Lab, tenants: &Tenants) {
    const LINES: usize = 8;
    let mut heard = 0;
    for pod in lab.pods() {
        let node = lab.node(&pod.node).unwrap();
        let forget = || {
            for address in pod.addresses {
                let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
                let line = format!("conntrack -D -f {family} -s {address}");
                // It is an error if there is nothing to forget.
                let _ = node.netns.exec(&line);
            }
        };
        for vip in tenants.vips(pod) {
            let to = SocketAddr::new(*vip, NEWS_PORT);
            let stream = pod
                .netns
                .run(|| TcpStream::connect_timeout(&to, TRY))
                .unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut lines = BufReader::new(stream).lines();
            lines.next().unwrap().unwrap();
            forget();
            for _ in 0..LINES {
                let line = lines.next();
                let line = line.unwrap_or_else(|| panic!("{} to {vip}: the end", pod.name));
                line.unwrap_or_else(|error| panic!("{} to {vip}: {error}", pod.name));
                heard += 1;
            }
            let addresses = tenants.addresses(pod);
            let to = SocketAddr::new(*vip, UDP_PORT);
            let asks = datagrams(pod, to);
            let first = ask(&asks).unwrap();
            forget();
            let second = ask(&asks).unwrap();
            assert!(addresses.contains(&first), "{}: {first}", pod.name);
            assert_eq!(second, first, "{} to {vip}", pod.name);
        }
    }
    println!("{heard} lines of servers that speak first, to nodes that had forgotten the flow");
}

fn datagrams(pod: &Pod, to: SocketAddr) -> UdpSocket {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = pod.netns.run(|| UdpSocket::bind((any, 0))).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(TRY)).unwrap();
    socket
}

/// Whom the server sees.
fn ask(socket: &UdpSocket) -> std::io::Result<IpAddr> {
    socket.send(WHO_AM_I.as_bytes())?;
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..length]);
    let seen = text
        .split_whitespace()
        .nth(1)
        .and_then(|it| it.parse().ok());
    seen.ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

/// Whether each way was gone that differs: pods of the gateway's node and of others, to servers there and elsewhere.
fn ways(flows: &BTreeMap<String, Vec<Flow>>, gateway: &str) {
    let mut ways = BTreeMap::<(bool, bool, bool), usize>::new();
    for (pod, flows) in flows {
        let node = pod.split_once("-pod").unwrap().0;
        for flow in flows {
            let way = (node == gateway, flow.node() == gateway, flow.node() == node);
            *ways.entry(way).or_default() += 1;
        }
    }
    println!("flows by (from the gateway's node, to it, to the pod's own): {ways:?}");
    let wanted = [
        (true, true, true),
        (true, false, false),
        (false, true, false),
        (false, false, true),
        (false, false, false),
    ];
    assert_eq!(ways.into_keys().collect::<BTreeSet<_>>(), wanted.into());
}

/// The gateway loses its power: what neither ends there goes on.
fn outlive(lab: &Lab, flows: &mut BTreeMap<String, Vec<Flow>>, gateway: &str) {
    flows.retain(|pod, _| !pod.starts_with(gateway));
    for flows in flows.values_mut() {
        flows.retain(|flow| flow.node() != gateway);
    }
    let number: usize = flows.values().map(Vec::len).sum();
    lab.inject(gateway, Fault::PowerOff).unwrap();
    let begun = Instant::now();
    for (pod, flows) in flows.iter_mut() {
        let asked = flows::ask(flows);
        assert!(asked.is_ok(), "{pod}: {asked:?}");
    }
    println!("{number} flows go on, after {:?}", begun.elapsed());
}
