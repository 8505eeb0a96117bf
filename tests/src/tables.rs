//! What the speakers of all nodes have told their data paths, as `/debug/state` shows it, and what those did.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use landfall_lab::Lab;

use crate::PATIENCE;

/// How often a table is looked at that is waited for.
const LOOK: Duration = Duration::from_millis(4);

/// The nodes with their weights that one port is spread over.
pub type Table = BTreeMap<String, u64>;

/// One node's table for a port, `10.88.0.200:8080/TCP`; nothing where that is not to be had.
pub fn of_node(lab: &Lab, node: &str, port: &str) -> Option<Table> {
    let state = lab.speaker_state(node).ok()?;
    let table = state["steering"]["ports"][port].as_object()?;
    let weights = table.iter();
    weights
        .map(|(node, weight)| Some((node.clone(), weight.as_u64()?)))
        .collect()
}

/// What the programs of all nodes that can be asked did with packets, by verdict.
pub fn verdicts(lab: &Lab) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for node in lab.nodes() {
        let text = lab.speaker_metrics(&node.name).unwrap_or_default();
        for line in text.lines() {
            let counted = line
                .strip_prefix("landfall_datapath_packets_total{verdict=\"")
                .and_then(|rest| rest.split_once("\"} "));
            if let Some((verdict, count)) = counted {
                *sums.entry(verdict.to_owned()).or_default() += count.parse().unwrap_or(0);
            }
        }
    }
    sums
}

/// Makes a change and waits until the tables of all these nodes are as wanted: when the last of them was.
///
/// The tables are looked at from before the change on. Panics after [`PATIENCE`].
pub fn follow<T>(
    lab: &Lab,
    nodes: &[&str],
    port: &str,
    wanted: impl Fn(&Table) -> bool + Sync,
    change: impl FnOnce() -> T,
) -> (T, Instant) {
    let look = |node: &str| {
        let begun = Instant::now();
        loop {
            let table = of_node(lab, node, port);
            if table.as_ref().is_some_and(&wanted) {
                return Instant::now();
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{node} still spreads {port} over {table:?}"
            );
            thread::sleep(LOOK);
        }
    };
    thread::scope(|scope| {
        let look = &look;
        let lookers: Vec<_> = nodes
            .iter()
            .map(|node| scope.spawn(move || look(node)))
            .collect();
        let made = change();
        let seen = lookers.into_iter().map(|looker| {
            looker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let last = seen.max().unwrap_or_else(Instant::now);
        (made, last)
    })
}
