//! A node whose speaker is silent: while its kernel answers it is there, when it leaves a question unanswered it is
//! suspected, and gone after three.

use landfall_ebpf_common::echo;

use super::*;

/// What `n1` knows of `n2`, whose speaker was killed; its kernel goes on.
struct Silent {
    world: World,
    read: usize,
}

impl Silent {
    fn new() -> Self {
        let mut world = World::new(2);
        world.run(Duration::from_secs(3));
        world.hosts.remove(&NodeName::from("n2"));
        let host = world.host("n1");
        host.lower.told.lock().unwrap().clear();
        let read = host.announcing.asked().hellos.len();
        Self { world, read }
    }

    /// Lets time pass. Nobody but `n2` is asked.
    fn run(&mut self, time: Duration, answers: bool) {
        let end = self.world.now + time;
        while self.world.now < end {
            self.world.step();
            let now = self.world.now;
            let host = self.world.hosts.get_mut(&NodeName::from("n1")).unwrap();
            let hellos = host.announcing.asked().hellos;
            for (interface, payload) in &hellos[self.read..] {
                if let Some((echo::REQUEST, token)) = echo::read(payload)
                    && answers
                {
                    let event = AnnouncerEvent::Hello {
                        interface: *interface,
                        from: mac_of(&"n2".into()),
                        payload: echo::message(echo::ANSWER, token).to_vec(),
                    };
                    host.speaker.announcer(event, now);
                }
            }
            self.read = hellos.len();
        }
    }

    /// What the data path was told of `n2` since it was asked last: whether it is alive, and whether it is suspected.
    fn told(&mut self) -> Vec<(bool, bool)> {
        let told = std::mem::take(&mut *self.world.host("n1").lower.told.lock().unwrap());
        let states = told.iter().filter_map(|change| match change {
            Told::Node(id, Some(state)) if *id.name.0 == *"n2" => {
                Some((state.alive, state.suspected))
            }
            _ => None,
        });
        states.collect()
    }
}

const THERE: (bool, bool) = (true, false);
const SUSPECTED: (bool, bool) = (true, true);
const GONE: (bool, bool) = (false, false);

#[test]
fn who_answers_every_question_is_never_suspected() {
    let mut silent = Silent::new();
    silent.run(Duration::from_secs(3), true);
    assert_eq!(silent.told(), []);
}

#[test]
fn who_misses_a_question_is_suspected_until_it_answers_the_next() {
    let mut silent = Silent::new();
    silent.run(Duration::from_secs(2), true);
    // Two questions are asked in that time, of which the first counts by then.
    silent.run(Duration::from_millis(200), false);
    assert_eq!(silent.told(), [SUSPECTED]);
    silent.run(Duration::from_secs(2), true);
    assert_eq!(silent.told(), [THERE]);
}

#[test]
fn who_answers_no_more_is_suspected_before_it_is_gone_and_back_at_its_first_answer() {
    let mut silent = Silent::new();
    silent.run(Duration::from_secs(2), true);
    silent.run(Duration::from_secs(2), false);
    assert_eq!(silent.told(), [SUSPECTED, GONE]);
    silent.run(Duration::from_secs(2), true);
    assert_eq!(silent.told(), [THERE]);
}

/// A speaker that is heard again is as good as an answer.
#[test]
fn who_says_hello_is_suspected_no_more() {
    let mut silent = Silent::new();
    silent.run(Duration::from_secs(2), true);
    silent.run(Duration::from_millis(200), false);
    assert_eq!(silent.told(), [SUSPECTED]);
    silent.world.boot(2, 99);
    silent.run(Duration::from_secs(2), false);
    assert_eq!(silent.told().last(), Some(&THERE));
}
