//! The writer against a sink in memory, on tokio's paused clock.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use landfall_core::ipam::{Notice, Record, RecordChange, ServiceStatus};
use landfall_core::model::{EgressStatus, Holder, ObjectKey};

use super::{EventNote, PolicyStatus, Sink, Write, WriteError, Writer};
use crate::lease::Term;
use crate::metrics::Metrics;

/// Takes 10 ms for each write, and fails as it was told.
#[derive(Default)]
struct Memory {
    log: Mutex<Vec<String>>,
    failures: Mutex<VecDeque<WriteError>>,
    flying: Mutex<(usize, usize)>,
}

impl Memory {
    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn worst(&self) -> usize {
        self.flying.lock().unwrap().1
    }
}

fn describe(write: &Write) -> String {
    match write {
        Write::Record(RecordChange::Put(record)) => format!("put {}", record.address),
        Write::Record(RecordChange::Remove(address)) => format!("remove {address}"),
        Write::Service(status) => format!("{} {:?}", status.key.name, status.ingress),
        Write::Pool(status) => format!("pool {}", status.name),
        Write::Policy(status) => format!("policy {} {}", status.name, status.status.matched_pods),
        Write::Event(note) => format!("event {}", note.notice.reason),
    }
}

struct Handle(Arc<Memory>);

impl Sink for Handle {
    fn write(&self, write: Write) -> Pin<Box<dyn Future<Output = Result<(), WriteError>> + Send>> {
        let memory = self.0.clone();
        Box::pin(async move {
            {
                let mut flying = memory.flying.lock().unwrap();
                flying.0 += 1;
                flying.1 = flying.1.max(flying.0);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            memory.flying.lock().unwrap().0 -= 1;
            if let Some(error) = memory.failures.lock().unwrap().pop_front() {
                return Err(error);
            }
            memory.log.lock().unwrap().push(describe(&write));
            Ok(())
        })
    }
}

fn mk_writer(term: &Term) -> (Writer<Handle>, Arc<Memory>) {
    let memory = Arc::new(Memory::default());
    let sink = Arc::new(Handle(memory.clone()));
    let timeout = Duration::from_secs(1);
    (
        Writer::new(sink, term.clone(), Metrics::default(), 2, timeout),
        memory,
    )
}

fn mk_status(name: &str, address: &str, notice: Option<&str>) -> Write {
    Write::Service(ServiceStatus {
        key: ObjectKey::new("default", name),
        uid: "u".into(),
        ingress: Some(vec![address.parse().unwrap()]),
        conditions: Vec::new(),
        notice: notice.map(|reason| Notice {
            warning: false,
            action: "AssignAddress",
            reason: reason.into(),
            message: String::new(),
        }),
    })
}

fn mk_put(last: u8) -> Write {
    Write::Record(RecordChange::Put(Record {
        address: [192, 0, 2, last].into(),
        pool: "a".into(),
        group: "g".into(),
        services: Vec::new(),
        egress_policies: Vec::new(),
        terms: std::collections::BTreeMap::new(),
        former: Vec::new(),
        former_policies: Vec::new(),
        retain: false,
    }))
}

async fn until_idle(writer: &mut Writer<Handle>) {
    writer.dispatch();
    while !writer.is_idle() {
        writer.progress().await;
        writer.dispatch();
    }
}

#[tokio::test(start_paused = true)]
async fn the_newest_wins_but_no_event_is_lost() {
    let (mut writer, memory) = mk_writer(&Term::unlimited());
    writer.submit(mk_status("web", "192.0.2.1", Some("First")));
    writer.submit(mk_status("web", "192.0.2.2", None));
    until_idle(&mut writer).await;
    assert_eq!(memory.log(), ["web Some([192.0.2.2])", "event First"]);
}

#[tokio::test(start_paused = true)]
async fn the_same_write_is_not_begun_twice() {
    let (mut writer, memory) = mk_writer(&Term::unlimited());
    writer.submit(mk_status("web", "192.0.2.1", Some("First")));
    writer.dispatch();
    writer.submit(mk_status("web", "192.0.2.1", None));
    until_idle(&mut writer).await;
    assert_eq!(memory.log(), ["web Some([192.0.2.1])", "event First"]);
}

#[tokio::test(start_paused = true)]
async fn what_was_to_be_told_in_between_is_told() {
    let (mut writer, memory) = mk_writer(&Term::unlimited());
    writer.submit(mk_status("web", "192.0.2.1", Some("First")));
    writer.dispatch();
    writer.submit(mk_status("web", "192.0.2.2", Some("Second")));
    writer.submit(mk_status("web", "192.0.2.1", None));
    until_idle(&mut writer).await;
    assert_eq!(
        memory.log(),
        ["web Some([192.0.2.1])", "event Second", "event First"]
    );
}

#[test]
fn the_name_of_an_event_about_a_long_name_is_one() {
    let notice = Notice {
        warning: false,
        action: "AssignAddress",
        reason: "First".into(),
        message: String::new(),
    };
    let name = format!("{}.{}", "a".repeat(229), "b".repeat(23));
    let about = Holder::EgressPolicy(name.as_str().into());
    let note = EventNote::new(&about, "u", notice);
    assert!(note.name.len() <= 253, "{}", note.name);
    assert!(note.name.starts_with(&"a".repeat(229)) && !note.name.contains(".."));
}

#[tokio::test(start_paused = true)]
async fn writes_about_one_object_never_overlap_and_few_are_in_flight() {
    let (mut writer, memory) = mk_writer(&Term::unlimited());
    for last in 0..9 {
        writer.submit(mk_put(last));
    }
    writer.dispatch();
    let address = [192, 0, 2, 0].into();
    writer.submit(Write::Record(RecordChange::Remove(address)));
    until_idle(&mut writer).await;
    assert_eq!(memory.worst(), 2);
    let log = memory.log();
    let at = |what: &str| log.iter().position(|line| line == what).unwrap();
    assert!(at("put 192.0.2.0") < at("remove 192.0.2.0"));
    assert_eq!(log.len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_failed_write_is_tried_again_until_it_is_done_or_gone() {
    let (mut writer, memory) = mk_writer(&Term::unlimited());
    let failed = || WriteError::Failed("busy".into());
    memory
        .failures
        .lock()
        .unwrap()
        .extend([failed(), failed(), failed()]);
    let begun = tokio::time::Instant::now();
    writer.submit(mk_status("web", "192.0.2.1", Some("First")));
    until_idle(&mut writer).await;
    assert_eq!(memory.log(), ["web Some([192.0.2.1])", "event First"]);
    assert!(
        begun.elapsed() >= Duration::from_millis(700),
        "waited 100, 200 and 400 ms"
    );
    memory.failures.lock().unwrap().push_back(WriteError::Gone);
    writer.submit(mk_status("web", "192.0.2.9", Some("Second")));
    until_idle(&mut writer).await;
    assert_eq!(memory.log().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn nothing_begins_after_the_term_and_what_flies_is_awaited() {
    let term = Term::unlimited();
    let (mut writer, memory) = mk_writer(&term);
    for last in 0..5 {
        writer.submit(mk_put(last));
    }
    writer.dispatch();
    term.end();
    writer.dispatch();
    writer.finish().await;
    assert_eq!(memory.log().len(), 2);
}

fn mk_policy_status(pods: u64, notices: &[&str]) -> Write {
    let notice = |reason: &&str| Notice {
        warning: false,
        action: "ProvideEgress",
        reason: (*reason).into(),
        message: String::new(),
    };
    Write::Policy(PolicyStatus {
        name: "mail".into(),
        uid: "u".into(),
        status: EgressStatus {
            matched_pods: pods,
            ..EgressStatus::default()
        },
        since: BTreeMap::new(),
        notices: notices.iter().map(notice).collect(),
    })
}

#[tokio::test(start_paused = true)]
async fn a_policys_status_is_written_once_a_second_however_its_pods_come_and_go() {
    let (mut writer, memory) = mk_writer(&Term::unlimited());
    let begun = tokio::time::Instant::now();
    for pods in 1..=40 {
        let notices: &[&str] = match pods {
            1 => &["First"],
            7 => &["Second", "Third"],
            _ => &[],
        };
        writer.submit(mk_policy_status(pods, notices));
        writer.dispatch();
        let next = tokio::time::Instant::now() + Duration::from_millis(50);
        while tokio::time::timeout_at(next, writer.progress())
            .await
            .is_ok()
        {
            writer.dispatch();
        }
    }
    until_idle(&mut writer).await;
    let log = memory.log();
    let (statuses, events): (Vec<_>, Vec<_>) =
        log.iter().partition(|line| line.starts_with("policy"));
    assert_eq!(begun.elapsed().as_secs(), 2, "40 in 50 ms each");
    assert_eq!(statuses.len(), 3, "{statuses:?}");
    assert_eq!(*statuses[2], "policy mail 40");
    assert_eq!(events, ["event First", "event Second", "event Third"]);
}
