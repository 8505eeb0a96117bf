//! `landfall egress` as a user drives it, against a speaker's socket and an API server that say what the tests want.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use axum::Router;
use axum::extract::Query;
use axum::http::StatusCode;
use axum::response::Json;
use axum::routing::{get, post};
use landfall_runtime::control::{Armed, Binding, Bindings, Control, Egress, Pods, path, serve};
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// What the answer to `bindings` was asked with.
type Words = Query<std::collections::BTreeMap<String, String>>;

/// A speaker that is asked, on threads of its own.
struct Speaker {
    directory: TempDir,
    runtime: Runtime,
    _control: Control,
}

impl Speaker {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let socket = directory.path().join("control.sock");
        let control = {
            let _within = runtime.enter();
            serve(&socket, mk_router()).unwrap()
        };
        Self {
            directory,
            runtime,
            _control: control,
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    fn egress(&self, args: &[&str]) -> Command {
        let mut command = egress(args);
        command.arg("--socket").arg(self.socket());
        command
    }
}

fn mk_router() -> Router {
    let bindings = |Query(words): Words| async move {
        let binding = Binding {
            policy: Some("mail".into()),
            pod: Some("a/mta".into()),
            pod_address: "10.0.0.5:4000".parse().unwrap(),
            egress: "192.0.2.32:4001".parse().unwrap(),
            remote: "198.51.100.7:25".parse().unwrap(),
            protocol: "TCP".into(),
            idle_seconds: 7,
            state: "established".into(),
        };
        let wanted = words.get("policy").is_none_or(|policy| policy == "mail")
            && words.get("pod").is_none_or(|pod| pod == "a/mta");
        Json(Bindings {
            node: "n1".into(),
            bindings: wanted.then_some(binding).into_iter().collect(),
            more: usize::from(wanted) * 3,
            copies: usize::from(wanted) * 2,
        })
    };
    let here = || async {
        Json(Egress {
            node: "n1".into(),
            enabled: true,
            gateway_of: vec!["mail".into()],
            ..Egress::default()
        })
    };
    let disarm = |Query(words): Words| async move {
        if words["force"] != "true" {
            return Err((StatusCode::CONFLICT, "no other node can take over\n"));
        }
        Ok(Json(Armed {
            node: "n1".into(),
            disarmed: true,
            handed_over: vec!["mail".into()],
            abandoned: vec!["shop".into()],
        }))
    };
    let arm = || async {
        Json(Armed {
            node: "n1".into(),
            ..Armed::default()
        })
    };
    Router::new()
        .route(path::EGRESS, get(here))
        .route(path::BINDINGS, get(bindings))
        .route(path::PODS, get(|| async { Json(Pods::default()) }))
        .route(path::DISARM, post(disarm))
        .route(path::ARM, post(arm))
}

fn egress(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landfall"));
    command.arg("egress").args(args).env_remove("KUBECONFIG");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs to the end and wants this exit code; what it said, on standard output and on standard error.
fn ends(command: &mut Command, code: i32) -> (String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let (out, err) = (text(&stdout), text(&stderr));
    assert_eq!(status.code(), Some(code), "{command:?}\n{out}\n{err}");
    (out, err)
}

#[test]
fn help_has_examples_and_exit_codes() {
    let (help, _) = ends(&mut egress(&["--help"]), 0);
    for said in [
        "landfall egress explain --pod",
        "kubectl exec",
        "Exit codes:",
    ] {
        assert!(help.contains(said), "{said} is not in\n{help}");
    }
    let (help, _) = ends(&mut egress(&["disarm", "--help"]), 0);
    assert!(help.contains("not their tenant's"), "{help}");
}

#[test]
fn wrong_arguments_are_2() {
    for args in [
        &["explain", "--pod", "mta", "--to", "198.51.100.7"][..],
        &["explain", "--pod", "a/mta", "--to", "mail.example.org"],
        &["explain", "--pod", "a/mta"],
        &["bindings", "--pod", "a/b/c"],
        &["bindings", "--policy", "a&b"],
        &["bindings", "--node", "n1", "--socket", "/x"],
        &["list", "-o", "yaml"],
        &[],
    ] {
        ends(&mut egress(args), 2);
    }
}

#[test]
fn bindings_are_shown() {
    let speaker = Speaker::start();
    let (out, err) = ends(&mut speaker.egress(&["bindings"]), 0);
    assert!(out.starts_with("POD     FROM "), "{out}");
    assert!(out.contains("192.0.2.32:4001"), "{out}");
    assert!(err.contains("3 more"), "{err}");
    assert!(err.contains("2 more are kept at n1"), "{err}");
    let (out, err) = ends(&mut speaker.egress(&["bindings", "-o", "json"]), 0);
    let found: Bindings = serde_json::from_str(&out).unwrap();
    assert_eq!((found.bindings.len(), found.more), (1, 3));
    assert!(err.is_empty(), "{err}");
    let of_pod = ["bindings", "--pod", "a/mta", "--policy", "mail"];
    ends(&mut speaker.egress(&of_pod), 0);
    // None is 1, and says what the node is.
    let of_other = ["bindings", "--pod", "a/other"];
    let (out, err) = ends(&mut speaker.egress(&of_other), 1);
    assert!(
        out.is_empty() && err.contains("n1 is the gateway of mail"),
        "{err}"
    );
    ends(&mut speaker.egress(&["bindings", "--by-pod"]), 1);
}

#[test]
fn disarming_is_loud() {
    let speaker = Speaker::start();
    let (out, err) = ends(&mut speaker.egress(&["disarm"]), 1);
    assert!(out.is_empty(), "{out}");
    assert_eq!(err, "error: no other node can take over\n");
    let (out, err) = ends(&mut speaker.egress(&["disarm", "--force"]), 0);
    assert_eq!(out, "n1: disarmed\n");
    for said in [
        "EGRESS IS DISARMED ON THIS NODE",
        "NOT THEIR TENANT'S",
        "landfall egress arm",
        "Another node is the gateway now of: mail",
        "NO NODE IS THE GATEWAY NOW OF: shop",
    ] {
        assert!(err.contains(said), "{said} is not in\n{err}");
    }
    let (out, _) = ends(&mut speaker.egress(&["arm"]), 0);
    assert_eq!(out, "n1: armed\n");
}

#[test]
fn a_speaker_that_is_not_there_is_1() {
    let nowhere = ["bindings", "--socket", "/nowhere/control.sock"];
    let (_, err) = ends(&mut egress(&nowhere), 1);
    assert!(err.contains("is a speaker running here"), "{err}");
}

/// An API server that knows one pod, and a kubeconfig for it.
fn mk_api(runtime: &Runtime, directory: &Path) -> PathBuf {
    let pods = |Query(words): Words| async move {
        assert_eq!(
            words["labelSelector"],
            "app.kubernetes.io/component=speaker"
        );
        let pod = json!({"metadata": {"name": "speaker-x"}, "status": {"phase": "Running"}});
        let here = words["fieldSelector"] == "spec.nodeName=n1";
        Json(json!({
            "kind": "PodList", "apiVersion": "v1", "metadata": {},
            "items": if here { vec![pod] } else { Vec::new() },
        }))
    };
    let router = Router::new().route("/api/v1/namespaces/lf/pods", get(pods));
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move { axum::serve(listener, router).await });
    let kubeconfig = directory.join("kubeconfig");
    let text = format!(
        "{{apiVersion: v1, kind: Config, current-context: c, \
         clusters: [{{name: c, cluster: {{server: 'http://{address}'}}}}], \
         users: [{{name: u, user: {{}}}}], contexts: [{{name: c, context: {{cluster: c, user: u}}}}]}}"
    );
    fs::write(&kubeconfig, text).unwrap();
    kubeconfig
}

#[test]
fn another_nodes_speaker_is_asked_through_kubectl() {
    let speaker = Speaker::start();
    let directory = speaker.directory.path();
    let kubeconfig = mk_api(&speaker.runtime, directory);
    let kubectl = directory.join("kubectl");
    fs::write(&kubectl, "#!/bin/sh\necho \"$@\"\nexit ${CODE:-0}\n").unwrap();
    fs::set_permissions(&kubectl, fs::Permissions::from_mode(0o755)).unwrap();
    let at = |node: &str, args: &[&str]| {
        let mut command = egress(args);
        command
            .args(["--node", node, "--namespace", "lf", "--kubeconfig"])
            .arg(&kubeconfig)
            .env("PATH", directory);
        command
    };
    let exec = format!(
        "--kubeconfig={} exec --namespace lf speaker-x --container speaker -- landfall egress ",
        kubeconfig.display()
    );
    let (out, _) = ends(&mut at("n1", &["disarm", "--force"]), 0);
    assert_eq!(out, format!("{exec}disarm --force\n"));
    let (out, _) = ends(&mut at("n1", &["arm"]), 0);
    assert_eq!(out, format!("{exec}arm\n"));
    let words = [
        "bindings", "--pod", "a/mta", "--policy", "mail", "--by-pod", "-o", "json",
    ];
    let (out, _) = ends(&mut at("n1", &words), 0);
    let expected = "bindings --most=1000 --policy=mail --pod=a/mta --by-pod --output=json\n";
    assert_eq!(out, format!("{exec}{expected}"));
    // What it ends with there, it ends with here.
    ends(at("n1", &["bindings"]).env("CODE", "1"), 1);
    let (_, err) = ends(&mut at("n2", &["arm"]), 1);
    assert!(err.contains("no speaker runs on node n2"), "{err}");
}
