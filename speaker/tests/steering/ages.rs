//! Flows of every age, whichever side speaks first, at everything that can happen to the leader.

use std::io::BufReader;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::fault::{Fault, SPEAKER};
use landfall_lab::manifests::NEWS;
use landfall_lab::server::{self, NEWS_INTERVAL};
use landfall_lab::{Netns, Topology};

use super::cluster::{Cluster, PATIENCE, vips};
use super::flow::{Flow, all_alive, await_served, open};

/// How many flows of each kind, to each VIP, there are of an age.
const FLOWS: usize = 20;
/// How long it is watched what an event does.
const AFTER: Duration = Duration::from_secs(3);

/// A flow in which the server speaks, first and alone.
struct News {
    stream: BufReader<TcpStream>,
    opened: Instant,
    pod: String,
    heard: u32,
}

impl News {
    fn open(from: &Netns, to: SocketAddr) -> std::io::Result<Self> {
        let opened = Instant::now();
        let stream = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut news = Self {
            stream: BufReader::new(stream),
            opened,
            pod: String::new(),
            heard: 0,
        };
        news.pod = server::News::read(&mut news.stream)?.pod;
        Ok(news)
    }

    /// Reads on until a line comes that was sent after a moment. None may be missing.
    fn read_past(&mut self, moment: Instant) -> std::io::Result<()> {
        while self.opened + NEWS_INTERVAL * self.heard <= moment {
            self.heard += 1;
            let line = server::News::read(&mut self.stream)?;
            let (pod, number) = (&self.pod, self.heard);
            assert!(
                line.pod == *pod && line.number == u64::from(number),
                "{line:?} is not line {number} of {pod}"
            );
        }
        Ok(())
    }
}

/// Flows that were opened at one time.
struct Cohort {
    name: &'static str,
    opened: Instant,
    asking: Vec<Flow>,
    told: Vec<News>,
}

impl Cohort {
    fn open(cluster: &Cluster, name: &'static str) -> Self {
        let opened = Instant::now();
        let mut asking = Vec::new();
        let mut told = Vec::new();
        for vip in vips() {
            asking.extend(open(cluster, vip, FLOWS));
            let to = (vip, NEWS).into();
            told.extend((0..FLOWS).map(|_| News::open(cluster.lab.client(), to).unwrap()));
        }
        Self {
            name,
            opened,
            asking,
            told,
        }
    }

    fn all_alive(&mut self, cluster: &Cluster, when: &str) {
        let when = format!("{when}, opened {} before", self.name);
        let now = Instant::now();
        all_alive(cluster, &mut self.asking, &when);
        for news in &mut self.told {
            if let Err(error) = news.read_past(now) {
                for node in cluster.lab.nodes() {
                    println!("{}: {:?}", node.name, cluster.verdicts_of(&node.name));
                }
                panic!("{when}: news of {}, line {}: {error}", news.pod, news.heard);
            }
        }
    }

    /// Leaves out what ends with a node.
    fn forget(&mut self, node: &str) {
        let lives = |pod: &str| !pod.starts_with(&format!("{node}-"));
        self.asking.retain(|flow| lives(&flow.pod));
        self.told.retain(|news| lives(&news.pod));
    }

    fn await_age(&self, age: Duration) {
        thread::sleep(age.saturating_sub(self.opened.elapsed()));
    }
}

/// What happens, to the node that leads.
type Event = fn(&Cluster, &str);

/// Ends a speaker in order, and starts it again.
fn upgrade(cluster: &Cluster, node: &str) {
    cluster.lab.inject(node, Fault::Drain).unwrap();
    cluster.lab.wait(node, SPEAKER, PATIENCE).unwrap();
    cluster.lab.restart(node, SPEAKER).unwrap();
}

#[test]
fn flows_of_every_age_outlive_what_happens_to_the_leader() {
    let cluster = Cluster::build(Topology {
        nodes: 5,
        ..Topology::default()
    });
    let pods = cluster.pods();
    cluster.serve(&pods);
    cluster.speak();
    let [vip, _] = vips();
    cluster.await_leader(vip, |_| true);
    await_served(&cluster, vip, &pods);
    let mut old = Cohort::open(&cluster, "30 s");
    old.await_age(Duration::from_secs(30));

    let events: [(&str, bool, Event); 6] = [
        ("the leader's speaker is killed", true, |cluster, node| {
            cluster.lab.inject(node, Fault::Kill).unwrap();
        }),
        ("the leader's speaker is upgraded", true, upgrade),
        ("all speakers are upgraded in turn", true, |cluster, _| {
            for node in cluster.lab.nodes() {
                upgrade(cluster, &node.name);
                // As a DaemonSet's update goes: the next when this one is ready.
                cluster.await_steering();
            }
        }),
        ("the leader drains", true, |cluster, node| {
            cluster.lab.inject(node, Fault::Drain).unwrap();
        }),
        ("the leader's uplink goes down", false, |cluster, node| {
            cluster.lab.inject(node, Fault::UplinkDown).unwrap();
        }),
        ("the leader loses power", false, |cluster, node| {
            cluster.lab.inject(node, Fault::PowerOff).unwrap();
        }),
    ];
    for (what, its_pods_live, event) in events {
        let leader = cluster.await_leader(vip, |_| true);
        let mut grown = Cohort::open(&cluster, "2 s");
        grown.await_age(Duration::from_millis(1800));
        let mut young = Cohort::open(&cluster, "0.2 s");
        young.await_age(Duration::from_millis(200));
        let mut cohorts = [&mut old, &mut grown, &mut young];
        if !its_pods_live {
            for cohort in &mut cohorts {
                cohort.forget(&leader);
            }
        }
        let flows: Vec<usize> = cohorts
            .iter()
            .map(|cohort| cohort.asking.len() + cohort.told.len())
            .collect();
        println!("{what} ({leader}), with {flows:?} flows");
        let begun = Instant::now();
        event(&cluster, &leader);
        for cohort in &mut cohorts {
            cohort.all_alive(&cluster, what);
        }
        println!("all answered after {:.2} s", begun.elapsed().as_secs_f64());
        thread::sleep(AFTER.saturating_sub(begun.elapsed()));
        for cohort in &mut cohorts {
            cohort.all_alive(&cluster, &format!("some time after {what}"));
        }
        if its_pods_live {
            if !cluster.lab.runs(&leader, SPEAKER) {
                cluster.lab.restart(&leader, SPEAKER).unwrap();
            }
        } else {
            cluster.lab.heal_node(&leader).unwrap();
        }
        cluster.await_steering();
        for cohort in &mut cohorts {
            cohort.all_alive(&cluster, &format!("mended after {what}"));
        }
    }
    println!("{:?}", cluster.verdicts());
}
