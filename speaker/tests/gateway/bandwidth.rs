//! Tenants with a bandwidth: TCP fills what it may, either way, and takes nothing from others.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use landfall_core::model::Bandwidth;
use landfall_lab::Netns;
use landfall_lab::server::WHO_AM_I;

use super::standby::{Pair, eventually};
use super::world::{EGRESS, LINES, PATIENCE, REMOTE, World, connect, ip, say};

const RATE: u64 = 20_000_000;
/// How long each transfer goes on, and for how long it is measured: from its beginning, with what goes at once.
const LONG: Duration = Duration::from_secs(6);
const MEASURED: Duration = Duration::from_secs(5);
/// Longer than all that is measured of one connection.
const ENDLESS: Duration = PATIENCE.saturating_mul(8);

/// So many bits a second, and at once what goes without saying: the remote is so near that what TCP loses is only found out
/// by its timer, and that takes a fifth of a second.
fn at(rate: u64) -> Bandwidth {
    Bandwidth { rate, burst: None }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

/// Servers that take all that is sent, or send for as long as somebody listens, by the way of the bytes.
struct Pipe {
    up: End,
    down: End,
}

/// Where a server listens, and how much has arrived, there or at its clients.
struct End {
    port: u16,
    arrived: Arc<AtomicU64>,
}

impl Pipe {
    fn lay(host: &Netns) -> Self {
        let [up, down] = [Way::Up, Way::Down].map(|way| {
            let listener = host.run(|| TcpListener::bind(("::", 0)).unwrap());
            let port = listener.local_addr().unwrap().port();
            let arrived = Arc::new(AtomicU64::new(0));
            let counted = Arc::clone(&arrived);
            thread::spawn(move || {
                // For as long as the test runs: nobody comes any more after it.
                for stream in listener.incoming().flatten() {
                    let counted = Arc::clone(&counted);
                    thread::spawn(move || match way {
                        Way::Up => take(stream, &counted, ENDLESS),
                        Way::Down => give(stream, ENDLESS),
                    });
                }
            });
            End { port, arrived }
        });
        Self { up, down }
    }

    fn end(&self, way: Way) -> &End {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }

    /// How many bits a second arrive while all of these pods send or take, each over its family.
    fn rate(&self, pods: &[(&Netns, usize)], way: Way) -> u64 {
        thread::scope(|scope| {
            for (pod, family) in pods {
                let End { port, arrived } = self.end(way);
                let stream = connect(pod, SocketAddr::new(ip(REMOTE[*family]), *port)).unwrap();
                scope.spawn(move || match way {
                    Way::Up => give(stream, LONG),
                    Way::Down => take(stream, arrived, LONG),
                });
            }
            self.end(way).measure()
        })
    }
}

impl End {
    /// Never more than there was: the clock is read around the bytes.
    fn measure(&self) -> u64 {
        let begun = Instant::now();
        let before = self.arrived.load(Ordering::Relaxed);
        thread::sleep(MEASURED);
        let bits = 8 * (self.arrived.load(Ordering::Relaxed) - before);
        bits * 1000 / u64::try_from(begun.elapsed().as_millis()).unwrap()
    }
}

fn take(mut stream: TcpStream, arrived: &AtomicU64, long: Duration) {
    let mut buffer = vec![0; 64 * 1024];
    let begun = Instant::now();
    while begun.elapsed() < long {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(count) => arrived.fetch_add(count as u64, Ordering::Relaxed),
        };
    }
}

fn give(mut stream: TcpStream, long: Duration) {
    let buffer = vec![7; 64 * 1024];
    stream.set_write_timeout(Some(long)).unwrap();
    let begun = Instant::now();
    while begun.elapsed() < long && stream.write_all(&buffer).is_ok() {}
}

/// Whether it is as much as TCP makes of a rate that is policed. It is never more than is let through.
fn is_had(rate: u64, of: u64) -> bool {
    assert!(rate <= of * 105 / 100, "{rate} of {of}");
    rate >= of * 60 / 100
}

/// A machine that pauses slows TCP down, and more so where packets are lost: what can be had is seen in one of a few
/// measurements.
fn in_one_of_a_few(what: &str, is_seen: impl Fn() -> bool) {
    assert!((0..6).any(|_| is_seen()), "{what}: in no measurement");
}

#[test]
fn a_tenant_has_its_rate_and_the_other_what_is_there() {
    let mut world = World::bare();
    world.admit_another(3);
    world.policy().bandwidth = Some(at(RATE));
    world.start();
    let (mail, shop) = (Pipe::lay(&world.remote), Pipe::lay(&world.remote));
    let pods = &world.pods;
    let one = vec![(&pods[0], 0)];
    // Of two nodes, the gateway among them, and of both families: all together.
    let three = vec![(&pods[0], 0), (&pods[1], 1), (&pods[4], 0)];
    for way in [Way::Up, Way::Down] {
        for group in [&one, &three] {
            in_one_of_a_few("the rate, and the other's", || {
                let (limited, free) = thread::scope(|scope| {
                    let free = scope.spawn(|| shop.rate(&[(&pods[3], 0)], way));
                    (mail.rate(group, way), free.join().unwrap())
                });
                println!(
                    "{way:?}, {} at once: {limited} of {RATE} bit/s; the other tenant {free}",
                    group.len()
                );
                is_had(limited, RATE) && free > 5 * RATE
            });
        }
    }
    let dropped = |policy: &str| world.gateway().usage()[policy].count.bandwidth;
    assert!(dropped("mail") > 0);
    assert_eq!(dropped("shop"), 0);
    // What was on its way as they ended may be lost yet.
    eventually("both count the same", || {
        world.count("bandwidth") == dropped("mail")
    });
    world.no_leak();
}

/// It is told anew while bytes flow, and that ends nobody.
#[test]
fn another_rate_is_in_force_at_once() {
    let mut world = World::build();
    let pipe = Pipe::lay(&world.remote);
    let to = SocketAddr::new(ip(REMOTE[0]), LINES);
    let talk = connect(&world.pods[1], to).unwrap();
    let stream = connect(&world.pods[0], SocketAddr::new(ip(REMOTE[0]), pipe.up.port)).unwrap();
    let giver = thread::spawn(move || give(stream, ENDLESS));
    for (bandwidth, least, most) in [
        (None, 5 * RATE, u64::MAX),
        (Some(at(RATE)), RATE / 2, RATE * 11 / 10),
        (Some(at(RATE / 10)), RATE / 20, RATE * 11 / 100),
        (Some(at(5 * RATE)), 2 * RATE, RATE * 11 / 2),
        (None, 5 * RATE, u64::MAX),
    ] {
        world.policy().bandwidth = bandwidth;
        world.tell();
        eventually("it is in force", || world.gateway().is_settled());
        // What goes at once.
        thread::sleep(Duration::from_secs(1));
        in_one_of_a_few("another rate", || {
            let rate = pipe.up.measure();
            println!("{bandwidth:?}: {rate}");
            // What a pause left unread comes on top.
            (least..most).contains(&rate)
        });
        assert!(!giver.is_finished());
        assert_eq!(ip(&say(&talk, WHO_AM_I).unwrap()), ip(EGRESS[0]));
    }
    world.no_leak();
}

/// Whoever takes over has the same rate.
#[test]
fn a_new_gateway_has_the_same_rate() {
    let mut pair = Pair::build();
    pair.limit(Some(at(RATE)));
    pair.speak(1);
    let pipe = Pipe::lay(&pair.world.remote);
    let to = SocketAddr::new(ip(REMOTE[0]), LINES);
    let talk = connect(&pair.world.pods[0], to).unwrap();
    eventually("it is copied", || pair.used() == 1);
    let has_its_rate = |pair: &Pair, way| {
        in_one_of_a_few("the rate", || {
            let rate = pipe.rate(&[(&pair.world.pods[0], 0)], way);
            println!("{way:?}: {rate} of {RATE} bit/s");
            is_had(rate, RATE)
        });
    };
    has_its_rate(&pair, Way::Up);
    pair.power_off();
    pair.take_over(2);
    assert_eq!(ip(&say(&talk, WHO_AM_I).unwrap()), ip(EGRESS[0]));
    for way in [Way::Up, Way::Down] {
        has_its_rate(&pair, way);
    }
}
