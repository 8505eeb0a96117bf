use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::decide::beats;
use super::peer::{HeldPage, Topic, Word};
use super::wire::Mark;
use super::*;
use crate::model::{
    AddressRequest, Advertisement, FamilyPolicy, NodeName, ObjectKey, Service, TrafficPolicy,
};

pub(super) fn mk_service(name: &str) -> Service {
    Service {
        key: ObjectKey::new("default", name),
        uid: String::new(),
        labels: BTreeMap::new(),
        created: 0,
        load_balancer: true,
        class: None,
        ports: Vec::new(),
        selector: BTreeMap::new(),
        traffic_policy: TrafficPolicy::Cluster,
        health_check_node_port: 0,
        affinity: false,
        udp_ports: false,
        source_ranges: None,
        families: Vec::new(),
        family_policy: FamilyPolicy::SingleStack,
        request: AddressRequest::default(),
        ingress: Vec::new(),
        conditions: Vec::new(),
        assigned_pool: None,
    }
}

pub(super) fn mk_advertisement() -> Advertisement {
    Advertisement::plain("all")
}

fn mk_update() -> Frame {
    Frame::Update {
        mark: Mark {
            node: "a".into(),
            boot: BootId(7),
            version: 3,
        },
        from: 0,
        node: Some((1, NodeRegister::default())),
        words: vec![(
            Topic::Group("g".into()),
            3,
            Some(Word::Group(GroupRegister {
                claim: Some(Claim {
                    epoch: 2,
                    since: 5,
                    mode: ClaimMode::Yielding { to: None },
                }),
                ready: true,
                ..GroupRegister::default()
            })),
        )],
    }
}

#[test]
fn a_page_holds_the_buckets_it_was_made_of() {
    let buckets = [0, 63, 64, 700, HELD_PAGE - 1];
    let first = 3 * HELD_PAGE;
    let page = HeldPage::of(buckets.map(|bucket| first + bucket));
    assert_eq!(page.places().collect::<Vec<_>>(), buckets);
    assert_eq!(HeldPage::of([]), HeldPage::default());
}

#[test]
fn a_word_about_another_topic_or_beyond_a_page_is_refused() {
    let frame = |topic, word| Frame::Update {
        mark: Mark {
            node: "a".into(),
            boot: BootId(7),
            version: 3,
        },
        from: 0,
        node: None,
        words: vec![(topic, 3, Some(word))],
    };
    let port = HeldPort {
        vip: [10, 0, 0, 1].into(),
        port: 80,
    };
    let page = Word::Held(HeldPage::of([1, 900]));
    let good = frame(Topic::Held(port, 2), page.clone());
    assert_eq!(Frame::decode(&good.encode()), Ok(good));
    for bad in [
        frame(Topic::Held(port, u16::MAX), page.clone()),
        frame(Topic::Group("g".into()), page),
        frame(Topic::Held(port, 2), Word::Group(GroupRegister::default())),
        frame(Topic::Held(port, 2), Word::Held(HeldPage([(16, 1)].into()))),
    ] {
        assert_eq!(Frame::decode(&bad.encode()), Err(FrameError::Malformed));
    }
}

#[test]
fn frames_round_trip_and_unknown_versions_are_refused() {
    let bytes = mk_update().encode();
    assert_eq!(Frame::decode(&bytes), Ok(mk_update()));
    let mut other = bytes.clone();
    other[0] = 9;
    assert_eq!(Frame::decode(&other), Err(FrameError::Version(9)));
    let mut longer = bytes;
    longer.push(0);
    assert_eq!(Frame::decode(&longer), Err(FrameError::Malformed));
    assert_eq!(Frame::decode(&[]), Err(FrameError::Malformed));
}

/// The hash is part of the protocol: another order of nodes would make two versions fight over every group.
#[test]
fn the_hash_is_fixed() {
    assert_eq!(HASH, ("xxh64-rendezvous-1", 0x4c61_6e64_6661_6c01));
    let order = |group: &str| {
        let mut nodes = ["a", "b", "c"].map(NodeName::from);
        nodes.sort_by_key(|node| std::cmp::Reverse(score(group, node, 1)));
        nodes.map(|node| node.to_string()).concat()
    };
    let orders: Vec<String> = ["g", "10.88.0.200", "10.88.0.201", "fd00"]
        .map(order)
        .to_vec();
    assert_eq!(orders, EXPECTED_ORDERS);
}

const EXPECTED_ORDERS: [&str; 4] = ["acb", "acb", "cba", "bac"];

proptest! {
    /// Whatever arrives, nothing panics.
    #[test]
    fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut framed = vec![1];
        framed.extend_from_slice(&bytes);
        let _ = Frame::decode(&bytes);
        let _ = Frame::decode(&framed);
    }

    /// A bit flipped in a good frame: refused or read, never a panic, also by the elector.
    #[test]
    fn flipped_bits_do_no_harm(at in 0usize..60, bit in 0u8..8) {
        let mut bytes = mk_update().encode();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        let mut elector = Elector::new("me".into(), BootId(1), Config::default());
        elector.receive(&bytes, std::time::Duration::ZERO);
    }

    /// Of any set of claims exactly one beats all others, whoever compares.
    #[test]
    fn one_claim_beats_all(claims in prop::collection::btree_map("[a-d]{1,3}", 1u64..4, 1..6)) {
        let claims: Vec<(NodeName, u64)> =
            claims.into_iter().map(|(node, epoch)| (node.as_str().into(), epoch)).collect();
        let winners = claims.iter().enumerate().filter(|(at, (node, epoch))| {
            claims.iter().enumerate().all(|(other, (rival, theirs))| {
                *at == other || beats("g", (node, *epoch), (rival, *theirs))
            })
        });
        prop_assert_eq!(winners.count(), 1);
    }

    /// A node that leaves disturbs only the groups it led.
    #[test]
    fn rendezvous_is_minimal(groups in prop::collection::btree_set("[a-z]{1,8}", 1..40)) {
        let nodes: Vec<NodeName> = ["a", "b", "c", "d"].map(NodeName::from).to_vec();
        let best = |group: &str, nodes: &[NodeName]| {
            nodes.iter().max_by_key(|node| score(group, node, 1)).cloned()
        };
        for group in groups {
            let before = best(&group, &nodes);
            let after = best(&group, &nodes[..3]);
            if before.as_ref() != nodes.last() {
                prop_assert_eq!(before, after);
            }
        }
    }

    /// Whatever order deltas arrive in, with repetitions and gaps, the registers end up equal once all were seen.
    #[test]
    fn replication_converges(changes in prop::collection::vec((0u8..5, 0u64..4), 1..40), order in any::<u64>()) {
        use rand::seq::SliceRandom;
        use rand::{SeedableRng, rngs::StdRng};
        let me = NodeName::from("a");
        let mut owner = super::gossip::Registers::new(BootId(1));
        let mut frames = Vec::new();
        for (group, epoch) in changes {
            let before = owner.version;
            let register = (epoch > 0).then(|| GroupRegister { seen: epoch, ..GroupRegister::default() });
            owner.set_group(&format!("g{group}").as_str().into(), register);
            // Pages of buckets besides, some of them larger than a frame likes.
            let port = HeldPort { vip: [10, 0, 0, group].into(), port: 80 };
            let held = HeldPage::of((0..HELD_PAGE).filter(|bucket| epoch > 0 && u64::from(bucket % 7) == epoch));
            owner.set(&Topic::Held(port, u16::try_from(epoch).unwrap()), (held != HeldPage::default()).then_some(Word::Held(held)));
            frames.extend(owner.since(&me, before));
        }
        frames.extend(frames.clone());
        frames.shuffle(&mut StdRng::seed_from_u64(order));
        let mut copy = super::gossip::Registers::new(BootId(1));
        for frame in frames.into_iter().chain(owner.since(&me, 0)) {
            if let Frame::Update { mark, from, node, words } = frame {
                copy.merge(from, mark.version, node, words);
            }
        }
        prop_assert_eq!(copy.version, owner.version);
        for (topic, (_, word)) in &owner.words {
            prop_assert_eq!(copy.words.get(topic).and_then(|(_, word)| word.as_ref()), word.as_ref());
        }
    }
}

#[test]
fn weights_shift_the_odds_exactly() {
    let nodes = [NodeName::from("a"), NodeName::from("b")];
    let heavy = (0..4000)
        .filter(|n| {
            let group = format!("g{n}");
            score(&group, &nodes[0], 3) > score(&group, &nodes[1], 1)
        })
        .count();
    assert!((2900..3100).contains(&heavy), "{heavy}");
    let seen: BTreeSet<u64> = (0..100)
        .map(|n| score(&format!("g{n}"), &nodes[0], 1))
        .collect();
    assert_eq!(seen.len(), 100);
}

#[test]
fn a_silent_peer_is_reported_once_with_the_age_of_its_last_hello() {
    use std::sync::Arc;
    use std::time::Duration;

    let ms = Duration::from_millis;
    let index = crate::groups::GroupIndex::default();
    let mut elector = Elector::new("me".into(), BootId(1), Config::default());
    let lan: Arc<str> = "eth0".into();
    let lost = |elector: &mut Elector, at| elector.tick(at, 0, &index, &BTreeSet::new()).lost;

    elector.hello(&"peer".into(), BootId(2), &lan, ms(1_000));
    assert!(lost(&mut elector, ms(1_100)).is_empty());
    elector.hello(&"peer".into(), BootId(2), &lan, ms(1_300));
    for at in (1_400..2_300).step_by(100) {
        assert!(lost(&mut elector, ms(at)).is_empty(), "at {at} ms");
    }
    let expected = Lost {
        node: "peer".into(),
        unheard: ms(1_000),
    };
    assert_eq!(lost(&mut elector, ms(2_300)), [expected]);
    assert!(lost(&mut elector, ms(2_400)).is_empty());
}
