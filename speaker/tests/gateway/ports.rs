//! Ports, and connections of one name that come after each other.

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use landfall_lab::Netns;
use landfall_lab::server::WHO_AM_I;
use socket2::{Domain, Socket, Type};

use super::world::{
    EGRESS, LINES, PATIENCE, REMOTE, SERVER, World, connect, ip, pod_addresses, retransmitted, say,
};

/// How many connections each case makes.
const MANY: u16 = 30;
const HURRIED: u16 = 7000;

/// A server that closes each connection itself, and so remembers it (RFC 9293, 3.6.1).
fn hurry(netns: &Netns, connections: usize) -> JoinHandle<()> {
    let listener = netns.run(|| TcpListener::bind(("::", HURRIED)).unwrap());
    thread::spawn(move || {
        for _ in 0..connections {
            drop(listener.accept());
        }
    })
}

/// A connection from this port of a pod.
fn from_port(pod: &Netns, own: SocketAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    pod.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&own.into())?;
        socket.connect_timeout(&to.into(), PATIENCE)?;
        let stream: TcpStream = socket.into();
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

/// The same, to its end.
fn visit(pod: &Netns, own: SocketAddr, to: SocketAddr) -> std::io::Result<()> {
    let mut stream = from_port(pod, own, to)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// The remote remembers connections of the same name. A pod may come back at once; another pod, whose clock and numbers are
/// others, never meets them.
#[test]
fn time_wait_at_the_remote_hurts_nobody() {
    for strict in ["0", "1"] {
        let world = World::build();
        world.remote.sysctl("net.ipv4.tcp_rfc1337", strict).unwrap();
        for (family, remote) in REMOTE.into_iter().enumerate() {
            let to = SocketAddr::new(ip(remote), HURRIED);
            let server = hurry(&world.remote, 3 * usize::from(MANY));
            let before = [0, 1].map(|place| retransmitted(&world.pods[place]));
            for number in 0..MANY {
                let port = 40_000 + number;
                for place in [0, 1, 0] {
                    let own = SocketAddr::new(pod_addresses(place)[family], port);
                    visit(&world.pods[place], own, to)
                        .unwrap_or_else(|error| panic!("{own} to {to}: {error}"));
                }
            }
            server.join().unwrap();
            let after = [0, 1].map(|place| retransmitted(&world.pods[place]));
            assert_eq!(after, before, "a SYN was sent twice: tcp_rfc1337={strict}");
        }
        println!("{:?}", world.gateway().counts());
        world.no_leak();
    }
}

/// A port that another pod gets too early: the remote acknowledges its old connection, the pod resets that, and its next
/// SYN is taken. The binding outlives the reset.
#[test]
fn a_reset_in_the_middle_of_a_handshake() {
    const FEW: u16 = 10;
    let mut world = World::bare();
    world.config.times.rest = 0;
    world.start();
    let again = || {
        [0, 1]
            .map(|place| retransmitted(&world.pods[place]))
            .iter()
            .sum::<u64>()
    };
    for (family, remote) in REMOTE.into_iter().enumerate() {
        let to = SocketAddr::new(ip(remote), HURRIED);
        let server = hurry(&world.remote, 3 * usize::from(FEW));
        let before = again();
        for number in 0..FEW {
            // One of two pods is behind the other, by its timestamps: back and forth.
            for place in [0, 1, 0] {
                let own = SocketAddr::new(pod_addresses(place)[family], 40_000 + number);
                visit(&world.pods[place], own, to)
                    .unwrap_or_else(|error| panic!("{own} to {to}: {error}"));
            }
        }
        server.join().unwrap();
        let resent = again() - before;
        println!(
            "{resent} of {} to {to} had to send their SYN again",
            3 * FEW
        );
        assert!(resent > 0, "nobody met an old connection of the same name");
        assert_eq!(world.count("unknown"), 0);
    }
}

/// All pods have a connection from the same port to the same remote at once, and each has its own answers.
#[test]
fn pods_on_one_source_port_are_told_apart() {
    let world = World::build();
    let mut open = Vec::new();
    for family in 0..2 {
        let to = SocketAddr::new(ip(REMOTE[family]), LINES);
        let streams: Vec<TcpStream> = (0..5)
            .map(|place| {
                let own = SocketAddr::new(pod_addresses(place)[family], 40_000);
                from_port(&world.pods[place], own, to).unwrap()
            })
            .collect();
        for turn in 0..3 {
            for (place, stream) in streams.iter().enumerate() {
                let line = format!("pod {place}, {turn}");
                assert_eq!(say(stream, &line).unwrap(), line);
                assert_eq!(ip(&say(stream, WHO_AM_I).unwrap()), ip(EGRESS[family]));
            }
        }
        open.extend(streams);
    }
    assert_eq!(world.used(), open.len() as u64);
    world.no_leak();
}

/// Exactly as many as the policy allows; the rest is told at once, and no flow that is there suffers.
#[test]
fn past_the_quota_new_flows_fail_fast() {
    const MOST: usize = 200;
    const EACH: usize = 60;
    for family in 0..2 {
        let mut world = World::bare();
        world.policy().ports = Some(u32::try_from(MOST).unwrap());
        world.start();
        let to = SocketAddr::new(ip(REMOTE[family]), LINES);
        let mut open: Vec<TcpStream> = Vec::new();
        let mut refused = Vec::new();
        for number in 0..4 * EACH {
            let begun = Instant::now();
            match connect(&world.pods[number % 4], to) {
                Ok(stream) => open.push(stream),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                    refused.push(begun.elapsed());
                }
            }
        }
        assert_eq!((open.len(), refused.len()), (MOST, 4 * EACH - MOST));
        println!("refused after at most {:?}", refused.iter().max());
        let own = connect(&world.pods[4], to).unwrap_err();
        assert_eq!(
            own.kind(),
            ErrorKind::ConnectionRefused,
            "the gateway's own pod"
        );
        for stream in &open {
            let seen: IpAddr = ip(&say(stream, WHO_AM_I).unwrap());
            assert_eq!(seen, ip(EGRESS[family]));
        }
        assert_eq!(world.used(), MOST as u64);
        // What ends makes room.
        drop(open.split_off(MOST - 50));
        let begun = Instant::now();
        while world.used() > (MOST - 50) as u64 {
            assert!(begun.elapsed() < PATIENCE, "{}", world.used());
            thread::sleep(Duration::from_millis(20));
        }
        let to = SocketAddr::new(ip(SERVER[family]), LINES);
        let again: Vec<TcpStream> = (0..50)
            .map(|number| connect(&world.pods[number % 5], to).unwrap())
            .collect();
        assert_eq!(
            connect(&world.pods[0], to).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
        drop(again);
        world.no_leak();
    }
}

/// Short connections from four pods to one remote, 2 000 a second if the machine keeps up: many more than each pod has
/// ports, and all pods want the same. Each comes back to those that it has had, while they rest for the others.
#[test]
fn pods_come_back_to_their_own_ports() {
    const EACH: u32 = 5_000;
    const ALL: u64 = 4 * EACH as u64;
    /// How long one pod's connection follows another.
    const APART: Duration = Duration::from_millis(2);
    let world = World::build();
    for pod in &world.pods[..4] {
        pod.sysctl("net.ipv4.ip_local_port_range", "40000 41023")
            .unwrap();
    }
    for (remote, bound) in REMOTE.into_iter().zip([ALL, 2 * ALL]) {
        let to = SocketAddr::new(ip(remote), HURRIED);
        let server = hurry(&world.remote, usize::try_from(ALL).unwrap());
        let begun = Instant::now();
        let visit = |number: u32| {
            thread::sleep((APART * number).saturating_sub(begun.elapsed()));
            TcpStream::connect_timeout(&to, PATIENCE)?.read_to_end(&mut Vec::new())
        };
        let failures = || (0..EACH).filter(|number| visit(*number).is_err()).count();
        let failed: usize = thread::scope(|scope| {
            let visitors: Vec<_> = world.pods[..4]
                .iter()
                .map(|pod| scope.spawn(move || pod.run(failures)))
                .collect();
            visitors
                .into_iter()
                .map(|visitor| visitor.join().unwrap())
                .sum()
        });
        println!(
            "{ALL} connections to {to}, {:.0} a second, {failed} failed; {:?}",
            f64::from(4 * EACH) / begun.elapsed().as_secs_f64(),
            world.gateway().counts()
        );
        assert_eq!(failed, 0);
        server.join().unwrap();
        assert_eq!(world.count("bound"), bound);
        assert_eq!((world.count("no-port"), world.count("unknown")), (0, 0));
    }
    world.no_leak();
}
