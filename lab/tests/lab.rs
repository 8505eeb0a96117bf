//! The lab is what it says it is, and its faults do what they say.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use landfall_lab::{Fault, Lab, Network, Nic, Program, Topology, ping};

const SOON: Duration = Duration::from_secs(5);
const BRIEFLY: Duration = Duration::from_millis(400);

fn namespaces(lab: &str) -> usize {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return 0;
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(lab))
        .count()
}

fn reaches(lab: &Lab, from: &str, target: IpAddr) -> bool {
    ping(lab.host(from).unwrap(), target, BRIEFLY).is_ok()
}

#[test]
fn everybody_reaches_everybody_in_both_families() {
    let lab = Lab::build(Topology {
        nodes: 2,
        second_nic: true,
        ..Topology::default()
    })
    .unwrap();
    let pod = &lab.node("node2").unwrap().pods[0];
    let mut pairs: Vec<(&str, [IpAddr; 2])> = vec![
        ("client", Network::Lan.both(1)),
        ("client", Network::Lan.both(11)),
        ("observer", Network::Lan.both(12)),
        ("remote", Network::Lan.both(100)),
        ("node1", Network::SecondLan.both(12)),
        ("node1", Network::Management.both(12)),
        ("node1", Network::Remote.both(100)),
    ];
    pairs.push(("node1", pod.addresses));
    pairs.push(("node1-pod0", pod.addresses));
    for (from, targets) in pairs {
        for target in targets {
            let host = lab.host(from).unwrap();
            ping(host, target, SOON).unwrap();
        }
    }
}

#[test]
fn a_lab_without_management_goes_by_the_uplink() {
    let lab = Lab::build(Topology {
        nodes: 2,
        management: false,
        ..Topology::default()
    })
    .unwrap();
    let pod = &lab.node("node2").unwrap().pods[0];
    for target in pod.addresses {
        ping(lab.host("node1-pod0").unwrap(), target, SOON).unwrap();
    }
    assert!(lab.inject("node1", Fault::ManagementDown).is_err());
}

#[test]
fn pods_answer_with_their_names() {
    let lab = Lab::build(Topology {
        nodes: 1,
        pods_per_node: 2,
        ..Topology::default()
    })
    .unwrap();
    lab.serve_pods().unwrap();
    let pod = &lab.nodes()[0].pods[1];
    for address in pod.addresses {
        let answer = lab.node("node1").unwrap().netns.block_on(async {
            let socket = tokio::net::UdpSocket::bind(if address.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            })
            .await
            .unwrap();
            socket.send_to(b"7", (address, 5000)).await.unwrap();
            let mut buffer = [0; 64];
            let length = tokio::time::timeout(SOON, socket.recv(&mut buffer))
                .await
                .unwrap()
                .unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        });
        assert_eq!(answer, "node1-pod1 7");
    }
}

#[test]
fn link_faults_cut_what_they_say_and_heal() {
    let lab = Lab::build(Topology {
        nodes: 2,
        ..Topology::default()
    })
    .unwrap();
    let [lan, lan6] = Network::Lan.both(11);
    let [management, _] = Network::Management.both(11);
    let pod = lab.node("node1").unwrap().pods[0].addresses[0];
    for target in [lan, lan6] {
        ping(lab.client(), target, SOON).unwrap();
    }
    ping(lab.host("node2").unwrap(), management, SOON).unwrap();
    for (fault, on_lan, on_management) in [
        (Fault::UplinkDown, false, true),
        (Fault::CarrierLost, false, true),
        (Fault::OtherVlan, false, true),
        (Fault::ManagementDown, true, false),
        (Fault::PowerOff, false, false),
    ] {
        lab.inject("node1", fault).unwrap();
        // A neighbour from beyond the uplink: the node's own kernel answers for all its addresses.
        assert_eq!(reaches(&lab, "client", lan), on_lan, "{fault}");
        assert_eq!(reaches(&lab, "client", lan6), on_lan, "{fault}");
        assert_eq!(reaches(&lab, "node2", management), on_management, "{fault}");
        lab.heal().unwrap();
        for target in [lan, lan6] {
            ping(lab.client(), target, SOON).unwrap();
            ping(lab.host("node2").unwrap(), target, SOON).unwrap();
        }
        ping(lab.remote(), lan6, SOON).unwrap();
        ping(lab.host("node2-pod0").unwrap(), pod, SOON).unwrap();
    }
    lab.management_network_down().unwrap();
    assert!(!reaches(&lab, "node2", management));
    lab.heal().unwrap();
    ping(lab.host("node2").unwrap(), management, SOON).unwrap();
}

#[test]
fn partitions_and_losses_are_at_the_switch() {
    let lab = Lab::build(Topology::default()).unwrap();
    let to = |node: u8| Network::Lan.both(10 + node)[0];
    lab.partition(&["node1"], &["node2", "node3"], true)
        .unwrap();
    assert!(reaches(&lab, "client", to(1)));
    assert!(!reaches(&lab, "client", to(2)));
    assert!(!reaches(&lab, "node1", Network::Management.both(13)[0]));
    assert!(reaches(&lab, "node2", to(3)));
    lab.heal_network().unwrap();
    assert!(reaches(&lab, "client", to(2)));
    lab.lose("node1", "client", 100).unwrap();
    assert!(!reaches(&lab, "client", to(1)));
    assert!(reaches(&lab, "node2", to(1)));
    lab.heal_network().unwrap();
    assert!(reaches(&lab, "client", to(1)));
}

#[test]
fn processes_freeze_die_and_come_back() {
    let lab = Lab::build(Topology {
        nodes: 1,
        ..Topology::default()
    })
    .unwrap();
    let program = Program::new("/bin/sleep").arg("1000");
    lab.start("node1", "speaker", &program).unwrap();
    let state = || {
        let pid = lab.pid("node1", "speaker").unwrap();
        std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap()
    };
    lab.inject("node1", Fault::Freeze).unwrap();
    assert!(state().contains(") T "), "{}", state());
    lab.heal().unwrap();
    assert!(!state().contains(") T "), "{}", state());
    for fault in [Fault::Drain, Fault::Kill, Fault::PowerOff] {
        let before = lab.pid("node1", "speaker");
        lab.inject("node1", fault).unwrap();
        lab.wait("node1", "speaker", SOON).unwrap();
        lab.heal().unwrap();
        assert!(lab.runs("node1", "speaker"), "{fault}");
        assert_ne!(lab.pid("node1", "speaker"), before);
    }
    let pid = lab.pid("node1", "speaker").unwrap();
    drop(lab);
    assert!(!std::fs::exists(format!("/proc/{pid}")).unwrap());
}

#[test]
fn a_management_host_is_on_the_management_network() {
    let lab = Lab::build(Topology {
        nodes: 1,
        ..Topology::default()
    })
    .unwrap();
    let host = lab.management_host("plane", 5).unwrap();
    ping(&lab.nodes()[0].netns, Network::Management.both(5)[0], SOON).unwrap();
    ping(&host, Network::Management.both(11)[1], SOON).unwrap();
}

#[test]
fn nothing_is_left_of_a_lab_after_a_panic() {
    let mut prefix = String::new();
    let mut directory = std::path::PathBuf::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let lab = Lab::build(Topology::default()).unwrap();
        prefix = lab.id().name("");
        directory = lab.directory().to_owned();
        lab.start("node1", "sleeper", &Program::new("/bin/sleep").arg("1000"))
            .unwrap();
        assert_eq!(namespaces(&prefix), 11);
        panic!("as it happens in tests");
    }));
    assert!(panicked.is_err());
    assert_eq!(namespaces(&prefix), 0);
    assert!(!directory.exists());
}

#[test]
fn what_cannot_be_built_is_refused() {
    for topology in [
        Topology {
            nodes: 0,
            ..Topology::default()
        },
        Topology {
            default_route: Nic::Eth1,
            ..Topology::default()
        },
    ] {
        assert!(Lab::build(topology).is_err());
    }
}
