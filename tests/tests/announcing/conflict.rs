//! Another station has a VIP's address. Here it is the lab's router.

use std::net::{IpAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::Network;
use serde_json::json;

use crate::scene::{Scene, eventually};

const SINGLE: &str = "SingleStack";

/// The address on the router's interface, for as long as this lives.
struct Intruder<'a> {
    scene: &'a Scene<'a>,
    address: IpAddr,
}

impl<'a> Intruder<'a> {
    fn new(scene: &'a Scene<'a>, address: IpAddr) -> Self {
        let it = Self { scene, address };
        it.ip("add", if address.is_ipv6() { "nodad" } else { "" });
        it
    }

    fn mac() -> String {
        Network::Lan.mac(1).to_string()
    }

    /// Makes it ask for a station that is not there, with its address as the sender's: all hear who has it.
    fn speak(&self) {
        let netns = self.scene.lab().router();
        let nobody = IpAddr::V4(Network::Lan.v4(77));
        netns.run(|| {
            let socket = UdpSocket::bind((self.address, 0)).unwrap();
            let _ = socket.send_to(b"x", (nobody, 9));
        });
    }

    fn ip(&self, verb: &str, flags: &str) {
        let length = if self.address.is_ipv6() { 128 } else { 32 };
        let line = format!("address {verb} {}/{length} dev eth0 {flags}", self.address);
        self.scene.lab().router().ip(&line).unwrap();
    }
}

impl Drop for Intruder<'_> {
    fn drop(&mut self) {
        self.ip("del", "");
    }
}

/// It is found before the first announcement, which waits until the other one is gone.
pub(crate) fn before_the_first_announcement(scene: &Scene<'_>) {
    for (name, family, address) in [
        ("taken-v4", "IPv4", IpAddr::V4(Network::Lan.v4(253))),
        ("taken-v6", "IPv6", IpAddr::V6(Network::Lan.v6(253))),
    ] {
        let intruder = Intruder::new(scene, address);
        let spec = json!({"ipFamilyPolicy": SINGLE, "ipFamilies": [family]});
        scene.create(name, spec, json!({"landfall.dev/ips": address.to_string()}));
        let why = scene.expect(address, "False AddressConflict");
        assert!(why.contains(&Intruder::mac()), "{why}");
        println!("      {why}");
        let answers = scene.answers(address);
        assert!(
            answers.len() == 1 && answers.contains_key(&Intruder::mac()),
            "only the other station answers for {address}: {answers:?}"
        );
        scene.expect_on_service(name, "False AddressConflict");
        scene.expect_events(name, "AddressConflict", 1);

        drop(intruder);
        let left = Instant::now();
        scene.expect(address, "True LeaderElected");
        let leader = scene.leader(address);
        scene.led_by(&[address], &leader);
        println!(
            "      served {:.1} s after it left",
            left.elapsed().as_secs_f64()
        );
        scene.expect_on_service(name, "True Announced");
        scene.expect_events(name, "AddressConflict", 1);
    }
}

/// It comes while a node announces: that goes on, and is said.
pub(crate) fn later(scene: &Scene<'_>) {
    let spec = json!({"ipFamilyPolicy": SINGLE, "ipFamilies": ["IPv4"]});
    let vips = scene.create("contested", spec, json!({}));
    scene.served(&vips);
    let leader = scene.leader(vips[0]);
    let seen = || -> f64 {
        let text = scene.lab().speaker_metrics(&leader).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("landfall_address_conflicts_total "));
        line.expect("the metric is there").parse().unwrap()
    };
    let before = seen();
    let intruder = Intruder::new(scene, vips[0]);
    let look = || {
        intruder.speak();
        scene.condition(vips[0])
    };
    let why = eventually("the conflict", look, |it| {
        it.starts_with("False AddressConflict")
    });
    assert!(why.contains(&Intruder::mac()), "{why}");
    assert!(seen() > before, "the conflict is counted");
    assert!(
        scene.answers(vips[0]).contains_key(&leader),
        "{leader} goes on announcing"
    );
    scene.expect_on_service("contested", "False AddressConflict");
    scene.expect_events("contested", "AddressConflict", 1);
    drop(intruder);
    let left = Instant::now();
    scene.expect(vips[0], "True LeaderElected");
    println!(
        "      over {:.1} s after it left",
        left.elapsed().as_secs_f64()
    );
    scene.expect_on_service("contested", "True Announced");
    thread::sleep(Duration::from_secs(1));
    scene.led_by(&vips, &leader);
}
