//! The announcer on a switched segment in network namespaces: the kernels of the other stations judge it.
//!
//! ```text
//!  node .11 ──┐
//!  other .12 ─┼── switch (snoops, with a querier)
//!  client .100┘
//! ```

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_speaker::announcer::{
    self, Announcement, Announcer, AnnouncerEvent, Config, Handle, Interface, MacAddr, ProbeOutcome,
};
use prometheus_client::registry::Registry;

const SNOOPING: &str = "mcast_snooping 1 mcast_querier 1 mcast_mld_version 2 \
    mcast_query_response_interval 100 mcast_query_interval 1000 mcast_startup_query_interval 100";

const PATIENCE: Duration = Duration::from_secs(5);

fn vips() -> [IpAddr; 2] {
    ["10.88.0.200", "fd00:88::200"].map(|vip| vip.parse().expect("an address"))
}

/// A station on the segment.
struct Station {
    netns: Netns,
    mac: String,
}

impl Station {
    fn mac(&self) -> MacAddr {
        let mut bytes = [0; 6];
        for (byte, text) in bytes.iter_mut().zip(self.mac.split(':')) {
            *byte = u8::from_str_radix(text, 16).expect("hexadecimal");
        }
        MacAddr(bytes)
    }

    fn index(&self) -> u32 {
        self.netns.interface_index("eth0").expect("it has eth0")
    }

    /// Has the kernel resolve an address: sends a datagram to it.
    fn touch(&self, vip: IpAddr) {
        self.touch_from(None, vip);
    }

    fn touch_from(&self, source: Option<IpAddr>, vip: IpAddr) {
        let any = match vip {
            IpAddr::V4(_) => "0.0.0.0",
            IpAddr::V6(_) => "::",
        };
        let source = source.unwrap_or_else(|| any.parse().expect("an address"));
        self.netns.run(|| {
            let socket = UdpSocket::bind(SocketAddr::from((source, 0))).expect("bound");
            // The neighbour may be known to be unreachable: then the kernel says so.
            let _ = socket.send_to(b"?", SocketAddr::from((vip, 9)));
        });
    }

    /// What its kernel has on a neighbour.
    fn neighbour(&self, vip: IpAddr) -> String {
        self.netns
            .ip(&format!("neigh show to {vip} dev eth0"))
            .expect("shown")
    }

    fn forget(&self, vip: IpAddr) {
        // There may be nothing to forget.
        let _ = self.netns.ip(&format!("neigh del {vip} dev eth0"));
    }

    /// Whether its kernel, asking anew, finds the address at this station within the kernel's own patience.
    fn resolves(&self, vip: IpAddr, at: &Station) -> bool {
        self.forget(vip);
        self.touch(vip);
        eventually(|| {
            let neighbour = self.neighbour(vip);
            neighbour.contains(&at.mac) || neighbour.contains("FAILED")
        });
        self.neighbour(vip).contains(&at.mac)
    }
}

struct Segment {
    node: Station,
    other: Station,
    client: Station,
    switch: Netns,
}

impl Segment {
    fn build() -> Self {
        let switch = Netns::create("switch").expect("namespaces need root");
        switch.bridge("br0", SNOOPING).expect("a bridge");
        let station = |role: &str, host: u8| {
            let netns = Netns::create(role).expect("namespaces need root");
            let mac = format!("02:88:00:00:00:{host:02x}");
            switch.veth(role, &netns, "eth0").expect("a cable");
            switch
                .ip(&format!("link set {role} master br0"))
                .expect("plugged in");
            netns
                .ip_batch(&format!(
                    "link set eth0 address {mac}\naddress add 10.88.0.{host}/24 dev eth0\n\
                     address add fd00:88::{host}/64 dev eth0\n"
                ))
                .expect("addresses");
            Station { netns, mac }
        };
        let segment = Self {
            node: station("node", 11),
            other: station("other", 12),
            client: station("client", 100),
            switch,
        };
        // Snooping filters once the querier has been heard: until then it floods.
        std::thread::sleep(Duration::from_millis(500));
        segment
    }
}

/// An announcer that runs in a station's namespace. Dropping it ends it.
struct Running {
    handle: Option<Handle>,
    registry: Registry,
    events: mpsc::Receiver<AnnouncerEvent>,
    thread: Option<JoinHandle<()>>,
    /// The number of its thread.
    tid: i32,
    index: u32,
}

impl Running {
    fn start(station: &Station) -> Self {
        let (ready, started) = mpsc::channel();
        let (sender, events) = mpsc::channel();
        let thread = station.netns.spawn("announcer", move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                let mut registry = Registry::default();
                let (handle, mut events) =
                    announcer::start(Config::default(), &mut registry).expect("started");
                let tid = nix::unistd::gettid().as_raw();
                ready.send((handle, registry, tid)).expect("the test waits");
                drop(ready);
                while let Some(event) = events.recv().await {
                    // The test may have heard enough.
                    let _ = sender.send(event);
                }
            });
        });
        let (handle, registry, tid) = started.recv().expect("it started");
        let running = Self {
            handle: Some(handle),
            registry,
            events,
            thread: Some(thread),
            tid,
            index: station.index(),
        };
        running.interface(|_| true);
        running
    }

    fn handle(&self) -> &Handle {
        self.handle.as_ref().expect("there until dropped")
    }

    fn announce(&self, vip: IpAddr, probe: bool) {
        self.handle().announce(Announcement {
            vip,
            interface: self.index,
            probe,
        });
    }

    /// The first event that `pick` takes.
    fn wait<T>(
        &self,
        patience: Duration,
        mut pick: impl FnMut(AnnouncerEvent) -> Option<T>,
    ) -> Option<T> {
        let end = Instant::now() + patience;
        loop {
            let left = end.checked_duration_since(Instant::now())?;
            let event = self.events.recv_timeout(left).ok()?;
            if let Some(found) = pick(event) {
                return Some(found);
            }
        }
    }

    /// Waits until eth0 is as it should be.
    fn interface(&self, good: impl Fn(&Interface) -> bool) -> Interface {
        self.wait(PATIENCE, |event| match event {
            AnnouncerEvent::Interfaces(interfaces) => interfaces
                .iter()
                .find(|interface| &*interface.name == "eth0" && good(interface))
                .cloned(),
            _ => None,
        })
        .expect("netlink tells of it")
    }

    fn probed(&self, vip: IpAddr) -> Option<ProbeOutcome> {
        self.wait(Duration::from_secs(2), |event| match event {
            AnnouncerEvent::Probed { vip: of, outcome } if of == vip => Some(outcome),
            _ => None,
        })
    }

    /// The processor time it has used.
    fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{}/schedstat", self.tid))
            .expect("the thread runs");
        let nanoseconds = stat.split(' ').next().expect("a line of numbers");
        Duration::from_nanos(nanoseconds.parse().expect("a number"))
    }

    /// The value of a metric, zero when it is not there.
    fn metric(&self, start: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("encoded");
        text.lines()
            .find(|line| line.starts_with(start))
            .and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .unwrap_or(0)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle = None;
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the announcer did not panic");
        }
    }
}

/// Whether something comes to pass.
fn eventually(mut check: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    loop {
        if check() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_client_resolves_what_is_announced_and_nothing_else() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    for vip in vips() {
        assert!(
            !segment.client.resolves(vip, &segment.node),
            "{vip} too early"
        );
        announcer.announce(vip, false);
        assert!(segment.client.resolves(vip, &segment.node), "{vip}");
    }
    for family in ["IPv4", "IPv6"] {
        let answered = format!("announcer_answered_total{{family=\"{family}\"}}");
        assert!(announcer.metric(&answered) >= 1, "{family}");
    }
    for vip in vips() {
        announcer.handle().withdraw(vip);
        std::thread::sleep(Duration::from_millis(50));
        assert!(
            !segment.client.resolves(vip, &segment.node),
            "{vip} too late"
        );
    }
    assert_eq!(announcer.metric("announcer_vips"), 0);
}

#[test]
fn an_announcer_that_ends_falls_silent() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    let [vip, vip6] = vips();
    announcer.announce(vip, false);
    announcer.announce(vip6, false);
    assert!(segment.client.resolves(vip, &segment.node));
    drop(announcer);
    assert!(!segment.client.resolves(vip, &segment.node));
    assert!(!segment.client.resolves(vip6, &segment.node));
}

#[test]
fn the_switch_learns_of_the_listener_before_the_first_announcement() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    let [_, vip6] = vips();
    announcer.announce(vip6, false);
    let known = || {
        segment
            .switch
            .exec("bridge mdb show dev br0")
            .expect("shown")
            .lines()
            .any(|line| line.contains("port node") && line.contains("ff02::1:ff00:200"))
    };
    assert!(eventually(known));
    // Now the switch filters, and the solicitation still arrives.
    assert!(segment.client.resolves(vip6, &segment.node));
    announcer.handle().withdraw(vip6);
    assert!(eventually(|| !known()), "the group is left");
}

#[test]
fn unicast_neighbour_probes_are_answered() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    for vip in vips() {
        announcer.announce(vip, false);
        assert!(segment.client.resolves(vip, &segment.node));
        // In this state the kernel asks the known address alone, then gives up.
        let change = format!(
            "neigh replace {vip} lladdr {} dev eth0 nud probe",
            segment.node.mac
        );
        segment.client.netns.ip(&change).expect("changed");
        let done = || {
            let neighbour = segment.client.neighbour(vip);
            neighbour.contains("REACHABLE") || neighbour.contains("FAILED")
        };
        assert!(eventually(done));
        let neighbour = segment.client.neighbour(vip);
        assert!(neighbour.contains("REACHABLE"), "{neighbour}");
    }
}

#[test]
fn a_hosts_duplicate_address_detection_finds_the_vip() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    let [_, vip6] = vips();
    let client = &segment.client.netns;
    for (key, value) in [("accept_dad", "1"), ("dad_transmits", "1")] {
        client
            .sysctl(&format!("net.ipv6.conf.eth0.{key}"), value)
            .expect("set");
    }
    announcer.announce(vip6, false);
    client
        .ip(&format!("address add {vip6}/64 dev eth0"))
        .expect("added");
    let shown = || {
        client
            .ip("-6 address show dev eth0 to fd00:88::200")
            .expect("shown")
    };
    assert!(eventually(|| {
        let shown = shown();
        shown.contains("dadfailed") || !shown.contains("tentative")
    }));
    assert!(shown().contains("dadfailed"), "{}", shown());
}

#[test]
fn a_gratuitous_announcement_moves_the_clients_entry() {
    let segment = Segment::build();
    let first = Running::start(&segment.node);
    let second = Running::start(&segment.other);
    for vip in vips() {
        first.announce(vip, false);
        assert!(segment.client.resolves(vip, &segment.node));
        first.handle().withdraw(vip);
        second.announce(vip, false);
        let moved = || segment.client.neighbour(vip).contains(&segment.other.mac);
        assert!(
            eventually(moved),
            "{vip}: {}",
            segment.client.neighbour(vip)
        );
    }
    for family in ["IPv4", "IPv6"] {
        let sent = format!("announcer_gratuitous_total{{family=\"{family}\"}}");
        assert!(second.metric(&sent) >= 1, "{family}");
    }
}

#[test]
fn an_address_in_use_is_found_and_not_announced() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    for (vip, prefix) in vips().into_iter().zip([24, 64]) {
        segment
            .other
            .netns
            .ip(&format!("address add {vip}/{prefix} dev eth0"))
            .expect("added");
        announcer.announce(vip, true);
        let by = segment.other.mac();
        assert_eq!(
            announcer.probed(vip),
            Some(ProbeOutcome::Taken { by }),
            "{vip}"
        );
        assert!(
            segment.client.resolves(vip, &segment.other),
            "{vip} is the holder's"
        );
    }
    assert_eq!(announcer.metric("announcer_vips"), 0);
    assert_eq!(announcer.metric("announcer_gratuitous_total"), 0);
}

#[test]
fn a_free_address_is_announced_after_a_quarter_of_a_second() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    for vip in vips() {
        let start = Instant::now();
        announcer.announce(vip, true);
        assert!(!segment.client.neighbour(vip).contains(&segment.node.mac));
        assert_eq!(announcer.probed(vip), Some(ProbeOutcome::Free), "{vip}");
        let took = start.elapsed();
        assert!(
            (Duration::from_millis(240)..Duration::from_millis(600)).contains(&took),
            "{took:?}"
        );
        assert!(segment.client.resolves(vip, &segment.node), "{vip}");
    }
    for family in ["IPv4", "IPv6"] {
        let probes = format!("announcer_probes_total{{family=\"{family}\"}}");
        assert_eq!(announcer.metric(&probes), 3, "{family}");
    }
}

#[test]
fn probes_of_others_are_answered() {
    let segment = Segment::build();
    let holder = Running::start(&segment.node);
    let prober = Running::start(&segment.other);
    for vip in vips() {
        holder.announce(vip, false);
        assert!(segment.client.resolves(vip, &segment.node));
        prober.announce(vip, true);
        let by = segment.node.mac();
        assert_eq!(
            prober.probed(vip),
            Some(ProbeOutcome::Taken { by }),
            "{vip}"
        );
    }
}

#[test]
fn another_claimant_is_reported_once() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    for (vip, prefix) in vips().into_iter().zip([24, 64]) {
        announcer.announce(vip, false);
        assert!(segment.client.resolves(vip, &segment.node));
        let intruder = &segment.other;
        intruder
            .netns
            .ip(&format!("address add {vip}/{prefix} dev eth0 nodad"))
            .or_else(|_| {
                let add = format!("address add {vip}/{prefix} dev eth0");
                intruder.netns.ip(&add)
            })
            .expect("added");
        let unknown: [IpAddr; 2] = match vip {
            IpAddr::V4(_) => ["10.88.0.77", "10.88.0.78"],
            IpAddr::V6(_) => ["fd00:88::77", "fd00:88::78"],
        }
        .map(|address| address.parse().expect("an address"));
        // The intruder asks for others, and so tells where it says to be.
        let conflict = |patience| {
            announcer.wait(patience, |event| match event {
                AnnouncerEvent::Conflict { vip, by, interface } => Some((vip, by, interface)),
                _ => None,
            })
        };
        // Neighbours whom the solicitation does not reach (the switch snoops) do not hear of it: so it asks the node.
        let node: IpAddr = match vip {
            IpAddr::V4(_) => "10.88.0.11",
            IpAddr::V6(_) => "fd00:88::11",
        }
        .parse()
        .expect("an address");
        intruder.forget(node);
        intruder.touch_from(Some(vip), node);
        assert_eq!(
            conflict(PATIENCE),
            Some((vip, intruder.mac(), Arc::from("eth0"))),
            "{vip}"
        );
        intruder.touch_from(Some(vip), unknown[0]);
        intruder.forget(node);
        intruder.touch_from(Some(vip), node);
        assert_eq!(conflict(Duration::from_millis(500)), None, "{vip} again");
        // It keeps its address from now on, but asks from its own.
        intruder
            .netns
            .ip(&format!("address del {vip}/{prefix} dev eth0"))
            .expect("removed");
    }
    assert!(announcer.metric("announcer_conflicts_total") >= 2);
}

#[test]
fn a_new_ethernet_address_is_announced() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    for vip in vips() {
        announcer.announce(vip, false);
        assert!(segment.client.resolves(vip, &segment.node));
    }
    // Past the first repeats, none of which may be what is measured.
    std::thread::sleep(Duration::from_millis(5800));
    let mac = "02:88:00:00:00:99";
    segment
        .node
        .netns
        .ip(&format!("link set eth0 address {mac}"))
        .expect("changed");
    announcer.interface(|interface| interface.mac.to_string() == mac);
    for vip in vips() {
        let told = || segment.client.neighbour(vip).contains(mac);
        assert!(eventually(told), "{vip}: {}", segment.client.neighbour(vip));
    }
}

#[test]
fn a_link_that_comes_back_is_announced_on() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    for vip in vips() {
        announcer.announce(vip, false);
        assert!(segment.client.resolves(vip, &segment.node));
    }
    let sent = || {
        ["IPv4", "IPv6"].map(|family| {
            announcer.metric(&format!(
                "announcer_gratuitous_total{{family=\"{family}\"}}"
            ))
        })
    };
    // Without carrier the addresses stay; set down, the link loses all but what it is told to keep.
    for (host, link) in [(&segment.switch, "node"), (&segment.node.netns, "eth0")] {
        host.ip(&format!("link set {link} down")).expect("down");
        announcer.interface(|interface| !interface.up);
        // Past the first repeats, none of which may be what is counted.
        std::thread::sleep(Duration::from_millis(5800));
        let before = sent();
        host.ip(&format!("link set {link} up")).expect("up");
        announcer.interface(|interface| interface.up);
        let told = || sent().iter().zip(before).all(|(now, before)| *now > before);
        assert!(eventually(told), "{link}");
        for vip in vips() {
            assert!(segment.client.resolves(vip, &segment.node), "{vip}");
        }
    }
}

#[test]
fn interfaces_are_reported_as_they_change() {
    let segment = Segment::build();
    let node = &segment.node.netns;
    let announcer = Running::start(&segment.node);
    node.ip("route add default via 10.88.0.1").expect("a route");
    announcer.interface(|interface| interface.default_route == (true, false));
    node.ip("-6 route add default via fd00:88::1")
        .expect("a route");
    announcer.interface(|interface| interface.default_route == (true, true));
    node.ip("address add 10.88.1.11/24 dev eth0")
        .expect("added");
    announcer.interface(|interface| interface.addresses.len() == 3);
    // A route goes with its address, of which the kernel says nothing.
    node.ip("address flush dev eth0 to 10.88.0.0/16")
        .expect("removed");
    let without = announcer.interface(|interface| interface.addresses.len() == 1);
    assert_eq!(without.mac, segment.node.mac());
    assert_eq!(without.default_route, (false, true));
    node.bridge("br7", "").expect("a bridge");
    node.ip("link set eth0 master br7").expect("plugged in");
    announcer.interface(|interface| interface.enslaved);
    node.ip("link set eth0 nomaster").expect("unplugged");
    announcer.interface(|interface| !interface.enslaved);
}

#[test]
fn a_thousand_held_addresses_cost_little() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    let begun = Instant::now();
    for number in 0..500_u16 {
        let [high, low] = number.to_be_bytes();
        announcer.announce(IpAddr::from([10, 89, high, low]), false);
        announcer.announce(IpAddr::from([0xfd00, 0x89, 0, 0, 0, 0, 1, number]), false);
    }
    // Six rounds of 1500 frames at 1000 a second.
    let frames = || {
        ["IPv4", "IPv6"]
            .map(|family| {
                announcer.metric(&format!(
                    "announcer_gratuitous_total{{family=\"{family}\"}}"
                ))
            })
            .iter()
            .sum::<u64>()
    };
    // At no time more than the burst and a thousand a second since.
    let allowed = || 400 + u64::try_from(begun.elapsed().as_millis()).expect("soon");
    let await_frames = |count: u64| {
        loop {
            let sent = frames();
            let allowed = allowed();
            assert!(sent <= allowed, "{sent} of {allowed}");
            if sent >= count {
                return;
            }
            assert!(begun.elapsed() < Duration::from_mins(1), "{sent}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    await_frames(1500);
    await_frames(9000);
    // The last ones of the sixth round may be on their way.
    std::thread::sleep(Duration::from_secs(1));
    let busy = announcer.processor_time();
    std::thread::sleep(Duration::from_secs(3));
    let idle = announcer.processor_time().saturating_sub(busy);
    println!(
        "{:?} of announcing, with the wait for it: {busy:?}; 3 s of holding: {idle:?}",
        begun.elapsed()
    );
    assert!(idle < Duration::from_millis(150), "{idle:?}");
}

#[test]
fn frames_of_another_vlan_are_not_answered() {
    let segment = Segment::build();
    let announcer = Running::start(&segment.node);
    let [vip, _] = vips();
    announcer.announce(vip, false);
    assert!(segment.client.resolves(vip, &segment.node));
    let asked = || announcer.metric("announcer_asked_total{family=\"IPv4\"}");
    let before = asked();
    let request = |tag: &[u8]| {
        let mut frame = vec![0xff; 6];
        frame.extend(segment.client.mac().0);
        frame.extend(tag);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(segment.client.mac().0);
        frame.extend([10, 88, 0, 100, 0, 0, 0, 0, 0, 0, 10, 88, 0, 200]);
        let index = segment.client.index();
        segment
            .client
            .netns
            .run(|| landfall_lab::raw::send_frame(index, &frame))
            .expect("sent");
    };
    request(&[0x81, 0, 0, 7]);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(asked(), before);
    request(&[]);
    assert!(eventually(|| asked() == before + 1));
}

#[test]
fn hellos_reach_who_listens() {
    let segment = Segment::build();
    let sender = Running::start(&segment.node);
    let hearer = Running::start(&segment.other);
    let deaf = Running::start(&segment.client);
    sender.handle().listen(&[sender.index]);
    hearer.handle().listen(&[hearer.index]);
    let hello = |at: &Running, patience| {
        at.wait(patience, |event| match event {
            AnnouncerEvent::Hello {
                interface,
                from,
                payload,
            } => Some((interface, from, payload)),
            _ => None,
        })
    };
    std::thread::sleep(Duration::from_millis(100));
    sender.handle().hello(sender.index, None, b"opaque");
    let expected = (hearer.index, segment.node.mac(), b"opaque".to_vec());
    assert_eq!(hello(&hearer, PATIENCE), Some(expected));
    let short = Duration::from_millis(200);
    assert_eq!(hello(&deaf, short), None);
    assert_eq!(hello(&sender, short), None, "its own");
}
