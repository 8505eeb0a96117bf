//! The plugin's place on a node: its program, and the end of the CNI's list.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;

use landfall_cni::chain::{Chain, ChainError, TYPE, plugin};
use serde_json::{Value, json};

struct Node {
    directory: tempfile::TempDir,
    chain: Chain,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let chain = Chain {
            programs: directory.path().join("bin"),
            lists: directory.path().join("net.d"),
        };
        fs::create_dir(&chain.programs).unwrap();
        fs::create_dir(&chain.lists).unwrap();
        let node = Self { directory, chain };
        fs::write(node.program(), "program").unwrap();
        node
    }

    /// What is to be installed.
    fn program(&self) -> PathBuf {
        self.directory.path().join("from")
    }

    fn list(&self, name: &str) -> PathBuf {
        self.chain.lists.join(name)
    }

    fn write(&self, name: &str, value: &Value) {
        fs::write(self.list(name), value.to_string()).unwrap();
    }

    fn ensure(&self) -> Result<Vec<String>, ChainError> {
        let done = self.chain.ensure(&self.program(), &ours())?;
        Ok(names(&done.lists))
    }
}

fn names(paths: &[PathBuf]) -> Vec<String> {
    paths
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect()
}

fn ours() -> Value {
    plugin(
        Path::new("/run/landfall/cni.sock"),
        Path::new("/var/lib/landfall/boot.nft"),
    )
}

fn mk_list(version: &str) -> Value {
    json!({
        "cniVersion": version, "name": "k8s-pod-network", "disableCheck": true,
        "plugins": [
            {"type": "calico", "ipam": {"type": "calico-ipam"}, "policy": {"type": "k8s"}},
            {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}},
        ],
    })
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn types(path: &Path) -> Vec<String> {
    let list = read(path);
    let plugins = list["plugins"].as_array().unwrap();
    plugins
        .iter()
        .map(|plugin| plugin["type"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn it_is_the_last_of_the_list_that_the_runtime_uses() {
    let node = Node::new();
    fs::write(node.list("05-broken.conflist"), "{").unwrap();
    node.write("07-empty.conflist", &json!({"name": "none", "plugins": []}));
    fs::write(node.list("08-kubeconfig"), "no configuration").unwrap();
    let before = mk_list("0.3.1");
    node.write("10-calico.conflist", &before);
    let private = Permissions::from_mode(0o600);
    fs::set_permissions(node.list("10-calico.conflist"), private).unwrap();
    node.write("87-podman.conflist", &mk_list("1.0.0"));
    assert_eq!(node.ensure().unwrap(), ["10-calico.conflist"]);
    let path = node.list("10-calico.conflist");
    let mut wanted = before.clone();
    wanted["plugins"].as_array_mut().unwrap().push(ours());
    assert_eq!(read(&path), wanted, "the rest stays as it was");
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(
        types(&node.list("87-podman.conflist")),
        ["calico", "portmap"]
    );
    let program = node.chain.programs.join(TYPE);
    assert_eq!(fs::read(&program).unwrap(), b"program");
    assert_eq!(
        fs::metadata(&program).unwrap().permissions().mode() & 0o777,
        0o755
    );
    // Once more, and nothing is touched.
    let written = fs::metadata(&path).unwrap().modified().unwrap();
    let done = node.chain.ensure(&node.program(), &ours()).unwrap();
    assert!(!done.program && done.lists.is_empty());
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
    // No draft stays behind.
    let mut left: Vec<_> = fs::read_dir(&node.chain.lists)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left.len(), 5, "{left:?}");
}

#[test]
fn it_comes_back_and_follows_what_changes() {
    let node = Node::new();
    let list = "10-calico.conflist";
    assert!(
        matches!(node.ensure(), Err(ChainError::NoList(_))),
        "the CNI comes later"
    );
    assert!(
        node.chain.programs.join(TYPE).exists(),
        "the program is there by then"
    );
    for version in ["0.3.1", "1.0.0"] {
        node.write(list, &mk_list(version));
        assert_eq!(node.ensure().unwrap(), [list]);
        assert_eq!(read(&node.list(list))["cniVersion"], version);
    }
    // Another version of itself, and not at the end.
    let mut moved = mk_list("1.0.0");
    let plugins = moved["plugins"].as_array_mut().unwrap();
    plugins.insert(0, json!({"type": TYPE, "socket": "/elsewhere"}));
    node.write(list, &moved);
    assert_eq!(node.ensure().unwrap(), [list]);
    assert_eq!(types(&node.list(list)), ["calico", "portmap", TYPE]);
    assert_eq!(read(&node.list(list))["plugins"][2], ours());
    // Another CNI takes over.
    node.write("00-other.conflist", &mk_list("1.0.0"));
    assert_eq!(node.ensure().unwrap(), ["00-other.conflist"]);
    fs::write(node.program(), "newer").unwrap();
    assert!(node.chain.ensure(&node.program(), &ours()).unwrap().program);
    assert_eq!(fs::read(node.chain.programs.join(TYPE)).unwrap(), b"newer");
}

#[test]
fn a_single_plugin_is_left_alone() {
    let node = Node::new();
    let single = json!({"cniVersion": "0.3.1", "name": "one", "type": "bridge"});
    node.write("10-one.conf", &single);
    node.write("20-list.conflist", &mk_list("1.0.0"));
    let error = node.ensure().unwrap_err();
    assert!(matches!(error, ChainError::Single(_)), "{error}");
    assert!(error.to_string().contains("conflist"), "{error}");
    assert_eq!(read(&node.list("10-one.conf")), single);
    assert_eq!(types(&node.list("20-list.conflist")), ["calico", "portmap"]);
}

#[test]
fn it_goes_without_a_trace() {
    let node = Node::new();
    let before = mk_list("1.0.0");
    for list in ["10-calico.conflist", "20-former.conflist"] {
        node.write(list, &before);
        node.ensure().unwrap();
        fs::rename(node.list(list), node.list("20-former.conflist")).unwrap();
    }
    node.write("10-calico.conflist", &before);
    node.ensure().unwrap();
    let done = node.chain.remove().unwrap();
    assert!(done.program);
    assert_eq!(
        names(&done.lists),
        ["10-calico.conflist", "20-former.conflist"]
    );
    for list in names(&done.lists) {
        assert_eq!(read(&node.list(&list)), before);
    }
    assert!(!node.chain.programs.join(TYPE).exists());
    let again = node.chain.remove().unwrap();
    assert!(!again.program && again.lists.is_empty());
    // Nor is it an error if there is no CNI any more.
    fs::remove_dir_all(&node.chain.lists).unwrap();
    node.chain.remove().unwrap();
}

/// The CNI writes its list all the time: whoever reads finds one that makes sense, and its last word stands.
#[test]
fn who_reads_always_finds_a_whole_list() {
    const ROUNDS: u32 = 300;
    let node = Node::new();
    let list = "10-calico.conflist";
    let write = |round: u32| {
        let mut list = mk_list("1.0.0");
        list["name"] = json!(format!("round-{round}"));
        let draft = node.list(".cni-draft");
        fs::write(&draft, list.to_string()).unwrap();
        fs::rename(&draft, node.list("10-calico.conflist")).unwrap();
    };
    write(0);
    let over = AtomicBool::new(false);
    let mut chained = 0;
    scope(|threads| {
        let reader = threads.spawn(|| {
            let mut seen = 0;
            while !over.load(Ordering::Relaxed) {
                let types = types(&node.list(list));
                assert_eq!(types[..2], ["calico", "portmap"]);
                seen += usize::from(types.len() == 3);
            }
            seen
        });
        for round in 1..=ROUNDS {
            write(round);
            match node.ensure() {
                Ok(lists) => chained += lists.len(),
                Err(ChainError::Changing(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        over.store(true, Ordering::Relaxed);
        println!(
            "{chained} of {ROUNDS} times chained anew; a reader saw {} whole lists with it",
            reader.join().unwrap()
        );
    });
    node.ensure().unwrap();
    assert_eq!(read(&node.list(list))["name"], format!("round-{ROUNDS}"));
    assert_eq!(types(&node.list(list)), ["calico", "portmap", TYPE]);
    assert!(chained > 0);
}
