use std::collections::{BTreeSet, HashSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::groups::GroupId;
use crate::model::NodeName;

fn binding(n: u16) -> Binding {
    Binding {
        protocol: 6,
        pod: ([10, 244, 0, 1], n).into(),
        egress: ([192, 0, 2, 7], n).into(),
        remote: ([198, 51, 100, 1], 25).into(),
    }
}

/// A gateway, its standby, and the messages between them.
struct World {
    writer: Writer,
    reader: Reader,
    standby: NodeName,
    /// What the gateway holds.
    held: BTreeSet<Binding>,
    /// How far a copy is: bindings up to this were named.
    cursor: Option<Binding>,
    copied: HashSet<Binding>,
    wire: VecDeque<Message>,
    resyncs: u32,
}

impl World {
    fn new(capacity: usize) -> Self {
        let mut world = Self {
            writer: Writer::new(GroupId::from("g"), 1, capacity, 0),
            reader: Reader::default(),
            standby: "b".into(),
            held: BTreeSet::new(),
            cursor: None,
            copied: HashSet::new(),
            wire: VecDeque::new(),
            resyncs: 0,
        };
        world.follow();
        world
    }

    fn follow(&mut self) {
        self.wire.clear();
        self.reader.interrupted();
        self.writer
            .follow(self.standby.clone(), self.reader.known());
    }

    fn toggle(&mut self, n: u16) {
        let binding = binding(n);
        let change = if self.held.insert(binding) {
            Change::New(binding)
        } else {
            self.held.remove(&binding);
            Change::Closed(binding)
        };
        self.writer.record(change, Duration::ZERO);
    }

    /// The gateway sends one thing, if there is any: changes before more of a copy.
    fn send(&mut self) -> bool {
        if let Some(message) = self.writer.poll(&self.standby) {
            if matches!(message, Message::Begin { .. }) {
                self.cursor = None;
            }
            self.wire.push_back(message);
            return true;
        }
        if !self.writer.copies_to(&self.standby) {
            return false;
        }
        let after = self
            .held
            .iter()
            .filter(|it| self.cursor.is_none_or(|at| **it > at));
        let chunk: Vec<Binding> = after.take(2).copied().collect();
        self.cursor = chunk.last().copied().or(self.cursor);
        let messages = self.writer.held(&self.standby, &chunk, chunk.len() < 2);
        self.wire.extend(messages);
        true
    }

    /// The standby takes one message, as it comes off the wire.
    fn take(&mut self) {
        let Some(message) = self.wire.pop_front() else {
            return;
        };
        let step = match Message::decode(&message.encode()).unwrap() {
            Message::Begin { position, .. } => self.reader.begin(position),
            Message::Held { bindings, .. } => self.reader.held(bindings),
            Message::End { .. } => self.reader.end(),
            Message::Changes {
                position, changes, ..
            } => self.reader.changes(position, changes),
            other => panic!("{other:?}"),
        };
        match step {
            Ok(Step::Apply {
                insert,
                remove,
                position,
            }) => {
                self.copied.extend(insert);
                for binding in remove {
                    self.copied.remove(&binding);
                }
                if let Some(position) = position {
                    self.writer.applied(&self.standby, position, Duration::ZERO);
                }
            }
            Ok(Step::Keep { bindings, position }) => {
                self.copied.retain(|it| bindings.contains(it));
                self.writer.applied(&self.standby, position, Duration::ZERO);
            }
            Ok(Step::Wait) => {}
            Err(_) => {
                self.resyncs += 1;
                self.follow();
            }
        }
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            let sent = self.send();
            let pending = !self.wire.is_empty();
            self.take();
            if !sent && !pending {
                return;
            }
        }
        panic!("it never ends");
    }
}

/// What may happen.
#[derive(Clone, Debug)]
enum Act {
    Toggle(u16),
    Send,
    Take,
    /// The connection breaks, and what was on its way is lost.
    Break,
    /// The standby is a new process.
    Restart,
    /// The gateway does not know all that happened.
    Lost(u16),
    /// A message vanishes.
    Drop,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        8 => (0..24u16).prop_map(Act::Toggle),
        4 => Just(Act::Send),
        4 => Just(Act::Take),
        1 => Just(Act::Break),
        1 => Just(Act::Restart),
        1 => (0..24u16).prop_map(Act::Lost),
        1 => Just(Act::Drop),
    ];
    prop::collection::vec(act, 0..120)
}

proptest! {
    /// Whatever happens in between, the standby ends up with what the gateway has.
    #[test]
    fn the_copy_is_the_original(acts in acts(), capacity in 1..12usize) {
        let mut world = World::new(capacity);
        for act in acts {
            match act {
                Act::Toggle(n) => world.toggle(n),
                Act::Send => { world.send(); }
                Act::Take => world.take(),
                Act::Break => world.follow(),
                Act::Restart => {
                    world.reader = Reader::default();
                    world.copied.insert(binding(99));
                    world.follow();
                }
                Act::Lost(n) => {
                    let binding = binding(n);
                    if !world.held.remove(&binding) {
                        world.held.insert(binding);
                    }
                    world.writer.lost();
                }
                Act::Drop => {
                    // A gap is seen by the next numbers; the end of a copy is asked for by its timer, a new connection.
                    if world.wire.pop_back().is_some() {
                        world.follow();
                    }
                }
            }
        }
        world.settle();
        let copied: BTreeSet<Binding> = world.copied.iter().copied().collect();
        prop_assert_eq!(&copied, &world.held);
        prop_assert_eq!(world.writer.behind(&world.standby), Some(0));
    }
}

#[test]
fn a_gap_is_seen() {
    let mut world = World::new(100);
    world.settle();
    world.toggle(1);
    assert!(world.send());
    world.wire.clear();
    world.toggle(2);
    world.settle();
    assert_eq!(world.resyncs, 1);
    assert_eq!(world.copied.len(), 2);
}

#[test]
fn who_was_succeeded_is_not_believed() {
    let mut reader = Reader::default();
    let position = |epoch, next| Position { epoch, next };
    reader.begin(position(4, 0)).unwrap();
    reader.claimed(5);
    let stale = Refusal::Stale { told: 4, known: 5 };
    assert_eq!(reader.held(vec![binding(1)]), Err(stale));
    assert_eq!(reader.end(), Err(stale));
    assert_eq!(reader.changes(position(4, 0), Vec::new()), Err(stale));
    assert_eq!(reader.begin(position(4, 0)), Err(stale));
    assert!(reader.begin(position(5, 0)).is_ok());
}

#[test]
fn a_short_break_needs_no_copy() {
    let mut world = World::new(100);
    world.settle();
    world.toggle(1);
    world.settle();
    world.toggle(2);
    world.follow();
    world.send();
    assert!(matches!(world.wire[0], Message::Changes { .. }));
    world.settle();
    assert_eq!((world.copied.len(), world.resyncs), (2, 0));
}

/// The gateway's process begins anew, in the same epoch: what it has told is not what the one before had.
#[test]
fn another_process_is_not_taken_for_the_one_before() {
    let mut world = World::new(100);
    (1..=3).for_each(|n| world.toggle(n));
    world.settle();
    world.writer = Writer::new(GroupId::from("g"), 1, 100, 1 << 16);
    // Nobody follows yet: as many changes, but others.
    (3..=5).for_each(|n| world.toggle(n));
    world.follow();
    world.settle();
    assert_eq!(world.copied, world.held.iter().copied().collect());
}

#[test]
fn the_lag_is_of_the_oldest_change() {
    let mut world = World::new(100);
    world.settle();
    let at = Duration::from_millis;
    world.writer.record(Change::New(binding(1)), at(10));
    world.writer.record(Change::New(binding(2)), at(15));
    let b = world.standby.clone();
    assert_eq!(world.writer.behind(&b), Some(2));
    assert_eq!(world.writer.lag(&b, at(25)), Some(at(15)));
    let Some(Message::Changes {
        position, changes, ..
    }) = world.writer.poll(&b)
    else {
        panic!("changes are to be sent");
    };
    let end = Position {
        next: position.next + changes.len() as u64,
        ..position
    };
    let half = Position {
        next: position.next + 1,
        ..position
    };
    assert_eq!(world.writer.applied(&b, half, at(28)), Some(at(18)));
    assert_eq!(world.writer.lag(&b, at(29)), Some(at(14)));
    assert_eq!(world.writer.applied(&b, end, at(30)), Some(at(15)));
    assert_eq!(world.writer.applied(&b, end, at(40)), None);
    assert_eq!(world.writer.behind(&b), Some(0));
    assert_eq!(world.writer.lag(&b, at(40)), Some(at(0)));
}

#[test]
fn who_is_copied_to_has_no_lag() {
    let mut world = World::new(2);
    let at = Duration::from_millis;
    let b = world.standby.clone();
    assert_eq!(world.writer.lag(&b, at(0)), None, "it has nothing yet");
    while world.send() {}
    assert_eq!(world.writer.lag(&b, at(0)), None, "it was sent all");
    world.settle();
    assert_eq!(world.writer.lag(&b, at(0)), Some(at(0)));
    // More than are kept: it is to be copied to anew.
    for n in 0..3 {
        world.writer.record(Change::New(binding(n)), at(1));
    }
    assert_eq!(world.writer.lag(&b, at(2)), None);
    world.settle();
    assert_eq!(world.writer.lag(&b, at(3)), Some(at(0)));
    world.writer.lost();
    assert_eq!(world.writer.lag(&b, at(4)), None);
    let nobody: NodeName = "nobody".into();
    assert_eq!(world.writer.lag(&nobody, at(4)), None);
}

#[test]
fn a_full_message_fits() {
    let address = "[fd00:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535"
        .parse()
        .unwrap();
    let binding = Binding {
        protocol: 255,
        pod: address,
        egress: address,
        remote: address,
    };
    let mut writer = Writer::new(
        GroupId::from("g".repeat(253)),
        u64::MAX,
        10_000,
        u64::MAX / 2,
    );
    let b: NodeName = "b".into();
    writer.follow(b.clone(), None);
    writer.poll(&b);
    for message in writer.held(&b, &vec![binding; 1_500], true) {
        assert!(message.encode().len() <= MAX_MESSAGE);
    }
    for _ in 0..1_500 {
        writer.record(Change::New(binding), Duration::ZERO);
    }
    let message = writer.poll(&b).unwrap();
    let length = message.encode().len();
    println!("1 000 changes of IPv6: {length} bytes");
    assert!(length <= MAX_MESSAGE);
    assert!(matches!(message, Message::Changes { changes, .. } if changes.len() == 1_000));
}

#[test]
fn what_cannot_be_is_refused() {
    let mixed = Binding {
        egress: ([0; 8], 1).into(),
        ..binding(1)
    };
    let group = GroupId::from("g");
    let message = Message::Held {
        group: group.clone(),
        bindings: vec![mixed],
    };
    assert_eq!(
        Message::decode(&message.encode()),
        Err(MessageError::Malformed)
    );
    let position = Position {
        epoch: 0,
        next: u64::MAX,
    };
    let changes = vec![Change::New(binding(1))];
    let message = Message::Changes {
        group,
        position,
        changes,
    };
    assert_eq!(
        Message::decode(&message.encode()),
        Err(MessageError::Malformed)
    );
    assert_eq!(Message::decode(&[]), Err(MessageError::Malformed));
    assert_eq!(Message::decode(&[9, 0]), Err(MessageError::Version(9)));
    assert_eq!(
        Message::decode(&vec![1; 70_000]),
        Err(MessageError::Malformed)
    );
}

proptest! {
    #[test]
    fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Message::decode(&bytes);
    }
}
