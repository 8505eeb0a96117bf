//! Namespaces come up ready to use and go without a trace.

use std::fs;
use std::net::UdpSocket;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use landfall_lab::{LabId, Netns, ping};

fn exists(name: &str) -> bool {
    std::path::Path::new("/run/netns").join(name).exists()
}

#[test]
fn a_veth_pair_carries_both_families_at_once() {
    let id = LabId::fresh();
    let a = Netns::create_in(&id, "a").unwrap();
    let b = Netns::create_in(&id, "b").unwrap();
    a.veth("eth0", &b, "eth0").unwrap();
    a.ip_batch("address add 10.88.0.1/24 dev eth0\naddress add fd00:88::1/64 dev eth0\n")
        .unwrap();
    b.ip_batch("address add 10.88.0.2/24 dev eth0\naddress add fd00:88::2/64 dev eth0\n")
        .unwrap();
    for target in ["10.88.0.2", "fd00:88::2"] {
        ping(&a, target.parse().unwrap(), Duration::from_secs(5)).unwrap();
    }
    let here = b.run(|| UdpSocket::bind("10.88.0.2:7000").unwrap());
    let there = a.run(|| UdpSocket::bind("10.88.0.1:0").unwrap());
    there.send_to(b"hello", "10.88.0.2:7000").unwrap();
    let mut buffer = [0; 16];
    assert_eq!(here.recv(&mut buffer).unwrap(), 5);
}

#[test]
fn sysctls_are_of_the_namespace() {
    let before = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    let netns = Netns::create("sysctl").unwrap();
    netns.enable_forwarding().unwrap();
    assert_eq!(netns.read_sysctl("net.ipv4.ip_forward").unwrap(), "1");
    assert_eq!(
        netns.read_sysctl("net.ipv6.conf.all.forwarding").unwrap(),
        "1"
    );
    assert_eq!(
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap(),
        before
    );
}

#[test]
fn nothing_is_left_after_a_panic() {
    let mut name = String::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let netns = Netns::create("panic").unwrap();
        name = netns.name().to_owned();
        assert!(exists(&name));
        panic!("as it happens in tests");
    }));
    assert!(panicked.is_err());
    assert!(!exists(&name));
}

#[test]
fn commands_say_what_failed() {
    let netns = Netns::create("command").unwrap();
    let error = netns.ip("link set nothing up").unwrap_err().to_string();
    assert!(error.contains("nothing"), "{error}");
    let output = netns.exec("ip -o link").unwrap();
    assert_eq!(output.lines().count(), 1, "only loopback: {output}");
}
