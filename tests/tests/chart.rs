//! The chart: what it renders, what it refuses, and that the gossip key outlives upgrades.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use landfall_lab::{Lab, Topology, tool};
use landfall_tests::ControlPlane;
use landfall_tests::chart::NAMESPACE;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn chart() -> PathBuf {
    root().join("charts/landfall")
}

/// Helm where `hack/setup.sh` put it, with no settings of the user's.
fn helm(args: &[&str]) -> Output {
    let helm = tool::built("LANDFALL_HELM").unwrap();
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(helm);
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(variable, home.path());
    }
    command.args(args).output().unwrap()
}

fn done(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn template(file: &str, values: &[&str]) -> Output {
    let chart = chart();
    let file = format!("templates/{file}");
    let mut args = vec!["template", "landfall", chart.to_str().unwrap(), "-s", &file];
    for value in values {
        args.extend(["--set-json", value]);
    }
    helm(&args)
}

#[test]
fn the_chart_is_sound() {
    println!(
        "{}",
        done(&helm(&["lint", "--strict", chart().to_str().unwrap()]))
    );
}

#[test]
fn the_speaker_has_what_it_needs_and_no_more() {
    let speaker = done(&template("speaker.yaml", &[]));
    assert!(speaker.contains("hostNetwork: true"), "{speaker}");
    assert!(!speaker.contains("privileged: true"), "{speaker}");
    let limits = speaker.split("limits:").nth(1).unwrap();
    let limits = limits.split("requests:").next().unwrap();
    assert!(
        !limits.contains("cpu"),
        "a CPU limit delays timers: {limits}"
    );
    assert_eq!(
        capabilities(&speaker),
        ["NET_ADMIN", "NET_RAW", "BPF", "PERFMON"]
    );
    let more = template(
        "speaker.yaml",
        &[r#"speaker.extraCapabilities=["SYS_NICE"]"#],
    );
    assert_eq!(capabilities(&done(&more)).last().unwrap(), "SYS_NICE");
    let values = std::fs::read_to_string(chart().join("values.yaml")).unwrap();
    for optional in ["SYS_NICE", "SYS_RESOURCE"] {
        assert!(values.contains(optional), "{optional} is not documented");
    }
}

#[test]
fn delivery_is_kube_proxys_or_native() {
    assert!(done(&template("speaker.yaml", &[])).contains("- --delivery=kube-proxy\n"));
    let native = done(&template("speaker.yaml", &["speaker.delivery=\"native\""]));
    assert!(native.contains("- --delivery=native\n"), "{native}");
}

#[test]
fn drivers_are_named_one_by_one() {
    assert!(!done(&template("speaker.yaml", &[])).contains("--xdp"));
    let speaker = done(&template(
        "speaker.yaml",
        &[r#"speaker.xdp=["eth0","eth1"]"#],
    ));
    assert!(
        speaker.contains("- --xdp=eth0\n") && speaker.contains("- --xdp=eth1\n"),
        "{speaker}"
    );
}

#[test]
fn egress_is_asked_for() {
    let speaker = done(&template("speaker.yaml", &[]));
    assert!(!speaker.contains("--egress"), "{speaker}");
    let values = [
        "egress.enabled=true",
        "egress.bindings=2000000",
        "egress.replicationPort=7999",
        r#"egress.mark="0xc0000000""#,
    ];
    let speaker = done(&template("speaker.yaml", &values));
    assert!(speaker.contains("- --egress\n"), "{speaker}");
    assert!(speaker.contains("- --egress-bindings=2000000\n"));
    assert!(speaker.contains("- --replication-port=7999\n"));
    assert!(speaker.contains("- --egress-mark=0xc0000000\n"));
    assert!(speaker.contains("{name: replication, containerPort: 7999, protocol: TCP}\n"));
}

#[test]
fn cilium_is_said_to_be_there() {
    let alone = done(&template("speaker.yaml", &["egress.cilium.enabled=true"]));
    assert!(!alone.contains("cilium"), "nothing of egress is enabled");
    let both = ["egress.enabled=true", "egress.cilium.enabled=true"];
    let speaker = done(&template("speaker.yaml", &both));
    assert!(
        speaker.contains("- --cilium=/sys/fs/bpf/tc/globals\n"),
        "{speaker}"
    );
    let elsewhere = [
        both[0],
        both[1],
        r#"egress.cilium.mapsDir="/sys/fs/bpf/maps""#,
    ];
    let speaker = done(&template("speaker.yaml", &elsewhere));
    assert!(
        speaker.contains("- --cilium=/sys/fs/bpf/maps\n"),
        "{speaker}"
    );
}

#[test]
fn the_cni_plugin_is_asked_for() {
    let words = [
        "--cni-socket=/run/landfall/cni.sock",
        "--egress-boot-file=/var/lib/landfall/boot.nft",
        "--cni-bin-dir=/opt/cni/bin",
        "--cni-conf-dir=/etc/cni/net.d",
    ];
    let paths = [
        "/run/landfall",
        "/var/lib/landfall",
        "/opt/cni/bin",
        "/etc/cni/net.d",
    ];
    // Neither alone, nor where nothing of egress is enabled.
    for values in [&[][..], &["egress.cni.enabled=true"]] {
        let speaker = done(&template("speaker.yaml", values));
        for word in ["--egress", "cni", "/var/lib"] {
            assert!(!speaker.contains(word), "{word}: {speaker}");
        }
    }
    let without = done(&template("speaker.yaml", &["egress.enabled=true"]));
    assert!(without.contains("- --egress\n") && !without.contains("cni"));
    let both = ["egress.enabled=true", "egress.cni.enabled=true"];
    let speaker = done(&template("speaker.yaml", &both));
    for word in words {
        assert!(
            speaker.contains(&format!("- {word}\n")),
            "{word}: {speaker}"
        );
    }
    for path in paths {
        let mounted = speaker.matches(&format!("mountPath: {path}}}")).count()
            + speaker.matches(&format!("mountPath: \"{path}\"}}")).count();
        let volume = speaker.matches(&format!("path: {path}, type:")).count()
            + speaker.matches(&format!("path: \"{path}\", type:")).count();
        assert_eq!((mounted, volume), (1, 1), "{path}: {speaker}");
    }
    assert!(!speaker.contains("privileged: true"));
    assert_eq!(
        capabilities(&speaker),
        ["NET_ADMIN", "NET_RAW", "BPF", "PERFMON"]
    );
    let elsewhere = [
        both[0],
        both[1],
        r#"egress.cni.binDir="/home/kubernetes/bin""#,
    ];
    let speaker = done(&template("speaker.yaml", &elsewhere));
    assert_eq!(speaker.matches("/home/kubernetes/bin").count(), 3);
    // The real program takes what the chart gives it.
    let taken: Vec<&str> = speaker
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- --"))
        .collect();
    let mut daemon = Command::new(
        landfall_lab::Program::landfall("landfall-speaker")
            .unwrap()
            .path,
    );
    for flag in taken {
        daemon.arg(format!("--{flag}"));
    }
    // It stops at the key, which is not there: a flag that it does not know would stop it before.
    let output = daemon
        .arg("--manifests=/nonexistent")
        .env("NODE_NAME", "n")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("/etc/landfall/gossip/key") && !said.contains("unexpected argument"),
        "{said}"
    );
}

/// Who may exec into the pod may ask the speaker; nobody else on the node can.
#[test]
fn the_control_socket_is_the_pods_own() {
    let speaker = done(&template("speaker.yaml", &[]));
    let socket = Path::new(landfall_runtime::control::SOCKET);
    let directory = socket.parent().unwrap().to_str().unwrap();
    assert!(
        speaker.contains(&format!("{{name: control, mountPath: {directory}}}")),
        "{speaker}"
    );
    let volume = speaker.split("- name: control\n").nth(1).unwrap();
    assert!(volume.trim_start().starts_with("emptyDir:"), "{volume}");
}

fn capabilities(speaker: &str) -> Vec<String> {
    let added = speaker.split("add:").nth(1).unwrap();
    added
        .lines()
        .skip(1)
        .map_while(|line| line.trim().strip_prefix("- "))
        .map(str::to_owned)
        .take_while(|entry| !entry.contains(':') && !entry.contains('{'))
        .collect()
}

#[test]
fn bad_values_are_refused() {
    for (value, word) in [
        (
            r#"speaker.resources.limits.cpu="500m""#,
            "leave it out: a CPU limit delays",
        ),
        (
            r#"speaker.extraCapabilities=["SYS_ADMIN"]"#,
            "/speaker/extraCapabilities",
        ),
        ("speaker.gossipPort=70000", "/speaker/gossipPort"),
        ("controller.replicas=0", "/controller/replicas"),
        (r#"logFormat="xml""#, "logFormat"),
        ("speaker.nosuch=1", "nosuch"),
        (r#"egress.cni.binDir="opt""#, "/egress/cni/binDir"),
        ("egress.bindings=10", "/egress/bindings"),
        (r#"egress.mark="calico""#, "/egress/mark"),
        (r#"egress.cilium.mapsDir="/tmp""#, "/egress/cilium/mapsDir"),
    ] {
        let output = template("speaker.yaml", &[value]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{value} was accepted");
        assert!(stderr.contains(word), "{value}: {stderr}");
        println!("{value}: {}", stderr.trim());
    }
}

#[test]
fn the_gossip_key_is_made_once() {
    let topology = Topology {
        nodes: 1,
        pods_per_node: 0,
        ..Topology::default()
    };
    let lab = Arc::new(Lab::build(topology).unwrap());
    let plane = ControlPlane::start(&lab).unwrap();
    let (chart, kubeconfig) = (chart(), plane.kubeconfig());
    let with = |verb: &[&str]| {
        let common = [
            "--namespace",
            NAMESPACE,
            "--kubeconfig",
            kubeconfig.to_str().unwrap(),
        ];
        done(&helm(&[verb, &common].concat()))
    };
    let chart = chart.to_str().unwrap();
    let key = || {
        plane.block_on(async {
            let secrets: Api<Secret> = Api::namespaced(plane.client().await.unwrap(), NAMESPACE);
            let secret = secrets.get("landfall-gossip").await.unwrap();
            secret.data.unwrap()["key"].0.clone()
        })
    };
    let notes = with(&["install", "landfall", chart, "--create-namespace"]);
    for word in [
        "kubectl apply",
        "pod-security.kubernetes.io/enforce=privileged",
        NAMESPACE,
    ] {
        assert!(notes.contains(word), "NOTES.txt without {word:?}: {notes}");
    }
    let made = key();
    assert_eq!(made.len(), 44, "32 bytes as base64");
    with(&["upgrade", "landfall", chart, "--set", "log=debug"]);
    assert_eq!(key(), made, "an upgrade made another key");
    // Uninstalling keeps the key, and what is installed next takes it up.
    with(&["uninstall", "landfall"]);
    assert_eq!(key(), made, "uninstalling took the key away");
    with(&["install", "landfall", chart]);
    assert_eq!(key(), made, "a new installation made another key");
}

#[test]
fn every_value_is_documented() {
    let readme = std::fs::read_to_string(chart().join("README.md")).unwrap();
    let values = std::fs::read_to_string(chart().join("values.yaml")).unwrap();
    let mut section = "";
    let mut missing = Vec::new();
    for line in values.lines() {
        let Some((name, rest)) = line.split_once(':') else {
            continue;
        };
        let inner = name.strip_prefix("  ").unwrap_or(name);
        // Comments, items of lists, and what is nested deeper than a section.
        if inner.starts_with([' ', '#', '-']) {
            continue;
        }
        let path = if inner == name {
            section = name;
            if rest.trim().is_empty() {
                continue;
            }
            name.to_owned()
        } else {
            format!("{section}.{inner}")
        };
        if !readme.contains(&format!("| `{path}` |")) {
            missing.push(path);
        }
    }
    assert!(
        missing.is_empty(),
        "not in charts/landfall/README.md: {missing:?}"
    );
}
