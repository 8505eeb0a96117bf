//! Tenants' sessions outlive their gateway: the real control plane, kube-proxy, controller and speakers, pods with
//! connections of four kinds to servers outside, a real mail server among them.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

mod sessions {
    mod session;

    use std::collections::{BTreeMap, BTreeSet};
    use std::thread;
    use std::time::{Duration, Instant};

    use landfall_lab::fault::SPEAKER;
    use landfall_lab::server::PodServer;
    use landfall_lab::{Fault, Lab, Pod, Topology};
    use landfall_tests::Cluster;
    use landfall_tests::mta::Mta;
    use landfall_tests::tenants::{self, await_egress, egress, far};

    use session::{Kind, Session};

    const NODES: u8 = 5;
    /// Of each kind, from all pods together whose node nothing happens to.
    const SESSIONS: usize = 200;
    /// How long connection tracking remembers a silent connection, in seconds; in place of days.
    const MEMORY: u64 = 1;
    /// What is younger than the copies' lag may be lost: the sessions are as old as that, and more.
    const AGE: Duration = Duration::from_secs(1);
    /// How long the mail server takes to take a message: longer than what happens meanwhile.
    const THINKS: Duration = Duration::from_secs(30);

    #[test]
    fn outlive_the_gateway() {
        let topology = Topology {
            nodes: NODES,
            pods_per_node: 1,
            ..Topology::default()
        };
        Cluster::run(topology, |cluster| {
            tenants::start(cluster)?;
            let lab = cluster.lab();
            let _lines = PodServer::start(lab.remote(), "far")?;
            let mta = Mta::start(lab.remote(), THINKS)?;
            await_policy(lab);
            remember_little(lab);
            // Silent through all of it.
            let pods: Vec<&Pod> = lab.pods().collect();
            let mut idle = open(
                &mta,
                &pods,
                &[Kind::Idles],
                SESSIONS.div_ceil(pods.len() - 2),
            );
            let begun = Instant::now();
            // Nothing is to be seen of these: programs and routes stay, or are handed over first.
            live_through(lab, &mta, "its speaker is killed", &[Fault::Kill], true);
            live_through(lab, &mta, "its speaker hands over", &[Fault::Drain], true);
            live_through(
                lab,
                &mta,
                "its uplink goes down",
                &[Fault::UplinkDown],
                true,
            );
            live_through(lab, &mta, "it loses its power", &[Fault::PowerOff], true);
            let two = [Fault::PowerOff, Fault::PowerOff];
            let what = "it loses its power, and so does the next";
            let struck = live_through(lab, &mta, what, &two, false);
            idle.retain(|session| !struck.contains(&session.node));
            let what = format!("silent for {:?}, through all of it", begun.elapsed());
            outlived(&what, &mut idle);
            let by_others = mta
                .log()
                .lines()
                .filter(|line| line.contains(": connect from") && !line.contains("[127.0.0.1]"))
                .filter(|line| {
                    !egress()
                        .iter()
                        .any(|address| line.contains(&format!("[{address}]")))
                })
                .count();
            assert_eq!(
                by_others,
                0,
                "mail comes from the policy's addresses: {}",
                mta.log()
            );
            Ok(())
        });
    }

    /// Connection tracking forgets who is silent.
    fn remember_little(lab: &Lab) {
        for node in lab.nodes() {
            let key = "net.netfilter.nf_conntrack_tcp_timeout_established";
            node.netns.sysctl(key, &MEMORY.to_string()).unwrap();
        }
    }

    /// Waits until all pods leave by the policy's addresses.
    fn await_policy(lab: &Lab) {
        for pod in lab.pods() {
            await_egress(pod, far());
        }
    }

    /// Opens sessions from all pods, lets these things happen to the gateway, one after the other, and sees which of the
    /// sessions go on: those of pods whose node nothing has happened to. The nodes that something has happened to.
    fn live_through(
        lab: &Lab,
        mta: &Mta,
        what: &str,
        faults: &[Fault],
        heal: bool,
    ) -> BTreeSet<String> {
        let strikes = |fault: &&Fault| matches!(fault, Fault::PowerOff | Fault::UplinkDown);
        let pods: Vec<&Pod> = lab.pods().collect();
        let spared = pods.len() - faults.iter().filter(strikes).count();
        let begun = Instant::now();
        let mut sessions = open(mta, &pods, &Kind::ALL, SESSIONS.div_ceil(spared));
        println!("{} sessions after {:?}", sessions.len(), begun.elapsed());
        thread::sleep(AGE);
        for session in &sessions {
            let by = session.seen;
            let is_mail = session.kind == Kind::Mails;
            assert!(
                is_mail || by.is_some_and(|by| egress().contains(&by)),
                "{:?} is seen as {by:?}",
                session.kind
            );
            assert!(!is_mail || session.waits(), "the message is taken already");
        }
        let mut struck = BTreeSet::new();
        let first = Instant::now();
        for fault in faults {
            let gateway = tenants::gateway(lab, egress()[0]);
            println!("{gateway} is the gateway: {what}");
            lab.inject(&gateway, *fault).unwrap();
            assert!(!struck.contains(&gateway), "another has taken over");
            let since = first.elapsed();
            assert!(
                since < Duration::from_secs(10),
                "the last one after {since:?}"
            );
            if strikes(&fault) {
                struck.insert(gateway.clone());
            }
            if faults.len() > 1 {
                // Who takes over has the time to do so.
                thread::sleep(Duration::from_secs(3));
            }
        }
        sessions.retain(|session| !struck.contains(&session.node));
        outlived(what, &mut sessions);
        if heal {
            lab.heal().unwrap();
            for node in lab.nodes() {
                if !lab.runs(&node.name, SPEAKER) {
                    lab.restart(&node.name, SPEAKER).unwrap();
                }
            }
            // A kube-proxy that began anew has its own mind.
            remember_little(lab);
            await_policy(lab);
        }
        struck
    }

    /// Of each kind all go on but one of a hundred.
    fn outlived(what: &str, sessions: &mut [Session]) {
        let mut all = BTreeMap::<Kind, usize>::new();
        for session in &*sessions {
            *all.entry(session.kind).or_default() += 1;
        }
        let lost = go_on(sessions);
        for (kind, all) in all {
            let lost = lost.iter().filter(|(of, _)| *of == kind);
            let lost: Vec<&String> = lost.map(|(_, why)| why).collect();
            println!(
                "{what}: of {all} of which each {kind:?}, {} lost",
                lost.len()
            );
            assert!(all >= SESSIONS, "{what}: {all} of which each {kind:?}");
            assert!(lost.len() * 100 <= all, "{what}: {kind:?}: {lost:#?}");
        }
    }

    /// Opens so many sessions of each of these kinds from each pod, IPv4 and IPv6 in turn, the pods beside each other.
    fn open(mta: &Mta, pods: &[&Pod], kinds: &[Kind], each: usize) -> Vec<Session> {
        thread::scope(|scope| {
            let opening: Vec<_> = pods
                .iter()
                .map(|pod| {
                    scope.spawn(move || {
                        let turns = (0..each)
                            .flat_map(|turn| kinds.iter().map(move |kind| (*kind, turn % 2 == 1)));
                        let opened = turns.enumerate().map(|(before, (kind, v6))| {
                            let session = Session::open(pod, kind, v6);
                            session.unwrap_or_else(|error| {
                                // Whether it is this one or all of the pod's.
                                let next = Session::open(pod, kind, v6).map(|it| it.seen);
                                panic!(
                                    "{} {kind:?} after {before} others, IPv6: {v6}: {error}; the next: {next:?}\n{}",
                                    pod.name,
                                    last_words(mta)
                                )
                            })
                        });
                        opened.collect::<Vec<_>>()
                    })
                })
                .collect();
            let opened = opening.into_iter().map(|thread| thread.join().unwrap());
            opened.flatten().collect()
        })
    }

    /// The end of the mail server's log.
    fn last_words(mta: &Mta) -> String {
        let log = mta.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Has them all go on at once; those that cannot, and why.
    fn go_on(sessions: &mut [Session]) -> Vec<(Kind, String)> {
        thread::scope(|scope| {
            let going: Vec<_> = sessions
                .iter_mut()
                .map(|session| {
                    let going = move || {
                        let gone_on = session.go_on();
                        gone_on.map_err(|error| {
                            (session.kind, format!("on {}: {error}", session.node))
                        })
                    };
                    scope.spawn(going)
                })
                .collect();
            let ended = going.into_iter().map(|thread| thread.join().unwrap());
            ended.filter_map(Result::err).collect()
        })
    }
}
