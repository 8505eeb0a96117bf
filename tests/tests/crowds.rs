//! Flows by the thousand to one remote and port, of pods that share an egress address: the real control plane, kube-proxy,
//! controller and speakers.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::BTreeSet;
use std::io::{self, Read as _};
use std::mem;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::api::ListParams;
use landfall_api::EgressPolicy;
use landfall_lab::crowd::{Crowd, Mirror, PSH, RST, SYN};
use landfall_lab::fault::SPEAKER;
use landfall_lab::server::PodServer;
use landfall_lab::{Fault, Netns, Network, Pod, Topology};
use landfall_tests::flows::{self, Flow};
use landfall_tests::tenants::{self, await_egress, await_seen, egress, far};
use landfall_tests::{Cluster, PATIENCE, chart, objects, until};
use serde_json::{Value, json};

/// Ports 1024 to 65535: as many flows can an address have to one remote and port.
const BUDGET: usize = 64_512;
/// How many are tried, by four pods together.
const WANTED: usize = 70_000;
/// How many the other tenant has to the same remote and port.
const OTHERS: usize = 1_000;
/// How many more it gets by a quota above that.
const MORE: usize = 100;
/// The first of the pods' own ports.
const FROM: u16 = 20_000;
/// How often a speaker looks at what was refused.
const LOOKED_AT: Duration = Duration::from_secs(5);
/// As fast as can be.
const ALL_OUT: f64 = 1e9;
/// Where connections are closed as they come.
const HURRIED: u16 = 7000;
/// How old news has to be to be known at another gateway in any case.
const AGE: Duration = Duration::from_secs(2);

#[test]
fn four_pods_to_one_remote_and_port() {
    let topology = Topology {
        nodes: 3,
        pods_per_node: 2,
        ..Topology::default()
    };
    Cluster::run(topology, |cluster| {
        tenants::start(cluster)?;
        let lab = cluster.lab();
        let _lines = PodServer::start(lab.remote(), "far")?;
        for pod in lab.pods() {
            await_egress(pod, far());
        }
        let gateway = tenants::gateway(lab, egress()[0]);
        let (own, others): (Vec<&Pod>, Vec<&Pod>) = lab.pods().partition(|pod| pod.node == gateway);
        let [other, pods @ ..] = &others[..] else {
            panic!("there are two other nodes");
        };
        become_another_tenants(cluster, other, &json!(null))?;
        let pods: Vec<&Pod> = pods.iter().copied().chain([own[0]]).collect();
        println!(
            "{gateway} is the gateway of {} and three others",
            own[0].name
        );
        for (server, each) in far().into_iter().zip([30_000, 5_000]) {
            short_connections(lab.remote(), &pods, server.ip(), each);
        }
        let mut crowds = Vec::new();
        for server in far() {
            let before = BUDGET * crowds.len();
            crowds.push(the_budget(cluster, &pods, other, server, before)?);
        }

        a_quota(cluster, other)?;
        let gateway = tenants::gateway(lab, egress()[0]);
        await_metric(
            cluster,
            &gateway,
            "egress_policy_standbys{policy=\"mail\"} 1",
        );
        println!("{gateway} loses its power");
        thread::sleep(AGE);
        lab.inject(&gateway, Fault::PowerOff)?;
        for TheirFlows { of, _mirror } in &mut crowds {
            of.retain(|of| of.pod.node != gateway);
            let all: usize = of.iter().map(|of| of.flows.len()).sum();
            let alive = all - refused(of, PSH);
            println!("{alive} of {all} flows go on");
            assert!(alive * 100 >= all * 99, "{alive} of {all}");
        }
        Ok(())
    });
}

/// More flows than a gateway has room for: what there is goes on, what is more is refused at once, and the policy says so.
#[test]
fn a_gateway_without_room_for_more() {
    const ROOM: usize = 2_048;
    let topology = Topology {
        nodes: 2,
        pods_per_node: 1,
        ..Topology::default()
    };
    Cluster::run(topology, |cluster| {
        tenants::start_with_room(cluster, Some(ROOM))?;
        let lab = cluster.lab();
        let _lines = PodServer::start(lab.remote(), "far")?;
        for pod in lab.pods() {
            await_egress(pod, far());
        }
        let gateway = tenants::gateway(lab, egress()[0]);
        let pod = lab.pods().find(|pod| pod.node != gateway).unwrap();
        let mut all = 0;
        for server in far() {
            let remote = server.ip();
            let mut known = flows::open(&pod.netns, server, 3)?;
            let _mirror = Mirror::hang(lab.remote(), remote)?;
            let mut of = [Of::wanted(pod, FROM, 2 * ROOM, remote)?];
            let excess = refused(&mut of, SYN);
            println!("{excess} of {} flows to {remote} refused", 2 * ROOM);
            all += excess;
            // Those that were opened to look take room until they have rested.
            assert!((ROOM..ROOM + ROOM / 10).contains(&excess), "{excess}");
            assert_eq!(refused(&mut of, PSH), 0);
            flows::ask(&mut known).unwrap();
        }
        await_event(cluster, "mail", "BindingsExhausted");
        // What an earlier process has counted is no news to the next.
        let told = events(cluster, "mail", "BindingsExhausted");
        lab.inject(&gateway, Fault::Kill)?;
        lab.restart(&gateway, SPEAKER)?;
        let counted = format!(
            "egress_policy_dropped_packets_total{{policy=\"mail\",reason=\"no-room\"}} {all}"
        );
        await_metric(cluster, &gateway, &counted);
        thread::sleep(2 * LOOKED_AT);
        assert_eq!(events(cluster, "mail", "BindingsExhausted"), told);
        Ok(())
    });
}

/// The addresses of the other tenant's policy.
fn others_egress() -> [IpAddr; 2] {
    Network::Lan.both(235)
}

/// A pod becomes the tenant of another policy, with this quota.
fn become_another_tenants(cluster: &Cluster, pod: &Pod, quota: &Value) -> anyhow::Result<()> {
    let policy = json!({
        "apiVersion": "landfall.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"name": "shop"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "shop"}},
            "egressIPs": {"addresses": others_egress()},
            "quota": quota,
        },
    });
    chart::apply(cluster.plane(), &policy.to_string())?;
    cluster.block_on(async {
        let client = cluster.client().await?;
        objects::label_pod(&client, &pod.name, json!({"app": "shop"})).await?;
        anyhow::Ok(())
    })?;
    for server in far() {
        await_seen(pod, server, |seen| others_egress().contains(&seen));
    }
    Ok(())
}

/// So many connections of each pod at two thousand a second in all, if the machine keeps up, each to its end: all pods
/// want the same thousand ports, and each comes back to those that it has had.
fn short_connections(host: &Netns, pods: &[&Pod], remote: IpAddr, each: u32) {
    const APART: Duration = Duration::from_millis(2);
    let to = SocketAddr::new(remote, HURRIED);
    let all = pods.len() * usize::try_from(each).unwrap();
    let server = hurry(host, to, all);
    let begun = Instant::now();
    let visit = |number: u32| {
        thread::sleep((APART * number).saturating_sub(begun.elapsed()));
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.read_to_end(&mut Vec::new())
    };
    let failed = from_all(pods, |pod| {
        let range = "net.ipv4.ip_local_port_range";
        pod.netns.sysctl(range, "40000 41023").unwrap();
        let errors = |number| visit(number).err();
        pod.netns
            .run(|| (0..each).filter_map(errors).collect::<Vec<io::Error>>())
    });
    let failed: Vec<io::Error> = failed.into_iter().flatten().collect();
    println!(
        "{all} short connections to {to}, {:.0} a second; {} failed",
        f64::from(4 * each) / begun.elapsed().as_secs_f64(),
        failed.len()
    );
    // What is promised is less than one of ten thousand.
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(
        server.join().unwrap(),
        BTreeSet::from([egress()[usize::from(remote.is_ipv6())]])
    );
}

/// A server that closes each connection itself, and so remembers it (RFC 9293, 3.6.1). From where so many came.
fn hurry(host: &Netns, at: SocketAddr, connections: usize) -> JoinHandle<BTreeSet<IpAddr>> {
    let listener = host.run(|| TcpListener::bind(at).unwrap());
    let next = move |_| listener.accept().map(|(_, from)| from.ip()).unwrap();
    thread::spawn(move || (0..connections).map(next).collect())
}

/// A pod's flows to one remote and port.
struct Of<'a> {
    pod: &'a Pod,
    crowd: Crowd,
    flows: Vec<SocketAddr>,
}

impl<'a> Of<'a> {
    /// So many that are still to begin, from this port on.
    fn wanted(pod: &'a Pod, from: u16, number: usize, remote: IpAddr) -> anyhow::Result<Self> {
        let own = pod.addresses[usize::from(remote.is_ipv6())];
        Ok(Self {
            pod,
            crowd: Crowd::of(&pod.netns, remote)?,
            flows: (from..)
                .take(number)
                .map(|port| (own, port).into())
                .collect(),
        })
    }
}

/// The flows of four pods, and who answers them.
struct TheirFlows<'a> {
    of: Vec<Of<'a>>,
    _mirror: Mirror,
}

/// Says one segment of each flow of each pod, of all pods at once. How many are refused: they are no more.
fn refused(all: &mut [Of<'_>], flags: u8) -> usize {
    thread::scope(|scope| {
        let saying: Vec<_> = all
            .iter_mut()
            .map(|of| {
                scope.spawn(|| {
                    let answers = of.crowd.say(&of.flows, flags, ALL_OUT);
                    let mut live = answers.flags.iter().map(|flags| flags & RST == 0);
                    of.flows.retain(|_| live.next().unwrap());
                    answers.refused()
                })
            })
            .collect();
        saying.into_iter().map(|one| one.join().unwrap()).sum()
    })
}

/// Four pods want more flows to one remote and port than an address can have: so many they get, the rest is refused at
/// once, and nobody else sees any of it. The flows that there are.
/// `in_use_before`: how many the policy has besides.
fn the_budget<'a>(
    cluster: &Cluster,
    pods: &[&'a Pod],
    other: &'a Pod,
    server: SocketAddr,
    in_use_before: usize,
) -> anyhow::Result<TheirFlows<'a>> {
    let remote = server.ip();
    let mirror = Mirror::hang(cluster.lab().remote(), remote)?;
    let mut before: Vec<Flow> = from_all(pods, |pod| flows::open(&pod.netns, server, 10).unwrap())
        .into_iter()
        .flatten()
        .collect();
    let mut of = Vec::new();
    for pod in pods {
        of.push(Of::wanted(pod, FROM, WANTED / pods.len(), remote)?);
    }
    let mut its = [Of::wanted(other, FROM, OTHERS, remote)?];
    let begun = Instant::now();
    let excess = refused(&mut of, SYN);
    println!(
        "{excess} of {WANTED} flows to {remote} refused, after {:?}",
        begun.elapsed()
    );
    assert_eq!(excess, WANTED - BUDGET);
    assert_eq!(refused(&mut of, PSH), 0);
    // Another remote's port, and another tenant, have budgets of their own.
    flows::ask(&mut before).unwrap();
    for pod in pods {
        await_egress(pod, [server]);
    }
    assert_eq!((refused(&mut its, SYN), refused(&mut its, PSH)), (0, 0));
    await_seen(other, server, |seen| others_egress().contains(&seen));
    let in_use = until("the policy to say how many ports it uses", || {
        let policy = cluster.block_on(async {
            let policies: Api<EgressPolicy> = Api::all(cluster.client().await?);
            anyhow::Ok(policies.get("mail").await?)
        });
        let in_use = policy
            .unwrap()
            .status
            .map_or(0, |status| status.ports_in_use);
        // A twentieth at most another number than there are.
        let enough = in_use * 20 >= i64::try_from((in_use_before + BUDGET) * 19).unwrap();
        if enough { Ok(in_use) } else { Err(in_use) }
    });
    println!("the policy says {in_use}");
    await_event(cluster, "mail", "PortsExhausted");
    Ok(TheirFlows {
        of,
        _mirror: mirror,
    })
}

/// The other tenant's pod gets a quota below what it has: it keeps what is there and begins nothing. Then one above: so many
/// more it gets.
fn a_quota(cluster: &Cluster, other: &Pod) -> anyhow::Result<()> {
    let gateway = tenants::gateway(cluster.lab(), others_egress()[0]);
    let set = |quota: usize| {
        let all = 10 * OTHERS + quota;
        become_another_tenants(cluster, other, &json!({"portsPerPod": quota, "ports": all}))?;
        let said = format!("egress_policy_ports_quota{{policy=\"shop\"}} {all}");
        await_metric(cluster, &gateway, &said);
        anyhow::Ok(())
    };
    let ask = |server: SocketAddr, free: usize| {
        let mut more = [Of::wanted(other, 2 * FROM, 3 * MORE, server.ip())?];
        assert_eq!(refused(&mut more, SYN), 3 * MORE - free);
        let mut its = [Of::wanted(other, FROM, OTHERS, server.ip())?];
        assert_eq!(refused(&mut its, PSH), 0);
        anyhow::Ok(())
    };
    set(OTHERS / 2)?;
    let mut early = Vec::new();
    for server in far() {
        early.push(begun_early(other, server.ip())?);
        ask(server, 0)?;
    }
    println!("{early:?} flows began before those from before the quota were counted");
    set(OTHERS + MORE)?;
    for (server, early) in far().into_iter().zip(early) {
        ask(server, MORE - early)?;
    }
    await_event(cluster, "shop", "QuotaExhausted");
    Ok(())
}

/// How many flows of a pod begin under a quota below what it has, until what it has is counted: that is at once, but not in
/// the same moment.
fn begun_early(pod: &Pod, remote: IpAddr) -> anyhow::Result<usize> {
    let mut one = [Of::wanted(pod, 3 * FROM, MORE, remote)?];
    for (begun, flow) in mem::take(&mut one[0].flows).into_iter().enumerate() {
        one[0].flows = vec![flow];
        if refused(&mut one, SYN) == 1 {
            return Ok(begun);
        }
        thread::sleep(PATIENCE / u32::try_from(MORE)?);
    }
    anyhow::bail!("{MORE} flows of {} began beyond its quota", pod.name)
}

/// Until a node's speaker shows this line.
fn await_metric(cluster: &Cluster, node: &str, line: &str) {
    let line = format!("landfall_{line}");
    until(&line, || {
        let metrics = cluster.lab().speaker_metrics(node)?;
        let egress = |shown: &&str| shown.starts_with("landfall_egress_policy_");
        let shown: Vec<&str> = metrics.lines().filter(egress).collect();
        anyhow::ensure!(shown.contains(&&*line), "{shown:#?}");
        Ok(())
    });
}

/// Until an Event of a policy has this reason.
fn await_event(cluster: &Cluster, policy: &str, reason: &str) {
    until(&format!("an Event of {policy} to say {reason}"), || {
        let found = !events(cluster, policy, reason).is_empty();
        found.then_some(()).ok_or("none")
    });
}

/// What the Events of a policy with this reason say.
fn events(cluster: &Cluster, policy: &str, reason: &str) -> Vec<String> {
    let events = cluster.block_on(async {
        let events: Api<Event> = Api::namespaced(cluster.client().await?, "default");
        anyhow::Ok(events.list(&ListParams::default()).await?)
    });
    let is_it = |event: &Event| {
        let of = &event.involved_object;
        event.reason.as_deref() == Some(reason) && of.name.as_deref() == Some(policy)
    };
    let events = events.unwrap().items.into_iter().filter(is_it);
    events.filter_map(|event| event.message).collect()
}

/// Does something for several pods at once.
fn from_all<T: Send>(pods: &[&Pod], work: impl Fn(&Pod) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let works: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(move || work(pod)))
            .collect();
        works.into_iter().map(|work| work.join().unwrap()).collect()
    })
}
