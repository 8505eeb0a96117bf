//! The plugin as the container runtime runs it: a process, with an environment and a standard input.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use landfall_cni::call::{Attachment, Reply, Request};
use serde_json::{Value, json};

fn run(command: &str, config: &str) -> Output {
    let mut plugin = Command::new(env!("CARGO_BIN_EXE_landfall-cni"))
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "c0ffee")
        .env("CNI_NETNS", "/run/netns/none")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env(
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=mail;K8S_POD_NAME=out-0;K8S_POD_UID=u-1",
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    plugin
        .stdin
        .take()
        .unwrap()
        .write_all(config.as_bytes())
        .unwrap();
    plugin.wait_with_output().unwrap()
}

fn result() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [
            {"name": "cni0", "mac": "02:00:00:00:00:01"},
            {"name": "veth1", "mac": "02:00:00:00:00:02"},
            {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": "/run/netns/none"},
        ],
        "ips": [
            {"address": "10.244.0.5/24", "gateway": "10.244.0.1", "interface": 2},
            {"address": "fd00:10::5/64", "interface": 2},
        ],
        "dns": {"nameservers": ["10.96.0.10"]},
        "something": ["that", "is", "not", "known"],
    })
}

fn config(socket: &Path) -> String {
    json!({
        "cniVersion": "1.0.0", "name": "pods", "type": "landfall-cni",
        "socket": socket, "waitMilliseconds": 300, "prevResult": result(),
    })
    .to_string()
}

/// A speaker that takes one request, and answers after a while.
fn speaker(socket: &Path, answer: Option<Reply>, after: Duration) -> JoinHandle<Request> {
    let listener = UnixListener::bind(socket).unwrap();
    spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap())
            .read_line(&mut line)
            .unwrap();
        sleep(after);
        if let Some(answer) = answer {
            // It may have gone by now.
            let _ = writeln!(stream, "{}", serde_json::to_string(&answer).unwrap());
        }
        serde_json::from_str(&line).unwrap()
    })
}

fn printed(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn expected() -> Attachment {
    Attachment {
        container: "c0ffee".into(),
        interface: "eth0".into(),
        namespace: Some("mail".into()),
        name: Some("out-0".into()),
        uid: Some("u-1".into()),
        addresses: vec!["10.244.0.5".parse().unwrap(), "fd00:10::5".parse().unwrap()],
        host_interfaces: vec!["cni0".into(), "veth1".into()],
    }
}

#[test]
fn the_speaker_is_told_and_the_result_handed_on() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let judged = Reply {
        judged: true,
        reason: None,
    };
    let hears = speaker(&socket, Some(judged), Duration::from_millis(100));
    let output = run("ADD", &config(&socket));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(printed(&output), result());
    assert_eq!(said(&output), "");
    assert_eq!(hears.join().unwrap(), Request::Add(expected()));
}

#[test]
fn a_speaker_that_does_not_judge_in_time_fails_no_pod() {
    let judged = Some(Reply {
        judged: true,
        reason: None,
    });
    let refused = Some(Reply {
        judged: false,
        reason: Some("the API server has not told of it".into()),
    });
    let second = Duration::from_secs(1);
    for (answer, after, word) in [
        (judged, second, "did not answer within 300ms"),
        (refused, Duration::ZERO, "the API server has not told of it"),
        (None, Duration::ZERO, "cni.sock"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cni.sock");
        let hears = speaker(&socket, answer, after);
        let begun = Instant::now();
        let output = run("ADD", &config(&socket));
        println!("{word}: {:?}", begun.elapsed());
        assert!(output.status.success(), "{output:?}");
        assert_eq!(printed(&output), result());
        assert!(said(&output).contains(word), "{output:?}");
        assert!(said(&output).contains("pod mail/out-0"), "{output:?}");
        hears.join().unwrap();
    }
}

#[test]
fn no_speaker_fails_no_pod() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let output = run("ADD", &config(&socket));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(printed(&output), result());
    assert!(said(&output).contains("no speaker listens"), "{output:?}");
    // The same where one has died.
    drop(UnixListener::bind(&socket).unwrap());
    let output = run("ADD", &config(&socket));
    assert!(output.status.success() && said(&output).contains("no speaker listens"));
}

#[test]
fn a_pod_that_goes_is_told_of_and_never_held_up() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let hears = speaker(&socket, None, Duration::ZERO);
    let output = run("DEL", &config(&socket));
    assert!(output.status.success() && output.stdout.is_empty());
    assert_eq!(hears.join().unwrap(), Request::Del(expected()));
    for text in ["", "no json", "{}"] {
        let output = run("DEL", text);
        assert!(
            output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
    }
}

#[test]
fn what_is_asked_besides() {
    let output = run("VERSION", r#"{"cniVersion":"1.0.0"}"#);
    assert!(output.status.success());
    assert_eq!(printed(&output)["supportedVersions"][4], "1.1.0");
    for command in ["STATUS", "CHECK", "GC"] {
        let output = run(command, r#"{"cniVersion":"1.1.0","name":"pods"}"#);
        assert!(
            output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
    }
}

#[test]
fn errors_are_the_specifications() {
    let alone = json!({"cniVersion": "1.0.0", "name": "pods", "type": "landfall-cni"}).to_string();
    for (command, input, code, word) in [
        ("ADD", alone.as_str(), 7, "put it behind the plugin"),
        ("ADD", "no json", 6, "cannot be read"),
        ("JUMP", alone.as_str(), 4, "CNI_COMMAND"),
    ] {
        let output = run(command, input);
        assert!(!output.status.success());
        let error = printed(&output);
        assert_eq!(error["code"], code, "{error}");
        assert!(error["details"].as_str().unwrap().contains(word), "{error}");
    }
}

#[test]
fn a_curious_user_is_told_what_it_is() {
    let output = Command::new(env!("CARGO_BIN_EXE_landfall-cni"))
        .env_remove("CNI_COMMAND")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("chained CNI plugin"), "{output:?}");
}
