use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

const PACE: Pace = Pace {
    refresh: Duration::from_secs(30),
    rate: 1000,
    burst: 400,
};

fn mk_vip(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 88, high, low).into()
}

/// Lets time pass from wake-up to wake-up; what was sent, and when.
fn run(schedule: &mut Schedule, from: Duration, until: Duration) -> Vec<(Duration, IpAddr)> {
    let mut rng = StdRng::seed_from_u64(1);
    let mut now = from;
    let mut sent = Vec::new();
    loop {
        while let Some(due) = schedule.poll(now, &mut rng) {
            sent.push((now, due.vip));
        }
        match schedule.wake(now) {
            Some(next) if next <= until => now = next.max(now),
            _ => return sent,
        }
    }
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn at_once_then_five_times_then_slowly() {
    let mut schedule = Schedule::new(PACE, millis(0));
    schedule.start(mk_vip(1), millis(0));
    let times: Vec<_> = run(&mut schedule, millis(0), millis(70_000))
        .into_iter()
        .map(|(at, _)| at)
        .collect();
    assert_eq!(times[..6], [0, 1100, 2200, 3300, 4400, 5500].map(millis),);
    assert_eq!(times.len(), 8, "{times:?}");
    for pair in times[5..].windows(2) {
        let gap = pair[1].saturating_sub(pair[0]);
        assert!(millis(24_000) <= gap && gap <= millis(30_000), "{gap:?}");
    }
}

#[test]
fn every_first_goes_before_any_repeat() {
    let mut schedule = Schedule::new(PACE, millis(0));
    for number in 0..2000 {
        schedule.start(mk_vip(number), millis(0));
    }
    let sent = run(&mut schedule, millis(0), millis(10_000));
    let mut seen = HashMap::new();
    for (position, (_, vip)) in sent.iter().enumerate() {
        *seen.entry(vip).or_insert(0) += 1;
        if position < 2000 {
            assert_eq!(seen[vip], 1, "{vip} again at place {position}");
        }
    }
    assert_eq!(seen.len(), 2000);
}

#[test]
fn the_rate_is_kept_and_shared_fairly() {
    let mut schedule = Schedule::new(PACE, millis(0));
    for number in 0..2000 {
        schedule.start(mk_vip(number), millis(0));
    }
    let sent = run(&mut schedule, millis(0), millis(10_000));
    let frames = |until| 2 * sent.iter().filter(|(at, _)| *at <= until).count();
    assert_eq!(frames(millis(0)), 400);
    for second in 1..=10 {
        let frames = frames(millis(second * 1000));
        let allowed = 400 + 1000 * usize::try_from(second).unwrap();
        assert!(
            frames <= allowed && frames + 10 >= allowed,
            "{second} s: {frames}"
        );
    }
    let mut counts = HashMap::new();
    for (_, vip) in &sent {
        *counts.entry(vip).or_insert(0) += 1;
    }
    let (least, most) = (
        counts.values().min().unwrap(),
        counts.values().max().unwrap(),
    );
    assert!(most - least <= 1, "{least} to {most}");
}

#[test]
fn the_last_word_goes_ahead_of_repeats() {
    let mut schedule = Schedule::new(PACE, millis(0));
    for number in 0..1000 {
        schedule.start(mk_vip(number), millis(0));
    }
    run(&mut schedule, millis(0), millis(4000));
    schedule.start(mk_vip(999), millis(4000));
    let sent = run(&mut schedule, millis(4001), millis(4010));
    assert_eq!(sent[0].1, mk_vip(999));
}

#[test]
fn what_stopped_is_silent_and_forgotten() {
    let mut schedule = Schedule::new(PACE, millis(0));
    let vip = IpAddr::from(Ipv6Addr::LOCALHOST);
    for round in 0..1000 {
        schedule.start(vip, millis(round));
        assert_eq!(run(&mut schedule, millis(round), millis(round)).len(), 1);
        schedule.stop(vip);
    }
    assert!(schedule.later.len() < 100);
    assert_eq!(run(&mut schedule, millis(1000), millis(60_000)), []);
    // Begun anew, it is announced once a round, not once for each past life as well.
    schedule.start(vip, millis(60_000));
    assert_eq!(run(&mut schedule, millis(60_000), millis(62_300)).len(), 3);
}

#[test]
fn a_thousand_held_addresses_cost_few_wake_ups() {
    let mut schedule = Schedule::new(PACE, millis(0));
    for number in 0..1000 {
        schedule.start(mk_vip(number), millis(0));
    }
    run(&mut schedule, millis(0), millis(60_000));
    let sent = run(&mut schedule, millis(60_000), millis(90_000));
    assert!((1000..=1300).contains(&sent.len()), "{}", sent.len());
}
