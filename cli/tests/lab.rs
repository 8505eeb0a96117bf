//! `landfall lab` as a user drives it: what it prints, its exit codes, and that nothing stays behind.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What a busy machine can promise.
const PATIENCE: Duration = Duration::from_secs(60);
const STATE: &str = "/run/landfall-lab";

/// One lab at a time: each wants both cores.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn landfall() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_landfall"))
}

fn lab(args: &[&str]) -> Command {
    let mut command = Command::new(landfall());
    command.arg("lab").args(args).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs to the end and wants this exit code; what it said.
fn ends(command: &mut Command, code: i32) -> Output {
    let output = command.output().unwrap();
    assert_eq!(
        output.status.code(),
        Some(code),
        "{command:?}\n{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

fn said(args: &[&str]) -> String {
    text(&ends(&mut lab(args), 0).stdout)
}

fn eventually(what: &str, mut come: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !come() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not in {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What a process has written down as made, while it has not struck it out.
fn ledger(pid: u32) -> Option<Value> {
    let text = std::fs::read_to_string(format!("{STATE}/ledger-{pid}.json")).ok()?;
    serde_json::from_str(&text).ok()
}

/// Waits until a process has a lab with running speakers, and reads what it made.
fn made_by(pid: u32) -> Value {
    let mut found = Value::Null;
    eventually("a lab with speakers", || {
        found = ledger(pid).unwrap_or_default();
        found["processes"]
            .as_object()
            .is_some_and(|all| !all.is_empty())
    });
    found
}

/// Asserts that nothing of what was made is there: no namespace, no process, no pin and no ledger.
fn nothing_left(pid: u32, made: &Value) {
    let namespaces = made["namespaces"].as_array().unwrap();
    let directories = made["directories"].as_array().unwrap();
    assert!(namespaces.len() > 3, "{made}");
    assert!(!directories.is_empty(), "{made}");
    let listed = text(
        &Command::new("ip")
            .args(["netns", "list"])
            .output()
            .unwrap()
            .stdout,
    );
    for name in namespaces {
        let name = name.as_str().unwrap();
        assert!(!listed.contains(name), "{name} is left: {listed}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    for directory in directories {
        let directory = directory.as_str().unwrap();
        assert!(!Path::new(directory).exists(), "{directory} is left");
        assert!(!mounts.contains(directory), "pins of {directory} are left");
    }
    for (name, process) in made["processes"].as_object().unwrap() {
        let stat = format!("/proc/{}/stat", process["pid"]);
        // Another process may have the number by now; a zombie waits for its new parent.
        eventually("the process ends", || {
            let Ok(stat) = std::fs::read_to_string(&stat) else {
                return true;
            };
            let fields: Vec<&str> = stat
                .rsplit_once(')')
                .unwrap()
                .1
                .split_whitespace()
                .collect();
            let same = fields[19].parse().ok() == process["started"].as_u64();
            if same && fields[0] != "Z" {
                println!("{name} still runs");
            }
            !same || fields[0] == "Z"
        });
    }
    assert_eq!(ledger(pid), None);
}

#[test]
fn wrong_arguments_end_with_2_and_say_what_is_wrong() {
    for (args, word) in [
        (&["--nodes", "0"][..], "1..=80"),
        (&["--nodes", "many"], "invalid digit"),
        (&["failover", "--fault", "earthquake"], "power-off"),
        (&["failover", "--fault", "freeze"], "one of power-off"),
        (&["failover", "--runs", "0"], "1..=10000"),
        (&["failover", "-o", "xml"], "json"),
        (&["fault", "kill"], "<NODE>"),
        (&["exec", "client"], "<COMMAND>"),
        (&["nonsense"], "nonsense"),
    ] {
        let output = ends(&mut lab(args), 2);
        let said = text(&output.stderr);
        assert!(said.contains(word), "{args:?}: {said}");
        assert!(output.stdout.is_empty());
    }
}

/// The writing end of a pipe that nobody reads.
fn to_nobody() -> Stdio {
    let (_, writer) = std::io::pipe().unwrap();
    writer.into()
}

#[test]
fn a_failure_that_nobody_reads_of_is_the_same_failure() {
    ends(lab(&["--nodes", "1"]).stderr(to_nobody()), 1);
}

#[test]
fn one_fail_over_from_nothing_to_the_report() {
    let _turn = turn();
    let report = said(&["--nodes", "3"]);
    println!("{report}");
    for line in [
        "leader",
        "outage",
        "datagrams lost",
        "on living nodes alive",
        "answered ARP after",
    ] {
        assert!(report.contains(line), "no {line:?} in {report}");
    }
}

#[test]
fn the_json_of_failover_is_as_documented() {
    let _turn = turn();
    let output = said(&["failover", "--fault", "drain", "--runs", "2", "-o", "json"]);
    println!("{output}");
    let report: Value = serde_json::from_str(&output).unwrap();
    let keys = |value: &Value| {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys.join(" ")
    };
    assert_eq!(keys(&report), "fault nodes runs summary");
    assert_eq!(report["fault"], "drain");
    assert_eq!(report["nodes"], 3);
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for run in runs {
        assert_eq!(
            keys(run),
            "arp_answers connect_ms flows leader_after leader_before longest_gap_ms lost sent tcp_stall_ms"
        );
        assert_eq!(keys(&run["flows"]), "alive on_dead_node reset stalled");
        assert_ne!(run["leader_before"], run["leader_after"]);
        assert!(run["longest_gap_ms"].is_f64(), "{run}");
        assert!(run["sent"].as_u64() > run["lost"].as_u64(), "{run}");
        let after = run["leader_after"].as_str().unwrap();
        assert!(run["arp_answers"][after].as_u64() > Some(0), "{run}");
    }
    assert_eq!(
        keys(&report["summary"]),
        "flows_survived max_gap_ms median_gap_ms p99_gap_ms"
    );
    let survived = &report["summary"]["flows_survived"];
    assert_eq!(keys(survived), "alive of");
    let counted = |kind: &str| -> u64 {
        let of_run = runs.iter().map(|run| run["flows"][kind].as_u64().unwrap());
        of_run.sum()
    };
    assert_eq!(counted("on_dead_node"), 0, "no pod dies with a speaker");
    let all = counted("alive") + counted("reset") + counted("stalled");
    assert_eq!(survived["of"].as_u64(), Some(all));
    assert_eq!(survived["alive"].as_u64(), Some(counted("alive")));
    assert_eq!(report["summary"]["p99_gap_ms"], Value::Null, "of two runs");
}

#[test]
fn ctrl_c_leaves_nothing_while_building_and_in_a_run() {
    let _turn = turn();
    for reached in ["building the LAN", "run 1 of 100"] {
        let mut run = lab(&["failover", "--runs", "100"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(run.stderr.take().unwrap()).lines();
        let come = lines.any(|line| line.unwrap().contains(reached));
        assert!(come, "it never said {reached:?}");
        let made = made_by(run.id());
        ends(
            Command::new("kill").args(["-INT", &run.id().to_string()]),
            0,
        );
        // The pipe stays open, and is emptied, until the process has ended.
        lines.for_each(drop);
        assert_eq!(run.wait().unwrap().code(), Some(130), "{reached}");
        nothing_left(run.id(), &made);
    }
}

#[test]
fn a_speaker_that_ends_fails_the_run_and_nothing_is_left() {
    let _turn = turn();
    // A speaker that lives long enough for the lab to be seen, and dies.
    let directory =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("dies-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let here = directory.join("landfall");
    std::fs::copy(landfall(), &here).unwrap();
    let dies = directory.join("landfall-speaker");
    std::fs::write(&dies, "#!/bin/sh\nsleep 2\necho it broke\nexit 1\n").unwrap();
    ends(Command::new("chmod").arg("+x").arg(&dies), 0);
    let run = Command::new(&here)
        .args(["lab", "--nodes", "2"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = run.id();
    let made = made_by(pid);
    let output = run.wait_with_output().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("it broke"), "{said}");
    nothing_left(pid, &made);
}

/// Takes the lab down, also when the test fails.
struct Up;

impl Drop for Up {
    fn drop(&mut self) {
        let _ = lab(&["down"]).output();
    }
}

#[test]
fn a_lab_is_kept_up_played_with_and_taken_down() {
    let _turn = turn();
    let none = text(&ends(&mut lab(&["status"]), 1).stderr);
    assert!(none.contains("landfall lab up"), "{none}");
    let up = Up;
    let shown = said(&["up", "--nodes", "3"]);
    assert!(shown.contains("node3"), "{shown}");
    let again = text(&ends(&mut lab(&["up"]), 1).stderr);
    assert!(again.contains("up already"), "{again}");

    let status = || -> Value { serde_json::from_str(&said(&["status", "-o", "json"])).unwrap() };
    let first = status();
    let holder = u32::try_from(first["pid"].as_u64().unwrap()).unwrap();
    let made = made_by(holder);
    assert_eq!(said(&["exec", "client", "--", "echo", "hello"]), "hello\n");
    ends(&mut lab(&["exec", "node1", "--", "sh", "-c", "exit 7"]), 7);
    let unknown = text(&ends(&mut lab(&["exec", "node9", "true"]), 1).stderr);
    assert!(unknown.contains("node1"), "{unknown}");

    for args in [&["status"][..], &["status", "-o", "json"]] {
        let output = ends(lab(args).stdout(to_nobody()), 0);
        assert_eq!(text(&output.stderr), "", "{args:?}");
    }

    let vip = first["vips"].as_object().unwrap().keys().next().unwrap();
    let leader = |status: &Value| {
        let answers = status["vips"][vip].as_object().unwrap();
        (answers.len() == 1).then(|| answers.keys().next().unwrap().clone())
    };
    let led = leader(&first).unwrap();
    said(&["fault", "power-off", &led]);
    eventually("another node leads", || {
        leader(&status()).is_some_and(|now| now != led)
    });
    said(&["fault", "heal"]);
    eventually("all speakers run again", || {
        let nodes = status()["nodes"].as_array().unwrap().clone();
        nodes.iter().all(|node| node["speaker"] == true)
    });
    let wrong = text(&ends(&mut lab(&["fault", "kill", "node9"]), 1).stderr);
    assert!(wrong.contains("node9"), "{wrong}");

    let down = said(&["down"]);
    assert!(down.contains("removed the lab"), "{down}");
    nothing_left(holder, &made);
    ends(&mut lab(&["status"]), 1);
    drop(up);
}

#[test]
fn without_a_speaker_the_machine_lacks_something() {
    let directory =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lacks-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let alone = directory.join("landfall");
    std::fs::copy(landfall(), &alone).unwrap();
    let output = ends(Command::new(&alone).arg("lab"), 3);
    std::fs::remove_dir_all(&directory).unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("landfall-speaker"), "{said}");
}
