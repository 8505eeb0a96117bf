//! What arrives is what was sent.

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use landfall_lab::Netns;
use landfall_lab::bulk::{self, Content};
use landfall_lab::server::BULK;

use super::world::{LINES, REMOTE, SERVER, World, connect, ip};

/// How much goes each way.
const BYTES: u64 = 20_000_000;

/// Sends as much both ways at once, and compares the digests.
pub(super) fn exchange(from: &Netns, to: SocketAddr, bytes: u64) {
    let mut stream = connect(from, to).unwrap();
    writeln!(stream, "{BULK}{bytes}").unwrap();
    stream.set_nonblocking(true).unwrap();
    let begun = Instant::now();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream).unwrap();
            let (read, write) = stream.into_split();
            bulk::exchange(read, write, bytes, Content::Clients, &AtomicU64::new(0)).await
        })
        .unwrap_or_else(|error| panic!("{} to {to}: {error}", from.name()));
    println!(
        "{bytes} bytes each way, {} to {to}: {:.1} s",
        from.name(),
        begun.elapsed().as_secs_f64()
    );
}

fn all(world: &World) {
    for family in 0..2 {
        for pod in [&world.pods[0], &world.pods[4]] {
            for to in [SERVER[family], REMOTE[family]] {
                exchange(pod, SocketAddr::new(ip(to), LINES), BYTES);
            }
        }
    }
    world.no_leak();
    println!("{:?}", world.gateway().counts());
}

/// With whatever helps the kernel has: packets of 64 KB, checksums that nobody has computed.
#[test]
fn bytes_are_intact_with_offloads() {
    let world = World::build();
    for host in [&world.gw, &world.node] {
        host.exec("ethtool -K eth0 gro on").unwrap();
    }
    all(&world);
}

#[test]
fn bytes_are_intact_without_offloads() {
    let world = World::build();
    let hosts = [
        &world.gw,
        &world.node,
        &world.router,
        &world.server,
        &world.remote,
    ];
    for host in hosts.into_iter().chain(&world.pods) {
        host.exec("ethtool -K eth0 gro off tso off gso off tx off rx off")
            .unwrap();
    }
    all(&world);
}
