//! The plugin behind CNI's own plugins, run as a container runtime runs them: by libcni (`cnitool`), in namespaces.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::thread::{JoinHandle, spawn};

use landfall_cni::call::{Attachment, Reply, Request};
use landfall_lab::tool::cni_plugins;
use landfall_lab::{LabId, Netns};
use serde_json::{Value, json};

/// A node, a pod's namespace, and a network of two plugins.
struct Chain {
    node: Netns,
    pod: Netns,
    directory: tempfile::TempDir,
    plugins: PathBuf,
    added: bool,
}

impl Chain {
    fn new(first: Value) -> Self {
        let id = LabId::fresh();
        let chain = Self {
            node: Netns::create_in(&id, "node").unwrap(),
            pod: Netns::create_in(&id, "pod").unwrap(),
            directory: tempfile::tempdir().unwrap(),
            plugins: cni_plugins().unwrap(),
            added: false,
        };
        let mut first = first;
        first["ipam"] = json!({
            "type": "host-local", "dataDir": chain.path("ipam"),
            "ranges": [[{"subnet": "10.244.9.0/24"}], [{"subnet": "fd00:10:9::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        });
        let list = json!({
            "cniVersion": "1.1.0",
            "name": "pods",
            "plugins": [first, {
                "type": "landfall-cni", "socket": chain.socket(), "waitMilliseconds": 2_000,
            }],
        });
        fs::write(chain.path("pods.conflist"), list.to_string()).unwrap();
        chain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("cni.sock")
    }

    fn call(&self, verb: &str) -> Output {
        let ours = Path::new(env!("CARGO_BIN_EXE_landfall-cni"))
            .parent()
            .unwrap();
        let path = format!("{}:{}", self.plugins.display(), ours.display());
        self.node
            .command(self.plugins.join("cnitool"))
            .args([verb, "pods", &format!("/run/netns/{}", self.pod.name())])
            .env("NETCONFPATH", self.directory.path())
            .env("CNI_PATH", path)
            .env(
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=mail;K8S_POD_NAME=out-0",
            )
            .output()
            .unwrap()
    }

    fn add(&mut self) -> Value {
        self.added = true;
        let output = self.call("add");
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if self.added {
            self.call("del");
        }
    }
}

/// A speaker that judges all it is told of: so many requests.
fn speaker(socket: &Path, requests: usize) -> JoinHandle<Vec<Request>> {
    let listener = UnixListener::bind(socket).unwrap();
    spawn(move || {
        let take = |_| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            reader.read_line(&mut line).unwrap();
            let reply = Reply {
                judged: true,
                reason: None,
            };
            writeln!(stream, "{}", serde_json::to_string(&reply).unwrap()).unwrap();
            serde_json::from_str(&line).unwrap()
        };
        (0..requests).map(take).collect()
    })
}

fn attachment(request: &Request) -> &Attachment {
    let (Request::Add(attachment) | Request::Del(attachment)) = request;
    attachment
}

#[test]
fn behind_a_bridge_and_behind_point_to_point() {
    let bridge = json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false});
    for first in [bridge, json!({"type": "ptp"})] {
        let mut chain = Chain::new(first.clone());
        let hears = speaker(&chain.socket(), 2);
        let result = chain.add();
        let output = chain.call("del");
        assert!(output.status.success(), "{output:?}");
        let requests = hears.join().unwrap();
        let told = attachment(&requests[0]);
        println!("{told:?}");
        let addresses: Vec<String> = told.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.244.9.2", "fd00:10:9::2"]);
        assert_eq!(result["ips"][0]["address"], "10.244.9.2/24");
        assert_eq!(told.name.as_deref(), Some("out-0"));
        assert_eq!(told.interface, "eth0");
        let veth = told
            .host_interfaces
            .iter()
            .find(|name| name.starts_with("veth"));
        assert!(veth.is_some(), "{told:?}");
        assert!(matches!(requests[1], Request::Del(_)));
        assert_eq!(attachment(&requests[1]).container, told.container);
        chain.added = false;
    }
}

#[test]
fn without_a_speaker_the_pod_has_its_network() {
    let mut chain = Chain::new(json!({"type": "ptp"}));
    let result = chain.add();
    assert_eq!(result["ips"][0]["address"], "10.244.9.2/24");
    let addresses = chain.pod.ip("-4 -br address show eth0").unwrap();
    assert!(addresses.contains("10.244.9.2"), "{addresses}");
    for verb in ["check", "status"] {
        let output = chain.call(verb);
        assert!(output.status.success(), "{verb}: {output:?}");
    }
}
