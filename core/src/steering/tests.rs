use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{BUCKETS, Distribution, Pair, Table, digest, distribution, first};
use crate::model::NodeName;

fn mk_weights(nodes: usize, weight: impl Fn(usize) -> u32) -> BTreeMap<NodeName, u32> {
    (0..nodes)
        .map(|n| (format!("node-{n}").as_str().into(), weight(n)))
        .collect()
}

fn mk_table(weights: &BTreeMap<NodeName, u32>) -> Table {
    Table::of(weights.iter().map(|(node, weight)| (node, *weight)))
}

fn buckets() -> impl Iterator<Item = u32> {
    0..u32::try_from(BUCKETS).unwrap()
}

fn shares(table: &Table) -> BTreeMap<NodeName, usize> {
    let mut shares = BTreeMap::new();
    for bucket in buckets() {
        let first = table.pair(bucket).first.unwrap().clone();
        *shares.entry(first).or_default() += 1;
    }
    shares
}

/// How far the worst node is from its share, as a fraction of it.
#[expect(clippy::cast_precision_loss, reason = "some thousands")]
fn imbalance(weights: &BTreeMap<NodeName, u32>) -> f64 {
    let shares = shares(&mk_table(weights));
    let all: u32 = weights.values().sum();
    weights
        .iter()
        .map(|(node, weight)| {
            let fair = BUCKETS as f64 * f64::from(*weight) / f64::from(all);
            (shares[node] as f64 - fair).abs() / fair
        })
        .fold(0.0, f64::max)
}

/// What nodes of one version agree on.
#[test]
fn the_choice_is_fixed() {
    let table = mk_table(&mk_weights(5, |n| u32::try_from(n).unwrap() + 1));
    let sample: Vec<&str> = [0, 1, 2, 1000, 40_000, 131_071]
        .into_iter()
        .map(|bucket| &*table.pair(bucket).first.unwrap().0)
        .collect();
    let expected = ["node-2", "node-4", "node-4", "node-4", "node-1", "node-4"];
    assert_eq!(sample, expected);
}

/// What nodes of one version show of the same table; of none that is otherwise do they show the same.
#[test]
fn the_digest_is_fixed_and_tells_inputs_apart() {
    let of = |weights: &[(&str, u16)]| {
        let weights = weights.iter();
        digest(
            &weights
                .map(|(node, weight)| ((*node).into(), *weight))
                .collect(),
        )
    };
    let fixed = of(&[("n1", 1), ("n2", 3)]);
    assert_eq!(fixed, 0x7b4d_b412_9cec_6df2);
    assert_eq!(of(&[("n2", 3), ("n1", 1)]), fixed);
    let others = [
        of(&[]),
        of(&[("n1", 1)]),
        of(&[("n1", 3), ("n2", 1)]),
        of(&[("n1", 1), ("n3", 3)]),
        of(&[("n1\u{1}\u{0}n2", 3)]),
        of(&[("n1", 1), ("n2", 3), ("n3", 1)]),
    ];
    for (place, other) in others.iter().enumerate() {
        assert_ne!(*other, fixed);
        assert!(!others[..place].contains(other));
    }
    assert_eq!(digest(&Distribution::new()), of(&[]));
}

#[test]
fn balance_is_within_5_percent_to_10_nodes_and_12_at_100() {
    for nodes in 2..=10 {
        let off = imbalance(&mk_weights(nodes, |_| 1));
        println!("{nodes} nodes: {:.1} %", off * 100.0);
        assert!(off < 0.05, "{nodes} nodes: {off}");
    }
    let off = imbalance(&mk_weights(100, |_| 1));
    println!("100 nodes: {:.1} %", off * 100.0);
    assert!(off < 0.12, "{off}");
    let off = imbalance(&BTreeMap::from([
        ("a".into(), 1),
        ("b".into(), 5),
        ("c".into(), 10),
    ]));
    println!("1:5:10: {:.1} %", off * 100.0);
    assert!(off < 0.05, "1:5:10: {off}");
}

#[test]
fn a_distribution_is_in_lowest_terms_and_fits() {
    let of = |numbers: [u32; 3]| -> Vec<u16> {
        let nodes = ["a", "b", "c"].map(NodeName::from);
        let endpoints = nodes.into_iter().zip(numbers).collect();
        distribution(&endpoints).into_values().collect()
    };
    assert_eq!(of([4, 8, 2]), [2, 4, 1]);
    assert_eq!(of([0, 3, 0]), [1]);
    assert_eq!(of([1, 1_000_000, 0]), [1, 62_500]);
}

#[test]
fn few_nodes_need_no_buckets() {
    let mut table = Table::default();
    let nobody = Pair {
        first: None,
        second: None,
    };
    assert_eq!(table.pair(9), nobody);
    let [a, b]: [NodeName; 2] = ["a".into(), "b".into()];
    table.set(&a, 3);
    assert!(buckets().all(|bucket| table.pair(bucket).first == Some(&a)));
    table.set(&b, 1);
    assert!(buckets().all(|bucket| table.pair(bucket).second.is_some()));
    table.set(&a, 0);
    assert!(buckets().all(|bucket| table.pair(bucket).first == Some(&b)));
    table.set(&b, 0);
    assert_eq!(table.pair(9), nobody);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever happened before: the same members, the same table.
    #[test]
    fn history_does_not_matter(steps in prop::collection::vec((0u8..6, 0u32..5), 1..14)) {
        let mut table = Table::default();
        let mut weights: BTreeMap<NodeName, u32> = BTreeMap::new();
        for (node, weight) in steps {
            let node: NodeName = format!("n{node}").as_str().into();
            table.set(&node, weight);
            weights.insert(node, weight);
        }
        weights.retain(|_, weight| *weight > 0);
        let fresh = mk_table(&weights);
        prop_assert!(buckets().all(|bucket| table.pair(bucket) == fresh.pair(bucket)));
        // With the same weights, and without any table.
        let spread = weights.iter().map(|(node, weight)| (node.clone(), u16::try_from(*weight).unwrap())).collect();
        prop_assert!(buckets().all(|bucket| first(&spread, bucket) == fresh.pair(bucket).first));
        prop_assert_eq!(table.weights().count(), weights.len());
        let mut other = mk_table(&mk_weights(4, |_| 3));
        other.become_of(&spread);
        prop_assert!(buckets().all(|bucket| other.pair(bucket) == fresh.pair(bucket)));
    }

    /// A lost node's buckets go to those that were second there; nothing else moves.
    #[test]
    fn a_loss_moves_only_its_buckets(nodes in 2usize..9, lost in 0usize..9, scale in 1u32..4) {
        let weights = mk_weights(nodes, |n| 1 + u32::try_from(n).unwrap() % scale);
        let before = mk_table(&weights);
        let lost: NodeName = format!("node-{}", lost % nodes).as_str().into();
        let mut after = before.clone();
        after.set(&lost, 0);
        for bucket in buckets() {
            let pair = before.pair(bucket);
            let expected = if pair.first == Some(&lost) { pair.second } else { pair.first };
            prop_assert_eq!(after.pair(bucket).first, expected);
        }
    }

    /// A new node takes about its share, from everybody; nothing moves between the others.
    #[test]
    fn a_gain_moves_about_its_share(nodes in 1usize..9, weight in 1u32..4) {
        let weights = mk_weights(nodes, |_| 2);
        let before = mk_table(&weights);
        let mut after = before.clone();
        let new: NodeName = "new".into();
        after.set(&new, weight);
        let mut moved = 0;
        for bucket in buckets() {
            let first = after.pair(bucket).first;
            if first == Some(&new) {
                moved += 1;
            } else {
                prop_assert_eq!(first, before.pair(bucket).first);
            }
        }
        let fair = BUCKETS * weight as usize / (2 * nodes + weight as usize);
        prop_assert!(moved * 100 > fair * 92 && moved * 100 < fair * 108, "{moved} of {fair}");
    }
}
