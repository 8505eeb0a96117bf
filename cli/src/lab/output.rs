//! Tables and progress for people.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressStyle};
use landfall_lab::failover::Progress;
use landfall_lab::measure::census::Census;
use landfall_lab::report::{Report, Run, to_millis};

use crate::print;

/// Shows progress on standard error: a spinner at a terminal, lines elsewhere.
pub(super) struct Ticker {
    bar: Option<ProgressBar>,
}

impl Ticker {
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_style(
                ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}")
                    .expect("the template is well-formed"),
            );
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar }
    }

    /// A line that stays.
    pub(super) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => print::note(text),
        }
    }

    /// What is going on now.
    pub(super) fn step(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => print::note(format_args!("{text} …")),
        }
    }

    pub(super) fn notify(&self, progress: Progress) {
        match progress {
            Progress::Step(text) => self.step(&text),
            Progress::Answers { node, after: None } => self.line(&format!("{node} leads")),
            Progress::Answers {
                node,
                after: Some(after),
            } => self.line(&format!(
                "{node} leads, {} ms after the fault",
                after.as_millis()
            )),
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn mk_table() -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY);
    table
}

/// A table of two columns.
pub(super) fn pairs(rows: &[(&str, String)]) -> Table {
    let mut table = mk_table();
    for (name, value) in rows {
        table.add_row([*name, value]);
    }
    table
}

/// A table with a header.
pub(super) fn columns(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = mk_table();
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table
}

/// One fail-over, at length.
pub(super) fn run_table(run: &Run) -> Table {
    pairs(&[
        (
            "leader",
            format!("{} → {}", run.leader_before, run.leader_after),
        ),
        (
            "outage, UDP every 2 ms, the worse of two clients",
            millis(Some(run.longest_gap)),
        ),
        ("datagrams lost", format!("{} of {}", run.lost, run.sent)),
        (
            "longest stall of an established TCP flow",
            millis(run.tcp_stall),
        ),
        ("worst connect()", millis(run.connect)),
        ("established TCP flows", flows(&run.flows)),
        ("answered ARP before", counts(&run.answers_before)),
        ("answered ARP after", counts(&run.answers_after)),
    ])
}

/// What became of established flows; those that died with their node stand apart.
fn flows(census: &Census) -> String {
    let Census {
        alive,
        reset,
        stalled,
        on_dead_node,
    } = census;
    let of = census.on_living_nodes();
    let text = match on_dead_node {
        0 => format!("{alive} of {of} alive"),
        dead => format!("{alive} of {of} on living nodes alive; {dead} were on the dead node"),
    };
    if *alive == of {
        return text;
    }
    format!("{text} (of all, {reset} reset, {stalled} stalled)")
}

/// Several fail-overs and their summary.
pub(super) fn report_table(report: &Report) -> String {
    let rows = report.runs.iter().enumerate().map(|(number, run)| {
        vec![
            (number + 1).to_string(),
            format!("{} → {}", run.leader_before, run.leader_after),
            millis(Some(run.longest_gap)),
            format!("{}/{}", run.lost, run.sent),
            millis(run.tcp_stall),
            millis(run.connect),
            format!(
                "{}/{}/{}",
                run.flows.alive, run.flows.reset, run.flows.stalled
            ),
            run.flows.on_dead_node.to_string(),
            counts(&run.answers_after),
        ]
    });
    let mut table = columns(
        &[
            "run",
            "leader",
            "outage",
            "lost",
            "TCP stall",
            "connect()",
            "alive/reset/stalled",
            "on dead node",
            "answered after",
        ],
        rows,
    );
    for column in [0, 2, 3, 4, 5, 6, 7] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let summary = &report.summary;
    format!(
        "{table}\n{} of the leader, {} nodes, {} runs: outage median {} ms, worst {} ms, p99 {}; {} of {} TCP flows alive \
         whose pods were not on a dead node",
        report.fault,
        report.nodes,
        report.runs.len(),
        summary.median_gap_ms,
        summary.max_gap_ms,
        summary
            .p99_gap_ms
            .map_or_else(|| "from 100 runs on".to_owned(), |p99| format!("{p99} ms")),
        summary.flows_survived.alive,
        summary.flows_survived.of,
    )
}

fn millis(duration: Option<Duration>) -> String {
    duration.map_or_else(
        || "–".to_owned(),
        |duration| format!("{} ms", to_millis(duration)),
    )
}

/// `node1 ×20, node2 ×3`.
pub(super) fn counts(answers: &BTreeMap<String, usize>) -> String {
    if answers.is_empty() {
        return "nobody".to_owned();
    }
    let counts: Vec<String> = answers
        .iter()
        .map(|(node, count)| format!("{node} ×{count}"))
        .collect();
    counts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_that_died_with_their_node_stand_apart() {
        let census = |alive, reset, stalled, on_dead_node| {
            flows(&Census {
                alive,
                reset,
                stalled,
                on_dead_node,
            })
        };
        assert_eq!(census(20, 0, 0, 0), "20 of 20 alive");
        assert_eq!(
            census(14, 6, 0, 6),
            "14 of 14 on living nodes alive; 6 were on the dead node"
        );
        assert_eq!(
            census(13, 6, 1, 6),
            "13 of 14 on living nodes alive; 6 were on the dead node (of all, 6 reset, 1 stalled)"
        );
        assert_eq!(
            census(19, 1, 0, 0),
            "19 of 20 alive (of all, 1 reset, 0 stalled)"
        );
    }
}
