use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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

/// What a node says now, taken in by another.
fn hear(from: &mut Elector, to: &mut Elector, groups: u16, at: u64) -> Vec<usize> {
    let mut index = crate::groups::GroupIndex::default();
    for n in 0..groups {
        index.apply(simulation::mk_vip(n));
    }
    let changed = index.reconcile();
    let at = std::time::Duration::from_millis(at);
    let frames = from.tick(at, 0, &index, &changed).frames;
    to.peer_alive(from.me(), from.boot());
    for out in &frames {
        to.receive(&out.frame, at);
    }
    to.tick(at, 0, &index, &changed);
    frames.iter().map(|out| out.frame.len()).collect()
}

fn mk_elector(name: &str, boot: u64, gates: bool) -> Elector {
    let mut elector = Elector::new(name.into(), BootId(boot), Config::default());
    elector.set_has_gates(gates);
    elector
}

#[test]
fn the_word_of_a_gateway_outlives_its_speaker_but_not_its_egress() {
    let mail = policy_id("mail");
    let gates = |elector: &Elector| elector.gates(&"b".into(), &"g0".into(), mail);
    let said = || {
        let (mut a, mut b) = (mk_elector("a", 1, true), mk_elector("b", 2, true));
        b.set_steers(true);
        hear(&mut b, &mut a, 1, 1_000);
        assert!(!gates(&a) && !gates(&b));
        b.set_gates(&"g0".into(), [mail].into());
        assert!(gates(&b));
        hear(&mut b, &mut a, 1, 1_100);
        assert!(gates(&a));
        assert!(!a.gates(&"b".into(), &"g1".into(), mail));
        assert!(!a.gates(&"b".into(), &"g0".into(), policy_id("other")));
        (a, b)
    };
    let (mut a, mut b) = said();
    b.set_gates(&"g0".into(), BTreeSet::new());
    hear(&mut b, &mut a, 1, 1_200);
    assert!(!gates(&a), "it takes its word back");

    let (mut a, _) = said();
    let mut next = mk_elector("b", 3, true);
    next.set_steers(true);
    hear(&mut next, &mut a, 1, 1_200);
    assert!(gates(&a), "what is in the kernel outlives a speaker");
    hear(&mut next, &mut a, 1, 9_000);
    assert!(!gates(&a), "the next has had the time to say it");

    let (mut a, _) = said();
    hear(&mut mk_elector("b", 3, false), &mut a, 1, 1_200);
    assert!(!gates(&a), "the next treats no packets by policies");

    let (mut a, _) = said();
    a.gone(&"b".into());
    hear(&mut mk_elector("b", 3, true), &mut a, 1, 1_200);
    assert!(!gates(&a), "the node was off");
}

#[test]
fn a_thousand_policies_are_told_in_frames_that_fit_datagrams() {
    const POLICIES: u16 = 1_000;
    let (mut a, mut b) = (mk_elector("a", 1, true), mk_elector("b", 2, true));
    hear(&mut b, &mut a, POLICIES, 1_000);
    for n in 0..POLICIES {
        let id = policy_id(&format!("policy-{n}"));
        b.set_gates(&format!("g{n}").as_str().into(), [id].into());
    }
    let sizes = hear(&mut b, &mut a, POLICIES, 1_100);
    for n in 0..POLICIES {
        let id = policy_id(&format!("policy-{n}"));
        assert!(a.gates(&"b".into(), &format!("g{n}").as_str().into(), id));
    }
    let total: usize = sizes.iter().sum();
    println!("{POLICIES} policies: {} frames, {total} bytes", sizes.len());
    assert!(sizes.iter().all(|size| *size <= 1_200), "{sizes:?}");
    assert!(total <= 60 * usize::from(POLICIES), "{total}");
    // What has been said is not said again.
    assert_eq!(hear(&mut b, &mut a, POLICIES, 1_110), [0; 0]);
}

/// All that one says, as the other hears it.
fn tell(from: &mut Elector, to: &mut Elector, now: Duration) {
    let index = crate::groups::GroupIndex::default();
    for frame in from.tick(now, 0, &index, &BTreeSet::new()).frames {
        to.receive(&frame.frame, now);
    }
}

fn mk_addresses(last: u16) -> PodAddresses {
    let [high, low] = last.to_be_bytes();
    PodAddresses {
        uid: "u".into(),
        addresses: [[10, 0, high, low].into()].into(),
    }
}

#[test]
fn what_a_node_says_of_its_pods_goes_with_its_run() {
    let (mut one, mut other) = (mk_elector("n1", 1, true), mk_elector("n2", 2, true));
    let pod = ObjectKey::new("default", "a");
    one.say_pod(&pod, Some(mk_addresses(1)));
    tell(&mut one, &mut other, Duration::from_secs(1));
    assert_eq!(other.take_pods(), [pod.clone()].into());
    assert_eq!(other.pod(&pod).count(), 1);
    // That somebody knows it is no news of the pod.
    other.say_known(&pod, mk_addresses(1).digest());
    tell(&mut other, &mut one, Duration::from_secs(1));
    assert!(one.knows_pod(&"n2".into(), &pod, mk_addresses(1).digest()));
    assert_eq!(one.take_pods(), BTreeSet::new());
    other.peer_alive(&"n1".into(), BootId(3));
    assert_eq!(other.take_pods(), [pod.clone()].into());
    assert_eq!(other.pod(&pod).count(), 0);
    // Whichever is the first sign of the next.
    let (mut one, mut other) = (mk_elector("n1", 4, true), mk_elector("n2", 5, true));
    one.say_pod(&pod, Some(mk_addresses(1)));
    tell(&mut one, &mut other, Duration::from_secs(1));
    assert_eq!(other.take_pods(), [pod.clone()].into());
    other.hello(
        &"n1".into(),
        BootId(6),
        &"eth0".into(),
        Duration::from_secs(2),
    );
    assert_eq!(other.take_pods(), [pod].into());
}

/// A node that has had many pods is told of in a few frames.
#[test]
fn pods_that_are_gone_are_not_told_of_for_ever() {
    let mut one = mk_elector("n1", 1, true);
    for number in 0..5_000 {
        let pod = ObjectKey::new("default", format!("pod{number}"));
        one.say_pod(&pod, Some(mk_addresses(number)));
        one.say_pod(&pod, None);
    }
    let index = crate::groups::GroupIndex::default();
    let frames = one
        .tick(Duration::from_secs(1), 0, &index, &BTreeSet::new())
        .frames;
    assert!((1..20).contains(&frames.len()), "{}", frames.len());
}
