//! A gateway goes, and its flows stay: by copies of its bindings, over the real channel.

use std::io::{BufReader, Read as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use landfall_ebpf_common::egress::binding::{Times, ticks};
use landfall_lab::Netns;
use landfall_lab::server::{self, NEWS_PORT, WHO_AM_I};
use landfall_speaker::datapath::egress::Standing;

use super::standby::{Pair, eventually};
use super::world::{EGRESS, LINES, PATIENCE, REMOTE, SERVER, connect, ip, say};

/// Of each pod of the other node, each family, each of two remotes and each kind.
const EACH: usize = 6;

/// A flow whose remote speaks first, and alone.
struct News {
    reader: BufReader<TcpStream>,
    last: u64,
}

impl News {
    fn begin(pod: &Netns, to: IpAddr) -> Self {
        let stream = connect(pod, SocketAddr::new(to, NEWS_PORT)).unwrap();
        let mut news = Self {
            reader: BufReader::new(stream),
            last: 0,
        };
        news.last = news.next().unwrap();
        news
    }

    /// The next line's number.
    fn next(&mut self) -> std::io::Result<u64> {
        Ok(server::News::read(&mut self.reader)?.number)
    }

    /// Nothing was lost between what was heard before and what comes now, until this line.
    fn goes_on(&mut self, until: u64) -> std::io::Result<()> {
        while self.last < until {
            let next = self.next()?;
            if next != self.last + 1 {
                return Err(std::io::ErrorKind::InvalidData.into());
            }
            self.last = next;
        }
        Ok(())
    }
}

/// Begins flows, one after the other, until it is to stop; with each when it began, and how many came to nothing.
fn hurry(pod: &Netns, to: SocketAddr, stop: &AtomicBool) -> (Vec<(Instant, TcpStream)>, u64) {
    let (mut begun, mut given_up) = (Vec::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        let wait = Duration::from_millis(50);
        let Ok(stream) = pod.run(|| TcpStream::connect_timeout(&to, wait)) else {
            given_up += 1;
            continue;
        };
        begun.push((Instant::now(), stream));
        thread::sleep(Duration::from_millis(2));
    }
    (begun, given_up)
}

#[test]
fn flows_outlive_their_gateway() {
    let mut pair = Pair::build();
    pair.speak(1);
    let (mut talks, mut news) = (Vec::new(), Vec::new());
    for family in 0..2 {
        for to in [SERVER[family], REMOTE[family]].map(ip) {
            for pod in &pair.world.pods[..4] {
                for _ in 0..EACH {
                    let stream = connect(pod, SocketAddr::new(to, LINES)).unwrap();
                    assert_eq!(ip(&say(&stream, WHO_AM_I).unwrap()), ip(EGRESS[family]));
                    talks.push((family, stream));
                    news.push(News::begin(pod, to));
                }
            }
        }
    }
    let flows = (talks.len() + news.len()) as u64;
    eventually("all are known at the standby", || pair.used() == flows);

    // Some begin while it goes.
    let stop = AtomicBool::new(false);
    let (cut, young) = thread::scope(|scope| {
        let pods = &pair.world.pods[..2];
        let young: Vec<_> = [0, 1]
            .map(|family| {
                let to = SocketAddr::new(ip(REMOTE[family]), LINES);
                let stop = &stop;
                scope.spawn(move || hurry(&pods[family], to, stop))
            })
            .into();
        eventually("some are known at the standby", || pair.used() > flows + 50);
        pair.power_off();
        let cut = Instant::now();
        stop.store(true, Ordering::Relaxed);
        let young = young.into_iter().map(|young| young.join().unwrap());
        (cut, young.collect::<Vec<_>>())
    });
    let known = pair.used() - flows;
    let (first, second) = (pair.first.as_ref().unwrap(), pair.second.as_ref().unwrap());
    let copied = second.metric("replication_changes_total");
    println!(
        "{copied} changes, {:.1} bytes each; lag: mean {:.1} ms of {}; {} full copies",
        first.metric("replication_sent_bytes_total") / copied,
        1e3 * first.metric("replication_lag_seconds_sum")
            / first.metric("replication_lag_seconds_count"),
        first.metric("replication_lag_seconds_count"),
        second.metric("replication_copies_total"),
    );
    pair.take_over(2);

    let mut lost = 0;
    for (family, stream) in &talks {
        match say(stream, WHO_AM_I) {
            Ok(answer) => assert_eq!(ip(&answer), ip(EGRESS[*family])),
            Err(error) => {
                println!("a client's flow: {error}");
                lost += 1;
            }
        }
    }
    for one in &mut news {
        let until = one.last + 30;
        if let Err(error) = one.goes_on(until) {
            println!("a server's flow: {error}");
            lost += 1;
        }
    }
    println!("lost {lost} of {flows} that were known at the standby");
    let (mut begun, mut ages) = (0, Vec::new());
    for (streams, given_up) in young {
        begun += given_up + streams.len() as u64;
        for (since, stream) in streams {
            stream
                .set_read_timeout(Some(Duration::from_secs(3)))
                .unwrap();
            if say(&stream, WHO_AM_I).is_err() {
                ages.push(cut.saturating_duration_since(since));
            }
        }
    }
    println!(
        "lost {} of {begun} younger ones, of which {known} were known: {ages:?}",
        ages.len()
    );
    println!("{:?}", pair.gateway().counts());
    assert_eq!(lost, 0);
    assert!(ages.len() as u64 <= begun - known, "known ones are lost");
    for (family, egress) in EGRESS.into_iter().enumerate() {
        let to = SocketAddr::new(ip(REMOTE[family]), LINES);
        let fresh = connect(&pair.world.pods[3], to).unwrap();
        assert_eq!(ip(&say(&fresh, WHO_AM_I).unwrap()), ip(egress));
    }
    pair.world.no_leak();
}

/// The gateway goes, comes back as the standby, and takes over when the other goes: what began at either goes on.
#[test]
fn flows_outlive_two_gateways() {
    let mut pair = Pair::build();
    pair.speak(1);
    let begin = |pair: &Pair| {
        let mut streams = Vec::new();
        for family in 0..2 {
            for to in [SERVER[family], REMOTE[family]].map(ip) {
                for pod in &pair.world.pods[..4] {
                    let stream = connect(pod, SocketAddr::new(to, LINES)).unwrap();
                    streams.push((family, stream));
                }
            }
        }
        streams
    };
    let all_go_on = |streams: &[(usize, TcpStream)]| {
        for (family, stream) in streams {
            let answer = say(stream, WHO_AM_I).unwrap();
            assert_eq!(ip(&answer), ip(EGRESS[*family]));
        }
    };
    let mut streams = begin(&pair);
    let each = streams.len() as u64;
    eventually("all are copied", || pair.used() == each);
    pair.power_off();
    pair.take_over(2);
    all_go_on(&streams);
    streams.extend(begin(&pair));
    // Some of those that the first knows end meanwhile.
    end(streams.drain(..8).map(|(_, stream)| stream));
    pair.return_first(2);
    eventually("all are copied back, and no others", || {
        pair.world.used() == 2 * each - 8
    });
    pair.take_back(3);
    all_go_on(&streams);
    println!("{:?}", pair.world.gateway().counts());
    assert_eq!(pair.world.count("resumed"), 0);
    assert_eq!(pair.world.count("cut"), 0);
    pair.world.no_leak();
}

/// A connection whose binding nobody has copied: its client's next packet makes it anew; where only the server speaks it
/// is lost, and ends when the client says something.
#[test]
fn clients_that_were_not_copied_go_on_by_themselves() {
    let mut pair = Pair::build();
    let mut streams = Vec::new();
    for (family, to) in REMOTE.map(ip).into_iter().enumerate() {
        for pod in &pair.world.pods[..4] {
            streams.push((family, connect(pod, SocketAddr::new(to, LINES)).unwrap()));
        }
    }
    pair.speak_second(1);
    assert_eq!(pair.used(), 0);
    pair.power_off();
    pair.take_over(2);
    for (family, stream) in &streams {
        let answer = say(stream, WHO_AM_I).unwrap();
        assert_eq!(ip(&answer), ip(EGRESS[*family]));
    }
    let counts = pair.gateway().counts();
    println!("{counts:?}");
    assert_eq!(counts["resumed"], streams.len() as u64);
    pair.world.no_leak();
}

/// Either process may end and begin again: copies stay, and what happened meanwhile is made up for.
#[test]
fn copies_outlive_processes() {
    let mut pair = Pair::build();
    pair.speak(1);
    let to = SocketAddr::new(ip(REMOTE[0]), LINES);
    let open = |pair: &Pair, count: usize| -> Vec<TcpStream> {
        (0..count)
            .map(|number| connect(&pair.world.pods[number % 4], to).unwrap())
            .collect()
    };
    let mut streams = open(&pair, 40);
    eventually("all are copied", || pair.used() == 40);
    // The standby's: what it has, it keeps; what it missed, it is told.
    pair.stop_second();
    streams.extend(open(&pair, 10));
    end(streams.drain(..5));
    pair.launch_second();
    assert_eq!(pair.used(), 40);
    pair.stand(Some(Standing::StandsBy));
    pair.speak_second(1);
    eventually("it has all, and no more", || pair.used() == 45);
    // The gateway's: flows begin and end while nobody counts them.
    pair.first = None;
    pair.world.stop();
    streams.extend(open(&pair, 10));
    end(streams.drain(..5));
    pair.world.start();
    // In the epoch that it had.
    pair.speak_first(1);
    eventually("all is told again", || pair.used() == 50);
    pair.power_off();
    pair.take_over(2);
    for stream in &streams {
        assert_eq!(ip(&say(stream, WHO_AM_I).unwrap()), ip(EGRESS[0]));
    }
    pair.world.no_leak();
}

/// A standby keeps copies that nobody hears, its next process too, until somebody says that it is none.
#[test]
fn copies_stay_until_they_are_no_copies() {
    let mut pair = Pair::build();
    pair.stop_second();
    pair.config.times.established = ticks(1);
    pair.config.watch = Duration::from_millis(100);
    pair.launch_second();
    pair.stand(Some(Standing::StandsBy));
    pair.speak(1);
    let to = SocketAddr::new(ip(REMOTE[0]), LINES);
    let _stream = connect(&pair.world.pods[0], to).unwrap();
    eventually("it is copied", || pair.used() == 1);
    thread::sleep(Duration::from_secs(3));
    assert_eq!(pair.used(), 1);
    pair.stop_second();
    pair.launch_second();
    thread::sleep(Duration::from_secs(3));
    assert_eq!(pair.used(), 1, "nobody has said anything yet");
    pair.stand(None);
    eventually("it ends by its own time", || pair.used() == 0);
}

/// They close, both sides.
fn end(streams: impl Iterator<Item = TcpStream>) {
    for mut stream in streams {
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
}

/// Nobody speaks for longer than half of the time that a flow may be idle, before the gateway goes and after: together
/// it would be too long, but to the new gateway that time begins when it takes over. What is idle for all of it ends.
#[test]
fn idle_flows_outlive_their_gateway() {
    /// In place of a day.
    const IDLE: u32 = 10;
    const QUIET: Duration = Duration::from_secs(7);
    let mut pair = Pair::build_with(Times {
        established: ticks(IDLE),
        ..Times::default()
    });
    pair.speak(1);
    let begin = |pair: &Pair| -> Vec<(usize, TcpStream)> {
        let mut streams = Vec::new();
        for family in 0..2 {
            for to in [SERVER[family], REMOTE[family]].map(ip) {
                for pod in &pair.world.pods[..4] {
                    let stream = connect(pod, SocketAddr::new(to, LINES)).unwrap();
                    assert_eq!(ip(&say(&stream, WHO_AM_I).unwrap()), ip(EGRESS[family]));
                    streams.push((family, stream));
                }
            }
        }
        streams
    };
    let streams = begin(&pair);
    let flows = streams.len() as u64;
    eventually("all are copied", || pair.used() == flows);
    thread::sleep(QUIET);
    pair.power_off();
    pair.take_over(2);
    thread::sleep(QUIET);
    assert_eq!(pair.used(), flows, "none has ended");
    for (family, stream) in &streams {
        assert_eq!(ip(&say(stream, WHO_AM_I).unwrap()), ip(EGRESS[*family]));
    }
    eventually("idle for too long", || pair.used() == 0);
    pair.world.no_leak();
}
