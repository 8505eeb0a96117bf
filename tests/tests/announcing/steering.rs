//! What steering adds to `externalTrafficPolicy: Local`, with the real kube-proxy delivering.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_lab::fault::SPEAKER;
use landfall_lab::server::{TCP_PORT, UDP_PORT};
use landfall_tests::{PATIENCE, client};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::scene::{Scene, eventually};

/// As many connections reach every one of three nodes, but for one time in a thousand.
const CONNECTIONS: usize = 24;

/// Every endpoint is used and sees the client's own address; a leader needs none itself.
pub(crate) fn local_endpoints(scene: &Scene<'_>) {
    let vips = scene.create(
        "steered",
        json!({"externalTrafficPolicy": "Local"}),
        json!({}),
    );
    let leader = scene.leader(vips[0]);
    scene.served(&vips);
    let clients = [scene.lab().client(), scene.lab().remote()];
    for vip in &vips {
        for from in clients {
            eventually(
                "all three nodes to serve",
                || pods(from, *vip),
                |pods| pods.len() == 3,
            );
        }
    }

    scene.report_pods(&leader, false);
    let gone = Instant::now();
    eventually(
        "the leader's pods to be left out",
        || pods(clients[0], vips[0]),
        |pods| pods.keys().all(|pod| !pod.starts_with(&*leader)),
    );
    println!(
        "      left out {:.1} s after they were not ready",
        gone.elapsed().as_secs_f64()
    );
    thread::sleep(Duration::from_secs(2));
    for vip in &vips {
        assert_eq!(scene.leader(*vip), leader, "the leadership stays");
        for from in clients {
            assert!(
                pods(from, *vip)
                    .keys()
                    .all(|pod| !pod.starts_with(&*leader))
            );
        }
    }

    scene.report_pods(&leader, true);
    eventually(
        "the leader's pods to serve again",
        || pods(clients[0], vips[0]),
        |pods| pods.keys().any(|pod| pod.starts_with(&*leader)),
    );
}

/// The leader's node loses what its programs need: another leads, all is served, and the objects name the node and the
/// reason until it steers again.
pub(crate) fn hindered_node(scene: &Scene<'_>) {
    let lab = scene.lab();
    let vips = scene.create(
        "hindered",
        json!({"externalTrafficPolicy": "Local"}),
        json!({}),
    );
    scene.served(&vips);
    let node = scene.leader(vips[0]);
    scene.expect_steered(vips[0], "True AllNodesSteer");

    lab.signal(&node, SPEAKER, Signal::SIGKILL).unwrap();
    lab.wait(&node, SPEAKER, PATIENCE).unwrap();
    let pins = lab.mount_pins().unwrap().join(&node);
    fs::remove_dir_all(&pins).unwrap();
    fs::create_dir(&pins).unwrap();
    let cover = Cover::mount(&pins);
    lab.restart(&node, SPEAKER).unwrap();
    scene.all_take_part();
    for vip in &vips {
        let said = scene.expect_steered(*vip, "False NodesCannotSteer");
        let named = format!("{node}: {} is not on a bpf file system", pins.display());
        assert!(said.contains(&named), "{said}");
        for other in lab.nodes().iter().filter(|it| it.name != node) {
            assert!(!said.contains(&format!("{}: ", other.name)), "{said}");
        }
        assert_ne!(scene.leader(*vip), node, "who cannot steer does not lead");
    }
    scene.served(&vips);

    drop(cover);
    for vip in &vips {
        scene.expect_steered(*vip, "True AllNodesSteer");
    }
    scene.served(&vips);
}

/// A file system of another kind on a directory.
struct Cover<'a>(&'a Path);

impl<'a> Cover<'a> {
    fn mount(over: &'a Path) -> Self {
        mount(
            Some("tmpfs"),
            over,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        Self(over)
    }
}

impl Drop for Cover<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

/// The objects say that there is no steering where an advertisement wants none.
pub(crate) fn unwanted(scene: &Scene<'_>) {
    let vips = scene.create("unwanted", json!({}), json!({}));
    scene.served(&vips);
    scene.expect_steered(vips[0], "True AllNodesSteer");
    scene.advertise(&json!({"steering": "Off"}));
    for vip in &vips {
        scene.expect_steered(*vip, "False SteeringOff");
    }
    scene.served(&vips);
    scene.advertise(&json!({"steering": "Auto"}));
    for vip in &vips {
        scene.expect_steered(*vip, "True AllNodesSteer");
    }
}

/// A port that no Service has is refused at once, or met with silence where the advertisement says so; an echo is
/// answered in any case.
pub(crate) fn unknown_ports(scene: &Scene<'_>) {
    const UNKNOWN: u16 = 4711;
    let vips = scene.create("known", json!({}), json!({}));
    scene.served(&vips);
    let clients = [scene.lab().client(), scene.lab().remote()];
    for vip in &vips {
        for from in clients {
            eventually(
                "the port to be refused",
                || knock(from, *vip, UNKNOWN),
                |outcome| *outcome == [Knock::Refused; 2],
            );
            assert_still_refused(from, *vip, UNKNOWN);
            from.exec(&format!("ping -c 1 -W 2 {vip}")).unwrap();
        }
    }
    scene.advertise(&json!({"unknownPort": "Drop"}));
    for vip in &vips {
        for from in clients {
            eventually(
                "the port to be silent",
                || knock(from, *vip, UNKNOWN),
                |outcome| *outcome == [Knock::Silence; 2],
            );
            from.exec(&format!("ping -c 1 -W 2 {vip}")).unwrap();
        }
    }
    scene.served(&vips);
}

/// Where a port has no endpoint its clients are refused at once, and served as soon as there is one; the object says so.
/// Whoever delivers otherwise.
pub(crate) fn no_endpoints(scene: &Scene<'_>) {
    for policy in ["Local", "Cluster"] {
        let name = format!("deserted-{}", policy.to_lowercase());
        let vips = scene.create(&name, json!({"externalTrafficPolicy": policy}), json!({}));
        scene.served(&vips);
        for vip in &vips {
            scene.expect_served(*vip, "True Endpoints");
        }
        let report = |ready: bool| {
            for node in scene.lab().nodes() {
                scene.report_pods(&node.name, ready);
            }
        };
        report(false);
        for vip in &vips {
            for from in [scene.lab().client(), scene.lab().remote()] {
                for port in [TCP_PORT, UDP_PORT] {
                    eventually(
                        "the port to be refused",
                        || knock(from, *vip, port),
                        |outcome| *outcome == [Knock::Refused; 2],
                    );
                }
                assert_still_refused(from, *vip, UDP_PORT);
            }
            let said = scene.expect_served(*vip, "False NoEndpoints");
            assert!(
                said.contains(&format!("default/{name} {TCP_PORT}/TCP")),
                "{said}"
            );
        }
        report(true);
        scene.served(&vips);
        for vip in &vips {
            scene.expect_served(*vip, "True Endpoints");
        }
    }
}

/// The kernel sends one ICMP a second to a client, and counts nothing else that has to do with these. A datagram or its
/// answer may be lost for other reasons, as on any network, but not one after the other.
fn assert_still_refused(from: &Netns, vip: IpAddr, port: u16) {
    let mut answers = Vec::new();
    while answers.last() != Some(&[Knock::Refused; 2]) {
        assert!(answers.len() < 3, "{vip} port {port}: {answers:?}");
        thread::sleep(Duration::from_millis(1_500));
        answers.push(knock(from, vip, port));
    }
    if answers.len() > 1 {
        println!("{vip} port {port} was refused at last: {answers:?}");
    }
}

/// What a port says to who comes unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knock {
    Refused,
    Silence,
    Other(std::io::ErrorKind),
    Open,
}

/// By TCP and by UDP.
fn knock(from: &Netns, vip: IpAddr, port: u16) -> [Knock; 2] {
    let patience = Duration::from_millis(500);
    let of = |outcome: std::io::Result<()>| match outcome.map_err(|error| error.kind()) {
        Ok(()) => Knock::Open,
        Err(ErrorKind::ConnectionRefused) => Knock::Refused,
        Err(ErrorKind::TimedOut | ErrorKind::WouldBlock) => Knock::Silence,
        Err(other) => Knock::Other(other),
    };
    from.run(|| {
        let tcp = TcpStream::connect_timeout(&(vip, port).into(), patience).map(drop);
        let udp = || {
            let any: IpAddr = match vip {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect((vip, port))?;
            socket.set_read_timeout(Some(patience))?;
            socket.send(b"anybody there?")?;
            socket.recv(&mut [0; 16]).map(drop)
        };
        [of(tcp), of(udp())]
    })
}

/// Opens connections, all of which must be served, by pods that see the client's address: how many each pod got.
pub(crate) fn pods(from: &Netns, vip: IpAddr) -> BTreeMap<String, usize> {
    let mut pods = BTreeMap::new();
    let mine = client::addresses(from);
    for _ in 0..CONNECTIONS {
        match client::seen_as(from, vip, PATIENCE) {
            Ok((pod, address)) => {
                assert!(
                    mine.contains(&address),
                    "{pod} saw {address}, not one of {mine:?}"
                );
                *pods.entry(pod).or_default() += 1;
            }
            Err(error) => panic!("{vip} from {}: {error}", from.name()),
        }
    }
    pods
}
