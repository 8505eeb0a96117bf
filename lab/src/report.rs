//! The figures of fail-overs, and the JSON they are printed as.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::fault::Fault;
use crate::measure::census::Census;

/// Runs below which a 99th percentile means nothing.
const RUNS_FOR_P99: usize = 100;

/// One fail-over. Times are milliseconds in JSON, to a tenth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Run {
    /// The outage: the longest gap between the sending times of two answered datagrams, of the worse of two
    /// clients, one on the segment and one routed, that send one every 2 ms each.
    #[serde(rename = "longest_gap_ms", serialize_with = "millis")]
    pub longest_gap: Duration,
    /// The longest time from a request to its answer on a TCP flow established before, or to its reset; `null`
    /// when it could not be established.
    #[serde(rename = "tcp_stall_ms", serialize_with = "maybe_millis")]
    pub tcp_stall: Option<Duration>,
    /// The worst `connect()` of one every 50 ms; `null` when none came about.
    #[serde(rename = "connect_ms", serialize_with = "maybe_millis")]
    pub connect: Option<Duration>,
    /// Datagrams without an answer, of both clients.
    pub lost: usize,
    /// Datagrams sent, by both clients.
    pub sent: usize,
    /// TCP flows established before, asked again after.
    pub flows: Census,
    /// The node that answered for the VIP before the fault.
    pub leader_before: String,
    /// The node that answered at the end.
    pub leader_after: String,
    /// Answers in ARP (ND for IPv6) before the fault, by node.
    #[serde(skip)]
    pub answers_before: BTreeMap<String, usize>,
    /// Answers from the fault on, by node; this is what JSON has as `arp_answers`.
    #[serde(rename = "arp_answers")]
    pub answers_after: BTreeMap<String, usize>,
}

/// Several fail-overs of the same kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What happened to the leader.
    pub fault: Fault,
    /// How many nodes there were.
    pub nodes: u8,
    /// Each fail-over.
    pub runs: Vec<Run>,
    /// Over all of them.
    pub summary: Summary,
}

/// Of the flows whose pods were on living nodes, over all runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Survivors {
    /// Those that went on.
    pub alive: usize,
    /// All of them.
    pub of: usize,
}

/// Outages over all runs, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one, or the mean of the two in the middle.
    pub median_gap_ms: f64,
    /// The worst.
    pub max_gap_ms: f64,
    /// The 99th percentile (nearest rank); `null` below 100 runs.
    pub p99_gap_ms: Option<f64>,
    /// The established TCP flows that could survive, and how many did.
    pub flows_survived: Survivors,
}

impl Report {
    /// Sums runs up; `None` without any.
    pub fn new(fault: Fault, nodes: u8, runs: Vec<Run>) -> Option<Self> {
        let gaps = runs.iter().map(|run| run.longest_gap).collect();
        let summary = Summary::of(gaps, Survivors::of(&runs))?;
        Some(Self {
            fault,
            nodes,
            runs,
            summary,
        })
    }
}

impl Survivors {
    fn of(runs: &[Run]) -> Self {
        // None of those on a dead node is alive.
        Self {
            alive: runs.iter().map(|run| run.flows.alive).sum(),
            of: runs.iter().map(|run| run.flows.on_living_nodes()).sum(),
        }
    }
}

impl Summary {
    fn of(mut gaps: Vec<Duration>, flows_survived: Survivors) -> Option<Self> {
        gaps.sort_unstable();
        let middle = gaps.len() / 2;
        let median = if gaps.len() % 2 == 1 {
            gaps[middle]
        } else {
            (*gaps.get(middle.checked_sub(1)?)? + gaps[middle]) / 2
        };
        let p99 = (gaps.len() >= RUNS_FOR_P99)
            .then(|| gaps[(gaps.len() * 99).div_ceil(100) - 1])
            .map(to_millis);
        Some(Self {
            median_gap_ms: to_millis(median),
            max_gap_ms: to_millis(*gaps.last()?),
            p99_gap_ms: p99,
            flows_survived,
        })
    }
}

/// Milliseconds, to a tenth.
pub fn to_millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}

fn millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(to_millis(*duration))
}

#[expect(clippy::ref_option, reason = "serde hands a reference to the field")]
fn maybe_millis<S: Serializer>(
    duration: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    duration.map(to_millis).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_gaps(millis: impl IntoIterator<Item = u64>) -> Vec<Duration> {
        millis.into_iter().map(Duration::from_millis).collect()
    }

    #[test]
    fn p99_needs_a_hundred_runs() {
        let summary = Summary::of(mk_gaps(1..=99), Survivors::default()).unwrap();
        assert_eq!(summary.p99_gap_ms, None);
        let summary = Summary::of(mk_gaps(1..=100), Survivors::default()).unwrap();
        assert_eq!(summary.p99_gap_ms, Some(99.0));
        assert_eq!((summary.median_gap_ms, summary.max_gap_ms), (50.5, 100.0));
    }

    #[test]
    fn one_run_is_its_own_median_and_none_has_no_summary() {
        let summary = Summary::of(mk_gaps([7]), Survivors::default()).unwrap();
        assert_eq!((summary.median_gap_ms, summary.max_gap_ms), (7.0, 7.0));
        assert_eq!(Summary::of(Vec::new(), Survivors::default()), None);
    }

    #[test]
    fn the_json_is_the_documented_one() {
        let run = Run {
            longest_gap: Duration::from_micros(1_012_340),
            tcp_stall: None,
            connect: Some(Duration::from_millis(1031)),
            lost: 505,
            sent: 4000,
            flows: Census {
                alive: 13,
                reset: 6,
                stalled: 1,
                on_dead_node: 6,
            },
            leader_before: "node1".to_owned(),
            leader_after: "node2".to_owned(),
            answers_before: BTreeMap::from([("node1".to_owned(), 20)]),
            answers_after: BTreeMap::from([("node2".to_owned(), 40)]),
        };
        let report = Report::new(Fault::PowerOff, 3, vec![run.clone()]).unwrap();
        assert_eq!(
            serde_json::to_value(report).unwrap(),
            serde_json::json!({
                "fault": "power-off",
                "nodes": 3,
                "runs": [{
                    "longest_gap_ms": 1012.3,
                    "tcp_stall_ms": null,
                    "connect_ms": 1031.0,
                    "lost": 505,
                    "sent": 4000,
                    "flows": {"alive": 13, "reset": 6, "stalled": 1, "on_dead_node": 6},
                    "leader_before": "node1",
                    "leader_after": "node2",
                    "arp_answers": {"node2": 40},
                }],
                "summary": {
                    "median_gap_ms": 1012.3, "max_gap_ms": 1012.3, "p99_gap_ms": null,
                    "flows_survived": {"alive": 13, "of": 14},
                },
            })
        );
        let report = Report::new(Fault::PowerOff, 3, vec![run.clone(), run]).unwrap();
        let survived = report.summary.flows_survived;
        assert_eq!((survived.alive, survived.of), (26, 28), "over all runs");
    }
}
