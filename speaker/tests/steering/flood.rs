//! Half-open connections in masses take nothing from those that are established.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::manifests::LINES;

use super::cluster::{mk_three, vips};
use super::flow::{Flow, all_alive, open};
use landfall_lab::packets::{Raw, syn};

/// How many SYNs are sent, half of them to each VIP: three times what the table of half-open flows holds.
const SYNS: u32 = 50_000;
/// How many are sent at once, every ten milliseconds.
const BURST: u32 = 100;
/// How many flows are established before.
const FLOWS: usize = 100;

/// The `number`-th made-up client.
fn mk_source(vip: IpAddr, number: u32) -> SocketAddr {
    let [_, _, high, low] = number.to_be_bytes();
    let address: IpAddr = match vip {
        IpAddr::V4(_) => Ipv4Addr::new(10, 66, high, low).into(),
        IpAddr::V6(_) => {
            Ipv6Addr::new(0xfd00, 0x66, 0, 0, 0, 0, u16::from(high), u16::from(low)).into()
        }
    };
    SocketAddr::new(address, 1024 + u16::from(low) * 7)
}

#[test]
fn a_syn_flood_evicts_nothing() {
    let (cluster, _) = mk_three(false);
    let lab = &cluster.lab;
    // What is answered to nobody ends at the router.
    lab.router()
        .ip_batch("route add blackhole 10.66.0.0/16\nroute add blackhole fd00:66::/32\n")
        .unwrap();
    let mut flows: Vec<Flow> = vips()
        .into_iter()
        .flat_map(|vip| open(&cluster, vip, FLOWS / 2))
        .collect();
    let before = cluster.verdicts()["delivered"];
    let sockets = vips().map(|vip| (vip, Raw::open(lab.client(), vip)));
    let flood = thread::spawn(move || {
        let begun = Instant::now();
        let mut refused = 0;
        for number in 0..SYNS / 2 {
            for (vip, socket) in &sockets {
                let packet = syn(mk_source(*vip, number), (*vip, LINES).into(), number);
                refused += u32::from(socket.send(*vip, &packet).is_err());
            }
            let due = Duration::from_millis(10) * (2 * number / BURST);
            thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        (begun.elapsed(), refused)
    });
    let mut worst = Duration::ZERO;
    let mut opened = 0;
    while !flood.is_finished() {
        all_alive(&cluster, &mut flows, "in the flood");
        for vip in vips() {
            let begun = Instant::now();
            flows.extend(open(&cluster, vip, 1));
            worst = worst.max(begun.elapsed());
            opened += 1;
        }
    }
    let (took, refused) = flood.join().unwrap();
    all_alive(&cluster, &mut flows, "after the flood");
    let verdicts = cluster.verdicts();
    println!(
        "{SYNS} SYNs in {:.1} s, {refused} not sent; {opened} connections meanwhile, the slowest in {worst:?}: {verdicts:?}",
        took.as_secs_f64()
    );
    assert!(opened > 0, "the flood was over too soon");
    assert!(
        verdicts["delivered"] - before > u64::from(SYNS) / 2,
        "the flood did not arrive"
    );
    assert_eq!(verdicts["flows-full"], 0);
}
