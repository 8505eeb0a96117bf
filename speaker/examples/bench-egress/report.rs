//! What the rounds say: medians, their span, and ratios within a round.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{Case, NEW_WAYS, Round, WAYS};

/// The median of figures, the lowest and the highest.
#[derive(Clone, Copy, Debug)]
struct Span {
    median: f64,
    least: f64,
    most: f64,
}

impl Span {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Self {
            median: values[values.len() / 2],
            least: values[0],
            most: values[values.len() - 1],
        }
    }

    fn json(self) -> Value {
        json!({"median": self.median, "least": self.least, "most": self.most})
    }
}

/// Packets a second of one way over another's, what really came out; and the ratio of what each costs over a frame that
/// bounces.
fn compare<const N: usize>(
    rounds: &[Round<N>],
    ours: usize,
    nft: usize,
    bounce: usize,
) -> [Span; 2] {
    let rate = |(ns, share): (f64, f64)| share / ns;
    [
        Span::of(rounds.iter().map(|it| rate(it[ours]) / rate(it[nft]))),
        Span::of(
            rounds
                .iter()
                .map(|it| (it[nft].0 - it[bounce].0) / (it[ours].0 - it[bounce].0)),
        ),
    ]
}

fn net<const N: usize>(rounds: &[Round<N>], way: usize, bounce: usize) -> Span {
    Span::of(rounds.iter().map(|it| it[way].0 - it[bounce].0))
}

/// Prints and returns the figures of flows that are known.
pub(crate) fn known(case: Case, rounds: &[Round<10>], programs: &BTreeMap<String, f64>) -> Value {
    println!(
        "\n{} policies, {} flows, {} heard at random; medians of {} rounds (least to most)",
        case.policies,
        case.entries,
        case.heard,
        rounds.len()
    );
    println!(
        "{:<12} {:>24} {:>24} {:>22} {:>22}",
        "way", "ours, net ns", "nftables, net ns", "packets/s ×", "net, nftables/ours"
    );
    let base = [0, 1].map(|way| Span::of(rounds.iter().map(|it| it[way].0)));
    println!(
        "drop {} ns, bounce {} ns",
        show(base[0], 0),
        show(base[1], 0)
    );
    let mut ways = serde_json::Map::new();
    for ours in (2..WAYS.len()).step_by(2) {
        let (name, _) = WAYS[ours].name.split_once(',').unwrap_or_default();
        let [rate, cost] = compare(rounds, ours, ours + 1, 1);
        let (mine, theirs) = (net(rounds, ours, 1), net(rounds, ours + 1, 1));
        println!(
            "{name:<12} {:>24} {:>24} {:>22} {:>22}",
            show(mine, 0),
            show(theirs, 0),
            show(rate, 2),
            show(cost, 2)
        );
        ways.insert(
            name.replace(' ', "_"),
            json!({
                "ours_net_ns": mine.json(), "nftables_net_ns": theirs.json(),
                "packets_per_second_over_nftables": rate.json(), "nftables_net_over_ours": cost.json(),
            }),
        );
    }
    for (name, took) in programs {
        println!("{name}: {took:.0} ns a run, the kernel's clock");
    }
    json!({
        "policies": case.policies, "flows": case.entries, "heard": case.heard, "rounds": rounds.len(),
        "drop_ns": base[0].json(), "bounce_ns": base[1].json(), "ways": ways, "program_ns": programs,
    })
}

/// The same of new connections.
pub(crate) fn new(case: Case, rounds: &[Round<3>]) -> Value {
    let [rate, cost] = compare(rounds, 1, 2, 0);
    let whole = |way: usize| Span::of(rounds.iter().map(|it| it[way].1 * 1e9 / it[way].0 / 1000.0));
    let share = |way: usize| Span::of(rounds.iter().map(|it| it[way].1));
    println!(
        "\n{} policies, {} flows and some new ones; medians of {} rounds (least to most)",
        case.policies,
        case.entries,
        rounds.len()
    );
    println!(
        "{:<12} {:>24} {:>24} {:>20}",
        "way", "net ns", "thousand a second", "came out"
    );
    let mut ways = serde_json::Map::new();
    for (place, way) in NEW_WAYS.iter().enumerate().skip(1) {
        let (net, rate, share) = (net(rounds, place, 0), whole(place), share(place));
        println!(
            "{:<12} {:>24} {:>24} {:>20}",
            way.name,
            show(net, 0),
            show(rate, 0),
            show(share, 3)
        );
        ways.insert(
            way.name.replace(", ", "_"),
            json!({"net_ns": net.json(), "thousand_per_second": rate.json(), "share": share.json()}),
        );
    }
    println!(
        "connections/s × {}, net, nftables/ours {}",
        show(rate, 2),
        show(cost, 2)
    );
    json!({
        "policies": case.policies, "flows": case.entries, "rounds": rounds.len(), "ways": ways,
        "per_second_over_nftables": rate.json(), "nftables_net_over_ours": cost.json(),
    })
}

fn show(span: Span, digits: usize) -> String {
    format!(
        "{:.digits$} ({:.digits$} to {:.digits$})",
        span.median, span.least, span.most
    )
}

/// Says which goals are met: by the worst of all cases.
pub(crate) fn goals(known: &[Value], new: &[Value]) {
    let worst = |values: &mut dyn Iterator<Item = Option<f64>>| {
        values.flatten().fold(f64::INFINITY, f64::min)
    };
    let of = |ways: &'static [&'static str], figure: &'static str| {
        known.iter().flat_map(move |case| {
            ways.iter().map(move |way| {
                case.pointer(&format!("/ways/{way}/{figure}/median"))
                    .and_then(Value::as_f64)
            })
        })
    };
    println!();
    let rate = "packets_per_second_over_nftables";
    for (goal, value, least) in [
        (
            "remote pods' packets a second, over nftables', at least 2",
            worst(&mut of(&["remote_out", "remote_in"], rate)),
            2.0,
        ),
        (
            "new connections a second, over nftables', at least 2",
            worst(&mut new.iter().map(|case| {
                case.pointer("/per_second_over_nftables/median")
                    .and_then(Value::as_f64)
            })),
            2.0,
        ),
        (
            "own pods' packets a second, over nftables', at least 0.9",
            worst(&mut of(&["own_out", "own_in"], rate)),
            0.9,
        ),
        (
            "what a remote pod's packet costs at the gateway itself, nftables' over ours, at least 1",
            worst(&mut of(
                &["remote_out", "remote_in"],
                "nftables_net_over_ours",
            )),
            1.0,
        ),
    ] {
        let met = if value >= least { "met" } else { "not met" };
        println!("goal: {goal}: worst case {value:.2}, {met}");
    }
}
